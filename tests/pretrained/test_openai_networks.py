"""Classifiers, consistency UNets, the consistency decoder and progressive distillation: exact round trips, refusals."""

import functools

import jax
import numpy as np
import pytest

from jaxdiff.networks import consistency_decoder as decoder_module
from jaxdiff.networks import encoder_unet
from jaxdiff.networks import unet as unet_module
from jaxdiff.networks.base import param_shapes
from jaxdiff.networks.consistency_decoder import ConsistencyDecoder
from jaxdiff.networks.encoder_unet import EncoderUNet
from jaxdiff.networks.progdist_unet import ProgDistUNet
from jaxdiff.networks.unet import UNet
from jaxdiff.pretrained import consistency_decoder, openai, progdist

SIZES = {"base_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "norm_groups": 4, "attention_factors": (2,)}
CLASSIFIER = EncoderUNet(**SIZES, head_channels=4, out_channels=3, image_size=4, scale_shift_norm=True)
UNET = UNet(**SIZES, head_channels=4, num_classes=3, resample="resblock")
DECODER = ConsistencyDecoder(base_channels=4, channel_mult=(1, 2), norm_groups=2, emb_channels=6, num_times=5)
PROGDIST = ProgDistUNet(**SIZES, num_heads=2, num_classes=3, emb_channels=6)

CLASSIFIERS = (openai.import_classifier, openai.export_classifier, encoder_unet)
NEW_ORDER = tuple(functools.partial(f, new_attention_order=True) for f in CLASSIFIERS[:2])
CONSISTENCY = (openai.import_consistency_unet, openai.export_consistency_unet, unet_module)
RELEASE = (progdist.import_unet, progdist.export_unet, unet_module)


def decoders(names):
    both = (consistency_decoder.import_decoder, consistency_decoder.export_decoder)
    return (*(functools.partial(f, names=names) for f in both), decoder_module)


CASES = {
    **{pool: (*CLASSIFIERS, CLASSIFIER.clone(pool=pool)) for pool in encoder_unet.POOLS},
    "classifier_new_order": (*NEW_ORDER, encoder_unet, CLASSIFIER.clone(resample="resblock")),
    "consistency": (*CONSISTENCY, UNET),
    "consistency_conv": (*CONSISTENCY, UNET.clone(resample="conv", num_classes=None)),
    "decoder_openai": (*decoders(consistency_decoder.OPENAI), DECODER),
    "decoder_diffusers": (*decoders(consistency_decoder.DIFFUSERS), DECODER),
    "decoder_conv_unet": (*decoders(consistency_decoder.CONV_UNET), DECODER),
    "progdist": (*RELEASE, PROGDIST),
    "progdist_conv": (*RELEASE, PROGDIST.clone(num_heads=None, head_channels=4, resample="conv", num_classes=None)),
}


def drawn(module, network):
    generator = np.random.default_rng(0)
    shapes = param_shapes(network, *module.example_inputs(network))
    return jax.tree.map(lambda a: generator.standard_normal(a.shape, np.float32), shapes)


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_exact(name):
    load, save, module, network = CASES[name]
    params = drawn(module, network)
    state = save(params, network)
    restored = load(state, network)
    jax.tree.map(np.testing.assert_array_equal, restored, params)
    again = save(restored, network)
    assert again.keys() == state.keys()
    for key, tensor in state.items():
        np.testing.assert_array_equal(again[key], tensor)
    assert sum(tensor.size for tensor in state.values()) == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", ["attention", "consistency", "decoder_openai", "progdist"])
def test_tensors_that_do_not_fit_are_named(name):
    load, save, module, network = CASES[name]
    state = save(drawn(module, network), network)
    first, second = sorted(state)[:2]
    damaged = {key: tensor for key, tensor in state.items() if key != first} | {"ema.decay": np.zeros(())}
    damaged[second] = np.zeros((1, 1, 1, 1, 1))
    with pytest.raises(ValueError) as caught:
        load(damaged, network)
    message = str(caught.value)
    assert f"1 missing ({first})" in message and "1 unexpected (ema.decay)" in message
    assert f"1 wrongly shaped ({second} (1, 1, 1, 1, 1), expected {state[second].shape})" in message
    assert "\n" not in message


def test_attention_of_consistency_models_is_q_k_v_first_in_two_dimensional_convolutions():
    state = openai.export_consistency_unet(drawn(unet_module, UNET), UNET)
    others = openai.export_unet(drawn(unet_module, UNET), UNET, new_attention_order=True)
    assert state["middle_block.1.qkv.weight"].shape == (48, 16, 1, 1)
    for name, tensor in others.items():
        np.testing.assert_array_equal(state[name].reshape(tensor.shape), tensor, err_msg=name)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (consistency_decoder.OPENAI, "blocks.up_3_upsamp.gn_1.g blocks.mid_1.f_2.w embed_time.emb.weight output.f.b"),
        (consistency_decoder.DIFFUSERS, "up_blocks.0.upsamplers.0.norm1.weight mid_block.resnets.1.conv2.weight"),
        (consistency_decoder.CONV_UNET, "up.3.4.gn_1.weight down.1.0.f_s.bias mid.1.f_2.weight output.f.bias"),
    ],
)
def test_the_released_decoder_has_407_tensors(names, expected):
    found = [name for entry in consistency_decoder.decoder_entries(ConsistencyDecoder(), names) for name in entry.names]
    assert len(found) == len(set(found)) == 407
    assert set(expected.split()) <= set(found)


GUIDED = {
    "image_size": 8,
    "model_channels": 32,
    "out_channels": 5,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_heads": 2,
}
FLAX = {"ch": 32, "emb_ch": 48, "out_ch": 6, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [4, 99]}


def test_classifier_settings():
    classifier = openai.classifier_from_config({**GUIDED, "num_heads_upsample": 4, "pool": "spatial"})
    assert (classifier.pool, classifier.image_size, classifier.num_heads_up) == ("spatial", 8, None)
    assert (classifier.num_heads, classifier.attention_factors, classifier.out_channels) == (2, (2,), 5)
    assert openai.classifier_from_config(GUIDED).pool == "adaptive"


def test_progressive_distillation_settings():
    unet = progdist.unet_from_config({**FLAX, "num_heads": None, "head_dim": 16, "num_classes": 1}, resolution=8)
    assert (unet.attention_factors, unet.head_channels, unet.num_heads, unet.num_classes) == ((2,), 16, None, None)
    assert (unet.resample, unet.emb_channels, unet.norm_eps) == ("conv", 48, 1e-6)
    unet = progdist.unet_from_config(
        {**FLAX, "num_heads": 1, "num_classes": 9, "resblock_resample": True}, resolution=8
    )
    assert (unet.resample, unet.num_classes) == ("resblock", 9)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: openai.classifier_from_config({**GUIDED, "num_classes": 5}), "'num_classes' is not a setting of the"),
        (lambda: openai.classifier_from_config({**GUIDED, "pol": "x"}), "did you mean 'pool'"),
        (
            lambda: openai.classifier_from_config({k: v for k, v in GUIDED.items() if k != "image_size"}),
            r"the classifier configuration lacks \['image_size'\]",
        ),
        (lambda: openai.classifier_from_config({**GUIDED, "pool": "attention"}), "needs head_channels, got None"),
        (lambda: progdist.unet_from_config({**FLAX, "emb": 1}, resolution=8), "'emb' is not a setting.*'emb_ch'"),
        (lambda: progdist.unet_from_config({"ch": 32}, resolution=8), r"lacks \['attn_resolutions', 'ch_mult', 'emb_"),
        (lambda: progdist.unet_from_config(FLAX, resolution=8), "give either num_heads or head_dim, got None and None"),
        (lambda: progdist.unet_entries(PROGDIST.clone(resample="plain")), "got resample 'plain'"),
        (
            lambda: consistency_decoder.decoder_entries(DECODER.clone(mid_attention=True)),
            "attends nowhere; got num_res_blocks 3, resample 'resblock', .* mid_attention True",
        ),
    ],
)
def test_settings_that_are_unknown_or_unsupported_are_refused(build, message):
    with pytest.raises(ValueError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)
