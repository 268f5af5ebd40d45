import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import editing, schedules, times
from jaxdiff.process import q_sample
from jaxdiff.solvers.base import integrate, sample
from jaxdiff.solvers.ddim import ddim
from jaxdiff.solvers.heun import heun
from jaxdiff.solvers.stochastic_iterative import stochastic_iterative
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


COLOUR = jax.random.uniform(jax.random.key(4), (2, 4, 6, 3), minval=-1.0)
OTHER = jax.random.uniform(jax.random.key(5), COLOUR.shape, minval=-1.0)
VIEWS = {
    "region": editing.region(jnp.zeros([1, 4, 6, 1]).at[:, 1:3].set(1.0)),
    "grey": editing.grey_values(),
    "patches": editing.patch_means(2),
}


def shows(name, x):
    """What each view knows, computed another way."""
    if name == "region":
        return x[:, 1:3]
    if name == "grey":
        return (x * jnp.array([0.2989, 0.5870, 0.1140]).reshape(1, 1, 1, 3)).sum(axis=-1)
    return x.reshape(2, 2, 2, 3, 2, 3).mean(axis=(2, 4))


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_rotations_that_exchange_what_is_known_and_nothing_else(name):
    view = VIEWS[name]
    np.testing.assert_allclose(view.inverse(view.forward(COLOUR)), COLOUR, atol=1e-5)
    np.testing.assert_allclose((view.forward(COLOUR) ** 2).sum(), (COLOUR**2).sum(), rtol=1e-5)
    mixed = editing.replace_known(view, COLOUR, OTHER)
    np.testing.assert_allclose(shows(name, mixed), shows(name, COLOUR), atol=1e-5)
    free = (1 - view.known) * (view.forward(mixed) - view.forward(OTHER))
    np.testing.assert_allclose(free, 0, atol=1e-5)
    np.testing.assert_allclose(editing.replace_known(view, COLOUR, mixed), mixed, atol=1e-5)


def test_what_the_views_show():
    grey = editing.replace_known(VIEWS["grey"], COLOUR, jnp.zeros_like(COLOUR))
    luma = np.array([0.2989, 0.5870, 0.1140])
    np.testing.assert_allclose(
        grey, shows("grey", COLOUR)[..., None] * luma.reshape(1, 1, 1, 3) / (luma**2).sum(), atol=1e-5
    )
    blocks = editing.replace_known(VIEWS["patches"], COLOUR, jnp.zeros_like(COLOUR))
    np.testing.assert_allclose(blocks, shows("patches", COLOUR).repeat(2, axis=1).repeat(2, axis=2), atol=1e-5)
    q = editing.orthogonal_from(luma)
    np.testing.assert_allclose(q.T @ q, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(q[:, 0], luma / np.linalg.norm(luma))


@pytest.mark.parametrize("name", VIEWS)
def test_zero_shot_editing_agrees_with_the_reference_where_it_is_known(name):
    """The generator puts every example at +1 or -1, whatever it is shown: the free part follows it."""
    ve = schedules.ve(0.002, 80.0)

    def generator(x, t):
        return Denoised(jnp.sign(x.mean(axis=(1, 2, 3), keepdims=True)) * jnp.ones_like(x))

    times = jnp.array([80.0, 20.0, 5.0, 1.0])
    traces = []

    @jax.jit
    def run(key, y, times):
        traces.append(1)
        return editing.zero_shot(generator, ve, key, y, VIEWS[name], times, sigma_min=0.002)

    out = run(KEY, COLOUR, times)
    np.testing.assert_allclose(shows(name, out), shows(name, COLOUR), atol=1e-5)
    free = (1 - VIEWS[name].known) * VIEWS[name].forward(out)
    signs = [(1 - VIEWS[name].known) * VIEWS[name].forward(sign * jnp.ones_like(out)) for sign in (1.0, -1.0)]
    for i in range(2):
        assert min(float(jnp.abs(free - sign)[i].max()) for sign in signs) < 1e-5
    # the free coordinates of the reference are not looked at
    same = run(KEY, editing.replace_known(VIEWS[name], COLOUR, OTHER), times)
    np.testing.assert_allclose(same, out, atol=1e-5)
    assert len(traces) == 1


def test_strokes_and_denoising_start_at_their_own_level():
    """For data N(0, 1) with the exact consistency function: the stroke's weight is what the level leaves of it."""
    ve = schedules.ve(0.002, 80.0)

    def f(x, t):
        return Denoised(x / jnp.sqrt(1 + expand(t, x) ** 2))

    stroke = jnp.full((20_000, 1), 3.0)
    level = ve.level(jnp.full(20_000, 4.0))
    x = q_sample(stroke, jax.random.normal(KEY, stroke.shape), level)
    out = sample(stochastic_iterative(ve), f, KEY, x, jnp.array([4.0]))
    assert float(out.mean()) == pytest.approx(3 / 17**0.5, abs=0.03)
    assert float(out.std()) == pytest.approx(4 / 17**0.5, abs=0.03)
    more = sample(stochastic_iterative(ve), f, KEY, x, jnp.array([4.0, 1.0]))
    assert float(more.mean()) == pytest.approx(3 / 17**0.5 / 2**0.5, abs=0.03)


def test_slerp_keeps_the_length_and_reaches_both_ends():
    z1, z2 = jax.random.normal(KEY, (2, 5, 8, 8, 3))
    ends = [editing.slerp(z1, z2, jnp.full(5, w)) for w in (0.0, 1.0)]
    np.testing.assert_allclose(ends[0], z1, atol=1e-5)
    np.testing.assert_allclose(ends[1], z2, atol=1e-5)
    a, b = jnp.array([[3.0, 0.0]]), jnp.array([[0.0, 3.0]])
    third = editing.slerp(a, b, jnp.array([1 / 3]))
    np.testing.assert_allclose(third, [[3 * np.cos(np.pi / 6), 1.5]], rtol=1e-5)
    np.testing.assert_allclose(editing.slerp(a, 2 * a, jnp.array([0.5])), [[4.5, 0.0]], rtol=1e-5)


def test_views_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="size must be at least 2, got 1"):
        editing.patch_means(1)
    with pytest.raises(ValueError, match="4 does not divide images of 4 x 6; crop or pad them"):
        editing.patch_means(4).forward(COLOUR)
    with pytest.raises(ValueError, match="the direction's sum must be positive, got -1; negate it"):
        editing.orthogonal_from(np.array([-1.0, 0.0]))
