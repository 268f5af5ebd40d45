"""Hostile, damaged and mistaken files: each is one clear line, nothing in them runs, nothing is written."""

import json
import os
import pickle
import struct
import sys

import handmade as hand
import numpy as np
import pytest

from jaxdiff.pretrained import files, mapped
from jaxdiff.pretrained.mapped import MAX_LINE, WeightsError

FOUR = {"0": np.ones(4, np.float32)}


def refused(path, message):
    """Reads a file that must be refused, and checks the form of the refusal."""
    before = sorted(os.listdir(path.parent))
    with pytest.raises(WeightsError, match=message) as caught:
        files.read(path)
    line = str(caught.value)
    assert line.startswith(f"{path.parent}") and line.isprintable() and len(line) <= MAX_LINE
    assert sorted(os.listdir(path.parent)) == before


def attack(name, marker):
    """Instructions that would make the file `marker` by calling `name`."""
    arguments = {
        "subprocess.Popen": b"](" + hand.text("touch") + hand.text(str(marker)) + b"e",
        "builtins.exec": hand.text(f"open({str(marker)!r}, 'w').close()"),
        "builtins.eval": hand.text(f"open({str(marker)!r}, 'w').close()"),
        "builtins.open": hand.text(str(marker)) + hand.text("w"),
        "io.open": hand.text(str(marker)) + hand.text("w"),
        "os.mkdir": hand.text(str(marker)),
    }
    return hand.ref(name) + hand.tup(arguments.get(name, hand.text(f"touch {marker}"))) + b"R"


CALLS = ("os.system", "posix.system", "subprocess.Popen", "builtins.exec", "builtins.eval", "builtins.open", "io.open",
         "os.mkdir")  # fmt: skip


def attacked_files(folder, marker, name):
    """The call at every place of a file that holds a pickle."""
    bad = attack(name, marker)
    body, stored = hand.described(hand.ARRAYS)
    kept = {"weights": body, "more": bad}
    hand.torch_zip(folder / "zip", hand.mapping(kept), stored)
    hand.torch_zip(folder / "script", hand.made("__torch__.Net", hand.mapping(kept)), stored)
    (folder / "plain").write_bytes(hand.program(bad, 4))
    (folder / "old").write_bytes(hand.legacy_bytes(bad, {}))
    keys = hand.program(b"](" + bad + b"e")
    (folder / "keys").write_bytes(hand.legacy_bytes(b"}", {})[: -len(hand.program(b"](e"))] + keys)
    inner = hand.legacy_bytes(bad, {})
    embedded = hand.call("torch.storage._load_from_bytes", b"B" + struct.pack("<I", len(inner)) + inner)
    (folder / "embedded").write_bytes(hand.program(embedded, 3))
    return [path for path in sorted(folder.iterdir()) if path.is_file()]


@pytest.mark.parametrize("name", CALLS)
def test_no_call_is_obeyed_wherever_it_stands(name, tmp_path):
    marker = tmp_path / "marker"
    (tmp_path / "files").mkdir()
    paths = attacked_files(tmp_path / "files", marker, name)
    assert len(paths) == 6
    for path in paths:
        refused(path, rf"refers to {name}, which is not a tensor: refused, nothing was run")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["os.system", "builtins.exec", "os.mkdir"])
def test_the_attacks_are_real(name, tmp_path):
    pickle.loads(hand.program(attack(name, tmp_path / "marker")))  # noqa: S301
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"(S'x'\n" + b"ios\nsystem\n", r"instruction 0x53"),
        (b"(" + hand.text("x") + b"ios\nsystem\n", r"refers to os\.system, .* nothing was run"),
        (b"(" + hand.ref("os.system") + hand.text("x") + b"o", r"refers to os\.system, .* nothing was run"),
        (hand.text("os") + hand.text("system") + b"\x93" + hand.tup(hand.text("x")) + b"R", r"refers to os\.system"),
        (hand.call("builtins.getattr", hand.ref("os.system"), hand.text("x")), r"refers to builtins\.getattr"),
        (hand.call("torch.load", hand.text("x")), r"refers to torch\.load"),
        (hand.call("torch._tensor._rebuild_from_type_v2", hand.ref("os.system"), b"N", b")"), r"refers to os\.system"),
        (hand.call("enum\n.Enum", b"K\x01"), r"instruction 0x45"),
        (hand.made("a.B", b"N") + b")R", r"calls an object of a\.B instead of a tensor: refused, nothing was run"),
        (hand.text("f") + b")R", r"calls a str instead of a tensor"),
        (b"\x82\x01", r"instruction 0x82"),  # the copyreg extension table
        (b"\x97", r"instruction 0x97"),  # out-of-band buffers
        (hand.call("os.x\x1b[31m\u202e", b"N"), r"refers to os\.x\?\[31m\?, which is not a tensor"),
    ],
)
def test_other_ways_to_call_are_refused(body, message, tmp_path):
    refused(hand.torch_zip(tmp_path / "f", body, {}), message)
    (tmp_path / "g").write_bytes(hand.program(body, 4))
    refused(tmp_path / "g", message)


def test_foreign_classes_are_neither_imported_nor_made(tmp_path):
    body, stored = hand.described(hand.ARRAYS)
    state = hand.mapping({"__setstate__": hand.text("x"), "__class__": hand.ref("os.system")})
    foreign = hand.made("antigravity.Flight", state) + hand.ref("this.s") + b"\x86"
    hand.torch_zip(tmp_path / "f", hand.mapping({"state_dict": body, "callbacks": foreign}), stored)
    assert files.read(tmp_path / "f").keys() == hand.ARRAYS.keys()
    assert not {"antigravity", "this"} & sys.modules.keys()


def test_embedded_source_stays_text(tmp_path):
    source = f"open({str(tmp_path / 'marker')!r}, 'w').close()"
    (tmp_path / "f").write_bytes(hand.module_pickle(source=source))
    assert files.read(tmp_path / "f").keys() == hand.ARRAYS.keys()
    assert not (tmp_path / "marker").exists()


def tensors(**changed):
    """A state dict of one tensor over four numbers; `changed` are what the pickle says of it."""
    return hand.mapping({"a": hand.tensor("Float", "0", **{"shape": (4,), **changed})})


NEST = 5000
PICKLES = {
    "nested lists": (b"]" * NEST + b"a" * (NEST - 1), r"nested deeper than 64 levels"),
    "nested tuples": (b")" + b"\x85" * NEST, r"nested deeper than 64 levels"),
    "nested tuples as a key": (b"}" + b")" + b"\x85" * 200_000 + b"Ns", r"holds no tensors"),
    "a list in itself": (b"]q\x00h\x00a", r"nested deeper than 64 levels"),
    "a thousand laughs": (b"]" + b"q\x00](h\x00h\x00h\x00h\x00e" * 40, r"holds more than 5000 parts"),
    "many instructions": (b"](" + b"N" * 2_100_000 + b"e", r"more than 2000000 instructions"),
    "huge integer": (b"\x8b" + struct.pack("<i", 2**20) + b"\xff" * 2**20, r"an integer of 1048576 bytes"),
    "negative length": (b"\x8b" + struct.pack("<i", -1), r"an integer of -1 bytes"),
    "text beyond the end": (b"X" + struct.pack("<I", 2**32 - 1), r"a value of the pickle should be bytes .* cut short"),
    "text beyond any end": (b"\x8d" + struct.pack("<Q", 2**64 - 1), r"a value of the pickle should be bytes"),
    "text not UTF-8": (hand.mapping([(hand.text(b"\xff\xfe"), b"N")]), r"text that is not UTF-8"),
    "long name": (hand.mapping({"x" * 2000: hand.tensor("Float", "0", (4,))}), r"name of more than 1000 characters"),
    "far memo": (b"r" + struct.pack("<I", 2**32 - 1), r"the pickle is damaged before byte"),
    "memo never filled": (b"j" + struct.pack("<I", 2**31), r"the pickle is damaged before byte"),
    "empty stack": (b"R", r"the pickle is damaged before byte"),
    "no mark": (b"Nt", r"lacks a mark"),
    "stopping early": (b"", r"the pickle is damaged before byte"),
    "items of a number": (b"K\x01NNs", r"sets items of a int"),
    "append to text": (hand.text("x") + b"Na", r"appends to a str"),
    "shared list of pairs": (
        b"](" + b"NN\x86" * 1000 + b"eq\x01](" + (hand.ref("collections.OrderedDict") + b"h\x01\x85R") * 1000 + b"e",
        r"OrderedDict that is not made from a list of pairs",
    ),
    "negative size": (tensors(shape=(-4,), count=4), r"shape \[-4\], which no tensor can have"),
    "huge size": (tensors(shape=(2**62,), strides=(0,), count=4), r"which no tensor can have"),
    "beyond its storage": (tensors(shape=(5,)), r"tensor 'a' needs 5 numbers of float32, its storage has 16 bytes"),
    "offset beyond": (tensors(offset=1, count=4), r"needs 5 numbers"),
    "negative offset": (tensors(offset=-1), r"a negative offset or stride"),
    "negative stride": (tensors(strides=(-1,)), r"a negative offset or stride"),
    "stride beyond": (tensors(strides=(2**40,)), r"needs \d+ numbers"),
    "many times its size": (tensors(shape=(2**20, 2**20), strides=(0, 0), count=4), r"many times its own size"),
    "too many axes": (tensors(shape=(1,) * 40), r"no list of at most 32 sizes"),
    "count beyond the storage": (tensors(shape=(4,), count=2**50), r"its storage has 16 bytes"),
    "storage not there": (hand.mapping({"a": hand.tensor("Float", "9", (4,))}), r"storage '9', which the file lacks"),
    "storage elsewhere": (hand.mapping({"a": hand.tensor("Float", "../0", (4,))}), r"storage '../0', which the file"),
    "storage of a foreign type": (hand.storage("os.Bad", "0", 4), r"storage of type torch\.os\.BadStorage; readable"),
    "sparse tensor": (hand.call("torch._utils._rebuild_sparse_tensor", b"N"), r"refers to torch._utils._rebuild_"),
    "foreign reference": (hand.text("x") + b"Q", r"refers to something outside its pickle that is no storage"),
    "no tensor at all": (hand.mapping({"a": b"K\x01"}), r"holds no tensors \(torch \(zip\)\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_hostile_pickle(name, tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "MAX_NODES", 5000)  # types are checked in tests, which makes each node dear
    body, message = PICKLES[name]
    refused(hand.torch_zip(tmp_path / "f", body, FOUR), message)


def entry(**changed):
    return {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changed}


def safetensors(header, data=bytes(16)):
    return hand.safetensors_bytes(header=header, data=data)


SAFETENSORS = {
    "header beyond the file": (struct.pack("<Q", 99) + b"{}", r"the header should be bytes 8 to 107, but there are 10"),
    "header beyond the limit": (struct.pack("<Q", 10**8 + 1) + b"{}", r"would be 100000001 bytes, the format allows"),
    "header beyond all": (struct.pack("<Q", 2**64 - 1) + b"{}", r"would be 18446744073709551615 bytes"),
    "overlap": (
        safetensors({"a": entry(), "b": entry(data_offsets=[8, 24])}, bytes(24)),
        r"'b' overlaps the one before",
    ),
    "same bytes": (safetensors({"a": entry(), "b": entry()}), r"'b' overlaps the one before it"),
    "hole": (safetensors({"a": entry(data_offsets=[4, 20])}, bytes(20)), r"'a' leaves a hole of 4 bytes before it"),
    "bytes left over": (safetensors({"a": entry()}, bytes(20)), r"the header describes \d+ bytes, the file has \d+"),
    "cut short": (safetensors({"a": entry()}, bytes(15)), r"tensor 'a' should be bytes .* cut short"),
    "wrong size": (safetensors({"a": entry(shape=[5])}), r"spans 16 bytes, but F32\[5\] needs 20"),
    "negative size": (safetensors({"a": entry(shape=[-4])}), r"shape \[-4\], which no tensor can have"),
    "negative sizes": (safetensors({"a": entry(shape=[-2, -2])}), r"which no tensor can have"),
    "overflow": (safetensors({"a": entry(shape=[2**62, 4])}), r"which no tensor can have"),
    "fraction": (safetensors({"a": entry(shape=[4.0])}), r"no list of at most 32 sizes"),
    "truth as a size": (safetensors({"a": entry(shape=[True, 4])}), r"no list of at most 32 sizes"),
    "negative offset": (
        safetensors({"a": entry(data_offsets=[-16, 0])}),
        r"data_offsets that are not two byte positions",
    ),
    "backward offsets": (safetensors({"a": entry(data_offsets=[16, 0])}), r"spans -16 bytes"),
    "three offsets": (safetensors({"a": entry(data_offsets=[0, 8, 16])}), r"not two byte positions"),
    "unknown dtype": (safetensors({"a": entry(dtype="F4")}), r"has the dtype 'F4'; readable are BOOL"),
    "dtype no text": (safetensors({"a": entry(dtype=[["F32"]])}), r"has the dtype"),
    "more than asked for": (
        safetensors({"a": entry(run="x")}),
        r"not described by dtype, shape and data_offsets alone",
    ),
    "twice": (safetensors(b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2)), r"it holds 'a' twice"),
    "not JSON": (safetensors(b"{'a': 1}"), r"header is not the JSON that safetensors asks for"),
    "not UTF-8": (safetensors(b'{"\xff": 1}'), r"header is not the JSON that safetensors asks for"),
    "deep JSON": (safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), r"it is nested too deeply"),
    "huge JSON number": (safetensors(b'{"a": %b}' % (b"9" * 100_000)), r"header is not the JSON that safetensors asks"),
    "half a character": (safetensors(b'{"\\ud800": 1}'), r"name that is too long or no text"),
    "metadata no texts": (safetensors({"__metadata__": {"a": 1}, "a": entry()}), r"__metadata__ is not a map of texts"),
    "no tensors": (safetensors({}, b""), r"holds no tensors"),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_hostile_safetensors(name, tmp_path):
    content, message = SAFETENSORS[name]
    (tmp_path / "f").write_bytes(content)
    refused(tmp_path / "f", message)


def flax(value):
    return hand.packed({"a": value})


def array(shape=(4,), dtype="float32", raw=bytes(16), code=1):
    inner = hand.packed([shape if isinstance(shape, str) else list(shape), dtype, raw])
    return b"\xde\x00\x01" + hand.packed("a") + struct.pack(">BIb", 0xC9, len(inner), code) + inner


FLAX = {
    "four billion values": (b"\xdf\xff\xff\xff\xff", r"says that 4294967295 values follow byte 5, but 0 bytes"),
    "nested lists": (b"\x81\xa1a" + b"\x91" * 1000 + b"\xc0", r"nested deeper than 64"),
    "text beyond the end": (b"\x81\xdb\xff\xff\xff\xff", r"a text should be bytes"),
    "bytes beyond the end": (b"\x81\xa1a\xc6\xff\xff\xff\xff", r"a string of bytes should be bytes"),
    "text not UTF-8": (b"\x81\xa2\xff\xfe\xc0", r"not UTF-8"),
    "key no text": (b"\x81\x01\x02", r"a key that is not text"),
    "key twice": (b"\x82\xa1a\x01\xa1a\x02", r"the key 'a' twice"),
    "bytes left over": (flax(True) + b"\xc0", r"has 1 bytes after its end"),
    "unused byte": (b"\x81\xa1a\xc1", r"holds the byte 0xc1 at 3, which starts no value"),
    "foreign extension": (b"\x81\xa1a\xd4\x05\x00", r"holds the extension 5"),
    "extension beyond the end": (b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", r"an extension should be bytes"),
    "array no triple": (b"\x81\xa1a\xd4\x01\xc0", r"is not \(shape, dtype, bytes\)"),
    "unknown dtype": (array(dtype="object"), r"has the dtype 'object'; known are bool"),
    "negative size": (array(shape=(-4,)), r"shape \[-4\], which no tensor can have"),
    "overflow": (array(shape=(2**62, 4)), r"which no tensor can have"),
    "shape no list": (array(shape="4"), r"no list of at most 32 sizes"),
    "wrong size": (array(shape=(5,)), r"has 16 bytes; float32\[5\] needs 20"),
    "chunks that do not fit": (
        flax({"__msgpack_chunked_array__": True, "shape": {"0": 3}, "chunks": {"0": np.zeros(2, np.float32)}}),
        r"chunks before byte \d+ do not make an array \[3\]",
    ),
    "chunks of nothing": (flax({"__msgpack_chunked_array__": True}), r"do not make an array \[\]"),
    "no arrays": (flax({"b": 1}), r"holds no tensors"),
    "same name twice": (hand.packed({"a/b": np.zeros(1), "a": {"b": np.zeros(1)}}), r"two tensors named 'a/b'"),
}


@pytest.mark.parametrize("name", FLAX)
def test_hostile_flax_file(name, tmp_path):
    content, message = FLAX[name]
    (tmp_path / "f").write_bytes(content)
    refused(tmp_path / "f", message)


def cut(content, keep):
    return content[: int(len(content) * keep)]


ZIP = b"PK\x03\x04" + bytes(60)
MISTAKEN = {
    "empty": (b"", r"is empty \(0 bytes\); download it again"),
    "web page": (b"\n<!DOCTYPE html><html>Sign in</html>", r"is a web page, .* download it again"),
    "error as XML": (b"<?xml version='1.0'?><Error/>", r"is a web page"),
    "error as JSON": (b'{"error": "Access denied"}', r"is JSON without a weight_map"),
    "JSON cut short": (b'{"weight_map": {', r"starts like JSON but is not"),
    "git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
        r"git-lfs pointer.*git lfs pull",
    ),
    "zip without its end": (ZIP, r"is a broken zip archive"),
    "empty zip": (b"PK\x05\x06" + bytes(18), r"is an empty zip archive"),
    "gzip": (b"\x1f\x8b\x08" + bytes(20), r"is compressed with gzip; unpack it first"),
    "tar": (b"storages".ljust(257, b"\0") + b"ustar\0" + bytes(250), r"is a tar archive"),
    "Keras": (b"\x89HDF\r\n\x1a\n", r"is HDF5"),
    "text": (b"hello there", r"starts with b'hello th', which no weight file does; readable are"),
    "old cut short": (cut(hand.legacy_bytes(), 0.97), r"cut short or damaged"),
    "old cut in the pickle": (cut(hand.legacy_bytes(), 0.4), r"before byte \d+: damaged"),
    "old with more": (hand.legacy_bytes() + b"x", r"has 1 bytes after its last storage"),
    "old of another version": (hand.legacy_bytes().replace(b"M\xe9\x03", b"M\xea\x03"), r"unknown version"),
    "old with a negative storage": (
        hand.legacy_bytes().replace(struct.pack("<q", 6) + hand.values("float32").tobytes(), b"\xff" * 32),
        r"storage '0' should be bytes",
    ),
    "pickle of protocol 0": (b"\x80\x00.", r"is of protocol 0; readable are 2 to 5"),
    "shard outside": (
        b'{"weight_map": {"a": "../b.safetensors"}}',
        r"names the shard '../b.safetensors', which is not",
    ),
    "shard at the root": (b'{"weight_map": {"a": "/etc/passwd"}}', r"names the shard '/etc/passwd', which is not"),
    "shard no text": (b'{"weight_map": {"a": 1}}', r"is JSON without a weight_map"),
}


@pytest.mark.parametrize("name", MISTAKEN)
def test_mistaken_file(name, tmp_path):
    content, message = MISTAKEN[name]
    (tmp_path / "f").write_bytes(content)
    refused(tmp_path / "f", message)


@pytest.mark.parametrize(
    ("extra", "options", "message"),
    [
        ([("archive/data/9", bytes(10**6))], {"compression": 8}, r"is compressed or encrypted, as torch never does"),
        ([("../../outside", b"x")], {}, r"would leave the archive, '../../outside': refused"),
        ([("/etc/outside", b"x")], {}, r"would leave the archive"),
        ([("C:\\outside", b"x")], {}, r"would leave the archive"),
        ([("other/data.pkl", b"x")], {}, r"with 2 members data.pkl; a torch file has one"),
        ([("archive/byteorder", b"middle")], {}, r"has the byte order b'middle'"),
    ],
)
def test_hostile_zip(extra, options, message, tmp_path):
    refused(hand.torch_zip(tmp_path / "f", extra=extra, **options), message)


def changed_directory(path, field, value, form="<I"):
    """Writes a number into the first entry of a zip archive's directory."""
    raw = bytearray(path.read_bytes())
    struct.pack_into(form, raw, raw.index(b"PK\x01\x02") + field, value)
    path.write_bytes(raw)


def test_zip_that_declares_more_than_it_has(tmp_path):
    hand.torch_zip(tmp_path / "f")
    changed_directory(tmp_path / "f", 20, 2**31)
    changed_directory(tmp_path / "f", 24, 2**31)
    refused(tmp_path / "f", r"member 'archive/data.pkl' should be bytes .* cut short")
    changed_directory(tmp_path / "f", 20, 100)
    refused(tmp_path / "f", r"is compressed or encrypted")


def test_zip_members_that_overlap_or_stand_elsewhere(tmp_path):
    raw = hand.torch_zip(tmp_path / "f").read_bytes()
    changed_directory(tmp_path / "f", 42, 1)
    refused(tmp_path / "f", r"does not start where the archive says")
    second = raw.index(b"PK\x03\x04", 4)
    size = second - 30 - len("archive/data.pkl") + 50
    (tmp_path / "f").write_bytes(raw)
    changed_directory(tmp_path / "f", 20, size)
    changed_directory(tmp_path / "f", 24, size)
    refused(tmp_path / "f", r"member 'archive/data/0' overlaps another")


def test_zip_of_arrays_points_to_numpy(tmp_path):
    np.savez(tmp_path / "f.npz", a=np.zeros(3))
    refused(tmp_path / "f.npz", r"with 0 members data.pkl; a torch file has one; an .npz is read with numpy.load")


def test_paths_that_are_no_files(tmp_path):
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", r"is a folder; give one file of it, such as none: empty")
    (tmp_path / "folder/model.safetensors").write_bytes(b"")
    refused(tmp_path / "folder", r"is a folder; give one file of it, such as model.safetensors")
    refused(tmp_path / "nothing", r"is not there; check the path")
    (tmp_path / "link").symlink_to("gone")
    refused(tmp_path / "link", r"is a link to gone, which is not there")
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop", r"cannot be opened: ")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", r"is neither a file nor a link to one")


def test_summary_refuses_as_read_does(tmp_path):
    (tmp_path / "f").write_bytes(hand.program(hand.call("os.system", hand.text("x"))))
    with pytest.raises(WeightsError, match=r"refers to os\.system"):
        files.summary(tmp_path / "f")
