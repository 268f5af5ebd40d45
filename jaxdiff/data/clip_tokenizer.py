"""The tokenizer of CLIP: text to token ids by byte-pair encoding, from a merges file that the user names.

A text is normalised (NFC, single spaces, lower case), cut into words, and each word is merged from single bytes, the
earliest merge of the file first. Ids come from the order of the merges, or from a vocab.json. Neither regular
expressions of Unicode classes nor repairs of broken HTML and encodings (which the first release made) are needed or
done here. Nothing is downloaded.

Source: Sennrich et al. 2015 (arXiv:1508.07909) algorithm 1; Radford et al. 2021 (arXiv:2103.00020) section 2.4.
"""

import gzip
import json
import os
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
# The file of the first release has 262,144 merges, of which CLIP uses those that fill 49,408 ids.
MAX_MERGES = 49408 - 2 * 256 - 2
SPACES = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
SPECIAL = re.compile(f"({re.escape(START)}|{re.escape(END)})")
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


class ClipTokenizer(NamedTuple):
    """A vocabulary.

    Attributes:
      ranks: pair of symbols -> how early it is merged.
      ids: token -> id.
      start: id that begins a text.
      end: id that ends it.
    """

    ranks: dict[tuple[str, str], int]
    ids: dict[str, int]
    start: int
    end: int


class Tokens(NamedTuple):
    """Texts as ids.

    Attributes:
      ids: [B, length] int32.
      mask: [B, length] int32, 1 up to the end of the text and 0 on padding. Stable Diffusion does not use it.
    """

    ids: Int32[np.ndarray, "b n"]
    mask: Int32[np.ndarray, "b n"]


def load_tokenizer(merges: str | os.PathLike[str], vocabulary: str | os.PathLike[str] | None = None) -> ClipTokenizer:
    """Reads a vocabulary.

    Args:
      merges: path of bpe_simple_vocab_16e6.txt, packed by gzip or not, or of a merges.txt: a line to ignore, then two
        symbols a line.
      vocabulary: path of a vocab.json with the ids; None to number bytes, bytes that end a word, merges, and the two
        special tokens in that order, which gives the published ids.

    Raises:
      ValueError: a file is not what it should be.
    """
    with open(merges, "rb") as file:
        content = file.read()
    try:
        text = (gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError):
        raise ValueError(
            f"{os.fspath(merges)} is no list of merges (damaged, or not text); download it again"
        ) from None
    lines = [line for line in text.split("\n")[1:] if line][:MAX_MERGES]
    pairs = [tuple(line.split(" ")) for line in lines]
    for number, pair in enumerate(pairs, 2):
        if len(pair) != 2 or not all(pair):
            raise ValueError(
                f"{os.fspath(merges)} line {number}: expected two symbols and a space between, got "
                f"{lines[number - 2]!r}; give bpe_simple_vocab_16e6.txt.gz or merges.txt"
            )
    if not pairs:
        raise ValueError(f"{os.fspath(merges)} holds no merges; give bpe_simple_vocab_16e6.txt.gz or merges.txt")
    ranks = {(first, second): rank for rank, (first, second) in enumerate(pairs)}
    if vocabulary is None:
        letters = list(_byte_letters().values())
        tokens = [*letters, *(letter + WORD_END for letter in letters), *map("".join, pairs), START, END]
        ids = {token: i for i, token in enumerate(tokens)}
    else:
        ids = _read_ids(vocabulary)
    if missing := sorted({START, END} - set(ids)):
        raise ValueError(f"{os.fspath(vocabulary or merges)} lacks {missing}; give the files of one tokenizer")
    return ClipTokenizer(ranks, ids, ids[START], ids[END])


def encode(tokenizer: ClipTokenizer, text: str) -> list[int]:
    """The ids of a text, without start and end; special tokens written out in the text become their id."""
    found: list[int] = []
    for piece in SPECIAL.split(text):
        if piece in (START, END):
            found.append(tokenizer.ids[piece])
            continue
        for word in _words(_normalised(piece)):
            letters = _byte_letters()
            symbols = [letters[byte] for byte in word.encode("utf-8")]
            symbols[-1] += WORD_END
            for token in _merge(symbols, tokenizer.ranks):
                if token not in tokenizer.ids:
                    raise ValueError(f"{token!r} is not in the vocabulary; give the vocab.json of these merges")
                found.append(tokenizer.ids[token])
    return found


def decode(tokenizer: ClipTokenizer, ids: Sequence[int]) -> str:
    """The text of ids, in lower case and with a space after each word; special tokens are left out."""
    tokens = {i: token for token, i in tokenizer.ids.items()}
    kept = [tokens[int(i)] for i in ids if int(i) not in (tokenizer.start, tokenizer.end)]
    values = {letter: byte for byte, letter in _byte_letters().items()}
    words = "".join(kept).split(WORD_END)
    return " ".join(bytes(values[letter] for letter in word).decode("utf-8", "replace") for word in words).strip()


def tokenize(tokenizer: ClipTokenizer, texts: Sequence[str], *, length: int = 77, pad: int | None = None) -> Tokens:
    """Texts to ids of equal length: start, the text cut to length - 2, end, padding.

    Args:
      tokenizer: from `load_tokenizer`.
      texts: B texts; "" is the unconditional one of Stable Diffusion.
      length: ids a text.
      pad: id of the padding; None for the end token (Stable Diffusion 1), 0 for OpenCLIP (Stable Diffusion 2).

    Raises:
      ValueError: length below 2, or a single string instead of a list.
    """
    if isinstance(texts, str):
        raise ValueError(f"texts must be a list of strings, got one string {texts[:40]!r}; put it in a list")
    if length < 2:
        raise ValueError(f"length must be at least 2, for start and end, got {length}")
    ids = np.full((len(texts), length), tokenizer.end if pad is None else pad, np.int32)
    mask = np.zeros((len(texts), length), np.int32)
    for row, text in enumerate(texts):
        found = [tokenizer.start, *encode(tokenizer, text)[: length - 2], tokenizer.end]
        ids[row, : len(found)] = found
        mask[row, : len(found)] = 1
    return Tokens(ids, mask)


def _byte_letters() -> dict[int, str]:
    """A printable letter for each byte: itself where it is one in Latin-1, else the next from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


def _read_ids(path: str | os.PathLike[str]) -> dict[str, int]:
    with open(path, encoding="utf-8") as file:
        try:
            ids = json.load(file)
        except ValueError:
            ids = None
    if not isinstance(ids, dict) or not all(isinstance(i, int) for i in ids.values()):
        raise ValueError(
            f"{os.fspath(path)} is no vocabulary, expected JSON of token: id; give the tokenizer's vocab.json"
        )
    return ids


def _normalised(text: str) -> str:
    # Letter by letter: of a whole word, Python would lower a final sigma in another way.
    return "".join(c.lower() for c in SPACES.sub(" ", unicodedata.normalize("NFC", text)))


def _kind(character: str) -> str:
    """A letter for the class of a character: L letter, N number, S symbol, or a space."""
    category = unicodedata.category(character)[0]
    return category if category in "LN" else " " if SPACES.match(character) else "S"


def _words(text: str) -> list[str]:
    """Contractions, runs of letters, single digits, runs of symbols."""
    words, at = [], 0
    while at < len(text):
        end = next((at + len(c) for c in CONTRACTIONS if text.startswith(c, at)), at + 1)
        kind = _kind(text[at])
        if end == at + 1 and kind in "LS":
            while end < len(text) and _kind(text[end]) == kind:
                end += 1
        if kind != " ":
            words.append(text[at:end])
        at = end
    return words


def _merge(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Joins neighbours, at each turn every occurrence of the pair that was merged earliest."""
    while len(symbols) > 1:
        best = min(zip(symbols, symbols[1:], strict=False), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        joined, at = [], 0
        while at < len(symbols):
            pair = tuple(symbols[at : at + 2])
            joined.append("".join(pair) if pair == best else symbols[at])
            at += 2 if pair == best else 1
        symbols = joined
    return symbols
