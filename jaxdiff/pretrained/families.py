"""Guesses from the names of tensors, and a few shapes, whose weights a file holds.

One table: a family, and marks that all must occur in the names. The first row that fits is the answer, so rows for
single files that hold several networks stand before those for the networks. A guess says what to try; whether all
tensors fit is decided by the importers.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

UNKNOWN = "unknown"


class Family(NamedTuple):
    """A kind of weights and how to know it.

    Attributes:
      name: publisher or library, and network.
      marks: texts that all occur in the names. `^` stands for a name's beginning, `$` for its end.
      axes: {end of a name: number of axes} that hold besides.
      inputs: {end of a name: size of axis 1} that hold besides.
    """

    name: str
    marks: tuple[str, ...]
    axes: Mapping[str, int] = {}
    inputs: Mapping[str, int] = {}


FAMILIES = (
    Family("LoRA (kohya)", ("^lora_unet_", ".lora_down.weight$")),
    Family("LoRA (kohya), text encoder", ("^lora_te", ".lora_down.weight$")),
    Family("LoRA (diffusers, PEFT)", (".lora_A.", ".lora_B.")),
    Family("LoRA (diffusers)", (".lora.down.weight$", ".lora.up.weight$")),
    Family("LoRA (diffusers, attention processors)", ("_lora.down.weight$", "_lora.up.weight$")),
    Family("consistency decoder (OpenAI)", ("blocks.down_0_conv_0.gn_1.", "embed_image.f.")),
    Family("consistency decoder (diffusers)", ("^decoder_unet.", ".time_emb_proj.")),
    Family("ControlNet (lllyasviel)", ("input_hint_block.0.", "zero_convs.0.0.")),
    Family("ControlNet (diffusers)", ("controlnet_cond_embedding.", "controlnet_down_blocks.0.")),
    Family("Stable Diffusion XL, single file", ("^model.diffusion_model.", "^conditioner.embedders.1.")),
    Family(
        "Stable Diffusion 1, single file",
        ("^model.diffusion_model.", "^first_stage_model.", "^cond_stage_model.transformer.text_model."),
    ),
    Family(
        "Stable Diffusion 2, single file",
        ("^model.diffusion_model.", "^first_stage_model.", "^cond_stage_model.model."),
    ),
    Family("Stable Diffusion 3, single file", ("^model.diffusion_model.joint_blocks.0.",)),
    Family("latent diffusion (CompVis), single file", ("^model.diffusion_model.", "^first_stage_model.")),
    Family("latent diffusion (CompVis), UNet", ("^model.diffusion_model.input_blocks.0.0.weight$",)),
    Family("UNet2DConditionModel (diffusers)", ("time_embedding.linear_1.", "down_blocks.0.", ".attn2.to_k.weight$")),
    Family("UNet2DModel (diffusers)", ("time_embedding.linear_1.", "down_blocks.0.", "conv_norm_out.")),
    Family("VQModel (diffusers)", ("encoder.down_blocks.0.", "quantize.embedding.weight$")),
    Family("AutoencoderKL (diffusers)", ("encoder.down_blocks.0.", "decoder.up_blocks.0.", "conv_norm_out.")),
    Family("VQ autoencoder (CompVis)", ("encoder.down.0.block.0.", "quantize.embedding.weight$")),
    Family("KL autoencoder (CompVis)", ("encoder.down.0.block.0.", "post_quant_conv.")),
    Family("MMDiT", ("joint_blocks.0.x_block.",)),
    Family("MMDiT (diffusers)", ("^transformer_blocks.0.attn.add_q_proj.",)),
    Family("Wan video transformer (diffusers)", ("^condition_embedder.time_embedder.", "^scale_shift_table$")),
    Family("Wan video autoencoder (diffusers)", ("^encoder.mid_block.", ".norm1.gamma$")),
    Family("DiT", ("x_embedder.proj.weight$", "blocks.0.adaLN_modulation.1.")),
    Family("DiT (diffusers)", ("transformer_blocks.0.norm1.emb.", "pos_embed.proj.")),
    Family("UNet of Stable Diffusion (CompVis), without prefix", ("input_blocks.0.0.", ".attn2.to_k.weight$")),
    Family("classifier (OpenAI)", ("time_embed.0.", "input_blocks.0.0.", "out.2.positional_embedding$")),
    Family(
        "super-resolution UNet (OpenAI)", ("time_embed.0.", "output_blocks."), inputs={"input_blocks.0.0.weight": 6}
    ),
    Family(
        "UNet of consistency models (OpenAI)",
        ("time_embed.0.", "output_blocks."),
        axes={"middle_block.1.qkv.weight": 4},
    ),
    Family("UNet (OpenAI)", ("time_embed.0.", "input_blocks.0.0.", "output_blocks.")),
    Family("classifier without attention pool (OpenAI)", ("time_embed.0.", "input_blocks.0.0.", "out.0.")),
    Family("UNet of DDPM (ermongroup, CompVis)", ("temb.dense.0.", "down.0.block.0.", "mid.block_1.")),
    Family("DDGAN generator", ("z_transform.", "all_modules.")),
    Family("DDGAN discriminator", ("t_embed.main.0.", "start_conv.", "end_linear.")),
    Family("NCSN++ (PyTorch)", ("all_modules.0.", "all_modules.3.")),
    Family("NCSN++ or DDPM++ (JAX)", ("ResnetBlockBigGANpp_0/",)),
    Family("DDPM++ without BigGAN blocks (JAX)", ("ResnetBlockDDPMpp_0/",)),
    Family("UNet of progressive distillation (JAX)", ("down_0.block_0/", "dense0/")),
    Family("EDM2", ("out_gain$", ".emb_fourier.")),
    Family("EDM", (".enc.", ".map_layer0.weight$", "_block0.norm0.")),
    Family("CLIP, text and image (transformers)", ("text_model.encoder.layers.0.", "vision_model.encoder.layers.0.")),
    Family(
        "CLIP text encoder (transformers)", ("encoder.layers.0.self_attn.q_proj.weight$", "token_embedding.weight$")
    ),
    Family("CLIP, text and image (OpenCLIP)", ("transformer.resblocks.0.attn.in_proj_weight$", "visual.")),
    Family("CLIP text encoder (OpenCLIP)", ("transformer.resblocks.0.attn.in_proj_weight$", "token_embedding.weight$")),
    Family("Inception for FID (pytorch-fid)", ("Mixed_5b.branch1x1.conv.weight$", "Mixed_7c.", "Conv2d_1a_3x3.")),
    Family("LPIPS, with its network", ("net.slice1.0.weight$", "lin0.model.1.weight$")),
    Family("LPIPS, linear layers alone", ("lin0.model.1.weight$", "lin4.model.1.weight$")),
    Family("VGG-16 (torchvision)", ("^features.28.weight$", "^classifier.6.weight$")),
)


def guess(shapes: Mapping[str, Sequence[int]]) -> str:
    """The family that the tensors seem to belong to, or "unknown".

    Args:
      shapes: of all tensors, by name. A leading "module." (of DataParallel) is looked past.
    """
    shapes = {name.removeprefix("module."): shape for name, shape in shapes.items()}
    # One text, so that a mark costs one search however many tensors there are.
    names = "".join(f"\n^{name}$\n" for name in shapes)

    def fits(family: Family) -> bool:
        if not all(mark in names for mark in family.marks):
            return False
        size = [shapes.get(name, ())[1:2] == (inputs,) for name, inputs in family.inputs.items()]
        return all(size) and all(len(shapes.get(name, ())) == axes for name, axes in family.axes.items())

    return next((family.name for family in FAMILIES if fits(family)), UNKNOWN)
