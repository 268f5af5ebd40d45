"""Generators of denoising diffusion GANs under the names of NVlabs/denoising-diffusion-gan.

The release numbers its modules in the order of their construction (`all_modules.7`), which is `ncsnpp_parts` without
what has no module of its own; the mapping of the latent is `z_transform`. Discriminators are in
`pretrained.ddgan_discriminators`. Files are not read here.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.networks.base import param_shapes
from jaxdiff.networks.ncsnpp import NCSNpp, Part, example_inputs, ncsnpp_parts
from jaxdiff.pretrained.ncsnpp import TORCH, common_ncsnpp, has_convolution, part_entries
from jaxdiff.pretrained.torch_layout import LINEAR, Entry, check_config, export_params, import_params, layer
from jaxdiff.types import Params

CONFIG_KEYS = frozenset(
    "not_use_tanh z_emb_dim num_channels_dae ch_mult num_res_blocks attn_resolutions dropout resamp_with_conv "
    "image_size conditional fir fir_kernel skip_rescale resblock_type progressive progressive_input embedding_type "
    "progressive_combine fourier_scale num_channels nz n_mlp centered".split()
)


def generator_from_config(config: Mapping[str, Any]) -> NCSNpp:
    """The generator of the release's command-line settings.

    Args:
      config: the settings by name, without their dashes.

    Raises:
      ValueError: an unknown or missing setting, or one this network does not have.
    """
    check_config(config, CONFIG_KEYS, "DDGAN")
    if missing := sorted({"image_size", "nz", "z_emb_dim", "n_mlp"} - set(config)):
        raise ValueError(f"the DDGAN configuration lacks {missing}")
    for name in ("conditional", "centered"):
        if not config.get(name, True):
            raise ValueError(f"only {name} True is supported, got {config[name]!r}")
    channels = config.get("num_channels", 3)
    # The script defaults to FIR resampling with this filter, the class to none.
    settings = {"fir": True, "fir_kernel": [1, 3, 3, 1], "progressive_input": "residual", **config}
    net = common_ncsnpp(settings, base_channels="num_channels_dae", image_size=config["image_size"])
    return net.clone(
        in_channels=channels,
        out_channels=channels,
        z_dim=config["nz"],
        z_features=config["z_emb_dim"],
        z_layers=config["n_mlp"] + 1,
        tanh=not config.get("not_use_tanh", False),
    )


def import_generator(state: Mapping[str, Any], net: NCSNpp, *, prefix: str = "") -> Params:
    """Parameters of `net` from a state dict of the release's generator.

    Args:
      state: arrays by name.
      net: the network, from `generator_from_config` or `ncsnpp_presets.ddgan_generator`.
      prefix: what all names begin with ("module." in checkpoints of DataParallel).

    Returns:
      The parameter tree, NumPy float32.

    Raises:
      ValueError: tensors are missing, unexpected or wrongly shaped; all of them are named.
    """
    return import_params(generator_entries(net, prefix=prefix), state, param_shapes(net, *example_inputs(net)))


def export_generator(params: Params, net: NCSNpp, *, prefix: str = "") -> dict[str, np.ndarray]:
    """The state dict of a parameter tree: the exact inverse of `import_generator`."""
    return export_params(generator_entries(net, prefix=prefix), params)


def generator_entries(net: NCSNpp, *, prefix: str = "") -> list[Entry]:
    """Every leaf of a generator with its name in the release."""
    if net.z_dim is None or net.num_classes is not None or net.augment_dim is not None:
        raise ValueError("DDGAN's generator has a latent and no labels; set z_dim alone")
    entries = []
    for i, part in enumerate(modules(net)):
        entries += part_entries(net, part, f"{prefix}all_modules.{i}", TORCH)
    for i in range(net.z_layers):
        # 0 is the scaling of the latent, and each layer is followed by its activation.
        entries += layer(f"mapping/dense_{i}", f"{prefix}z_transform.{2 * i + 1}", LINEAR)
    return entries


def modules(net: NCSNpp) -> list[Part]:
    """The parts that are modules of the release, in the order of their numbers."""
    parts = ncsnpp_parts(net)
    # Pyramids that only resize are shared functions there; resizing between levels is always a module.
    return [part for part in parts if part.kind not in ("shrink", "grow") or has_convolution(net, part)]
