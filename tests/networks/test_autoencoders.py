"""First stages: published sizes, closed forms of posterior and codebook, and what no released weight shows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.networks import autoencoder_kl, autoencoder_vq, convolution
from jaxdiff.networks.attention import forward_mode
from jaxdiff.networks.autoencoder_blocks import (
    AutoencoderResBlock,
    Encoder,
    downsampling_factor,
    example_input,
    level_plan,
)
from jaxdiff.networks.autoencoder_kl import AutoencoderKL, Posterior
from jaxdiff.networks.autoencoder_vq import AutoencoderVQ, Quantized
from jaxdiff.networks.base import init_params, num_params, param_shapes
from jaxdiff.networks.layers import Conv, upsample_nearest

FIELDS = dict(base_channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4, attention_factors=(2,))
KL = AutoencoderKL(**FIELDS, z_channels=3, embed_dim=5)
VQ = AutoencoderVQ(**FIELDS, z_channels=3, embed_dim=4, num_codes=6)
FLAT_KL = KL.clone(channel_mult=(1,), attention_factors=(), mid_attention=False)
FLAT_VQ = VQ.clone(channel_mult=(1,), attention_factors=(), mid_attention=False)
MILLIONS = {
    "kl_f4": (autoencoder_kl.kl_f4(), 4, 55.312),
    "kl_f8": (autoencoder_kl.kl_f8(), 8, 83.654),
    "kl_f16": (autoencoder_kl.kl_f16(), 16, 69.611),
    "kl_f32": (autoencoder_kl.kl_f32(), 32, 103.880),
    "stable_diffusion": (autoencoder_kl.stable_diffusion_vae(), 8, 83.654),
    "vq_f4": (autoencoder_vq.vq_f4(), 4, 55.323),
    "vq_f4_noattn": (autoencoder_vq.vq_f4_noattn(), 4, 53.219),
    "vq_f8": (autoencoder_vq.vq_f8(), 8, 67.717),
    "vq_f8_n256": (autoencoder_vq.vq_f8_n256(), 8, 67.653),
    "vq_f16": (autoencoder_vq.vq_f16(), 16, 69.593),
    "vqgan_f16": (autoencoder_vq.vqgan_f16(), 16, 72.142),
    "vqgan_f16_16384": (autoencoder_vq.vqgan_f16(16384), 16, 76.074),
}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


@functools.cache
def params_of(autoencoder):
    with jax.ensure_compile_time_eval():
        return init_params(autoencoder, jax.random.key(0), example_input(autoencoder))


def apply(autoencoder, *inputs, params=None, **options):
    run = jax.jit(lambda p, *inputs: autoencoder.apply({"params": p}, *inputs, **options))
    return run(params_of(autoencoder) if params is None else params, *inputs)


def quantized():
    latent, codebook = normal(0, 2, 3, 2, 4), normal(1, 6, 4)
    indices = autoencoder_vq.nearest_codes(latent, codebook)
    return Quantized(latent, codebook[indices], indices), codebook


@pytest.mark.parametrize("name", MILLIONS)
def test_presets_have_the_published_size(name):
    autoencoder, factor, millions = MILLIONS[name]
    shapes = param_shapes(autoencoder, example_input(autoencoder))
    assert round(num_params(shapes) / 1e6, 3) == millions
    assert downsampling_factor(autoencoder) == factor


def test_the_halves_of_stable_diffusions_autoencoder_have_their_sizes():
    autoencoder = autoencoder_kl.stable_diffusion_vae()
    shapes = param_shapes(autoencoder, example_input(autoencoder))
    encoder, decoder = (num_params(shapes[a]) + num_params(shapes[b]) for a, b in
                        (("encoder", "quant_conv"), ("decoder", "post_quant_conv")))  # fmt: skip
    assert (encoder, decoder) == (34_163_664, 49_490_199)


def test_attention_stands_at_the_published_sizes():
    plan = level_plan(autoencoder_kl.kl_f16())
    assert [s.name for s in plan.encoder if s.attention] == ["down_4_0", "down_4_1"]
    assert [s.name for s in plan.decoder if s.attention] == ["up_4_0", "up_4_1", "up_4_2"]
    assert [s.name for s in plan.decoder if s.resample] == [f"up_{level}_upsample" for level in (4, 3, 2, 1)]
    assert not any(s.attention for s in (*level_plan(autoencoder_kl.kl_f8()).encoder, *plan.decoder[-3:]))


@pytest.mark.parametrize("autoencoder", [KL, VQ], ids=["kl", "vq"])
def test_shapes_follow_the_factor_at_any_size(autoencoder):
    def run(x):
        latent = apply(autoencoder, x, method="encode")
        latent = latent.mean if isinstance(latent, Posterior) else latent
        return latent, apply(autoencoder, latent, method="decode")

    latent, image = jax.eval_shape(run, jnp.zeros((2, 8, 12, 3)))
    assert (latent.shape, image.shape) == ((2, 4, 6, autoencoder.embed_dim), (2, 8, 12, 3))


def test_posterior_splits_and_clips_the_moments():
    moments = jnp.asarray([[[[0.5, -40.0]], [[-2.0, 25.0]], [[7.0, 1.5]]]])
    posterior = autoencoder_kl.posterior_from_moments(moments)
    assert posterior.mean.ravel().tolist() == [0.5, -2.0, 7.0]
    assert posterior.log_variance.ravel().tolist() == [-30.0, 20.0, 1.5]


def test_posterior_terms_are_their_closed_forms():
    posterior = Posterior(normal(0, 2, 3, 4, 5), normal(1, 2, 3, 4, 5))
    mean, log_variance = (np.asarray(a, np.float64) for a in posterior)
    kl = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance).sum((1, 2, 3))
    np.testing.assert_allclose(autoencoder_kl.posterior_kl(posterior), kl, rtol=1e-5)
    # One deviation away on either side, the negative log-likelihood is the entropy.
    entropy = 0.5 * (np.log(2 * np.pi) + log_variance + 1).sum((1, 2, 3))
    for sign in (1.0, -1.0):
        z = autoencoder_kl.sample_posterior(posterior, jnp.full(mean.shape, sign))
        np.testing.assert_allclose(autoencoder_kl.posterior_nll(posterior, z), entropy, rtol=1e-5)


def test_a_standard_normal_posterior_has_no_kl():
    blank = jnp.zeros((2, 1, 1, 3))
    assert autoencoder_kl.posterior_kl(Posterior(blank, blank)).tolist() == [0.0, 0.0]


def test_reconstruction_decodes_the_latent_drawn_with_the_noise_given():
    x, noise = normal(0, 1, 2, 2, 3), normal(1, 1, 2, 2, 5)
    posterior = apply(FLAT_KL, x, method="encode")
    image, same = apply(FLAT_KL, x, noise)
    z = autoencoder_kl.sample_posterior(same, noise)
    np.testing.assert_allclose(same.mean, posterior.mean, atol=1e-6)
    np.testing.assert_allclose(image, apply(FLAT_KL, z, method="decode"), atol=1e-6)
    np.testing.assert_allclose(apply(FLAT_KL, x)[0], apply(FLAT_KL, same.mean, method="decode"), atol=1e-6)


def test_nearest_codes_are_the_nearest():
    found, codebook = quantized()
    distances = ((np.asarray(found.latent)[..., None, :] - np.asarray(codebook)) ** 2).sum(-1)
    np.testing.assert_array_equal(found.indices, distances.argmin(-1))


def test_the_lowest_of_equal_codes_wins():
    codebook = jnp.asarray([[3.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert autoencoder_vq.nearest_codes(jnp.ones((1, 1, 1, 2)), codebook).item() == 1


def test_straight_through_has_the_value_of_codes_and_the_gradient_of_the_latent():
    found, codebook = quantized()

    def total(latent, codebook):
        codes = codebook[found.indices]
        return jnp.sum(autoencoder_vq.straight_through(Quantized(latent, codes, found.indices)) * weight)

    weight = normal(2, *found.latent.shape)
    np.testing.assert_allclose(autoencoder_vq.straight_through(found), found.codes, atol=1e-6)
    to_latent, to_codebook = jax.grad(total, (0, 1))(found.latent, codebook)
    np.testing.assert_array_equal(to_latent, weight)
    np.testing.assert_array_equal(to_codebook, np.zeros_like(codebook))


@pytest.mark.parametrize("legacy", [True, False])
def test_beta_weighs_the_term_that_the_flag_says(legacy):
    found, codebook = quantized()
    beta, size = 0.3, found.latent[0].size

    def total(latent, codebook):
        codes = codebook[found.indices]
        losses = autoencoder_vq.codebook_loss(Quantized(latent, codes, found.indices), beta=beta, legacy=legacy)
        return losses.sum(), losses

    (to_latent, to_codebook), losses = jax.grad(total, (0, 1), has_aux=True)(found.latent, codebook)
    difference = np.asarray(found.latent - found.codes, np.float64)
    np.testing.assert_allclose(losses, (1 + beta) * (difference**2).mean((1, 2, 3)), rtol=1e-5)
    on_latent, on_codes = (1.0, beta) if legacy else (beta, 1.0)
    np.testing.assert_allclose(to_latent, on_latent * 2 * difference / size, atol=1e-6)
    rows = np.zeros(codebook.shape)
    np.add.at(rows, np.asarray(found.indices), -on_codes * 2 * difference / size)
    np.testing.assert_allclose(to_codebook, rows, atol=1e-6)


@pytest.mark.parametrize(("indices", "used"), [([0, 1, 2, 3], 4), ([2, 2, 2], 1), ([[5, 0], [0, 5]], 2)])
def test_the_perplexity_of_evenly_used_codes_is_their_number(indices, used):
    usage = autoencoder_vq.code_usage(jnp.asarray(indices), 7)
    np.testing.assert_allclose(usage.perplexity, used, rtol=1e-5)
    assert usage.num_used == used


def test_decoding_latents_quantises_first():
    latent = normal(0, 1, 2, 2, 4)
    found = apply(FLAT_VQ, latent, method="quantize")
    expected = apply(FLAT_VQ, found.codes, method="decode")
    np.testing.assert_allclose(apply(FLAT_VQ, latent, method="decode_latent"), expected, atol=1e-6)
    np.testing.assert_allclose(apply(FLAT_VQ, found.indices, method="decode_indices"), expected, atol=1e-6)
    assert np.abs(latent - found.codes).max() > 0.1


@pytest.mark.parametrize("index", [-1, 6])
def test_an_index_outside_the_codebook_is_not_a_number(index):
    assert np.isnan(apply(FLAT_VQ, jnp.full((1, 2, 2), index, jnp.int32), method="decode_indices")).all()


@pytest.mark.slow
@pytest.mark.parametrize("autoencoder", [KL, FLAT_VQ], ids=["kl", "vq"])
def test_every_parameter_has_a_gradient(autoencoder):
    x = normal(0, 1, 4, 4, 3)

    def loss(params):
        image, latent = autoencoder.apply({"params": params}, x)
        penalty = autoencoder_kl.posterior_kl if isinstance(latent, Posterior) else autoencoder_vq.codebook_loss
        return jnp.mean((image - x) ** 2) + penalty(latent).mean()

    grads = jax.jit(jax.grad(loss))(params_of(autoencoder))
    assert [jax.tree_util.keystr(p) for p, g in jax.tree_util.tree_leaves_with_path(grads) if not np.any(g)] == []


def test_recomputing_blocks_changes_no_gradient():
    encoder = Encoder(base_channels=8, channel_mult=(1,), num_res_blocks=1, norm_groups=4)
    x = normal(0, 1, 2, 2, 3)
    params = init_params(encoder, jax.random.key(0), x)

    def gradient(module):
        return jax.jit(jax.grad(lambda p: jnp.sum(module.apply({"params": p}, x) ** 2)))(params)

    plain, again = gradient(encoder), gradient(encoder.clone(remat=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, again)


def test_half_precision_blocks_keep_parameters_and_latents_in_float32():
    x, half = normal(0, 1, 2, 2, 3), FLAT_KL.clone(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params_of(half))} == {np.dtype(np.float32)}
    posterior, exact = (apply(module, x, method="encode") for module in (half, FLAT_KL))
    assert posterior.mean.dtype == posterior.log_variance.dtype == jnp.float32
    assert apply(half, exact.mean, method="decode").dtype == jnp.float32
    assert 0 < np.abs(posterior.mean - exact.mean).max() < 0.1


def test_dropout_needs_a_key_and_acts_in_training_alone():
    x = normal(0, 1, 2, 2, 8)
    plain, dropping = AutoencoderResBlock(8, groups=4), AutoencoderResBlock(8, groups=4, dropout=0.5)
    params = {"params": init_params(plain, jax.random.key(0), x)}
    with pytest.raises(ValueError, match="train=True with dropout 0.5 needs a random key"):
        apply(FLAT_KL.clone(dropout=0.5), x[..., :3], train=True)
    np.testing.assert_array_equal(dropping.apply(params, x, False), plain.apply(params, x, False))
    dropped = dropping.apply(params, x, True, rngs={"dropout": jax.random.key(0)})
    assert np.abs(dropped - plain.apply(params, x, False)).max() > 1e-3


def test_codes_and_kernels_start_as_in_the_releases():
    params = params_of(VQ)
    assert 0.5 / 6 < np.abs(params["codebook"]).max() <= 1 / 6
    kernel = params["decoder"]["up_0_1_res"]["conv_out"]["kernel"]  # the last of a branch is not zero here
    assert 0.9 < np.abs(kernel).max() * np.sqrt(9 * 8) <= 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: KL.clone(channel_mult=()),
            r"at least one level and one residual block a level, got channel_mult \(\)",
        ),
        (lambda: KL.clone(attention_factors=(1, 4)), r"attention_factors \[4\] do not occur .* levels have \[1, 2\]"),
        (lambda: KL.clone(dropout=1.0), "dropout must be at least 0 and below 1, got 1.0"),
        (lambda: apply(KL, jnp.zeros((1, 5, 4, 3))), r"H and W divisible by 2, got \[1, 5, 4, 3\]; resize or crop"),
        (lambda: apply(VQ, jnp.zeros((1, 4, 4, 1))), r"takes images \[B, H, W, 3\]"),
        (
            lambda: apply(KL, jnp.zeros((1, 2, 2, 3)), method="decode"),
            r"decodes latents \[B, h, w, 5\], got \[1, 2, 2,",
        ),
        (lambda: apply(VQ, jnp.zeros((1, 2, 2, 3)), method="decode_latent"), r"decodes latents \[B, h, w, 4\]"),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(2, 8, 9, 3, 4), (1, 2, 3, 4, 3), (2, 1, 1, 3, 2)])
def test_convolving_doubled_images_is_doubling_and_convolving(monkeypatch, shape):
    b, h, w, i, o = shape

    def twice(x, kernel):
        return convolution._library(upsample_nearest(x), kernel, 1, (1, 1))

    def value_and_vjp(form):
        @jax.jit
        def run(x, kernel):
            out, vjp = jax.vjp(lambda *a: form(*a), x, kernel)
            return out, vjp(jnp.cos(out))

        return run(x, kernel)

    with jax.enable_x64(True):
        x, kernel = (jnp.asarray(normal(seed, *s), jnp.float64) for seed, s in ((0, (b, h, w, i)), (1, (3, 3, i, o))))
        small = value_and_vjp(convolution.convolve_doubled)
        monkeypatch.setattr(convolution, "MANY_PRODUCTS", 0)
        monkeypatch.setattr(convolution, "FEW_PIXELS", 0)
        ours, theirs = value_and_vjp(convolution.convolve_doubled), value_and_vjp(twice)
        assert "custom_vjp" in str(jax.make_jaxpr(lambda *a: convolution.convolve_doubled(*a))(x, kernel))
        for found in (small, ours):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), found, theirs)
        with forward_mode():
            _, slope = jax.jvp(lambda x: convolution.convolve_doubled(x, kernel), (x,), (x,))
        np.testing.assert_allclose(slope, theirs[0], atol=1e-12)


def test_a_doubled_convolution_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="kernel_size 3, stride 1 and no asymmetric padding, got 5, 1 and False"):
        Conv(4, kernel_size=5, doubled=True)
