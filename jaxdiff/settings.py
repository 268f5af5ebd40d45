"""Experiment files: finding `build`, and turning `--set name=value` into its keywords.

An experiment is a Python file with a function `build(*, name: type = value, ...) -> Experiment`. Its signature is the
whole configuration: names, types and defaults are read from it, so there is no second place to declare an option.
Numbers are typed as people write them (1e5, 1_000) and are finite: a NaN or an infinity could not be recorded as JSON.
"""

import difflib
import importlib.util
import inspect
import math
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterable
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal

Build = Callable[..., Any]
AXES = ("data", "fsdp", "tensor")
MOST_DIGITS = 18


class UsageError(ValueError):
    """Something the user can put right. The message is one line: what was got, what was expected, the remedy."""


def hint(name: str, known: Iterable[str]) -> str:
    """'did you mean ...?' for a misspelt name, or a list of the known ones."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"choose from: {', '.join(known)}"


def load_build(path: str | Path) -> Build:
    """The `build` function of an experiment file.

    Raises:
      UsageError: if the file is missing, is not Python, fails to import, or has no `build` whose settings have names.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"experiment file {path} is a folder; give a .py file with a function build(...)")
    if not path.is_file():
        near = [str(p) for p in sorted(path.parent.glob("*.py"))] if path.parent.is_dir() else []
        remedy = hint(str(path), near) if near else "give the path of a file such as experiments/digits_ddpm.py"
        raise UsageError(f"experiment file {path} does not exist; {remedy}")
    if path.suffix != ".py":
        raise UsageError(f"experiment file {path} is not Python; expected a .py file with a function build(...)")
    name = f"jaxdiff_experiment_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"experiment file {path} cannot be imported: {reason}; mend the file") from error
    finally:
        sys.path.pop(0)
    build = getattr(module, "build", None)
    if not callable(build):
        raise UsageError(f"experiment file {path} has no function build(...); add one that returns an Experiment")
    for parameter in inspect.signature(build).parameters.values():
        if parameter.kind not in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            raise UsageError(
                f"experiment file {path}: build(...) takes {parameter}, expected settings with names and defaults; "
                "write each as name: type = value"
            )
    return build


def settings_of(build: Build) -> dict[str, Any]:
    """Every setting of `build` with its default; those without a default are left out."""
    parameters = inspect.signature(build).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}


def parse_settings(build: Build, pairs: Iterable[str]) -> dict[str, Any]:
    """`["lr=1e-4", "smoke=true"]` as keywords of `build`, converted to the annotated types.

    Raises:
      UsageError: for a pair without "=", a name that `build` does not have, a value of another type, or a setting
        without a default that is not among the pairs.
    """
    parameters = inspect.signature(build).parameters
    annotations = _annotations(build)
    settings = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not separator:
            raise UsageError(f"setting {pair!r} has no value; write --set {name}=VALUE")
        if name not in parameters:
            raise UsageError(f"unknown setting {name!r}; {hint(name, parameters)}")
        default = None if parameters[name].default is inspect.Parameter.empty else parameters[name].default
        expected = annotations.get(name, type(default))
        if not _typed(expected):
            raise UsageError(
                f"setting {name} of type {describe(expected)} cannot be typed; edit the experiment file, or annotate "
                f"{name} as int, float, bool, str, Literal[...], tuple or a union of these"
            )
        try:
            settings[name] = convert(text.strip(), expected)
        except ValueError:
            raise UsageError(
                f"setting {name} must be {describe(expected)}, got {text.strip()!r}; "
                f"for example --set {name}={example(default)}"
            ) from None
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in settings:
            raise UsageError(f"setting {name} has no default and was not given; add --set {name}=VALUE")
    return settings


def convert(text: str, expected: Any) -> Any:
    """`text` as a value of type `expected`.

    Args:
      text: as typed. Whole numbers may be written 1_000 or 1e5, up to 18 digits; booleans true, yes, 1 or false, no, 0;
        tuples as 1,2,3 or (1, 2, 3); None as none.
      expected: int, float, bool, str, Literal, tuple, or a union, whose members are tried in order.

    Raises:
      ValueError: if it is none. NaN and infinities are no numbers here.
    """
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is Literal:
        for choice in arguments:
            if text == str(choice):
                return choice
        raise ValueError(text)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and text.lower() == "none":
            return None
        for option in arguments:
            try:
                return convert(text, option)
            except ValueError:
                continue
        raise ValueError(text)
    if origin is tuple:
        inside = text.strip().strip("()[]").strip().removesuffix(",")
        parts = [part.strip() for part in inside.split(",")] if inside else []
        kinds = [arguments[0]] * len(parts) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(parts):
            raise ValueError(text)
        return tuple(convert(part, kind) for part, kind in zip(parts, kinds, strict=True))
    if expected is bool:
        if text.lower() in ("true", "yes", "1"):
            return True
        if text.lower() in ("false", "no", "0"):
            return False
        raise ValueError(text)
    if expected is int:
        return _whole(text)
    if expected is float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(text)
        return value
    if expected is str:
        return text
    raise ValueError(text)


def _whole(text: str) -> int:
    try:
        value = Decimal(text)  # exact where float would round, and takes 1e5 and 1_000
    except InvalidOperation:
        raise ValueError(text) from None
    if not value.is_finite() or value.adjusted() >= MOST_DIGITS or value != int(value):
        raise ValueError(text)
    return int(value)


def _typed(expected: Any) -> bool:
    """Whether a value of this type can be written as text."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is Literal:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_typed(a) for a in arguments if a is not type(None))
    if origin is tuple:
        return all(_typed(a) for a in arguments if a is not Ellipsis)
    return expected in (int, float, bool, str)


def _annotations(build: Build) -> dict[str, Any]:
    try:
        return typing.get_type_hints(build)
    except NameError as error:
        raise UsageError(f"build(...) is annotated with a type that is not defined: {error}; import it") from error


def describe(expected: Any) -> str:
    """A type in words a person types: 'a whole number', 'true or false', one of a list."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if a is type(None) else describe(a) for a in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a comma-separated list ({describe(arguments[0])} each)"
    if origin is tuple:
        return f"{len(arguments)} comma-separated values ({', '.join(describe(a) for a in arguments)})"
    words = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
    return words.get(expected, getattr(expected, "__name__", str(expected)))


def mesh_sizes(text: str) -> dict[str, int]:
    """`data=4,fsdp=2` as {"data": 4, "fsdp": 2}.

    Raises:
      UsageError: for an unknown axis, one given twice, or a size that is not a whole number of at least 1.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        axis, _, size = (word.strip() for word in part.partition("="))
        if axis not in AXES:
            raise UsageError(f"unknown mesh axis {axis!r}; {hint(axis, AXES)}")
        if axis in sizes:
            raise UsageError(f"mesh axis {axis} is given twice in {text!r}; give it once")
        if not size.isdecimal() or int(size) < 1:
            raise UsageError(f"mesh axis {axis} must be a whole number of at least 1, got {size!r}; write {axis}=2")
        sizes[axis] = int(size)
    return sizes


def example(value: Any) -> str:
    """A value as it would be typed after `--set name=`."""
    return ",".join(str(v) for v in value) if isinstance(value, tuple) else str(value).lower()


def build_experiment(path: str | Path, pairs: Iterable[str] = ()) -> tuple[Any, dict[str, Any]]:
    """Loads a file, applies the settings and builds the experiment; also returns all settings, defaults included.

    Raises:
      UsageError: for everything the user can put right, including what `build` itself refuses.
    """
    build = load_build(path)
    settings = {**settings_of(build), **parse_settings(build, pairs)}
    return call_build(build, path, settings), settings


def call_build(build: Build, path: str | Path, settings: dict[str, Any]) -> Any:
    """`build(**settings)`, with whatever it raises as a UsageError that names the file."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            experiment = build(**settings)
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(f"{Path(path).name}: {first_line(error)}") from error
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"{Path(path).name}: build(...) failed with {type(error).__name__}: {first_line(error)}; "
            "mend the file or its settings"
        ) from error
    for warning in caught:  # what led to a refusal is in its message; NumPy's warnings would only stand before it
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return experiment


def first_line(error: BaseException) -> str:
    """An exception's message on one line, cut after 1000 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 1000 else text[:1000] + " ..."
