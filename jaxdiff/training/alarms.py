"""When a run that is still finite should stop: a metric that stays out of its range.

`faults.Inspector` counts; the loop puts off checkpoints meanwhile. Nothing here knows a method, only names in its logs.
"""

import math
from typing import NamedTuple


class Alarm(NamedTuple):
    """A range that a metric must not leave for long. Steps that do not have it, or have NaN, count for nothing.

    Attributes:
      metric: its name in the logs, such as "diversity" or "model/grad_norm".
      low, high: the range; its ends belong to it.
      patience: steps in a row outside of it stop the run. While they are counted no checkpoint is written, so that the
        newest one stays good. The row begins anew when a run is continued.
      meaning: what it says and what to do, for the message.
    """

    metric: str
    low: float = -math.inf
    high: float = math.inf
    patience: int = 200
    meaning: str = "change the settings that lead to it"


def collapse(player: str = "model", *, diversity: float = 0.2, patience: int = 200) -> tuple[Alarm, ...]:
    """Alarms of a generator that answers every noise alike, or that gets no gradient.

    Args:
      player: the generator.
      diversity: lowest good value of the metric of that name, 1 for data.
      patience: see `Alarm`.
    """
    remedy = "weaken the discriminator: more R1, a lower learning rate, or more noise on what it compares"
    return (
        Alarm("diversity", low=diversity, patience=patience, meaning=f"the generator has collapsed; {remedy}"),
        Alarm(f"{player}/grad_norm", low=1e-8, patience=patience, meaning=f"the generator gets no gradient; {remedy}"),
    )
