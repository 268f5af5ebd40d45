"""LoRA of peft and diffusers, saved in every way, merged by the import: the outputs of the adapted network."""

import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from exchange import assert_close, drawn, first, imported, run
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from jaxdiff.pretrained import folders

RANK, ALPHA = 4, 10
UNET = dict(
    block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=4, cross_attention_dim=12,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip
TEXT = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
TEXT |= dict(bos_token_id=38, eos_token_id=39)
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "conv1", "conv_shortcut"]


def config(targets=LAYERS, **settings):
    settings = {"lora_alpha": ALPHA} | settings
    return LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False, **settings)


def adapted(**settings):
    torch.manual_seed(0)
    unet = drawn(UNet2DConditionModel(**UNET))
    unet.add_adapter(config(**settings))
    return unet


def by_the_pipeline(folder):
    """With alpha = r, as nothing in such a file says otherwise."""
    unet = adapted(lora_alpha=RANK)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return unet, "pytorch_lora_weights.safetensors"


def by_the_pipeline_with_settings(folder):
    unet = adapted(alpha_pattern={"to_q": 3, "ff.net.2": 7})
    about = {name: list(v) if isinstance(v, set) else v for name, v in unet.peft_config["default"].to_dict().items()}
    layers = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=about)
    return unet, "pytorch_lora_weights.safetensors"


def by_the_unet(folder):
    unet = adapted()
    unet.save_lora_adapter(folder)
    return unet, "pytorch_lora_weights.safetensors"


def by_torch(folder):
    unet = adapted(lora_alpha=RANK)
    folder.mkdir()
    torch.save({f"unet.{name}": a for name, a in get_peft_model_state_dict(unet).items()}, folder / "lora.bin")
    return unet, "lora.bin"


def by_peft(folder):
    torch.manual_seed(0)
    model = get_peft_model(drawn(UNet2DConditionModel(**UNET)), config(use_rslora=True))
    model.save_pretrained(folder)
    return model.base_model.model, "adapter_model.safetensors"


def as_kohya(folder):
    unet = adapted()
    state = {f"unet.{name}": a for name, a in get_peft_model_state_dict(unet).items()}
    state = convert_state_dict_to_kohya(state)
    state = {name: torch.tensor(float(ALPHA)) if name.endswith(".alpha") else a for name, a in state.items()}
    folder.mkdir()
    save_file({name: a.contiguous() for name, a in state.items()}, folder / "kohya.safetensors")
    return unet, "kohya.safetensors"


SAVED = [by_the_pipeline, by_the_pipeline_with_settings, by_the_unet, by_torch, by_peft, as_kohya]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The imported UNet without additions, and a compiled call of it."""
    folder = tmp_path_factory.mktemp("base")
    drawn(UNet2DConditionModel(**UNET)).save_pretrained(folder / "theirs")
    ours = imported("diffusers-unet", folder / "theirs", folder / "ours")
    return folder / "ours", ours, jax.jit(ours.spec.network.apply)


@pytest.mark.parametrize("save", SAVED)
def test_unet(save, base, tmp_path):
    folder, ours, apply = base
    unet, name = save(tmp_path / "lora")
    run("import", "lora", tmp_path / "lora" / name, tmp_path / "merged", "--base", folder)
    merged = folders.load(tmp_path / "merged").params

    generator = np.random.default_rng(1)
    x_t, context = (generator.standard_normal(shape, np.float32) for shape in ((1, 8, 8, 4), (1, 7, 12)))
    t = np.array([400.0], np.float32)
    plain, output = (apply({"params": params}, x_t, t, {"context": context}) for params in (ours.params, merged))
    with torch.inference_mode():
        found = unet.eval()(first(x_t), torch.from_numpy(t), torch.from_numpy(context)).sample
    assert np.abs(output - plain).max() > 0.1
    assert_close(output, found)


def test_text_encoder(tmp_path):
    torch.manual_seed(0)
    model = drawn(CLIPTextModel(CLIPTextConfig(**TEXT)))
    model.save_pretrained(tmp_path / "theirs")
    ours = imported("clip-text", tmp_path / "theirs", tmp_path / "ours")
    model.add_adapter(config(["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]))
    layers = get_peft_model_state_dict(model)
    about = {"lora_alpha": ALPHA, "r": RANK}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, text_encoder_lora_layers=layers, text_encoder_lora_adapter_metadata=about
    )
    file = tmp_path / "pytorch_lora_weights.safetensors"
    run("import", "lora", file, tmp_path / "merged", "--base", tmp_path / "ours")
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    apply = jax.jit(ours.spec.network.apply)
    plain, merged = (
        apply({"params": p}, tokens).tokens for p in (ours.params, folders.load(tmp_path / "merged").params)
    )
    with torch.inference_mode():
        found = model.eval()(torch.from_numpy(tokens).long()).last_hidden_state
    assert np.abs(merged - plain).max() > 0.1
    assert_close(merged, found)
