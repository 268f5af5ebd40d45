"""State dicts of the releases: exact round trips, names, and refusals that say what is wrong."""

import jax
import numpy as np
import pytest

from jaxdiff.networks.base import init_params
from jaxdiff.networks.unet import UNet, example_inputs
from jaxdiff.networks.unet_presets import stable_diffusion_unet
from jaxdiff.pretrained import compvis, ddpm, openai
from jaxdiff.pretrained.torch_layout import SAME, heads_first

TINY = UNet(base_channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4, attention_factors=(2,), num_heads=2)
TRANSFORMER = TINY.clone(transformer_depth=2, context_dim=6, vector_dim=3)
CASES = {
    "openai": (openai, TINY.clone(num_classes=3), {}),
    "openai_new_order": (openai, TINY.clone(scale_shift_norm=True, num_heads_up=4), {"new_attention_order": True}),
    "openai_resblock": (openai, TINY.clone(resample="resblock"), {}),
    "openai_plain": (openai, TINY.clone(resample="plain", mid_attention=False), {}),
    "openai_low_res": (openai, TINY.clone(low_res_channels=3), {}),
    "compvis": (compvis, TRANSFORMER, {}),
    "compvis_linear": (compvis, TRANSFORMER, {"linear_projection": True}),
    "compvis_attention": (compvis, TINY.clone(head_channels=4, num_heads=None), {}),
    "ddpm": (ddpm, TINY.clone(asymmetric_padding=True), {}),
    "ddpm_plain": (ddpm, TINY.clone(resample="plain"), {}),
}


def drawn(unet):
    params = init_params(unet, jax.random.key(0), *example_inputs(unet))
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda a: generator.standard_normal(a.shape, np.float32), params)


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_exact(name):
    release, unet, layout = CASES[name]
    params = drawn(unet)
    state = release.export_unet(params, unet, **layout)
    restored = release.import_unet(state, unet, **layout)
    jax.tree.map(np.testing.assert_array_equal, restored, params)
    again = release.export_unet(restored, unet, **layout)
    assert again.keys() == state.keys()
    for key, tensor in state.items():
        np.testing.assert_array_equal(again[key], tensor)
    assert sum(tensor.size for tensor in state.values()) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_half_precision_weights_become_float32():
    state = {key: tensor.astype(np.float16) for key, tensor in openai.export_unet(drawn(TINY), TINY).items()}
    params = openai.import_unet(state, TINY)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(params["conv_in"]["bias"], state["input_blocks.0.0.bias"].astype(np.float32))


def test_the_two_attention_orders_permute_the_same_rows():
    rows = np.asarray(["q0", "k0", "v0", "q1", "k1", "v1"])
    ours = heads_first(SAME, 2).to_ours([rows])
    assert ours.tolist() == ["q0", "q1", "k0", "k1", "v0", "v1"]
    assert heads_first(SAME, 2).to_torch(ours)[0].tolist() == rows.tolist()


def test_stable_diffusion_has_the_names_of_its_checkpoint():
    names = [name for e in compvis.unet_entries(stable_diffusion_unet(1), False, False) for name in e.names]
    assert len(names) == len(set(names)) == 686
    assert {
        "time_embed.0.weight",
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "input_blocks.3.0.op.weight",
        "middle_block.1.proj_out.bias",
        "output_blocks.2.1.conv.weight",
        "output_blocks.5.2.conv.weight",
        "output_blocks.11.0.skip_connection.weight",
        "out.2.bias",
    } <= set(names)


@pytest.mark.parametrize("release", [openai, compvis, ddpm])
def test_tensors_that_do_not_fit_are_named(release):
    state = release.export_unet(drawn(TINY), TINY)
    first, second = sorted(state)[:2]
    damaged = {key: tensor for key, tensor in state.items() if key != first} | {"ema.decay": np.zeros(())}
    damaged[second] = np.zeros((1, 1, 1))
    with pytest.raises(ValueError) as caught:
        release.import_unet(damaged, TINY)
    message = str(caught.value)
    assert f"1 missing ({first})" in message and "1 unexpected (ema.decay)" in message
    assert f"1 wrongly shaped ({second} (1, 1, 1), expected {state[second].shape})" in message
    assert "\n" not in message


def test_a_tree_of_another_network_is_refused():
    with pytest.raises(ValueError, match=r"lacks label/embedding and has besides nothing"):
        openai.export_unet(drawn(TINY), TINY.clone(num_classes=3))


def test_names_that_a_release_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"down_1_0 is a transformer, which guided-diffusion does not have"):
        openai.export_unet({}, TRANSFORMER)
    with pytest.raises(ValueError, match="neither resampling residual blocks nor transformers"):
        ddpm.export_unet({}, TINY.clone(resample="resblock"))
    with pytest.raises(ValueError, match="a class table or a vector embedding under one name, not both"):
        compvis.export_unet({}, TRANSFORMER.clone(num_classes=3))


GUIDED = {
    "image_size": 64,
    "model_channels": 32,
    "out_channels": 6,
    "num_res_blocks": 1,
    "attention_resolutions": [2, 16],
    "channel_mult": [1, 2],
}


def test_guided_diffusion_settings():
    unet = openai.unet_from_config({**GUIDED, "num_heads": 2, "num_heads_upsample": 4, "conv_resample": False})
    assert (unet.attention_factors, unet.num_heads, unet.num_heads_up, unet.resample) == ((2,), 2, 4, "plain")
    by_channels = openai.unet_from_config(
        {**GUIDED, "num_heads": 2, "num_heads_upsample": 4, "num_head_channels": 8, "resblock_updown": True},
        super_resolution=True,
    )
    assert (by_channels.num_heads, by_channels.head_channels, by_channels.num_heads_up) == (None, 8, None)
    assert (by_channels.resample, by_channels.low_res_channels) == ("resblock", 3)


def test_compvis_settings():
    transformer = {**GUIDED, "use_spatial_transformer": True, "context_dim": [24], "num_heads": 2}
    unet = compvis.unet_from_config({**transformer, "num_heads_upsample": 4, "transformer_depth": 2})
    assert (unet.context_dim, unet.transformer_depth, unet.num_heads, unet.num_heads_up) == (24, 2, 2, None)
    plain = {**GUIDED, "num_heads": 2, "num_heads_upsample": 4}
    assert compvis.unet_from_config(plain).num_heads_up == 4
    assert compvis.unet_from_config({**plain, "legacy": False}).num_heads_up is None
    vector = compvis.unet_from_config({**plain, "num_classes": "sequential", "adm_in_channels": 7})
    assert (vector.num_classes, vector.vector_dim) == (None, 7)


def test_ddpm_settings():
    config = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 2, "attn_resolutions": [16, 4], "resamp_with_conv": True}
    unet = ddpm.unet_from_config(config, resolution=32)
    assert (unet.attention_factors, unet.norm_eps, unet.sin_first, unet.frequency_shift) == ((2,), 1e-6, True, 1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: openai.unet_from_config({**GUIDED, "num_head": 2}), "'num_head' is not a setting of .*'num_heads'"),
        (
            lambda: openai.unet_from_config({**GUIDED, "dims": 3}),
            "only two-dimensional UNets are supported, got dims 3",
        ),
        (lambda: openai.unet_from_config({"model_channels": 32}), "lacks .*'attention_resolutions'"),
        (lambda: compvis.unet_from_config(GUIDED), "give num_heads or num_head_channels"),
        (lambda: compvis.unet_from_config({**GUIDED, "context_dim": 8}), "context_dim needs use_spatial_transformer"),
        (lambda: compvis.unet_from_config({**GUIDED, "num_heads": 1, "n_embed": 8}), "n_embed .* is not supported"),
        (
            lambda: compvis.unet_from_config({**GUIDED, "num_heads": 1, "num_res_blocks": [1, 2]}),
            "the same num_res_blocks",
        ),
        (
            lambda: compvis.unet_from_config({**GUIDED, "num_heads": 1, "num_classes": "continuous"}),
            "num_classes 'continuous' is not supported",
        ),
        (lambda: ddpm.unet_from_config({"ch": 32, "ch_mul": [1]}, resolution=32), "did you mean 'ch_mult'"),
        (lambda: ddpm.unet_from_config({"ch": 32}, resolution=32), r"lacks \['attn_resolutions', 'ch_mult', 'num_res_"),
    ],
)
def test_settings_that_are_unknown_or_unsupported_are_refused(build, message):
    with pytest.raises(ValueError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)
