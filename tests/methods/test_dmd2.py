"""Data N(MEAN, STD^2): both scores are known, so the gradient is, and a linear generator reaches the data."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff import parameterization, schedules
from jaxdiff.methods.base import Sampling
from jaxdiff.methods.dmd2 import (
    dmd2,
    edm_form,
    eps_form,
    matching_gradient,
    matching_loss,
    sampling_times,
    score_loss,
)
from jaxdiff.training.state import create_state
from jaxdiff.training.step import make_train_step
from jaxdiff.types import Denoised, expand

KEY = jax.random.key(0)
STEP = jnp.int32(0)
MEAN, STD = 0.3, 0.7
BETAS = schedules.scaled_linear_betas(100, 0.0085, 0.12)
X0 = MEAN + STD * jax.random.normal(jax.random.key(1), (8, 2))


def x0_form(num_levels=100):
    """Networks that answer with x0 itself and see sigma."""
    plain = parameterization.x0()
    return edm_form(STD, sigma_max=10.0, num_levels=num_levels, parameterization=plain)


def bayes(mean, variance):
    def denoise(x, t):
        s = expand(t, x) ** 2
        return Denoised((variance * x + s * mean) / (variance + s))

    return denoise


def gaussian(params, x, t, cond, *, train=False, key=None):
    """The denoiser of N(mean, exp(log_variance)), the family of the teacher, the student and the fake score."""
    return bayes(params["mean"], jnp.exp(params["log_variance"]))(x, t).x0


def generator(params, x, t, cond, *, train=False, key=None):
    """Maps noise of deviation sigma_max to N(mean, exp(2 log_std))."""
    return params["mean"] + jnp.exp(params["log_std"]) * x / expand(t, x)


def logits(params, x, t, cond, *, train=False, key=None):
    return (params["head"] * x).sum(axis=1)


TEACHER = {"mean": jnp.float32(MEAN), "log_variance": jnp.float32(2 * np.log(STD))}
STUDENT = {"mean": jnp.float32(-0.4), "log_std": jnp.float32(np.log(0.3))}


def with_head(key, batch):
    return {"mean": jnp.float32(0), "log_variance": jnp.float32(0), "head": jnp.zeros((1, 2))}


def make(**settings):
    base = {
        "teacher_params": TEACHER,
        "teacher": lambda params, cond: bayes(params["mean"], jnp.exp(params["log_variance"])),
        "init_params": lambda key, batch: jax.tree.map(jnp.array, STUDENT),
        "score": gaussian,
    }
    return dmd2(generator, x0_form(), **(base | settings))


def judging(**settings):
    return make(**({"judge": logits, "init_fake": with_head} | settings))


def losses_of(method, params, aux, batch=None, key=KEY):
    batch = {"x0": X0} if batch is None else batch
    return {o.player: o.loss(params, aux, batch, key, STEP) for o in method.objectives}


def test_the_gradient_is_the_difference_of_the_scores_and_stops_when_they_agree():
    real, fake = bayes(MEAN, STD**2)(X0, jnp.ones(8)).x0, bayes(-0.4, 0.09)(X0, jnp.ones(8)).x0
    gradient = matching_gradient(X0, real, fake)
    expected = (fake - real) / jnp.abs(X0 - real).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    assert (matching_gradient(X0, real, real) == 0).all()
    on_x = jax.grad(lambda x: matching_loss(x, gradient).mean())(X0)
    np.testing.assert_allclose(on_x, gradient / X0.size, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(matching_loss(X0, gradient), 0.5 * (gradient**2).mean(axis=1), rtol=1e-4)


def test_an_example_that_the_teacher_leaves_alone_has_no_gradient_and_nothing_is_hidden():
    fake = X0 + 0.5
    real = X0.at[0].set(X0[0] + 1)
    gradient = matching_gradient(X0, real, fake)
    np.testing.assert_allclose(gradient[0], -0.5, rtol=1e-5)
    assert (gradient[1:] == 0).all()
    assert np.isnan(matching_gradient(X0, real, fake.at[0].set(jnp.nan))[0]).all()


def test_levels_of_the_two_forms():
    form = edm_form(num_levels=1000)
    assert float(form.time(jnp.zeros(1))[0]) == pytest.approx(0.002, rel=1e-5)
    assert sampling_times(form, 1).tolist() == pytest.approx([80.0], rel=1e-5)
    four = eps_form(schedules.scaled_linear_betas(1000))
    assert sampling_times(four, 4).tolist() == [999, 749, 499, 249]
    np.testing.assert_allclose(sampling_times(form, 4), form.time(jnp.array([999.0, 749.0, 499.0, 249.0])))
    last = four.schedule.level(jnp.array([999.0]))
    assert float(four.prior(last)[0]) == 1 and float(form.prior(form.schedule.level(jnp.array([80.0])))[0]) == 80


def test_the_fake_score_learns_by_the_error_of_its_networks_output():
    """In EDM's form the weight is 1 / sigma^2 + 1 / sigma_data^2; in the eps form the loss is the eps error."""
    form, index = edm_form(num_levels=50), jnp.arange(8.0) * 6
    eps = jax.random.normal(KEY, X0.shape)
    loss = score_loss(form, lambda x, t: Denoised(X0 + 0.1), X0, index, eps)
    np.testing.assert_allclose(loss, 0.01 * (form.time(index) ** -2 + 4), rtol=1e-4)
    chain = eps_form(BETAS)
    level = chain.schedule.level(index)

    def off(x, t):
        return Denoised((x - expand(level.sigma, x) * (eps + 0.2)) / expand(level.alpha, x))

    np.testing.assert_allclose(score_loss(chain, off, X0, index, eps), 0.04, rtol=2e-3)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_each_objective_moves_its_own_player_alone(num_steps):
    method = judging(num_steps=num_steps)
    params, aux = method.init(KEY, {"x0": X0})
    params["fake"]["head"] = jnp.ones((1, 2))
    for objective in method.objectives:

        def loss(params, aux, objective=objective):
            return objective.loss(params, aux, {"x0": X0}, KEY, STEP)[0]

        on_params, on_aux = jax.grad(loss, argnums=(0, 1))(params, aux)
        sizes = {player: sum(float(jnp.abs(g).sum()) for g in jax.tree.leaves(t)) for player, t in on_params.items()}
        assert sizes[objective.player] > 0
        assert sum(float(jnp.abs(g).sum()) for g in jax.tree.leaves(on_aux)) == 0
        if objective.player == "fake":
            assert sizes["model"] == 0, "samples carry no gradient into the generator"


def test_the_adversarial_terms_start_at_log_2_and_are_weighted():
    method, plain = judging(judge_weight=1e-2, gan_weight=3e-3), make(init_fake=with_head)
    params, aux = method.init(KEY, {"x0": X0})
    both, alone = losses_of(method, params, aux), losses_of(plain, params, aux)
    assert float(both["fake"][0] - alone["fake"][0]) == pytest.approx(1e-2 * 2 * np.log(2), rel=1e-2)
    assert float(both["model"][0] - alone["model"][0]) == pytest.approx(3e-3 * np.log(2), rel=1e-2)
    by_level = {f"logit_{side}_{low}" for side in ("real", "fake") for low in ("0.0", "0.2", "0.4", "0.6", "0.8")}
    assert set(both["fake"][1]) == {"loss_score", "logit_real", "logit_fake", *by_level}
    assert set(alone["fake"][1]) == {"loss_score"}
    np.testing.assert_allclose(both["model"][1]["loss_gan"], np.log(2), rtol=1e-5)
    many = judging(judge=lambda params, x, t, cond, **training: params["head"] * x)
    assert losses_of(many, params, aux)["fake"][1]["logit_real"].shape == (8,)


def test_the_judge_sees_what_the_fake_score_sees():
    seen = {}

    def watch(params, x, t, cond, *, train=False, key=None):
        seen.update(x=x, t=t, cond=cond)
        return x.sum(axis=1)

    form = edm_form(0.5, num_levels=40)

    def network(params, x, t, cond, *, train=False, key=None):
        return params["a"] * x

    start = {"a": jnp.float32(0.5)}
    method = dmd2(network, form, teacher_params=start, judge=watch, init_fake=lambda key, batch: start)
    params, aux = method.init(KEY, {"x0": X0})
    wide = {"x0": jnp.zeros((2000, 2)), "label": jnp.zeros(2000, jnp.int32)}
    method.objectives[0].loss(params, aux, wide, KEY, STEP)
    sigma = np.exp(4 * np.asarray(seen["t"]))
    assert 0.0019 < sigma.min() < 0.01 and 40 < sigma.max() <= 80.1 and list(seen["cond"]) == ["label"]
    assert np.abs(np.asarray(seen["x"])).std() < 1.5, "the input is scaled to unit variance"


def test_backward_simulation_trains_on_the_states_of_the_sampler():
    """The student that answers its input: the states are noise, then the last x0 with fresh noise of the next level."""
    seen = []

    def watch(params, x, t, cond, *, train=False, key=None):
        if train:
            seen.append((x, t))
        return jnp.zeros_like(x) + params["a"]

    form = x0_form()
    method = dmd2(
        watch, form, teacher_params={"a": jnp.float32(2)}, teacher=lambda params, cond: bayes(0.0, 1.0),
        score=gaussian, init_fake=lambda key, batch: TEACHER, num_steps=4,
    )  # fmt: skip
    params, aux = method.init(KEY, {})
    batch = {"x0": jnp.zeros((4000, 1))}
    method.objectives[0].loss(params, aux, batch, KEY, STEP)
    (x, t), grid = seen[0], sampling_times(form, 4)
    np.testing.assert_allclose(np.unique(t), grid[::-1], rtol=1e-6)
    for i, level in enumerate(grid):
        rows = np.asarray(x)[np.isclose(np.asarray(t), level, rtol=1e-5)]
        assert len(rows) / 4000 == pytest.approx(0.25, abs=0.03)
        assert rows.std() == pytest.approx(float(level), rel=0.1)
        assert rows.mean() == pytest.approx(2.0 if i else 0.0, abs=float(level) / 6)


def test_sampling():
    method = make(num_steps=2)
    params = {"model": STUDENT}
    noise = jax.random.normal(KEY, (4000, 2))
    one = method.generate(params, {}, KEY, noise, {}, Sampling(num_steps=1))
    np.testing.assert_allclose(one, -0.4 + 0.3 * noise, atol=1e-5)
    two = method.generate(params, {}, KEY, noise, {}, Sampling())
    assert not np.allclose(one, two, atol=0.1)
    chosen = method.generate(params, {}, KEY, noise, {}, Sampling(times=jnp.asarray(sampling_times(x0_form(), 2))))
    np.testing.assert_allclose(chosen, two, atol=1e-6)


def test_a_gaussian_generator_reaches_the_teachers_distribution():
    """Mean and deviation are found by the scores alone; the data in the batch are not looked at."""
    method = make(every=1, init_fake=lambda key, batch: jax.tree.map(jnp.array, TEACHER))
    optimizers = {"fake": optax.adam(3e-2, b1=0.5), "model": optax.adam(1e-2, b1=0.5)}
    batch = {"x0": jnp.full((256, 1), 50.0)}
    state = create_state(method, optimizers, (), KEY, batch)
    step = jax.jit(chex.assert_max_traces(make_train_step(method, optimizers), n=1), donate_argnums=0)
    for _ in range(500):
        state, metrics = step(state, batch)
    assert float(state.params["model"]["mean"]) == pytest.approx(MEAN, abs=0.08)
    assert float(jnp.exp(state.params["model"]["log_std"])) == pytest.approx(STD, rel=0.15)
    assert bool(metrics["finite"])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"judge": logits}, "give init_fake, which adds its head"),
        ({"step_range": (0.5, 0.5)}, r"step_range is \(low, high\) in \[0, 1\]"),
        ({"judge_range": (0.0, 2.0)}, r"judge_range is \(low, high\) in \[0, 1\]"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"num_steps": 0}, "num_steps must be 1 to 100, got 0"),
        ({"num_steps": 101}, "num_steps must be 1 to 100, got 101"),
    ],
)
def test_refused_when_built(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_eps_without_signal_is_refused():
    with pytest.raises(ValueError, match="does not determine x0 at t = 99"):
        eps_form(schedules.zero_terminal_snr(BETAS))
    assert eps_form(schedules.zero_terminal_snr(BETAS), parameterization.v()).num_levels == 100


def test_an_output_that_hardly_determines_x0_at_the_first_step_is_refused():
    noisy = eps_form(schedules.linear_betas(1000))
    message = (
        r"at t = 999 this output \(eps\?\) determines x0 only up to 157 times its own error, at most 20 is allowed"
    )
    with pytest.raises(ValueError, match=message + ".*or raise max_gain"):
        dmd2(gaussian, noisy, teacher_params=TEACHER)
    dmd2(gaussian, noisy, teacher_params=TEACHER, max_gain=math.inf)
    published = eps_form(schedules.scaled_linear_betas(1000))
    dmd2(gaussian, published, teacher_params=TEACHER, num_steps=4)
    with pytest.raises(ValueError, match="up to 14.6 times its own error, at most 10 is allowed"):
        dmd2(gaussian, published, teacher_params=TEACHER, max_gain=10.0)
    dmd2(gaussian, eps_form(schedules.linear_betas(1000), parameterization.v()), teacher_params=TEACHER)


def test_parameters_of_another_form_than_the_teachers_are_refused():
    def init(**settings):
        start = {"init_params": lambda key, batch: TEACHER, "init_fake": lambda key, batch: TEACHER} | settings
        return dmd2(gaussian, x0_form(), teacher_params=TEACHER, **start).init(KEY, {"x0": X0})

    def wide(key, batch):
        return TEACHER | {"mean": jnp.zeros(3)}

    differ = r"student and teacher differ: mean is \(3,\) in the student and \(\) in the teacher"
    with pytest.raises(ValueError, match="dmd2: init_params: " + differ):
        init(init_params=wide)
    with pytest.raises(ValueError, match="dmd2: init_fake: " + differ):
        init(init_fake=wide)
    for may_differ in ({"score": gaussian}, {"judge": logits}):
        assert init(init_fake=with_head, **may_differ)[0]["fake"].keys() == {"head", *TEACHER}
    own = init(init_params=wide, teacher=lambda params, cond: bayes(0.0, 1.0))
    assert own[0]["model"]["mean"].shape == (3,)


def test_refused_when_traced():
    method = make()
    params, aux = method.init(KEY, {"x0": X0})
    with pytest.raises(ValueError, match=r"a batch needs 'x0', got keys \['image'\]"):
        losses_of(method, params, aux, {"image": X0})
    with pytest.raises(ValueError, match="takes no guidance_scale"):
        method.generate(params, aux, KEY, X0, {}, Sampling(guidance_scale=jnp.float32(2)))
    wide = make(teacher=lambda params, cond: lambda x, t: Denoised(jnp.zeros((8, 3))))
    params, aux = wide.init(KEY, {"x0": X0})
    with pytest.raises(ValueError, match=r"the teacher answers in shape \(8, 3\), the data have \(8, 2\)"):
        losses_of(wide, params, aux)
