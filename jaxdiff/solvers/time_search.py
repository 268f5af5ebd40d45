"""Which intermediate times to sample at: a search over the points of a grid for the lowest score of any metric.

The score is a plain Python function of the chosen points, say the FID of the samples made with them. Each is asked for
once. Nothing here samples or judges.
"""

import math
from collections.abc import Callable


def ternary_search(score: Callable[[int], float], low: int, high: int) -> int:
    """The integer in [low, high] with the lowest score, for a score that falls and then rises.

    Narrows the interval by a third with two calls until three integers or fewer are left, and compares those. With a
    score that is not of that form, for instance one with noise, the result is the best one that was looked at.

    Args:
      score: of one integer; lower is better. Never called twice with the same.
      low, high: ends of the interval, both included.

    Raises:
      ValueError: if low exceeds high, or a score is nan.

    Source: Song et al. 2023 (arXiv:2303.01469) section 4. The release returns an earlier probe where two integers are
      left; here the best of all probes is returned.
    """
    if low > high:
        raise ValueError(f"ternary_search: need low <= high, got {low} and {high}; swap them")
    seen: dict[int, float] = {}

    def at(i: int) -> float:
        if i not in seen:
            seen[i] = float(score(i))
            if math.isnan(seen[i]):
                raise ValueError(f"ternary_search: the score of {i} is nan; a score must be a number")
        return seen[i]

    while high - low >= 3:
        third = (high - low) // 3
        first, second = low + third, high - third
        if at(first) < at(second):
            high = second
        else:
            low = first
    for i in range(low, high + 1):
        at(i)
    return min(seen, key=seen.__getitem__)


def greedy_times(score: Callable[[tuple[int, ...]], float], last: int, num_steps: int) -> tuple[int, ...]:
    """Indices of a grid for sampling in num_steps steps, each found by `ternary_search` with the earlier ones fixed.

    Args:
      score: of the indices so far, increasing (from noisy to clean) and starting with 0; lower is better.
      last: the grid's largest index, that of t_min, which is not a step of its own.
      num_steps: how many indices to return, 1 or more; 1 is (0,) without asking for a score.

    Raises:
      ValueError: if the grid has fewer than num_steps points above t_min.

    Source: Song et al. 2023 section 4.
    """
    if not 1 <= num_steps <= last:
        raise ValueError(f"greedy_times: num_steps must be 1 to {last}, the points above t_min, got {num_steps}")
    chosen = (0,)
    while len(chosen) < num_steps:
        low = chosen[-1] + 1
        high = last - (num_steps - len(chosen))  # leave a point for each of the steps to come
        chosen += (ternary_search(lambda i, before=chosen: score((*before, i)), low, high),)
    return chosen
