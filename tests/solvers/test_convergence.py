"""Every deterministic solver shows its order on data ~ N(0.3, 0.7^2), whose ODE path is known exactly.

SOLVERS x SCHEDULES. In units of the data (x / spread) the path depends on half log SNR alone, so all schedules get the
same grid in it: from 0 to 3, with steps growing in proportion to their number, so that the low-order first steps of
multistep solvers are small enough not to hide the order of the others. In float64, since order 3 reaches 1e-7.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import schedules
from jaxdiff.solvers.base import integrate
from jaxdiff.solvers.ddim import ddim
from jaxdiff.solvers.dpm_solver import dpm_solver
from jaxdiff.solvers.dpm_solver_singlestep import dpm_solver_singlestep
from jaxdiff.solvers.exponential import NOISE_ODE
from jaxdiff.solvers.heun import euler, heun
from jaxdiff.solvers.unipc import unipc
from tests.solvers.gaussian_data import KEY, MEAN, STD, best_denoiser

NUM_STEPS = (96, 192)
TOTAL_STEPS = 198

SCHEDULES = {
    "vp_linear": schedules.vp_linear(),
    "ve": schedules.ve(),
    "rectified_flow": schedules.rectified_flow(),
    "trigonometric": schedules.trigonometric(),
}


def blocks(order, **options):
    return lambda schedule, n: dpm_solver_singlestep(schedule, (order,) * (n // order), **options)


# name: (schedule, number of steps) -> Solver, and its order
SOLVERS = {
    "ddim": (lambda schedule, n: ddim(schedule), 1),
    "euler": (lambda schedule, n: euler(schedule), 1),
    "heun": (lambda schedule, n: heun(schedule), 2),
    "dpm_solver_1": (lambda schedule, n: dpm_solver(schedule, 1, form=NOISE_ODE), 1),
    "dpm_solver_2m": (lambda schedule, n: dpm_solver(schedule, 2, form=NOISE_ODE), 2),
    "dpm_solver_2m_taylor": (lambda schedule, n: dpm_solver(schedule, 2, form=NOISE_ODE, variant="taylor"), 2),
    "dpm_solver_3m": (lambda schedule, n: dpm_solver(schedule, 3, form=NOISE_ODE), 3),
    "dpm_solver_pp_1": (lambda schedule, n: dpm_solver(schedule, 1), 1),
    "dpm_solver_pp_2m": (lambda schedule, n: dpm_solver(schedule, 2), 2),
    "dpm_solver_pp_2m_taylor": (lambda schedule, n: dpm_solver(schedule, 2, variant="taylor"), 2),
    "dpm_solver_pp_3m": (lambda schedule, n: dpm_solver(schedule, 3), 3),
    "dpm_solver_pp_3m_released": (lambda schedule, n: dpm_solver(schedule, 3, released_third_order=True), 2),
    "dpm_solver_2s": (blocks(2, form=NOISE_ODE), 2),
    "dpm_solver_2s_taylor": (blocks(2, form=NOISE_ODE, variant="taylor"), 2),
    "dpm_solver_3s": (blocks(3, form=NOISE_ODE), 3),
    "dpm_solver_3s_taylor": (blocks(3, form=NOISE_ODE, variant="taylor"), 3),
    "dpm_solver_pp_2s": (blocks(2), 2),
    "dpm_solver_pp_2s_taylor": (blocks(2, variant="taylor"), 2),
    "dpm_solver_pp_3s": (blocks(3), 3),
    "dpm_solver_pp_3s_taylor": (blocks(3, variant="taylor"), 3),
    # the corrector of UniPC-p has order p + 1
    "unipc_1": (lambda schedule, n: unipc(schedule, 1), 2),
    "unipc_1_bh1": (lambda schedule, n: unipc(schedule, 1, variant="bh1"), 2),
    "unipc_2": (lambda schedule, n: unipc(schedule, 2), 3),
    "unipc_2_bh1": (lambda schedule, n: unipc(schedule, 2, variant="bh1"), 3),
    "unipc_3": (lambda schedule, n: unipc(schedule, 3), 4),
}


@functools.cache
def program(name):
    """(which schedule, x, grid) -> result, compiled once for all schedules and both grids."""
    make, _ = SOLVERS[name]

    def run(i, x, times):
        levels = [s.level for s in SCHEDULES.values()]
        schedule = schedules.Schedule(lambda t: jax.lax.switch(i, levels, t), lambda h: h, 0.0, 1.0)
        return integrate(make(schedule, TOTAL_STEPS), best_denoiser(schedule), KEY, x, times)

    return jax.jit(run)


def grid(schedule, num_steps):
    """num_steps real steps, then the last time again and again, which moves nothing: one length for all grids."""
    place = np.minimum(np.arange(TOTAL_STEPS + 1), num_steps) / num_steps
    return schedule.time(jnp.asarray(3 * place**2))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_solver_converges_at_its_order(solver, schedule):
    with jax.enable_x64(True):
        grids = [grid(SCHEDULES[schedule], n) for n in NUM_STEPS]
        level = SCHEDULES[schedule].level(grids[0])
        a, b = (jax.tree.map(lambda c, i=i: float(c[i]), level) for i in (0, -1))
        before, after = (np.hypot(c.alpha * STD, c.sigma) for c in (a, b))
        x = jnp.asarray(a.alpha * MEAN + before * np.linspace(-3.0, 3.0, 33))
        exact = b.alpha * MEAN + after * np.linspace(-3.0, 3.0, 33)
        index = jnp.asarray(list(SCHEDULES).index(schedule), jnp.int32)
        results = [program(solver)(index, x, times) for times in grids]
        assert all(r.dtype == np.float64 for r in results)
    coarse, fine = (np.abs(np.asarray(r) - exact).max() for r in results)
    assert np.log2(coarse / fine) == pytest.approx(SOLVERS[solver][1], abs=0.15)
