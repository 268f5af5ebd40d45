"""The UNet's rules for the tensor axis on published networks: which layers they split, and that they do so in pairs."""

import functools
import re

import jax
import numpy as np
import pytest

from jaxdiff.networks.base import num_params, param_shapes
from jaxdiff.networks.partition import UNET
from jaxdiff.networks.unet import example_inputs
from jaxdiff.networks.unet_presets import adm_unet, ddpm_unet, stable_diffusion_unet
from jaxdiff.training.sharding import device_shape

PRESETS = {"ddpm": ddpm_unet(32), "adm": adm_unet(64), "stable_diffusion": stable_diffusion_unet(1)}


@functools.cache
def model_shapes(name):
    return param_shapes(PRESETS[name], *example_inputs(PRESETS[name]))


def leaves(name):
    """{path in a train state: shape}"""
    shapes = jax.tree_util.tree_leaves_with_path({"params": {"model": model_shapes(name)}})
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in shapes}


@pytest.mark.parametrize(("name", "share"), [("ddpm", 0.8), ("adm", 0.8), ("stable_diffusion", 0.85)])
def test_most_of_a_network_is_split(name, share):
    shapes = leaves(name)
    for parts in (2, 4):
        held = sum(int(np.prod(device_shape(path, shape, {"tensor": parts}, UNET))) for path, shape in shapes.items())
        whole = sum(int(np.prod(shape)) for shape in shapes.values())
        assert held <= whole * (1 - share * (1 - 1 / parts))
    assert whole == num_params(model_shapes(name))


def test_every_rule_is_used():
    shapes = leaves("stable_diffusion")
    assert [pattern for pattern, _ in UNET if not any(re.search(pattern, path) for path in shapes)] == []


@pytest.mark.parametrize("name", PRESETS)
def test_every_pair_is_split_over_columns_then_rows(name):
    shapes = leaves(name)
    pairs = {"conv_in": "conv_out", "feed_forward_in": "feed_forward_out", "v": "out"}
    found = 0
    for path, shape in shapes.items():
        block, layer, leaf = path.split("/")[:-2], *path.split("/")[-2:]
        second = "/".join([*block, pairs.get(layer, ""), leaf])
        if leaf != "kernel" or second not in shapes or len(block) < 3:
            continue
        found += 1
        first, then = (device_shape(p, shapes[p], {"tensor": 2}, UNET) for p in (path, second))
        assert first == (*shape[:-1], shape[-1] // 2), path
        assert then == (*shapes[second][:-2], shapes[second][-2] // 2, shapes[second][-1]), second
    assert found >= 20


def test_the_ends_of_a_network_and_its_attention_blocks_stay_whole():
    shapes = leaves("adm")
    whole = [path for path in shapes if re.search(r"model/conv_(in|out)/|_attention/(qkv|out)/|/time_(in|out)/", path)]
    assert len(whole) > 10
    for path in whole:
        assert device_shape(path, shapes[path], {"tensor": 4}, UNET) == shapes[path]
