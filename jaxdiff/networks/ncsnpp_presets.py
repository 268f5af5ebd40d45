"""NCSN++ and DDPM++ with the settings of the papers, by the papers' names.

Each function returns an `NCSNpp`; change single fields with `.clone(field=value)`. Parameter counts in the docstrings
are those of the released networks and are tested.
"""

from jaxdiff.networks.ncsnpp import NCSNpp

STYLEGAN_TAPS = (1.0, 3.0, 3.0, 1.0)


def consistency_ncsnpp() -> NCSNpp:
    """The network of consistency models on CIFAR-10: 56.396 M parameters; t is ln(sigma) / 4.

    Source: Song et al. 2023 (arXiv:2303.01469) appendix C.
    """
    return NCSNpp(time_features="fourier", taps=STYLEGAN_TAPS, input_pyramid="residual")


def ddgan_generator(image_size: int = 32) -> NCSNpp:
    """The generator of denoising diffusion GANs: 32 pixels (CIFAR-10, 48.43 M) or 256 (CelebA-HQ and LSUN, 39.73 M).

    t counts steps of the chain from 0; cond["z"] is [B, 100], standard normal. The result is x0 in [-1, 1].

    Source: Xiao et al. 2022 (arXiv:2112.07804) appendix C.
    """
    if image_size not in (32, 256):
        raise ValueError(f"DDGAN has generators for 32 and 256 pixels, got {image_size}; build an NCSNpp(...) directly")
    small = image_size == 32
    return NCSNpp(
        base_channels=128 if small else 64,
        channel_mult=(1, 2, 2, 2) if small else (1, 1, 2, 2, 4, 4),
        num_res_blocks=2,
        attention_factors=(image_size // 16,),
        taps=STYLEGAN_TAPS,
        input_pyramid="residual",
        z_dim=100,
        z_layers=5 if small else 4,
        tanh=True,
    )


def edm_ddpmpp(image_size: int = 32, *, num_classes: int | None = None) -> NCSNpp:
    """EDM's DDPM++ for 32 pixels (CIFAR-10, 55.7 M parameters) or 64 (FFHQ, AFHQv2, 61.8 M); t is ln(sigma) / 4.

    cond["augment"] [B, 9] says how an image was augmented and is left out when sampling.

    Source: Karras et al. 2022 (arXiv:2206.00364) appendix F.
    """
    if image_size not in (32, 64):
        raise ValueError(f"EDM has DDPM++ for 32 and 64 pixels, got {image_size}; build an NCSNpp(...) directly")
    return NCSNpp(
        channel_mult=(2, 2, 2) if image_size == 32 else (1, 2, 2, 2),
        attention_factors=(image_size // 16,),
        num_classes=num_classes,
        augment_dim=9,
        dropout=0.13 if image_size == 32 else 0.05,
    )


def edm_ncsnpp(image_size: int = 32, *, num_classes: int | None = None) -> NCSNpp:
    """EDM's NCSN++: `edm_ddpmpp` with Fourier features, the wider filter and a residual input pyramid.

    Source: Karras et al. 2022 (arXiv:2206.00364) appendix F.
    """
    return edm_ddpmpp(image_size, num_classes=num_classes).clone(
        time_features="fourier", taps=STYLEGAN_TAPS, input_pyramid="residual"
    )
