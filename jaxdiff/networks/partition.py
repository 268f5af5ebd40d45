"""How our networks are split over the tensor axis of a mesh: rules (pattern of the leaf's path, axis per dimension).

Column then row: the first layer of a pair is split over its outputs, the second over its inputs, so that everything
between them stays on its device and one sum over devices ends the pair. Norms and biases between the two are split
with the columns. Whatever no rule names is computed in full on every device of the axis. The form of a rule is that of
`training/sharding.Partition`.

Source: Shoeybi et al. 2019 (arXiv:1909.08053) section 3, for the pairs.
"""

_RES_BLOCK = r"(^|/)(down|mid|up)_\w+/"
_TRANSFORMER = r"_attention/block_\d+/"

# Residual blocks (conv_in, norm_out, conv_out and what the time adds between them), and in spatial transformers the
# heads and the feed-forward layer. Attention blocks stay whole: the columns of their fused q, k, v are not sorted by
# head. The widths of all levels, and in transformers the heads, should divide by the axis.
UNET: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (_RES_BLOCK + "conv_in/kernel$", (None, None, None, "tensor")),
    (_RES_BLOCK + "conv_in/bias$", ("tensor",)),
    (_RES_BLOCK + "time/kernel$", (None, "tensor")),
    (_RES_BLOCK + "time/bias$", ("tensor",)),
    (_RES_BLOCK + "norm_out/(scale|bias)$", ("tensor",)),
    (_RES_BLOCK + "conv_out/kernel$", (None, None, "tensor", None)),
    (_TRANSFORMER + r"\w+_attention/[qkv]/kernel$", (None, "tensor")),
    (_TRANSFORMER + r"\w+_attention/out/kernel$", ("tensor", None)),
    (_TRANSFORMER + "feed_forward_in/kernel$", (None, "tensor")),
    (_TRANSFORMER + "feed_forward_in/bias$", ("tensor",)),
    (_TRANSFORMER + "feed_forward_out/kernel$", ("tensor", None)),
)
