"""Every way in which diffusers saves a network reads to the same parameters; a pipeline is imported whole."""

import json

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from exchange import assert_close, drawn, first, imported, run
from flax import traverse_util
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from jaxdiff.pretrained import folders

UNET = dict(
    block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=4, cross_attention_dim=12,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip
VAE = dict(
    block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
)  # fmt: skip
TEXT = dict(
    vocab_size=7, hidden_size=12, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=6, bos_token_id=4, eos_token_id=5,
)  # fmt: skip


def safetensors(model, folder):
    model.save_pretrained(folder)
    return [folder]


def torch_pickle(model, folder):
    model.save_pretrained(folder, safe_serialization=False)
    assert (folder / "diffusion_pytorch_model.bin").is_file()
    return [folder]


def shards(model, folder):
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*-of-*.safetensors"))) > 3
    return [folder]


def pickled_shards(model, folder):
    model.save_pretrained(folder, max_shard_size="100KB", safe_serialization=False)
    assert len(list(folder.glob("*-of-*.bin"))) > 3
    return [folder]


def configuration(model, folder):
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps({"_class_name": type(model).__name__, **UNET}))
    return ["--config", folder / "settings.json"]


def checkpoint(model, folder):
    given = configuration(model, folder)
    torch.save({"state_dict": model.state_dict(), "step": 3}, folder / "last.ckpt")
    return [folder / "last.ckpt", *given]


def file_with_prefix(model, folder):
    given = configuration(model, folder)
    state = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(state | {"optimizer.step": torch.zeros(1)}, folder / "net.safetensors")
    return [folder / "net.safetensors", *given, "--prefix", "net."]


WAYS = [safetensors, torch_pickle, shards, pickled_shards, checkpoint, file_with_prefix]


def taken(kind, words, folder):
    paths = [word for word in words if not str(word).startswith("--")][:1]
    run("import", kind, *paths, folder, *words[1:])
    return folders.load(folder)


def leaves(params):
    return traverse_util.flatten_dict(params, sep="/")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A UNet and what is read of the file that `test_diffusers_unets` compares outputs of."""
    folder = tmp_path_factory.mktemp("reference")
    unet = drawn(UNet2DConditionModel(**UNET))
    return unet, taken("diffusers-unet", safetensors(unet, folder / "theirs"), folder / "ours")


@pytest.mark.parametrize("save", WAYS)
def test_ways_of_saving(save, reference, tmp_path):
    unet, expected = reference
    found = taken("diffusers-unet", save(unet, tmp_path / "theirs"), tmp_path / "ours")
    assert_same(found, expected)


@pytest.mark.parametrize("save", [safetensors, torch_pickle, shards])
def test_the_kind_is_told_from_the_names(save, reference, tmp_path):
    unet, expected = reference
    assert_same(taken("auto", save(unet, tmp_path / "theirs"), tmp_path / "ours"), expected)


def assert_same(found, expected):
    assert found.spec == expected.spec
    theirs = leaves(expected.params)
    assert sorted(leaves(found.params)) == sorted(theirs)
    for path, array in leaves(found.params).items():
        np.testing.assert_array_equal(array, theirs[path], err_msg=path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, reference, tmp_path):
    unet, expected = reference
    half = UNet2DConditionModel(**UNET)
    half.load_state_dict(unet.state_dict())
    half.to(dtype).save_pretrained(tmp_path / "theirs", variant="half")
    file = tmp_path / "theirs" / "diffusion_pytorch_model.half.safetensors"
    wide = imported("diffusers-unet", file, tmp_path / "wide")
    same = imported("diffusers-unet", file.parent, tmp_path / "same", "--dtype", str(dtype).removeprefix("torch."))
    assert {str(leaf.dtype) for leaf in leaves(same.params).values()} == {str(dtype).removeprefix("torch.")}
    for path, array in leaves(wide.params).items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(leaves(same.params)[path].astype(np.float32), array, err_msg=path)
        rounded = torch.from_numpy(leaves(expected.params)[path].copy()).to(dtype).float().numpy()
        np.testing.assert_array_equal(rounded, array, err_msg=path)


def test_a_pipeline_is_imported_whole(tmp_path):
    unet, vae = drawn(UNet2DConditionModel(**UNET)), drawn(AutoencoderKL(**VAE))
    text = drawn(CLIPTextModel(CLIPTextConfig(**TEXT)))
    vocabulary = ["a", "b", "a</w>", "b</w>", "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(vocabulary)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text, unet=unet, safety_checker=None, feature_extractor=None,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        tokenizer=CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")),
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "theirs")
    run("import", "auto", tmp_path / "theirs", tmp_path / "ours")
    assert folders.parts_of(tmp_path / "ours") == ["text_encoder", "unet", "vae"]
    ours = {name: folders.load(tmp_path / "ours" / name) for name in ("text_encoder", "unet", "vae")}

    generator = np.random.default_rng(1)
    x_t, t = generator.standard_normal((2, 8, 8, 4), np.float32), np.array([20.0, 900.0], np.float32)
    tokens = np.array([[4, 0, 1, 5, 5, 5], [4, 2, 3, 1, 0, 5]], np.int32)
    with torch.inference_mode():
        context = text(torch.from_numpy(tokens).long()).last_hidden_state
        eps = unet(first(x_t), torch.from_numpy(t), context).sample
        image = vae.decode(eps).sample

    def apply(params, name, *inputs, **options):
        return ours[name].spec.network.apply({"params": params[name]}, *inputs, **options)

    @jax.jit
    def together(params, tokens, x_t, t):
        context = apply(params, "text_encoder", tokens).tokens
        eps = apply(params, "unet", x_t, t, {"context": context})
        return context, eps, apply(params, "vae", eps, method="decode")

    outputs = together({name: part.params for name, part in ours.items()}, tokens, x_t, t)
    for one, other in zip(outputs, (context, eps, image), strict=True):
        assert_close(one, other)
