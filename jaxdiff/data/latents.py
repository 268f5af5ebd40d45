"""Latents and text embeddings that were computed before training, as a source of {"x0", "context"}.

A folder holds latents.npy [n, h, w, c], already scaled as the network expects them, context.npy [n, tokens, width] and,
where a method guides, null_context.npy [tokens, width], the embedding of the empty text. Arrays are mapped into memory,
not read; nothing is unpickled. Encoding pictures and text is not here.
"""

from pathlib import Path

import numpy as np

from jaxdiff.data.images import Example

NAMES = ("latents", "context", "null_context")


class Latents:
    """A source over the arrays of a folder.

    Attributes:
      null_context: [tokens, width] embedding of the empty text, or None where the folder has none.

    Raises:
      ValueError: naming the file, if one is missing or cannot be read, or the arrays do not belong together.
    """

    def __init__(self, folder: str | Path, *, guided: bool = False):
        """guided: whether null_context.npy must be there."""
        paths = {name: Path(folder) / f"{name}.npy" for name in NAMES}
        needed = NAMES if guided else NAMES[:2]
        if missing := [name for name in needed if not paths[name].is_file()]:
            raise ValueError(f"{folder} has no {missing[0]}.npy, expected {', '.join(needed)} as .npy; write it")
        self._latents, self._context = (_mapped(paths[name]) for name in NAMES[:2])
        self.null_context = _mapped(paths["null_context"]) if paths["null_context"].is_file() else None
        if self._latents.ndim != 4 or self._context.ndim != 3 or len(self._latents) != len(self._context):
            raise ValueError(
                f"{folder}: expected latents [n, h, w, c] and a context [n, tokens, width] for each, "
                f"got {self._latents.shape} and {self._context.shape}; write them again"
            )
        if self.null_context is not None and self.null_context.shape != self._context.shape[1:]:
            raise ValueError(
                f"{folder}: null_context is {self.null_context.shape}, expected {self._context.shape[1:]} as each "
                "context; write it again"
            )

    def __len__(self) -> int:
        return len(self._latents)

    def __getitem__(self, index: int) -> Example:
        return {name: a[index].astype(np.float32) for name, a in (("x0", self._latents), ("context", self._context))}


class RandomLatents:
    """Sixteen examples of noise, x0 [8, 8, 4] with two tokens of width 8: the form of `Latents` for smoke runs."""

    null_context = np.zeros((2, 8), np.float32)

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Example:
        draw = np.random.default_rng(index).standard_normal(8 * 8 * 4 + 2 * 8, np.float32)
        return {"x0": draw[:256].reshape(8, 8, 4), "context": draw[256:].reshape(2, 8)}


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as .npy without objects; write it again") from error
