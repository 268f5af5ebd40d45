"""Presets have the parameter counts of the released networks (counted from shapes, nothing is allocated)."""

import pytest

from jaxdiff.networks import unet_presets
from jaxdiff.networks.base import num_params, param_shapes
from jaxdiff.networks.unet import example_inputs

MILLIONS = {
    "ddpm_cifar10": (unet_presets.ddpm_unet(32), 35.746),
    "ddpm_256": (unet_presets.ddpm_unet(256), 113.673),
    "iddpm_cifar10": (unet_presets.iddpm_unet(32), 52.546),
    "iddpm_imagenet64": (unet_presets.iddpm_unet(64), 121.064),
    "iddpm_imagenet64_classes": (unet_presets.iddpm_unet(64, num_classes=1000), 273.049),
    "adm_64": (unet_presets.adm_unet(64), 295.904),
    "adm_128": (unet_presets.adm_unet(128), 421.530),
    "adm_256": (unet_presets.adm_unet(256), 553.838),
    "adm_512": (unet_presets.adm_unet(512), 558.998),
    "adm_lsun": (unet_presets.adm_unet(256, num_classes=None), 552.814),
    "consistency_imagenet64": (unet_presets.consistency_unet(64, num_classes=1000), 295.899),
    "consistency_lsun": (unet_presets.consistency_unet(256), 526.305),
    "ldm_unconditional_f4": (unet_presets.ldm_unet(), 274.056),
    "ldm_imagenet_f4": (unet_presets.ldm_imagenet_unet(4), 400.921),
    "ldm_imagenet_f8": (unet_presets.ldm_imagenet_unet(8), 394.984),
    "ldm_text": (unet_presets.ldm_text_unet(), 872.300),
    "stable_diffusion_1": (unet_presets.stable_diffusion_unet(1), 859.521),
    "stable_diffusion_2": (unet_presets.stable_diffusion_unet(2), 865.911),
    "stable_diffusion_1_inpainting": (unet_presets.stable_diffusion_unet(1, in_channels=9), 859.535),
}


# One network of each family; tracing a large one takes seconds.
BY_DEFAULT = (
    "ddpm_cifar10",
    "iddpm_imagenet64_classes",
    "adm_64",
    "consistency_imagenet64",
    "ldm_imagenet_f8",
    "ldm_text",
    "stable_diffusion_1",
    "stable_diffusion_2",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.slow) for name in MILLIONS]
)
def test_parameter_count_is_the_released_one(name):
    unet, millions = MILLIONS[name]
    assert round(num_params(param_shapes(unet, *example_inputs(unet))) / 1e6, 3) == millions


def test_the_upsampler_takes_the_low_resolution_image():
    unet = unet_presets.adm_upsampler_unet(256)
    assert param_shapes(unet, *example_inputs(unet))["conv_in"]["kernel"].shape == (3, 3, 6, 192)


def test_attention_sizes_become_factors():
    assert unet_presets.attention_factors(256, (32, 16, 8)) == (8, 16, 32)
    with pytest.raises(ValueError, match="attention size 24 does not divide the image size 64"):
        unet_presets.attention_factors(64, (32, 24))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: unet_presets.ddpm_unet(64), r"DDPM has no UNet for 64 pixels, only \[32, 256\]"),
        (lambda: unet_presets.adm_unet(32), r"ADM has no UNet for 32 pixels, only \[64, 128, 256, 512\]"),
        (lambda: unet_presets.consistency_unet(128), r"the consistency models paper has no UNet for 128 pixels"),
        (lambda: unet_presets.ldm_imagenet_unet(16), "released at f = 4 and f = 8, got 16"),
        (lambda: unet_presets.stable_diffusion_unet(3), "version must be 1 or 2, got 3"),
    ],
)
def test_sizes_without_a_paper_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
