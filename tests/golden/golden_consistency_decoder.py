"""OpenAI's consistency decoder: names in three forms, normalised latents, the network, and the loop that decodes.

Weights are the hash of the files' index. The loop runs on an analytic network and on the real one; diffusers' does not
clip. Tolerance: 1e-4 on outputs of order 1, 1e-3 after the loop.
"""

import jax
import jax.numpy as jnp
import numpy as np
from golden_consistency_unets import compare_names, compare_shapes, hash_weights, tensors
from golden_core_networks import ATOL, nchw, nhwc
from golden_harness import topic

from jaxdiff import parameterization, schedules
from jaxdiff.denoiser import clip_x0
from jaxdiff.methods import consistency_decoder as method
from jaxdiff.networks.base import num_params, param_shapes
from jaxdiff.networks.consistency_decoder import ConsistencyDecoder, example_inputs, normalize_latent
from jaxdiff.pretrained.consistency_decoder import CONV_UNET, DIFFUSERS, OPENAI, decoder_entries, import_decoder
from jaxdiff.solvers.base import sample
from jaxdiff.solvers.stochastic_iterative import stochastic_iterative
from jaxdiff.types import expand

FORMS = {"keys": CONV_UNET, "diffusers_keys": DIFFUSERS, "torchscript_keys_inferred": OPENAI}


def check_names(golden, decoder):
    shapes = param_shapes(decoder, *example_inputs(decoder))
    for key, names in FORMS.items():
        compare_names(golden, key, tensors(decoder_entries(decoder, names), shapes))
    compare_shapes(golden, tensors(decoder_entries(decoder, CONV_UNET), shapes))
    return shapes


def widths_of(golden):
    """Widths of the four levels and of the embedding of times, from the shapes of the layers that set them."""
    found = dict(zip(golden.arrays["keys"].tolist(), golden.arrays["shapes"].tolist(), strict=True))
    names = ("embed_image.f", *(f"down.{level}.0.f_1" for level in (1, 2, 3)), "embed_time.f_1")
    return [found[f"{name}.weight"][0] for name in names]


def decoder_of(golden):
    *widths, emb_channels = widths_of(golden)
    mult = [width / widths[0] for width in widths]
    return ConsistencyDecoder(base_channels=widths[0], channel_mult=mult, emb_channels=emb_channels)


@topic("consistency/consistency_decoder_keys")
def consistency_decoder_keys(golden):
    shapes = check_names(golden, decoder_of(golden))
    golden.compare("nparams", num_params(shapes))


@topic("consistency/consistency_decoder")
def consistency_decoder(golden):
    decoder = decoder_of(golden)
    check_names(golden, decoder)
    level_0, level_1, level_2, _, emb_channels = widths_of(golden)
    golden.compare("widths", [level_0, level_1, level_2, emb_channels])
    features = normalize_latent(0.18215 * nhwc(golden.input("latent")))
    golden.compare("features", nchw(features), atol=1e-5)
    tables = schedules.tables(schedules.cosine_betas(1024))
    # The release subtracts from 1 in float32, which costs 5e-6 where the noise is small.
    for key in ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"):
        golden.compare(key, getattr(tables, key), atol=1e-5)

    params = jax.tree.map(jnp.asarray, import_decoder(hash_weights(golden), decoder, names=CONV_UNET))
    apply = jax.jit(lambda x, t, cond: decoder.apply({"params": params}, x, t, cond))
    x, t = nhwc(golden.input("unet_x")), jnp.asarray(golden.input("unet_t").astype(np.float32))
    with jax.default_matmul_precision("highest"):
        out = apply(x, t, {"latent": nhwc(golden.input("features"))})
        golden.compare("unet_out", nchw(out), atol=ATOL)
        check_tables(golden)
        check_loop(golden, lambda params, x, t, cond, *, train=False, key=None: apply(x, t, cond))


def check_tables(golden):
    schedule = method.decoder_schedule()
    level = schedule.level(jnp.arange(1024.0))
    c = parameterization.edm().coefficients(level)
    # The release takes 1/abar - 1 in float32, which costs c_out 3e-6 where the noise is small.
    for key, value in (("c_skip", c.skip), ("c_out", c.out), ("c_in", c.scale_in)):
        golden.compare(key, value, rtol=1e-5, atol=5e-6)
    for key in golden.keys("round_trunc_*"):
        golden.compare(key, method.rounded_index(jnp.arange(1024.0)))
    golden.compare("schedule_timesteps", method.decoding_times(golden.input("schedule").astype(np.float64)))
    golden.compare("diffusers_timesteps", method.decoding_times(np.array([1.0, 0.5])))
    first = schedule.level(jnp.asarray(golden.arrays["diffusers_timesteps"][:1], jnp.float32))
    golden.compare("diffusers_init_noise_sigma", first.sigma[0], rtol=1e-6)


def analytic(params, x_t, t, cond, *, train=False, key=None):
    del params, train, key
    latent = jnp.repeat(jnp.repeat(cond["latent"][..., :3], 8, axis=1), 8, axis=2)
    return 0.7 * jnp.tanh(1.3 * x_t) + 0.2 * jnp.sin(expand(t, x_t) / 100) + 0.1 * latent


def check_loop(golden, network):
    schedule = method.decoder_schedule()
    noises = jnp.moveaxis(jnp.asarray(golden.input("noises")), 2, -1)
    cond = {"latent": nhwc(golden.input("features"))}

    def decode(network, times, clip, follow):
        denoise = method.decoder_denoiser(network, {}, schedule, cond)
        times = jnp.asarray(times, jnp.float32)
        x = schedule.level(times[:1]).sigma[0] * noises[0]
        return nchw(follow(stochastic_iterative(schedule), clip_x0(denoise) if clip else denoise, x, times))

    def in_one_scan(solver, denoise, x, times):
        return sample(solver, denoise, jax.random.key(0), x, times, noise=jnp.concatenate([noises[1:], noises[:1]]))

    def one_by_one(solver, denoise, x, times):
        """The same, calling a network that is compiled already."""
        each = [jnp.full(x.shape[:1], t) for t in times]
        for t, s, noise in zip(each, each[1:], noises[1:], strict=False):
            x, _, _ = solver.step(noise, None, x, t, s, denoise)
        return denoise(x, each[-1]).x0

    times = golden.arrays["schedule_timesteps"]
    golden.compare("fake_out", decode(analytic, times, True, in_one_scan), atol=1e-4)
    golden.compare("unet_decode_out", decode(network, times, True, one_by_one), atol=1e-3)
    plain = decode(network, golden.arrays["diffusers_timesteps"], False, one_by_one)
    golden.compare("diffusers_decode_out", plain, atol=1e-3)
