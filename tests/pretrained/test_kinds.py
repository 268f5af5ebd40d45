"""The catalogue of published weights: every configuration is found again from its names and shapes, and back."""

import functools
import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import traverse_util

from jaxdiff.networks import clip_text, consistency_decoder, controlnet, dit, encoder_unet, ncsnpp, progdist_unet
from jaxdiff.networks.autoencoder_kl import AutoencoderKL
from jaxdiff.networks.autoencoder_vq import AutoencoderVQ
from jaxdiff.networks.ddgan_discriminators import ddgan_small_discriminator
from jaxdiff.networks.layers import LabelEmbedding
from jaxdiff.networks.patch_discriminator import PatchDiscriminator
from jaxdiff.networks.unet import UNet
from jaxdiff.pretrained import diffusers_write, families, files, folders, plans
from jaxdiff.pretrained.catalog import BUNDLES, KINDS
from jaxdiff.pretrained.kinds import Deferred, Spec, find, released, translated

SMALL = {"base_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "norm_groups": 8}
PLAIN = UNet(**SMALL, attention_factors=(2,))
TEXT = UNet(**SMALL, attention_factors=(2,), num_heads=2, transformer_depth=1, context_dim=12)
KL = AutoencoderKL(base_channels=16, channel_mult=(1, 2), num_res_blocks=1, norm_groups=8, z_channels=4, embed_dim=4)
VQ = AutoencoderVQ(
    base_channels=16, channel_mult=(1, 2), num_res_blocks=1, norm_groups=8, z_channels=3, embed_dim=3, num_codes=16
)
SCORE = ncsnpp.NCSNpp(base_channels=32, channel_mult=(1, 2), num_res_blocks=1)
ENCODER = clip_text.ClipText(vocab_size=40, width=16, num_layers=2, heads=2)
TINY = {
    "openai-unet": Spec(PLAIN, {"new_attention_order": True}),
    "openai-classifier": Spec(encoder_unet.EncoderUNet(**SMALL, image_size=8, head_channels=8, out_channels=5)),
    "consistency-unet": Spec(PLAIN.clone(resample="resblock")),
    "consistency-decoder": Spec(consistency_decoder.ConsistencyDecoder(base_channels=32, channel_mult=(1, 2))),
    "compvis-unet": Spec(TEXT, {"linear_projection": True}),
    "compvis-autoencoder": Spec(VQ),
    "compvis-discriminator": Spec(PatchDiscriminator(base_channels=8)),
    "controlnet": Spec(controlnet.controlnet_for(TEXT)),
    "diffusers-unet": Spec(TEXT, {"linear_projection": True}),
    "diffusers-autoencoder": Spec(KL),
    "diffusers-controlnet": Spec(controlnet.controlnet_for(TEXT)),
    "diffusers-consistency-decoder": Spec(
        consistency_decoder.ConsistencyDecoder(base_channels=32, channel_mult=(1, 2))
    ),
    "diffusers-encoder": Spec(KL),
    "clip-text": Spec(ENCODER),
    "open-clip-text": Spec(ENCODER),
    "ddpm-unet": Spec(PLAIN),
    "edm": Spec(SCORE, {"image_size": 8}),
    "ncsnpp": Spec(SCORE),
    "progdist-unet": Spec(progdist_unet.ProgDistUNet(**SMALL, attention_factors=(2,))),
    "ddgan-generator": Spec(SCORE.clone(z_dim=6)),
    "ddgan-discriminator": Spec(ddgan_small_discriminator().clone(base_channels=8)),
    "dit": Spec(dit.DiT(width=16, depth=2, num_heads=2, input_size=8)),
    "class-embedder": Spec(LabelEmbedding(7, 5)),
    "inception": Spec(KINDS["inception"].published["fid-inception"]().network),
    "lpips": Spec(KINDS["lpips"].published["lpips-vgg"]().network),
}
LARGE = ("inception", "lpips")  # have one size


def drawn(shapes):
    random = np.random.default_rng(0)

    def draw(leaf):
        return random.standard_normal(leaf.shape).astype(leaf.dtype)

    return jax.tree.map(draw, shapes)


def blank(kind, spec):
    """A state dict of a network in names and shapes, whose tensors take no memory; constants are real."""
    translation, shapes = kind.translate(spec.network, **spec.options), kind.shapes(spec.network)
    targets = traverse_util.flatten_dict(shapes, sep="/")
    state = dict(translation.constants)
    for entry in translation.entries:
        leaf = np.broadcast_to(np.float32(0), targets[entry.path].shape)
        state |= dict(zip(entry.names, entry.layout.to_torch(leaf), strict=True))
    return state


@pytest.mark.parametrize("name", [n if n not in LARGE else pytest.param(n, marks=pytest.mark.slow) for n in TINY])
def test_leaves_come_back_bit_for_bit(name):
    kind, spec = KINDS[name], TINY[name]
    params = drawn(kind.shapes(spec.network))
    state = {tensor: np.asarray(array) for tensor, array in released(kind, spec, params).items()}
    leaves = translated(kind, spec, state)
    expected = traverse_util.flatten_dict(params, sep="/")
    assert leaves.keys() == expected.keys()
    for path, leaf in leaves.items():
        assert np.asarray(leaf).tobytes() == expected[path].tobytes()


def test_every_kind_has_a_case_here_and_a_place_in_the_help():
    from jaxdiff.cli import KINDS as listed

    assert TINY.keys() == KINDS.keys()
    words = listed.replace(",", " ").split()
    assert [name for name in (*KINDS, *BUNDLES) if name not in words] == []


def test_families_of_the_kinds_are_those_that_are_guessed():
    known = {family.name for family in families.FAMILIES}
    assert {family for row in (*KINDS.values(), *BUNDLES.values()) for family in row.families} <= known


QUICK = ("ddgan-discriminator", "class-embedder", "lpips")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in KINDS])
def test_published_configurations_are_found_from_names_and_shapes(name):
    kind = KINDS[name]._replace(shapes=functools.cache(KINDS[name].shapes))
    for published, build in kind.published.items():
        assert find(kind, blank(kind, build())) == published


def test_a_state_dict_of_another_width_is_refused_with_the_nearest_configuration():
    kind = KINDS["class-embedder"]
    with pytest.raises(
        ValueError, match=r"the nearest is 'classes-1001'.* \(weight \(7, 512\), expected \(1001, 512\)"
    ):
        find(kind, {"weight": np.zeros((7, 512))})
    with pytest.raises(ValueError, match=r"2 unexpected \(a, b\).* give its configuration as a JSON file"):
        find(kind, {"weight": np.zeros((1001, 512)), "a": np.zeros(1), "b": np.zeros(1)})


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.configure])
def test_what_is_written_for_diffusers_is_read_as_the_same_network(name):
    kind, spec = KINDS[name], TINY[name]
    read = kind.parse(json.loads(json.dumps(kind.configure(spec.network, **spec.options))))
    assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape, *map(kind.shapes, (spec.network, read.network))))
    first, second = (kind.translate(s.network, **s.options) for s in (spec, read))
    assert [(e.path, e.names) for e in first.entries] == [(e.path, e.names) for e in second.entries]
    assert dict(read.options) | dict(spec.options) == dict(read.options)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: diffusers_write.unet_config(PLAIN.clone(low_res_channels=3)), "low_res_channels 3 of this network"),
        (lambda: diffusers_write.unet_config(PLAIN.clone(resample="plain")), "resample 'plain' of this network has no"),
        (
            lambda: diffusers_write.unet_config(PLAIN.clone(num_heads=2, attention_factors=(1,))),
            r"one width, this UNet has widths \[8, 16\]",
        ),
        (lambda: diffusers_write.autoencoder_config(KL.clone(embed_dim=3)), "embed_dim 3 of this network has no place"),
        (lambda: diffusers_write.clip_text_config(ENCODER.clone(activation=nn.relu)), "hidden_act 'unknown' is not"),
    ],
)
def test_networks_that_diffusers_has_not_are_not_written(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_a_deferred_array_is_made_when_it_is_asked_for():
    made = []
    deferred = Deferred((2, 3), np.dtype(np.float16), lambda: made.append(1) or np.ones((2, 3), np.float32))
    assert (deferred.size, deferred.nbytes, made) == (6, 12, [])
    assert np.asarray(deferred).dtype == np.float16
    assert made == [1]


@pytest.fixture
def tiny(tmp_path):
    """An imported UNet and the file it came from."""
    kind, spec = KINDS["openai-unet"], Spec(PLAIN)
    state = {n: np.asarray(a) for n, a in released(kind, spec, drawn(kind.shapes(PLAIN))).items()}
    files.write(tmp_path / "unet.safetensors", state)
    config = {"model_channels": 16, "out_channels": 3, "num_res_blocks": 1, "attention_resolutions": [2]}
    return tmp_path, state, config | {"channel_mult": [1, 2]}


def test_import_load_and_export_give_the_file_back(tiny, monkeypatch):
    folder, state, config = tiny
    # norm_groups is no setting of the release, so the network of its configuration needs widths of 32
    monkeypatch.setitem(KINDS, "openai-unet", KINDS["openai-unet"]._replace(parse=lambda c: Spec(PLAIN)))
    (plan,) = folders.import_weights("openai-unet", folder / "unet.safetensors", folder / "ours", config=config)
    assert plan.record["parameters"] == sum(a.size for a in state.values())
    imported = folders.load(folder / "ours")
    assert imported.spec.network == PLAIN
    count = folders.export_weights("openai-unet", imported.spec, imported.params, folder / "back.safetensors")
    again = files.read(folder / "back.safetensors")
    assert count == len(state) and again.keys() == state.keys()
    assert all(again[name].tobytes() == state[name].tobytes() for name in state)


def test_bfloat16_halves_the_folder(tiny, monkeypatch):
    folder, state, config = tiny
    monkeypatch.setitem(KINDS, "openai-unet", KINDS["openai-unet"]._replace(parse=lambda c: Spec(PLAIN)))
    for dtype in ("float32", "bfloat16"):
        folders.import_weights("openai-unet", folder / "unet.safetensors", folder / dtype, config=config, dtype=dtype)
    full, half = (files.summary(folder / dtype / folders.PARAMS) for dtype in ("float32", "bfloat16"))
    assert half.bytes * 2 == full.bytes == sum(a.nbytes for a in state.values())
    for ours, theirs in zip(
        *(jax.tree.leaves(folders.load(folder / d).params) for d in ("float32", "bfloat16")), strict=True
    ):
        np.testing.assert_allclose(np.asarray(theirs, np.float32), ours, rtol=2**-8)


def bundle(names):
    """The single-file checkpoint of tiny networks, under the prefixes of Stable Diffusion."""
    places = {part.name: part for part in BUNDLES["compvis"].parts if part.kind in TINY}
    state = {}
    for name in names:
        part = places[name]
        kind, spec = KINDS[part.kind], TINY[part.kind]
        state |= {
            part.prefix + n: np.asarray(a) for n, a in released(kind, spec, drawn(kind.shapes(spec.network))).items()
        }
    return state


def test_a_bundle_becomes_a_folder_of_networks_and_the_same_file_again(tmp_path, monkeypatch):
    for part in BUNDLES["compvis"].parts:
        row = KINDS[part.kind]
        monkeypatch.setitem(KINDS, part.kind, row._replace(published={"tiny": lambda k=part.kind: TINY[k]}))
    state = bundle(("unet", "autoencoder", "class_embedder"))
    noise = {"betas": np.zeros(4), "model_ema.decay": np.zeros(()), "global_step": np.zeros((), np.int64)}
    averages = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): array + 1
        for name, array in state.items()
        if name.startswith("model.diffusion_model.")
    }
    files.write(tmp_path / "model.safetensors", state | noise | averages)
    written = folders.import_weights("compvis", tmp_path / "model.safetensors", tmp_path / "ours")
    assert [plan.name for plan in written] == ["unet", "autoencoder", "class_embedder"]
    assert written[0].passed_over == len(noise) + len(averages)
    parts = {name: folders.load(tmp_path / "ours" / name) for name in folders.parts_of(tmp_path / "ours")}
    folders.export_bundle("compvis", parts, tmp_path / "back.safetensors")
    again = files.read(tmp_path / "back.safetensors")
    assert again.keys() == state.keys()
    assert all(again[name].tobytes() == state[name].tobytes() for name in state)

    averaged = plans.plan_import("compvis", [tmp_path / "model.safetensors"], ema=True)[0]
    np.testing.assert_array_equal(
        np.asarray(averaged.leaves["conv_out/bias"]), state["model.diffusion_model.out.2.bias"] + 1
    )


def test_the_consistency_decoders_table_of_times_comes_in_a_file_of_its_own(tmp_path, monkeypatch):
    spec = TINY["consistency-decoder"]
    kind = KINDS["consistency-decoder"]._replace(published={"tiny": lambda: spec})
    monkeypatch.setitem(KINDS, "consistency-decoder", kind)
    state = {name: np.asarray(a) for name, a in released(kind, spec, drawn(kind.shapes(spec.network))).items()}
    table = state.pop("embed_time.emb.weight")
    files.write(tmp_path / "decoder.safetensors", state)
    files.write(tmp_path / "embedding.safetensors", {"weight": table})
    both = [tmp_path / "decoder.safetensors", tmp_path / "embedding.safetensors"]
    (plan,) = plans.plan_import("consistency-decoder", both)
    np.testing.assert_array_equal(np.asarray(plan.leaves["time_table/embedding"]), table)
    with pytest.raises(ValueError, match=r"1 missing \(embed_time.emb.weight\)"):
        plans.plan_import("consistency-decoder", both[:1])
