"""The kinds of published weights that can be read and written: one row each, in `KINDS`.

A row ties a form of `forms` (publisher and network) to its published configurations and the shapes of the network.
Checkpoints that hold several networks are in `BUNDLES`, as prefixes of such kinds.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.networks import (
    autoencoder_kl,
    autoencoder_vq,
    clip_text,
    consistency_decoder,
    controlnet,
    ddgan_discriminators,
    dit,
    encoder_unet,
    ncsnpp,
    patch_discriminator,
    progdist_unet,
    unet,
)
from jaxdiff.networks import ncsnpp_presets as ncsnpps
from jaxdiff.networks import unet_presets as unets
from jaxdiff.networks.autoencoder_blocks import example_input
from jaxdiff.networks.base import param_shapes
from jaxdiff.networks.inception import Inception
from jaxdiff.networks.layers import LabelEmbedding
from jaxdiff.networks.lpips import LPIPS
from jaxdiff.pretrained import (
    autoencoders,
    ddgan,
    ddpm,
    diffusers_config,
    forms,
    openai,
    perceptual,
    progdist,
)
from jaxdiff.pretrained import consistency_decoder as decoders
from jaxdiff.pretrained import ddgan_discriminators as discriminators
from jaxdiff.pretrained import diffusers_write as write
from jaxdiff.pretrained import dit as dits
from jaxdiff.pretrained import ncsnpp as flax_ncsnpp
from jaxdiff.pretrained.kinds import Kind, Spec, Translation
from jaxdiff.pretrained.torch_layout import SAME, Entry


def _text_shapes(network: Any) -> Any:
    return param_shapes(network, clip_text.example_ids(network))


def _autoencoder_shapes(network: Any) -> Any:
    return param_shapes(network, example_input(network))


def _edm(network: Any, image_size: int) -> Callable[[], Spec]:
    return lambda: Spec(network, {"image_size": image_size})


def _linear(network: Callable[[], Any]) -> Callable[[], Spec]:
    return lambda: Spec(network(), {"linear_projection": True})


SD = {
    "sd1": lambda: Spec(unets.stable_diffusion_unet(1)),
    "sd2": _linear(lambda: unets.stable_diffusion_unet(2)),
    "sd1-inpainting": lambda: Spec(unets.stable_diffusion_unet(1, in_channels=9)),
    "sd2-inpainting": _linear(lambda: unets.stable_diffusion_unet(2, in_channels=9)),
}
CONTROLNETS = {
    "sd1": lambda: Spec(controlnet.controlnet_for(unets.stable_diffusion_unet(1))),
    "sd2": _linear(lambda: controlnet.controlnet_for(unets.stable_diffusion_unet(2))),
}
KL = {
    "kl-f8": lambda: Spec(autoencoder_kl.kl_f8()),
    "kl-f4": lambda: Spec(autoencoder_kl.kl_f4()),
    "kl-f16": lambda: Spec(autoencoder_kl.kl_f16()),
    "kl-f32": lambda: Spec(autoencoder_kl.kl_f32()),
}
VQ = {
    "vq-f4": lambda: Spec(autoencoder_vq.vq_f4()),
    "vq-f4-noattn": lambda: Spec(autoencoder_vq.vq_f4_noattn()),
    "vq-f8": lambda: Spec(autoencoder_vq.vq_f8()),
    "vq-f8-n256": lambda: Spec(autoencoder_vq.vq_f8_n256()),
    "vq-f16": lambda: Spec(autoencoder_vq.vq_f16()),
    "vqgan-f16-1024": lambda: Spec(autoencoder_vq.vqgan_f16(1024)),
    "vqgan-f16-16384": lambda: Spec(autoencoder_vq.vqgan_f16(16384)),
}
# Networks that have no preset of their own, as their publishers configure them.
IDDPM_LSUN = {
    "model_channels": 128, "out_channels": 6, "num_res_blocks": 2, "channel_mult": (1, 1, 2, 2, 4, 4),
    "attention_resolutions": (16,), "num_heads": 1, "num_heads_upsample": -1,
}  # fmt: skip
IDDPM_UPSAMPLER = {
    "super_resolution": True, "model_channels": 192, "out_channels": 6, "num_res_blocks": 2,
    "channel_mult": (1, 1, 2, 2, 4, 4), "attention_resolutions": (16, 32), "num_heads": 4, "num_classes": 1000,
    "use_scale_shift_norm": True,
}  # fmt: skip
LDM_CHURCHES = {
    "in_channels": 4, "out_channels": 4, "model_channels": 192, "num_res_blocks": 2, "channel_mult": (1, 2, 2, 4, 4),
    "attention_resolutions": (1, 2, 4, 8), "num_heads": 8, "use_scale_shift_norm": True, "resblock_updown": True,
}  # fmt: skip
DECODER = {"consistency-decoder": lambda: Spec(consistency_decoder.ConsistencyDecoder())}
GENERATORS = ("netG_dict.", "")
DISCRIMINATORS = ("netD_dict.", "")
FLAX = ("params_ema/", "ema_params/", "params/", "")
UNET = forms.shapes(unet.example_inputs)

KINDS: dict[str, Kind] = {
    "openai-unet": Kind(
        "UNet of improved-diffusion and guided-diffusion", forms.openai_unet, UNET,
        {
            "iddpm-cifar10": lambda: Spec(unets.iddpm_unet(32)),
            "iddpm-imagenet64": lambda: Spec(unets.iddpm_unet(64)),
            "iddpm-imagenet64-cond": lambda: Spec(unets.iddpm_unet(64, num_classes=1000)),
            "iddpm-lsun": lambda: forms.openai_unet_config(IDDPM_LSUN),
            "iddpm-upsampler": lambda: forms.openai_unet_config(IDDPM_UPSAMPLER),
            "adm-imagenet64": lambda: Spec(unets.adm_unet(64), {"new_attention_order": True}),
            "adm-imagenet128": lambda: Spec(unets.adm_unet(128)),
            "adm-imagenet256": lambda: Spec(unets.adm_unet(256)),
            "adm-imagenet512": lambda: Spec(unets.adm_unet(512)),
            "adm-256-uncond": lambda: Spec(unets.adm_unet(256, num_classes=None)),
            "adm-upsampler-256": lambda: Spec(unets.adm_upsampler_unet(256)),
            "adm-upsampler-512": lambda: Spec(unets.adm_upsampler_unet(512)),
        },
        forms.openai_unet_config, ("UNet (OpenAI)", "super-resolution UNet (OpenAI)"),
    ),
    "openai-classifier": Kind(
        "noisy classifier of guided-diffusion", forms.classifier, forms.shapes(encoder_unet.example_inputs),
        {f"adm-{n}": lambda n=n: Spec(encoder_unet.adm_classifier(n)) for n in (64, 128, 256, 512)},
        forms.classifier_config, ("classifier (OpenAI)", "classifier without attention pool (OpenAI)"),
    ),
    "consistency-unet": Kind(
        "UNet of OpenAI's consistency models and of their EDM teachers", forms.consistency_unet, UNET,
        {
            "cm-imagenet64": lambda: Spec(unets.consistency_unet(64, num_classes=1000)),
            "cm-lsun256": lambda: Spec(unets.consistency_unet(256)),
        },
        lambda config: Spec(openai.unet_from_config(config)), ("UNet of consistency models (OpenAI)",),
    ),
    "consistency-decoder": Kind(
        "OpenAI's consistency decoder, the TorchScript archive", partial(forms.decoder, names=decoders.OPENAI),
        forms.shapes(consistency_decoder.example_inputs), DECODER, None, ("consistency decoder (OpenAI)",),
    ),
    "compvis-unet": Kind(
        "UNet of latent diffusion and Stable Diffusion, CompVis names", forms.compvis_unet, UNET,
        SD | {
            "ldm-f4": lambda: Spec(unets.ldm_unet()),
            "ldm-churches": lambda: forms.compvis_unet_config(LDM_CHURCHES),
            "ldm-imagenet-f4": lambda: Spec(unets.ldm_imagenet_unet(4)),
            "ldm-imagenet-f8": lambda: Spec(unets.ldm_imagenet_unet(8)),
            "ldm-text": lambda: Spec(unets.ldm_text_unet()),
        },
        forms.compvis_unet_config,
        ("latent diffusion (CompVis), UNet", "UNet of Stable Diffusion (CompVis), without prefix"),
        ("model.diffusion_model.", ""),
    ),
    "compvis-autoencoder": Kind(
        "KL or VQ autoencoder, names of CompVis and taming",
        lambda network: Translation(autoencoders.autoencoder_entries(network)),
        _autoencoder_shapes,
        KL | VQ, forms.compvis_autoencoder_config, ("KL autoencoder (CompVis)", "VQ autoencoder (CompVis)"),
        ("first_stage_model.", ""),
    ),
    "compvis-discriminator": Kind(
        "patch discriminator of the autoencoders",
        lambda network: Translation(autoencoders.discriminator_entries(network)), forms.patch_shapes,
        {
            "patch-3": lambda: Spec(patch_discriminator.PatchDiscriminator()),
            "patch-2": lambda: Spec(patch_discriminator.PatchDiscriminator(num_layers=2)),
        },
        roots=("loss.discriminator.", ""),
    ),
    "controlnet": Kind(
        "ControlNet of lllyasviel's release", forms.controlnet, forms.shapes(controlnet.example_inputs), CONTROLNETS,
        forms.controlnet_config, ("ControlNet (lllyasviel)",), ("control_model.", ""),
    ),
    "diffusers-unet": Kind(
        "UNet2DModel or UNet2DConditionModel of diffusers", forms.diffusers_unet, UNET,
        SD | {"lcm-sd1": lambda: Spec(unets.stable_diffusion_unet(1).clone(guidance_dim=256))},
        forms.diffusers_unet_config, ("UNet2DConditionModel (diffusers)", "UNet2DModel (diffusers)"),
        configure=write.unet_config,
    ),
    "diffusers-autoencoder": Kind(
        "AutoencoderKL or VQModel of diffusers", forms.diffusers_autoencoder,
        _autoencoder_shapes, KL | VQ,
        lambda config: Spec(diffusers_config.autoencoder_from_config(config)),
        ("AutoencoderKL (diffusers)", "VQModel (diffusers)"), configure=write.autoencoder_config,
    ),
    "diffusers-controlnet": Kind(
        "ControlNetModel of diffusers", forms.diffusers_controlnet, forms.shapes(controlnet.example_inputs),
        CONTROLNETS, forms.diffusers_controlnet_config, ("ControlNet (diffusers)",), configure=write.controlnet_config,
    ),
    "diffusers-consistency-decoder": Kind(
        "UNet of diffusers' ConsistencyDecoderVAE", partial(forms.decoder, names=decoders.DIFFUSERS),
        forms.shapes(consistency_decoder.example_inputs), DECODER, forms.diffusers_decoder_config,
        roots=("decoder_unet.", ""),
    ),
    "diffusers-encoder": Kind(
        "encoder of diffusers' ConsistencyDecoderVAE", forms.encoder, forms.encoder_shapes,
        {"kl-f8": lambda: Spec(autoencoder_kl.kl_f8())}, forms.encoder_config,
    ),
    "clip-text": Kind(
        "CLIP text encoder of transformers", forms.clip_text, _text_shapes,
        {
            "clip-l": lambda: Spec(clip_text.clip_l()),
            "open-clip-h": lambda: Spec(clip_text.open_clip_h()),
            "open-clip-h-24": lambda: Spec(clip_text.open_clip_h(24)),
        },
        forms.clip_text_config, ("CLIP text encoder (transformers)", "CLIP, text and image (transformers)"),
        configure=write.clip_text_config,
    ),
    "open-clip-text": Kind(
        "text tower of OpenCLIP", forms.open_clip_text, _text_shapes,
        {
            "open-clip-h": lambda: Spec(clip_text.open_clip_h()),
            "open-clip-h-24": lambda: Spec(clip_text.open_clip_h(24)),
        },
        None, ("CLIP text encoder (OpenCLIP)", "CLIP, text and image (OpenCLIP)"),
    ),
    "ddpm-unet": Kind(
        "UNet of DDPM, names of ermongroup/ddim",
        lambda network: Translation(ddpm.unet_entries(network)), UNET,
        {"ddpm-cifar10": lambda: Spec(unets.ddpm_unet(32)), "ddpm-256": lambda: Spec(unets.ddpm_unet(256))},
        forms.ddpm_config, ("UNet of DDPM (ermongroup, CompVis)",),
    ),
    "edm": Kind(
        "SongUNet of NVlabs' EDM", forms.song_unet, forms.shapes(ncsnpp.example_inputs),
        {
            "edm-cifar10-vp": _edm(ncsnpps.edm_ddpmpp(32), 32),
            "edm-cifar10-cond-vp": _edm(ncsnpps.edm_ddpmpp(32, num_classes=10), 32),
            "edm-cifar10-ve": _edm(ncsnpps.edm_ncsnpp(32), 32),
            "edm-cifar10-cond-ve": _edm(ncsnpps.edm_ncsnpp(32, num_classes=10), 32),
            "edm-64-vp": _edm(ncsnpps.edm_ddpmpp(64), 64),
            "edm-64-ve": _edm(ncsnpps.edm_ncsnpp(64), 64),
        },
        forms.song_unet_config, ("EDM",), ("ema.", ""),
    ),
    "ncsnpp": Kind(
        "NCSN++ of the Flax release (consistency models on CIFAR-10)",
        lambda network: Translation(flax_ncsnpp.ncsnpp_entries(network)), forms.shapes(ncsnpp.example_inputs),
        {"cm-cifar10": lambda: Spec(ncsnpps.consistency_ncsnpp())}, forms.ncsnpp_config,
        ("NCSN++ or DDPM++ (JAX)", "DDPM++ without BigGAN blocks (JAX)"), FLAX,
    ),
    "progdist-unet": Kind(
        "UNet of progressive distillation (Flax)", lambda network: Translation(progdist.unet_entries(network)), UNET,
        {
            "progdist-cifar10": lambda: Spec(progdist_unet.progdist_cifar10_unet()),
            "progdist-imagenet64": lambda: Spec(progdist_unet.progdist_imagenet64_unet()),
        },
        forms.progdist_config, ("UNet of progressive distillation (JAX)",), FLAX,
    ),
    "ddgan-generator": Kind(
        "generator of NVlabs' DDGAN", lambda network: Translation(ddgan.generator_entries(network)),
        forms.shapes(ncsnpp.example_inputs),
        {
            "ddgan-cifar10": lambda: Spec(ncsnpps.ddgan_generator(32)),
            "ddgan-256": lambda: Spec(ncsnpps.ddgan_generator(256)),
        },
        lambda config: Spec(ddgan.generator_from_config(config)), ("DDGAN generator",), GENERATORS,
    ),
    "ddgan-discriminator": Kind(
        "discriminator of NVlabs' DDGAN",
        lambda network: Translation(discriminators.discriminator_entries(network)),
        forms.shapes(ddgan_discriminators.example_inputs),
        {
            "ddgan-small": lambda: Spec(ddgan_discriminators.ddgan_small_discriminator()),
            "ddgan-large": lambda: Spec(ddgan_discriminators.ddgan_large_discriminator()),
        },
        None, ("DDGAN discriminator",), DISCRIMINATORS,
    ),
    "dit": Kind(
        "DiT of facebookresearch",
        lambda network: Translation(
            dits.dit_entries(network), partial(dits.without_positions, dit=network), dits.positions(network)
        ),
        forms.shapes(dit.example_inputs), {
            "DiT-XL/2-256": lambda: Spec(dit.dit_preset("XL/2")),
            "DiT-XL/2-512": lambda: Spec(dit.dit_preset("XL/2", input_size=64)),
        },
        lambda config: Spec(dits.dit_from_config(config)), ("DiT",),
        ("ema.", "model.", ""),
    ),
    "class-embedder": Kind(
        "table of class contexts of latent diffusion on ImageNet",
        lambda network: Translation([Entry("embedding", ("weight",), SAME)]),
        lambda network: param_shapes(network, jax.ShapeDtypeStruct((1,), jnp.int32)),
        {f"classes-{n}": lambda n=n: Spec(LabelEmbedding(n, 512)) for n in (1001, 1000)},
        lambda config: Spec(LabelEmbedding(config["n_classes"], config["embed_dim"])),
        roots=("cond_stage_model.embedding.", "embedding.", ""),
    ),
    "inception": Kind(
        "Inception of pytorch-fid, for Frechet distances",
        lambda network: Translation(perceptual.inception_entries(network), forms.inception_state),
        perceptual.inception_shapes, {"fid-inception": lambda: Spec(Inception())}, None,
        ("Inception for FID (pytorch-fid)",),
    ),
    "lpips": Kind(
        "LPIPS with VGG-16: one file, or torchvision's VGG-16 and the heads",
        lambda network: Translation(perceptual.lpips_entries(), perceptual.whole), perceptual.lpips_shapes,
        {"lpips-vgg": lambda: Spec(LPIPS())}, None, ("LPIPS, with its network", "LPIPS, linear layers alone"),
        ("loss.perceptual_loss.", ""),
    ),
}  # fmt: skip


class Part(NamedTuple):
    """One network of a bundle: its place in the imported folder, its prefix in the file, its kind."""

    name: str
    prefix: str
    kind: str


class Bundle(NamedTuple):
    """A checkpoint of several networks.

    Attributes:
      about: in a few words.
      parts: those that may be in it; what is there is imported.
      ignored: names of tensors that are no weights, or of training alone.
      families: what `families.guess` calls it.
      configure: networks by part -> the publisher's configuration, for those that keep it beside the weights.
    """

    about: str
    parts: tuple[Part, ...]
    ignored: re.Pattern[str]
    families: tuple[str, ...] = ()
    configure: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None


SCHEDULES = (
    r"(model_ema\.(decay|num_updates)|betas|alphas_cumprod(_prev)?|sqrt_\w+|log_one_minus_alphas_cumprod|posterior_\w+|"
    r"logvar|lvlb_weights|scale_factor|global_step|loss\.logvar)$"
)
BUNDLES: dict[str, Bundle] = {
    "compvis": Bundle(
        "single-file checkpoint of Stable Diffusion 1, 2, latent diffusion or ControlNet",
        (
            Part("unet", "model.diffusion_model.", "compvis-unet"),
            Part("autoencoder", "first_stage_model.", "compvis-autoencoder"),
            Part("text_encoder", "cond_stage_model.transformer.", "clip-text"),
            Part("text_encoder", "cond_stage_model.model.", "open-clip-text"),
            Part("class_embedder", "cond_stage_model.embedding.", "class-embedder"),
            Part("controlnet", "control_model.", "controlnet"),
        ),
        re.compile(SCHEDULES),
        (
            "Stable Diffusion 1, single file",
            "Stable Diffusion 2, single file",
            "latent diffusion (CompVis), single file",
        ),
    ),
    "compvis-first-stage": Bundle(
        "training checkpoint of an autoencoder: itself, discriminator and perceptual distance",
        (
            Part("discriminator", "loss.discriminator.", "compvis-discriminator"),
            Part("lpips", "loss.perceptual_loss.", "lpips"),
            Part("autoencoder", "", "compvis-autoencoder"),
        ),
        re.compile(SCHEDULES),
    ),
    "diffusers-consistency-decoder-vae": Bundle(
        "diffusers' ConsistencyDecoderVAE",
        (
            Part("decoder", "decoder_unet.", "diffusers-consistency-decoder"),
            Part("encoder", "", "diffusers-encoder"),
        ),
        re.compile(r"(means|stds)$"),
        ("consistency decoder (diffusers)",),
        write.consistency_decoder_config,
    ),
}
