"""Settings as people type them: what is taken, what is refused, and what the refusal says."""

import re
from typing import Literal, Optional, Union

import pytest

from jaxdiff.settings import UsageError, convert, describe, first_line, hint, mesh_sizes, parse_settings, settings_of

TAKEN = [
    ("12", int, 12),
    ("-3", int, -3),
    ("1_000", int, 1000),
    ("1e5", int, 100_000),
    ("2.0", int, 2),
    ("123456789012345678", int, 123456789012345678),  # a float would round it
    ("1e-4", float, 1e-4),
    ("1_000.5", float, 1000.5),
    ("3", float, 3.0),
    ("True", bool, True),
    ("no", bool, False),
    ("0", bool, False),
    ("two words", str, "two words"),
    ("", str, ""),
    ("None", int | None, None),
    ("none", Optional[float], None),  # noqa: UP045
    ("5", int | None, 5),
    ("0.5", int | float, 0.5),
    ("5", Union[int, str], 5),  # noqa: UP007
    ("five", int | str, "five"),
    ("v", Literal["eps", "v"], "v"),
    ("2", Literal[1, 2], 2),
    ("1,2,3", tuple[int, ...], (1, 2, 3)),
    ("(1, 2,)", tuple[int, ...], (1, 2)),
    ("[0.5]", tuple[float, ...], (0.5,)),
    ("()", tuple[int, ...], ()),
    ("3,x", tuple[int, str], (3, "x")),
    ("1,2", tuple[int, ...] | None, (1, 2)),
]
REFUSED = [
    ("2.5", int),
    ("inf", int),
    ("nan", int),
    ("", int),
    ("ten", int),
    ("1e999999999", int),
    ("1234567890123456789", int),
    ("nan", float),
    ("inf", float),
    ("-infinity", float),
    ("1e999", float),
    ("1,5", float),
    ("2", bool),
    ("", bool),
    ("x", Literal["eps", "v"]),
    ("none", int),
    ("x", int | None),
    ("1,,2", tuple[int, ...]),
    ("1", tuple[int, int]),
    ("1,2,3", tuple[int, int]),
    ("1", dict),
    ("1", type(None)),
]


@pytest.mark.parametrize(("text", "expected", "value"), TAKEN)
def test_convert_takes(text, expected, value):
    got = convert(text, expected)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(("text", "expected"), REFUSED)
def test_convert_refuses(text, expected):
    with pytest.raises(ValueError):
        convert(text, expected)


@pytest.mark.parametrize("value", [0, -1, 7, 10**17, 1e-30, 1.5, 0.1 + 0.2, True, False, "a=b", (1, 2), (0.25,)])
def test_what_is_printed_can_be_typed(value):
    kind = tuple[type(value[0]), ...] if isinstance(value, tuple) else type(value)
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    assert convert(text, kind) == value


def test_types_in_words():
    assert describe(int | None) == "a whole number or none"
    assert describe(Literal["a", "b"]) == "one of a, b"
    assert describe(tuple[int, ...]) == "a comma-separated list (a whole number each)"
    assert describe(tuple[int, str]) == "2 comma-separated values (a whole number, text)"


def build(*, lr: float = 2e-3, num_steps: int = 10, name: str = "x", sizes: tuple[int, ...] = (1, 2), last=None):
    return lr, num_steps, name, sizes, last


def test_pairs_become_keywords():
    pairs = ["lr=1e-4", "num-steps = 5", "name=a=b", "sizes=3,4"]
    assert parse_settings(build, pairs) == {"lr": 1e-4, "num_steps": 5, "name": "a=b", "sizes": (3, 4)}
    assert parse_settings(build, ["lr=1", "lr=2"]) == {"lr": 2.0}
    assert settings_of(build) == {"lr": 2e-3, "num_steps": 10, "name": "x", "sizes": (1, 2), "last": None}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("lr", "setting 'lr' has no value; write --set lr=VALUE"),
        ("nums_steps=1", "unknown setting 'nums_steps'; did you mean 'num_steps'?"),
        ("q=1", "unknown setting 'q'; choose from: lr, num_steps, name, sizes, last"),
        ("lr=quick", "setting lr must be a finite number, got 'quick'; for example --set lr=0.002"),
        ("sizes=a", "setting sizes must be a comma-separated list (a whole number each), got 'a'"),
        ("sizes=1.5", "got '1.5'; for example --set sizes=1,2"),
        ("last=1", "setting last of type NoneType cannot be typed; edit the experiment file"),
    ],
)
def test_pairs_are_refused_with_a_remedy(pair, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        parse_settings(build, [pair])


def test_hint_names_the_nearest_or_all():
    assert hint("heum", ["ddim", "heun"]) == "did you mean 'heun'?"
    assert hint("zzz", ["ddim", "heun"]) == "choose from: ddim, heun"


def test_mesh_sizes():
    assert mesh_sizes("") == {}
    assert mesh_sizes("data=4, fsdp=2") == {"data": 4, "fsdp": 2}
    with pytest.raises(UsageError, match="unknown mesh axis 'tensr'; did you mean 'tensor'"):
        mesh_sizes("tensr=2")
    with pytest.raises(UsageError, match="must be a whole number of at least 1, got '²'"):
        mesh_sizes("data=²")


def test_messages_stay_on_one_line():
    assert first_line(ValueError("a\n  b")) == "a b"
    assert first_line(ValueError()) == "ValueError"
    assert len(first_line(ValueError("x" * 5000))) == 1004
