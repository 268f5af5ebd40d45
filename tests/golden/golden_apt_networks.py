"""DiT of facebookresearch, and the heads of APT's discriminator by the layout that the file defines."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from golden_core_networks import nchw, nhwc, weights
from golden_harness import topic

from jaxdiff.guidance import guided
from jaxdiff.networks.base import param_shapes
from jaxdiff.networks.dit import grid_positions
from jaxdiff.networks.layers import sinusoidal_embedding
from jaxdiff.networks.unet_discriminator import FeatureHeads
from jaxdiff.pretrained.dit import dit_from_config, export_dit, import_dit
from jaxdiff.pretrained.torch_layout import LINEAR, SAME, Entry, import_params, layer, norm

ATOL = 1e-4
GUIDED_CHANNELS = 3  # the release guides the first three channels alone, whatever their number


@topic("apt/dit")
def dit(golden):
    config = json.loads(str(golden.input("cfg")))
    config.pop("source")
    net, state = dit_from_config(config), weights(golden)

    def run(net, params, prefix):
        x, t = nhwc(golden.input(f"{prefix}/x")), jnp.asarray(golden.input(f"{prefix}/t"))
        label = jnp.asarray(golden.input(f"{prefix}/y").astype(np.int32))
        return jax.jit(lambda p, x: net.apply({"params": p}, x, t, {"label": label}, return_features=True))(params, x)

    for module in (net, net.clone(scan=True)):
        params = import_dit(state, module)
        restored = export_dit(params, module)
        assert restored.keys() == state.keys()
        for name, tensor in state.items():
            np.testing.assert_array_equal(restored[name], tensor, err_msg=name)
        out, features = run(module, params, "in")
        golden.compare("out/eps", nchw(out), atol=ATOL)
        golden.compare("mid/c", features["condition"], atol=ATOL)
        golden.compare("mid/tokens0", features["tokens"], atol=ATOL)
        golden.compare("mid/block0", features["block_0"], atol=ATOL)
    golden.compare("mid/t_sinusoid", sinusoidal_embedding(jnp.asarray(golden.input("in/t")), 256), atol=ATOL)
    golden.compare("ref/pos_embed_1152_g16_rows", grid_positions(16, 16, 1152)[[0, 1, 17, 255]])

    if golden.keys("cfgcase/*"):
        # The release repeats the first half of x for both halves of the labels.
        x = golden.input("cfgcase/x")
        golden.arrays["cfgcase/x"] = np.concatenate([x[: len(x) // 2]] * 2)
        out = run(net, import_dit(state, net), "cfgcase")[0]
        cond, uncond = jnp.split(out[..., :GUIDED_CHANNELS], 2)
        half = guided(uncond, cond, float(golden.input("cfgcase/scale")))
        out = jnp.concatenate([jnp.concatenate([half, half]), out[..., GUIDED_CHANNELS:]], axis=-1)
        golden.compare("cfgcase/out", nchw(out), atol=ATOL)


@topic("apt/apt_head")
def apt_head(golden):
    config = json.loads(str(golden.input("cfg")))
    net = FeatureHeads(config["heads"])
    taps = [jnp.asarray(golden.input(f"in/tap{i}")) for i in range(config["taps"])]
    entries = [*norm("norm", "norm"), *layer("logit", "out", LINEAR)]
    for i in range(config["taps"]):
        ours, theirs = f"head_{i}", f"heads.{i}"
        entries.append(Entry(f"{ours}/query", (f"{theirs}.query",), SAME))
        entries += [Entry(f"{ours}/{part}/kernel", (f"{theirs}.{part}.weight",), LINEAR) for part in "qkv"]
        norms = {"norm_tokens": "norm_kv", "norm_q": "q_norm", "norm_k": "k_norm", "norm_mlp": "norm_mlp"}
        entries += [Entry(f"{ours}/{a}/scale", (f"{theirs}.{b}.weight",), SAME) for a, b in norms.items()]
        for a, b in {"out": "o", "mlp_in": "fc1", "mlp_out": "fc2"}.items():
            entries += layer(f"{ours}/{a}", f"{theirs}.{b}", LINEAR)
    params = import_params(entries, weights(golden), param_shapes(net, taps))
    run = jax.jit(lambda params, mask: net.apply({"params": params}, taps, mask))
    golden.compare("out/logit", run(params, None), atol=ATOL)
    golden.compare("out/logit_masked", run(params, jnp.asarray(golden.input("in/mask"))), atol=ATOL)
