"""ControlNets of the original release (`cldm`): configurations, names and layout of their weights.

The copy of the UNet has the names of the CompVis UNet; the hint encoder and the zero convolutions have names of their
own. The prefix `control_model.` of the released checkpoints is the business of whoever reads the file. The names of
the diffusers library are in `diffusers_layout`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.networks.base import param_shapes
from jaxdiff.networks.controlnet import ControlNet, controlnet_for, example_inputs
from jaxdiff.networks.unet import unet_plan
from jaxdiff.pretrained import compvis
from jaxdiff.pretrained.torch_layout import CONV, Entry, export_params, import_params, layer
from jaxdiff.types import Params

WAY_UP = ("up_", "norm_out/", "conv_out/")


def controlnet_from_config(config: Mapping[str, Any]) -> ControlNet:
    """The ControlNet of a `cldm.ControlNet` configuration: a CompVis UNet's, with `hint_channels`.

    Raises:
      ValueError: an unknown setting, or one this network does not have.
    """
    if "hint_channels" not in config:
        raise ValueError("the ControlNet configuration lacks 'hint_channels'")
    config = {"out_channels": config.get("in_channels", 3), **config}
    unet = compvis.unet_from_config({key: value for key, value in config.items() if key != "hint_channels"})
    return controlnet_for(unet, hint_channels=config["hint_channels"])


def import_controlnet(state: Mapping[str, Any], controlnet: ControlNet, *, linear_projection: bool = False) -> Params:
    """Parameters of a ControlNet from a state dict of the original release, without prefix.

    Args:
      state: arrays by name.
      controlnet: the network, e.g. from `controlnet_for` or `controlnet_from_config`.
      linear_projection: `use_linear_in_transformer` of the release (Stable Diffusion 2).

    Returns:
      The parameter tree, NumPy float32.

    Raises:
      ValueError: tensors are missing, unexpected or wrongly shaped; all of them are named.
    """
    entries = controlnet_entries(controlnet, linear_projection)
    return import_params(entries, state, param_shapes(controlnet, *example_inputs(controlnet)))


def export_controlnet(
    params: Params, controlnet: ControlNet, *, linear_projection: bool = False
) -> dict[str, np.ndarray]:
    """The state dict of a parameter tree: the exact inverse of `import_controlnet`."""
    return export_params(controlnet_entries(controlnet, linear_projection), params)


def controlnet_entries(controlnet: ControlNet, linear_projection: bool) -> list[Entry]:
    """Every leaf of a ControlNet with its name in the original release."""
    copied = compvis.unet_entries(controlnet, linear_projection, False)
    entries = [entry for entry in copied if not entry.path.startswith(WAY_UP)]
    last = 2 * (len(controlnet.hint_widths) - 1) + 1
    for i in range(last):
        entries += layer(f"hint/conv_{i}", f"input_hint_block.{2 * i}", CONV)
    entries += layer("hint/conv_out", f"input_hint_block.{2 * last}", CONV)
    for i, name in enumerate(("conv_in", *(step.name for step in unet_plan(controlnet).down))):
        entries += layer(f"{name}_zero", f"zero_convs.{i}.0", CONV)
    return entries + layer("mid_zero", "middle_block_out.0", CONV)
