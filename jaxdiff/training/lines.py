"""A file of JSON objects, one a line, that survives kills and full disks.

A line cut short by a kill is dropped when the file is opened again. A line that cannot be written is kept and tried
again with the next one: nobody wants to lose a training run to its log. Files in a bucket cannot be appended to and are
written anew with every line. Only one process may write.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


class Lines:
    """Appends entries to a file; nothing stays open between two of them.

    Args:
      path: a `pathlib.Path`, or an `etils.epath.Path` in a bucket. The file is created or continued.
      say: gets one line when writing fails, and one when it works again.
      keep: which of the entries that are there stay; all by default.

    Raises:
      OSError: if the file that is there cannot be read or replaced. Later failures are only said.
    """

    def __init__(self, path: Any, say: Callable[[str], None], keep: Callable[[Entry], bool] = lambda entry: True):
        self._path, self._say, self._failing = path, say, False
        self._local = isinstance(path, Path)
        text = _text(path)
        kept = "".join(line + "\n" for line, entry in _parsed(text) if keep(entry))
        if kept != text:
            _replace(path, kept)
        self._whole = "" if self._local else kept
        self._pending = b""

    def append(self, entry: Mapping[str, Any]) -> None:
        """Writes one entry, and those that could not be written before; never raises for the disk's sake."""
        self._pending += json.dumps(entry).encode() + b"\n"
        self.retry()

    def retry(self) -> None:
        """Writes what could not be written before, if there is anything."""
        failures = OSError if self._local else Exception  # object stores have errors of their own
        try:
            while self._pending:
                self._pending = self._pending[self._write(self._pending) :]
        except failures as error:
            if not self._failing:
                reason = getattr(error, "strerror", None) or str(error)
                self._say(f"{self._path} cannot be written ({reason}): going on, its lines are tried again later")
            self._failing = True
            return
        if self._failing:
            self._say(f"{self._path} can be written again, no line is lost")
        self._failing = False

    def _write(self, data: bytes) -> int:
        if not self._local:
            self._path.write_text(self._whole + data.decode())
            self._whole += data.decode()
            return len(data)
        # Not a Python file: its buffer would write a line twice after a failure.
        number = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            return os.write(number, data)
        finally:
            os.close(number)


def read_lines(path: Any) -> list[Entry]:
    """The entries of a file, without lines that are no JSON object; empty if there is no file."""
    return [entry for _, entry in _parsed(_text(path))]


def _text(path: Any) -> str:
    return path.read_bytes().decode(errors="replace") if path.exists() else ""


def _parsed(text: str) -> list[tuple[str, Entry]]:
    found = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict):
            found.append((line, entry))
    return found


def _replace(path: Any, text: str) -> None:
    if not isinstance(path, Path):
        path.write_text(text)  # object stores write whole objects or nothing
        return
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(text)
    os.replace(scratch, path)
