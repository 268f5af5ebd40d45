"""Data N(MEAN, STD^2): denoiser, path and consistency function are known exactly, so losses vanish in the limit."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff import losses, parameterization, schedules, times, weighting
from jaxdiff.denoiser import denoiser
from jaxdiff.methods.base import Sampling
from jaxdiff.methods.consistency import (
    adaptive,
    consistency_distillation,
    consistency_loss,
    consistency_training,
    continuous_time_consistency,
    fixed,
    ode_step,
    progressive,
    pseudo_in,
    pseudo_l2,
    rate,
    rate_in,
    rate_of_change,
)
from jaxdiff.solvers.heun import euler, heun
from jaxdiff.training.state import create_state
from jaxdiff.training.step import make_train_step
from jaxdiff.types import Denoised, Level, expand

MEAN, STD = 0.3, 0.7
LOW, HIGH = 0.002, 80.0
KEY = jax.random.key(0)
VE = schedules.ve(LOW, HIGH)
MEANING = parameterization.consistency(0.5, LOW)
T = jnp.array([0.01, 0.2, 1.5, 20.0])
X0 = MEAN + STD * jax.random.normal(jax.random.key(1), (4, 3))
X_T = X0 + T[:, None] * jax.random.normal(jax.random.key(2), (4, 3))


def best_denoiser(x, t):
    s = expand(t, x) ** 2
    return Denoised((STD**2 * x + s * MEAN) / (STD**2 + s))


def end_of_path(x, t):
    s = expand(t, x) ** 2
    return MEAN + (x - MEAN) * jnp.sqrt((STD**2 + LOW**2) / (STD**2 + s))


def exact(params, x_in, net_time, cond, *, train=False, key=None):
    """The network whose consistency function is the true one, plus params times its input."""
    t = jnp.exp(4 * net_time)
    c = MEANING.coefficients(Level(jnp.ones_like(t), t))
    x = x_in / expand(c.scale_in, x_in)
    out = expand(jnp.where(c.out > 1e-6, c.out, 1), x)
    return (end_of_path(x, t) - expand(c.skip, x) * x) / out + params * x_in


def linear(params, x_in, t, cond, *, train=False, key=None):
    return params["w"] * x_in + expand(params["u"] * t, x_in) + params["b"]


def linear_params(key, batch):
    return {"w": jnp.float32(0.7), "u": jnp.float32(0.1), "b": jnp.float32(-0.2)}


TEACHER = {"w": jnp.float32(0.4), "u": jnp.float32(0.3), "b": jnp.float32(0.1)}
BATCH = {"x0": X0}
METHODS = {
    "distillation": consistency_distillation(linear, teacher_params=TEACHER, init_params=linear_params),
    "training": consistency_training(linear, init_params=linear_params, curriculum=adaptive(2, 150, 1000, 0.9)),
    "continuous distillation": continuous_time_consistency(
        linear, loss=rate(losses.euclidean), teacher_params=TEACHER, init_params=linear_params
    ),
    "continuous training": continuous_time_consistency(linear, loss=pseudo_l2, init_params=linear_params),
}


def run_loss(method, params, aux, batch=BATCH, key=KEY, step=0):
    return method.objectives[0].loss(params, aux, batch, key, jnp.int32(step))


def function_of(network, params):
    return denoiser(network, params, VE, MEANING)


@pytest.mark.parametrize("name, rate_of_loss", [("euler", 4), ("heun", 6), ("training", 2)])
def test_the_loss_of_the_exact_function_vanishes_as_the_grid_grows(name, rate_of_loss):
    """Squares: a solver of order p leaves h^(p+1) a step, and in training the points of a pair lie h apart."""
    with jax.enable_x64(True):
        batch = {"x0": MEAN + STD * jax.random.normal(KEY, (512, 2), jnp.float64)}
        values = []
        for n in (80, 160):
            settings = {"curriculum": fixed(n, 0.0), "sigma_max": 5.0, "rho": 3.0}
            if name == "training":
                method = consistency_training(exact, init_params=lambda key, batch: jnp.zeros(()), **settings)
            else:
                solver = {"euler": euler, "heun": heun}[name]
                known = {"teacher_params": jnp.zeros(()), "teacher": lambda params, cond: best_denoiser}
                method = consistency_distillation(exact, solver=solver, **known, **settings)
            params, aux = method.init(KEY, batch)
            values.append(float(run_loss(method, params, aux, batch)[0]))
    assert np.log2(values[0] / values[1]) == pytest.approx(rate_of_loss, abs=0.35)


def test_another_function_has_a_loss_on_a_fine_grid():
    batch = {"x0": MEAN + STD * jax.random.normal(KEY, (512, 2))}
    method = consistency_distillation(
        exact, teacher_params=jnp.zeros(()), teacher=lambda params, cond: best_denoiser, curriculum=fixed(160, 0.0)
    )
    params, aux = method.init(KEY, batch)
    right = float(run_loss(method, params, aux, batch)[0])
    wrong = {"model": params["model"] + 0.1}
    assert float(run_loss(method, wrong, aux | {"target": wrong["model"]}, batch)[0]) > 30 * right


def test_heun_s_step_follows_the_path_and_euler_s_from_the_data_is_the_same_noise():
    s = 0.9 * T
    exact_s = MEAN + (X_T - MEAN) * jnp.sqrt((STD**2 + s**2) / (STD**2 + T**2))[:, None]
    np.testing.assert_allclose(ode_step(heun(VE), best_denoiser, X_T, T, s), exact_s, rtol=1e-3)
    eps = (X_T - X0) / T[:, None]
    from_data = ode_step(euler(VE), lambda x, t: Denoised(X0), X_T, T, s)
    np.testing.assert_allclose(from_data, X0 + s[:, None] * eps, rtol=1e-4, atol=1e-5)


def test_along_the_path_the_exact_function_does_not_change():
    f = function_of(exact, jnp.zeros(()))
    _, change = rate_of_change(f, best_denoiser, X_T, T)
    np.testing.assert_allclose(change, 0, atol=2e-4)
    _, wrong = rate_of_change(function_of(exact, jnp.float32(0.2)), best_denoiser, X_T, T)
    assert (jnp.abs(wrong[:2]) > 0.05).all()


def test_the_rate_is_the_limit_of_the_discrete_difference():
    with jax.enable_x64(True):
        x, t = (a.astype(jnp.float64) for a in (X_T, T))
        f = function_of(linear, jax.tree.map(lambda a: a.astype(jnp.float64), linear_params(KEY, BATCH)))
        here, change = rate_of_change(f, best_denoiser, x, t)
        np.testing.assert_array_equal(here, f(x, t).x0)
        h = 1e-5 * t
        velocity = (x - best_denoiser(x, t).x0) / t[:, None]
        further = f(x - h[:, None] * velocity, t - h).x0
        np.testing.assert_allclose(change, (further - here) / h[:, None], rtol=2e-4, atol=1e-6)


def test_the_pseudo_loss_has_the_gradient_of_distillation_with_close_levels():
    with jax.enable_x64(True):
        x, t = (a.astype(jnp.float64) for a in (X_T, T))
        params = jax.tree.map(lambda a: a.astype(jnp.float64), linear_params(KEY, BATCH))
        h = 1e-6 * t
        x_s = x - h[:, None] * (x - best_denoiser(x, t).x0) / t[:, None]

        def squared(p, target):
            return losses.mse(p, target) * p.shape[1] / (2 * h)

        def discrete(p):
            f = function_of(linear, p)
            return consistency_loss(f, f, x, t, x_s, t - h, squared).sum()

        def continuous(p):
            return pseudo_l2(*rate_of_change(function_of(linear, p), best_denoiser, x, t)).sum()

        chex.assert_trees_all_close(jax.grad(discrete)(params), jax.grad(continuous)(params), rtol=1e-4)


def test_smooth_distances_bend_by_their_second_derivative():
    f, change = jax.random.normal(KEY, (2, 5, 4))
    np.testing.assert_allclose(rate_in(losses.mse)(f, change), 2 * (change**2).mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(pseudo_in(losses.mse)(f, change), pseudo_l2(f, change) * 2 / 4, rtol=1e-4, atol=1e-6)
    gradient = jax.grad(lambda f: pseudo_in(losses.mse)(f, change).sum())(f)
    np.testing.assert_allclose(gradient, -change / 2, rtol=1e-5)


def test_curricula_end_where_the_paper_says():
    made = adaptive(2, 150, 800_000, 0.9)
    n = np.asarray(made.num_levels(jnp.arange(0, 800_001, 100)))
    assert n[0] == 2 and n[-1] == 151 and (np.diff(n) >= 0).all() and set(np.diff(n)) == {0, 1}
    assert int(made.num_levels(jnp.int32(1))) == 3
    step = jnp.int32(400_000)
    s = np.ceil(np.sqrt(0.5 * (151**2 - 4) + 4) - 1)
    assert int(made.num_levels(step)) == s + 1
    assert float(made.target_ema(step)) == pytest.approx(0.9 ** (2 / s), rel=1e-6)
    assert float(made.target_ema(jnp.int32(0))) == pytest.approx(0.81)
    same = progressive(2, 150, 800_000, 0.99)
    assert int(same.num_levels(step)) == s + 1 and float(same.target_ema(step)) == pytest.approx(0.99)
    assert int(fixed(18, 0.5).num_levels(step)) == 18


def test_short_curricula_skip_no_value_of_the_formula():
    """Exactly the formula in float64, also where N jumps by more than one."""
    k = np.arange(31)
    expected = np.maximum(np.ceil(np.sqrt(k / 30 * (41**2 - 9) + 9) - 1), 1) + 1
    np.testing.assert_array_equal(progressive(3, 40, 30, 0.5).num_levels(jnp.asarray(k)), expected)


@pytest.mark.parametrize("name", ["distillation", "training", "continuous distillation"])
def test_no_gradient_reaches_teacher_or_target(name):
    method = METHODS[name]
    params, aux = method.init(KEY, BATCH)
    on_params, on_aux = jax.grad(lambda p, a: run_loss(method, p, a)[0], argnums=(0, 1))(params, aux)
    assert aux and all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(on_aux))
    assert all((np.asarray(leaf) != 0).all() for leaf in jax.tree.leaves(on_params))


@pytest.mark.parametrize("name", METHODS)
def test_one_train_step_whatever_the_step(name):
    method, optimizers, seen = METHODS[name], {"model": optax.sgd(1e-4)}, []
    state = create_state(method, optimizers, (), KEY, BATCH)
    step = jax.jit(make_train_step(method, optimizers))
    for k in (0, 1, 300, 1000):
        state, metrics = step(state.replace(step=jnp.int32(k)), BATCH)
        assert metrics["finite"]
        seen.append([float(metrics[key]) for key in ("num_levels", "target_ema") if key in metrics])
    assert step._cache_size() == 1
    if name == "training":
        levels, decays = zip(*seen, strict=True)
        assert levels[0] == 2 and levels[-1] == 151 and len(set(levels)) == len(set(decays)) == 4


def test_one_train_step_through_the_whole_curriculum():
    """N and mu change at every other step or faster, in training and in distillation."""
    curriculum, optimizers = adaptive(2, 10, 12, 0.9), {"model": optax.sgd(1e-4)}
    for method in (
        consistency_training(linear, init_params=linear_params, curriculum=curriculum),
        consistency_distillation(linear, teacher_params=TEACHER, curriculum=curriculum),
    ):
        state, seen = create_state(method, optimizers, (), KEY, BATCH), []
        step = jax.jit(make_train_step(method, optimizers))
        for _ in range(13):
            state, metrics = step(state, BATCH)
            seen.append((int(metrics["num_levels"]), float(metrics["target_ema"])))
        assert step._cache_size() == 1
        assert seen[0] == (2, pytest.approx(0.81)) and seen[-1] == (11, pytest.approx(0.9**0.2))
        assert len(set(seen)) >= 9


def test_the_target_follows_the_student():
    params, aux = METHODS["training"].init(KEY, BATCH)
    new = {"model": jax.tree.map(lambda a: a + 1, params["model"])}
    moved = METHODS["training"].advance(aux, new, jnp.int32(0), {})["target"]
    chex.assert_trees_all_close(moved, jax.tree.map(lambda a: a + 0.19, params["model"]), rtol=1e-5)
    params, aux = METHODS["distillation"].init(KEY, BATCH)
    chex.assert_trees_all_equal(METHODS["distillation"].advance(aux, new, jnp.int32(5), {})["target"], new["model"])
    chex.assert_trees_all_equal(aux["teacher"], TEACHER)


def test_aux_holds_copies():
    method = consistency_distillation(linear, teacher_params=TEACHER)
    params, aux = method.init(KEY, BATCH)
    trees = [TEACHER, params["model"], aux["target"], aux["teacher"]]
    for tree in trees[1:]:
        chex.assert_trees_all_equal(tree, TEACHER)
    places = [leaf.unsafe_buffer_pointer() for tree in trees for leaf in jax.tree.leaves(tree)]
    assert len(set(places)) == len(places)


def test_student_and_target_share_noise_and_dropout_and_the_teacher_has_none():
    calls = []

    def spy(params, x_in, t, cond, *, train=False, key=None):
        calls.append((train, None if key is None else jax.random.key_data(key), cond["label"]))
        return x_in

    method = consistency_distillation(spy, teacher_params=TEACHER)
    batch = BATCH | {"label": jnp.arange(4)}
    run_loss(method, *method.init(KEY, batch), batch)
    drop = [key for train, key, _ in calls if train]
    assert len(drop) == 2 and (drop[0] == drop[1]).all()
    assert [key for train, key, _ in calls if not train] == [None, None]
    assert all((label == batch["label"]).all() for _, _, label in calls)


def test_weight_and_distance_are_what_was_given():
    built = {"teacher_params": TEACHER, "init_params": linear_params, "curriculum": fixed(2, 0.5)}
    plain = consistency_distillation(linear, **built)
    weighted = consistency_distillation(linear, weight=weighting.snr_plus_one, **built)
    params, aux = plain.init(KEY, BATCH)
    value = float(run_loss(plain, params, aux)[0])  # with two levels t is sigma_max in every example
    assert float(run_loss(weighted, params, aux)[0]) == pytest.approx(value * (1 + HIGH**-2), rel=1e-5)
    worst = consistency_distillation(linear, distance=losses.linf, **built)
    assert float(run_loss(worst, params, aux)[0]) > value**0.5


def test_samples_are_the_ends_of_their_paths():
    method = consistency_distillation(exact, teacher_params=jnp.zeros(()), clip=None)
    params, aux = method.init(KEY, BATCH)
    noise = jax.random.normal(KEY, (4000, 2))
    one = method.generate(params, aux, KEY, noise, {}, Sampling())
    np.testing.assert_allclose(one, end_of_path(HIGH * noise, jnp.full(4000, HIGH)), rtol=1e-3, atol=1e-3)
    two = method.generate(params, aux, KEY, noise, {}, Sampling(num_steps=2))
    assert not np.allclose(two, one, atol=0.1)
    assert float(two.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(two.std()) == pytest.approx((STD**2 + LOW**2) ** 0.5, rel=0.03)
    of_grid = times.karras(18)[[0, 8]]  # the middle is a point that was trained
    chosen = method.generate(params, aux, KEY, noise, {}, Sampling(times=jnp.asarray(of_grid, jnp.float32)))
    np.testing.assert_allclose(chosen, two, rtol=1e-4, atol=1e-4)


def test_every_step_is_clipped_before_it_is_noised():
    method = consistency_distillation(exact, teacher_params=jnp.zeros(()))
    params, aux = method.init(KEY, BATCH)
    noise = jax.random.normal(KEY, (64, 2))
    one = method.generate(params, aux, KEY, noise, {}, Sampling())
    np.testing.assert_allclose(
        one, jnp.clip(end_of_path(HIGH * noise, jnp.full(64, HIGH)), -1, 1), rtol=1e-3, atol=1e-3
    )
    high, low = (jnp.asarray([HIGH, s], jnp.float32) for s in (0.3, LOW))
    two, kept = (method.generate(params, aux, KEY, noise, {}, Sampling(times=grid)) for grid in (high, low))
    np.testing.assert_allclose(kept, one, atol=1e-3)  # the lowest level adds no noise and changes nothing
    assert float(jnp.abs(two).max()) <= 1 and not np.allclose(two, one, atol=0.05)


@pytest.mark.parametrize("name", METHODS)
def test_at_the_lowest_level_the_result_is_the_input(name):
    params, aux = METHODS[name].init(KEY, BATCH)
    noise = jax.random.normal(KEY, (4, 3))
    out = METHODS[name].generate(params, aux, KEY, noise, {}, Sampling(times=jnp.array([LOW])))
    np.testing.assert_array_equal(out, jnp.float32(LOW) * noise)


def test_distillation_learns_a_mixture_of_two_points_in_one_step():
    """The exact denoiser is the teacher; in one step it answers the mean, the student one of the two points."""
    points, width = jnp.array([[-1.0, 1.0]]), 0.05

    def mixture(x, t):
        s = t[:, None] ** 2
        share = jax.nn.softmax(-((x - points) ** 2) / (2 * (width**2 + s)), axis=1)
        ends = (width**2 * x + s * points) / (width**2 + s)
        return Denoised((share * ends).sum(axis=1, keepdims=True))

    def network(params, x_in, t, cond, *, train=False, key=None):
        h = jnp.concatenate([x_in, t[:, None], t[:, None] ** 2], axis=1)
        for w, b in params[:-1]:
            h = jax.nn.silu(h @ w + b)
        return h @ params[-1][0] + params[-1][1]

    def init(key, batch):
        sizes = [3, 48, 48, 1]
        keys = jax.random.split(key, 3)
        return [
            (jax.random.normal(k, (a, b)) / a**0.5, jnp.zeros((1, b)))
            for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
        ]

    method = consistency_distillation(
        network, teacher_params={}, teacher=lambda params, cond: mixture, init_params=init,
        curriculum=fixed(12, 0.9), distance=losses.pseudo_huber(0.03), sigma_max=10.0,
    )  # fmt: skip
    optimizer = optax.adam(3e-3)
    params, aux = method.init(KEY, None)

    @jax.jit
    def train(params, opt, aux, k):
        x_key, key = jax.random.split(jax.random.fold_in(KEY, k))
        sign, z = jax.random.rademacher(x_key, (256, 1), jnp.float32), jax.random.normal(key, (256, 1))
        grads = jax.grad(lambda p: method.objectives[0].loss(p, aux, {"x0": sign + width * z}, key, k)[0])(params)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to its integer count
            updates, opt = optimizer.update(grads, opt)
        params = optax.apply_updates(params, updates)
        return params, opt, method.advance(aux, params, k, {})

    opt = optimizer.init(params)
    for k in range(700):
        params, opt, aux = train(params, opt, aux, jnp.int32(k))
    noise = jax.random.normal(KEY, (2000, 1))
    samples = np.asarray(method.generate(params, aux, KEY, noise, {}, Sampling()))
    assert (np.abs(np.abs(samples) - 1) < 0.25).mean() > 0.8
    assert (samples > 0).mean() == pytest.approx(0.5, abs=0.06)
    one_step = mixture(10.0 * noise, jnp.full(2000, 10.0)).x0
    assert (np.abs(np.abs(one_step) - 1) < 0.25).mean() < 0.1


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: fixed(1, 0.0), "num_levels must be at least 2, got 1"),
        (lambda: fixed(4, 1.5), r"target_ema must lie in \[0, 1\], got 1.5"),
        (lambda: progressive(5, 3, 10, 0.9), "need 1 <= start_levels <= end_levels, got 5 and 3"),
        (lambda: progressive(2, 3, 0, 0.9), "total_steps must be at least 1"),
        (lambda: adaptive(2, 150, 10, 1.0), r"start_ema must lie in \(0, 1\), got 1.0"),
        (lambda: continuous_time_consistency(linear, loss=pseudo_l2), "without teacher_params the student needs"),
        (lambda: consistency_distillation(linear, teacher_params=TEACHER, sigma_min=-1.0), "0 < sigma_min"),
        (lambda: consistency_distillation(linear, teacher_params=TEACHER, sigma_data=0.0), "sigma_data must be pos"),
        (lambda: consistency_distillation(linear, teacher_params=TEACHER, num_steps=0), "must be 1 to 17, .* got 0"),
        (lambda: consistency_distillation(linear, teacher_params=TEACHER, num_steps=18), "must be 1 to 17, .* got 18"),
        (lambda: continuous_time_consistency(linear, loss=pseudo_l2, init_params=linear_params, num_steps=0), "got 0"),
    ],
)
def test_refused_when_built(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_refused_when_traced():
    method = METHODS["distillation"]
    params, aux = method.init(KEY, BATCH)
    with pytest.raises(ValueError, match=r"a batch needs 'x0', got keys \['image'\]"):
        run_loss(method, params, aux, {"image": X0})
    with pytest.raises(ValueError, match="takes no guidance_scale"):
        method.generate(params, aux, KEY, X0, {}, Sampling(guidance_scale=jnp.float32(2)))
