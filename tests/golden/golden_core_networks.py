"""UNets: outputs, activations and gradients against guided-diffusion, CompVis and the DDPM conversion.

Weights come from the file through the importers, gradients go back through the exporters, so a norm is compared under
the name of the released tensor. Tolerances are those of the files' index: 1e-4 on outputs, 1e-3 of a gradient norm.
A bias before a group norm of one channel a group has gradient zero in exact arithmetic; the files hold rounding noise
there (below 1e-6 of the largest norm, where every other norm is above 1e-3 of it). So norms also have a floor, 1e-6 of
the largest.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from golden_harness import topic

from jaxdiff.networks.layers import sinusoidal_embedding
from jaxdiff.pretrained import compvis, ddpm, openai

ATOL = 1e-4
GRADNORM_RTOL = 1e-3
GRADNORM_FLOOR = 1e-6


def nhwc(array):
    return jnp.asarray(np.moveaxis(array, 1, -1))


def nchw(array):
    return np.moveaxis(np.asarray(array), -1, 1)


def weights(golden):
    return {key.removeprefix("sd/"): golden.input(key) for key in golden.keys("sd/*")}


def conditioning(golden):
    cond = {}
    if "y" in golden.arrays:
        cond["label"] = jnp.asarray(golden.input("y").astype(np.int32))
    if "context" in golden.arrays:
        cond["context"] = jnp.asarray(golden.input("context"))
    if "low_res" in golden.arrays:
        cond["low_res"] = nhwc(golden.input("low_res"))
    return cond


def check(golden, unet, import_unet, export_unet):
    """Compares out, and act/*, grad/loss, gradnorm/* where the file has them."""
    state = weights(golden)
    params = import_unet(state, unet)
    restored = export_unet(params, unet)
    assert restored.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(restored[name], tensor, err_msg=name)

    x, t, cond = nhwc(golden.input("x")), jnp.asarray(golden.input("t").astype(np.float32)), conditioning(golden)

    def loss(p):
        out, features = unet.apply({"params": p}, x, t, cond, return_features=True)
        return jnp.mean(out**2), (out, features)

    with jax.default_matmul_precision("highest"):
        if golden.keys("grad*"):
            (value, (out, features)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
            golden.compare("grad/loss", value, atol=ATOL)
            floor = GRADNORM_FLOOR * max(float(golden.arrays[key]) for key in golden.keys("gradnorm/*"))
            for name, gradient in export_unet(grads, unet).items():
                norm = np.linalg.norm(gradient.ravel())
                golden.compare(f"gradnorm/{name}", norm, rtol=GRADNORM_RTOL, atol=floor)
        else:
            _, (out, features) = jax.jit(loss)(params)
    golden.compare("out", nchw(out), atol=ATOL)
    names = openai.feature_names(unet)
    for key in golden.keys("act/*"):
        golden.compare(key, nchw(features[names[key.removeprefix("act/")]]), atol=ATOL)


def guided_diffusion(golden):
    config = golden.meta["config"]
    order = {"new_attention_order": config.get("use_new_attention_order", False)}
    unet = openai.unet_from_config(config, super_resolution=golden.meta["cls"] == "SuperResModel")
    check(
        golden,
        unet,
        functools.partial(openai.import_unet, **order),
        functools.partial(openai.export_unet, **order),
    )


def latent_diffusion(golden):
    config = golden.meta["config"]
    layout = {
        "new_attention_order": config.get("use_new_attention_order", False),
        "linear_projection": config.get("use_linear_in_transformer", False),
    }
    check(
        golden,
        compvis.unet_from_config(config),
        functools.partial(compvis.import_unet, **layout),
        functools.partial(compvis.export_unet, **layout),
    )


for name in (
    "unet_iddpm_plain",
    "unet_adm_classcond",
    "unet_adm_updown_legacy",
    "unet_adm_updown_neworder",
    "unet_superres",
):
    topic(f"core/{name}")(guided_diffusion)
for name in ("unet_ldm_uncond", "unet_ldm_xattn"):
    topic(f"core/{name}")(latent_diffusion)


@topic("core/unet_ddpm")
def unet_ddpm(golden):
    unet = ddpm.unet_from_config(golden.meta["config"], resolution=golden.meta["resolution"])
    t = jnp.asarray(golden.input("t").astype(np.float32))
    width = golden.arrays["temb"].shape[-1]
    golden.compare("temb", sinusoidal_embedding(t, width, sin_first=True, frequency_shift=1), atol=ATOL)
    check(golden, unet, ddpm.import_unet, ddpm.export_unet)
