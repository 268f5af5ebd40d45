"""CLIP's tokenizer on a vocabulary made by hand: words, merges, ids, padding, both kinds of files, refusals."""

import gzip
import json

import pytest

from jaxdiff.data.clip_tokenizer import decode, encode, load_tokenizer, tokenize

# Ids: 256 bytes, 256 bytes that end a word, these merges from 512 on, start and end.
MERGES = ["l o", "lo w</w>", "e r</w>", "lo w", "' s</w>", "Ã ©</w>"]
LOW_END, ER_END, LOW, CONTRACTION, E_ACUTE = 513, 514, 515, 516, 517
START, END = 518, 519


def plain(character):
    return ord(character) - ord("!")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("vocabulary") / "merges.txt"
    file.write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def tokenizer(path):
    return load_tokenizer(path)


def test_ids_follow_the_order_of_bytes_and_merges(tokenizer):
    assert (tokenizer.start, tokenizer.end, len(tokenizer.ids)) == (START, END, 520)
    assert tokenizer.ids["!"] == 0 and tokenizer.ids["!</w>"] == 256 and tokenizer.ids["lo"] == 512


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("low", [LOW_END]),
        ("  LOW\n lower ", [LOW_END, LOW, ER_END]),
        ("low's", [LOW_END, CONTRACTION]),
        ("12", [256 + plain("1"), 256 + plain("2")]),
        ("!?", [plain("!"), 256 + plain("?")]),
        ("e\u0301", [E_ACUTE]),
        ("\u00e9", [E_ACUTE]),
        ("low\u3000low", [LOW_END, LOW_END]),
        ("<|startoftext|>low<|endoftext|>", [START, LOW_END, END]),
        ("", []),
    ],
)
def test_words_and_merges(tokenizer, text, ids):
    assert encode(tokenizer, text) == ids


def test_a_merge_takes_every_occurrence(tokenizer):
    assert encode(tokenizer, "lolo") == [512, plain("l"), 256 + plain("o")]


def test_decoding_gives_the_words_back(tokenizer):
    assert decode(tokenizer, [START, *encode(tokenizer, "Lower low \u00e9 42!"), END, END]) == "lower low \u00e9 4 2 !"


def test_texts_are_cut_and_padded(tokenizer):
    ids, mask = tokenize(tokenizer, ["low", "low low low low"], length=4)
    assert ids.tolist() == [[START, LOW_END, END, END], [START, LOW_END, LOW_END, END]]
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert tokenize(tokenizer, [""], length=4, pad=0).ids.tolist() == [[START, END, 0, 0]]


def test_a_packed_file_and_a_vocabulary_of_its_own(path, tokenizer, tmp_path):
    packed = tmp_path / "merges.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert load_tokenizer(packed) == tokenizer
    vocabulary = tmp_path / "vocab.json"
    vocabulary.write_text(json.dumps({token: 2 * i for token, i in tokenizer.ids.items()}))
    own = load_tokenizer(path, vocabulary)
    assert (encode(own, "low"), own.end) == ([2 * LOW_END], 2 * END)


def test_what_is_no_vocabulary_is_refused(path, tokenizer, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"#version\nl o\nlow\n")
    with pytest.raises(ValueError, match="line 3: expected two symbols and a space between, got 'low'"):
        load_tokenizer(file)
    file.write_bytes(b"#version\n")
    with pytest.raises(ValueError, match="holds no merges"):
        load_tokenizer(file)
    file.write_bytes(b"\x1f\x8bnot gzip")
    with pytest.raises(ValueError, match="is no list of merges"):
        load_tokenizer(file)
    file.write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"is no vocabulary, expected JSON of token: id"):
        load_tokenizer(path, file)
    file.write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"lacks \['<\|endoftext\|>', '<\|startoftext\|>'\]"):
        load_tokenizer(path, file)
    with pytest.raises(ValueError, match="got one string 'low'; put it in a list"):
        tokenize(tokenizer, "low")
    with pytest.raises(ValueError, match="length must be at least 2"):
        tokenize(tokenizer, ["low"], length=1)
