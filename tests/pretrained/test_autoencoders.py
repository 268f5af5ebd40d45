"""State dicts of first stages, discriminator, LPIPS and Inception: exact round trips, names, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.networks import autoencoder_kl, autoencoder_vq
from jaxdiff.networks.autoencoder_blocks import example_input
from jaxdiff.networks.autoencoder_kl import AutoencoderKL
from jaxdiff.networks.autoencoder_vq import AutoencoderVQ
from jaxdiff.networks.base import param_shapes
from jaxdiff.networks.inception import Inception
from jaxdiff.networks.lpips import LPIPS, SCALE, SHIFT
from jaxdiff.networks.patch_discriminator import PatchDiscriminator, example_inputs
from jaxdiff.pretrained import autoencoders, files, perceptual

FIELDS = dict(base_channels=8, channel_mult=(1, 2), num_res_blocks=2, norm_groups=4)
AUTOENCODERS = {
    "kl": AutoencoderKL(**FIELDS, attention_factors=(2,), z_channels=3, embed_dim=5),
    "kl_one_level": AutoencoderKL(base_channels=8, channel_mult=(1,), norm_groups=4),
    "vq": AutoencoderVQ(**FIELDS, attention_factors=(1, 2), z_channels=3, embed_dim=4, num_codes=6),
    "vq_noattn": AutoencoderVQ(**FIELDS, mid_attention=False, num_codes=6),
}
CONFIG = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def drawn(shapes):
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda a: generator.standard_normal(a.shape, np.float32).astype(a.dtype), shapes)


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_array_equal(x, y)


def lpips_tree():
    module, image = LPIPS(width=2), jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    return module, drawn(param_shapes(module, image, image))


def inception_tree():
    return drawn(param_shapes(Inception(), jax.ShapeDtypeStruct((1, 75, 75, 3), jnp.float32)))


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoders_round_trip_exactly(name):
    autoencoder = AUTOENCODERS[name]
    params = drawn(param_shapes(autoencoder, example_input(autoencoder)))
    state = autoencoders.export_autoencoder(params, autoencoder)
    restored = autoencoders.import_autoencoder(state, autoencoder)
    assert_trees_equal(restored, params)
    assert_trees_equal(autoencoders.export_autoencoder(restored, autoencoder), state)
    assert sum(tensor.size for tensor in state.values()) == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_discriminators_round_trip_exactly_with_their_statistics(layers):
    discriminator = PatchDiscriminator(base_channels=2, num_layers=layers)
    image, statistics = example_inputs(discriminator)
    params, statistics = drawn((param_shapes(discriminator, image, statistics), statistics))
    statistics = jax.tree.map(lambda a: a if a.ndim else np.asarray(7, np.int32), statistics)
    state = autoencoders.export_patch_discriminator(params, statistics, discriminator)
    assert state["main.3.num_batches_tracked"].dtype == np.int64 and state["main.3.num_batches_tracked"].shape == ()
    assert state[f"main.{3 * layers + 2}.bias"].shape == (1,) and "main.2.bias" not in state
    assert_trees_equal(autoencoders.import_patch_discriminator(state, discriminator), (params, statistics))


def test_lpips_comes_whole_or_in_parts():
    module, params = lpips_tree()
    state = perceptual.export_lpips(params)
    assert len(state) == 31 and state["lin4.model.1.weight"].shape == (1, 16, 1, 1)
    assert_trees_equal(perceptual.import_lpips(state, module), params)
    heads = {name: a for name, a in state.items() if name.startswith("lin")}
    vgg = {"features." + name.split(".")[-2] + "." + name.split(".")[-1]: a for name, a in state.items()
           if name.startswith("net.")}  # fmt: skip
    assert {"features.0.weight", "features.14.bias", "features.28.weight"} <= set(vgg)
    vgg["classifier.6.bias"] = np.zeros(1000)
    assert_trees_equal(perceptual.import_lpips_parts(vgg, heads, module), params)


def test_constants_and_copies_of_lpips_are_checked_and_passed_over():
    module, params = lpips_tree()
    state = perceptual.export_lpips(params)
    package = state | {f"lins.{i}.model.1.weight": state[f"lin{i}.model.1.weight"] for i in range(5)}
    package |= {"scaling_layer.shift": SHIFT.reshape(1, 3, 1, 1), "scaling_layer.scale": SCALE.reshape(1, 3, 1, 1)}
    assert_trees_equal(perceptual.import_lpips(package, module), params)
    with pytest.raises(ValueError, match="scaling_layer.shift of this LPIPS differs from the published one, expected"):
        perceptual.import_lpips(package | {"scaling_layer.shift": np.zeros((1, 3, 1, 1))}, module)
    with pytest.raises(ValueError, match="lins.2.model.1.weight of this LPIPS differs from lin2.model.1.weight"):
        perceptual.import_lpips(package | {"lins.2.model.1.weight": np.zeros((1, 8, 1, 1))}, module)


def test_inception_round_trips_exactly_through_a_file(tmp_path):
    params = inception_tree()
    state = perceptual.export_inception(params)
    assert state["Mixed_6b.branch7x7_2.conv.weight"].shape == (128, 128, 1, 7)
    assert (state["fc.weight"].shape, len(state)) == ((1008, 2048), 94 * 5 + 2)
    counts = {"Mixed_5b.branch1x1.bn.num_batches_tracked": np.zeros((), np.int64)}
    files.write(tmp_path / "inception.safetensors", state | counts)
    restored = perceptual.load_inception(tmp_path / "inception.safetensors")
    assert_trees_equal(restored, params)


def test_a_stable_diffusion_vae_has_the_names_of_its_checkpoint():
    entries = autoencoders.autoencoder_entries(autoencoder_kl.stable_diffusion_vae())
    names = [name for entry in entries for name in entry.names]
    assert len(names) == len(set(names)) == 248
    assert {
        "encoder.conv_in.weight",
        "encoder.down.0.block.1.conv2.bias",
        "encoder.down.2.downsample.conv.weight",
        "encoder.down.1.block.0.nin_shortcut.weight",
        "encoder.mid.attn_1.proj_out.weight",
        "decoder.up.3.upsample.conv.bias",
        "decoder.up.0.block.2.norm2.weight",
        "decoder.up.1.block.0.nin_shortcut.bias",
        "decoder.norm_out.bias",
        "quant_conv.weight",
        "post_quant_conv.bias",
    } <= set(names)


def test_levels_with_attention_have_their_names():
    entries = autoencoders.autoencoder_entries(autoencoder_vq.vq_f16())
    names = {name for entry in entries for name in entry.names if ".attn." in name and name.endswith(".q.weight")}
    encoder = {f"encoder.down.4.attn.{i}.q.weight" for i in range(2)}
    assert names == encoder | {f"decoder.up.4.attn.{i}.q.weight" for i in range(3)}


def test_configurations_become_the_presets():
    assert autoencoders.autoencoder_kl_from_config(CONFIG, embed_dim=4) == autoencoder_kl.kl_f8()
    f16 = {**CONFIG, "ch_mult": [1, 1, 2, 2, 4], "attn_resolutions": [16, 5], "z_channels": 8, "double_z": False}
    vq = autoencoders.autoencoder_vq_from_config(f16, embed_dim=8, n_embed=16384)
    assert vq == autoencoder_vq.vq_f16()
    noattn = autoencoders.autoencoder_vq_from_config({**f16, "attn_type": "none"}, embed_dim=8, n_embed=16384)
    assert noattn == vq.clone(mid_attention=False, attention_factors=())


def test_tensors_that_do_not_fit_are_named():
    autoencoder = AUTOENCODERS["kl"]
    shapes = param_shapes(autoencoder, example_input(autoencoder))
    state = autoencoders.export_autoencoder(drawn(shapes), autoencoder)
    state["decoder.conv_out.weight"] = np.zeros((1, 8, 3, 3), np.float32)
    state["loss.logvar"] = state.pop("quant_conv.bias")
    with pytest.raises(ValueError) as caught:
        autoencoders.import_autoencoder(state, autoencoder)
    message = str(caught.value)
    assert "1 missing (quant_conv.bias)" in message and "1 unexpected (loss.logvar)" in message
    assert "1 wrongly shaped (decoder.conv_out.weight (1, 8, 3, 3), expected (3, 8, 3, 3))" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ch_mul": [1]}, "'ch_mul' is not a setting of the CompVis autoencoder network; did you mean 'ch_mult'"),
        ({"tanh_out": True}, "tanh_out True is not supported in this kind of autoencoder, expected False"),
        ({"double_z": False}, "double_z False is not supported in this kind of autoencoder, expected True"),
        ({"attn_type": "linear"}, "attn_type 'linear' is not supported, expected 'vanilla' or 'none'"),
        ({"resolution": 130}, r"resolution 130 must be divisible by 8 for ch_mult \[1, 2, 4, 4\]"),
    ],
)
def test_settings_that_are_unknown_or_unsupported_are_refused(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        autoencoders.autoencoder_kl_from_config({**CONFIG, **change}, embed_dim=4)
    assert "\n" not in str(caught.value)


def test_missing_settings_are_named():
    config = {key: value for key, value in CONFIG.items() if key not in ("ch", "ch_mult")}
    with pytest.raises(ValueError, match=r"the autoencoder configuration lacks \['ch', 'ch_mult'\]"):
        autoencoders.autoencoder_kl_from_config(config, embed_dim=4)
