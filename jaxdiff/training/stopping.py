"""When to stop: SIGINT, SIGTERM or a preemption notice, on whichever process, becomes one step at which all stop.

A process alone catches the two signals. Where `jax.distributed` runs, its preemption service has caught SIGTERM
already and makes the processes agree on a step shortly ahead; SIGINT is passed on to it. Saving is the loop's business.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

STOPS = (signal.SIGTERM, signal.SIGINT)  # in rising order of what an agreed stop is called

StopAt = Callable[[int], str | None]


@contextmanager
def stop_signals() -> Iterator[StopAt]:
    """Listens while the body runs.

    Yields:
      A function to be asked after every step, with the number of that step: the name of the signal that stops the run
      here, or None. All processes get the same answer at the same step. The first signal of a process only asks for a
      stop; the second one acts as it would without this.
    """
    if jax.distributed.is_initialized():
        with _caught((signal.SIGINT,)) as caught:
            yield lambda step: _agreed(step, caught)
    else:
        with _caught(STOPS) as caught:
            yield lambda step: caught[0] if caught else None


def _agreed(step: int, caught: list[str]) -> str | None:
    from jax.experimental import multihost_utils

    if caught and caught[-1] != "passed on":
        caught.append("passed on")
        os.kill(os.getpid(), signal.SIGTERM)
    if not multihost_utils.reached_preemption_sync_point(step):
        return None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the service would swallow a second one
    reasons = multihost_utils.process_allgather(np.int32(bool(caught)))
    return STOPS[int(np.max(reasons))].name


@contextmanager
def _caught(numbers: tuple[signal.Signals, ...]) -> Iterator[list[str]]:
    """A list that gets the name of the first signal; after it, and at the end, the signals act as they did before."""
    caught: list[str] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def catch(number: int, frame: Any) -> None:
        del frame
        caught.append(signal.Signals(number).name)
        restore()
        # os.write, since print may be interrupted half-way by this very handler.
        os.write(2, f"\n{caught[0]}: finishing this step and saving; once more to stop at once\n".encode())

    # Python allows handlers in the main thread only; elsewhere signals keep their usual effect.
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, catch) for number in numbers}
    try:
        yield caught
    finally:
        restore()
