import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import editing, schedules, times
from jaxdiff.process import q_sample
from jaxdiff.solvers.base import integrate, sample
from jaxdiff.solvers.ddim import ddim
from jaxdiff.solvers.heun import heun
from jaxdiff.types import Denoised, expand

KEY = jax.random.key(0)
SCHEDULE = schedules.discrete(schedules.scaled_linear_betas(1000))
GRID = times.trailing(1000, 5)
X = jax.random.normal(jax.random.key(1), (2, 3, 3, 1))
IMAGE = jax.random.uniform(jax.random.key(2), X.shape, minval=-1.0)
MASK = jnp.zeros([1, 3, 3, 1]).at[:, :, 0].set(1.0)
NOISE = jax.random.normal(jax.random.key(3), (5, *X.shape))


def denoise(x, t):
    level = SCHEDULE.level(t)
    return Denoised(expand(level.alpha, x) * x)


@pytest.mark.parametrize(("strength", "kept"), [(1.0, 5), (0.99, 4), (0.5, 2), (0.2, 1)])
def test_image_to_image_runs_the_last_part_of_the_grid(strength, kept):
    start = editing.image_to_image(GRID, strength)
    np.testing.assert_array_equal(start.times, GRID[5 - kept :])
    assert start.noise_time == start.times[0]


def test_compvis_starts_one_grid_step_noisier():
    start = editing.image_to_image_compvis(GRID, 0.6)
    np.testing.assert_array_equal(start.times, GRID[2:])
    assert start.noise_time == GRID[1]


def test_low_strength_stays_near_the_image():
    grid = times.evenly(1000, 50)
    errors = []
    for strength in (0.04, 0.5):
        start = editing.image_to_image(grid, strength)
        x = q_sample(IMAGE, X, SCHEDULE.level(jnp.full(2, start.noise_time)))
        out = sample(ddim(SCHEDULE), denoise, KEY, x, jnp.asarray(start.times, jnp.float32))
        errors.append(float(jnp.abs(out - IMAGE).mean()))
    assert errors[0] < 0.15 < errors[1]


@pytest.mark.parametrize("keep", [editing.keep_after_step, editing.keep_before_step])
def test_an_empty_mask_changes_nothing(keep):
    grid = jnp.asarray(GRID, jnp.float32)
    for make in (ddim, heun):
        solver = keep(make(SCHEDULE), SCHEDULE, IMAGE, jnp.zeros_like(MASK), NOISE)
        got, plain = (sample(s, denoise, KEY, X, grid) for s in (solver, make(SCHEDULE)))
        np.testing.assert_allclose(got, plain, atol=1e-6)


def test_after_step_keeps_the_region_at_every_level_and_exactly_at_the_end():
    grid = jnp.asarray(GRID, jnp.float32)
    solver = editing.keep_after_step(ddim(SCHEDULE), SCHEDULE, IMAGE, MASK, NOISE[0])
    out, path = sample(solver, denoise, KEY, X, grid, return_trajectory=True)
    for i in range(4):
        known = q_sample(IMAGE, NOISE[0], SCHEDULE.level(jnp.full(2, grid[i + 1])))
        np.testing.assert_allclose(path.x[i][:, :, 0], known[:, :, 0], atol=1e-6)
    np.testing.assert_array_equal(out[:, :, 0], IMAGE[:, :, 0])
    assert (out[:, :, 1:] != IMAGE[:, :, 1:]).all()


def test_before_step_shows_the_denoiser_the_region_with_each_step_s_noise():
    seen = []

    def watch(x, t):
        seen.append((x, t))
        return denoise(x, t)

    solver = editing.keep_before_step(ddim(SCHEDULE), SCHEDULE, IMAGE, MASK, NOISE)
    state, x = solver.init(X, jnp.asarray(GRID, jnp.float32)), X
    for i in range(3):
        t, s = (jnp.full(2, time, jnp.float32) for time in GRID[i : i + 2])
        x, state, _ = solver.step(NOISE[0], state, x, t, s, watch)
    assert int(state.step) == 3
    for i, (x, t) in enumerate(seen):
        np.testing.assert_allclose(x[:, :, 0], q_sample(IMAGE, NOISE[i], SCHEDULE.level(t))[:, :, 0], atol=1e-6)


def test_soft_masks_blend():
    half = 0.5 * jnp.ones_like(MASK)
    solver = editing.keep_after_step(ddim(SCHEDULE), SCHEDULE, IMAGE, half, NOISE[0])
    grid = jnp.asarray(GRID[:2], jnp.float32)
    plain = integrate(ddim(SCHEDULE), denoise, KEY, X, grid)
    known = q_sample(IMAGE, NOISE[0], SCHEDULE.level(jnp.full(2, grid[1])))
    np.testing.assert_allclose(integrate(solver, denoise, KEY, X, grid), (plain + known) / 2, rtol=1e-5, atol=1e-6)


def test_keeps_the_dtype_and_traces():
    with jax.enable_x64(True):
        wide = [a.astype(jnp.float64) for a in (IMAGE, MASK, NOISE)]
        solver = editing.keep_after_step(ddim(SCHEDULE), SCHEDULE, *wide)
        out = jax.jit(lambda x, grid: sample(solver, denoise, KEY, x, grid))(X.astype(jnp.float64), jnp.asarray(GRID))
        assert out.dtype == jnp.float64


def test_refusals():
    with pytest.raises(ValueError, match=r"image_to_image: strength must be in \(0, 1\], got 1.5"):
        editing.image_to_image(GRID, 1.5)
    with pytest.raises(ValueError, match="strength 0.1 of 5 steps leaves none; use at least 0.2"):
        editing.image_to_image(GRID, 0.1)
    with pytest.raises(ValueError, match="strength 1.0 keeps all 5 times.*use a smaller strength, or image_to_image"):
        editing.image_to_image_compvis(GRID, 1.0)
    with pytest.raises(ValueError, match=r"mask \(3, 3, 1\) does not fit x0 \(2, 3, 3, 1\)"):
        editing.keep_after_step(ddim(SCHEDULE), SCHEDULE, IMAGE, MASK[0], NOISE)
    with pytest.raises(
        ValueError, match=r"noise \(3, 3, 1\) does not fit x0 \(2, 3, 3, 1\); use \(2, 3, 3, 1\) or one"
    ):
        editing.keep_before_step(ddim(SCHEDULE), SCHEDULE, IMAGE, MASK, NOISE[0, 0])
