"""What peft keeps apart from the tensors of a LoRA: strengths, and names without the network they belong to."""

import json

import numpy as np
import pytest

from jaxdiff.networks.base import param_shapes
from jaxdiff.networks.clip_text import ClipText, example_ids
from jaxdiff.networks.unet import UNet, example_inputs
from jaxdiff.pretrained import files
from jaxdiff.pretrained.lora import read_for

UNET = UNet(
    base_channels=8, channel_mult=(1,), num_res_blocks=1, attention_factors=(1,), transformer_depth=1, context_dim=6,
    norm_groups=4,
)  # fmt: skip
SHAPES = param_shapes(UNET, *example_inputs(UNET))
TEXT = ClipText(vocab_size=12, max_length=6, width=8, num_layers=1, heads=2)
ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1"
RANK = 4


def pair(module):
    return {f"{module}.lora_A.weight": np.ones((RANK, 8)), f"{module}.lora_B.weight": np.ones((8, RANK))}


def unet_lora(path):
    return read_for(path, UNET, {}, SHAPES)


def alphas(lora):
    """Of the additions to q, k and v, which are kernels of their own or columns of one."""
    return [None if a.alpha is None else float(a.alpha) for path in sorted(lora, reverse=True) for a in lora[path]]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [None, None]),
        ({"lora_alpha": 6}, [6.0, 6.0]),
        ({"lora_alpha": 6, "use_rslora": True}, [12.0, 12.0]),
        ({"lora_alpha": 6, "alpha_pattern": {"to_k": 3}}, [6.0, 3.0]),
        ({"lora_alpha": 6, "alpha_pattern": {f"^{ATTENTION}.to_q": 1.5, "to": 9}}, [1.5, 6.0]),
    ],
)
@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_strengths_come_from_the_settings(settings, expected, prefix, tmp_path):
    state = pair(f"{prefix}{ATTENTION}.to_q") | pair(f"{prefix}{ATTENTION}.to_k")
    named = {prefix + name: value for name, value in settings.items()}
    files.write(tmp_path / "in_the_file", state, {"lora_adapter_metadata": json.dumps(named)} if named else None)
    assert alphas(unet_lora(tmp_path / "in_the_file")) == expected
    (tmp_path / "peft").mkdir()
    files.write(tmp_path / "peft" / "adapter", {f"base_model.model.{name}": a for name, a in state.items()})
    if settings:
        (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(settings))
    assert alphas(unet_lora(tmp_path / "peft" / "adapter")) == expected


def test_a_strength_beside_the_matrices_counts_more(tmp_path):
    state = pair(f"unet.{ATTENTION}.to_q") | {f"unet.{ATTENTION}.to_q.alpha": np.float32(2)}
    files.write(tmp_path / "f", state, {"lora_adapter_metadata": '{"unet.lora_alpha": 6}'})
    assert alphas(unet_lora(tmp_path / "f")) == [2.0]


@pytest.mark.parametrize("inner", ["text_model.", ""])
def test_text_encoders_with_and_without_their_inner_name(inner, tmp_path):
    files.write(tmp_path / "f", pair(f"text_encoder.{inner}encoder.layers.0.self_attn.v_proj"))
    lora = read_for(tmp_path / "f", TEXT, {}, param_shapes(TEXT, example_ids(TEXT)))
    assert alphas(lora) == [None] and list(lora) == ["layer_0/qkv/kernel"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "has lora_adapter_metadata that are no JSON object; save the LoRA again"),
        ('{"lora_alpha": "6"}', "its lora_alpha '6' or alpha_pattern is no number; save the LoRA again"),
        ('{"lora_alpha": 6, "alpha_pattern": {"(a+)+": 1}}', r"its alpha_pattern has '\(a\+\)\+', expected names"),
        ('{"lora_alpha": 6, "alpha_pattern": [1]}', "its lora_alpha 6 or alpha_pattern is no number"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_refused(text, message, tmp_path):
    files.write(tmp_path / "f", pair(f"{ATTENTION}.to_q"), {"lora_adapter_metadata": text})
    with pytest.raises(ValueError, match=message) as caught:
        unet_lora(tmp_path / "f")
    assert "\n" not in str(caught.value)


def test_a_lora_of_the_other_network_is_refused(tmp_path):
    files.write(tmp_path / "f", pair("text_encoder.encoder.layers.0.self_attn.v_proj"))
    with pytest.raises(ValueError, match="holds no LoRA of a UNet, got names such as .* give another --base"):
        unet_lora(tmp_path / "f")
