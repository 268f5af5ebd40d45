"""How the weights of each kind are translated: names and clean-up of a state dict, and a publisher's configuration.

One function (network, **options) -> Translation for each form, and one from its configuration to a Spec where there is
a configuration. The rows that tie them together are in `catalog`; the names of single tensors in the publishers' files.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from jaxdiff.networks import consistency_decoder, patch_discriminator
from jaxdiff.networks.autoencoder_blocks import example_input
from jaxdiff.networks.base import param_shapes
from jaxdiff.pretrained import (
    autoencoders,
    clip,
    compvis,
    ddpm,
    diffusers_config,
    diffusers_layout,
    edm,
    ncsnpp,
    openai,
    progdist,
)
from jaxdiff.pretrained import consistency_decoder as decoders
from jaxdiff.pretrained import controlnet as controlnets
from jaxdiff.pretrained.kinds import Spec, State, Translation
from jaxdiff.types import Params


def shapes(examples: Callable[[Any], tuple[Any, ...]]) -> Callable[[Any], Params]:
    """Shapes of a network's parameters, from its example inputs."""
    return lambda network: param_shapes(network, *examples(network))


def sections(config: Mapping[str, Any], needed: tuple[str, ...], what: str) -> dict[str, Any]:
    """A configuration as a new dict, once it has what it needs."""
    if missing := [name for name in needed if name not in config]:
        raise ValueError(f"the {what} configuration lacks {missing}; got {sorted(config)[:8]}")
    return dict(config)


def openai_unet(network: Any, new_attention_order: bool = False) -> Translation:
    """guided-diffusion and improved-diffusion."""
    return Translation(openai.unet_entries(network, openai.attention_entries(new_attention_order)))


def openai_unet_config(config: Mapping[str, Any]) -> Spec:
    """Keyword arguments of `UNetModel`; with `super_resolution` true, of `SuperResModel`."""
    config = dict(config)
    upsampler = bool(config.pop("super_resolution", False))
    order = bool(config.get("use_new_attention_order", False))
    return Spec(openai.unet_from_config(config, super_resolution=upsampler), {"new_attention_order": order})


def classifier(network: Any, new_attention_order: bool = False) -> Translation:
    """guided-diffusion's classifiers."""
    return Translation(openai.classifier_entries(network, openai.attention_entries(new_attention_order)))


def classifier_config(config: Mapping[str, Any]) -> Spec:
    """Keyword arguments of `EncoderUNetModel`."""
    order = bool(config.get("use_new_attention_order", False))
    return Spec(openai.classifier_from_config(config), {"new_attention_order": order})


def consistency_unet(network: Any) -> Translation:
    """OpenAI's consistency models."""
    return Translation(openai.unet_entries(network, openai.attention_entries(True, 2)))


def compvis_unet(network: Any, linear_projection: bool = False, new_attention_order: bool = False) -> Translation:
    """Latent diffusion and Stable Diffusion."""
    return Translation(compvis.unet_entries(network, linear_projection, new_attention_order))


def compvis_unet_config(config: Mapping[str, Any]) -> Spec:
    """The `unet_config` parameters of CompVis; `concat_channels` of the inputs come as cond["concat"]."""
    config = dict(config)
    concat = config.pop("concat_channels", 0)
    options = {
        "linear_projection": bool(config.get("use_linear_in_transformer", False)),
        "new_attention_order": bool(config.get("use_new_attention_order", False)),
    }
    network = compvis.unet_from_config(config)
    return Spec(network.clone(in_channels=network.in_channels - concat, concat_channels=concat), options)


def compvis_autoencoder_config(config: Mapping[str, Any]) -> Spec:
    """The sections `ddconfig`, `embed_dim` and, of a VQ model, `n_embed`."""
    config = sections(config, ("ddconfig", "embed_dim"), "autoencoder")
    if "n_embed" in config:
        make = partial(autoencoders.autoencoder_vq_from_config, n_embed=config["n_embed"])
        return Spec(make(config["ddconfig"], embed_dim=config["embed_dim"]))
    return Spec(autoencoders.autoencoder_kl_from_config(config["ddconfig"], embed_dim=config["embed_dim"]))


def patch_shapes(network: Any) -> Params:
    """Shapes of a discriminator's parameters and running statistics."""
    image, statistics = patch_discriminator.example_inputs(network)
    return {"params": param_shapes(network, image, statistics), "statistics": statistics}


def controlnet(network: Any, linear_projection: bool = False) -> Translation:
    """lllyasviel's ControlNet."""
    return Translation(controlnets.controlnet_entries(network, linear_projection))


def controlnet_config(config: Mapping[str, Any]) -> Spec:
    """The `control_stage_config` parameters."""
    linear = bool(config.get("use_linear_in_transformer", False))
    return Spec(controlnets.controlnet_from_config(config), {"linear_projection": linear})


def diffusers_unet(network: Any, linear_projection: bool = False) -> Translation:
    """UNet2DModel and UNet2DConditionModel."""
    return Translation(diffusers_layout.unet_entries(network, linear_projection), diffusers_layout.with_new_names)


def diffusers_unet_config(config: Mapping[str, Any]) -> Spec:
    """config.json of a UNet2DModel or UNet2DConditionModel."""
    # Inpainting networks concatenate a mask and a masked latent; nothing in the configuration says so but the count.
    latent, out = config.get("in_channels", 4), config.get("out_channels", 4)
    concat = latent - out if (latent, out) == (9, 4) else 0
    linear = bool(config.get("use_linear_projection", False))
    return Spec(diffusers_config.unet_from_config(config, concat_channels=concat), {"linear_projection": linear})


def diffusers_controlnet(network: Any, linear_projection: bool = False) -> Translation:
    """ControlNetModel."""
    return Translation(diffusers_layout.controlnet_entries(network, linear_projection), diffusers_layout.with_new_names)


def diffusers_controlnet_config(config: Mapping[str, Any]) -> Spec:
    """config.json of a ControlNetModel."""
    linear = bool(config.get("use_linear_projection", False))
    return Spec(diffusers_config.controlnet_from_config(config), {"linear_projection": linear})


def diffusers_autoencoder(network: Any) -> Translation:
    """AutoencoderKL and VQModel."""
    return Translation(diffusers_layout.autoencoder_entries(network), diffusers_layout.with_new_names)


def encoder(network: Any) -> Translation:
    """The encoder alone, which comes beside the consistency decoder."""
    entries = diffusers_layout.autoencoder_entries(network)
    kept = [entry for entry in entries if entry.path.startswith(("encoder/", "quant_conv/"))]
    return Translation(kept, diffusers_layout.with_new_names)


def encoder_shapes(network: Any) -> Params:
    """Shapes of the encoder's part of an autoencoder's parameters."""
    shapes = param_shapes(network, example_input(network))
    return {part: shapes[part] for part in ("encoder", "quant_conv")}


def encoder_config(config: Mapping[str, Any]) -> Spec:
    """The encoder's share of a ConsistencyDecoderVAE's config.json."""
    own = {name.removeprefix("encoder_"): value for name, value in config.items() if name.startswith("encoder_")}
    if not own.pop("double_z", True):
        raise ValueError("encoder_double_z False is not supported, expected True")
    own["latent_channels"] = own.pop("out_channels", 4)
    down = own.get("down_block_types", ("DownEncoderBlock2D",) * 4)
    up = [kind.replace("Down", "Up").replace("Encoder", "Decoder") for kind in reversed(down)]
    own = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2} | own
    own |= {"down_block_types": down, "up_block_types": up, "_class_name": "AutoencoderKL"}
    return Spec(diffusers_config.autoencoder_from_config(own))


def decoder(network: Any, names: decoders.Names) -> Translation:
    """The consistency decoder, in one of the forms it is passed on in."""
    table = f"{names.ends[decoders.ENDS.index('time_table')]}.weight"

    def clean(state: State) -> State:
        # OpenAI's table of times comes in a file of its own, in which it has no name but "weight".
        return {table if name == "weight" else name: array for name, array in state.items()}

    return Translation(decoders.decoder_entries(network, names), clean)


def diffusers_decoder_config(config: Mapping[str, Any]) -> Spec:
    """The decoder's share of a ConsistencyDecoderVAE's config.json."""
    widths = tuple(config.get("decoder_block_out_channels", (320, 640, 1024, 1024)))
    fixed = {
        "decoder_layers_per_block": 3,
        "decoder_add_attention": False,
        "decoder_resnet_time_scale_shift": "scale_shift",
        "decoder_time_embedding_type": "learned",
        "decoder_down_block_types": ["ResnetDownsampleBlock2D"] * len(widths),
        "decoder_up_block_types": ["ResnetUpsampleBlock2D"] * len(widths),
    }
    for name, value in fixed.items():
        found = config.get(name, value)
        if (list(found) if isinstance(found, tuple) else found) != value:
            raise ValueError(f"{name} {found!r} of this consistency decoder is not supported, expected {value!r}")
    latent = config.get("latent_channels", 4)
    network = consistency_decoder.ConsistencyDecoder(
        in_channels=config.get("decoder_in_channels", 3 + latent) - latent,
        concat_channels=latent,
        out_channels=config.get("decoder_out_channels", 6),
        base_channels=widths[0],
        channel_mult=tuple(width // widths[0] if width % widths[0] == 0 else width / widths[0] for width in widths),
        emb_channels=4 * widths[0],
        num_times=config.get("decoder_num_train_timesteps", 1024),
        norm_groups=config.get("decoder_norm_num_groups", 32),
        norm_eps=config.get("decoder_norm_eps", 1e-5),
        upscale=2 ** (len(config.get("encoder_block_out_channels", (1,) * 4)) - 1),
    )
    return Spec(network)


def clip_text(network: Any) -> Translation:
    """CLIP text encoders of transformers, whose names have a prefix or not, by version."""
    prefix, projection = "text_model.", "text_projection.weight"

    def clean(state: State) -> State:
        stripped = clip.strip(state, network)
        return {n if n.startswith(prefix) or n == projection else prefix + n: a for n, a in stripped.items()}

    return Translation(clip.text_encoder_entries(network, prefix), clean)


def clip_text_config(config: Mapping[str, Any]) -> Spec:
    """config.json of a CLIPTextModel or CLIPTextModelWithProjection."""
    projection = "CLIPTextModelWithProjection" in (config.get("architectures") or ())
    return Spec(clip.text_encoder_from_config(config, projection=projection))


def open_clip_text(network: Any) -> Translation:
    """OpenCLIP's text tower; layers after those of the network are left out."""
    return Translation(
        clip.open_clip_entries(network), lambda state: clip.drop_layers(clip.strip(state, network), network)
    )


def song_unet(network: Any, image_size: int) -> Translation:
    """EDM's SongUNet, whose filters are computed here."""
    return Translation(
        edm.song_unet_entries(network, image_size=image_size),
        partial(edm.without_filters, net=network, image_size=image_size),
        edm.filters(network, image_size, "model."),
    )


def song_unet_config(config: Mapping[str, Any]) -> Spec:
    """Keyword arguments of `SongUNet`."""
    return Spec(edm.song_unet_from_config(config), {"image_size": config["img_resolution"]})


def ncsnpp_config(config: Mapping[str, Any]) -> Spec:
    """The `model` section of the Flax release, and `image_size`."""
    config = sections(config, ("image_size",), "NCSN++")
    return Spec(ncsnpp.ncsnpp_from_config(config, image_size=config.pop("image_size")))


def progdist_config(config: Mapping[str, Any]) -> Spec:
    """The fields of the release's `UNet`, and `resolution`."""
    config = sections(config, ("resolution",), "progressive distillation")
    return Spec(progdist.unet_from_config(config, resolution=config.pop("resolution")))


def ddpm_config(config: Mapping[str, Any]) -> Spec:
    """The `model` section of ermongroup/ddim, and `resolution`."""
    config = sections(config, ("resolution",), "DDPM")
    return Spec(ddpm.unet_from_config(config, resolution=config["resolution"]))


def inception_state(state: State) -> State:
    """Without the numbers of batches that the norms have seen."""
    return {name: array for name, array in state.items() if not name.endswith(".num_batches_tracked")}
