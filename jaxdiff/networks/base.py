"""From a Flax module to what the rest of the library speaks: a parameter tree and a `Network`.

`init_params` fills the tree on the host with a counter-based generator (Philox), `as_network` turns `module.apply`
into the `Network` protocol, `check_cond` refuses conditioning that a network would ignore. No noise level and no
schedule is known here.
"""

import contextlib
import difflib
import hashlib
import re
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxdiff.networks import attention
from jaxdiff.networks.initializers import Declared, declared_rules
from jaxdiff.types import Array, Cond, Key, Network, Params


def declared_params(module: nn.Module, *example_inputs: Any) -> Params:
    """Shapes of a module's parameters, each with its rule, without computing or allocating anything.

    Args:
      module: a Flax module whose parameters start by `initializers.Rule`s.
      *example_inputs: arrays or `jax.ShapeDtypeStruct`s for `module.__call__`.

    Returns:
      The parameter tree with a `Declared(ShapeDtypeStruct, rule)` at each leaf.

    Raises:
      ValueError: a parameter starts by a plain function, which NumPy cannot execute.
    """
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), example_inputs)
    with declared_rules():
        tree = jax.eval_shape(lambda *inputs: module.init(jax.random.key(0), *inputs)["params"], *shapes)
    plain = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda a: isinstance(a, Declared))
        if not isinstance(leaf, Declared)
    ]
    if plain:
        raise ValueError(
            f"{len(plain)} parameters of {type(module).__name__} ({', '.join(plain[:3])}) do not start by a declared "
            "rule; pass initializers.Rule objects as their initialisers, or call module.init"
        )
    return tree


def param_shapes(module: nn.Module, *example_inputs: Any) -> Params:
    """The parameter tree with a `jax.ShapeDtypeStruct` at each leaf. Takes seconds for a network of 10^9 parameters."""
    return nn.unbox(declared_params(module, *example_inputs))


def num_params(tree: Params) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in jax.tree.leaves(tree))


def _draw(words: np.ndarray, declared: dict[str, Declared]) -> dict[str, np.ndarray]:
    """Fills each leaf from a Philox stream: key from the JAX key's words, counter from the leaf's path."""
    seed = np.zeros(4, np.uint32)
    words = words.astype(np.uint32).reshape(-1)[:4]
    seed[: words.size] = words
    drawn = {}
    for path, leaf in declared.items():
        counter = np.frombuffer(hashlib.sha256(path.encode()).digest(), np.uint64).copy()
        counter[0] = 0  # the generator counts here, so streams of different paths do not overlap
        generator = np.random.Generator(np.random.Philox(key=seed.view(np.uint64), counter=counter))
        drawn[path] = leaf.rule.host(generator, leaf.value.shape).astype(leaf.value.dtype)
    return drawn


def init_params(module: nn.Module, key: Key, *example_inputs: Any) -> Params:
    """Initial parameters of a module, drawn on the host by each parameter's own rule.

    The numbers depend on the key and on the path of the parameter alone: not on other parameters, not on the number
    of devices, and they are the same under `jax.jit` as outside. They differ from those of `module.init`, which
    follows the same rules with JAX's generator.

    Args:
      module: a Flax module whose parameters start by `initializers.Rule`s.
      key: a JAX key; up to 128 bits of it are used.
      *example_inputs: arrays or `jax.ShapeDtypeStruct`s for `module.__call__`; only shapes and dtypes matter.

    Returns:
      A nested dict of arrays.

    Raises:
      ValueError: a parameter starts by a plain function, which NumPy cannot execute.
    """
    tree = declared_params(module, *example_inputs)
    declared: Any = traverse_util.flatten_dict(tree, sep="/", is_leaf=lambda _, a: isinstance(a, Declared))
    words = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    if isinstance(words, jax.core.Tracer):
        shapes = {path: leaf.value for path, leaf in declared.items()}
        drawn = jax.pure_callback(lambda w: _draw(np.asarray(w), declared), shapes, words, vmap_method="sequential")
    else:
        drawn = jax.device_put(_draw(np.asarray(words), declared))
    return traverse_util.unflatten_dict(drawn, sep="/")


def grown(params: Params, teacher_params: Params) -> Params:
    """The student's start: the teacher's parameters, and `params` where the teacher has none (the layers that see w).

    With those layers zero, as a UNet's `guidance_dim` starts, the student is the unguided teacher at first.

    Args:
      params: fresh parameters of the student.
      teacher_params: of the teacher.

    Raises:
      ValueError: if the teacher has parameters that the student lacks, or of another shape.
    """
    known = dict(jax.tree_util.tree_leaves_with_path(teacher_params))

    def pick(path, leaf):
        old = known.pop(path, leaf)
        if jnp.shape(old) != jnp.shape(leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"{name} is {jnp.shape(old)} in the teacher and {jnp.shape(leaf)} in the student")
        return jnp.array(old)

    student = jax.tree_util.tree_map_with_path(pick, params)
    if known:
        name = jax.tree_util.keystr(next(iter(known)), simple=True, separator="/")
        raise ValueError(f"the student lacks {name!r} of the teacher; build it with all that the teacher has")
    return student


def _misfit(message: str) -> str:
    """What Flax says about parameters that a module cannot take, in words of ours."""
    remedy = "build the network as the one that the parameters are of"
    if found := re.match(r'For parameter "(.+?)" in "/(.*?)",.* shape (\(.*?\)),.* shape (\(.*?\))\.', message):
        name, scope, wanted, got = found.groups()
        return f"parameter {scope}/{name} is {got}, the network takes {wanted}; {remedy}"
    if found := re.match(r'Could not find parameter named "(.+?)" in scope "/(.*?)"', message):
        name, scope = found.groups()
        return f"parameter {scope}/{name} of the network is missing; {remedy}"
    return f"{message}; {remedy}"


def as_network(module: nn.Module, *, forward_mode: bool = False) -> Network:
    """The module's `apply` as a `Network`: (params, x_t, t, cond, *, train, key) -> [B, ...].

    Args:
      module: a Flax module called as (x_t, t, cond, *, train).
      forward_mode: whether `jax.jvp` will go through it; see `attention.forward_mode`.

    Returns:
      A pure function. `key` feeds dropout and is needed only where `train` is true and the module drops something. It
      raises a ValueError, while tracing, for parameters that are not the module's.
    """

    def network(
        params: Params, x_t: Array, t: Array, cond: Cond, *, train: bool = False, key: Key | None = None
    ) -> Array:
        rngs = None if key is None else {"dropout": key}
        with attention.forward_mode() if forward_mode else contextlib.nullcontext():
            try:
                out: Any = module.apply({"params": params}, x_t, t, cond, train=train, rngs=rngs)
            except (flax.errors.ScopeParamShapeError, flax.errors.ScopeParamNotFoundError) as error:
                raise ValueError(_misfit(str(error))) from error
        return out

    return network


def check_cond(cond: Cond, needed: set[str], known: set[str], network: str) -> None:
    """Requires exactly the conditioning a network is built for, so that none is silently ignored.

    Args:
      cond: the conditioning as given.
      needed: keys this network uses.
      known: keys any configuration of the network could use.
      network: its name, for the message.

    Raises:
      ValueError: a key is missing, not used by this network, or unknown.
    """
    for name in sorted(set(cond) - needed):
        if name in known:
            raise ValueError(
                f"cond has {name!r} but this {network} is not built for it; drop it or configure the network"
            )
        close = difflib.get_close_matches(name, sorted(known), 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"cond has {name!r}, which {network} does not know (it knows {sorted(known)}){hint}")
    missing = sorted(needed - set(cond))
    if missing:
        raise ValueError(f"this {network} needs cond[{missing[0]!r}], got cond with keys {sorted(cond)}")
