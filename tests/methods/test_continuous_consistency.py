"""For data N(0, SD^2) the ODE stands still in TrigFlow: f(u, t) = u is exact, with F = -tan(t / 2) u."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff import parameterization, schedules
from jaxdiff.denoiser import denoiser
from jaxdiff.methods import continuous_consistency as cc
from jaxdiff.methods.base import Sampling
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.layers import fourier_embedding
from jaxdiff.networks.mlp import MLP

SD = 0.5
KEY = jax.random.key(0)
NOISE = jax.random.normal(KEY, (512, 2))
STEP = jnp.int32(3)


def network(params, x_t, t, cond, *, train=False, key=None):
    """The exact F for a = -1, plus terms that bend it."""
    out = params["a"] * jnp.tan(t / 2)[:, None] * x_t + params["b"] * jnp.sin(2 * t)[:, None] * jnp.tanh(x_t)
    return out + cond["guidance"][:, None] if "guidance" in cond else out


def params_of(a=-1.0, b=0.0):
    return {"a": jnp.asarray(a), "b": jnp.asarray(b)}


def still(params, x_t, t, cond, *, train=False, key=None):
    """The best teacher: the mean direction of data N(0, SD^2) is 0."""
    return params["shift"] + jnp.zeros_like(x_t) + (cond["label"][:, None] * 1.0 if "label" in cond else 0.0)


TEACHER = {"teacher": still, "teacher_params": {"shift": jnp.zeros(())}}


def make(**settings):
    return cc.scm(network, **({"init_params": lambda key, batch: params_of()} | settings))


def start(method, params=None, batch=None):
    params_, aux = method.init(KEY, batch)
    return (params_ if params is None else {"model": params_["model"] | {"network": params}}), aux


def batch_of(n=512, key=KEY):
    return {"x0": SD * jax.random.normal(jax.random.fold_in(key, 2**20), (n, 2))}


def test_the_exact_function_has_no_tangent_and_a_wrong_one_has():
    t = jnp.linspace(0.01, 1.56, 64)
    u = jax.random.normal(KEY, (64, 2))
    velocity = jnp.zeros_like(u)
    f, jvp = cc.network_jvp(network, params_of(), u, t, velocity, {})
    assert np.asarray(cc.tangent(f, jvp, velocity, u, t)) == pytest.approx(0, abs=2e-6)
    f, jvp = cc.network_jvp(network, params_of(-0.5), u, t, velocity, {})
    assert np.abs(cc.tangent(f, jvp, velocity, u, t)).max() > 0.1


def bent(params, x_t, t, cond, *, train=False, key=None):
    return jnp.tanh(x_t @ params) * jnp.cos(3 * t)[:, None] + x_t**2 / 5


def test_the_tangent_is_cos_t_times_the_change_of_f_along_the_path():
    with jax.enable_x64(True):
        x0, eps = (jax.random.normal(k, (5, 2), jnp.float64) for k in jax.random.split(KEY))
        params = jax.random.normal(KEY, (2, 2), jnp.float64)
        t = jnp.array([0.1, 0.4, 0.8, 1.2, 1.5], jnp.float64)
        schedule, v = schedules.trigonometric(SD), parameterization.v()

        def at(t):
            level = schedule.level(t)
            u = level.alpha[:, None] * x0 + level.sigma[:, None] * eps
            return u, parameterization.to_x0(v, bent(params, u, t, {}), u, level)

        velocity, h = parameterization.target(v, x0, eps, schedule.level(t)), 1e-5
        out, jvp = cc.network_jvp(bent, params, at(t)[0], t, velocity, {})
        change = (at(t + h)[1] - at(t - h)[1]) / (2 * h)
        g = cc.tangent(out, jvp, velocity, at(t)[0], t)
        assert np.asarray(g) == pytest.approx(np.asarray(jnp.cos(t)[:, None] * change), abs=1e-8)


def test_the_derivative_goes_through_a_module():
    module = MLP(features=8, num_blocks=1, time_features=functools.partial(fourier_embedding, fastest=4.0))
    net = as_network(module, forward_mode=True)
    u, velocity = (jax.random.normal(k, (5, 2)) for k in jax.random.split(KEY))
    t = jnp.array([0.1, 0.4, 0.8, 1.2, 1.5])
    params = init_params(module, KEY, u, t, {})
    f, jvp = cc.network_jvp(net, params, u, t, velocity, {})
    speed, h = jnp.cos(t) * jnp.sin(t), 1e-2
    ahead, behind = (net(params, u + s * h * velocity, t + s * h, {}) for s in (1, -1))
    assert np.asarray(f) == pytest.approx(np.asarray(net(params, u, t, {})), abs=1e-6)
    assert np.asarray(jvp) == pytest.approx(np.asarray(speed[:, None] * (ahead - behind) / (2 * h)), abs=2e-3)


@pytest.mark.parametrize("form", [cc.PAPER, cc.EXTRA_PRIOR, cc.FASTGEN])
def test_the_gradient_is_that_of_f_times_the_tangent(form):
    """With F frozen inside, the gradient in F is -2 exp(w) weight g / D, whatever g depends on."""
    f, g = (jax.random.normal(k, (3, 4, 2)) for k in jax.random.split(KEY))
    t, w = jnp.array([0.2, 0.7, 1.4]), jnp.array([0.3, 0.0, -0.5])

    def total(f, g, w):
        return cc.scm_loss(f, f, g, t, w, form=form, sigma_data=SD)[0].sum()

    in_f, in_g, in_w = jax.grad(total, argnums=(0, 1, 2))(f, g, w)
    scale = (jnp.exp(w) * form.weight(t, 8, SD) * -2 / 8)[:, None, None]
    assert np.asarray(in_f) == pytest.approx(np.asarray(scale * form.normalize(SD * g)), abs=1e-6)
    assert (np.asarray(in_g) == 0).all()
    _, error = cc.scm_loss(f, f, g, t, w, form=form, sigma_data=SD)
    assert np.asarray(in_w) == pytest.approx(np.asarray(jnp.exp(w) * form.weight(t, 8, SD) * error - 1), rel=1e-5)


def test_normalisation_bounds_the_tangent():
    g = jnp.stack([1e4 * jnp.ones(9), 0.3 * jnp.ones(9), jnp.zeros(9)])
    assert np.linalg.norm(cc.unit_norm()(g), axis=1) == pytest.approx([3e4 / 30000.1, 0.9 / 1.0, 0], rel=1e-5)
    assert np.asarray(cc.unit_rms()(g)[:, 0]) == pytest.approx([1e4 / 10000.1, 0.3 / 0.4, 0], rel=1e-5)
    assert np.asarray(cc.clipped()(g)[:, 0]) == pytest.approx([1, 0.3, 0])


def test_without_the_adaptive_weight_the_loss_is_the_squared_tangent():
    for adaptive in (True, False):
        method = make(adaptive_weight=adaptive, form=cc.Form(lambda g: g, cc.no_weight))
        params, aux = start(method, params_of(b=0.5))
        params["model"]["weight"]["bias"] = jnp.asarray(0.7)  # as if learned

        def loss(params, method=method, aux=aux):
            return method.objectives[0].loss(params, aux, batch_of(), KEY, STEP)

        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        expected = np.exp(0.7) * metrics["mse"].mean() - 0.7 if adaptive else metrics["mse"].mean()
        assert float(value) == pytest.approx(float(expected), rel=1e-5) and float(value) != 0
        assert bool(gradient["model"]["weight"]["bias"]) == adaptive


def test_no_gradient_reaches_the_teacher_and_none_passes_through_the_derivative():
    method = make(**TEACHER)
    params, aux = start(method, params_of(-0.7, 0.2))
    loss = functools.partial(method.objectives[0].loss, batch=batch_of(), key=KEY, step=STEP)
    in_params, in_aux = jax.grad(lambda p, a: loss(p, a)[0], argnums=(0, 1))(params, aux)
    assert jax.tree.leaves(in_aux) and all((leaf == 0).all() for leaf in jax.tree.leaves(in_aux))
    assert in_params["model"]["network"]["a"] != 0 and in_params["model"]["network"]["b"] != 0


def test_student_and_teacher_start_as_copies():
    given = {"shift": jnp.ones(3)}
    params, aux = cc.scm(network, teacher=still, teacher_params=given).init(KEY, {})
    held = [tree["shift"] for tree in (params["model"]["network"], aux["teacher"], given)]
    assert all((leaf == 1).all() for leaf in held)
    assert len({leaf.unsafe_buffer_pointer() for leaf in held}) == 3


def test_the_second_part_of_the_tangent_warms_up_without_a_new_trace():
    method = make(warmup_steps=10, **TEACHER)
    params, aux = start(method, params_of(-0.5))
    traced = jax.jit(chex.assert_max_traces(method.objectives[0].loss, n=1))
    tangents = [float(traced(params, aux, batch_of(), KEY, jnp.int32(k))[1]["tangent"].mean()) for k in (0, 5, 10, 50)]
    assert tangents[2] == tangents[3] != tangents[1] != tangents[0]


def test_scd_learns_the_exact_function():
    method = make(warmup_steps=20, **TEACHER)
    params, aux = start(method, params_of(0.0, 0.0))
    adam = optax.adam(2e-2)

    @jax.jit
    def step(params, opt, k):
        grad = jax.grad(lambda p: method.objectives[0].loss(p, aux, batch_of(key=key_of(k)), key_of(k), k)[0])(params)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to its integer count
            updates, opt = adam.update(grad, opt)
        return optax.apply_updates(params, updates), opt

    def key_of(k):
        return jax.random.fold_in(KEY, k)

    opt = adam.init(params)
    for k in range(250):
        params, opt = step(params, opt, jnp.int32(k))
    assert float(params["model"]["network"]["a"]) == pytest.approx(-1, abs=0.05)
    assert float(params["model"]["network"]["b"]) == pytest.approx(0, abs=0.05)


def test_one_step_and_more_steps_give_the_data():
    method = make()
    params, aux = start(method)
    run = functools.partial(method.generate, params, aux, KEY, NOISE, {})
    assert np.asarray(run(Sampling(num_steps=1))) == pytest.approx(SD * np.asarray(NOISE), abs=1e-5)
    for n in (2, 4):
        samples = np.asarray(run(Sampling(num_steps=n)))
        assert not np.allclose(samples, SD * NOISE, atol=0.1)
        assert samples.std() == pytest.approx(SD, rel=0.08)
    at_the_end = run(Sampling(times=jnp.zeros(1)))
    assert np.asarray(at_the_end) == pytest.approx(SD * np.asarray(NOISE), abs=1e-7)  # f(u, 0) = u for any network


def test_an_edm_network_becomes_a_trigflow_one():
    def edm_net(params, x_t, t, cond, *, train=False, key=None):
        return params * jnp.tanh(x_t) + jnp.sin(t)[:, None]

    sigma, x = jnp.array([0.01, 0.3, 5.0]), jax.random.normal(KEY, (3, 2))
    d_edm = denoiser(edm_net, jnp.float32(0.8), schedules.ve(), parameterization.edm(SD))(x, sigma).x0
    t = jnp.arctan(sigma / SD)
    d_trig = denoiser(
        cc.from_edm(edm_net, SD), jnp.float32(0.8), schedules.trigonometric(SD), parameterization.v()
    )  # fmt: skip
    u = jnp.cos(t)[:, None] * x / SD
    assert SD * np.asarray(d_trig(u, t).x0) == pytest.approx(np.asarray(d_edm), abs=2e-6)


def test_a_guided_teacher_and_its_scale_reach_the_student():
    seen = {}

    def student(params, x_t, t, cond, *, train=False, key=None):
        seen.update(cond)
        return network(params, x_t, t, {})

    method = cc.scm(
        student, init_params=lambda k, b: params_of(-0.5), guidance_range=(1.5, 1.5), null_cond=none, **TEACHER
    )  # fmt: skip
    plain = cc.scm(student, init_params=lambda k, b: params_of(-0.5), **TEACHER)
    batch = batch_of()
    params, aux = method.init(KEY, batch)
    labels = {"label": jnp.full(512, 0.2)}
    loss, metrics = method.objectives[0].loss(params, aux, batch | labels, KEY, STEP)
    assert seen["guidance"].shape == (512,) and (seen["guidance"] == 1.5).all()
    # uncond + 2.5 (cond - uncond) of velocities 0 and 0.2
    same, expected = plain.objectives[0].loss(params, aux, batch | {"label": jnp.full(512, 0.5)}, KEY, STEP)
    assert float(loss) == pytest.approx(float(same), rel=1e-5)
    assert float(metrics["tangent"].mean()) == pytest.approx(float(expected["tangent"].mean()), rel=1e-5)
    method.generate(params, aux, KEY, NOISE[:3], {}, Sampling(guidance_scale=jnp.float32(3.0)))
    assert np.asarray(seen["guidance"]) == pytest.approx([2, 2, 2])


def none(cond):
    return cond | {"label": jnp.zeros_like(cond["label"])}


def test_trigflow_has_the_known_minimum_and_samples_the_data():
    method = cc.trigflow(still, init_params=lambda key, batch: {"shift": jnp.zeros(())}, num_steps=40)
    params, aux = method.init(KEY, {})
    loss, _ = method.objectives[0].loss(params, aux, batch_of(20_000), KEY, STEP)
    assert float(loss) == pytest.approx(1, rel=0.03)  # cos(t) eps - sin(t) u0 has variance 1, and mean 0 given u_t
    samples = method.generate(params, aux, KEY, NOISE, {}, Sampling())
    assert np.asarray(samples) == pytest.approx(SD * np.asarray(NOISE), rel=0.02)


def test_a_teacher_learns_to_do_without_labels_and_is_guided():
    def labelled(params, x_t, t, cond, *, train=False, key=None):
        shift = params["shift"] * jnp.where(cond["label"] == 3, 0, cond["label"]).astype(x_t.dtype)
        return shift[:, None] + jnp.zeros_like(x_t)

    def at_zero(key, batch):
        return {"shift": jnp.ones(())}

    with pytest.raises(ValueError, match="label_dropout needs null_label"):
        cc.trigflow(labelled, init_params=at_zero, label_dropout=0.5)
    method = cc.trigflow(labelled, init_params=at_zero, label_dropout=0.4, null_label=3)
    params, aux = method.init(KEY, {})
    batch = batch_of(4000) | {"label": jnp.full(4000, 10, jnp.int32)}
    _, metrics = method.objectives[0].loss(params, aux, batch, KEY, STEP)
    assert np.mean(metrics["mse"] < 20) == pytest.approx(0.4, abs=0.04)  # the others miss by 10 squared
    label = {"label": jnp.ones(512, jnp.int32)}
    run = functools.partial(method.generate, params, aux, KEY, NOISE)
    null, plain, twice = (
        np.asarray(run(cond, Sampling(num_steps=4, guidance_scale=scale)))
        for cond, scale in (({}, None), (label, None), (label, jnp.float32(2)))
    )
    assert twice - null == pytest.approx(2 * (plain - null), abs=2e-3 * float(np.abs(plain).max()))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"teacher": still}, "teacher and teacher_params belong together"),
        ({"init_params": None}, "without a teacher the student needs init_params"),
        ({"guidance_range": (0.0, 1.0)}, "needs a teacher and null_cond"),
        ({"guidance_range": (2.0, 1.0), "null_cond": none, **TEACHER}, r"guidance_range is \(low, high\)"),
        ({"warmup_steps": 0}, "warmup_steps must be at least 1"),
        ({"sigma_data": 0.0}, "sigma_data must be positive, got 0.0"),
        ({"log_std": -1.0}, "log_std must be positive"),
    ],
)
def test_refused_when_built(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_refused_when_traced():
    method = make()
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        method.generate(*start(method), KEY, NOISE, {}, Sampling(num_steps=0))
    with pytest.raises(ValueError, match="trained with guidance_range"):
        method.generate(*start(method), KEY, NOISE, {}, Sampling(guidance_scale=jnp.float32(2)))
    with pytest.raises(ValueError, match="a batch needs 'x0'"):
        method.objectives[0].loss(start(method)[0], {}, {"image": NOISE}, KEY, STEP)
