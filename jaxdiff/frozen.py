"""Samplers ahead of time: one file that draws samples without the experiment's file and without its network's code.

The file is a zip of `sample.bin` (and `guided.bin` where the method takes a guidance scale), StableHLO programs written
by `jax.export`; `weights.bin`, the arrays they need, end to end; and `about.json`: what it is, what the arrays are, and
the SHA-256 of the other members. Programs are compiled where they run, on any of the platforms they were written for.
Nothing in the file is executed but these programs, and a program that asks for the host's Python is refused.

On one platform a frozen sampler gives the bits of `generate.compiled` traced under `attention.portable()`, for the same
batch size on one device. Where the network's usual attention is another one, samples agree up to rounding. It runs on
one device and does not split its weights.
"""

import contextlib
import hashlib
import inspect
import json
import math
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from jaxdiff.generate import Dials, Generate, batches, compiled, labels_for
from jaxdiff.solvers.named import NamedSolver
from jaxdiff.training.experiment import Experiment

FORMAT = 1
PLATFORMS = ("cpu", "cuda", "tpu")
ABOUT, WEIGHTS = "about.json", "weights.bin"
PROGRAMS = {"sample": "sample.bin", "guided": "guided.bin"}
# Calls out of StableHLO that a program may make: they reach kernels of XLA and never the host's Python.
CALLS = re.compile(r"shape_assertion|Sharding|cu_threefry2x32(_ffi)?|(stablehlo|chlo|mhlo)\.\w+")


class FrozenError(ValueError):
    """A frozen sampler that cannot be made, read or run; the message is one line with the remedy."""


class Frozen(NamedTuple):
    """A sampler ahead of time.

    Attributes:
      about: what `about.json` holds: experiment, step, average, sample_shape, num_classes, solver, num_steps,
        takes_eta, guidance (whether it takes a scale), batch_size (None for any), platforms, versions, weights.
      programs: {"sample" and perhaps "guided": the exported program}.
      weights: the arrays that the programs use.
      generates: as `programs`, compiled when first called, for `generate.batches`.
    """

    about: dict[str, Any]
    programs: dict[str, Any]
    weights: tuple[Any, ...]
    generates: dict[str, Generate]


def freeze(
    experiment: Experiment,
    params: Any,
    aux: Any,
    *,
    solver: NamedSolver | None = None,
    num_steps: int | None = None,
    batch_size: int | None = None,
    platforms: Sequence[str] = PLATFORMS,
    step: int = 0,
    average: str = "raw",
) -> Frozen:
    """Writes an experiment's sampler as programs that need no code of ours.

    Args:
      experiment: whose method generates.
      params, aux: of the method, usually an average's parameters. Arrays that sampling does not use are left out.
      solver: a solver by name, or None for the method's own.
      num_steps: points of the method's grid, or None for its default.
      batch_size: examples in one call; None leaves it open until the program runs.
      platforms: of "cpu", "cuda", "rocm", "tpu".
      step: of the checkpoint, to be told in `about`.
      average: which parameters these are, to be told in `about`.

    Raises:
      FrozenError: if flatbuffers is missing, or the sampler cannot be exported with this batch size.
      ValueError: if the method cannot be sampled so.
    """
    try:
        import flatbuffers
    except ImportError:
        raise FrozenError(
            "freezing a sampler needs flatbuffers, which is not installed; pip install 'jaxdiff[export]'"
        ) from None
    del flatbuffers
    leaves, treedef = jax.tree.flatten((params, aux))
    keys = [jax.random.key_impl(leaf) if _is_key(leaf) else None for leaf in leaves]
    host = [np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf) for leaf in leaves]
    # Not jitted by itself: the program around it then sees which weights are used.
    generate = inspect.unwrap(compiled(experiment.method, solver=solver, num_steps=num_steps))
    shapes = _shapes(experiment, jax.export.symbolic_shape("b")[0] if batch_size is None else batch_size)
    takes_eta = solver is not None and solver.takes_eta
    number = jax.ShapeDtypeStruct((), jnp.float32)
    variants: dict[str, dict[str, Any]] = {"sample": {"eta": number} if takes_eta else {}}
    if experiment.num_classes is not None:
        variants["guided"] = variants["sample"] | {"guidance": number}

    def program(used: Sequence[int], numbers: dict[str, Any]) -> tuple[Any, Any]:
        """The sampler of the weights in `used`, the others being zeros, and its arguments."""

        def draw(weights, key, noise, cond, numbers):
            given = dict(zip(used, weights, strict=True))
            whole = [given.get(i, jnp.zeros(array.shape, array.dtype)) for i, array in enumerate(host)]
            whole = [jax.random.wrap_key_data(leaf, impl=k) if k else leaf for leaf, k in zip(whole, keys, strict=True)]
            dials = Dials(numbers.get("guidance"), numbers.get("eta"))
            return generate(*jax.tree.unflatten(treedef, whole), jax.random.wrap_key_data(key), noise, cond, dials)

        weights = [jax.ShapeDtypeStruct(host[i].shape, host[i].dtype) for i in used]
        return jax.jit(draw), (weights, *shapes, numbers)

    used: set[int] = set()
    for name, numbers in list(variants.items()):
        function, arguments = program(range(len(host)), numbers)
        try:
            with _portable(batch_size):
                used |= _used(function.trace(*arguments).jaxpr.jaxpr, len(host))
        except ValueError as error:
            if name == "sample" or isinstance(error, FrozenError):
                raise
            del variants[name]  # a method without guidance says so in this way
    programs = {}
    for name, numbers in variants.items():
        function, arguments = program(sorted(used), numbers)
        with _portable(batch_size):
            programs[name] = jax.export.export(function, platforms=tuple(platforms))(*arguments)
    weights = tuple(host[i] for i in sorted(used))
    about = {
        "format": FORMAT,
        "experiment": experiment.name,
        "step": step,
        "average": average,
        "sample_shape": list(experiment.sample_shape),
        "num_classes": experiment.num_classes,
        "solver": None if solver is None else solver.name,
        "num_steps": num_steps,
        "takes_eta": takes_eta,
        "guidance": "guided" in programs,
        "batch_size": batch_size,
        "platforms": list(platforms),
        "versions": {"jax": jax.__version__, "calling_convention": programs["sample"].calling_convention_version},
        "weights": [[array.dtype.name, list(array.shape)] for array in weights],
    }
    return _ready(about, programs, weights)


def run(
    frozen: Frozen,
    num: int,
    *,
    seed: int = 0,
    label: int | None = None,
    guidance: float | None = None,
    eta: float | None = None,
    batch_size: int | None = None,
) -> Iterator[np.ndarray]:
    """Draws `num` samples, batch by batch: example i has the start noise that `generate.batches` gives it.

    Args:
      frozen: from `freeze` or `load`.
      num: how many.
      seed: of everything drawn.
      label: one class, or None for all classes in turn, as `generate.labels_for`.
      guidance: classifier-free guidance scale, or None to leave the unconditional pass out.
      eta: of ddim, 0 to 1.
      batch_size: examples in one call; None for 256, or for that of a sampler frozen for one batch size.

    Returns:
      An iterator over samples [b, *sample_shape] in [-1, 1]. Arguments are checked before it is returned.

    Raises:
      FrozenError: if the sampler was not frozen for this device, or does not take guidance, eta or this batch size.
      ValueError: for a label that is none of the model's.
    """
    about = frozen.about
    labels_for(1, about["num_classes"], label)
    _check_platform(about["platforms"])
    if num < 1:
        raise FrozenError(f"the number of samples must be at least 1, got {num}")
    if guidance is not None and "guided" not in frozen.generates:
        raise FrozenError(f"{about['experiment']} was frozen without guidance, got scale {guidance:g}; leave it out")
    if eta is not None and not about["takes_eta"]:
        raise FrozenError(f"eta has no effect on this sampler, got {eta:g}; leave it out, or freeze one with ddim")
    fixed = about["batch_size"]
    if fixed and batch_size not in (None, fixed):
        raise FrozenError(f"this sampler was frozen for batches of {fixed}, got {batch_size}; leave the batch size out")
    size = fixed or batch_size or 256
    dials = Dials(
        None if guidance is None else jnp.float32(guidance), jnp.float32(eta or 0.0) if about["takes_eta"] else None
    )
    # A program for one batch size takes no shorter batches, so the last one is drawn whole and cut.
    total = -(-num // fixed) * fixed if fixed else num
    generate = frozen.generates["sample" if guidance is None else "guided"]
    parts = batches(
        generate, {"weights": jax.device_put(list(frozen.weights))}, (),
        shape=tuple(about["sample_shape"]), labels=labels_for(total, about["num_classes"], label), num=total,
        batch_size=size, seed=seed, dials=dials,
    )  # fmt: skip
    return (part[: num - i * size] for i, part in enumerate(parts))


def save(frozen: Frozen, path: str | Path, *, overwrite: bool = False) -> None:
    """Writes a frozen sampler to one file.

    Raises:
      FrozenError: if the file is there already, or its folder is not.
    """
    path = Path(path)
    if path.is_dir() or (path.exists() and not overwrite):
        raise FrozenError(f"{path} exists already; choose another name, or overwrite a file that may go")
    if not path.parent.is_dir():
        raise FrozenError(f"folder {path.parent} does not exist; make it, or choose another one")
    members: dict[str, list[Any]] = {
        PROGRAMS[name]: [bytes(program.serialize())] for name, program in frozen.programs.items()
    }
    members[WEIGHTS] = [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for array in frozen.weights]
    scratch, digests = path.with_name(f"{path.name}.new"), {}
    with zipfile.ZipFile(scratch, "w", zipfile.ZIP_STORED) as file:
        for name, chunks in members.items():
            digest = hashlib.sha256()
            with file.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
                for chunk in chunks:
                    digest.update(chunk)
                    member.write(chunk)
            digests[name] = digest.hexdigest()
        file.writestr(zipfile.ZipInfo(ABOUT), json.dumps(frozen.about | {"sha256": digests}, indent=2))
    os.replace(scratch, path)


def load(path: str | Path) -> Frozen:
    """Reads a frozen sampler, and checks that it is whole.

    Raises:
      FrozenError: if the file is missing, damaged, of a newer version, or asks for more than XLA's own kernels.
    """
    path = Path(path)
    if not path.is_file():
        raise FrozenError(f"frozen sampler {path} does not exist; make one with: jaxdiff freeze RUN --out {path}")
    try:
        with zipfile.ZipFile(path) as file:
            about = json.loads(_member(file, ABOUT))
            if about["format"] != FORMAT:
                raise FrozenError(f"{path} has format {about['format']}, expected {FORMAT}; freeze the run again")
            digests = about.pop("sha256")
            written = {name: _checked(file, PROGRAMS[name], digests) for name in _program_names(about)}
            raw = memoryview(_checked(file, WEIGHTS, digests))
        weights, start = [], 0
        for name, shape in about["weights"]:
            dtype = jnp.dtype(name)
            end = start + math.prod(shape) * dtype.itemsize
            weights.append(np.frombuffer(raw[start:end], dtype).reshape(shape))
            start = end
        if start != len(raw):
            raise ValueError(f"{WEIGHTS} has {len(raw)} bytes, expected {start}")
    except FrozenError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError, zipfile.BadZipFile) as error:
        raise FrozenError(f"{path} is damaged or no frozen sampler ({_line(error)}); make it anew") from error
    return _ready(about, {name: _program(path, program) for name, program in written.items()}, tuple(weights))


def _shapes(experiment: Experiment, size: Any) -> tuple[Any, ...]:
    """Key, noise and cond as shapes."""
    key = jax.random.key_data(jax.random.key(0))
    cond = {} if experiment.num_classes is None else {"label": jax.ShapeDtypeStruct((size,), jnp.int32)}
    noise = jax.ShapeDtypeStruct((size, *experiment.sample_shape), jnp.float32)
    return jax.ShapeDtypeStruct(key.shape, key.dtype), noise, cond


@contextlib.contextmanager
def _portable(batch_size: int | None) -> Iterator[None]:
    """Traces for any platform; what cannot be exported becomes one line."""
    # Here, not above: a sampler that is loaded must need no network code.
    from jaxdiff.networks.attention import portable

    try:
        with portable():
            yield
    except NotImplementedError as error:
        raise FrozenError(f"this sampler cannot be frozen ({_line(error)}); sample its run instead") from error
    except (jax.errors.ConcretizationTypeError, jax.errors.InconclusiveDimensionOperation) as error:
        if batch_size is not None:
            raise
        raise FrozenError(f"this sampler needs a batch size to be frozen ({_line(error)}); give one") from error


def _used(jaxpr: Any, num: int) -> set[int]:
    """Which of the first `num` inputs anything is computed from."""
    read = {variable for equation in jaxpr.eqns for variable in equation.invars if not isinstance(variable, Literal)}
    return {i for i, variable in enumerate(jaxpr.invars[:num]) if variable in read}


def _ready(about: dict[str, Any], programs: dict[str, Any], weights: tuple[Any, ...]) -> Frozen:
    return Frozen(about, programs, weights, {name: _generate(program) for name, program in programs.items()})


def _generate(program: Any) -> Generate:
    def generate(params, aux, key, noise, cond, dials):
        del aux
        numbers = {"guidance": dials.guidance_scale, "eta": dials.eta}
        numbers = {name: number for name, number in numbers.items() if number is not None}
        return program.call(params["weights"], jax.random.key_data(key), noise, cond, numbers)

    return jax.jit(generate)


def _program(path: Path, written: bytes) -> Any:
    try:
        program = jax.export.deserialize(bytearray(written))
        text = program.mlir_module()
    except Exception as error:  # whatever a reader of foreign bytes raises
        raise FrozenError(
            f"{path} holds a program that jax {jax.__version__} cannot read ({_line(error)}); freeze the run again"
        ) from error
    called = re.findall(r'stablehlo\.custom_call\s*@"?([^\s"(]+)', text)
    unknown = [name for name in called if not CALLS.fullmatch(name)]
    if unknown or len(called) != text.count("stablehlo.custom_call"):
        raise FrozenError(
            f"{path} calls {unknown[0] if unknown else 'what has no name'}, which samplers do not need; do not use it"
        )
    return program


def _program_names(about: Mapping[str, Any]) -> list[str]:
    return ["sample", "guided"] if about["guidance"] else ["sample"]


def _member(file: zipfile.ZipFile, name: str) -> bytes:
    if file.getinfo(name).compress_type != zipfile.ZIP_STORED:  # so that nothing can be larger than the file
        raise ValueError(f"{name} is compressed")
    return file.read(name)


def _checked(file: zipfile.ZipFile, name: str, digests: Mapping[str, str]) -> bytes:
    content = _member(file, name)
    if hashlib.sha256(content).hexdigest() != digests[name]:
        raise ValueError(f"{name} does not have its SHA-256")
    return content


def _check_platform(platforms: Sequence[str]) -> None:
    here = jax.default_backend()
    if here == "gpu":
        here = "rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"
    if here not in platforms:
        raise FrozenError(
            f"this sampler was frozen for {', '.join(platforms)}, and this device is {here}; freeze it for {here}"
        )


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _line(error: BaseException) -> str:
    text = str(error) if not isinstance(error, KeyError) else f"no {error.args[0]}"
    return (text.splitlines() or [type(error).__name__])[0]
