"""UNets of consistency models and of progressive distillation, against their releases.

Weights come from the file, or from the hash that the files' index describes; the names of the published sizes are
compared without allocating them. Tolerance: 1e-4 on outputs of order 1 (the index suggests 2e-4).
"""

import jax
import jax.numpy as jnp
import numpy as np
from golden_core_networks import ATOL, nchw, nhwc, weights
from golden_harness import topic

from jaxdiff.networks.base import num_params, param_shapes
from jaxdiff.networks.layers import sinusoidal_embedding
from jaxdiff.networks.unet import example_inputs
from jaxdiff.networks.unet_presets import consistency_unet
from jaxdiff.pretrained import openai, progdist

SIGMA_DATA, SIGMA_MIN = 0.5, 0.002  # of the release; the files do not say


def configuration(golden):
    """The constructor's arguments, stored as arrays."""
    return {key.removeprefix("cfg/"): golden.input(key).tolist() for key in golden.keys("cfg/*")}


def sizes(golden):
    """Shapes by name, from the file's list of names and its zero-padded shapes."""
    shapes = [tuple(int(n) for n in shape if n) for shape in golden.arrays["shapes"]]
    return dict(zip(golden.arrays["keys"].tolist(), shapes, strict=True))


def hash_weights(golden):
    """The weights of the files that hold none, by the recipe of their index."""
    state = {}
    for j, (name, shape) in enumerate(sizes(golden).items()):
        i = np.arange(np.prod(shape), dtype=np.uint32)
        h = np.uint32(2654435761) * i + np.uint32((40503 * j + 12345) % 2**32)
        h = (h ^ (h >> np.uint32(15))) * np.uint32(2246822519)
        h = (h ^ (h >> np.uint32(13))) * np.uint32(3266489917)
        u = (h ^ (h >> np.uint32(16))).astype(np.float64) / 2**32 - 0.5
        if golden.arrays["is_norm_scale"][j]:
            values = 1 + 0.4 * u
        else:
            values = 0.2 * u if len(shape) == 1 else u * np.sqrt(12 / np.prod(shape[1:]))
        state[name] = values.astype(np.float32).reshape(shape)
    for key in ("keys", "shapes", "is_norm_scale"):
        golden.inputs.add(key)
    return state


def tensors(entries, shapes):
    """Shape of every tensor of a state dict by its name, from the shapes of our leaves; nothing is allocated."""
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    assert sorted(entry.path for entry in entries) == sorted(flat)
    found = {}
    for entry in entries:
        made = entry.layout.to_torch(np.broadcast_to(np.float32(0), flat[entry.path]))
        found |= {name: tensor.shape for name, tensor in zip(entry.names, made, strict=True)}
    return found


def compare_names(golden, key, names):
    """Compares sets of names; the order is that of a constructor, which no file depends on."""
    order = np.argsort(golden.arrays[key])
    assert len(names) == len(order), f"{key}: {len(names)} names, the release has {len(order)}"
    ours = np.empty_like(golden.arrays[key])
    ours[order] = np.sort(np.asarray(list(names)))
    golden.compare(key, ours)


def compare_shapes(golden, found):
    padded = [(*found[name], *(0,) * 4)[:4] for name in golden.arrays["keys"].tolist()]
    golden.compare("shapes", np.asarray(padded))


def check_consistency(golden, state):
    unet = openai.unet_from_config(configuration(golden))
    params = jax.tree.map(jnp.asarray, openai.import_consistency_unet(state, unet))
    restored = openai.export_consistency_unet(params, unet)
    assert restored.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(restored[name], tensor, err_msg=name)
    cond = {"label": jnp.asarray(golden.input("y").astype(np.int32))} if "y" in golden.arrays else {}
    x, t = nhwc(golden.input("x")), jnp.asarray(golden.input("t"))
    apply = jax.jit(lambda x: unet.apply({"params": params}, x, t, cond))
    with jax.default_matmul_precision("highest"):
        golden.compare("out", nchw(apply(x)), atol=ATOL)
        if "sigmas" not in golden.arrays:
            return
        sigma = jnp.asarray(golden.input("sigmas"))
        golden.compare("t", 250 * jnp.log(sigma), rtol=1e-5)
        expanded = sigma[:, None, None, None]
        root = jnp.sqrt(expanded**2 + SIGMA_DATA**2)
        x_t = x * expanded
        skip = SIGMA_DATA**2 / ((expanded - SIGMA_MIN) ** 2 + SIGMA_DATA**2)
        denoised = skip * x_t + (expanded - SIGMA_MIN) * SIGMA_DATA / root * apply(x_t / root)
    golden.compare("cm_denoised", nchw(denoised), atol=ATOL)
    golden.compare("nparams", num_params(params))
    # t reaches 1000, where a frequency's last bit is 1e-4 of the angle.
    embedding = sinusoidal_embedding(t, golden.arrays["timestep_embedding"].shape[-1])
    golden.compare("timestep_embedding", embedding, atol=ATOL)


for name in ("unet_imagenet", "unet_lsun"):
    topic(f"consistency/{name}")(lambda golden: check_consistency(golden, weights(golden)))


@topic("consistency/unet_hash")
def unet_hash(golden):
    state = hash_weights(golden)
    golden.compare("first_weights", [tensor.flat[0] for tensor in state.values()])
    golden.compare("last_weights", [tensor.flat[-1] for tensor in state.values()])
    check_consistency(golden, state)


@topic("consistency/statedict_keys")
def statedict_keys(golden):
    classes = "label_emb.weight" in golden.arrays["keys"]
    unet = consistency_unet(64, num_classes=1000) if classes else consistency_unet(256)
    shapes = param_shapes(unet, *example_inputs(unet))
    found = tensors(openai.unet_entries(unet, openai.attention_entries(True, 2)), shapes)
    compare_names(golden, "keys", found)
    compare_shapes(golden, found)
    golden.compare("nparams", num_params(shapes))


@topic("consistency/progdist_unet")
def progdist_unet(golden):
    config = configuration(golden)
    x = jnp.asarray(golden.input("x_nhwc"))
    unet = progdist.unet_from_config(config, resolution=x.shape[1])
    state = {key.removeprefix("params/"): golden.input(key) for key in golden.keys("params/*")}
    params = progdist.import_unet(state, unet)
    restored = progdist.export_unet(params, unet)
    assert restored.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(restored[name], array, err_msg=name)
    t = progdist.time_input(config["logsnr_input_type"])(jnp.asarray(golden.input("logsnr")))
    label = jnp.asarray(golden.input("y").astype(np.int32))
    cond = {"label": label} if unet.num_classes is not None else {}
    with jax.default_matmul_precision("highest"):
        out = jax.jit(unet.apply)({"params": params}, x, t, cond)
    golden.compare("out", out, atol=ATOL)
