"""NCSN++ and DDPM++ of the CIFAR-10 consistency release: outputs, and names and shapes at full size.

Weights come from the file through the importer and go back through the exporter bit for bit. The tolerance is that of
the files' index for outputs of order 1. The file of names holds no configuration: names alone say which of the two
published networks it is.
"""

import jax
import jax.numpy as jnp
import numpy as np
from golden_harness import topic

from jaxdiff.networks.base import num_params, param_shapes
from jaxdiff.networks.ncsnpp import example_inputs
from jaxdiff.networks.ncsnpp_presets import consistency_ncsnpp
from jaxdiff.pretrained import ncsnpp

ATOL = 1e-4


def network(golden):
    names = {"params/": golden.keys("params/*"), "cfg/": golden.keys("cfg/*")}
    state = {key.removeprefix("params/"): golden.input(key) for key in names["params/"]}
    config = {key.removeprefix("cfg/"): golden.input(key).tolist() for key in names["cfg/"]}
    x = jnp.asarray(golden.input("x_nhwc"))
    net = ncsnpp.ncsnpp_from_config(config, image_size=x.shape[1])
    params = ncsnpp.import_ncsnpp(state, net)
    restored = ncsnpp.export_ncsnpp(params, net)
    assert restored.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(restored[name], array, err_msg=name)
    golden.compare("nparams", num_params(params))
    with jax.default_matmul_precision("highest"):
        out = jax.jit(net.apply)({"params": params}, x, jnp.asarray(golden.input("time_cond")), {})
    golden.compare("out", out, atol=ATOL)


topic("consistency/ncsnpp")(network)
topic("consistency/ncsnpp_ddpmpp")(network)


@topic("consistency/ncsnpp_cifar_keys")
def ncsnpp_cifar_keys(golden):
    net = consistency_ncsnpp()
    if not any(key.startswith("GaussianFourier") for key in golden.input("keys")):
        net = net.clone(time_features="positional", taps=None, input_pyramid="none")
    shapes = param_shapes(net, *example_inputs(net))
    blank = jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), shapes)
    state = ncsnpp.export_ncsnpp(blank, net)
    names = sorted(state)
    golden.compare("keys", np.asarray(names))
    golden.compare("shapes", np.asarray([(*state[n].shape, 0, 0, 0, 0)[:4] for n in names]))
    golden.compare("nparams", num_params(shapes))
