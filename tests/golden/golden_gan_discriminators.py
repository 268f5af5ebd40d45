"""DDGAN's discriminators: activations, logits, input gradient, R1 and its gradient in the parameters.

Weights and gradients go through importer and exporter, so they are compared under their released names. Gradients span
many orders of magnitude between files: each array is held to 3e-4 of its largest value. The last bias of the last block
does not move R1 in exact arithmetic; the files hold rounding noise there. So gradients also have a floor, 1e-6 of the
largest norm.
"""

import jax
import jax.numpy as jnp
import numpy as np
from golden_core_networks import nchw, nhwc, weights
from golden_harness import topic

from jaxdiff.networks.ddgan_discriminators import ddgan_large_discriminator, ddgan_small_discriminator
from jaxdiff.pretrained.ddgan_discriminators import export_discriminator, import_discriminator

ATOL = 1e-4
GRADIENT_SHARE = 3e-4
GRADIENT_FLOOR = 1e-6


def check(golden, preset):
    base_channels, time_features, batch, size = golden.input("config").tolist()
    net = preset.clone(base_channels=base_channels, time_features=time_features)
    state = weights(golden)
    params = import_discriminator(state, net)
    restored = export_discriminator(params, net)
    golden.compare("param_names", np.asarray(list(restored)))
    for name, tensor in state.items():
        np.testing.assert_array_equal(restored[name], tensor, err_msg=name)

    x, cond = nhwc(golden.input("x")), {"x_t": nhwc(golden.input("x_t"))}
    t = jnp.asarray(golden.input("t").astype(np.float32))
    assert x.shape[:2] == (batch, size)

    def r1(params):
        def total(x):
            logits, features = net.apply({"params": params}, x, t, cond, return_features=True)
            return logits.sum(), (logits, features)

        slope, seen = jax.grad(total, has_aux=True)(x)
        return jnp.square(slope).sum((1, 2, 3)).mean(), (slope, *seen)

    with jax.default_matmul_precision("highest"):
        (penalty, (slope, logits, features)), gradient = jax.jit(jax.value_and_grad(r1, has_aux=True))(params)

    def against_largest(key, value, floor=0.0):
        golden.compare(key, value, atol=floor + GRADIENT_SHARE * float(np.abs(golden.arrays[key]).max()))

    golden.compare("logits", logits[:, None], atol=ATOL)
    against_largest("grad_x", nchw(slope))
    against_largest("r1_mean_sqnorm", penalty)
    gradient = export_discriminator(gradient, net)
    floor = GRADIENT_FLOOR * float(golden.arrays["grad_r1_norms_all"].max())
    for key in golden.keys("grad_r1/*"):
        against_largest(key, gradient[key.removeprefix("grad_r1/")], floor)
    norms = [np.linalg.norm(gradient[name].ravel()) for name in golden.arrays["param_names"].tolist()]
    against_largest("grad_r1_norms_all", np.asarray(norms))
    golden.compare("act_t_embed", features["time"], atol=ATOL)
    golden.compare("act_final_conv", nchw(features["conv_out"]), atol=ATOL)
    for key in golden.keys("act_conv*"):
        golden.compare(key, nchw(features[f"block_{int(key.removeprefix('act_conv')) - 1}"]), atol=ATOL)


@topic("gan/disc_small")
def disc_small(golden):
    check(golden, ddgan_small_discriminator())


@topic("gan/disc_large")
def disc_large(golden):
    check(golden, ddgan_large_discriminator())
