"""Discriminators of NVlabs' denoising-diffusion-gan (`netD`): names and layout of their weights, both ways.

Prefixes in a training checkpoint (`netD_dict`, a leading `module.`) are the business of whoever reads the file.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.networks.base import param_shapes
from jaxdiff.networks.ddgan_discriminators import DDGANDiscriminator, example_inputs
from jaxdiff.pretrained.torch_layout import (
    CONV,
    LINEAR,
    Entry,
    export_params,
    import_params,
    layer,
    pointwise,
)
from jaxdiff.types import Params


def import_discriminator(state: Mapping[str, Any], discriminator: DDGANDiscriminator) -> Params:
    """Parameters of a discriminator from a `Discriminator_small` or `Discriminator_large` state dict.

    Args:
      state: arrays by name ("conv1.conv1.0.weight").
      discriminator: the network, e.g. `ddgan_small_discriminator()`.

    Returns:
      The parameter tree, NumPy float32.

    Raises:
      ValueError: tensors are missing, unexpected or wrongly shaped; all of them are named.
    """
    shapes = param_shapes(discriminator, *example_inputs(discriminator))
    return import_params(discriminator_entries(discriminator), state, shapes)


def export_discriminator(params: Params, discriminator: DDGANDiscriminator) -> dict[str, np.ndarray]:
    """The state dict of a parameter tree: the exact inverse of `import_discriminator`."""
    return export_params(discriminator_entries(discriminator), params)


def discriminator_entries(discriminator: DDGANDiscriminator) -> list[Entry]:
    """Every leaf with its released name, in the order of the release."""
    entries = [
        *layer("time_in", "t_embed.main.0", LINEAR),
        *layer("time_out", "t_embed.main.2", LINEAR),
        *layer("conv_in", "start_conv", CONV),
    ]
    for i in range(len(discriminator.channel_mult)):
        path, name = f"block_{i}", f"conv{i + 1}"
        entries += [
            *layer(f"{path}/conv_in", f"{name}.conv1.0", CONV),
            *layer(f"{path}/conv_out", f"{name}.conv2.0", CONV),
            *layer(f"{path}/time", f"{name}.dense_t1", LINEAR),
            Entry(f"{path}/skip/kernel", (f"{name}.skip.0.weight",), pointwise(2)),
        ]
    return entries + layer("conv_out", "final_conv", CONV) + layer("logit", "end_linear", LINEAR)
