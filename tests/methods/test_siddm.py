"""Both parts of the divergence in closed form on Gaussian data, the heads of the discriminator, and refusals."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff import losses, parameterization, schedules, times
from jaxdiff.methods import siddm
from jaxdiff.methods.base import Sampling
from jaxdiff.networks.base import init_params
from jaxdiff.networks.unet import UNet, example_inputs
from jaxdiff.networks.unet_discriminator import UNetDiscriminator, as_judge
from jaxdiff.solvers.posterior import draw, show
from jaxdiff.training.state import create_state
from jaxdiff.training.step import make_train_step
from jaxdiff.types import Denoised

KEY = jax.random.key(0)
MEAN, STD = 0.3, 0.7  # data ~ N(MEAN, STD^2)
VP = schedules.vp_linear()
N = 40_000
STEP = jnp.int32(0)


def exact(params, x_t, t, cond, *, train=False, key=None):
    """A draw of x0 given x_t, made of the latent: what a perfect generator does."""
    alpha, sigma = (a[:, None] for a in VP.level(t / 1000))
    spread = alpha**2 * STD**2 + sigma**2
    return MEAN + alpha * STD**2 * (x_t - alpha * MEAN) / spread + STD * sigma / jnp.sqrt(spread) * cond["z"]


def linear(params, x_t, t, cond, *, train=False, key=None):
    return params["on_x"] * x_t + params["on_z"] * cond["z"]


def judge(params, x_s, t, cond, *, train=False, key=None):
    logit = params["w"][0] * x_s[:, 0] + params["w"][1] * x_s[:, 0] ** 2
    return siddm.Verdict(
        logit, params["pixel"] * x_s, params["image"] * x_s, params["regress"][0] * x_s + params["regress"][1]
    )


def make(network=linear, discriminator=judge, **settings):
    base = {
        "init_params": lambda key, batch: {"on_x": jnp.float32(0.5), "on_z": jnp.float32(0.1)},
        "init_disc_params": lambda key, batch: {
            "w": jnp.array([0.3, -0.1]),
            "pixel": jnp.float32(0.2),
            "image": jnp.float32(0.9),
            "regress": jnp.array([0.4, 0.1]),
        },
        "latent_dim": 1,
    }
    return siddm.siddm(network, discriminator, **(base | settings))


def batch_of(n=N):
    return {"x0": MEAN + STD * jax.random.normal(jax.random.key(7), (n, 1))}


def shown_at(k, n=N):
    """State k of 4 with the exact generator."""
    x0 = batch_of(n)["x0"]
    draws = draw(KEY, siddm.equal_times(4), x0, 1)._replace(t=jnp.full(n, k / 4))
    denoise = lambda x_t, t: Denoised(exact({}, x_t, 1000 * t, {"z": draws.z}))  # noqa: E731
    return show(denoise, x0, draws, draws.t - 0.25, VP)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_divergence_vanishes_for_the_exact_generator(k):
    shown = shown_at(k)
    ratio = (shown.t.alpha / shown.s.alpha)[:, None]
    plain = siddm.forward_loss(shown.x_t, shown.fake, shown.t, shown.s)
    # what is left without the entropy is half the squared noise
    assert float(plain.mean()) == pytest.approx(0.5, abs=0.02)
    # the best estimate of x_t from an exact x_s is r x_s
    both = siddm.forward_loss(shown.x_t, shown.fake, shown.t, shown.s, ratio * shown.fake)
    assert np.asarray(both) == pytest.approx(0, abs=1e-6)


def test_the_divergence_is_the_distance_of_two_gaussians_of_equal_variance():
    """Where x_t given x_s is N(c(x_s), beta), KL to N(r x_s, beta) is (c - r x_s)^2 / (2 beta)."""
    shown = shown_at(2)
    ratio = float(shown.t.alpha[0] / shown.s.alpha[0])
    beta = float(shown.t.sigma[0] ** 2 - ratio**2 * shown.s.sigma[0] ** 2)
    eps = jax.random.normal(jax.random.key(3), shown.fake.shape)
    eps = eps - eps.mean()
    centre = ratio * shown.fake + 0.4
    got = siddm.forward_loss(centre + np.sqrt(beta) * eps, shown.fake, shown.t, shown.s, centre)
    assert float(got.mean()) == pytest.approx(0.4**2 / (2 * beta), rel=1e-3)


def test_the_weight_of_the_divergence_does_not_depend_on_the_resolution():
    shown = shown_at(2, 4)
    wide = [jnp.broadcast_to(x[:, :, None], (4, 1, 9)) for x in (shown.x_t, shown.fake)]
    one = siddm.forward_loss(shown.x_t, shown.fake, shown.t, shown.s)
    assert np.asarray(siddm.forward_loss(*wide, shown.t, shown.s)) == pytest.approx(np.asarray(one), rel=1e-5)


def test_the_generator_is_differentiated_through_the_regressor():
    shown = shown_at(2, 4)
    adversarial = losses.Adversarial(lambda real, fake: 0 * real, lambda real, fake: 0 * fake)

    def slope(regress, **settings):
        def loss(fake):
            verdict = lambda x: siddm.Verdict(x[:, 0], regression=regress * x)  # noqa: E731
            return siddm.generator_loss(verdict, shown._replace(fake=fake), adversarial=adversarial, **settings)[0]

        return np.asarray(jax.grad(loss)(shown.fake))

    x_t, fake = np.asarray(shown.x_t), np.asarray(shown.fake)
    ratio = float(shown.t.alpha[0] / shown.s.alpha[0])
    beta = float(shown.t.sigma[0] ** 2 - ratio**2 * shown.s.sigma[0] ** 2)
    away, regressed = -ratio * (x_t - ratio * fake), 0.3 * (x_t - 0.3 * fake)
    assert slope(0.3) == pytest.approx((away + regressed) / beta / 4, rel=1e-4)
    assert slope(0.3, regressor=False, forward_weight=2.0) == pytest.approx(2 * away / beta / 4, rel=1e-4)


def test_the_discriminator_s_loss_is_the_sum_of_what_its_heads_are_asked():
    method, plain = make(denoise_weight=0.5), make(denoise_weight=0.0, regressor=False)
    params, aux = method.init(KEY, {})
    loss, metrics = method.objectives[0].loss(params, aux, batch_of(64), KEY, STEP)
    alone, seen = plain.objectives[0].loss(params, aux, batch_of(64), KEY, STEP)
    assert set(metrics) - set(seen) == {"denoised", "regressed"}
    extra = 0.5 * metrics["denoised"].mean() + metrics["regressed"].mean()
    assert float(loss - alone) == pytest.approx(float(extra), rel=1e-4)

    def two_heads(x_s):
        return siddm.Verdict(x_s[:, 0], 3 * x_s)

    shown, adversarial = shown_at(2, 8), losses.non_saturating()
    got, _ = siddm.discriminator_loss(two_heads, shown, adversarial=adversarial, denoise_weight=0.0, regressor=False)
    real, fake = np.asarray(shown.real), np.asarray(shown.fake)
    each = [np.logaddexp(0, -c * real).mean() + np.logaddexp(0, c * fake).mean() for c in (1, 3)]
    assert float(got) == pytest.approx(np.mean(each), rel=1e-5)


def test_the_regressor_learns_from_generated_data_and_the_image_from_real():
    shown = shown_at(2, 16)._replace(fake=jnp.full((16, 1), 5.0))
    asked = []

    def verdict(x_s):
        asked.append(x_s)
        return siddm.Verdict(x_s[:, 0], image=x_s, regression=x_s)

    _, metrics = siddm.discriminator_loss(verdict, shown, adversarial=losses.non_saturating())
    assert np.asarray(metrics["denoised"]) == pytest.approx(np.asarray((shown.real - shown.x0)[:, 0] ** 2), rel=1e-5)
    assert np.asarray(metrics["regressed"]) == pytest.approx(np.asarray((5 - shown.x_t)[:, 0] ** 2), rel=1e-5)
    assert len(asked) == 2


def test_each_loss_has_gradients_for_its_player_only():
    method = make()
    params, aux = method.init(KEY, {})
    for objective in method.objectives:
        loss = lambda params, loss=objective.loss: loss(params, aux, batch_of(16), KEY, STEP)[0]  # noqa: E731
        gradient = jax.grad(loss)(params)
        for player, tree in gradient.items():
            moved = any((leaf != 0).any() for leaf in jax.tree.leaves(tree))
            assert moved == (player == objective.player), (player, objective.player)


@pytest.mark.parametrize("n", [1, 2, 8])
def test_the_exact_generator_gives_the_data_in_any_number_of_steps(n):
    method, noise = make(exact), jax.random.normal(KEY, (N, 1))
    x0 = method.generate({"model": {}}, {}, jax.random.key(1), noise, {}, Sampling(num_steps=n))
    assert float(x0.mean()) == pytest.approx(MEAN, abs=0.015) and float(x0.std()) == pytest.approx(STD, abs=0.015)


def test_times_of_training_and_of_sampling():
    drawn = siddm.equal_times(3, 2.0)(KEY, 900)
    values, counts = np.unique(np.asarray(drawn), return_counts=True)
    assert values == pytest.approx([2 / 3, 4 / 3, 2]) and counts.min() > 250
    seen = []

    def network(params, x_t, t, cond, *, train=False, key=None):
        jax.debug.callback(lambda t: seen.append(float(t[0])), t)
        return x_t

    method = make(network, latent_dim=None)
    for sampling, expected in (
        (Sampling(), [1000, 750, 500, 250]),
        (Sampling(num_steps=1), [1000]),
        (Sampling(times=jnp.array([0.9, 0.3])), [900, 300]),
    ):
        seen.clear()
        jax.block_until_ready(method.generate({"model": {}}, {}, KEY, jnp.ones((2, 1)), {}, sampling))
        jax.effects_barrier()
        assert sorted(seen, reverse=True) == pytest.approx(expected)


def test_it_trains_in_one_trace_on_any_times():
    method = make(time_sampler=times.uniform(0.1, 1.0), num_steps=3, schedule=schedules.squared_cosine())
    optimizers = {player: optax.adam(5e-3, b1=0.5, b2=0.9) for player in ("disc", "model")}
    state = create_state(method, optimizers, (), KEY, batch_of(256))
    step = jax.jit(chex.assert_max_traces(make_train_step(method, optimizers), n=1))
    before = state.params
    for _ in range(5):
        state, metrics = step(state, batch_of(256))
    assert step._cache_size() == 1 and bool(metrics["finite"])
    moved = jax.tree.map(lambda old, new: bool((old != new).any()), before, state.params)
    assert all(jax.tree.leaves(moved))


def test_the_library_s_unet_discriminator_fits():
    unet = UNet(in_channels=1, out_channels=1, base_channels=8, channel_mult=(1,), num_res_blocks=1, norm_groups=4)

    def shapes(regression, **settings):
        disc = UNetDiscriminator(unet, regression)
        method = make(
            lambda params, x_t, t, cond, **training: x_t,
            as_judge(disc),
            init_disc_params=lambda key, batch: init_params(disc, key, *example_inputs(unet)),
            **settings,
        )
        params, aux = jax.eval_shape(method.init, KEY, {})
        batch = {"x0": jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)}
        return [jax.eval_shape(o.loss, params, aux, batch, KEY, STEP) for o in method.objectives]

    (loss, metrics), (_, seen) = shapes(True)
    each = {"logit_real", "logit_fake", "denoised", "regressed", "logit_generated", "forward"}
    shapes_of = {name: m.shape for name, m in (metrics | seen).items()}
    assert loss.shape == () and {name for name, shape in shapes_of.items() if shape == (2,)} == each
    assert {shape for name, shape in shapes_of.items() if name not in each} == {()}
    shapes(False, regressor=False)
    with pytest.raises(
        ValueError, match=r"regression must be \(2, 8, 8, 1\), it has none; add the head or set regress"
    ):
        shapes(False)


def test_a_discriminator_of_logits_alone():
    method = make(
        discriminator=siddm.logits_only(lambda params, x_s, t, cond, **training: params["w"][0] * x_s),
        denoise_weight=0.0,
        regressor=False,
    )
    params, aux = method.init(KEY, {})
    loss, metrics = method.objectives[0].loss(params, aux, batch_of(4), KEY, STEP)
    names = {"logit_real", "logit_fake"}
    by_level = {f"{name}_{low}" for name in names for low in ("0.0", "0.2", "0.4", "0.6", "0.8")}
    assert loss.shape == () and set(metrics) == names | by_level
    alone = make(discriminator=siddm.logits_only(lambda params, x_s, t, cond, **training: x_s), regressor=False)
    with pytest.raises(ValueError, match=r"image must be \(4, 1\), it has none; add the head or set denoise_weight=0"):
        alone.objectives[0].loss(params, aux, batch_of(4), KEY, STEP)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"latent_dim": 0}, "latent_dim must be at least 1, got 0"),
        ({"forward_weight": -1.0}, "weights must not be negative, got -1.0"),
        ({"parameterization": parameterization.eps()}, "at t = 1 this output .* only up to 15[0-9] times"),
        (
            {"parameterization": parameterization.eps(), "schedule": schedules.squared_cosine()},
            "only up to inf times its own error",
        ),
    ],
)
def test_refused_when_built(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_refused_when_traced():
    method = make()
    params, aux = method.init(KEY, {})
    with pytest.raises(ValueError, match="siddm: a batch needs 'x0'"):
        method.objectives[0].loss(params, aux, {"image": jnp.zeros((2, 1))}, KEY, STEP)
    for sampling, message in (
        (Sampling(num_steps=0), "num_steps must be at least 1, got 0"),
        (Sampling(guidance_scale=jnp.float32(2)), "takes no guidance_scale"),
    ):
        with pytest.raises(ValueError, match=message):
            method.generate(params, aux, KEY, jnp.zeros((2, 1)), {}, sampling)
