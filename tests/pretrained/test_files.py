"""Weight files of every format: what is read is what was written, as views, and told from the bytes alone."""

import json
from pathlib import Path

import handmade as hand
import numpy as np
import pytest

from jaxdiff.pretrained import families, files
from jaxdiff.pretrained.mapped import DTYPES, WeightsError


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == np.asarray(array).tobytes(), name


def file_behind(array):
    """The object that owns the memory of an array."""
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return getattr(array, "obj", array)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "msgpack", "pickle"])
def test_every_format_gives_the_same_arrays_and_copies_nothing(kind, tmp_path):
    found = files.read(hand.write_each(tmp_path)[kind])
    if kind == "msgpack":
        found = {name.replace("/", "."): array for name, array in found.items()}
    assert_same(dict(sorted(found.items())), dict(sorted(hand.ARRAYS.items())))
    assert {type(file_behind(array)).__name__ for array in found.values()} == {"mmap"}
    assert not any(array.flags.writeable for array in found.values())


@pytest.mark.parametrize("make", ["zip", "legacy"])
@pytest.mark.parametrize("name", [*hand.KINDS, *hand.UNTYPED])
def test_torch_dtypes(make, name, tmp_path):
    arrays = {"a": hand.values(name)}
    if make == "zip":
        hand.torch_zip(tmp_path / "f", arrays=arrays)
    else:
        (tmp_path / "f").write_bytes(hand.legacy_bytes(arrays=arrays))
    assert_same(files.read(tmp_path / "f"), arrays)


@pytest.mark.parametrize("name", DTYPES)
def test_flax_dtypes(name, tmp_path):
    arrays = {"a": hand.values(name), "scalar": hand.values(name)[0, 0].reshape(())}
    (tmp_path / "f").write_bytes(hand.packed({"params": arrays, "step": 3, "note": "x", "done": [True, None]}))
    assert_same(files.read(tmp_path / "f"), {f"params/{name}": array for name, array in arrays.items()})


def test_safetensors_round_trip_of_every_dtype(tmp_path):
    arrays = {name: hand.values(name) for name in DTYPES if name != "complex128"}
    arrays |= {"empty": np.zeros((0, 3)), "scalar": np.float32(2).reshape(()), "transposed": np.eye(3, 2).T}
    files.write(tmp_path / "f", arrays, {"origin": "a test"})
    found = files.read(tmp_path / "f")
    assert_same(dict(sorted(found.items())), dict(sorted(arrays.items())))
    assert files.summary(tmp_path / "f").metadata == {"origin": "a test"}
    raw = (tmp_path / "f").read_bytes()
    files.write(tmp_path / "again", found, {"origin": "a test"})
    assert (tmp_path / "again").read_bytes() == raw
    assert all(array.flags.aligned for array in found.values())


def test_big_endian_files(tmp_path):
    arrays = {"f": hand.values("float32"), "i": hand.values("int64")}
    (tmp_path / "legacy").write_bytes(hand.legacy_bytes(arrays=arrays, little=False))
    assert_same(files.read(tmp_path / "legacy"), arrays)
    body, stored = hand.described(arrays | {"c": hand.values("complex64"), "b": hand.values("bfloat16")})
    swapped = {
        k: a.view("u2" if a.itemsize == 2 else f"u{4 if a.itemsize < 8 or a.dtype.kind == 'c' else 8}")
        for k, a in stored.items()
    }
    swapped = {key: a.byteswap() for key, a in swapped.items()}
    hand.torch_zip(tmp_path / "zip", body, swapped, extra=[("archive/byteorder", "big")])
    assert_same(files.read(tmp_path / "zip"), arrays | {"c": hand.values("complex64"), "b": hand.values("bfloat16")})


def test_strided_and_shared_tensors(tmp_path):
    stored = np.arange(24, dtype=np.float32)
    pairs = {
        "all": hand.tensor("Float", "0", (2, 3, 4), count=24),
        "turned": hand.tensor("Float", "0", (4, 2, 3), (1, 12, 4), count=24),
        "part": hand.tensor("Float", "0", (2, 2), (12, 2), offset=5, count=24),
        "same": hand.tensor("Float", "0", (1000,), (0,), offset=3, count=24),
        "none": hand.tensor("Float", "0", (0, 4), offset=24, count=24),
    }
    found = files.read(hand.torch_zip(tmp_path / "f", hand.mapping(pairs), {"0": stored}))
    whole = stored.reshape(2, 3, 4)
    expected = {"all": whole, "turned": whole.transpose(2, 0, 1), "part": np.float32([[5, 7], [17, 19]])}
    assert_same(found, expected | {"same": np.full(1000, 3, np.float32), "none": np.zeros((0, 4), np.float32)})


def test_view_of_a_storage_in_the_old_format(tmp_path):
    view = hand.tup(hand.text("v"), hand.number(2), hand.number(3))
    body = hand.mapping({"a": hand.tensor("Int", "0", (2,), offset=1, count=6, view=(view,))})
    (tmp_path / "f").write_bytes(hand.legacy_bytes(body, {"0": np.arange(6, dtype=np.int32)}))
    assert files.read(tmp_path / "f")["a"].tolist() == [3, 4]


def test_truth_values_that_are_neither_zero_nor_one(tmp_path):
    hand.torch_zip(tmp_path / "f", hand.mapping({"a": hand.tensor("Bool", "0", (3,))}), {"0": np.uint8([0, 1, 7])})
    assert files.read(tmp_path / "f")["a"].tolist() == [False, True, True]


def test_training_checkpoint_gives_its_state_dict_past_foreign_objects(tmp_path):
    body, stored = hand.described(hand.ARRAYS)
    numpy_dtype = hand.call("numpy.dtype", hand.text("f8"), b"\x89", b"\x88")
    numpy_dtype += hand.tup(hand.number(3), hand.text("<"), b"N", b"N", b"N") + b"b"
    scalar = hand.call("numpy.core.multiarray.scalar", numpy_dtype, hand.call("_codecs.encode", hand.text("12345678")))
    callback = hand.ref("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    whole = {
        "epoch": hand.number(3),
        "callbacks": hand.mapping([(callback, hand.mapping({"best": scalar}))]),
        "hyper_parameters": hand.made("omegaconf.dictconfig.DictConfig", hand.mapping({"lr": hand.number(1)})),
        "optimizer_states": b"](" + hand.mapping({"m": hand.tensor("Float", "0", (2, 3))}) + b"e",
        "state_dict": body,
    }
    hand.torch_zip(tmp_path / "f", hand.mapping(whole), stored)
    assert_same(files.read(tmp_path / "f"), hand.ARRAYS)


def test_torchscript_gives_parameters_and_leaves_its_code(tmp_path):
    child = hand.made(
        "__torch__.torch.nn.Linear", hand.mapping({"w": hand.tensor("Float", "0", (2, 3)), "on": b"\x88"})
    )
    sizes = hand.call("torch.jit._pickle.build_intlist", b"](K\x01K\x02e")
    body = hand.made("__torch__.Decoder", hand.mapping({"sizes": sizes, "blocks": child}))
    code = [("decoder/code/__torch__.py", "raise SystemExit"), ("decoder/constants.pkl", hand.program(b")"))]
    hand.torch_zip(tmp_path / "f", body, {"0": hand.values("float32")}, root="decoder", extra=code)
    assert_same(files.read(tmp_path / "f"), {"blocks.w": hand.values("float32")})


def test_archive_whose_root_is_called_like_a_member(tmp_path):
    for root in ("code", "data", "byteorder"):  # torch takes the file's name
        assert_same(files.read(hand.torch_zip(tmp_path / root, root=root)), hand.ARRAYS)


def test_numpy_arrays_in_a_pickle(tmp_path):
    numpy_dtype = hand.call("numpy.dtype", hand.text("i4"), b"\x89", b"\x88")
    numpy_dtype += hand.tup(hand.number(3), hand.text("<"), b"N", b"N", b"N") + b"b"
    raw = hand.values("int32").tobytes(order="F")

    def array(fortran, raw):
        empty = hand.call("numpy._core.multiarray._reconstruct", hand.ref("numpy.ndarray"), b"K\x00\x85", b"C\x01b")
        shape = hand.tup(hand.number(2), hand.number(3))
        return empty + hand.tup(b"K\x01", shape, numpy_dtype, fortran, b"C" + bytes([len(raw)]) + raw) + b"b"

    pairs = {"columns": array(b"\x88", raw), "rows": array(b"\x89", hand.values("int32").tobytes())}
    (tmp_path / "f").write_bytes(hand.program(hand.mapping(pairs), 4))
    assert_same(files.read(tmp_path / "f"), {"columns": hand.values("int32"), "rows": hand.values("int32")})


def test_chunked_flax_arrays_are_joined(tmp_path):
    whole = np.arange(10, dtype=np.float32)
    chunks = {"0": whole[:4], "1": whole[4:8], "2": whole[8:]}
    tree = {"w": {"__msgpack_chunked_array__": True, "shape": {"0": 2, "1": 5}, "chunks": chunks}}
    (tmp_path / "f").write_bytes(hand.packed(tree))
    assert_same(files.read(tmp_path / "f"), {"w": whole.reshape(2, 5)})


def test_flax_itself_writes_what_is_read(tmp_path):
    from flax import serialization

    tree = {
        "params": {"down_0.block_1": {"kernel": hand.values("bfloat16")}},
        "step": 7,
        "z": 1 + 2j,
        "l": [1.5, -3, 300],
    }
    (tmp_path / "f").write_bytes(serialization.msgpack_serialize(tree))
    assert_same(files.read(tmp_path / "f"), {"params/down_0.block_1/kernel": hand.values("bfloat16")})


def shards(folder, **changes):
    """Two shards and their index; `changes` go into the map."""
    places = {}
    for i, name in enumerate(hand.ARRAYS):
        shard = f"model-{i % 2}.safetensors"
        places[name] = shard
    for shard in set(places.values()):
        files.write(folder / shard, {n: a for n, a in hand.ARRAYS.items() if places[n] == shard})
    (folder / "index.json").write_text(json.dumps({"metadata": {}, "weight_map": places | changes}))
    return folder / "index.json"


def test_shards_come_together(tmp_path):
    assert_same(files.read(shards(tmp_path)), hand.ARRAYS)
    assert files.summary(tmp_path / "index.json").format == "safetensors, 2 shards"


def test_missing_and_misplaced_shards_are_named(tmp_path):
    index = shards(tmp_path, more="model-2.safetensors")
    with pytest.raises(WeightsError, match=r"lacks 1 of 3 shards, such as model-2.safetensors"):
        files.read(index)
    index = shards(tmp_path, more="model-1.safetensors")
    with pytest.raises(WeightsError, match=r"places 'more' in model-1.safetensors, which lacks it"):
        files.read(index)
    index = shards(tmp_path, steps="model-1.safetensors")
    with pytest.raises(WeightsError, match=r"model-0.safetensors: holds 'steps', which the index does not place here"):
        files.read(index)


def test_links_are_followed(tmp_path):
    hand.torch_zip(tmp_path / "blob")
    (tmp_path / "link").symlink_to("blob")
    assert_same(files.read(tmp_path / "link"), hand.ARRAYS)


def test_summary_counts_and_describes(tmp_path):
    names = ("time_embed.0.weight", "input_blocks.0.0.weight", "output_blocks.0.0.weight")
    files.write(tmp_path / "f", {n: hand.values("float32") for n in names} | {"n": np.int64([1])}, {"by\n": "a\x1b[0m"})
    found = files.summary(tmp_path / "f")
    assert found[1:7] == ("safetensors", "UNet (OpenAI)", 4, 19, 80, {"float32": 3, "int64": 1})
    lines = files.describe(found).split("\n")
    assert lines[2:] == ["family      UNet (OpenAI)", "tensors     4", "parameters  19", "bytes       80",
                         "dtypes      float32 (3), int64 (1)", "metadata by? a?[0m"]  # fmt: skip


def test_numbers_that_are_not_finite_are_named():
    arrays = {"good": hand.values("bfloat16"), "count": np.int64([1])}
    assert files.check_finite(arrays) == []
    bad = {"nan": np.float32([1, np.nan]), "inf": np.array([np.inf]).astype(hand.dtype("bfloat16"))}
    with pytest.warns(UserWarning, match="NaN or infinite numbers in nan, inf: the weights are damaged"):
        assert files.check_finite(arrays | bad) == ["nan", "inf"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    files.write(tmp_path / "f", hand.ARRAYS)
    before = (tmp_path / "f").read_bytes()

    class Broken:
        dtype, shape, nbytes = np.dtype(np.float32), (2,), 8

        def __array__(self, dtype=None, copy=None):
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        files.write(tmp_path / "f", {"a": Broken()})
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_bytes() == before


@pytest.mark.parametrize(
    ("arrays", "metadata", "message"),
    [
        ({"a": np.array(["text"])}, None, r"tensor 'a' is <U4; safetensors has bool"),
        ({"__metadata__": np.zeros(1)}, None, "cannot be named '__metadata__'"),
        ({"a": np.zeros(1)}, {"step": 3}, "metadata are texts by name, got 'step': int"),
    ],
)
def test_what_safetensors_lack_is_not_written(arrays, metadata, message, tmp_path):
    with pytest.raises(WeightsError, match=message):
        files.write(tmp_path / "f", arrays, metadata)
    assert list(tmp_path.iterdir()) == []


CONV = (8, 4, 3, 3)
NAMES = {
    "UNet (OpenAI)": {"time_embed.0.weight": (8, 8), "input_blocks.0.0.weight": CONV, "output_blocks.0.0.weight": CONV},
    "Stable Diffusion 1, single file": {"model.diffusion_model.out.2.weight": (8, 8), "first_stage_model.a": (1,),
                                        "cond_stage_model.transformer.text_model.a": (1,)},
    "UNet2DConditionModel (diffusers)": {"time_embedding.linear_1.weight": (8, 8), "down_blocks.0.a": (1,),
                                         "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": (8, 8)},
    "UNet2DModel (diffusers)": {"time_embedding.linear_1.weight": (8, 8), "down_blocks.0.a": (1,),
                                "conv_norm_out.weight": (8,)},
    "AutoencoderKL (diffusers)": {"encoder.down_blocks.0.a": (1,), "decoder.up_blocks.0.a": (1,),
                                  "decoder.conv_norm_out.weight": (8,)},
    "LoRA (kohya)": {"lora_unet_a.lora_down.weight": (4, 8), "lora_unet_a.lora_up.weight": (8, 4)},
    "EDM": {"ema.model.map_layer0.weight": (8, 8), "ema.model.enc.8x8_block0.norm0.weight": (8,)},
    "NCSN++ or DDPM++ (JAX)": {"params/ResnetBlockBigGANpp_0/Conv_0/kernel": (3, 3, 4, 8)},
    "Inception for FID (pytorch-fid)": {"Mixed_5b.branch1x1.conv.weight": CONV, "Mixed_7c.a": (1,),
                                        "Conv2d_1a_3x3.conv.weight": CONV},
    "LPIPS, linear layers alone": {"lin0.model.1.weight": (1, 64, 1, 1), "lin4.model.1.weight": (1, 512, 1, 1)},
    "DiT": {"x_embedder.proj.weight": CONV, "blocks.0.adaLN_modulation.1.weight": (48, 8)},
    "CLIP text encoder (transformers)": {"text_model.encoder.layers.0.self_attn.q_proj.weight": (8, 8),
                                         "text_model.embeddings.token_embedding.weight": (9, 8)},
    "consistency decoder (OpenAI)": {"blocks.down_0_conv_0.gn_1.g": (8,), "embed_image.f.w": CONV},
    "unknown": {"weight": (3,)},
}  # fmt: skip


@pytest.mark.parametrize("family", NAMES)
def test_families_are_told_from_names(family):
    assert families.guess(NAMES[family]) == family
    assert families.guess({f"module.{name}": shape for name, shape in NAMES[family].items()}) == family


GOLDEN = {
    "ae_kl_a": "KL autoencoder (CompVis)",
    "unet_adm_classcond_a": "UNet (OpenAI)",
    "unet_ddpm_a": "UNet of DDPM (ermongroup, CompVis)",
    "unet_ldm_xattn_a": "UNet of Stable Diffusion (CompVis), without prefix",
    "unet_superres_a": "super-resolution UNet (OpenAI)",
    "vqmodel_a": "VQ autoencoder (CompVis)",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_families_of_the_releases_own_names(name):
    with np.load(Path(__file__).parents[1] / "golden/core" / f"{name}.npz") as arrays:
        shapes = {key.removeprefix("sd/"): arrays[key].shape for key in arrays.files if key.startswith("sd/")}
    assert len(shapes) > 100
    assert families.guess(shapes) == GOLDEN[name]


def test_openai_unets_are_told_apart_by_shapes():
    plain = NAMES["UNet (OpenAI)"]
    assert families.guess(plain | {"input_blocks.0.0.weight": (8, 6, 3, 3)}) == "super-resolution UNet (OpenAI)"
    assert families.guess(plain | {"middle_block.1.qkv.weight": (24, 8, 1)}) == "UNet (OpenAI)"
    square = plain | {"middle_block.1.qkv.weight": (24, 8, 1, 1)}
    assert families.guess(square) == "UNet of consistency models (OpenAI)"
    classifier = {name: shape for name, shape in plain.items() if "output" not in name}
    assert families.guess(classifier | {"out.2.positional_embedding": (8, 65)}) == "classifier (OpenAI)"
