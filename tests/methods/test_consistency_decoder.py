"""Indices by hand, decoding with known networks, and both training stages on images that a latent determines."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff import losses
from jaxdiff.methods import consistency_decoder as cd
from jaxdiff.methods.base import Sampling
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.consistency_decoder import ConsistencyDecoder, example_inputs
from jaxdiff.schedules import Schedule
from jaxdiff.types import Level, expand

KEY = jax.random.key(0)
STEP = jnp.int32(0)
SD = 0.5
SCHEDULE = cd.decoder_schedule()


def sure_on(schedule):
    """The network whose output stands for the image `latent + a`, in three of six channels."""

    def network(params, x_t, t, cond, *, train=False, key=None):
        alpha, sigma = (expand(c, x_t) for c in schedule.level(t))
        m = alpha**2 * SD**2 + sigma**2
        image = jnp.repeat(jnp.repeat(cond["latent"][..., :3], 2, axis=1), 2, axis=2) + params["a"]
        out = (image - alpha * SD**2 / jnp.sqrt(m) * x_t) * jnp.sqrt(m) / (sigma * SD)
        return jnp.concatenate([out, jnp.full_like(out, jnp.nan)], axis=-1)

    return network


sure = sure_on(SCHEDULE)


def batch_of(n=8):
    latent = 0.4 * jax.random.normal(jax.random.key(5), (n, 1, 1, 4))
    return {"x0": jnp.repeat(jnp.repeat(latent[..., :3], 2, axis=1), 2, axis=2), "latent": latent}


def make(a=0.0, network=sure, **settings):
    base = {"teacher_params": {"a": jnp.zeros(())}, "init_params": lambda key, batch: {"a": jnp.float32(a)}}
    return cd.consistency_decoder(network, **(base | settings))


def test_indices_round_up_to_sixteens():
    t = jnp.array([0.0, 1.0, 15.0, 16.0, 511.0, 1000.0, 1023.0])
    assert cd.rounded_index(t).tolist() == [16, 16, 16, 32, 512, 1008, 1008]
    assert cd.rounded_index(jnp.array([0.0, 9.0]), 10, 5).tolist() == [2, 8]
    assert cd.decoding_times(np.array([1.0, 0.5])).tolist() == [1008, 512]
    assert cd.decoding_times(np.array([1.0])).tolist() == [1008]
    for fractions in ([], [1.2, 0.5], [0.5, 1.0], [1.0, 0.0]):
        with pytest.raises(ValueError, match="fractions must decrease from at most 1"):
            cd.decoding_times(np.array(fractions))


def test_a_clean_image_stays_as_it_is():
    clean = Schedule(lambda t: Level(jnp.ones_like(t), jnp.zeros_like(t)), lambda h: h, 0.0, 1.0)

    def network(params, x_t, t, cond, *, train=False, key=None):
        return 7 * x_t + 3

    x = jax.random.normal(KEY, (2, 2, 2, 3))
    assert (cd.decoder_denoiser(network, {}, clean, {})(x, jnp.zeros(2)).x0 == x).all()


def test_decoding_takes_two_steps_and_clips_each():
    seen = []

    def network(params, x_t, t, cond, *, train=False, key=None):
        jax.debug.callback(lambda t: seen.append(float(t[0])), t)
        return sure({"a": jnp.float32(9)}, x_t, t, cond)

    noise, cond = jax.random.normal(KEY, (8, 2, 2, 3)), {"latent": batch_of()["latent"]}
    for settings, times, result in (({}, [1008, 512], 1), ({"clip": None, "num_steps": 4}, [1008, 768, 512, 256], 9)):
        seen.clear()
        method = cd.consistency_decoder(network, teacher_params={}, **settings)
        out = np.asarray(method.generate({"model": {}}, {}, KEY, noise, cond, Sampling()))
        jax.effects_barrier()
        assert sorted(seen, reverse=True) == times
        expected = result if result == 1 else result + np.asarray(batch_of()["x0"])
        assert out == pytest.approx(np.broadcast_to(expected, out.shape), abs=1e-4)


def test_the_exact_function_has_no_loss_and_a_constant_error_shows_where_the_teacher_answers():
    batch = batch_of(512)
    for a, share in ((0.0, 0.0), (0.3, 1 / 63)):
        method = make(a)
        params, aux = method.init(KEY, batch)
        loss, _ = method.objectives[0].loss(params, aux, batch, KEY, STEP)
        # student and target are off by the same a at all indices but the lowest, whose target is the teacher's image
        assert float(loss) == pytest.approx(share * a**2, rel=0.8, abs=1e-7)


def test_no_gradient_reaches_teacher_and_target():
    method = make(0.3)
    params, aux = method.init(KEY, {})
    params = {"model": {"a": jnp.float32(0.5)}}
    in_params, in_aux = jax.grad(
        lambda p, a: method.objectives[0].loss(p, a, batch_of(), KEY, STEP)[0], argnums=(0, 1)
    )(params, aux)  # fmt: skip
    assert in_params["model"]["a"] != 0
    assert in_aux["teacher"]["a"] == 0 and in_aux["target"]["a"] == 0
    moved = method.advance(aux, params, STEP, {})
    assert float(moved["target"]["a"]) == pytest.approx(0.95 * 0.3 + 0.05 * 0.5) and moved["teacher"]["a"] == 0


@pytest.mark.parametrize("stage", ["first", "second"])
def test_a_stage_learns_the_image_in_one_trace(stage):
    chex.clear_trace_counter()
    chain = {"num_times": 64, "num_levels": 4, "num_steps": 2}
    network = sure_on(cd.decoder_schedule(64))
    if stage == "first":
        method = cd.diffusion_decoder(network, init_params=lambda key, batch: {"a": jnp.float32(0.4)}, **chain)
    else:
        method = make(0.4, network, **chain)
    adam, batch = optax.adam(5e-2), batch_of(16)
    params, aux = method.init(KEY, batch)

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
    for k in range(150):
        params, aux, opt = step(params, aux, opt, jnp.int32(k))
    assert float(params["model"]["a"]) == pytest.approx(0, abs=0.05)


def test_the_loss_of_the_first_stage_is_that_of_the_output():
    method = cd.diffusion_decoder(sure, init_params=lambda key, batch: {"a": jnp.float32(0.0)})
    params, aux = method.init(KEY, {})
    batch = batch_of(4)
    assert float(method.objectives[0].loss(params, aux, batch, KEY, STEP)[0]) == pytest.approx(0, abs=1e-6)
    noise = jax.random.normal(KEY, (4, 2, 2, 3))
    out = method.generate(params, aux, KEY, noise, {"latent": batch["latent"]}, Sampling(num_steps=3))
    assert np.asarray(out) == pytest.approx(np.clip(np.asarray(batch["x0"]), -1, 1), abs=1e-4)


def test_the_network_of_the_release_fits():
    decoder = ConsistencyDecoder(
        base_channels=4, channel_mult=(1, 2), num_res_blocks=1, norm_groups=2, emb_channels=6, num_times=64, upscale=2
    )
    network = as_network(decoder.clone(output_rule=decoder.layer_rule))
    params = init_params(decoder.clone(output_rule=decoder.layer_rule), KEY, *example_inputs(decoder))
    method = cd.consistency_decoder(
        network, teacher_params=params, num_times=64, num_levels=8, distance=losses.l1, target_decay=0.5
    )  # fmt: skip
    batch = batch_of(2)
    batch = {"x0": jnp.tile(batch["x0"], (1, 2, 2, 1)), "latent": jnp.tile(batch["latent"], (1, 2, 2, 1))}
    params, aux = method.init(KEY, batch)
    grads = jax.eval_shape(jax.grad(lambda p: method.objectives[0].loss(p, aux, batch, KEY, STEP)[0]), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
    out = jax.eval_shape(
        lambda: method.generate(params, aux, KEY, batch["x0"], {"latent": batch["latent"]}, Sampling())
    )
    assert out.shape == batch["x0"].shape


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_levels": 60}, "num_levels must divide num_times, 1024, got 60"),
        ({"num_levels": 1}, "num_levels must divide"),
        ({"num_steps": 64}, "num_steps must be 1 to 63, got 64"),
        ({"target_decay": 1.0}, r"target_decay must lie in \[0, 1\)"),
    ],
)
def test_refused_when_built(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_refused_when_traced():
    method = make()
    params, aux = method.init(KEY, {})
    for missing in ("x0", "latent"):
        batch = {name: value for name, value in batch_of().items() if name != missing}
        with pytest.raises(ValueError, match=f"a batch needs '{missing}'"):
            method.objectives[0].loss(params, aux, batch, KEY, STEP)
    with pytest.raises(ValueError, match="guidance_scale has no meaning"):
        method.generate(params, aux, KEY, batch_of()["x0"], {}, Sampling(guidance_scale=jnp.float32(2)))
