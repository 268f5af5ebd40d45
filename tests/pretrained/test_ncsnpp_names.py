"""NCSN++ under the names of its three releases: exact round trips, refusals, and numbers of the released SongUNet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.networks.base import param_shapes
from jaxdiff.networks.ncsnpp import NCSNpp, example_inputs
from jaxdiff.networks.ncsnpp_presets import consistency_ncsnpp, ddgan_generator, edm_ddpmpp
from jaxdiff.pretrained import ddgan, edm, ncsnpp
from jaxdiff.pretrained.families import guess

TAPS = (1.0, 3.0, 3.0, 1.0)
TINY = NCSNpp(base_channels=8, channel_mult=(1, 2), num_res_blocks=1)
EVERYTHING = TINY.clone(taps=TAPS, input_pyramid="residual", output_pyramid="residual", resample="conv")
LABELLED = TINY.clone(num_classes=3, augment_dim=2)
CASES = {
    "flax": (ncsnpp.import_ncsnpp, ncsnpp.export_ncsnpp, TINY.clone(time_features="fourier"), {}),
    "flax_ddpm_blocks": (ncsnpp.import_ncsnpp, ncsnpp.export_ncsnpp, TINY.clone(resample="conv"), {}),
    "flax_pyramids": (ncsnpp.import_ncsnpp, ncsnpp.export_ncsnpp, EVERYTHING, {"prefix": "params_ema/"}),
    "ddgan": (ddgan.import_generator, ddgan.export_generator, TINY.clone(z_dim=4, z_features=8), {}),
    "ddgan_one": (
        ddgan.import_generator,
        ddgan.export_generator,
        EVERYTHING.clone(z_dim=4, z_features=8, adaptive_norms=1, input_pyramid="skip"),
        {"prefix": "module."},
    ),
    "edm": (edm.import_song_unet, edm.export_song_unet, LABELLED, {"image_size": 16}),
    "edm_pyramids": (
        edm.import_song_unet,
        edm.export_song_unet,
        TINY.clone(taps=TAPS, input_pyramid="skip", output_pyramid="skip", time_features="fourier"),
        {"image_size": 8, "prefix": ""},
    ),
}


def drawn(net):
    generator = np.random.default_rng(0)
    shapes = param_shapes(net, *example_inputs(net))
    return jax.tree.map(lambda s: generator.standard_normal(s.shape, np.float32), shapes)


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_exact(name):
    load, save, net, options = CASES[name]
    params = drawn(net)
    state = save(params, net, **options)
    restored = load(state, net, **options)
    jax.tree.map(np.testing.assert_array_equal, restored, params)
    again = save(restored, net, **options)
    assert again.keys() == state.keys()
    for key, tensor in state.items():
        np.testing.assert_array_equal(again[key], tensor)


@pytest.mark.parametrize("name", CASES)
def test_every_misfit_is_named_in_one_line(name):
    load, save, net, options = CASES[name]
    state = save(drawn(net), net, **options)
    names = [key for key in state if "filter" not in key]
    wrong, gone = names[0], names[-1]
    bad = {key: value for key, value in state.items() if key != gone} | {wrong: np.zeros(1), "stray": np.zeros(1)}
    with pytest.raises(ValueError, match="missing.*unexpected.*wrongly shaped") as error:
        load(bad, net, **options)
    assert all(name in str(error.value) for name in (gone, wrong, "stray")) and "\n" not in str(error.value)


def test_filters_of_a_song_unet_are_checked():
    state = edm.export_song_unet(drawn(TINY), TINY, image_size=16)
    name = "model.enc.8x8_down.conv0.resample_filter"
    np.testing.assert_array_equal(state[name], np.full((1, 1, 2, 2), 0.25))
    with pytest.raises(ValueError, match="4 filters are not those"):
        edm.import_song_unet(state, TINY.clone(taps=TAPS), image_size=16)
    with pytest.raises(ValueError, match=f"lacks 1 filters .{name}"):
        edm.import_song_unet({k: v for k, v in state.items() if k != name}, TINY, image_size=16)


def test_a_song_unet_gives_the_numbers_of_the_released_class():
    """The expected numbers were computed by NVlabs/edm's `SongUNet` in torch 2.13 on the weights and inputs below."""
    config = {
        "img_resolution": 8,
        "in_channels": 2,
        "out_channels": 3,
        "label_dim": 3,
        "augment_dim": 2,
        "model_channels": 8,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [8],
        "embedding_type": "fourier",
        "channel_mult_noise": 2,
        "encoder_type": "residual",
        "decoder_type": "skip",
        "resample_filter": [1, 3, 3, 1],
    }
    net = edm.song_unet_from_config(config)
    state = edm.export_song_unet(drawn(net), net, image_size=8, prefix="")
    assert len(state) == 158
    for j, name in enumerate(sorted(state)):
        if "resample_filter" in name:
            continue
        shape = state[name].shape
        value = np.cos(np.arange(state[name].size) * (1 + 0.37 * j)).reshape(shape)
        if value.ndim > 1:
            value = value * np.sqrt(2 / np.prod(shape[1:]))
        elif "norm" in name and name.endswith("weight"):
            value = 1 + 0.2 * value
        state[name] = value.astype(np.float32)
    params = edm.import_song_unet(state, net, image_size=8, prefix="")
    x = np.sin(np.arange(2 * 2 * 8 * 8) * 0.3).reshape(2, 2, 8, 8).astype(np.float32)
    x, t = jnp.asarray(np.moveaxis(x, 1, -1)), jnp.asarray([-0.5, 0.8])
    given = {"label": jnp.asarray([2, 0], jnp.int32), "augment": jnp.asarray([[0.5, -1.0], [0.0, 2.0]])}
    absent = {"label": jnp.asarray([3, 3], jnp.int32), "augment": jnp.zeros((2, 2))}
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(lambda p, cond: net.apply({"params": p}, x, t, cond)[:, 2, 5])
        found = [apply(params, cond) for cond in (given, absent)]
    expected = [
        [[2.2579608, 0.3525997, -1.4067051], [2.224112, 0.24799213, -1.1981572]],
        [[2.2287688, 0.4107337, -1.4721506], [2.240603, 0.2310105, -1.1889787]],
    ]
    np.testing.assert_allclose(np.stack(found), expected, atol=1e-4)


def test_published_configurations_are_the_presets():
    flax = {"nf": 128, "ch_mult": [2, 2, 2], "num_res_blocks": 4, "attn_resolutions": [16], "fir": True}
    flax |= {"fir_kernel": [1, 3, 3, 1], "progressive_input": "residual", "embedding_type": "fourier"}
    assert ncsnpp.ncsnpp_from_config(flax, image_size=32) == consistency_ncsnpp()
    gan = {"num_channels_dae": 128, "ch_mult": [1, 2, 2, 2], "num_res_blocks": 2, "attn_resolutions": [16]}
    gan |= {"image_size": 32, "nz": 100, "z_emb_dim": 256, "n_mlp": 4}
    assert ddgan.generator_from_config(gan) == ddgan_generator(32)
    song = {"img_resolution": 32, "in_channels": 3, "out_channels": 3, "channel_mult": [2, 2, 2], "augment_dim": 9}
    assert edm.song_unet_from_config({**song, "dropout": 0.13}) == edm_ddpmpp(32)


def test_files_of_these_networks_are_recognised():
    for name, family in {"flax": "NCSN++ or DDPM++ (JAX)", "ddgan": "DDGAN generator", "edm": "EDM"}.items():
        _, save, net, options = CASES[name]
        assert guess({key: value.shape for key, value in save(drawn(net), net, **options).items()}) == family


FLAX = {"nf": 8, "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": []}
SONG = {"img_resolution": 8, "in_channels": 3, "out_channels": 3}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ncsnpp.ncsnpp_from_config({"nf": 8}, image_size=8), r"lacks \['attn_resolutions', 'ch_mult'"),
        (lambda: ncsnpp.ncsnpp_from_config({**FLAX, "n_f": 8}, image_size=8), "'n_f' is not a setting.*'nf'"),
        (lambda: ncsnpp.ncsnpp_from_config({**FLAX, "conditional": False}, image_size=8), "only conditional True"),
        (lambda: ncsnpp.ncsnpp_from_config({**FLAX, "resblock_type": "gan"}, image_size=8), "resblock_type must be"),
        (lambda: ncsnpp.ncsnpp_from_config({**FLAX, "progressive": "skip"}, image_size=8), "progressive must be one"),
        (lambda: ncsnpp.ncsnpp_entries(TINY.clone(z_dim=3)), "neither labels nor latents"),
        (lambda: ddgan.generator_entries(TINY), "set z_dim alone"),
        (lambda: ddgan.generator_from_config({"nz": 3}), r"lacks \['image_size', 'n_mlp', 'z_emb_dim'\]"),
        (lambda: edm.song_unet_entries(EVERYTHING, image_size=8), "SongUNet has no latent"),
        (lambda: edm.song_unet_from_config({}), r"lacks \['img_resolution', 'in_channels', 'out_channels'\]"),
        (lambda: edm.song_unet_from_config({**SONG, "embedding_type": "fourier"}), "channel_mult_noise must be 2"),
        (lambda: edm.song_unet_from_config({**SONG, "channel_mult_emb": 2}), "channel_mult_emb must be 4"),
        (lambda: edm.song_unet_from_config({**SONG, "encoder_type": "none"}), "encoder_type must be one of"),
    ],
)
def test_configurations_without_a_network_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
