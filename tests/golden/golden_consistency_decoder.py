"""The network of OpenAI's consistency decoder: names in three forms, normalised latents, and its output.

Weights are the hash of the files' index. The loop that decodes, its constants and its rounding of times belong to a
method and are left. Tolerance: 1e-4 on outputs of order 1.
"""

import jax
import jax.numpy as jnp
import numpy as np
from golden_consistency_unets import compare_names, compare_shapes, hash_weights, tensors
from golden_core_networks import ATOL, nchw, nhwc
from golden_harness import topic

from jaxdiff import schedules
from jaxdiff.networks.base import num_params, param_shapes
from jaxdiff.networks.consistency_decoder import ConsistencyDecoder, example_inputs, normalize_latent
from jaxdiff.pretrained.consistency_decoder import CONV_UNET, DIFFUSERS, OPENAI, decoder_entries, import_decoder

LOOP = (
    "c_skip c_out c_in round_trunc_* noises schedule schedule_timesteps fake_out unet_decode_out diffusers_timesteps "
    "diffusers_init_noise_sigma diffusers_decode_out"
).split()
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

    params = import_decoder(hash_weights(golden), decoder, names=CONV_UNET)
    x, t = nhwc(golden.input("unet_x")), jnp.asarray(golden.input("unet_t").astype(np.float32))
    cond = {"latent": nhwc(golden.input("features"))}
    with jax.default_matmul_precision("highest"):
        out = jax.jit(decoder.apply)({"params": params}, x, t, cond)
    golden.compare("unet_out", nchw(out), atol=ATOL)
    for pattern in LOOP:
        golden.leave(pattern, "the decoding loop is a method's")
