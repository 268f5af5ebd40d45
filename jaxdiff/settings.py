"""Experiment files: finding `build`, and turning `--set name=value` into its keywords.

An experiment is a Python file with a function `build(*, name: type = value, ...) -> Experiment`. Its signature is the
whole configuration: names, types and defaults are read from it, so there is no second place to declare an option.
"""

import difflib
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

Build = Callable[..., Any]


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
      UsageError: if the file is missing, is not Python, fails to import, or has no `build` with keyword settings.
    """
    path = Path(path)
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
    except Exception as error:  # whatever the user's file raises
        raise UsageError(f"experiment file {path} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    build = getattr(module, "build", None)
    if not callable(build):
        raise UsageError(f"experiment file {path} has no function build(...); add one that returns an Experiment")
    return build


def settings_of(build: Build) -> dict[str, Any]:
    """Every setting of `build` with its default."""
    return {name: p.default for name, p in inspect.signature(build).parameters.items()}


def parse_settings(build: Build, pairs: Iterable[str]) -> dict[str, Any]:
    """`["lr=1e-4", "smoke=true"]` as keywords of `build`, converted to the annotated types.

    Raises:
      UsageError: for a pair without "=", a name that `build` does not have, or a value of another type.
    """
    parameters = inspect.signature(build).parameters
    annotations = typing.get_type_hints(build)
    settings = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not separator:
            raise UsageError(f"setting {pair!r} has no value; write --set {name}=VALUE")
        if name not in parameters:
            raise UsageError(f"unknown setting {name!r}; {hint(name, parameters)}")
        expected = annotations.get(name, type(parameters[name].default))
        try:
            settings[name] = convert(text.strip(), expected)
        except ValueError:
            raise UsageError(
                f"setting {name} must be {describe(expected)}, got {text.strip()!r}; "
                f"for example --set {name}={example(parameters[name].default)}"
            ) from None
    return settings


def convert(text: str, expected: Any) -> Any:
    """`text` as a value of type `expected`; ValueError if it is none."""
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
        parts = [part.strip() for part in text.strip("()[]").split(",") if part.strip()]
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
        value = float(text)
        if not value.is_integer():
            raise ValueError(text)
        return int(text.replace("_", "")) if text.replace("_", "").lstrip("+-").isdigit() else int(value)
    if expected in (float, str):
        return expected(text)
    raise ValueError(text)


def describe(expected: Any) -> str:
    """A type in words a person types: 'a whole number', 'true or false', one of a list."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if a is type(None) else describe(a) for a in arguments)
    if origin is tuple:
        return f"a comma-separated list ({describe(arguments[0])} each)"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words.get(expected, str(expected))


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
    try:
        return build(**settings), settings
    except (ValueError, TypeError, FileNotFoundError, ImportError) as error:
        raise UsageError(f"{Path(path).name}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """An exception's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__
