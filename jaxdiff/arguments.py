"""How the command line reads its words: a parser whose every error is one line, and the types of numbers.

Which commands and options there are stands in `cli.py`.
"""

import argparse
import sys
from collections.abc import Callable

from jaxdiff.settings import UsageError, convert, hint


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, spelling hints, and no abbreviations: they break when an option is added."""

    def __init__(self, prog: str, *, description: str = "", epilog: str = ""):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, epilog=epilog, formatter_class=formatter, allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else list(args)
        commands = next((a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction)), None)
        if commands and words and not words[0].startswith("-") and words[0] not in commands:
            raise UsageError(f"unknown command {words[0]!r}; {hint(words[0], commands)}")
        known = self._option_string_actions
        for word in words[:1] if commands else words:
            name = word.partition("=")[0]
            if name.startswith("--") and name != "--" and name not in known:
                raise UsageError(f"{self.prog} has no option {name}; {hint(name, [o for o in known if o[:2] == '--'])}")
        found, rest = super().parse_known_args(words, namespace)
        if rest:
            raise UsageError(f"{self.prog} has no use for {rest[0]!r}; leave it out, or see {self.prog} --help")
        return found, rest

    def error(self, message: str):
        raise UsageError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """The type of an option that takes whole numbers from low to high."""
    wanted = f"of at least {low}" if high is None else f"from {low} to {high}"

    def parse(text: str) -> int:
        try:
            value = convert(text, int)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"expected a whole number {wanted}, got {text!r}")
        return value

    return parse


def number(low: float | None = None, high: float | None = None) -> Callable[[str], float]:
    """The type of an option that takes finite numbers, from low to high if these are given."""
    wanted = "a finite number" if low is None else f"a number from {low:g} to {high:g}"

    def parse(text: str) -> float:
        try:
            value = convert(text, float)
        except ValueError:
            value = float("nan")
        if not (low is None or low <= value) or not (high is None or value <= high) or value != value:
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
        return value

    return parse
