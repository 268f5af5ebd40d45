"""Reads pickles as inert data: no class is found, made or called, and nothing that the file holds is run.

A pickle is a program for a small stack machine. This machine knows the instructions of protocols 2 to 5 that build
plain values. A class or function is only its name (`Name`); an object of a foreign class is an `Inert` record of what
the file says about it, which is how the callbacks and hyper-parameters in training checkpoints are got past. An
instruction to call something is obeyed only for names in a fixed table, whose entries are our own; any other is
refused by name. Instructions, nesting and numbers are limited, so that a small file cannot ask for much.

Source: the instruction set is that of the Python standard library's `pickletools`.
"""

import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxdiff.pretrained.mapped import Mapped

MAX_STEPS = 2_000_000  # instructions; a full training checkpoint of a large UNet takes some 200,000
MAX_INT_BYTES = 17  # states of random generators are 128 bits and a sign


class Name(NamedTuple):
    """A class or function that a pickle refers to, by name alone."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Inert:
    """What a pickle says of an object: whose it is, what it was made from, and what was put in."""

    __slots__ = ("args", "cls", "items", "state")

    def __init__(self, cls: Name, args: Any = (), state: Any = None):
        self.cls, self.args, self.state = cls, args, state
        self.items: dict[Any, Any] | list[Any] | None = None


Call = Callable[[tuple[Any, ...]], Any]

CONSTANTS: dict[int, Callable[[], Any]] = {
    ord("N"): lambda: None,
    0x88: lambda: True,
    0x89: lambda: False,
    ord("}"): dict,
    ord("]"): list,
    ord(")"): tuple,
    0x8F: list,  # a set; its members need not be hashed
}
NUMBERS = {ord("J"): "<i", ord("K"): "<B", ord("M"): "<H", ord("G"): ">d"}
LONGS = {0x8A: "<B", 0x8B: "<i"}
TEXTS = {ord("X"): "<I", 0x8C: "<B", 0x8D: "<Q"}
OLD_TEXTS = {ord("U"): "<B", ord("T"): "<i"}  # of Python 2: either text or bytes
BYTES = {ord("C"): "<B", ord("B"): "<I", 0x8E: "<Q", 0x96: "<Q"}
GETS = {ord("h"): "<B", ord("j"): "<I"}
PUTS = {ord("q"): "<B", ord("r"): "<I"}
TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}
MARK = object()


def load(
    file: Mapped,
    start: int,
    calls: Mapping[str, Call],
    persistent: Callable[[Any], Any] | None = None,
    steps: Iterator[int] | None = None,
) -> tuple[Any, int]:
    """The value that the pickle at a position describes.

    Text is str, bytes are views into the file, sets are lists, floats and small ints are themselves.

    Args:
      file: the bytes.
      start: where the pickle begins.
      calls: dotted name -> our stand-in, which gets the tuple of arguments.
      persistent: what stands for an object that the file keeps elsewhere.
      steps: counts down the instructions, if several pickles share one allowance.

    Returns:
      The value, and the position after the pickle.

    Raises:
      WeightsError: if the pickle is damaged, too large or calls something that is not in the table.
    """
    machine = _Machine(file, start, calls, persistent, steps or iter(range(MAX_STEPS)))
    try:
        return machine.run(), machine.at
    except (IndexError, KeyError, struct.error):  # too few values on the stack, a memo that was never filled
        raise file.error(f"the pickle is damaged before byte {machine.at}; download it again") from None


class _Machine:
    """Stack, memo and position of one pickle."""

    def __init__(self, file: Mapped, at: int, calls: Mapping[str, Call], persistent: Any, steps: Iterator[int]):
        self.file, self.at, self.calls, self.persistent, self.steps = file, at, calls, persistent, steps
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def error(self, problem: str) -> Exception:
        return self.file.error(f"the pickle {problem} before byte {self.at}: damaged, or not a weight file")

    def take(self, size: int) -> memoryview:
        taken = self.file.take(self.at, size, "a value of the pickle")
        self.at += size
        return taken

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, raw: memoryview) -> str:
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            raise self.error("holds text that is not UTF-8") from None

    def line(self) -> str:
        window = bytes(self.file.data[self.at : self.at + 256])
        end = window.find(b"\n")
        if end < 0:
            raise self.error("holds a name without an end")
        return self.text(self.take(end + 1)[:end])

    def marked(self) -> list[Any]:
        """The values above the newest mark, taken off the stack with it."""
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is MARK:
                values = self.stack[i + 1 :]
                del self.stack[i:]
                return values
        raise self.error("lacks a mark")

    def run(self) -> Any:
        stack, data = self.stack, self.file.data
        for _ in self.steps:
            code = data[self.at]
            self.at += 1
            if code in CONSTANTS:
                stack.append(CONSTANTS[code]())
            elif code in NUMBERS:
                stack.append(self.number(NUMBERS[code]))
            elif code in TEXTS:
                stack.append(self.text(self.take(self.number(TEXTS[code]))))
            elif code in BYTES:
                stack.append(self.take(self.number(BYTES[code])))
            elif code in GETS:
                stack.append(self.memo[self.number(GETS[code])])
            elif code in PUTS:
                self.memo[self.number(PUTS[code])] = self.top()
            elif code in TUPLES:
                size = TUPLES[code]
                values = tuple(stack[-size:])
                if len(values) < size or any(value is MARK for value in values):
                    raise self.error("misses a value")
                stack[-size:] = [values]
            elif code == ord("."):
                return self.pop()
            elif code in RARER:
                RARER[code](self)
            else:
                raise self.error(f"has the instruction {code:#04x}, which weight files do not use,")
        raise self.file.error(f"holds a pickle of more than {MAX_STEPS} instructions, as weights never do; refused")

    def top(self) -> Any:
        if self.stack[-1] is MARK:
            raise self.error("misses a value")
        return self.stack[-1]

    def pop(self) -> Any:
        value = self.top()
        self.stack.pop()
        return value

    def long(self, size: int) -> None:
        if not 0 <= size <= MAX_INT_BYTES:
            raise self.error(f"holds an integer of {size} bytes")
        self.stack.append(int.from_bytes(self.take(size), "little", signed=True))

    def old_text(self, size: int) -> None:
        raw = self.take(size)
        try:
            self.stack.append(str(raw, "utf-8"))
        except UnicodeDecodeError:
            self.stack.append(raw)

    def protocol(self) -> None:
        if not 2 <= (version := self.number("<B")) <= 5:
            raise self.error(f"is of protocol {version}; readable are 2 to 5")

    def stack_name(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise self.error("refers to a name that is no text")
        self.stack.append(Name(module, name))

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Inert):
            target.items = [] if target.items is None else target.items
            target = target.items
        if not isinstance(target, list):
            raise self.error(f"appends to {_kind(target)}")
        target += values

    def set_items(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Inert):
            target.items = {} if target.items is None else target.items
            target = target.items
        if not isinstance(target, dict) or len(values) % 2:
            raise self.error(f"sets items of {_kind(target)}")
        target.update((_key(k), v) for k, v in zip(values[::2], values[1::2], strict=True))

    def build(self) -> None:
        """Fills an object: the state of a foreign one is kept, attributes of a plain one are dropped."""
        state, target = self.pop(), self.top()
        if isinstance(target, Inert):
            target.state = state

    def make(self, parts: int) -> None:
        """A class makes an object (NEWOBJ): a record of it."""
        *args, cls = (self.pop() for _ in range(parts))
        if not isinstance(cls, Name):
            raise self.error(f"makes an object of {_kind(cls)}")
        self.stack.append(Inert(cls, args[-1]))

    def call(self) -> None:
        args, function = self.pop(), self.pop()
        if not isinstance(function, Name):
            raise self.file.error(f"calls {_kind(function)} instead of a tensor: refused, nothing was run")
        if str(function) not in self.calls:
            raise self.file.error(f"refers to {function}, which is not a tensor: refused, nothing was run")
        if not isinstance(args, tuple):
            raise self.error(f"calls {function} with {_kind(args)}")
        self.stack.append(self.calls[str(function)](args))

    def refuse_old_call(self) -> None:
        """INST and OBJ of protocols 0 and 1 make an object by calling its class."""
        by_line = self.file.data[self.at - 1] == ord("i")
        function = Name(self.line(), self.line()) if by_line else (self.marked() or [None])[0]
        shown = function if isinstance(function, Name) else _kind(function)
        raise self.file.error(f"refers to {shown}, which is not a tensor: refused, nothing was run")

    def refer(self) -> None:
        if self.persistent is None:
            raise self.error("refers to a stored tensor, which only torch files have,")
        self.stack.append(self.persistent(self.pop()))


RARER: dict[int, Callable[[_Machine], Any]] = {
    0x80: _Machine.protocol,
    0x95: lambda m: m.take(8) and None,  # FRAME: a hint about sizes
    ord("("): lambda m: m.stack.append(MARK),
    ord("0"): lambda m: m.stack.pop(),
    ord("1"): _Machine.marked,
    ord("2"): lambda m: m.stack.append(m.top()),
    ord("t"): lambda m: m.stack.append(tuple(m.marked())),
    ord("l"): lambda m: m.stack.append(m.marked()),
    0x91: lambda m: m.stack.append(m.marked()),  # FROZENSET
    0x94: lambda m: m.memo.__setitem__(len(m.memo), m.top()),
    ord("a"): lambda m: m.append([m.pop()]),
    ord("e"): lambda m: m.append(m.marked()),
    0x90: lambda m: m.append(m.marked()),  # ADDITEMS
    ord("s"): lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    ord("u"): lambda m: m.set_items(m.marked()),
    ord("U"): lambda m: m.old_text(m.number(OLD_TEXTS[ord("U")])),
    ord("T"): lambda m: m.old_text(m.number(OLD_TEXTS[ord("T")])),
    0x8A: lambda m: m.long(m.number(LONGS[0x8A])),
    0x8B: lambda m: m.long(m.number(LONGS[0x8B])),
    ord("c"): lambda m: m.stack.append(Name(m.line(), m.line())),
    0x93: _Machine.stack_name,
    0x81: lambda m: m.make(2),
    0x92: lambda m: m.make(3),  # NEWOBJ_EX: class, arguments, keyword arguments
    ord("R"): _Machine.call,
    ord("b"): _Machine.build,
    ord("i"): _Machine.refuse_old_call,
    ord("o"): _Machine.refuse_old_call,
    ord("Q"): _Machine.refer,
}


def _key(key: Any) -> Any:
    """A key that is safe to hash: nested tuples could exhaust the stack, so other kinds become keys of their own."""
    if isinstance(key, str | float | bool | Name | None) or (isinstance(key, int) and abs(key) < 2**63):
        return key
    return Inert(Name("", "key"), key)


def _kind(value: Any) -> str:
    """What a value is, in words that are safe to print."""
    if isinstance(value, Inert | Name):
        return f"an object of {value.cls}" if isinstance(value, Inert) else f"the name {value}"
    return f"a {type(value).__name__}"
