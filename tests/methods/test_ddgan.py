"""The exact generator of Gaussian data reproduces its laws; what the penalty sees; whom each loss moves; refusals."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff import losses, parameterization, schedules
from jaxdiff.methods import ddgan
from jaxdiff.methods.base import Sampling
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.ddgan_discriminators import DDGANDiscriminator, example_inputs
from jaxdiff.solvers.ddim import ddim
from jaxdiff.solvers.posterior import Draws, draw, show
from jaxdiff.times import uniform_index
from jaxdiff.training.state import create_state
from jaxdiff.training.step import make_train_step
from jaxdiff.types import Denoised

KEY = jax.random.key(0)
MEAN, STD = 0.3, 0.7  # data ~ N(MEAN, STD^2)
BETAS = schedules.vp_betas(4)
CHAIN = schedules.discrete(BETAS)
N = 40_000


def exact(params, x_t, t, cond, *, train=False, key=None):
    """A draw of x0 given x_t, made of the latent: what a perfect generator does."""
    alpha, sigma = (a[:, None] for a in CHAIN.level(t))
    spread = alpha**2 * STD**2 + sigma**2
    return MEAN + alpha * STD**2 * (x_t - alpha * MEAN) / spread + STD * sigma / jnp.sqrt(spread) * cond["z"]


def linear(params, x_t, t, cond, *, train=False, key=None):
    return params["on_x"] * x_t + params["on_z"] * cond["z"]


def judge(params, x_s, t, cond, *, train=False, key=None):
    h = jnp.concatenate([x_s, cond["x_t"], x_s * cond["x_t"], x_s**2], axis=1)
    return (params["w"][None] * h).sum(axis=1) + params["b"]


def make(network=linear, discriminator=judge, **settings):
    base = {
        "init_params": lambda key, batch: {"on_x": jnp.float32(0.5), "on_z": jnp.float32(0.1)},
        "init_disc_params": lambda key, batch: {"w": jnp.array([0.3, -0.2, 0.1, 0.05]), "b": jnp.float32(0.2)},
        "latent_dim": 1,
    }
    return ddgan.ddgan(network, discriminator, **(base | settings))


def batch_of(n=N):
    return {"x0": MEAN + STD * jax.random.normal(jax.random.key(7), (n, 1))}


def shown_at(t, x0=None, denoise=None):
    x0 = batch_of()["x0"] if x0 is None else x0
    draws = draw(KEY, uniform_index(4), x0, 1)._replace(t=jnp.full(x0.shape[0], t, jnp.float32))
    denoise = denoise or (lambda x_t, t: Denoised(exact({}, x_t, t, {"z": draws.z})))
    return show(denoise, x0, draws, draws.t - 1, CHAIN), draws


@pytest.mark.parametrize("t", [1, 3])
def test_the_exact_generator_gives_the_joint_law_of_the_forward_process(t):
    shown, _ = shown_at(t)
    for x_s in (shown.real, shown.fake):
        alpha, sigma = (float(a[0]) for a in shown.s)
        kept, variance = np.sqrt(1 - BETAS[t]), alpha**2 * STD**2 + sigma**2
        cov = np.cov(np.concatenate([np.asarray(x_s), np.asarray(shown.x_t)], axis=1).T)
        expected = [[variance, kept * variance], [kept * variance, kept**2 * variance + BETAS[t]]]
        assert cov == pytest.approx(np.array(expected), abs=0.02)
        assert float(x_s.mean()) == pytest.approx(alpha * MEAN, abs=0.02)


def test_the_last_step_is_clean_data():
    shown, _ = shown_at(0)
    assert (shown.real == batch_of()["x0"]).all() and (shown.fake == shown.prediction).all()


def test_the_generator_is_reached_through_the_posterior_s_weight_of_x0():
    for t, weight in enumerate([1.0, 0.66578, 0.26919, 0.05782]):
        x0 = batch_of(3)["x0"]

        def fake(shift, t=t, x0=x0):
            return shown_at(t, x0, lambda x_t, t: Denoised(x_t + shift))[0].fake

        slope = jax.jvp(fake, (jnp.float32(0),), (jnp.float32(1),))[1]
        assert np.asarray(slope) == pytest.approx(np.full((3, 1), weight), abs=1e-5)


@pytest.mark.parametrize("n", [None, 2, 1])
def test_the_exact_generator_gives_the_data_in_any_number_of_steps(n):
    method, noise = make(exact), jax.random.normal(KEY, (N, 1))
    x0 = method.generate({"model": {}}, {}, jax.random.key(1), noise, {}, Sampling(num_steps=n))
    assert float(x0.mean()) == pytest.approx(MEAN, abs=0.015) and float(x0.std()) == pytest.approx(STD, abs=0.015)


def test_every_step_has_a_latent_of_its_own_and_times_can_be_given():
    seen = []

    def network(params, x_t, t, cond, *, train=False, key=None):
        jax.debug.callback(lambda t, z: seen.append((float(t[0]), *np.asarray(z[:, 0]))), t, cond["z"])
        return x_t

    method = make(network)

    def times_of(**sampling):
        seen.clear()
        jax.block_until_ready(method.generate({"model": {}}, {}, KEY, jnp.ones((2, 1)), {}, Sampling(**sampling)))
        jax.effects_barrier()
        return sorted((row[0] for row in seen), reverse=True)

    assert times_of() == [3, 2, 1, 0]
    assert len({z for row in seen for z in row[1:]}) == 8
    assert times_of(num_steps=2) == [3, 1] and times_of(num_steps=3) == [3, 2, 0] and times_of(num_steps=1) == [3]
    assert times_of(times=jnp.array([3.0, 0.0]), solver=ddim) == [3, 0]


def test_the_penalty_is_the_gradient_in_x_s_alone_every_nth_step():
    method = make(r1_gamma=0.5, r1_every=3)
    params, aux = method.init(KEY, {})
    params["disc"] = {"w": jnp.array([0.3, -2.0, 0.0, 0.0]), "b": jnp.float32(0)}
    plain = make(r1_gamma=0.0)
    for step in range(4):
        loss, metrics = method.objectives[0].loss(params, aux, batch_of(16), KEY, jnp.int32(step))
        without, seen = plain.objectives[0].loss(params, aux, batch_of(16), KEY, jnp.int32(step))
        r1 = 0.09 if step % 3 == 0 else 0.0
        assert float(metrics["r1"]) == pytest.approx(r1) and "r1" not in seen
        assert float(loss - without) == pytest.approx(0.25 * r1, abs=1e-6)
    estimated = make(r1_gamma=0.5, r1_every=1, r1_sigma=0.1)
    _, metrics = estimated.objectives[0].loss(params, aux, batch_of(), KEY, jnp.int32(1))
    assert float(metrics["r1"]) == pytest.approx(0.09, rel=0.03)  # the mean of 40,000 chi-squares moves by 0.7 %


def test_losses_are_those_of_the_logits():
    method = make(r1_gamma=0.0, adversarial=losses.hinge())
    params, aux = method.init(KEY, {})
    disc, model = (objective.loss(params, aux, batch_of(64), KEY, jnp.int32(0)) for objective in method.objectives)
    real, fake = np.asarray(disc[1]["logit_real"]), np.asarray(disc[1]["logit_fake"])
    assert float(disc[0]) == pytest.approx((np.maximum(1 - real, 0) + np.maximum(1 + fake, 0)).mean(), rel=1e-5)
    assert float(model[0]) == pytest.approx(-np.asarray(model[1]["logit_generated"]).mean(), rel=1e-5)
    # with one key both see the same draws; the train step gives them different ones
    assert np.asarray(model[1]["logit_generated"]) == pytest.approx(fake, abs=1e-6)


def test_each_loss_has_gradients_for_its_player_only():
    method = make()
    params, aux = method.init(KEY, {})
    for objective in method.objectives:
        loss = lambda params, loss=objective.loss: loss(params, aux, batch_of(16), KEY, jnp.int32(0))[0]  # noqa: E731
        gradient = jax.grad(loss)(params)
        for player, tree in gradient.items():
            moved = any((leaf != 0).any() for leaf in jax.tree.leaves(tree))
            assert moved == (player == objective.player), (player, objective.player)


def test_it_trains_in_one_trace():
    method = make(r1_every=2)
    optimizers = {player: optax.adam(1e-2, b1=0.5, b2=0.9) for player in ("disc", "model")}
    state = create_state(method, optimizers, (), KEY, batch_of(256))
    step = jax.jit(chex.assert_max_traces(make_train_step(method, optimizers), n=1))
    before = state.params
    for _ in range(5):
        state, metrics = step(state, batch_of(256))
    assert step._cache_size() == 1 and bool(metrics["finite"])
    moved = jax.tree.map(lambda old, new: bool((old != new).any()), before, state.params)
    assert all(jax.tree.leaves(moved))


def test_each_player_and_step_has_fresh_draws():
    method = make(r1_gamma=0.0)
    still = {player: optax.sgd(0.0) for player in ("disc", "model")}  # nothing but the draws differs
    state = create_state(method, still, (), KEY, batch_of(256))
    step, logits = jax.jit(make_train_step(method, still)), []
    for _ in range(3):
        state, metrics = step(state, batch_of(256))
        logits += [float(metrics["logit_fake"]), float(metrics["logit_generated"])]
    assert np.diff(np.sort(logits)).min() > 1e-5  # one key gives the same to rounding


def test_several_logits_an_example_are_averaged_and_a_latent_is_no_must():
    def pixels(params, x_s, t, cond, *, train=False, key=None):
        assert "z" not in cond and (cond["label"] == 1).all()
        return jnp.broadcast_to(judge(params, x_s, t, cond)[:, None], (x_s.shape[0], 3))

    def plain(params, x_t, t, cond, *, train=False, key=None):
        assert "z" not in cond
        return params["on_x"] * x_t

    method = make(plain, pixels, latent_dim=None)
    params, aux = method.init(KEY, {})
    batch = batch_of(8) | {"label": jnp.ones(8, jnp.int32)}
    one = make(plain, lambda *args, **training: pixels(*args, **training)[:, 0], latent_dim=None)
    of_three, of_one = (m.objectives[0].loss(params, aux, batch, KEY, jnp.int32(0))[1]["r1"] for m in (method, one))
    assert float(of_three) == pytest.approx(float(of_one), rel=1e-5) and of_one > 0
    for objective in method.objectives:
        loss, metrics = objective.loss(params, aux, batch, KEY, jnp.int32(0))
        assert loss.shape == () and {m.shape for m in metrics.values()} <= {(8,), ()}
    assert method.generate(params, aux, KEY, jnp.ones((2, 1)), {}, Sampling()).shape == (2, 1)


def test_a_batch_that_does_not_divide_into_groups_is_refused_by_the_discriminator():
    disc = DDGANDiscriminator(in_channels=1, base_channels=2, channel_mult=(2,), halves=(False,), time_features=4)
    method = make(
        lambda params, x_t, t, cond, **training: x_t,
        as_network(disc),
        init_disc_params=lambda key, batch: init_params(disc, key, *example_inputs(disc)),
    )
    params, aux = method.init(KEY, {})

    def loss(batch):
        return jax.eval_shape(method.objectives[0].loss, params, aux, batch, KEY, jnp.int32(0))

    loss({"x0": jnp.zeros((8, 4, 4, 1))})
    with pytest.raises(ValueError, match="groups of 4, got 6 examples; .* batch_size / accumulate"):
        loss({"x0": jnp.zeros((6, 4, 4, 1))})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"latent_dim": 0}, "latent_dim must be at least 1, got 0"),
        ({"r1_gamma": -1.0}, "r1_gamma must not be negative, got -1.0"),
        ({"r1_every": 0}, "r1_every must be at least 1 step, got 0"),
        ({"r1_sigma": 0.0}, "r1_sigma must be positive, got 0.0; None takes"),
        ({"parameterization": parameterization.eps()}, "at t = 3 this output .* only up to 152 times"),
        (
            {"parameterization": parameterization.eps(), "betas": schedules.zero_terminal_snr(BETAS)},
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
    with pytest.raises(ValueError, match="ddgan: a batch needs 'x0'"):
        method.objectives[0].loss(params, aux, {"image": jnp.zeros((2, 1))}, KEY, jnp.int32(0))
    for sampling, message in (
        (Sampling(num_steps=5), "n must be 1 to 4"),
        (Sampling(guidance_scale=jnp.float32(2)), "takes no guidance_scale"),
    ):
        with pytest.raises(ValueError, match=message):
            method.generate(params, aux, KEY, jnp.zeros((2, 1)), {}, sampling)


def test_explicit_draws_say_everything():
    x0 = batch_of(4)["x0"]
    draws = Draws(jnp.array([0.0, 1.0, 2.0, 3.0]), x0, 2 * x0, 3 * x0, None)
    shown = show(lambda x_t, t: Denoised(x_t), x0, draws, draws.t - 1, CHAIN)
    before = np.append(1.0, np.cumprod(np.sqrt(1 - BETAS)))[:-1, None]
    real = before * x0 + np.sqrt(1 - before**2) * x0
    assert np.asarray(shown.real) == pytest.approx(np.asarray(real), abs=1e-6)
    x_t = np.sqrt(1 - BETAS)[:, None] * real + 2 * np.sqrt(BETAS)[:, None] * x0
    assert np.asarray(shown.x_t) == pytest.approx(np.asarray(x_t), abs=1e-6)
