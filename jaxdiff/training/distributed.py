"""Several processes, one run: starting `jax.distributed`, and waiting for one another.

`start` joins this process to the others when the environment says that there are others: a TPU pod, Slurm, Open MPI,
or the three variables of `VARIABLES`. Process 0 coordinates, and it alone logs and writes metrics. Nothing here
computes; where arrays live is `sharding.py`'s business, and how a run stops is `stopping.py`'s.
"""

import os
import re
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import jax

COORDINATOR, NUM_PROCESSES, PROCESS_ID = VARIABLES = (
    "JAXDIFF_COORDINATOR",
    "JAXDIFF_NUM_PROCESSES",
    "JAXDIFF_PROCESS_ID",
)

# How long a process that ends waits for the others. A process that failed must not hold them for the default 5 minutes.
SHUTDOWN_S = 30


def start(mode: str = "auto", *, timeout_s: int = 300) -> bool:
    """Joins the other processes of this run, if there are any. Call it before anything touches a device.

    Args:
      mode: "auto" joins if the variables of `VARIABLES` are set, or if JAX finds a cluster with more than one process
        (TPU pod, Slurm, Open MPI); "off" never does.
      timeout_s: how long to wait for the others, seconds.

    Returns:
      Whether this call joined. False also where `jax.distributed` runs already.

    Raises:
      ValueError: for another mode, or variables that are half given or make no sense.
      ConnectionError: if process 0 cannot be reached in time. If the others do not come in time, the process ends with
        one line and exit code 2, because JAX would abort it.
    """
    if mode not in ("auto", "off"):
        raise ValueError(f"distributed takes 'auto' or 'off', got {mode!r}")
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if mode == "off" or jax.distributed.is_initialized():
        return False
    if given:
        coordinator, num_processes, process_id = _checked(given)
        if process_id:
            _reach(coordinator, timeout_s)
        with _deadline(f"{num_processes} processes at {coordinator}", timeout_s):
            jax.distributed.initialize(
                coordinator, num_processes, process_id, cluster_detection_method="deactivate",
                initialization_timeout=2 * timeout_s, shutdown_timeout_seconds=SHUTDOWN_S,
            )  # fmt: skip
        return True
    if cluster_processes() < 2:
        return False
    with _deadline(f"{cluster_processes()} processes of the cluster", timeout_s):
        jax.distributed.initialize(initialization_timeout=2 * timeout_s, shutdown_timeout_seconds=SHUTDOWN_S)
    return True


def cluster_processes() -> int:
    """Number of processes in the cluster that `jax.distributed.initialize()` would find on its own; 1 without one."""
    # Not public in JAX, but the only way to learn this without being aborted where there is no cluster.
    from jax._src.clusters import ClusterEnv

    with warnings.catch_warnings(action="ignore"):  # Kubernetes without its package: no cluster for us
        kinds = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method]
        found = next((kind for kind in kinds if kind.is_env_present()), None)
    return 1 if found is None else found.get_process_count()


def local_environments(num_processes: int) -> list[dict[str, str]]:
    """The variables for processes on this machine: one dict each, to be added to the environment of the process.

    Args:
      num_processes: how many; the port is free when this returns.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    common = {COORDINATOR: f"localhost:{port}", NUM_PROCESSES: str(num_processes)}
    return [common | {PROCESS_ID: str(index)} for index in range(num_processes)]


def wait_for_all(name: str) -> None:
    """Returns when every process has come here; at once where there is only one."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def _checked(given: Mapping[str, str]) -> tuple[str, int, int]:
    missing = [name for name in VARIABLES if name not in given]
    if missing:
        raise ValueError(f"{', '.join(given)} is set but {' and '.join(missing)} is not: set all three, or none")
    if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\s]+):\d+", given[COORDINATOR]):
        raise ValueError(f"{COORDINATOR} takes host:port of process 0, got {given[COORDINATOR]!r}")
    for name in (NUM_PROCESSES, PROCESS_ID):
        if not re.fullmatch(r"\d+", given[name]):
            raise ValueError(f"{name} takes a whole number, got {given[name]!r}")
    num_processes, process_id = int(given[NUM_PROCESSES]), int(given[PROCESS_ID])
    if process_id >= num_processes:
        raise ValueError(f"{PROCESS_ID} is {process_id}, expected 0 to {NUM_PROCESSES} - 1 = {num_processes - 1}")
    return given[COORDINATOR], num_processes, process_id


def _reach(coordinator: str, timeout_s: int) -> None:
    """Waits until process 0 listens: JAX aborts the process where it does not."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() > deadline:
                raise ConnectionError(
                    f"process 0 does not answer at {coordinator} after {timeout_s} s ({error}): "
                    f"start it, or correct {COORDINATOR}"
                ) from None
        time.sleep(0.2)


@contextmanager
def _deadline(others: str, timeout_s: int) -> Iterator[None]:
    """Ends the process with one line if the body takes longer; it runs in C++, where no exception gets."""

    def give_up() -> None:
        print(f"error: not all {others} have come after {timeout_s} s: start the others", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
