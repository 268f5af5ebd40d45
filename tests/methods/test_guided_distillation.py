"""Stage one on teachers whose guided answer is known, and the stochastic sampler on data N(0, 1)."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff import parameterization, schedules, weighting
from jaxdiff.methods import guided_distillation as gd
from jaxdiff.methods.base import Sampling
from jaxdiff.solvers.base import sample
from jaxdiff.solvers.ddim import ddim
from jaxdiff.solvers.stochastic_iterative import stochastic_iterative
from jaxdiff.types import Denoised

KEY = jax.random.key(0)
STEP = jnp.int32(0)
LABEL = jnp.array([1.0, 2.0, 1.0, 3.0])


def teacher(params, x_t, t, cond, *, train=False, key=None):
    """v of a class model: the class moves it."""
    assert not train and "guidance" not in cond
    return params["a"] * x_t + 0.3 * cond["label"][:, None]


def student(params, x_t, t, cond, *, train=False, key=None):
    """The guided v for a = the teacher's a, b = 0.3."""
    return params["a"] * x_t + params["b"] * (1 + cond["guidance"])[:, None] * cond["label"][:, None]


def null(cond):
    return cond | {"label": jnp.zeros_like(cond["label"])}


def make(b=0.3, **settings):
    base = {
        "teacher": teacher,
        "teacher_params": {"a": jnp.float32(0.5)},
        "init_params": lambda key, batch: {"a": jnp.float32(0.5), "b": jnp.float32(b)},
        "null_cond": null,
        "clip": None,
    }
    return gd.guided_distillation(student, **(base | settings))


def batch_of(n=4):
    return {"x0": jax.random.normal(jax.random.key(7), (n, 2)), "label": jnp.resize(LABEL, (n,))}


def test_the_guided_teacher_has_no_loss():
    method = make()
    params, aux = method.init(KEY, {})
    loss, _ = method.objectives[0].loss(params, aux, batch_of(), KEY, STEP)
    assert float(loss) == pytest.approx(0, abs=1e-10)


def test_the_loss_is_the_weighted_distance_from_the_guided_teacher():
    """With b = 0 the student lacks 0.3 (1 + w) label in v, which is sigma times that in x0."""
    method = make(b=0.0, guidance_range=(2.0, 2.0), weight=weighting.snr_plus_one)
    params, aux = method.init(KEY, {})
    loss, _ = method.objectives[0].loss(params, aux, batch_of(), KEY, STEP)
    assert float(loss) == pytest.approx(np.mean((0.9 * np.asarray(LABEL)) ** 2), rel=1e-4)


def test_no_gradient_reaches_the_teacher():
    method = make(b=0.1)
    params, aux = method.init(KEY, {})
    in_params, in_aux = jax.grad(
        lambda p, a: method.objectives[0].loss(p, a, batch_of(), KEY, STEP)[0], argnums=(0, 1)
    )(params, aux)
    assert in_aux["teacher"]["a"] == 0 and in_params["model"]["b"] != 0


def test_training_finds_the_guidance_in_one_trace():
    method = make(b=0.0, weight=weighting.uniform, parameterization=parameterization.v())
    params, aux = method.init(KEY, {})
    adam, batch = optax.adam(2e-2), batch_of(128)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, opt, k):
        key = jax.random.fold_in(KEY, k)
        grad = jax.grad(lambda p: method.objectives[0].loss(p, aux, batch, key, k)[0])(params)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to its integer count
            updates, opt = adam.update(grad, opt)
        return optax.apply_updates(params, updates), opt

    opt = adam.init(params)
    for k in range(150):
        params, opt = step(params, opt, jnp.int32(k))
    assert float(params["model"]["b"]) == pytest.approx(0.3, abs=0.01)
    assert float(params["model"]["a"]) == pytest.approx(0.5, abs=0.01)


def test_sampling_gives_the_scale_to_the_network():
    seen = []

    def spy(params, x_t, t, cond, *, train=False, key=None):
        seen.append(cond["guidance"])
        return x_t

    method = gd.guided_distillation(
        spy, teacher=teacher, teacher_params={}, null_cond=null, guidance_range=(0.5, 4.0), num_steps=3
    )
    run = functools.partial(method.generate, {"model": {}}, {}, KEY, jnp.ones((2, 1)), {})
    for scale, w in ((None, 0.5), (jnp.float32(4.0), 3.0), (jnp.array([1.0, 2.0]), [0.0, 1.0])):
        assert run(Sampling(num_steps=1, guidance_scale=scale)).shape == (2, 1)
        assert np.asarray(seen[-1]) == pytest.approx(np.broadcast_to(w, 2))
    traced = jax.jit(chex.assert_max_traces(lambda s: run(Sampling(guidance_scale=s)), n=1))
    assert traced(jnp.float32(1)).shape == traced(jnp.float32(3)).shape


def gaussian(schedule):
    """The exact denoiser of data N(0, 1)."""

    def denoise(x_t, t):
        a, s = (c[:, None] for c in schedule.level(t))
        return Denoised(a * x_t / (a**2 + s**2))

    return denoise


def stochastic_variance(schedule, grid):
    """For data N(0, 1) a DDIM step multiplies x by the cosine of its angle, where clean data are at angle 0."""
    angle = np.append(np.arccos(np.asarray(schedule.level(grid).alpha, np.float64)), 0.0)
    variance = 1.0
    for t, s, r in zip(angle, angle[1:], angle[2:], strict=False):
        kept = (np.cos(s) / np.cos(r)) ** 2
        variance = kept * np.cos(t - r) ** 2 * variance + np.sin(s) ** 2 - kept * np.sin(r) ** 2
    return np.cos(angle[-2]) ** 2 * variance


def test_the_stochastic_sampler_has_its_own_variance_and_its_number_of_calls():
    schedule, calls = schedules.cosine(), []

    def denoise(x_t, t):
        jax.debug.callback(lambda t: calls.append(float(t[0])), t)
        return gaussian(schedule)(x_t, t)

    noise = jax.random.normal(KEY, (20_000, 1))
    grid = jnp.linspace(1, 0, 24, endpoint=False)
    out = sample(gd.stochastic(schedule), denoise, KEY, noise, grid)
    jax.effects_barrier()
    assert sorted(calls, reverse=True) == pytest.approx(np.asarray(grid), rel=1e-6)
    assert float(out.var()) == pytest.approx(stochastic_variance(schedule, grid), rel=0.03)
    plain = sample(ddim(schedule), denoise, KEY, noise, grid)
    assert abs(np.corrcoef(out[:, 0], noise[:, 0])[0, 1]) < 0.9 < np.corrcoef(plain[:, 0], noise[:, 0])[0, 1]


def test_a_stochastic_step_is_two_steps_ahead_and_one_back():
    schedule, z = schedules.cosine(), jax.random.normal(jax.random.key(2), (1, 4, 1))
    x, denoise = jax.random.normal(KEY, (4, 1)), gaussian(schedule)
    grid = jnp.array([0.9, 0.6, 0.3, 0.1])
    solver = gd.stochastic(schedule)
    t, s, r = (jnp.full(4, u) for u in grid[:3])
    out, _, _ = solver.step(z[0], solver.init(x, grid), x, t, s, denoise)
    ahead, _, _ = ddim(schedule).step(z[0], None, x, t, r, denoise)
    a, b = (schedule.level(u[:1]) for u in (s, r))
    ratio = np.asarray(a.alpha / b.alpha)
    expected = ratio * np.asarray(ahead) + np.sqrt(a.sigma**2 - ratio**2 * np.asarray(b.sigma) ** 2) * np.asarray(z[0])
    assert np.asarray(out) == pytest.approx(expected, abs=1e-6)
    # on two times, the double step reaches clean data, and going back is renoising
    noise = jnp.concatenate([z, z])
    two = sample(solver, denoise, KEY, x, grid[:2], noise=noise)
    again = sample(stochastic_iterative(schedule), denoise, KEY, x, grid[:2], noise=noise)
    assert np.asarray(two) == pytest.approx(np.asarray(again), abs=1e-6)


def test_without_init_params_the_student_is_a_copy():
    given = {"a": jnp.ones(3)}
    params, aux = make(init_params=None, teacher_params=given).init(KEY, {})
    chex.assert_trees_all_equal(params["model"], aux["teacher"], given)
    assert len({leaf["a"].unsafe_buffer_pointer() for leaf in (params["model"], aux["teacher"], given)}) == 3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"guidance_range": (4.0, 0.0)}, r"guidance_range is \(low, high\) of w"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"schedule": schedules.rectified_flow(), "parameterization": parameterization.eps()}, "use v or x0"),
    ],
)
def test_refused_when_built(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_refused_when_traced():
    method = make()
    params, aux = method.init(KEY, {})
    with pytest.raises(ValueError, match="a batch needs 'x0'"):
        method.objectives[0].loss(params, aux, {"image": LABEL}, KEY, STEP)
