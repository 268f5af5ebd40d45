"""Solvers by the names people type, with what each costs in network calls. For command lines; code names the makers."""

import difflib
from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array

from jaxdiff.schedules import Schedule
from jaxdiff.solvers.ancestral import ancestral
from jaxdiff.solvers.base import Solver
from jaxdiff.solvers.ddim import ddim
from jaxdiff.solvers.dpm_solver import dpm_solver
from jaxdiff.solvers.dpm_solver_singlestep import dpm_solver_singlestep, singlestep_orders
from jaxdiff.solvers.exponential import DATA_ODE, DATA_SDE, NOISE_ODE
from jaxdiff.solvers.heun import euler, heun
from jaxdiff.solvers.pndm import pndm
from jaxdiff.solvers.unipc import unipc


class NamedSolver(NamedTuple):
    """A solver for a command line.

    Attributes:
      name: what people type.
      make: (schedule, eta, number of times or None) -> Solver. Only DDIM uses eta; only single-step plans the number.
      calls: network calls of `sample` on a grid of n times.
      takes_eta: whether eta changes anything.
    """

    name: str
    make: Callable[[Schedule, Array, int | None], Solver]
    calls: Callable[[int], int]
    takes_eta: bool = False

    def steps(self, calls: int) -> int:
        """The largest number of times whose sampling takes at most this many network calls."""
        n = calls
        while n > 1 and self.calls(n) > calls:
            n -= 1
        return n


def one_a_step(n: int) -> int:
    """One call a step."""
    return n


def two_a_step(n: int) -> int:
    """Two calls a step, one in the step to clean data."""
    return 2 * n - 1


def _singlestep(order: int) -> Callable[[Schedule, Array, int | None], Solver]:
    def make(schedule, eta, n):
        del eta
        if n is None:
            raise ValueError("a single-step DPM-Solver plans its steps ahead; give their number with --steps")
        return ddim(schedule) if n < 2 else dpm_solver_singlestep(schedule, singlestep_orders(n - 1, order))

    return make


SOLVERS = {
    solver.name: solver
    for solver in (
        NamedSolver("ancestral", lambda s, eta, n: ancestral(s), one_a_step),
        NamedSolver("ddim", lambda s, eta, n: ddim(s, eta), one_a_step, takes_eta=True),
        NamedSolver("euler", lambda s, eta, n: euler(s), one_a_step),
        NamedSolver("heun", lambda s, eta, n: heun(s), two_a_step),
        NamedSolver("dpm_2m", lambda s, eta, n: dpm_solver(s, 2, form=NOISE_ODE), one_a_step),
        NamedSolver("dpmpp_2m", lambda s, eta, n: dpm_solver(s, 2, form=DATA_ODE), one_a_step),
        NamedSolver("dpmpp_3m", lambda s, eta, n: dpm_solver(s, 3, form=DATA_ODE), one_a_step),
        NamedSolver("dpmpp_2m_sde", lambda s, eta, n: dpm_solver(s, 2, form=DATA_SDE), one_a_step),
        NamedSolver("dpmpp_2s", _singlestep(2), one_a_step),
        NamedSolver("dpmpp_3s", _singlestep(3), one_a_step),
        NamedSolver("pndm", lambda s, eta, n: pndm(s), one_a_step),
        NamedSolver("unipc", lambda s, eta, n: unipc(s), one_a_step),
    )
}


def named_solver(name: str) -> NamedSolver:
    """The solver of a name.

    Raises:
      ValueError: for an unknown name, with the nearest one.
    """
    if name in SOLVERS:
        return SOLVERS[name]
    close = difflib.get_close_matches(name, SOLVERS, n=1)
    remedy = f"did you mean {close[0]!r}?" if close else f"choose from: {', '.join(SOLVERS)}"
    raise ValueError(f"unknown solver {name!r}; {remedy}")
