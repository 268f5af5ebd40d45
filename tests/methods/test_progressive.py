"""Targets for known denoisers, the schedule of rounds, and a student that learns its teacher's two steps exactly."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff import parameterization, schedules, weighting
from jaxdiff.denoiser import denoiser
from jaxdiff.methods import progressive as pd
from jaxdiff.methods.base import Sampling
from jaxdiff.solvers.ddim import ddim
from jaxdiff.training.state import create_state
from jaxdiff.training.step import make_train_step
from jaxdiff.types import Denoised

KEY = jax.random.key(0)
MEAN, STD = 0.3, 0.7  # data ~ N(MEAN, STD^2)
PATHS = {
    "cosine": pd.vp_path(),
    "flow": pd.vp_path(schedules.rectified_flow()),
    "sigma": pd.ve_path(0.01, 10.0, 3.0),
}
STEP = jnp.int32(0)


def best(schedule):
    """The exact denoiser of the data."""

    def denoise(x_t, t):
        a, s = (c.reshape(-1, 1) for c in schedule.level(t))
        return Denoised(MEAN + a * STD**2 * (x_t - a * MEAN) / (a**2 * STD**2 + s**2))

    return denoise


def times_of(path, n, i):
    u = jnp.asarray(i, jnp.float32)
    return tuple(path.time(v / n) for v in (u + 1, u + 0.5, u))


def table(params, x_t, t, cond, *, train=False, key=None):
    """x0 = slope x_t + offset, with a slope and an offset of their own at each of 8 times: every u in eighths."""
    row = jnp.clip(jnp.round(8 * t).astype(jnp.int32) - 1, 0, 7)
    return params["slope"][row][:, None] * x_t + params["offset"][row][:, None]


def exact_table():
    path = PATHS["cosine"]
    t = path.time(jnp.arange(1, 9) / 8)
    a, s = path.schedule.level(t)
    slope = a * STD**2 / (a**2 * STD**2 + s**2)
    return {"slope": slope, "offset": MEAN - slope * a * MEAN}


def make(**settings):
    base = {"teacher_params": exact_table(), "num_steps": 4, "head": pd.single(parameterization.x0()), "clip": None}
    return pd.progressive(table, **(base | settings))


def batch_of(n=256, key=KEY):
    return {"x0": MEAN + STD * jax.random.normal(jax.random.fold_in(key, 2**20), (n, 1))}


@pytest.mark.parametrize("name", PATHS)
def test_one_step_with_the_target_lands_where_two_steps_of_the_teacher_do(name):
    path = PATHS[name]
    t, middle, s = times_of(path, 4, [1, 2, 3])
    x_t = jax.random.normal(KEY, (3, 1)) * path.schedule.level(t).sigma[:, None]
    never = jnp.zeros(3, bool)
    taught = pd.teach(best(path.schedule), path.schedule, x_t, t, middle, s, never)
    landed, _, _ = ddim(path.schedule).step(x_t, None, x_t, t, s, lambda x, t: Denoised(taught.target))
    scale = float(jnp.abs(x_t).max())
    assert np.asarray(landed) == pytest.approx(np.asarray(taught.end), abs=2e-6 * scale)


@pytest.mark.parametrize("name", PATHS)
def test_a_point_is_its_own_target(name):
    path = PATHS[name]
    t, middle, s = times_of(path, 4, [0, 1, 3])
    x_t = jax.random.normal(KEY, (3, 1))
    point = jnp.array([[0.4], [-1.0], [2.0]])
    last = jnp.array([path.to_clean, False, False])
    taught = pd.teach(lambda x, t: Denoised(point), path.schedule, x_t, t, middle, s, last)
    assert np.asarray(taught.target) == pytest.approx(np.asarray(point), abs=1e-6)


@pytest.mark.parametrize("shrink", [0.2, 0.9])
def test_an_exact_ddim_map_is_a_fixed_point(shrink):
    """A teacher whose x0 stays the same along its straight path teaches what it says itself."""
    path, top = PATHS["sigma"], 10.0

    def straight(x, t):
        sigma = path.schedule.level(t).sigma[:, None]
        return Denoised(shrink * x / (shrink + sigma * (1 - shrink) / top))

    t, middle, s = times_of(path, 4, [0, 1, 3])
    x_t = jax.random.normal(KEY, (3, 1)) * path.schedule.level(t).sigma[:, None]
    taught = pd.teach(straight, path.schedule, x_t, t, middle, s, jnp.zeros(3, bool))
    assert np.asarray(taught.target) == pytest.approx(np.asarray(straight(x_t, t).x0), rel=1e-4)


def test_the_last_target_is_the_teacher_s_last_prediction():
    path = PATHS["cosine"]
    t, middle, s = times_of(path, 4, [0, 0])
    x_t, seen = jax.random.normal(KEY, (2, 1)), []

    def denoise(x_t, t):
        seen.append(best(path.schedule)(x_t, t))
        return seen[-1]

    taught = pd.teach(denoise, path.schedule, x_t, t, middle, s, jnp.array([True, False]))
    assert len(seen) == 2 and taught.target[0] == seen[1].x0[0]
    # the cleanest level of the path is nearly clean, so the other rule says nearly the same
    assert float(taught.target[1, 0]) == pytest.approx(float(seen[1].x0[1, 0]), abs=1e-3)


def released_steps(step, first, length):
    """The release's schedule of scales, written again in whole numbers."""
    stage = step // length
    scales = max(first // 2**stage, 2) if first > 1 else 1
    late = max(step - length * (int(np.log2(first)) - 1), 0) // (2 * length)
    return max(2 // 2**late, 1) if scales == 2 else scales


@pytest.mark.parametrize("first", [1, 2, 8, 64])
def test_steps_halve_and_the_last_rounds_are_longer(first):
    steps = jax.vmap(lambda k: pd.student_steps(k, first, 10))(jnp.arange(120))
    assert np.asarray(steps).tolist() == [released_steps(k, first, 10) for k in range(120)]
    assert steps.dtype == jnp.int32 and int(pd.student_steps(jnp.int32(500), first, None)) == first


def test_one_run_halves_by_itself_in_one_trace():
    method = make(round_length=2)
    optimizers = {"model": optax.sgd(0.1)}
    batch = batch_of(16)
    state = create_state(method, optimizers, (), KEY, batch)
    step = jax.jit(chex.assert_max_traces(make_train_step(method, optimizers), n=1))
    steps, teachers, students = [], [state.aux["teacher"]], [state.params["model"]]
    for _ in range(9):
        state, metrics = step(state, batch)
        steps.append(float(metrics["num_steps"]))
        teachers.append(state.aux["teacher"])
        students.append(state.params["model"])
    assert steps == [4, 4, 2, 2, 2, 2, 1, 1, 1] and step._cache_size() == 1
    for k in range(1, 10):
        halved = k in (2, 6)
        chex.assert_trees_all_equal(teachers[k], students[k] if halved else teachers[k - 1])
    assert not np.allclose(students[2]["slope"], students[0]["slope"], atol=1e-6)


def test_no_gradient_reaches_the_teacher():
    method = make()
    params, aux = method.init(KEY, {})
    params = jax.tree.map(lambda a: a + 0.1, params)
    in_params, in_aux = jax.grad(
        lambda p, a: method.objectives[0].loss(p, a, batch_of(), KEY, STEP)[0], argnums=(0, 1)
    )(params, aux)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(in_aux))
    assert (in_params["model"]["slope"] != 0).any()


def test_a_student_learns_its_teacher_s_two_steps():
    """Teacher of 8 steps, student of 4, whose table can hold what the two steps do exactly."""
    method = make(weight=weighting.uniform)
    params, aux = method.init(KEY, {})
    adam = optax.adam(1e-2)

    @jax.jit
    def step(params, opt, k):
        key = jax.random.fold_in(KEY, k)
        grad = jax.grad(lambda p: method.objectives[0].loss(p, aux, batch_of(key=key), key, k)[0])(params)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to its integer count
            updates, opt = adam.update(grad, opt)
        return optax.apply_updates(params, updates), opt

    opt = adam.init(params)
    for k in range(400):
        params, opt = step(params, opt, jnp.int32(k))
    noise = jax.random.normal(KEY, (64, 1))
    run = functools.partial(method.generate, aux=aux, key=KEY, noise=noise, cond={})
    teacher = np.asarray(run({"model": aux["teacher"]}, sampling=Sampling(num_steps=8)))
    untrained = np.asarray(run({"model": aux["teacher"]}, sampling=Sampling()))
    student = np.asarray(run(params, sampling=Sampling()))
    assert np.abs(student - teacher).max() < 0.02 < 0.1 < np.abs(untrained - teacher).max()


def test_rounds_chain_as_methods():
    first = make(num_steps=4)
    params, _ = first.init(KEY, {})
    trained = jax.tree.map(lambda a: a + 0.5, params["model"])
    second = make(num_steps=2, teacher_params=trained)
    params, aux = second.init(KEY, {})
    chex.assert_trees_all_equal(params["model"], aux["teacher"], trained)
    # copies, since a donated state may hold no buffer twice
    buffers = [leaf.unsafe_buffer_pointer() for tree in (params, aux, trained) for leaf in jax.tree.leaves(tree)]
    assert len(set(buffers)) == len(buffers)


def test_both_heads_agree_where_their_outputs_do():
    schedule = schedules.cosine()
    t, x_t = jnp.array([0.02, 0.5, 0.98]), jax.random.normal(KEY, (3, 2))
    x0 = jax.random.normal(jax.random.key(1), (3, 2))

    def network(params, x, t, cond, *, train=False, key=None):
        a, s = (c[:, None] for c in schedule.level(t))
        return jnp.concatenate([x0 + params, (x - a * x0) / s], axis=-1)

    at = functools.partial(pd.both(), network, schedule=schedule, cond={})
    assert np.asarray(at(params=jnp.float32(0))(x_t, t).x0) == pytest.approx(np.asarray(x0), abs=1e-5)
    # an error of the x0 output counts by sigma^2
    moved = at(params=jnp.float32(1))(x_t, t).x0 - x0
    variance = np.asarray(schedule.level(t).sigma) ** 2
    assert np.asarray(moved[:, 0]) == pytest.approx(variance, abs=1e-5)


def test_sampling_takes_equal_steps_to_the_end_of_the_path():
    noise = jax.random.normal(KEY, (5, 1))
    seen = []

    def network(params, x, t, cond, *, train=False, key=None):
        jax.debug.callback(lambda t: seen.append(float(t[0])), t)
        return jnp.full_like(x, 3.0)

    def run(n, **settings):
        seen.clear()
        method = pd.progressive(network, teacher_params={}, num_steps=n, **settings)
        out = method.generate({"model": {}}, {}, KEY, noise, {}, Sampling())
        jax.effects_barrier()
        return sorted(seen, reverse=True), np.asarray(out)

    x0 = pd.single(parameterization.x0())
    times, out = run(4, head=x0)
    assert times == [1, 0.75, 0.5, 0.25] and (out == 1).all()  # clipped
    assert (run(1, head=x0, clip=None)[1] == 3).all()
    assert run(8, round_length=5, head=x0)[0] == [1]
    path = pd.ve_path(0.01, 10.0, 3.0)
    times, out = run(3, head=x0, path=path, clip=None)
    grid = np.linspace(10 ** (1 / 3), 0.01 ** (1 / 3), 4) ** 3
    assert times == pytest.approx(grid[:-1], rel=1e-5)
    # one Euler path to sigma_min: what is left of the noise there
    left = 0.01 / 10 * (10 * np.asarray(noise) - 3)
    assert out == pytest.approx(3 + left, abs=1e-5)


def test_guidance_is_drawn_for_teacher_and_student_and_given_in_sampling():
    seen = []

    def network(params, x, t, cond, *, train=False, key=None):
        seen.append(cond["guidance"])
        return x

    method = pd.progressive(network, teacher_params={}, num_steps=2, guidance_range=(1.0, 3.0))
    method.objectives[0].loss({"model": {}}, {"teacher": {}}, batch_of(4), KEY, STEP)
    assert len(seen) == 3 and all((w == seen[0]).all() for w in seen)
    assert len(np.unique(seen[0])) == 4 and seen[0].min() >= 1 and seen[0].max() <= 3
    noise = jnp.zeros((2, 1))
    for scale, w in ((None, 1.0), (jnp.float32(3.5), 2.5)):
        method.generate({"model": {}}, {}, KEY, noise, {}, Sampling(num_steps=1, guidance_scale=scale))
        assert (seen[-1] == w).all() and seen[-1].shape == (2,)


def test_the_first_teacher_has_the_known_minimum():
    head = pd.single(parameterization.x0())
    method = pd.first_teacher(
        best_network, init_params=lambda k, b: {}, head=head, clip=None, weight=weighting.snr_plus_one, num_steps=64
    )
    params, aux = method.init(KEY, {})
    batch = batch_of(20_000)
    _, metrics = method.objectives[0].loss(params, aux, batch, KEY, STEP)
    level = PATHS["cosine"].schedule.level(jnp.linspace(0, 1, 2001)[1:-1])
    a, s = (np.asarray(c) for c in level)
    assert float(metrics["mse"].mean()) == pytest.approx(np.mean(s**2 * STD**2 / (a**2 * STD**2 + s**2)), rel=0.04)
    samples = method.generate(params, aux, KEY, jax.random.normal(KEY, (4000, 1)), {}, Sampling())
    assert float(samples.std()) == pytest.approx(STD, rel=0.05) and float(samples.mean()) == pytest.approx(
        MEAN, abs=0.05
    )


def best_network(params, x_t, t, cond, *, train=False, key=None):
    return best(PATHS["cosine"].schedule)(x_t, t).x0


def test_the_first_teacher_learns_to_do_without_labels_and_is_guided():
    def labelled(params, x_t, t, cond, *, train=False, key=None):
        return jnp.where(cond["label"] == 3, 0, cond["label"]).astype(x_t.dtype)[:, None] + jnp.zeros_like(x_t)

    make = functools.partial(
        pd.first_teacher, labelled, init_params=lambda k, b: {}, head=pd.single(parameterization.x0()), clip=None,
        weight=weighting.uniform,
    )  # fmt: skip
    with pytest.raises(ValueError, match="label_dropout needs null_label"):
        make(label_dropout=0.5)
    method = make(label_dropout=0.4, null_label=3)
    batch = batch_of(4000) | {"label": jnp.full(4000, 10, jnp.int32)}
    _, metrics = method.objectives[0].loss({"model": {}}, {}, batch, KEY, STEP)
    assert np.mean(metrics["mse"] < 20) == pytest.approx(0.4, abs=0.04)
    label, noise = {"label": jnp.full(5, 2, jnp.int32)}, jnp.zeros((5, 1))
    for cond, scale, x0 in (({}, None, 0), (label, None, 2), (label, jnp.float32(3), 6)):
        out = method.generate({"model": {}}, {}, KEY, noise, cond, Sampling(num_steps=2, guidance_scale=scale))
        assert np.asarray(out) == pytest.approx(np.full((5, 1), x0))


def test_a_head_is_a_denoiser_of_its_parameterization():
    v, x_t, t = parameterization.v(), jax.random.normal(KEY, (2, 1)), jnp.array([0.3, 0.9])
    schedule = schedules.cosine()
    plain = denoiser(best_network, {}, schedule, v, {})(x_t, t).x0
    assert (pd.single(v)(best_network, {}, schedule, {})(x_t, t).x0 == plain).all()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"num_steps": 6, "round_length": 10}, "a power of two to be halved, got 6"),
        ({"round_length": 0}, "round_length must be at least 1"),
        ({"round_length": 5, "teacher": best_network}, "leave `teacher` out"),
        ({"guidance_range": (2.0, 1.0)}, r"guidance_range is \(low, high\)"),
    ],
)
def test_refused_when_built(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_refused_when_traced():
    method = make()
    params, aux = method.init(KEY, {})
    with pytest.raises(ValueError, match="a batch needs 'x0'"):
        method.objectives[0].loss(params, aux, {"image": jnp.zeros((2, 1))}, KEY, STEP)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        method.generate(params, aux, KEY, jnp.zeros((2, 1)), {}, Sampling(num_steps=0))
    with pytest.raises(ValueError, match="trained with guidance_range"):
        method.generate(params, aux, KEY, jnp.zeros((2, 1)), {}, Sampling(guidance_scale=jnp.float32(2)))
