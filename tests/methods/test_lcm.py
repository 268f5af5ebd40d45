"""Boundary, indices and times by hand; losses on teachers whose consistency function is known; LCM-LoRA."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff import losses, parameterization, process, schedules
from jaxdiff.methods import lcm
from jaxdiff.methods.base import Sampling
from jaxdiff.networks import lora
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.mlp import MLP
from jaxdiff.types import Denoised

KEY = jax.random.key(0)
STEP = jnp.int32(0)
BETAS = schedules.scaled_linear_betas(100, 0.0085, 0.12)
CHAIN = schedules.discrete(BETAS)
POINT = jnp.array([0.6, -0.2])


def points(params, x_t, t, cond, *, train=False, key=None):
    """x0 of a teacher that knows the data: POINT, moved by a condition that guidance multiplies."""
    shift = cond["shift"][:, None] if "shift" in cond else 0.0
    w = 1 + cond["guidance"][:, None] if "guidance" in cond else 1.0
    return POINT.reshape(1, 2) + params["a"] + shift * w + jnp.zeros_like(x_t)


def null(cond):
    return cond | {"shift": jnp.zeros_like(cond["shift"])}


def make(a=0.0, **settings):
    base = {
        "teacher": points,
        "teacher_params": {"a": jnp.zeros(())},
        "init_params": lambda key, batch: {"a": jnp.float32(a)},
        "null_cond": null,
        "parameterization": parameterization.x0(),
        "num_ddim_steps": 20,
    }
    return lcm.lcm(points, BETAS, **(base | settings))


def batch_of(n=256):
    return {"x0": jnp.broadcast_to(POINT, (n, 2)), "shift": jnp.full(n, 0.1)}


def test_index_zero_is_its_own_image():
    t, x_t = jnp.array([0.0, 1.0, 99.0]), jax.random.normal(KEY, (3, 2))
    f = lcm.with_boundary(lambda x, t: Denoised(x + 5))(x_t, t).x0
    assert (f[0] == x_t[0]).all()
    assert np.asarray(f[1:]) == pytest.approx(np.asarray(x_t[1:] + 5), abs=0.02)
    skip, out = lcm.boundary_scalings(t)
    assert np.asarray(skip) == pytest.approx([1, 0.25 / 100.25, 0.25 / (990**2 + 0.25)], rel=1e-6)
    assert np.asarray(out) == pytest.approx([0, 10 / 100.25**0.5, 1], rel=1e-6)
    method = make()
    params, aux = method.init(KEY, {})
    noise = jax.random.normal(KEY, (3, 2))
    same = method.generate(params, aux, KEY, noise, {}, Sampling(times=jnp.zeros(1)))
    assert (same == noise).all()


def test_every_step_is_clipped_where_a_bound_is_given():
    params, aux = make().init(KEY, {})
    noise = jax.random.normal(KEY, (3, 2))
    for n in (1, 3):
        free, bound = (make(clip=c).generate(params, aux, KEY, noise, {}, Sampling(num_steps=n)) for c in (None, 0.5))
        np.testing.assert_allclose(free, jnp.broadcast_to(POINT, (3, 2)), atol=1e-3)
        np.testing.assert_allclose(bound, jnp.clip(free, -0.5, 0.5), atol=1e-6)


def test_a_step_skips_a_stride_and_stops_at_index_zero():
    t, s = lcm.skipping_indices(jnp.array([0, 1, 49]))
    assert t.tolist() == [19, 39, 999] and s.tolist() == [0, 19, 979]
    t, s = lcm.skipping_indices(jnp.arange(4), 100, 4)
    assert t.tolist() == [24, 49, 74, 99] and s.tolist() == [0, 24, 49, 74]


def test_sampling_times():
    assert lcm.lcm_times(1000, 4).tolist() == [999, 759, 499, 259]
    assert lcm.lcm_times(1000, 1).tolist() == [999]
    assert lcm.lcm_times(1000, 50).tolist() == list(range(999, 0, -20))
    assert lcm.lcm_times(1000, 2, strength=0.5).tolist() == [499, 259]
    for settings, message in (
        ({"n": 51}, "n must be 1 to 50"),
        ({"n": 0}, "n must be 1 to 50"),
        ({"n": 2, "strength": 0.02}, "n must be 1 to 1"),
        ({"n": 1, "strength": 1.5}, r"strength must lie in \(0, 1\]"),
        ({"n": 1, "original_steps": 2000}, "original_steps must be 1 to 1000"),
    ):
        with pytest.raises(ValueError, match=message):
            lcm.lcm_times(1000, **settings)


def test_huber_by_hand():
    a = jnp.array([[3.0, 0.0], [0.001, 0.001]])
    value = lcm.elementwise_huber(0.004)(a, jnp.zeros_like(a))
    by_hand = (np.sqrt(np.asarray(a, np.float64) ** 2 + 0.004**2) - 0.004).mean(axis=1)
    assert np.asarray(value) == pytest.approx(by_hand, rel=1e-4)
    assert np.asarray(jax.grad(lambda a: lcm.elementwise_huber()(a, a).sum())(a)) == pytest.approx(0)
    with pytest.raises(ValueError, match="c must be positive"):
        lcm.elementwise_huber(0.0)


@pytest.mark.parametrize("a", [0.0, 0.5])
def test_a_student_with_one_answer_has_no_loss_but_at_index_zero(a):
    """There f is the noised point itself, which alone says that a must be 0; one index in 20 ends there."""
    method = make(a, distance=losses.mse)
    params, aux = method.init(KEY, {})
    _, metrics = method.objectives[0].loss(params, aux, batch_of(), KEY, STEP)
    large = np.asarray(metrics["error"]) > 1e-4
    assert 0.02 < large.mean() < 0.1
    assert np.asarray(metrics["error"])[large].max() > a**2


def test_the_target_is_guided_by_the_scale_that_the_student_sees():
    """The teacher's step ends at alpha x0 + sigma eps of the guided x0, uncond + (1 + w) (cond - uncond)."""
    seen = {}

    def student(params, x_t, t, cond, *, train=False, key=None):
        seen.setdefault("calls", []).append((x_t, t, cond["guidance"]))
        return points({"a": 0.0}, x_t, t, cond)

    method = lcm.lcm(
        student, BETAS, teacher=points, teacher_params={"a": jnp.zeros(())}, null_cond=null, num_ddim_steps=20,
        parameterization=parameterization.x0(), guidance_range=(3.0, 9.0),
    )  # fmt: skip
    params, aux = method.init(KEY, {})
    method.objectives[0].loss(params, aux, batch_of(32), KEY, STEP)
    (z_s, s, w), (z_t, t, again) = seen["calls"]
    assert (w == again).all() and w.min() >= 3 and w.max() <= 9 and len(np.unique(w)) == 32
    assert (np.asarray(s) == np.maximum(np.asarray(t) - 5, 0)).all()
    guided = POINT.reshape(1, 2) + 0.1 * (1 + w)[:, None]
    eps = process.eps_from_x0(guided, z_t, CHAIN.level(t))
    assert np.asarray(z_s) == pytest.approx(np.asarray(process.q_sample(guided, eps, CHAIN.level(s))), abs=1e-5)


@pytest.mark.parametrize("decay", [0.9, None])
def test_gradients_and_the_slow_copy(decay):
    method = make(0.3, target_decay=decay, distance=losses.mse)
    params, aux = method.init(KEY, {})
    params = {"model": {"a": jnp.float32(0.5)}}
    in_params, in_aux = jax.grad(
        lambda p, a: method.objectives[0].loss(p, a, batch_of(), KEY, STEP)[0], argnums=(0, 1)
    )(params, aux)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(in_aux))
    moved = method.advance(aux, params, STEP, {})
    assert ("target" in aux) == (decay is not None)
    if decay is not None:
        assert in_params["model"]["a"] != 0
        assert float(moved["target"]["a"]) == pytest.approx(0.9 * 0.3 + 0.1 * 0.5)
    assert moved["teacher"]["a"] == 0


def test_training_learns_the_boundary_consistent_answer_in_one_trace():
    """The only fixed point of a student that is off by `a` is a = 0: at index 0 the data themselves are the target."""
    method = make(0.5, guidance_range=(0.0, 0.0), distance=losses.mse, num_ddim_steps=2, num_steps=1)
    params, aux = method.init(KEY, {})
    adam, batch = optax.adam(3e-2), batch_of(64) | {"shift": jnp.zeros(64)}

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, aux, opt, k):
        key = jax.random.fold_in(KEY, k)
        grad = jax.grad(lambda p: method.objectives[0].loss(p, aux, batch, key, k)[0])(params)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to its integer count
            updates, opt = adam.update(grad, opt)
        params = optax.apply_updates(params, updates)
        return params, method.advance(aux, params, k, {}), opt

    opt = adam.init(params)
    for k in range(200):
        params, aux, opt = step(params, aux, opt, jnp.int32(k))
    assert float(params["model"]["a"]) == pytest.approx(0, abs=0.03)
    assert float(aux["target"]["a"]) == pytest.approx(0, abs=0.03)


def test_sampling_gives_w_to_the_network_and_ends_in_its_answer():
    method = make()
    params, aux = method.init(KEY, {})
    noise, cond = jax.random.normal(KEY, (3, 2)), {"shift": jnp.full(3, 0.1)}
    run = functools.partial(method.generate, params, aux, KEY, noise, cond)
    for scale, w in ((None, 2.0), (jnp.float32(8.0), 7.0)):
        expected = np.asarray(POINT) + 0.1 * (1 + w)
        assert np.asarray(run(Sampling(guidance_scale=scale))) == pytest.approx(np.tile(expected, (3, 1)), abs=1e-3)
    traced = jax.jit(chex.assert_max_traces(lambda s: run(Sampling(num_steps=2, guidance_scale=s)), n=1))
    assert not np.allclose(traced(jnp.float32(2)), traced(jnp.float32(5)))


def test_lora_starts_at_the_teacher_trains_the_additions_alone_and_takes_guidance_on_top():
    module = MLP(features=8, num_blocks=1, num_classes=3, null_label=True)
    network = as_network(module)
    label = jnp.array([0, 1, 2, 1])
    base = init_params(module, KEY, jnp.zeros((4, 2)), jnp.zeros(4), {"label": label})
    method = lcm.lcm(
        network, BETAS, teacher=network, teacher_params=base, adapt=lora.adapt, guidance_input=False, target_decay=None,
        init_params=lambda key, batch: lora.init_lora(key, base, 2, targets="kernel$"), num_ddim_steps=20,
        null_cond=lambda cond: {"label": jnp.full_like(cond["label"], 3)}, parameterization=parameterization.v(),
    )  # fmt: skip
    params, aux = method.init(KEY, {})
    assert set(aux) == {"teacher"}
    noise, cond = jax.random.normal(KEY, (4, 2)), {"label": label}

    @jax.jit
    def everything(params, aux):
        def run(scale):
            return method.generate(params, aux, KEY, noise, cond, Sampling(num_steps=1, guidance_scale=scale))

        def loss(params, aux):
            return method.objectives[0].loss(params, aux, {"x0": noise} | cond, KEY, STEP)[0]

        grads = jax.grad(loss, argnums=(0, 1))(params, aux)
        return run(None), run(jnp.float32(1)), run(jnp.float32(2)), network(base, noise, jnp.full(4, 99.0), cond), grads

    one, same, other, plain, (in_params, in_aux) = everything(params, aux)
    expected = parameterization.to_x0(parameterization.v(), plain, noise, CHAIN.level(jnp.full(4, 99.0)))
    assert np.asarray(one) == pytest.approx(np.asarray(expected), abs=1e-5)
    assert np.asarray(same) == pytest.approx(np.asarray(one), abs=1e-5)
    assert not np.allclose(other, one, atol=1e-3)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(in_aux))
    assert any((leaf != 0).any() for leaf in jax.tree.leaves(in_params["model"]))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"guidance_range": (5.0, 1.0)}, r"guidance_range is \(low, high\)"),
        ({"target_decay": 1.0}, r"target_decay must lie in \[0, 1\)"),
        ({"num_ddim_steps": 7}, "num_ddim_steps must divide the chain of 100 steps, got 7"),
        ({"sigma_data": 0.0}, "sigma_data must be positive"),
        ({"num_steps": 30}, "n must be 1 to 20"),
        ({"adapt": lora.adapt, "init_params": None}, "adapt needs init_params"),
    ],
)
def test_refused_when_built(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_refused_when_traced():
    method = make()
    params, aux = method.init(KEY, {})
    with pytest.raises(ValueError, match="a batch needs 'x0'"):
        method.objectives[0].loss(params, aux, {"latent": POINT}, KEY, STEP)
    with pytest.raises(ValueError, match="use v or x0"):
        lcm.lcm(points, schedules.zero_terminal_snr(BETAS), teacher=points, teacher_params={}, null_cond=null)
