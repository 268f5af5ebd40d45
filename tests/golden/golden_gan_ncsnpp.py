"""DDGAN's generator and the FIR resampling under it: outputs, every module's activation, gradients of the input.

Weights come from the file through the importer and go back through the exporter bit for bit. Tolerances: 1e-4 on
activations of order 1, and 1e-3 of the largest entry on gradients, those of the files' index.
"""

import ast

import jax
import jax.numpy as jnp
import numpy as np
from golden_harness import topic

from jaxdiff.networks import fir
from jaxdiff.networks.base import num_params
from jaxdiff.networks.layers import downsample_mean, sinusoidal_embedding, upsample_nearest
from jaxdiff.pretrained import ddgan

ATOL = 1e-4


def nhwc(array):
    return jnp.asarray(np.moveaxis(array, 1, -1))


def nchw(array):
    return np.moveaxis(np.asarray(array), -1, 1)


def generator(golden):
    golden.leave("module_types", "names of classes")
    net = ddgan.generator_from_config(ast.literal_eval(str(golden.input("config_json"))))
    state = {key.removeprefix("sd/"): golden.input(key) for key in golden.keys("sd/*")}
    params = ddgan.import_generator(state, net)
    restored = ddgan.export_generator(params, net)
    assert restored.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(restored[name], tensor, err_msg=name)
    golden.compare("n_params", num_params(params))

    t, cond = jnp.asarray(golden.input("t").astype(np.float32)), {"z": jnp.asarray(golden.input("z"))}
    shape = golden.arrays["y"].shape
    weights = nhwc(np.linspace(-1, 1, golden.arrays["y"].size, dtype=np.float32).reshape(shape))

    def scalar(x, p):
        y, features = net.apply({"params": p}, x, t, cond, return_features=True)
        return jnp.sum(y * weights), (y, features)

    with jax.default_matmul_precision("highest"):
        grad, (y, features) = jax.jit(jax.grad(scalar, has_aux=True))(nhwc(golden.input("x")), params)
    golden.compare("y", nchw(y), atol=ATOL)
    golden.compare("grad_x", nchw(grad), atol=1e-3 * np.abs(golden.arrays["grad_x"]).max())
    golden.compare("zemb", features["z"], atol=ATOL)
    golden.compare("temb_sin", features["time_features"], atol=ATOL)
    if "temb" in golden.arrays:
        golden.compare("temb", features["time_out"], atol=ATOL)
    numbered = ddgan.modules(net)
    for key in golden.keys("act_*"):
        value = features[numbered[int(key.split("_")[1])].name]
        golden.compare(key, nchw(value) if value.ndim == 4 else value, atol=ATOL)


for name in ("ncsnpp", "ncsnpp_oneadagn", "ncsnpp_skips"):
    topic(f"gan/{name}")(generator)


@topic("gan/upfirdn")
def upfirdn(golden):
    x, taps = nhwc(golden.input("x")), tuple(golden.input("k").tolist())
    kernel = jnp.asarray(golden.input("w").transpose(2, 3, 1, 0))
    unit = fir.normalized(taps)
    golden.compare("setup_kernel", np.outer(unit, unit), atol=1e-6)
    results = {
        "up": fir.upsample_fir(x, taps),
        "up_gain3": fir.upsample_fir(x, taps, gain=3.0),
        "down": fir.downsample_fir(x, taps),
        "conv_down": fir.downsample_conv(x, kernel, taps),
        "naive_up": upsample_nearest(x),
        "naive_down": downsample_mean(x),
        "raw_up2_down3_pad21": fir.upfirdn(x, unit, up=2, down=3, pad=(2, 1)),
        "raw_up1_down1_padm1_2": fir.upfirdn(x, unit, pad=(-1, 2)),
    }
    for key, value in results.items():
        golden.compare(key, nchw(value), atol=1e-5)
    t = jnp.asarray(golden.input("temb_t").astype(np.float32))
    for key in golden.keys("temb_dim*"):
        width = golden.arrays[key].shape[1]
        golden.compare(key, sinusoidal_embedding(t, width, sin_first=True, frequency_shift=1), atol=ATOL)
