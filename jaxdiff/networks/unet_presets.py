"""UNets with the settings of the papers, by the papers' names.

Each function returns a `UNet`; change single fields with `.clone(field=value)`. Parameter counts in the docstrings
are those of the released networks and are tested. Sizes are in pixels (or latent positions); the factors that the
module takes are computed here.
"""

from jaxdiff.networks.initializers import fan_average, fan_average_tiny
from jaxdiff.networks.unet import UNet


def attention_factors(image_size: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Downsampling factors at which an image of `image_size` pixels has the given sizes.

    Raises:
      ValueError: a size does not divide the image size.
    """
    for size in sizes:
        if size < 1 or image_size % size:
            raise ValueError(f"attention size {size} does not divide the image size {image_size}")
    return tuple(sorted(image_size // size for size in sizes))


def _by_size(image_size: int, table: dict[int, tuple[int | float, ...]], paper: str) -> tuple[int | float, ...]:
    if image_size not in table:
        raise ValueError(
            f"{paper} has no UNet for {image_size} pixels, only {sorted(table)}; build a UNet(...) directly"
        )
    return table[image_size]


def ddpm_unet(image_size: int = 32) -> UNet:
    """The UNet of DDPM: 32 pixels (CIFAR-10, 35.746 M parameters) or 256 pixels (LSUN, CelebA-HQ, 113.673 M).

    Source: Ho et al. 2020 (arXiv:2006.11239) appendix B.
    """
    mult = _by_size(image_size, {32: (1, 2, 2, 2), 256: (1, 1, 2, 2, 4, 4)}, "DDPM")
    return UNet(
        channel_mult=mult,
        attention_factors=attention_factors(image_size, (16,)),
        asymmetric_padding=True,
        norm_eps=1e-6,
        sin_first=True,
        frequency_shift=1,
        dropout=0.1 if image_size == 32 else 0.0,
        layer_rule=fan_average,
        output_rule=fan_average_tiny,
    )


def iddpm_unet(image_size: int = 32, *, num_classes: int | None = None) -> UNet:
    """The UNet of Improved DDPM, with learned variances.

    32 pixels: CIFAR-10, 52.546 M parameters. 64 pixels: ImageNet, 121.064 M without and 273.049 M with its 1000
    classes, which come with a wider network.

    Source: Nichol and Dhariwal 2021 (arXiv:2102.09672).
    """
    mult = _by_size(image_size, {32: (1, 2, 2, 2), 64: (1, 2, 3, 4)}, "Improved DDPM")
    return UNet(
        out_channels=6,
        base_channels=192 if image_size == 64 and num_classes is not None else 128,
        channel_mult=mult,
        num_res_blocks=3,
        attention_factors=attention_factors(image_size, (16, 8)),
        num_heads=4,
        num_classes=num_classes,
        scale_shift_norm=True,
        dropout=0.3 if image_size == 32 else 0.0,
    )


def adm_unet(image_size: int, *, num_classes: int | None = 1000) -> UNet:
    """The UNet of ADM, with learned variances.

    ImageNet with 1000 classes: 64 pixels 295.904 M parameters, 128 421.530 M, 256 553.838 M, 512 558.998 M. LSUN at
    256 pixels without classes: 552.814 M (its networks were trained with dropout 0.1: `.clone(dropout=0.1)`).

    Source: Dhariwal and Nichol 2021 (arXiv:2105.05233) section 3.
    """
    table = {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)}
    mult = _by_size(image_size, table, "ADM")
    return UNet(
        out_channels=6,
        base_channels=192 if image_size == 64 else 256,
        channel_mult=mult,
        num_res_blocks=3 if image_size == 64 else 2,
        attention_factors=attention_factors(image_size, (32, 16, 8)),
        num_heads=4 if image_size == 128 else None,
        head_channels=None if image_size == 128 else 64,
        num_classes=num_classes,
        scale_shift_norm=True,
        resample="resblock",
        dropout=0.1 if image_size == 64 else 0.0,
    )


def adm_upsampler_unet(image_size: int, *, num_classes: int | None = 1000) -> UNet:
    """The super-resolution UNet of ADM: 256 pixels from cond["low_res"] at 64, or 512 from 128.

    Source: Dhariwal and Nichol 2021 (arXiv:2105.05233).
    """
    mult = _by_size(image_size, {256: (1, 1, 2, 2, 4, 4), 512: (1, 1, 2, 2, 4, 4)}, "the ADM upsampler")
    return UNet(
        out_channels=6,
        base_channels=192,
        channel_mult=mult,
        attention_factors=attention_factors(image_size, (32, 16, 8) if image_size == 256 else (32, 16)),
        num_heads=4 if image_size == 256 else None,
        head_channels=None if image_size == 256 else 64,
        num_classes=num_classes,
        low_res_channels=3,
        scale_shift_norm=True,
        resample="resblock",
    )


def consistency_unet(image_size: int = 64, *, num_classes: int | None = None) -> UNet:
    """The UNet of consistency models and of their EDM teachers.

    64 pixels with the 1000 classes of ImageNet: 295.899 M parameters. 256 pixels without classes (LSUN): 526.305 M.
    The ImageNet teacher was trained with dropout 0.1: `.clone(dropout=0.1)`.

    Source: Song et al. 2023 (arXiv:2303.01469) appendix C; the released configurations.
    """
    mult = _by_size(image_size, {64: (1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4)}, "the consistency models paper")
    return UNet(
        base_channels=192 if image_size == 64 else 256,
        channel_mult=mult,
        num_res_blocks=3 if image_size == 64 else 2,
        attention_factors=attention_factors(image_size, (32, 16, 8)),
        head_channels=64,
        num_classes=num_classes,
        scale_shift_norm=image_size == 64,
        resample="resblock",
    )


def ldm_unet(
    latent_size: int = 64,
    *,
    latent_channels: int = 3,
    base_channels: int = 224,
    channel_mult: tuple[int, ...] = (1, 2, 3, 4),
    attention_sizes: tuple[int, ...] = (32, 16, 8),
    num_heads: int | None = None,
    head_channels: int | None = 32,
    context_dim: int | None = None,
) -> UNet:
    """The UNet of latent diffusion; with a context_dim it attends to cond["context"].

    The defaults are the unconditional networks at f = 4 (CelebA-HQ, FFHQ, LSUN bedrooms; 274.056 M parameters).

    Args:
      latent_size: height and width of the latent, only to place the attention.
      latent_channels: channels of the latent.
      base_channels: unit of width.
      channel_mult: width of each level over base_channels.
      attention_sizes: latent sizes that have attention.
      num_heads: heads everywhere, instead of head_channels.
      head_channels: channels of a head.
      context_dim: width of the context, None for none.

    Source: Rombach et al. 2022 (arXiv:2112.10752) appendix E.
    """
    return UNet(
        in_channels=latent_channels,
        out_channels=latent_channels,
        base_channels=base_channels,
        channel_mult=channel_mult,
        attention_factors=attention_factors(latent_size, attention_sizes),
        num_heads=num_heads,
        head_channels=head_channels,
        transformer_depth=0 if context_dim is None else 1,
        context_dim=context_dim,
    )


def ldm_imagenet_unet(factor: int = 4) -> UNet:
    """Class-conditional latent diffusion on ImageNet at f = 4 (400.921 M parameters) or f = 8 (394.984 M).

    The class is a context of one token of width 512, embedded outside this network.

    Source: Rombach et al. 2022 (arXiv:2112.10752) appendix E.
    """
    if factor == 4:
        return ldm_unet(base_channels=192, channel_mult=(1, 2, 3, 5), num_heads=1, head_channels=None, context_dim=512)
    if factor == 8:
        return ldm_unet(
            32,
            latent_channels=4,
            base_channels=256,
            channel_mult=(1, 2, 4),
            context_dim=512,
        )
    raise ValueError(f"latent diffusion on ImageNet was released at f = 4 and f = 8, got {factor}")


def ldm_text_unet() -> UNet:
    """Text-to-image latent diffusion at f = 8: context of width 1280, 872.300 M parameters.

    Source: Rombach et al. 2022 (arXiv:2112.10752) section 4.3.
    """
    return stable_diffusion_unet(1).clone(context_dim=1280)


def stable_diffusion_unet(version: int = 1, *, in_channels: int = 4) -> UNet:
    """The UNet of Stable Diffusion 1.x (context 768, 859.521 M parameters) or 2.x (context 1024, 865.911 M).

    Args:
      version: 1 or 2.
      in_channels: 4, or 9 for the inpainting networks, where x_t, mask and masked image are concatenated.

    Source: Rombach et al. 2022 (arXiv:2112.10752); the released configurations.
    """
    if version not in (1, 2):
        raise ValueError(f"Stable Diffusion version must be 1 or 2, got {version}")
    return UNet(
        in_channels=4,
        concat_channels=in_channels - 4,
        out_channels=4,
        base_channels=320,
        channel_mult=(1, 2, 4, 4),
        attention_factors=(1, 2, 4),
        num_heads=8 if version == 1 else None,
        head_channels=None if version == 1 else 64,
        transformer_depth=1,
        context_dim=768 if version == 1 else 1024,
    )
