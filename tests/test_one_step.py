"""A trained network as a generator: the same answers, safe ends, the discriminator's view; editing; control."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import one_step, parameterization, schedules
from jaxdiff.networks import controlnet
from jaxdiff.networks.base import as_network, grown, init_params
from jaxdiff.networks.mlp import MLP
from jaxdiff.networks.unet import UNet, example_inputs
from jaxdiff.networks.unet_discriminator import UNetDiscriminator, from_backbone
from jaxdiff.process import half_log_snr, q_sample
from jaxdiff.types import Denoised, Level, expand

KEY = jax.random.key(0)
BETAS = schedules.linear_betas(1000)
CHAIN = schedules.discrete(BETAS)
ZERO_SNR = schedules.discrete(schedules.zero_terminal_snr(BETAS))
MEAN, STD = 0.3, 0.7  # data ~ N(MEAN, STD^2)
SCHEDULES = {
    "chain": CHAIN,
    "zero_snr": ZERO_SNR,
    "vp": schedules.vp_linear(),
    "cosine": schedules.cosine(),
    "ve": schedules.ve(),
    "flow": schedules.rectified_flow(3.0),
    "trigonometric": schedules.trigonometric(),
}


def best_x0(schedule, x_t, t):
    level = schedule.level(t)
    alpha, sigma = (expand(a, x_t) for a in level)
    return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha * MEAN)


def best(schedule, meaning):
    """A network that knows the data and speaks in the terms of its schedule and parameterization."""

    def network(params, x_t, t, cond, *, train=False, key=None):
        x_t = x_t / expand(meaning.coefficients(schedule.level(t)).scale_in, x_t)
        return parameterization.from_x0(meaning, best_x0(schedule, x_t, t), x_t, schedule.level(t))

    return network


@pytest.mark.parametrize("onto", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize(
    ("trained", "meaning", "last_time"),
    [
        (CHAIN, parameterization.eps(), 650.0),
        (schedules.ve(), parameterization.edm(0.5, parameterization.same_time), None),
        (schedules.rectified_flow(), parameterization.flow(), None),
    ],
    ids=["eps", "edm", "flow"],
)
def test_the_answers_of_a_trained_network_stay_the_same_on_any_schedule(trained, meaning, last_time, onto):
    network = best(trained, meaning)
    generator = one_step.from_diffusion(network, trained, meaning, onto=onto, last_time=last_time)
    t = one_step.time_of_share(onto, jnp.array([0.05, 0.3, 0.6, 0.8]))
    x_t = jax.random.normal(KEY, (4, 3))
    answer = generator.denoiser({})(x_t, t).x0
    np.testing.assert_allclose(answer, best_x0(onto, x_t, t), rtol=1e-3, atol=1e-3)
    end = one_step.from_noise(generator.denoiser({}), onto, x_t)
    assert np.isfinite(end).all() and np.abs(end - MEAN).max() < 0.5


def test_levels_beyond_the_last_time_are_answered_as_the_last_time():
    meaning, x = parameterization.eps(), jax.random.normal(KEY, (2, 3))
    seen = []

    def network(params, x_t, t, cond, *, train=False, key=None):
        seen.append((x_t, t))
        return 0.9 * x_t

    generator = one_step.from_diffusion(network, CHAIN, meaning, onto=ZERO_SNR, last_time=650.0)
    answer = generator.denoiser({})(x, jnp.array([999.0, 950.0])).x0
    np.testing.assert_allclose(seen[0][1], [650.0, 650.0], rtol=1e-6)
    np.testing.assert_allclose(seen[0][0], x, rtol=1e-5)
    alpha, sigma = (float(a[0]) for a in CHAIN.level(jnp.array([650.0])))
    np.testing.assert_allclose(answer, (1 - 0.9 * sigma) / alpha * x, rtol=1e-4)
    plain = one_step.from_diffusion(network, CHAIN, meaning, last_time=650.0)
    plain.denoiser({})(x, jnp.array([3.0, 999.0]))
    assert seen[1][1].tolist() == [3.0, 650.0]  # without another schedule, indices are not translated


def test_a_discriminator_sees_what_its_backbone_was_trained_on():
    meaning, seen = parameterization.edm(0.5), []

    def discriminator(params, x_t, t, cond, *, train=False, key=None):
        seen.append((x_t, t))
        return x_t.sum(1) + params["a"]

    judge = one_step.judge_from_diffusion(discriminator, schedules.ve(), meaning, onto=schedules.rectified_flow())
    x_s, s = jax.random.normal(KEY, (2, 3)), jnp.array([0.5, 0.75])
    logits = judge({"a": jnp.ones(2)}, x_s, s, {})
    sigma = s / (1 - s)
    x_ve = x_s / (1 - s)[:, None]
    np.testing.assert_allclose(seen[0][1], jnp.log(sigma) / 4, atol=1e-6)
    np.testing.assert_allclose(seen[0][0], x_ve / jnp.sqrt(sigma**2 + 0.25)[:, None], rtol=1e-4)
    np.testing.assert_array_equal(logits, seen[0][0].sum(1) + 1)
    ve = schedules.ve()
    generator = one_step.from_diffusion(best(ve, meaning), ve, meaning, onto=schedules.rectified_flow())
    np.testing.assert_array_equal(generator.judge(discriminator)({"a": jnp.ones(2)}, x_s, s, {}), logits)


@pytest.mark.parametrize(
    ("schedule", "meaning", "message"),
    [
        (CHAIN, parameterization.eps(), r"at t = 999 .* only up to 157 times .* last_time=673 or less"),
        (ZERO_SNR, parameterization.eps(), "up to inf times its own error"),
        (schedules.rectified_flow(), parameterization.eps(), "up to inf times its own error"),
        (schedules.discrete(schedules.scaled_linear_betas(1000)), parameterization.eps(), "14.6 times"),
        (schedules.ve(), parameterization.eps(), "up to 80 times"),
    ],
)
def test_eps_at_the_last_level_is_refused_with_the_time_that_is_safe(schedule, meaning, message):
    with pytest.raises(ValueError, match=message) as error:
        one_step.from_diffusion(best(schedule, meaning), schedule, meaning)
    safe = float(str(error.value).split("last_time=")[1].split(" ")[0])
    one_step.require_safe(schedule, meaning, safe)
    with pytest.raises(ValueError, match="times its own error"):
        one_step.require_safe(schedule, meaning, safe + 0.02 * (schedule.t_max - safe))


@pytest.mark.parametrize("meaning", [parameterization.v(), parameterization.x0(), parameterization.flow()])
def test_other_outputs_pass_at_pure_noise(meaning):
    one_step.require_safe(ZERO_SNR, meaning)
    with pytest.raises(ValueError, match="last_time must lie in the schedule's 0 to 999, got 1000"):
        one_step.require_safe(ZERO_SNR, meaning, 1000.0)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_shares_are_those_of_the_level(schedule):
    share = jnp.array([0.02, 0.2, 0.5, 0.9])
    alpha, sigma = schedule.level(one_step.time_of_share(schedule, share))
    np.testing.assert_allclose(sigma / (alpha + sigma), share, rtol=2e-3)
    ends = one_step.time_of_share(schedule, jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(ends, [schedule.t_min, schedule.t_max], rtol=1e-5, atol=1e-6)


def test_the_last_level_can_be_made_pure_noise_and_no_other():
    for schedule, deviation in ((CHAIN, 1.0), (schedules.ve(), np.hypot(1.0, 80.0))):
        t = jnp.asarray([schedule.t_max, 0.5 * schedule.t_max], jnp.float32)
        level = schedule.level(t)
        changed = one_step.ending_in_noise(schedule, t, level)
        assert changed.alpha[0] == 0 and float(changed.sigma[0]) == pytest.approx(deviation, rel=1e-6)
        assert (changed.alpha[1], changed.sigma[1]) == (level.alpha[1], level.sigma[1])
        np.testing.assert_allclose(one_step.pure_noise(jnp.ones((2, 3)), level)[0], deviation, rtol=1e-6)


def test_image_to_image_is_one_call_between_the_image_and_noise():
    schedule, x0, noise = schedules.rectified_flow(), jnp.full((2, 3), 0.7), jax.random.normal(KEY, (2, 3))

    def denoise(x_t, t):
        return Denoised(x_t * 2 + expand(t, x_t))

    traces = []

    @jax.jit
    def edited(strength):
        traces.append(None)
        return one_step.image_to_image(denoise, schedule, x0, strength, noise)

    for strength in (0.3, 0.8, 1.0):
        level = Level(jnp.full(2, 1 - strength), jnp.full(2, strength))
        expected = 2 * q_sample(x0, noise, level) + strength
        np.testing.assert_allclose(edited(jnp.float32(strength)), expected, rtol=1e-5)
    assert len(traces) == 1
    for strength in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"strength must be in \(0, 1\], got {strength}"):
            one_step.image_to_image(denoise, schedule, x0, strength, noise)


def test_more_strength_keeps_less_of_the_image():
    generator = one_step.from_diffusion(best(CHAIN, parameterization.v()), CHAIN, parameterization.v())
    x0, noise = jnp.linspace(-1.5, 1.5, 64)[:, None], jax.random.normal(KEY, (64, 1))
    kept = [
        float(jnp.corrcoef(one_step.image_to_image(generator.denoiser({}), CHAIN, x0, s, noise)[:, 0], x0[:, 0])[0, 1])
        for s in (0.1, 0.5, 1.0)
    ]
    assert kept[0] > 0.98 and kept[0] > kept[1] > abs(kept[2]) and abs(kept[2]) < 0.35


def test_a_controlnet_steers_a_one_step_generator():
    """Untrained it changes nothing; after that, its residuals reach the one call at pure noise, at the capped time."""
    unet = UNet(in_channels=2, out_channels=2, base_channels=8, channel_mult=(1,), num_res_blocks=1, norm_groups=4)
    control = controlnet.controlnet_for(unet, hint_channels=1, hint_widths=(4, 4))
    rng = np.random.default_rng(0)

    def drawn(module, inputs):
        params = init_params(module, KEY, *inputs)
        return jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape, np.float32), params)

    own = drawn(unet, example_inputs(unet))
    branch = controlnet.copy_encoder(init_params(control, KEY, *controlnet.example_inputs(control)), own)
    hint, noise = jnp.ones((2, 8, 8, 1)), jax.random.normal(KEY, (2, 4, 4, 2))
    settings = (CHAIN, parameterization.eps(scaled := parameterization.scaled_time(1.0)))
    assert scaled(jnp.ones(1)) == 1
    plain = one_step.from_diffusion(as_network(unet), *settings, last_time=450.0)
    steered = one_step.from_diffusion(controlnet.controlled_network(unet, control), *settings, last_time=450.0)

    @jax.jit
    def answer(branch, hint):
        params = {"unet": own, "controlnet": branch}
        return one_step.from_noise(steered.denoiser(params, {"hint": hint}), CHAIN, noise)

    untouched = jax.jit(lambda: one_step.from_noise(plain.denoiser(own), CHAIN, noise))()
    np.testing.assert_allclose(answer(branch, hint), untouched, atol=1e-4)
    trained = jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape, np.float32), branch)
    assert np.abs(answer(trained, hint) - untouched).max() > 0.01
    assert np.abs(answer(trained, hint) - answer(trained, 0 * hint)).max() > 0.01


def test_students_and_discriminators_of_another_shape_are_refused():
    wide, narrow = (init_params(MLP(2, f, 1), KEY, jnp.zeros((1, 2)), jnp.zeros(1), {}) for f in (8, 4))
    one_step.require_same_form(wide, jax.tree.map(jnp.copy, wide))
    with pytest.raises(ValueError, match=r"block_0_in/bias is \(8,\) in the student and \(4,\) in the teacher"):
        one_step.require_same_form(wide, narrow)
    with pytest.raises(ValueError, match="extra is absent in the student"):
        one_step.require_same_form(wide, {**wide, "extra": jnp.ones(3)})
    with pytest.raises(ValueError, match="in the teacher and .* in the student"):
        grown(wide, narrow)
    unet = UNet(in_channels=1, out_channels=1, base_channels=8, channel_mult=(1,), num_res_blocks=1, norm_groups=4)
    fresh = init_params(UNetDiscriminator(unet), KEY, *example_inputs(unet))
    other = init_params(unet.clone(base_channels=4), KEY, *example_inputs(unet))
    with pytest.raises(ValueError, match="these parameters are not those of the backbone"):
        from_backbone(fresh, other)


def test_half_log_snr_of_the_cap_is_finite():
    """A schedule that ends in pure noise is translated to the trained one's noisiest level, not to infinity."""
    trained = schedules.vp_linear()
    generator = one_step.from_diffusion(
        best(trained, parameterization.v()), trained, parameterization.v(), onto=ZERO_SNR
    )
    assert np.isneginf(half_log_snr(ZERO_SNR.level(jnp.array([999.0]))))
    assert np.isfinite(one_step.from_noise(generator.denoiser({}), ZERO_SNR, jnp.ones((1, 2)))).all()
