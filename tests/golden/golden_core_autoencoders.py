"""First stages, patch discriminator and LPIPS against CompVis latent diffusion and taming.

Weights come from the file through the importers and must go back unchanged. Tolerances are those of the files' index:
1e-4 on outputs, relative where a number is a sum over many. Of ae_losses only what networks give is compared: logits
and running statistics, LPIPS and its features, the posterior's KL, and their means where the loss modules log them.
Left to the perceptual and adversarial losses, which are no networks: loss, total_loss, grad_logvar, grad_conv_weight,
logvar, nll_loss, d_weight, disc_factor, g_loss, disc_loss, disc_loss_log and rec_loss below kl/ and vq/, quant_loss
below vq/, and dl/.
"""

import jax
import jax.numpy as jnp
import numpy as np
from golden_core_networks import nchw, nhwc
from golden_harness import topic

from jaxdiff.networks.autoencoder_kl import posterior_from_moments, posterior_kl, posterior_nll, sample_posterior
from jaxdiff.networks.autoencoder_vq import code_usage, codebook_loss, straight_through
from jaxdiff.networks.layers import Conv
from jaxdiff.networks.lpips import LPIPS
from jaxdiff.networks.patch_discriminator import PatchDiscriminator
from jaxdiff.pretrained.autoencoders import (
    autoencoder_kl_from_config,
    autoencoder_vq_from_config,
    export_autoencoder,
    export_patch_discriminator,
    import_autoencoder,
    import_patch_discriminator,
)
from jaxdiff.pretrained.perceptual import export_lpips, import_lpips
from jaxdiff.pretrained.torch_layout import CONV

ATOL = 1e-4
RTOL = 1e-5
LOSSES = (
    "loss total_loss grad_logvar grad_conv_weight logvar nll_loss rec_loss quant_loss d_weight disc_factor g_loss "
    "disc_loss disc_loss_log"
).split()


def weights(golden, prefix=""):
    start = f"sd/{prefix}"
    return {key.removeprefix(start): golden.input(key) for key in golden.keys(f"{start}*")}


def assert_same(restored, state):
    assert restored.keys() == state.keys()
    for name, tensor in state.items():
        assert (restored[name].dtype, restored[name].shape) == (tensor.dtype, tensor.shape), name
        np.testing.assert_array_equal(restored[name], tensor, err_msg=name)


def imported(golden, autoencoder):
    state = weights(golden)
    params = import_autoencoder(state, autoencoder)
    assert_same(export_autoencoder(params, autoencoder), state)
    return jax.device_put(params)


@topic("core/ae_kl")
def ae_kl(golden):
    autoencoder = autoencoder_kl_from_config(golden.meta["ddconfig"], embed_dim=golden.meta["embed_dim"])
    params = imported(golden, autoencoder)
    x, noise = nhwc(golden.input("x")), nhwc(golden.input("noise"))

    def run(module):
        encoded = module.encoder(x)
        posterior = module.encode(x)
        z = sample_posterior(posterior, noise)
        return {
            "encoder_out": encoded,
            "moments": module.quant_conv(encoded),
            "mean": posterior.mean,
            "logvar": posterior.log_variance,
            "z_sample": z,
            "rec_sample": module(x, noise)[0],
            "rec_mode": module(x)[0],
        }, (posterior_kl(posterior), posterior_nll(posterior, z))

    with jax.default_matmul_precision("highest"):
        images, (kl, nll) = jax.jit(lambda p: autoencoder.apply({"params": p}, method=run))(params)
    for key, value in images.items():
        golden.compare(key, nchw(value), atol=ATOL)
    golden.compare("kl", kl, atol=ATOL, rtol=RTOL)
    golden.compare("nll_of_sample", nll, atol=ATOL, rtol=RTOL)


@topic("core/vqmodel")
def vqmodel(golden):
    meta = golden.meta
    autoencoder = autoencoder_vq_from_config(meta["ddconfig"], embed_dim=meta["embed_dim"], n_embed=meta["n_embed"])
    params = imported(golden, autoencoder)
    x, latent = nhwc(golden.input("x")), nhwc(golden.input("iface_latent"))

    def apply(method, *inputs):
        return autoencoder.apply({"params": params}, *inputs, method=method)

    def objective(z):
        quantized = apply("quantize", z)
        loss = codebook_loss(quantized, beta=meta["beta"]).mean()
        return jnp.sum(straight_through(quantized)) + loss

    with jax.default_matmul_precision("highest"):
        reconstruction, quantized = jax.jit(lambda: autoencoder.apply({"params": params}, x))()
        gradient = jax.grad(objective)(quantized.latent)
        decoded = jax.jit(lambda: apply("decode_latent", latent))()
    golden.compare("prequant", nchw(quantized.latent), atol=ATOL)
    golden.compare("quant", nchw(straight_through(quantized)), atol=ATOL)
    golden.compare("indices", np.asarray(quantized.indices).reshape(-1))
    golden.compare("rec", nchw(reconstruction), atol=ATOL)
    golden.compare("iface_decode", nchw(decoded), atol=ATOL)
    golden.compare("grad_prequant", nchw(gradient), atol=ATOL)
    for legacy in (True, False):
        loss = codebook_loss(quantized, beta=meta["beta"], legacy=legacy).mean()
        golden.compare(f"commit_loss_{'legacy' if legacy else 'nonlegacy'}", loss, atol=ATOL)
    usage = code_usage(quantized.indices, autoencoder.num_codes)
    golden.compare("perplexity", usage.perplexity, atol=ATOL, rtol=RTOL)
    golden.compare("cluster_usage", usage.num_used)


@topic("core/ae_losses")
def ae_losses(golden):
    images, before_last = nhwc(golden.input("inputs")), nhwc(golden.input("pre_last"))
    last = weights(golden, "last.")
    params = {"kernel": jnp.asarray(CONV.to_ours([last["weight"]])), "bias": jnp.asarray(last["bias"])}
    with jax.default_matmul_precision("highest"):
        reconstructions = Conv(images.shape[-1]).apply({"params": params}, before_last)
        check_discriminator(golden, images, reconstructions)
        check_lpips(golden, images, reconstructions)
    golden.compare("reconstructions", nchw(reconstructions), atol=ATOL)

    kl = posterior_kl(posterior_from_moments(nhwc(golden.input("moments")))).mean()
    for key in golden.keys("kl/*/kl_loss"):
        golden.compare(key, kl, atol=ATOL, rtol=RTOL)
    for name in LOSSES:
        golden.leave(f"*/step*/{name}", "a loss, not a network")
    golden.leave("dl/*", "a loss, not a network")


def check_discriminator(golden, images, reconstructions):
    meta = golden.meta
    module = PatchDiscriminator(images.shape[-1], meta["ndf"], meta["n_layers"])
    state = weights(golden, "disc.")
    params, statistics = import_patch_discriminator(state, module)
    assert_same(export_patch_discriminator(params, statistics, module), state)
    params, statistics = jax.device_put((params, statistics))

    def judge(x, statistics, train):
        return module.apply({"params": params}, x, statistics, train=train)

    logits, after = judge(images, statistics, True)
    fakes, _ = judge(reconstructions, statistics, True)
    golden.compare("logits_train", nchw(logits), atol=ATOL)
    running = [after[norm][name] for norm in sorted(after) for name in ("mean", "variance")]
    golden.compare("bn_after/running", np.concatenate(running), atol=ATOL)
    golden.compare("logits_eval", nchw(judge(images, statistics, False)[0]), atol=ATOL)
    golden.compare("logits_eval_after_one_update", nchw(judge(images, after, False)[0]), atol=ATOL)
    for kind, value in (("real", logits), ("fake", fakes)):
        for key in golden.keys(f"kl/*/logits_{kind}_log"):
            golden.compare(key, value.mean(), atol=ATOL)


def check_lpips(golden, images, reconstructions):
    state = weights(golden, "lpips.")
    module = LPIPS(width=state["net.slice1.0.weight"].shape[0])
    params = import_lpips(state, module)
    assert_same(export_lpips(params), state)
    params = jax.device_put(params)
    distance = module.apply({"params": params}, images, reconstructions)
    golden.compare("lpips", np.asarray(distance).reshape(-1, 1, 1, 1), atol=ATOL)
    for key in golden.keys("vq/*/p_loss"):
        golden.compare(key, distance.mean(), atol=ATOL)
    for name, feature in module.apply({"params": params}, images, method="features").items():
        every = 4 if name in ("relu1_2", "relu2_2") else 1
        golden.compare(f"vgg_feat/{name}", nchw(feature)[:, :, ::every, ::every], atol=ATOL)
