"""Discriminators made of a diffusion backbone, which can start from the weights of a trained one.

`UNetDiscriminator` (SIDDM, UFOGen) judges an image as a whole and pixel by pixel and keeps the UNet's own output;
`FeatureDiscriminator` (APT, and any backbone that returns features) reads tokens at chosen depths through heads of one
learned query each. New heads end in zeros, so that a discriminator starts undecided. Losses and penalties are not here;
neither is any schedule: noise is added before, by whoever calls.

Source: Xu et al. 2023 (arXiv:2306.12511) and Xu et al. 2023 (arXiv:2311.09257) for the UNet; Lin et al. 2025
(arXiv:2501.08316) section 3 for the heads on features.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxdiff.networks.base import init_params
from jaxdiff.networks.initializers import ONES, Normal, fan_average, torch_default, zeros
from jaxdiff.networks.layers import Conv, Dense, GroupNorm, LayerNorm
from jaxdiff.networks.unet import UNet, unet_plan
from jaxdiff.types import Cond, Key, Params

EPS = 1e-6


class Judgement(NamedTuple):
    """What a UNet discriminator says.

    Attributes:
      sample: [B] logits of whole images, from the middle of the UNet; positive for "real".
      pixel: [B, H, W] logits of pixels, from its last features.
      image: [B, H, W, out_channels], the UNet's own output: asked to denoise, it regularises the discriminator.
      regression: [B, H, W, in_channels] of a further head (SIDDM's estimate of x_t from x_s), or None.
    """

    sample: Array
    pixel: Array
    image: Array
    regression: Array | None


class UNetDiscriminator(nn.Module):
    """A UNet with logit heads on its middle and on its last features.

    Called as a network it gives one logit an example, the sum of the sample's and the mean of the pixels'; `judge`
    gives all it knows.

    Attributes:
      backbone: the UNet; its parameters are the subtree "backbone", those of a diffusion model.
      regression: whether there is a head for `Judgement.regression`.
    """

    backbone: UNet
    regression: bool = False

    def __call__(
        self, x: Float[Array, "b h w c"], t: Float[Array, " b"], cond: Cond, *, train: bool = False
    ) -> Float[Array, " b"]:
        """One logit [B] float32 for each image; arguments as for the UNet."""
        found = self.judge(x, t, cond, train=train)
        return found.sample + found.pixel.mean((1, 2))

    @nn.compact
    def judge(self, x: Float[Array, "b h w c"], t: Float[Array, " b"], cond: Cond, *, train: bool = False) -> Judgement:
        """Everything, float32; as a function, `as_judge`.

        Args:
          x: [B, H, W, in_channels], noised as the UNet expects.
          t: [B] times, as the UNet is to embed them.
          cond: what the UNet asks for.
          train: whether its dropout is on; then a "dropout" key is needed.
        """
        unet = self.backbone
        image, features = unet(x, t, cond, train=train, return_features=True)

        def ready(name: str, feature: str) -> Array:
            return jax.nn.silu(GroupNorm(unet.norm_groups, unet.norm_eps, name=f"{name}_norm")(features[feature]))

        last = unet_plan(unet).up[-1].name
        sample = Dense(1, zeros, name="sample_logit")(ready("sample", "mid").mean((1, 2)))[:, 0]
        pixel = Conv(1, rule=zeros, name="pixel_logit")(ready("pixel", last))[..., 0]
        regression = None
        if self.regression:
            regression = Conv(unet.in_channels, rule=torch_default, name="regression")(ready("regression", last))
        return Judgement(sample, pixel, image, regression)


def as_judge(module: UNetDiscriminator) -> Callable[..., Judgement]:
    """The module's `judge` as a pure function, called like a `Network`: (params, x, t, cond, *, train, key)."""

    def judge(
        params: Params, x: Array, t: Array, cond: Cond, *, train: bool = False, key: Key | None = None
    ) -> Judgement:
        rngs = None if key is None else {"dropout": key}
        found: Any = module.apply({"params": params}, x, t, cond, train=train, rngs=rngs, method="judge")
        return found

    return judge


class FeatureDiscriminator(nn.Module):
    """A diffusion backbone and one logit read from its features.

    Attributes:
      backbone: any module called as (x, t, cond, *, train, return_features=True) -> (output, features by name); its
        parameters are the subtree "backbone". Its last layers are computed by nobody but keep their place.
      taps: names of the features to read, [B, N, D] tokens or [B, H, W, C] images.
      num_heads: heads of attention of each head; divides every width.
    """

    backbone: nn.Module
    taps: Sequence[str]
    num_heads: int = 1

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b ..."],
        t: Float[Array, " b"],
        cond: Cond,
        *,
        train: bool = False,
        mask: Bool[Array, "b n"] | None = None,
    ) -> Float[Array, " b"]:
        """One logit [B] float32, positive for "real".

        Args:
          x: [B, ...], as the backbone takes it.
          t: [B] times, as the backbone is to embed them.
          cond: what the backbone asks for.
          train: whether dropout is on in the backbone.
          mask: [B, N] true for tokens to read, where examples are padded.

        Raises:
          ValueError: the backbone has no feature of a name in taps.
        """
        _, features = self.backbone(x, t, cond, train=train, return_features=True)
        if missing := [name for name in self.taps if name not in features]:
            raise ValueError(f"the backbone has no feature {missing[0]!r} to read; it has {sorted(features)}")
        tokens = [features[name].reshape(x.shape[0], -1, features[name].shape[-1]) for name in self.taps]
        return FeatureHeads(self.num_heads, name="heads")(tokens, mask)


class FeatureHeads(nn.Module):
    """One logit from several sets of tokens: a query head on each, then a norm and a linear map of all of them."""

    num_heads: int = 1

    @nn.compact
    def __call__(
        self, taps: Sequence[Float[Array, "b _ _"]], mask: Bool[Array, "b n"] | None = None
    ) -> Float[Array, " b"]:
        read = [QueryHead(self.num_heads, name=f"head_{i}")(tokens, mask) for i, tokens in enumerate(taps)]
        h = LayerNorm(EPS, name="norm")(jnp.concatenate(read, axis=-1))
        return Dense(1, zeros, name="logit")(h)[:, 0]


class QueryHead(nn.Module):
    """[B, N, D] tokens to [B, D]: a learned query attends to them, then comes an MLP; both are added to what they read.

    Float32 whatever the tokens are.
    """

    num_heads: int = 1

    @nn.compact
    def __call__(self, tokens: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None) -> Float[Array, "b d"]:
        b, n, width = tokens.shape
        if width % self.num_heads:
            raise ValueError(f"features of width {width} do not split into {self.num_heads} heads; change num_heads")

        def project(name: str, a: Array) -> Array:
            return Dense(width, fan_average, use_bias=False, name=name)(a).reshape(*a.shape[:-1], self.num_heads, -1)

        query = self.param("query", Normal(0.02), (width,), jnp.float32)
        y = RMSNorm(name="norm_tokens")(tokens.astype(jnp.float32))
        q_hd = RMSNorm(name="norm_q")(project("q", query))
        k_bnhd, v_bnhd = RMSNorm(name="norm_k")(project("k", y)), project("v", y)
        # `attention.attention` takes no mask, and with one query there is nothing to gain from it.
        scores = jnp.einsum("hd,bnhd->bhn", q_hd, k_bnhd) * q_hd.shape[-1] ** -0.5
        if mask is not None:
            scores = jnp.where(mask[:, None, :], scores, -jnp.inf)
        h = jnp.einsum("bhn,bnhd->bhd", jax.nn.softmax(scores), v_bnhd).reshape(b, width)
        h = query[None] + Dense(width, fan_average, name="out")(h)
        z = Dense(4 * width, fan_average, name="mlp_in")(RMSNorm(name="norm_mlp")(h))
        return h + Dense(width, fan_average, name="mlp_out")(jax.nn.gelu(z))


class RMSNorm(nn.Module):
    """Divides the last axis by its root mean square, in float32, then scales it.

    Source: Zhang and Sennrich 2019 (arXiv:1910.07467) eq. 4.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        scale = self.param("scale", ONES, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPS)
        return x * scale.reshape((1,) * (x.ndim - 1) + (-1,))


def tapped_blocks(depth: int) -> tuple[str, str, str]:
    """The features APT reads, after blocks 16, 26 and 36 of 36, for a transformer of another depth.

    Raises:
      ValueError: the depth is too small for three different blocks.
    """
    taps = tuple(round(depth * block / 36) - 1 for block in (16, 26, 36))
    if len(set(taps)) < 3 or taps[0] < 0:
        raise ValueError(f"a transformer of depth {depth} has no three blocks to read; name the taps yourself")
    return f"block_{taps[0]}", f"block_{taps[1]}", f"block_{taps[2]}"


def on_backbone(discriminator: nn.Module, backbone_params: Params, *example: Any) -> Callable[[Key, Any], Params]:
    """`init_discriminator` of a method: new heads over a copy of a trained diffusion network's parameters.

    Args:
      discriminator: a `UNetDiscriminator` or `FeatureDiscriminator`.
      backbone_params: parameters of the network it is built on.
      *example: (x, t, cond) as it is called with, of any batch size.

    Returns:
      (key, batch) -> params; the batch is not looked at.

    Raises:
      ValueError: when called, if the trees of the backbone differ in a name or a shape.
    """

    def init(key: Key, batch: Any) -> Params:
        del batch
        return from_backbone(init_params(discriminator, key, *example), jax.tree.map(jnp.array, backbone_params))

    return init


def from_backbone(params: Params, backbone_params: Params) -> Params:
    """The discriminator's parameters with those of a trained diffusion network in its backbone.

    Args:
      params: fresh parameters of a `UNetDiscriminator` or `FeatureDiscriminator`.
      backbone_params: parameters of the network it is built on. They are not copied.

    Returns:
      A new tree; heads are those of `params`.

    Raises:
      ValueError: the trees of the backbone differ in a name or a shape.
    """

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves: Any = traverse_util.flatten_dict(tree, sep="/")
        return {path: tuple(leaf.shape) for path, leaf in leaves.items()}

    expected, got = shapes(params["backbone"]), shapes(backbone_params)
    for path in sorted(expected.keys() | got.keys()):
        if expected.get(path) != got.get(path):
            raise ValueError(
                f"these parameters are not those of the backbone: {path} is {got.get(path, 'not there')}, expected "
                f"{expected.get(path, 'none')}; build the discriminator on the network that was trained"
            )
    return {**params, "backbone": backbone_params}
