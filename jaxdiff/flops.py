"""FLOPs of a traced program: two for each multiply-add of its convolutions and matrix products, the rest left out.

The count walks a jaxpr, so nothing is compiled and no device is needed. Loops of known length are multiplied out, what
`jax.checkpoint` computes twice counts twice, and of two branches the dearer one counts. Elementwise work, which XLA's
`cost_analysis` includes, is not here; in turn XLA counts the body of a loop once.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.core import Literal

# What a call keeps beside its body: functions that differentiation would use, and kernels' bookkeeping.
NOT_RUN = ("jvp_jaxpr_fun", "fwd_jaxpr_thunk")
# Equations whose inputs and results are those of their body, one by one.
CALLS = ("jit", "closed_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call")


def count_flops(jaxpr: Any, *, padding: bool = True) -> float:
    """FLOPs of the convolutions and matrix products of a jaxpr, over all devices.

    A convolution of k x k from c to o channels counts 2 k k c o for each output position, and each of its two gradients
    as much: zeros that a stride or a dilation puts between values are not multiplied. The body of a `while` loop,
    whose length is unknown, counts once.

    Args:
      jaxpr: from `jax.make_jaxpr(...)(...).jaxpr`, or the `jaxpr.jaxpr` of a traced jit.
      padding: whether products with the zeros around an image count. They do in published figures and in the usual
        2 k k c o h w; XLA leaves them out.
    """
    return _count(jaxpr, [True] * len(jaxpr.outvars), padding)[0]


def _count(jaxpr: Any, wanted: Sequence[bool], padding: bool) -> tuple[float, list[bool]]:
    """FLOPs for the wanted results, and which inputs they need. What nothing is computed from does not count."""
    total, live = 0.0, {out for out, want in zip(jaxpr.outvars, wanted, strict=True) if want and _is_variable(out)}
    for equation in reversed(jaxpr.eqns):
        results = [out in live for out in equation.outvars]
        if any(results) or equation.effects:
            flops, needed = _flops(equation, results, padding)
            total += flops
            live.update(v for v, need in zip(equation.invars, needed, strict=True) if need and _is_variable(v))
    return total, [variable in live for variable in jaxpr.invars]


def _flops(equation: Any, wanted: list[bool], padding: bool) -> tuple[float, list[bool]]:
    name, params, inputs = equation.primitive.name, equation.params, [True] * len(equation.invars)
    if name == "dot_general":
        (contract, _), _ = params["dimension_numbers"]
        depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contract)
        return 2.0 * depth * math.prod(equation.outvars[0].aval.shape), inputs
    if name == "conv_general_dilated":
        return _convolution(equation, padding), inputs
    if name == "cond":
        return max(_count(branch.jaxpr, wanted, padding)[0] for branch in params["branches"]), inputs
    bodies = _inner(params)
    if len(bodies) == 1 and name in CALLS:
        return _count(bodies[0], wanted, padding)
    return _times(name, params) * sum(count_flops(body, padding=padding) for body in bodies), inputs


def _is_variable(atom: Any) -> bool:
    return not isinstance(atom, Literal)


def _convolution(equation: Any, padding: bool) -> float:
    lhs, rhs = (variable.aval.shape for variable in equation.invars)
    out, params = equation.outvars[0].aval.shape, equation.params
    numbers = params["dimension_numbers"]
    pairs = 1
    for axis, (stride, pad, lhs_step, rhs_step) in enumerate(
        zip(params["window_strides"], params["padding"], params["lhs_dilation"], params["rhs_dilation"], strict=True)
    ):
        size, kernel = lhs[numbers.lhs_spec[2 + axis]], rhs[numbers.rhs_spec[2 + axis]]
        length = out[numbers.out_spec[2 + axis]]
        if padding:
            # A dilated side is the gradient of a stride: each of its values meets each tap of the kernel once.
            pairs *= kernel * (length if lhs_step == 1 else size)
        else:
            at = stride * np.arange(length)[:, None] + rhs_step * np.arange(kernel)[None, :] - pad[0]
            pairs *= int(((at >= 0) & (at <= (size - 1) * lhs_step) & (at % lhs_step == 0)).sum())
    channels = out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * rhs[numbers.rhs_spec[1]]
    return 2.0 * pairs * channels


def _times(name: str, params: Mapping[str, Any]) -> float:
    """How often the body of an equation runs."""
    if name == "scan":
        return float(params["length"])
    if name == "shard_map":  # its body is the share of one device
        return float(math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"]))
    return 1.0


def _inner(params: Mapping[str, Any]) -> list[Any]:
    """The jaxprs that an equation runs."""
    found = []
    for name, value in params.items():
        for one in value if isinstance(value, tuple | list) else (value,):
            body = getattr(one, "jaxpr", one)
            if name not in NOT_RUN and hasattr(body, "eqns"):
                found.append(body)
    return found
