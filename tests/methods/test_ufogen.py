"""Weights and times by hand; what each player sees, recorded by plain functions in the place of networks; sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff import losses, parameterization, process, schedules, weighting
from jaxdiff.methods import ufogen
from jaxdiff.methods.base import Sampling
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.layers import fourier_embedding
from jaxdiff.networks.mlp import MLP
from jaxdiff.process import q_sample
from jaxdiff.training.state import create_state
from jaxdiff.training.step import make_train_step
from jaxdiff.types import expand

KEY = jax.random.key(0)
STEP = jnp.int32(0)
CHAIN = schedules.discrete(schedules.scaled_linear_betas(1000))
VE = schedules.ve(0.002, 20.0)
LEVELS = ufogen.level_jumps((0.1, 0.7, 20.0), 0.5)
POINT = jnp.array([0.6, -0.2])


class Seen:
    """A generator and a discriminator on points that keep what they are given.

    The generator says params["a"] everywhere, the discriminator w . x + b.
    """

    def __init__(self):
        self.generator, self.judge = [], []

    def generate(self, params, x_t, t, cond, *, train=False, key=None):
        self.generator.append((x_t, t))
        return jnp.broadcast_to(params["a"], x_t.shape)

    def judging(self, params, x_t, t, cond, *, train=False, key=None):
        self.judge.append((x_t, t))
        return (x_t * params["w"]).sum(axis=1) + params["b"]


def made(seen=None, schedule=VE, **settings):
    seen = Seen() if seen is None else seen
    base = {
        "parameterization": parameterization.x0(),
        "init_params": lambda key, batch: {"a": jnp.zeros((1, 2))},
        "init_discriminator": lambda key, batch: {"w": jnp.array([[0.3, -0.4]]), "b": jnp.zeros((1,))},
        "jumps": LEVELS,
    }
    method = ufogen.ufogen(seen.generate, seen.judging, schedule, **(base | settings))
    return method, *method.init(KEY, {})


def batch_of(n=4096, value=None):
    return {"x0": jnp.zeros((n, 2)) if value is None else jnp.broadcast_to(value, (n, 2))}


def loss_of(method, index, params, batch, step=STEP):
    return method.objectives[index].loss(params, {}, batch, KEY, step)


def test_weights_by_hand():
    t, s = jnp.array([250.0, 500.0, 750.0, 999.0]), jnp.array([0.0, 250.0, 500.0, 749.0])
    at_t, at_s = CHAIN.level(t), CHAIN.level(s)
    cumulative = np.asarray(at_t.alpha, np.float64) ** 2
    beta = 1 - cumulative / np.asarray(at_s.alpha, np.float64) ** 2
    np.testing.assert_allclose(ufogen.kl(at_t, at_s), cumulative / (2 * beta), rtol=1e-4)
    np.testing.assert_allclose(ufogen.kl(at_t, at_s), [1.03, 0.234, 0.035, 0.0025], rtol=0.02)
    np.testing.assert_allclose(ufogen.at_t(ufogen.signal_share)(at_t, at_s), cumulative, rtol=1e-5)
    np.testing.assert_allclose(
        ufogen.at_t(weighting.snr)(at_t, at_s), [2.07, 0.38, 0.060, 0.0047], rtol=0.02
    )  # fmt: skip
    sigma = jnp.array([0.5, 20.0])
    np.testing.assert_allclose(ufogen.signal_share(VE.level(sigma)), 1 / (1 + sigma**2), rtol=1e-6)
    np.testing.assert_allclose(ufogen.kl(VE.level(sigma), VE.level(sigma / 2)), 1 / (1.5 * sigma**2), rtol=1e-5)


@pytest.mark.parametrize("schedule", [CHAIN, VE, schedules.rectified_flow()], ids=["chain", "ve", "flow"])
def test_the_derived_weight_is_that_of_the_transition(schedule):
    """Two samples at s with one noise, seen through q(x_t | x_s): their divergence is kl |x0 - prediction|^2."""
    high = min(0.7 * schedule.t_max, 3.0) if schedule is VE else 0.7 * schedule.t_max
    t, s = (schedule.level(jnp.array([share * high])) for share in (1.0, 0.3))
    x0, prediction, noise = (jax.random.normal(k, (1, 5)) for k in jax.random.split(KEY, 3))
    means = [process.transition(q_sample(x, noise, s), t, s) for x in (x0, prediction)]
    divergence = ((means[0].mean - means[1].mean) ** 2 / (2 * means[0].variance)).mean()
    np.testing.assert_allclose(ufogen.reconstruction(prediction, x0, t, s, ufogen.kl)[0], divergence, rtol=1e-4)


def test_times_of_a_chain():
    assert ufogen.stride_times(1000, 1).tolist() == [999]
    assert ufogen.stride_times(1000, 2).tolist() == [999, 499]
    assert ufogen.stride_times(1000, 4).tolist() == [999, 749, 499, 249]
    t, s = ufogen.chain_jumps(1000, 250, last_share=0.25).draw(KEY, 4000)
    np.testing.assert_array_equal(s, np.maximum(t - 250, 0))
    assert t.min() >= 1 and (np.asarray(t) == 999).mean() == pytest.approx(0.25, abs=0.03)
    others = np.asarray(t)[np.asarray(t) < 999]
    assert others.mean() == pytest.approx(499.5, abs=20) and others.max() > 990


def test_times_of_levels():
    jumps = ufogen.level_jumps((0.1, 0.3, 0.7, 20.0), 0.5)
    t, s = (np.asarray(a) for a in jumps.draw(KEY, 4000))
    found = {(round(float(a), 3), round(float(b), 3)) for a, b in zip(t, s, strict=True)}
    assert found == {(0.3, 0.1), (0.7, 0.3), (20.0, 0.7)}
    assert (t == 20).mean() == pytest.approx(0.5, abs=0.03) and (t < 0.5).mean() == pytest.approx(0.25, abs=0.03)
    assert jumps.times(1).tolist() == [20.0] and jumps.times(2).tolist() == [20.0, 0.3]
    assert jumps.times(4).tolist() == [20.0, 0.7, 0.3, 0.1]


def test_times_of_pairs():
    jumps = ufogen.pair_jumps([(20.0, 0.1), (20.0, 0.7), (0.7, 0.1)], [0.5, 0.25, 0.25])
    t, s = (np.asarray(a) for a in jumps.draw(KEY, 4000))
    assert (t > 1).mean() == pytest.approx(0.75, abs=0.03) and (s > 0.5).mean() == pytest.approx(0.25, abs=0.03)
    assert jumps.times(1).tolist() == [20.0] and jumps.times(2).tolist() == [20.0, 0.7]


def test_real_and_fake_and_the_input_have_noise_of_their_own():
    """Of data at 0 only the noises are left: standard normal in each, without correlation between any two."""
    seen = Seen()
    method, params, _ = made(seen)
    loss_of(method, 0, params, batch_of())
    (x_t, t), (real, s), (fake, _) = seen.generator[0], *seen.judge
    noises = [np.asarray(x / a[:, None]).ravel() for x, a in ((x_t, t), (real, s), (fake, s))]
    assert {round(float(a), 3) for a in s} == {0.1, 0.7}
    np.testing.assert_array_equal(np.asarray(t)[np.asarray(s) > 0.5], 20.0)
    np.testing.assert_allclose(np.corrcoef(noises), np.eye(3), atol=0.04)
    for noise in noises:
        assert noise.std() == pytest.approx(1.0, abs=0.03)
    loss_of(method, 1, params, batch_of())
    assert np.abs(seen.judge[2][0] - fake).max() > 0.1  # both objectives are given one key here, yet with R1 another


def test_a_posterior_sample_holds_on_to_the_input():
    """The failure: a wrong prediction is hidden by what x_t still tells of the data."""
    level_t, level_s = CHAIN.level(jnp.full(4096, 300.0)), CHAIN.level(jnp.full(4096, 50.0))
    x0 = jnp.broadcast_to(POINT, (4096, 2))
    eps, noise = (jax.random.normal(k, x0.shape) for k in jax.random.split(KEY))
    x_t, wrong = q_sample(x0, eps, level_t), jnp.zeros_like(x0)
    real = q_sample(x0, noise, level_s)
    away = {}
    for rule in (ufogen.fresh, ufogen.from_posterior):
        right = rule(x0, x_t, level_t, level_s, noise)
        np.testing.assert_allclose(right.mean(0), real.mean(0), atol=0.03)
        np.testing.assert_allclose(right.std(0), real.std(0), atol=0.02)
        away[rule] = float(np.abs(rule(wrong, x_t, level_t, level_s, noise).mean(0) - real.mean(0)).max())
    between = process.bridge(level_t, level_s)
    np.testing.assert_allclose(away[ufogen.fresh], 0.6 * level_s.alpha[0], atol=0.03)
    np.testing.assert_allclose(away[ufogen.from_posterior], 0.6 * between.on_x0[0], atol=0.03)
    assert away[ufogen.from_posterior] < away[ufogen.fresh]


def test_losses_by_hand():
    method, params, _ = made(reconstruction_weight=2.0, gamma=ufogen.at_t(ufogen.signal_share))
    loss, metrics = loss_of(method, 0, params, batch_of(8))
    real, fake = np.asarray(metrics["logit_real"]), np.asarray(metrics["logit_fake"])
    np.testing.assert_allclose(loss, (np.log1p(np.exp(-real)) + np.log1p(np.exp(fake))).mean(), rtol=1e-5)
    params = params | {"model": {"a": POINT[None]}}
    loss, metrics = loss_of(method, 1, params, batch_of(8))
    error = np.asarray(metrics["reconstruction"])
    expected = np.array([0.2 / (1 + 0.7**2), 0.2 / (1 + 20.0**2)])  # one for each of the two levels
    assert np.abs(error[:, None] / expected - 1).min(axis=1).max() < 1e-4
    own = np.log1p(np.exp(-np.asarray(metrics["logit_generated"]))).mean()
    np.testing.assert_allclose(loss, own + 2 * error.mean(), rtol=1e-5)
    for adversarial, slope in ((losses.clamped(0.0), 0.0), (losses.hinge(), -1.0)):
        sure = params | {"disc": {"w": jnp.zeros((1, 2)), "b": jnp.full((1,), 5.0)}}
        certain, *_ = made(reconstruction_weight=0.0, adversarial=adversarial)
        by_bias = jax.grad(
            lambda b, p=sure, m=certain: loss_of(m, 1, p | {"disc": p["disc"] | {"b": b}}, batch_of(8))[0]
        )
        np.testing.assert_allclose(by_bias(sure["disc"]["b"]), [slope], atol=1e-6)


def test_an_exact_generator_has_nothing_left_to_learn():
    method, params, _ = made(init_params=lambda key, batch: {"a": POINT[None]})
    _, metrics = loss_of(method, 1, params, batch_of(64, POINT))
    np.testing.assert_array_equal(metrics["reconstruction"], 0.0)
    _, metrics = loss_of(method, 0, params, batch_of(value=POINT))
    assert abs(float((metrics["logit_real"] - metrics["logit_fake"]).mean())) < 0.02


def test_the_discriminator_does_not_move_the_generator():
    method, params, _ = made(r1_weight=1.0)
    gradient = jax.grad(lambda p: loss_of(method, 0, p, batch_of(16))[0])(params)
    np.testing.assert_array_equal(gradient["model"]["a"], 0.0)
    assert np.abs(gradient["disc"]["w"]).min() > 0
    gradient = jax.grad(lambda p: loss_of(method, 1, p, batch_of(16))[0])(params)
    assert np.abs(gradient["model"]["a"]).min() > 0


def test_r1_of_a_linear_discriminator_exact_lazy_and_approximated():
    plain, params, _ = made(r1_weight=1e-12)
    base, _ = loss_of(plain, 0, params, batch_of())
    exact, *_ = made(r1_weight=0.8, r1_every=2)
    loss, metrics = loss_of(exact, 0, params, batch_of())
    assert metrics["r1"] == pytest.approx(0.25) and float(loss - base) == pytest.approx(0.1, rel=1e-4)
    loss, metrics = loss_of(exact, 0, params, batch_of(), jnp.int32(1))
    assert metrics["r1"] == 0 and loss == base
    about, *_ = made(r1_weight=0.8, r1_sigma=0.05)
    loss, metrics = loss_of(about, 0, params, batch_of())
    assert metrics["r1"] == pytest.approx(0.25, rel=0.1)
    assert float(loss - base) == pytest.approx(0.4 * float(metrics["r1"]), rel=1e-3)
    without, *_ = made()
    assert "r1" not in loss_of(without, 0, params, batch_of(8))[1]


@pytest.mark.parametrize("pure_noise", [True, False])
def test_at_the_last_level_the_generator_learns_from_noise_alone(pure_noise):
    seen = Seen()
    method, params, _ = made(seen, pure_noise=pure_noise)
    loss_of(method, 1, params, batch_of(value=jnp.array([300.0, 300.0])))
    x_t, t = (np.asarray(a) for a in seen.generator[0])
    assert x_t[t < 1].mean() == pytest.approx(300, abs=0.2)
    assert x_t[t > 1].mean() == pytest.approx(0 if pure_noise else 300, abs=2)


def test_both_players_see_scaled_inputs_and_times():
    seen = Seen()
    method, params, _ = made(seen, parameterization=parameterization.edm(0.5))
    loss_of(method, 1, params, batch_of())
    x_t, t = seen.generator[0]
    assert {round(float(a), 3) for a in np.exp(4 * np.asarray(t))} == {0.7, 20.0}
    assert x_t.std() == pytest.approx(1.0, abs=0.15)
    x_s, s = seen.judge[0]
    sigma = np.exp(4 * np.asarray(s))
    assert {round(float(a), 3) for a in sigma} == {0.1, 0.7}
    assert np.asarray(x_s)[sigma > 0.5].std() <= 1.05 and s.shape == (4096,)


def test_sampling_noises_the_prediction_afresh():
    method, params, aux = made(init_params=lambda key, batch: {"a": POINT[None]})
    noise = jax.random.normal(KEY, (4, 2))
    one = method.generate(params, aux, KEY, noise, {}, Sampling())
    np.testing.assert_allclose(one, jnp.broadcast_to(POINT, (4, 2)))

    def halving(params, x_t, t, cond, *, train=False, key=None):
        return 0.5 * x_t

    method = ufogen.ufogen(
        halving, Seen().judging, CHAIN, parameterization=parameterization.x0(), jumps=ufogen.chain_jumps(),
        init_params=lambda key, batch: {}, init_discriminator=lambda key, batch: {},
    )  # fmt: skip
    np.testing.assert_allclose(method.generate({"model": {}}, {}, KEY, noise, {}, Sampling()), 0.5 * noise, rtol=1e-5)
    two = method.generate({"model": {}}, {}, KEY, noise, {}, Sampling(num_steps=2))
    again = jax.random.normal(jax.random.fold_in(KEY, 0), noise.shape)
    level = CHAIN.level(jnp.full(4, 499.0))
    np.testing.assert_allclose(two, 0.5 * q_sample(0.5 * noise, again, level), rtol=1e-5)
    given = method.generate({"model": {}}, {}, KEY, noise, {}, Sampling(times=jnp.array([999.0, 499.0])))
    np.testing.assert_array_equal(given, two)
    with pytest.raises(ValueError, match="takes no guidance_scale"):
        method.generate({"model": {}}, {}, KEY, noise, {}, Sampling(guidance_scale=jnp.float32(2.0)))


@pytest.mark.parametrize("n", [1, 2, 4])
def test_any_number_of_steps_of_an_exact_generator_keeps_the_law(n):
    """Data N(0.3, 0.7^2), and a generator that takes the law of x_t to that of x0."""

    def exact(params, x_t, t, cond, *, train=False, key=None):
        alpha, sigma = (expand(a, x_t) for a in CHAIN.level(t))
        return 0.3 + 0.7 * (x_t - 0.3 * alpha) / jnp.sqrt(0.49 * alpha**2 + sigma**2)

    method = ufogen.ufogen(
        exact, Seen().judging, CHAIN, parameterization=parameterization.x0(), jumps=ufogen.chain_jumps(),
        init_params=lambda key, batch: {}, init_discriminator=lambda key, batch: {},
    )  # fmt: skip
    noise = jax.random.normal(KEY, (20_000, 1))
    x = method.generate({"model": {}}, {}, KEY, noise, {}, Sampling(num_steps=n))
    # pure noise is not quite x_t of index 999, whose alpha is 0.07
    assert x.mean() == pytest.approx(0.3, abs=0.03) and x.std() == pytest.approx(0.7, abs=0.02)


def test_a_train_step_compiles_once_with_the_discriminator_on_every_other_step():
    net = MLP(2, features=8, num_blocks=1, time_features=fourier_embedding)
    disc = MLP(1, features=8, num_blocks=1, time_features=fourier_embedding)

    def start(module):
        return lambda key, batch: init_params(module, key, jnp.zeros((1, 2)), jnp.zeros(1), {})

    method = ufogen.ufogen(
        as_network(net), as_network(disc), VE, parameterization=parameterization.edm(0.5), init_params=start(net),
        init_discriminator=start(disc), jumps=LEVELS, r1_weight=0.1, r1_every=2, disc_every=2,
    )  # fmt: skip
    optimizers = {"disc": optax.adam(1e-3, b1=0.0), "model": optax.adam(1e-3, b1=0.0)}
    batch, traces = batch_of(8, POINT), []
    state = create_state(method, optimizers, (), KEY, batch)
    step = make_train_step(method, optimizers)

    @jax.jit
    def counted(state, batch):
        traces.append(None)
        return step(state, batch)

    before = state
    for i in range(3):
        new, metrics = counted(state, batch)
        moved = {
            player: any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), *pair)))
            for player in ("disc", "model")
            for pair in [(new.params[player], state.params[player])]
        }
        assert moved == {"disc": i % 2 == 0, "model": True}
        assert np.isfinite(metrics["model/loss"]) and metrics["finite"]
        state = new
    assert len(traces) == 1 and before.step == 0 and int(state.step) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parameterization": parameterization.eps(), "schedule": CHAIN}, "14.6 times its own error"),
        (
            {"parameterization": parameterization.eps(), "schedule": schedules.rectified_flow()},
            "up to inf times its own error",
        ),
        (
            {"jumps": ufogen.level_jumps((0.1, 0.7, 2.0))},
            "sampling would start at t = 2, which holds signal, alpha / sigma = 0.5, .* last level, t = 20",
        ),
        (
            {"jumps": ufogen.chain_jumps(500, 100), "schedule": CHAIN},
            "sampling would start at t = 499, .* must reach the schedule's last level, t = 999",
        ),
        (
            {"pure_noise": False, "schedule": schedules.ve(0.002, 5.0), "jumps": ufogen.level_jumps((0.1, 0.7, 5.0))},
            "the last level holds signal, alpha / sigma = 0.2, .* pure_noise=True, or a schedule of zero_terminal_snr",
        ),
        ({"schedule": schedules.ve(0.002, 5.0)}, "the jumps begin at t = 20, the schedule's last level is t = 5"),
        ({"reconstruction_weight": -1.0}, "reconstruction_weight must not be negative, got -1.0"),
        ({"r1_weight": -1.0}, "r1_weight must not be negative"),
        ({"r1_weight": 1.0, "r1_every": 0}, "r1_every must be at least 1, got 0"),
        ({"r1_sigma": 0.0}, "r1_sigma must be positive, got 0.0"),
        ({"num_steps": 4}, "n must be 1 to 3, the number of times, got 4"),
    ],
)
def test_what_cannot_work_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        made(**settings)


def test_jumps_out_of_range_are_refused():
    for build, message in (
        (lambda: ufogen.chain_jumps(1000, 1000), "jump must be 1 to 999 on a chain of 1000, got 1000"),
        (lambda: ufogen.chain_jumps(last_share=1.5), r"last_share must lie in \[0, 1\], got 1.5"),
        (lambda: ufogen.level_jumps((0.7, 0.1)), r"increasing times, got \[0.7, 0.1\]"),
        (lambda: ufogen.level_jumps((0.7,)), "two or more increasing times"),
        (lambda: ufogen.level_jumps((0.1, 0.7), -0.5), r"last_share must lie in \[0, 1\]"),
        (lambda: ufogen.stride_times(1000, 1001), "n must be 1 to 1000, the number of times, got 1001"),
        (lambda: ufogen.pair_jumps([(0.1, 0.7)]), r"\(t, s\) with t above s, got \[\(0.1, 0.7\)\]"),
        (lambda: ufogen.pair_jumps([]), "with t above s"),
        (lambda: ufogen.pair_jumps([(0.7, 0.1), (20.0, 0.7)], [1.0]), "2 numbers that add up to 1, got"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    with pytest.raises(ValueError, match="ufogen: a batch needs 'x0'"):
        method, params, _ = made()
        loss_of(method, 0, params, {"points": jnp.zeros((2, 2))})
