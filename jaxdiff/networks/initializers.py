"""How parameters start: small declared rules that both NumPy and JAX can execute.

A rule is a frozen object. Called with a JAX key it is an ordinary Flax initialiser, so `module.init` works. Read with
`declared_rules` it says what it would do, and `networks.base.init_params` then draws every leaf on the host, which
takes milliseconds where compiling one random draw per leaf takes many seconds. A layer rule maps the fan-in and
fan-out of a layer to the rules of its kernel and its bias. Nothing here looks at the name of a parameter.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.core import meta

from jaxdiff.types import Key

_DECLARING: contextvars.ContextVar[bool] = contextvars.ContextVar("declaring", default=False)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one parameter array starts. Subclasses say how to draw it with NumPy and with JAX."""

    def host(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Draws float32 values with NumPy."""
        raise NotImplementedError

    def device(self, key: Key, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Draws the same distribution (other numbers) with JAX."""
        raise NotImplementedError

    def __call__(self, key: Key, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
        """The signature of a Flax initialiser."""
        if _DECLARING.get():
            return Declared(jnp.zeros(shape, dtype), self)
        return self.device(key, tuple(shape), dtype)


@dataclasses.dataclass(frozen=True)
class Constant(Rule):
    """Every entry equals `value`."""

    value: float

    def host(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        del generator
        return np.full(shape, self.value, np.float32)

    def device(self, key: Key, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        del key
        return jnp.full(shape, self.value, dtype)


@dataclasses.dataclass(frozen=True)
class Uniform(Rule):
    """Uniform on [-limit, limit)."""

    limit: float

    def host(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        values = generator.random(shape, np.float32)
        values *= np.float32(2 * self.limit)
        values -= np.float32(self.limit)
        return values

    def device(self, key: Key, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -self.limit, self.limit)


@dataclasses.dataclass(frozen=True)
class Normal(Rule):
    """Normal with mean 0 and standard deviation `std`."""

    std: float = 1.0

    def host(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        values = generator.standard_normal(shape, np.float32)
        values *= np.float32(self.std)
        return values

    def device(self, key: Key, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return (self.std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


class Declared(struct.PyTreeNode, meta.AxisMetadata):
    """A parameter's shape together with the rule that fills it. Exists only inside `declared_rules`."""

    value: Any
    rule: Rule = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "Declared":
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Declared":
        del index, params
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Declared":
        del index, params
        return self


@contextlib.contextmanager
def declared_rules() -> Iterator[None]:
    """Inside, a rule called as an initialiser returns `Declared(shape, rule)` and draws nothing."""
    token = _DECLARING.set(True)
    try:
        yield
    finally:
        _DECLARING.reset(token)


ZEROS, ONES = Constant(0.0), Constant(1.0)

LayerRule = Callable[[int, int], tuple[Rule, Rule]]


def torch_default(fan_in: int, fan_out: int) -> tuple[Rule, Rule]:
    """Kernel and bias uniform on +-1/sqrt(fan_in): what PyTorch gives a convolution or a linear layer.

    Source: He et al. 2015 (arXiv:1502.01852) with negative slope sqrt(5), limit sqrt(6 / ((1 + 5) fan_in)).
    """
    del fan_out
    rule = Uniform(1 / math.sqrt(fan_in))
    return rule, rule


def fan_average(fan_in: int, fan_out: int) -> tuple[Rule, Rule]:
    """Kernel uniform with variance 2 / (fan_in + fan_out), bias 0: the layers of Ho et al. 2020 (arXiv:2006.11239)."""
    return Uniform(math.sqrt(6 / (fan_in + fan_out))), ZEROS


def fan_average_tiny(fan_in: int, fan_out: int) -> tuple[Rule, Rule]:
    """`fan_average` with the variance scaled by 1e-10: the last layer of each branch in Ho et al. 2020."""
    return Uniform(1e-5 * math.sqrt(6 / (fan_in + fan_out))), ZEROS


def zeros(fan_in: int, fan_out: int) -> tuple[Rule, Rule]:
    """Kernel and bias 0: the last layer of each branch in Dhariwal and Nichol 2021 (arXiv:2105.05233)."""
    del fan_in, fan_out
    return ZEROS, ZEROS
