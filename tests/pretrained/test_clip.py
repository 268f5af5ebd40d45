"""CLIP's text encoder under the names of transformers and OpenCLIP; ControlNets under those of the original release."""

import jax
import numpy as np
import pytest

from jaxdiff.networks.base import param_shapes
from jaxdiff.networks.clip_text import ClipText, clip_l, exact_gelu, example_ids, open_clip_h
from jaxdiff.networks.controlnet import controlnet_for
from jaxdiff.networks.controlnet import example_inputs as controlnet_inputs
from jaxdiff.networks.unet_presets import stable_diffusion_unet
from jaxdiff.pretrained import clip, compvis, controlnet

TINY = ClipText(vocab_size=12, max_length=6, width=8, num_layers=2, heads=2, projection_dim=5)


def drawn(network, *inputs):
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda a: generator.standard_normal(a.shape, np.float32), param_shapes(network, *inputs))


def test_both_round_trips_are_exact():
    params = drawn(TINY, example_ids(TINY))
    for read, write in (
        (clip.import_text_encoder, clip.export_text_encoder),
        (clip.import_open_clip, clip.export_open_clip),
    ):
        state = write(params, TINY)
        jax.tree.map(np.testing.assert_array_equal, read(state, TINY), params)
        again = write(read(state, TINY), TINY)
        assert again.keys() == state.keys()
        for name, tensor in state.items():
            np.testing.assert_array_equal(again[name], tensor)


def test_open_clip_fuses_what_transformers_keeps_apart():
    params = drawn(TINY, example_ids(TINY))
    apart, fused = clip.export_text_encoder(params, TINY), clip.export_open_clip(params, TINY)
    for kind, name in (("weight", "in_proj_weight"), ("bias", "in_proj_bias")):
        parts = [apart[f"text_model.encoder.layers.1.self_attn.{part}_proj.{kind}"] for part in "qkv"]
        np.testing.assert_array_equal(fused[f"transformer.resblocks.1.attn.{name}"], np.concatenate(parts))
    np.testing.assert_array_equal(fused["text_projection"], apart["text_projection.weight"].T)


def test_names_with_and_without_prefix():
    assert "text_model.final_layer_norm.bias" in clip.export_text_encoder(drawn(TINY, example_ids(TINY)), TINY)
    names = [name for entry in clip.text_encoder_entries(clip_l(), "") for name in entry.names]
    assert len(names) == len(set(names)) == 196
    assert {"embeddings.token_embedding.weight", "encoder.layers.11.mlp.fc2.bias"} <= set(names)


def test_the_text_half_of_a_checkpoint():
    encoder = TINY.clone(projection_dim=None)
    params = drawn(encoder, example_ids(encoder))
    whole = {f"model.{name}": a for name, a in clip.export_open_clip(params, encoder).items()}
    whole |= {"model.transformer.resblocks.2.ln_1.weight": np.zeros(8), "model.text_projection": np.zeros((8, 5))}
    whole |= {"model.logit_scale": np.zeros(()), "model.attn_mask": np.zeros((6, 6)), "unet.conv": np.zeros(1)}
    state = clip.drop_layers(clip.strip(whole, encoder, prefix="model."), encoder)
    jax.tree.map(np.testing.assert_array_equal, clip.import_open_clip(state, encoder), params)
    with pytest.raises(ValueError, match="no tensor starts with 'clip.', got names such as"):
        clip.strip(whole, encoder, prefix="clip.")
    with pytest.raises(ValueError, match="1 unexpected .transformer.resblocks.2.ln_1.weight."):
        clip.import_open_clip(clip.strip(whole, encoder, prefix="model."), encoder)


CONFIG = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "model_type": "clip_text_model",
    "projection_dim": 768,
    "eos_token_id": 2,
}


def test_settings():
    encoder = clip.text_encoder_from_config(CONFIG)
    assert encoder == clip_l().clone(mlp_width=3072, end_token=None)
    second = CONFIG | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "eos_token_id": 49407}
    second |= {"num_attention_heads": 16, "hidden_act": "gelu"}
    assert clip.text_encoder_from_config(second) == open_clip_h().clone(mlp_width=4096)
    assert clip.text_encoder_from_config(second, projection=True).projection_dim == 768
    assert open_clip_h().activation is exact_gelu


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CONFIG | {"hidden": 3}, "'hidden' is not a setting of a CLIP text encoder"),
        ({"vocab_size": 3}, r"lacks \['hidden_size', 'max_position_embeddings', 'num_attention_heads'"),
        (
            CONFIG | {"hidden_act": "relu"},
            r"hidden_act 'relu' is not supported, expected one of",
        ),
    ],
)
def test_settings_that_are_unknown_or_unsupported_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        clip.text_encoder_from_config(config)


TINY_CONTROLNET = {
    "image_size": 8,
    "in_channels": 4,
    "hint_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 1],
    "num_heads": 2,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "context_dim": 8,
}


def test_a_controlnet_goes_both_ways():
    network = controlnet.controlnet_from_config(TINY_CONTROLNET)
    params = drawn(network, *controlnet_inputs(network))
    state = controlnet.export_controlnet(params, network, linear_projection=True)
    assert state["middle_block.1.proj_in.weight"].shape == (32, 32)
    back = controlnet.import_controlnet(state, network, linear_projection=True)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    again = controlnet.export_controlnet(back, network, linear_projection=True)
    assert again.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(again[name], tensor)


def test_a_controlnet_has_the_unets_names_and_its_own():
    unet = stable_diffusion_unet(1)
    names = {name for e in controlnet.controlnet_entries(controlnet_for(unet), False) for name in e.names}
    shared = names & {name for e in compvis.unet_entries(unet, False, False) for name in e.names}
    own = names - shared
    assert not any(name.startswith(("output_blocks", "out.")) for name in names)
    assert len(own) == 2 * (12 + 1 + 8)
    assert {"zero_convs.11.0.weight", "middle_block_out.0.bias", "input_hint_block.14.weight"} <= own


def test_a_controlnet_configuration_needs_its_hint():
    config = {key: value for key, value in TINY_CONTROLNET.items() if key != "hint_channels"}
    with pytest.raises(ValueError, match="lacks 'hint_channels'"):
        controlnet.controlnet_from_config(config)
