"""ControlNet, CLIP's text encoder and the names of diffusers, against the releases.

Weights come from the file through the importers and must go back unchanged. A ControlNet file names the file of the
UNet that it steers, and a keymap file names networks of other topics; those files are looked for beside it, then in
this repository. Tolerance of outputs: 1e-4, as the files' index says. The text encoder's file has transformers' names
without prefix.
"""

import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from golden_core_autoencoders import assert_same, weights
from golden_core_networks import nchw, nhwc
from golden_harness import GoldenFile, topic

from jaxdiff.networks.clip_text import ClipText
from jaxdiff.networks.controlnet import HintEncoder, middle_scales, scale_control
from jaxdiff.networks.unet import UNet, level_channels, unet_plan
from jaxdiff.pretrained import autoencoders, clip, compvis, controlnet, diffusers_layout, openai
from jaxdiff.pretrained.torch_layout import Entry

ATOL = 1e-4
HERE = Path(__file__).parent


def beside(golden, name):
    """The golden file of that name: in the same folder, a folder beside it, or this repository."""
    folder = golden.path.resolve().parent
    places = [folder / name, *sorted(folder.parent.glob(f"*/{name}")), *sorted(HERE.glob(f"*/{name}"))]
    found = next((place for place in places if place.is_file()), None)
    assert found is not None, f"{golden.path.name} needs {name} beside it"
    return GoldenFile(found)


@topic("core/controlnet")
def controlnet_and_unet(golden):
    config = golden.meta["config"]
    linear = config.get("use_linear_in_transformer", False)
    control_net = controlnet.controlnet_from_config({**config, "hint_channels": golden.meta["hint_channels"]})
    state = weights(golden)
    params = controlnet.import_controlnet(state, control_net, linear_projection=linear)
    assert_same(controlnet.export_controlnet(params, control_net, linear_projection=linear), state)

    locked = beside(golden, golden.meta["unet_weights"])
    unet = compvis.unet_from_config(
        {**config, "out_channels": locked.meta.get("out_channels", config["in_channels"]), **locked.meta["config"]}
    )
    unet_params = compvis.import_unet(weights(locked), unet, linear_projection=linear)

    x, hint = nhwc(golden.input("x")), nhwc(golden.input("hint"))
    t = jnp.asarray(golden.input("t").astype(np.float32))
    cond = {"context": jnp.asarray(golden.input("context"))}

    def run(params, unet_params):
        control: Any = control_net.apply({"params": params}, x, t, {**cond, "hint": hint})
        encoder = HintEncoder(level_channels(control_net, 0), control_net.hint_widths)
        # One batch for the four ways to steer: scales of 0 are the UNet alone.
        scales = jnp.asarray([(0.0,) * len(control), (1.0,) * len(control), (0.5,) * len(control),
                              middle_scales(len(control))])  # fmt: skip
        four = [jnp.concatenate([scale_control(control, row)[i] for row in scales]) for i in range(len(control))]
        repeated = {"context": jnp.tile(cond["context"], (4, 1, 1))}
        out: Any = unet.apply(
            {"params": unet_params}, jnp.tile(x, (4, 1, 1, 1)), jnp.tile(t, 4), repeated, control=tuple(four)
        )
        return control, encoder.apply({"params": params["hint"]}, hint), jnp.split(out, 4)

    with jax.default_matmul_precision("highest"):
        control, embedding, outs = jax.jit(run)(params, unet_params)
    for i, residual in enumerate(control):
        golden.compare(f"control/{i}", nchw(residual), atol=ATOL)
    golden.compare("hint_embedding", nchw(embedding), atol=ATOL)
    for name, out in zip(("nocontrol", "control", "control_scale0.5", "only_mid"), outs, strict=True):
        golden.compare(f"out_{name}", nchw(out), atol=ATOL)


@topic("core/controlnet_unet")
def controlnet_unet(golden):
    """Weights alone: they must fit the network and come back unchanged. What they compute is in core/controlnet."""
    config = {"out_channels": golden.meta["out_channels"], **golden.meta["config"]}
    unet = compvis.unet_from_config(config)
    linear = config.get("use_linear_in_transformer", False)
    state = weights(golden)
    params = compvis.import_unet(state, unet, linear_projection=linear)
    restored = compvis.export_unet(params, unet, linear_projection=linear)
    assert restored.keys() == state.keys()
    for name in state:
        golden.compare(f"sd/{name}", restored[name])
    golden.input("x")


@topic("core/clip_text")
def clip_text(golden):
    meta = golden.meta
    encoder = ClipText(
        vocab_size=meta["vocab"],
        max_length=meta["max_pos"],
        width=meta["hidden"],
        num_layers=meta["layers"],
        heads=meta["heads"],
        mlp_width=golden.arrays["sd/encoder.layers.0.mlp.fc1.weight"].shape[0],
        activation=clip.ACTIVATIONS[meta["act"]],
        eps=meta["ln_eps"],
    )
    state = weights(golden)
    params = clip.import_text_encoder(state, encoder, prefix="")
    assert_same(clip.export_text_encoder(params, encoder, prefix=""), state)
    ids = jnp.asarray(golden.input("input_ids").astype(np.int32))
    with jax.default_matmul_precision("highest"):
        features, earlier = jax.jit(lambda p: [encoder.apply({"params": p}, ids, skip=skip) for skip in (0, 1)])(params)
    golden.compare("last_hidden_state", features.tokens, atol=ATOL)
    golden.compare("pooler_output", features.pooled, atol=ATOL)
    golden.compare("hidden_penultimate", features.hidden[-2], atol=ATOL)
    golden.compare("hidden_penultimate_final_ln", earlier.tokens, atol=ATOL)
    for i, hidden in enumerate(features.hidden):
        golden.compare(f"hidden/{i}", hidden, atol=ATOL)


def networks_of(golden, name):
    """(network, entries with original names, entries with diffusers names) for a network of the keymap."""
    meta = beside(golden, f"{name}.npz").meta
    if name.startswith(("ae_kl", "vqmodel")):
        if name.startswith("ae_kl"):
            network = autoencoders.autoencoder_kl_from_config(meta["ddconfig"], embed_dim=meta["embed_dim"])
        else:
            network = autoencoders.autoencoder_vq_from_config(
                meta["ddconfig"], embed_dim=meta["embed_dim"], n_embed=meta["n_embed"]
            )
        return network, autoencoders.autoencoder_entries(network), diffusers_layout.autoencoder_entries(network)
    config = meta["config"]
    linear = config.get("use_linear_in_transformer", False)
    if name.startswith("controlnet"):
        network = controlnet.controlnet_from_config({**config, "hint_channels": meta["hint_channels"]})
        original = controlnet.controlnet_entries(network, linear)
        return network, original, diffusers_layout.controlnet_entries(network, linear)
    release: types.ModuleType = compvis if name.startswith("unet_ldm") else openai
    network, order = release.unet_from_config(config), config.get("use_new_attention_order", False)
    if release is compvis:
        original = compvis.unet_entries(network, linear, order)
    else:
        original = openai.unet_entries(network, openai.attention_entries(order))
    return network, original, diffusers_layout.unet_entries(network, linear)


def heads_at(network, path):
    """Heads of the attention that a parameter belongs to."""
    plan = unet_plan(network) if isinstance(network, UNet) else None
    blocks = () if plan is None else (*plan.down, plan.mid, *plan.up)
    heads = {f"{step.name}_attention": getattr(step, "heads", 0) for step in blocks}
    return heads.get(path.split("/")[0], 1)


def transformed(op, tensor, part, heads):
    """What the file says happens to a tensor; `part` is the index of the diffusers tensor among q, k, v."""
    if op == "copy":
        return tensor
    flat = tensor.reshape(tensor.shape[:2]) if tensor.ndim > 1 else tensor
    if op == "squeeze":
        return flat
    if op == "split_qkv_chunk":
        return np.split(flat, 3)[part]
    assert op == "split_qkv_headmajor", op
    rows = flat.reshape(heads, 3, flat.shape[0] // (3 * heads), *flat.shape[1:])
    return rows[:, part].reshape(flat.shape[0] // 3, *flat.shape[1:])


@topic("core/keymap")
def keymap(golden):
    """One leaf of ours ties the two names together; the two state dicts of one drawn leaf must differ by the op."""
    generator = np.random.default_rng(0)
    for key in golden.keys("*/original"):
        name = key.removesuffix("/original")
        ops = golden.input(f"{name}/op")
        network, original, ours = networks_of(golden, name)
        theirs: dict[str, Entry] = {entry.path: entry for entry in original}
        assert {entry.path for entry in ours} == theirs.keys()
        place = {n: (entry, i) for entry in ours for i, n in enumerate(entry.names)}
        assert sorted(place) == sorted(golden.arrays[f"{name}/diffusers"].tolist())
        found = []
        for diffusers, op in zip(golden.arrays[f"{name}/diffusers"].tolist(), ops.tolist(), strict=True):
            entry, part = place[diffusers]
            source = theirs[entry.path]
            which = part if len(source.names) > 1 else 0
            found.append(source.names[which])
            shape = (12 * heads_at(network, entry.path),) * (1 if entry.path.endswith(("bias", "scale")) else 2)
            if entry.path.endswith("kernel") and source.layout == entry.layout:
                assert op == "copy", diffusers
                continue
            leaf = generator.standard_normal(shape)
            moved = transformed(op, source.layout.to_torch(leaf)[which], part, heads_at(network, entry.path))
            np.testing.assert_array_equal(entry.layout.to_torch(leaf)[part], moved, err_msg=f"{name}: {diffusers}")
        golden.compare(key, np.asarray(found))
        golden.compare(f"{name}/diffusers", np.asarray([d for d in golden.arrays[f"{name}/diffusers"] if d in place]))
