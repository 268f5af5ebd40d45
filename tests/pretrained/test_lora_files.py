"""LoRA files: every convention reads to the same additions, goes back unchanged, and adds alpha / r up down."""

import jax
import numpy as np
import pytest

from jaxdiff.networks.base import param_shapes
from jaxdiff.networks.clip_text import ClipText, example_ids
from jaxdiff.networks.lora import LowRank, merge
from jaxdiff.networks.unet import UNet, example_inputs
from jaxdiff.pretrained import clip, diffusers_layout
from jaxdiff.pretrained.lora import KOHYA_TEXT, KOHYA_UNET, PEFT_TEXT, PEFT_UNET, export_lora, import_lora, part

UNET = UNet(
    base_channels=8,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_factors=(1,),
    transformer_depth=1,
    context_dim=6,
    norm_groups=4,
)
TEXT = ClipText(vocab_size=12, max_length=6, width=8, num_layers=1, heads=2)
ATTN = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
RANK = 2


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def drawn(network, *inputs):
    return jax.tree.map(lambda a: normal(*a.shape), param_shapes(network, *inputs))


# Module -> (down, up) in the release's layout: a dense layer, one kept as a convolution, a convolution.
UNET_PAIRS = {
    ATTN: (normal(RANK, 6), normal(8, RANK)),
    "mid_block.attentions.0.proj_in": (normal(RANK, 8, 1, 1), normal(8, RANK, 1, 1)),
    "up_blocks.0.resnets.0.conv1": (normal(RANK, 16, 3, 3), normal(8, RANK, 1, 1)),
}
TEXT_PAIRS = {f"text_model.encoder.layers.0.self_attn.{p}_proj": (normal(RANK, 8), normal(8, RANK)) for p in "qv"}


def kohya(prefix, pairs):
    state = {}
    for module, (down, up) in pairs.items():
        base = prefix + module.replace(".", "_")
        state |= {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up, f"{base}.alpha": np.float32(0.5)}
    return state


def peft(prefix, pairs):
    ends = (".lora_A.weight", ".lora_B.weight")
    return {prefix + module + end: a for module, pair in pairs.items() for end, a in zip(ends, pair, strict=True)}


def networks():
    unet, text = param_shapes(UNET, *example_inputs(UNET)), param_shapes(TEXT, example_ids(TEXT))
    return (diffusers_layout.unet_entries(UNET), unet), (clip.text_encoder_entries(TEXT), text)


@pytest.mark.parametrize(
    ("write", "unet_names", "text_names", "scale"),
    [(kohya, KOHYA_UNET, KOHYA_TEXT, 0.5 / RANK), (peft, PEFT_UNET, PEFT_TEXT, 1.0)],
)
def test_a_file_goes_both_ways_and_adds_its_products(write, unet_names, text_names, scale):
    state = write(unet_names.prefix, UNET_PAIRS) | write(text_names.prefix, TEXT_PAIRS)
    restored = {}
    for (entries, shapes), names, pairs in zip(
        networks(), (unet_names, text_names), (UNET_PAIRS, TEXT_PAIRS), strict=True
    ):
        lora = import_lora(part(state, names), entries, shapes, names)
        restored |= export_lora(lora, entries, shapes, names)
        params = jax.tree.map(lambda a: normal(*a.shape), shapes)
        merged = merge(params, lora)
        for entry in entries:
            before, after = (_leaf(tree, entry.path) for tree in (params, merged))
            tensors = zip(
                entry.names, entry.layout.to_torch(before), entry.layout.to_torch(np.asarray(after)), strict=True
            )
            for name, old, new in tensors:
                down, up = pairs.get(name.removesuffix(".weight"), (None, None))
                if down is None:
                    np.testing.assert_array_equal(new, old, err_msg=name)
                else:
                    product = (up.reshape(len(up), RANK) @ down.reshape(RANK, -1)).reshape(old.shape)
                    np.testing.assert_allclose(new, old + scale * product, atol=1e-5, err_msg=name)
    assert restored.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(restored[name], tensor)


def _leaf(tree, path):
    for name in path.split("/"):
        tree = tree[name]
    return np.asarray(tree)


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (f"unet.{ATTN.replace('.to_k', '.processor.to_k_lora')}.down.weight", None),
        (f"unet.{ATTN}.lora_linear_layer.down.weight", None),
        (f"unet.{ATTN}.lora.down.weight", None),
        (f"unet.{ATTN}.lora_A.default.weight", f"unet.{ATTN}.lora_B.default.weight"),
    ],
)
def test_old_names_are_understood(down, up):
    pair = UNET_PAIRS[ATTN]
    state = {down: pair[0], up or down.replace("down.weight", "up.weight"): pair[1]}
    assert part(state, PEFT_UNET).keys() == peft("unet.", {ATTN: pair}).keys()


def test_what_does_not_fit_is_named():
    (entries, shapes), _ = networks()
    state = kohya("lora_unet_", UNET_PAIRS)
    base = "lora_unet_" + ATTN.replace(".", "_")
    broken = {name: a for name, a in state.items() if name != f"{base}.lora_up.weight"}
    broken["lora_unet_conv_out.hada_w1_a"] = normal(2, 2)
    broken["lora_unet_up_blocks_0_resnets_0_conv1.lora_down.weight"] = normal(RANK, 3, 3, 3)
    with pytest.raises(ValueError) as caught:
        import_lora(broken, entries, shapes, KOHYA_UNET)
    message = str(caught.value)
    assert "\n" not in message and "1 unexpected (lora_unet_conv_out.hada_w1_a)" in message
    assert f"{base}.lora_down.weight lacks its other half" in message
    assert "is (2, 3, 3, 3) and (8, 2, 1, 1), expected (2, 16, 3, 3) and (8, 2, 1, 1)" in message
    with pytest.raises(ValueError, match="no name starts with 'lora_unet_'"):
        import_lora({}, entries, shapes, KOHYA_UNET)


def test_one_addition_to_q_k_and_v_is_written_as_three():
    _, (entries, shapes) = networks()
    lora = {"layer_0/qkv/kernel": (LowRank(normal(8, 1), normal(1, 24)),)}
    state = export_lora(lora, entries, shapes, PEFT_TEXT)
    assert len(state) == 6
    params = jax.tree.map(lambda a: normal(*a.shape), shapes)
    split = merge(params, import_lora(state, entries, shapes, PEFT_TEXT))
    np.testing.assert_allclose(
        _leaf(split, "layer_0/qkv/kernel"), _leaf(merge(params, lora), "layer_0/qkv/kernel"), atol=1e-6
    )


def test_additions_without_a_name_are_refused():
    _, (entries, shapes) = networks()
    with pytest.raises(ValueError, match="addition to 12 columns of layer_0/qkv/kernel from 0 cuts a tensor of 8"):
        export_lora({"layer_0/qkv/kernel": (LowRank(normal(8, 1), normal(1, 12)),)}, entries, shapes, PEFT_TEXT)
    with pytest.raises(ValueError, match="other/kernel has no name in this release"):
        export_lora({"other/kernel": (LowRank(normal(8, 1), normal(1, 8)),)}, entries, shapes, PEFT_TEXT)
