"""What can go wrong with a checkpoint, in one line, and on every process at once.

Orbax and TensorStore raise a dozen kinds of error with texts of up to a page. Here they become a `CheckpointError`
that names file or leaf and says in a few words what is the matter. On several processes an error of one becomes an
error of all, because the others would wait for it for ever.
"""

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator

import jax
import numpy as np

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
LONGEST = 100  # characters that are kept of somebody else's message
TENSORSTORE = "tensorstore"  # in every message of TensorStore, with its specification of the array


class CheckpointError(Exception):
    """A checkpoint cannot be written or read.

    Attributes:
      step: of the checkpoint.
      item: "state", "data", "meta", or "all"; "folder" if it is about no single checkpoint.
      reason: one line.
    """

    def __init__(self, step: int, item: str, reason: str):
        where = {"all": f"checkpoint {step}: ", "folder": ""}.get(item, f"checkpoint {step}, item {item}: ")
        super().__init__(where + reason)
        self.step, self.item, self.reason = step, item, reason


class CheckpointMismatch(CheckpointError):
    """A sound checkpoint, but of another experiment or another model. Older ones would not fit either."""


@contextlib.contextmanager
def translated(step: int, item: str, otherwise: str = "failed") -> Iterator[None]:
    """Turns whatever is raised inside into a `CheckpointError`. `otherwise` as for `reason_of`."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(step, item, reason_of(error, otherwise)) from error


@contextlib.contextmanager
def together(step: int, item: str) -> Iterator[None]:
    """As `translated`; if it fails on one process, it fails on all. Every process must pass through it."""
    failed: CheckpointError | None = None
    try:
        with translated(step, item, "cannot be read"):
            yield
    except CheckpointError as error:
        failed = error
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        flags = np.asarray(multihost_utils.process_allgather(np.int32(failed is not None))).reshape(-1)
        if failed is None and flags.any():
            failed = CheckpointError(step, item, f"process {int(np.argmax(flags))} failed, see its log")
    if failed is not None:
        raise failed


def first_says(value: int) -> int:
    """The value that process 0 was called with, on every process. Below 2^31 in size."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def reason_of(error: BaseException, otherwise: str = "failed") -> str:
    """What an exception of Orbax, TensorStore or the operating system comes to, in one line.

    Args:
      error: the exception.
      otherwise: what to say before the exception's own text if nothing better is known.
    """
    while error.__cause__ is not None and not isinstance(error, OSError):
        error = error.__cause__
    text = " ".join(str(error).split())
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return "a JSON file in it is cut or garbled"
    code = error.errno if isinstance(error, OSError) else _code_in(text)
    said = os.strerror(code).lower() if code else ""
    if code in FULL:
        return f"cannot be written, {said}: make room and start again"
    if code in DENIED:
        return f"{_file_in(error, text)} is not accessible, {said}: change its permissions or choose another folder"
    if code in (errno.ENOTDIR, errno.EEXIST):
        return f"{_file_in(error, text)}: a file is where a folder is expected, choose another folder"
    if isinstance(error, FileNotFoundError) or code == errno.ENOENT or text.startswith("NOT_FOUND"):
        return f"{_file_in(error, text)} is missing"
    if code:
        return f"{_file_in(error, text)} failed, {said}"
    if re.match(r"[A-Z_]+: ", text) or TENSORSTORE in text:
        return f"{_file_in(error, text)} is damaged"
    short = text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
    return f"{otherwise}, {type(error).__name__}: {short}"


def _code_in(text: str) -> int | None:
    """The operating system's error number in a message of TensorStore: [OS error 28: ENOSPC ...]."""
    found = re.search(r"OS error (\d+)", text)
    return int(found[1]) if found else None


def _file_in(error: BaseException, text: str) -> str:
    """What an error is about: the last two parts of a file's path, or the leaf whose array TensorStore names."""
    path = getattr(error, "filename", None)
    if isinstance(path, str):
        return _end(path)
    # The innermost file comes last; a path that ends in "/" is only the folder of all arrays.
    files = [path for path in re.findall(r'local file "([^"]+)"', text) if not path.endswith("/")]
    if files:
        return _end(files[-1])
    leaf = re.search(r'"([^"/]+)/[\d.]+"', text)
    if leaf:
        return f"the array of leaf {leaf[1].replace('.', '/')}"
    path = re.search(r"(?<![\w/])/[^\s\"'\]]+", text)
    return _end(path[0]) if path and TENSORSTORE not in text else "an array file"


def _end(path: str) -> str:
    return "/".join(path.rstrip("/.,:").split("/")[-2:])
