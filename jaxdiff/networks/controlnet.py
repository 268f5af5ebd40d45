"""ControlNet: a copy of a UNet's way down and middle that turns a picture (edges, depth, pose) into residuals.

The residuals are added to the skips and the middle of the UNet that it steers (`UNet.__call__(control=...)`). Every
layer that leads out of the copy starts at zero, so a new ControlNet changes nothing. Which network stays frozen while
the other learns is the business of a method; nothing here knows a noise level.

Source: Zhang et al. 2023 (arXiv:2302.05543) sections 3.1-3.2.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float

from jaxdiff.networks import unet as unets
from jaxdiff.networks.initializers import LayerRule, torch_default, zeros
from jaxdiff.networks.layers import Conv
from jaxdiff.networks.unet import Resample, UNet, unet_plan
from jaxdiff.types import Cond, Key, Network, Params

Control = tuple[Array, ...]


class HintEncoder(nn.Module):
    """A picture to features at the resolution of the latent: convolutions, of which all but the first width halve it.

    Attributes:
      features: output channels, the width of the UNet's first level.
      widths: channels at each resolution of the picture, finest first.
      rule: how layers start, the last one excepted, which is zero.
      dtype: compute dtype.

    Source: Zhang et al. 2023 (arXiv:2302.05543) section 3.2, with the widths of the released code.
    """

    features: int
    widths: Sequence[int] = (16, 32, 96, 256)
    rule: LayerRule = torch_default
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hint: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
        convolutions = [(self.widths[0], 1)]
        for width, wider in zip(self.widths, self.widths[1:], strict=False):
            convolutions += [(width, 1), (wider, 2)]
        h = hint
        for i, (width, stride) in enumerate(convolutions):
            h = jax.nn.silu(Conv(width, stride=stride, rule=self.rule, dtype=self.dtype, name=f"conv_{i}")(h))
        return Conv(self.features, rule=zeros, dtype=self.dtype, name="conv_out")(h)


class ControlNet(UNet):
    """The way down and the middle of a UNet, with a hint added after the first convolution and a way out at each step.

    Its fields are those of the UNet that it steers (`controlnet_for`), and so are the names of the parameters that it
    copies (`copy_encoder`); those of the way up have no meaning here.

    Attributes:
      hint_channels: channels of cond["hint"] [B, f H, f W, C], in [0, 1] for the published networks.
      hint_widths: see `HintEncoder`; f is 2^(number of widths - 1).

    Raises:
      ValueError: as `UNet`, or when called if the hint does not fit.

    Source: Zhang et al. 2023 (arXiv:2302.05543) sections 3.1-3.2.
    """

    hint_channels: int = 3
    hint_widths: Sequence[int] = (16, 32, 96, 256)

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x_t: Float[Array, "b h w c"], t: Float[Array, " b"], cond: Cond, *, train: bool = False
    ) -> Control:
        """Applies the network.

        Args:
          x_t: [B, H, W, in_channels], as the UNet gets it.
          t: [B] times, as the UNet gets them.
          cond: what the UNet gets, and "hint".
          train: whether dropout is on; then a "dropout" key is needed.

        Returns:
          The residuals in the order `UNet.__call__` takes them: one for the first convolution, one for each step of
          the way down, one for the middle; each [B, h, w, c].
        """
        _check_hint(self, x_t, cond)
        hint = cond["hint"]
        cond = {name: value for name, value in cond.items() if name != "hint"}
        h = self._first(x_t, cond)
        encoder = HintEncoder(h.shape[-1], self.hint_widths, self.layer_rule, self.dtype, name="hint")
        h = h + encoder(hint.astype(x_t.dtype))

        emb, plan = self._embed(t, cond), unet_plan(self)
        control = [self._way_out("conv_in", h)]
        for step in plan.down:
            if isinstance(step, Resample):
                h = self._resample(step, "down", h, emb, train)
            else:
                h = self._block(step, h, emb, cond, train)
            control.append(self._way_out(step.name, h))
        h = self._block(plan.mid, h, emb, cond, train)
        h = self._res_block("mid_res_out", plan.mid.channels)(h, emb, train)
        return (*control, self._way_out("mid", h))

    def _first(self, x_t: Array, cond: Cond) -> Array:
        unets.check_inputs(self, x_t, cond)
        if self.concat_channels:
            x_t = jnp.concatenate([x_t, cond["concat"].astype(x_t.dtype)], axis=-1)
        width = unets.level_channels(self, 0)
        return Conv(width, rule=self.layer_rule, dtype=self.dtype, name="conv_in")(x_t)

    def _way_out(self, name: str, h: Array) -> Array:
        return Conv(h.shape[-1], kernel_size=1, rule=zeros, dtype=self.dtype, name=f"{name}_zero")(h)


def controlnet_for(unet: UNet, *, hint_channels: int = 3, hint_widths: Sequence[int] = (16, 32, 96, 256)) -> ControlNet:
    """The ControlNet that steers a UNet.

    Raises:
      ValueError: the UNet takes a low-resolution image, which no ControlNet does.
    """
    if unet.low_res_channels:
        raise ValueError(f"a ControlNet takes no low_res image, got low_res_channels {unet.low_res_channels}; use 0")
    names = {field.name for field in dataclasses.fields(UNet)} - {"parent", "name"}
    fields = {name: getattr(unet, name) for name in names}
    return ControlNet(**fields, hint_channels=hint_channels, hint_widths=tuple(hint_widths))


def example_inputs(controlnet: ControlNet, batch: int = 1) -> tuple[Any, Any, dict[str, Any]]:
    """The smallest inputs of a ControlNet as shapes, for `init_params`."""
    x_t, t, cond = unets.example_inputs(controlnet, batch)
    factor = _hint_factor(controlnet)
    shape = (batch, factor * x_t.shape[1], factor * x_t.shape[2], controlnet.hint_channels)
    return x_t, t, {**cond, "hint": jax.ShapeDtypeStruct(shape, jnp.float32)}


def copy_encoder(params: Params, unet_params: Params) -> Params:
    """A ControlNet's parameters with everything that it shares with the UNet taken from the UNet: how training starts.

    Args:
      params: of the ControlNet, e.g. from `init_params`.
      unet_params: of the UNet it will steer.

    Returns:
      A new tree that shares no buffer with the UNet's.

    Raises:
      ValueError: a shared parameter has another shape in the UNet.
    """
    ours: Any = traverse_util.flatten_dict(params, sep="/")
    theirs: Any = traverse_util.flatten_dict(unet_params, sep="/")
    for path in ours.keys() & theirs.keys():
        if ours[path].shape != theirs[path].shape:
            raise ValueError(
                f"{path} is {ours[path].shape} in the ControlNet and {theirs[path].shape} in the UNet; "
                "build the ControlNet with controlnet_for"
            )
    tree = {path: jnp.array(theirs.get(path, value), copy=True) for path, value in ours.items()}
    return traverse_util.unflatten_dict(tree, sep="/")


def scale_control(control: Sequence[Array], scales: float | Array | Sequence[float]) -> Control:
    """Residuals times one scale, or times one each (0: that residual is off). May be traced."""
    factors = jnp.asarray(scales, jnp.float32)
    if factors.ndim and factors.shape != (len(control),):
        raise ValueError(f"scales must be one number or {len(control)}, one a residual, got shape {factors.shape}")
    factors = jnp.broadcast_to(factors, (len(control),))
    return tuple(residual * factors[i].astype(residual.dtype) for i, residual in enumerate(control))


def guess_scales(count: int) -> tuple[float, ...]:
    """Scales for sampling without a prompt: 0.825^(count - 1 - i), the middle at 1; from the released code."""
    return tuple(0.825 ** (count - 1 - i) for i in range(count))


def middle_scales(count: int) -> tuple[float, ...]:
    """Scales that leave only the residual of the middle."""
    return (*(0.0,) * (count - 1), 1.0)


def controlled_network(
    unet: UNet, controlnet: ControlNet, scales: float | Array | Sequence[float] | None = None
) -> Network:
    """UNet and ControlNet as one `Network` with parameters {"unet": ..., "controlnet": ...}.

    Args:
      unet: the steered network.
      controlnet: as `controlnet_for` builds it.
      scales: see `scale_control`; None for 1.

    Returns:
      A pure function; cond holds "hint" besides what the UNet needs.
    """

    def network(
        params: Params, x_t: Array, t: Array, cond: Cond, *, train: bool = False, key: Key | None = None
    ) -> Array:
        keys = [None, None] if key is None else list(jax.random.split(key))
        rngs = [None if k is None else {"dropout": k} for k in keys]
        control: Any = controlnet.apply({"params": params["controlnet"]}, x_t, t, cond, train=train, rngs=rngs[0])
        control = control if scales is None else scale_control(control, scales)
        rest = {name: value for name, value in cond.items() if name != "hint"}
        out: Any = unet.apply({"params": params["unet"]}, x_t, t, rest, train=train, control=control, rngs=rngs[1])
        return out

    return network


def _hint_factor(controlnet: ControlNet) -> int:
    return 2 ** (len(controlnet.hint_widths) - 1)


def _check_hint(controlnet: ControlNet, x_t: Array, cond: Cond) -> None:
    factor = _hint_factor(controlnet)
    expected = (*(factor * size for size in x_t.shape[1:3]), controlnet.hint_channels)
    if "hint" not in cond:
        raise ValueError(f"a ControlNet needs cond['hint'] [B, {', '.join(map(str, expected))}], got {sorted(cond)}")
    if cond["hint"].shape[1:] != expected:
        raise ValueError(
            f"cond['hint'] must be [B, {', '.join(map(str, expected))}] for this ControlNet and x_t, got "
            f"{list(cond['hint'].shape)}; resize the picture"
        )
