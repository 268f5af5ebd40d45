"""What teacher, student and heads are given, recorded by plain functions; losses and gradients by hand; sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import losses, parameterization, schedules
from jaxdiff.methods import adversarial_distillation as ad
from jaxdiff.methods.base import Sampling
from jaxdiff.networks import dit
from jaxdiff.networks.base import init_params
from jaxdiff.networks.dit import DiT
from jaxdiff.networks.unet_discriminator import FeatureDiscriminator, FeatureHeads
from jaxdiff.process import q_sample
from jaxdiff.types import Denoised

KEY = jax.random.key(0)
STEP = jnp.int32(0)
FLOW = schedules.rectified_flow()
POINT = jnp.array([0.6, -0.2])


class Seen:
    """A network that says params["a"] everywhere, features that are 2 x and heads that weigh and add them."""

    def __init__(self):
        self.network, self.features, self.heads = [], [], []

    def generate(self, params, x_t, t, cond, *, train=False, key=None):
        self.network.append((x_t, t))
        return jnp.broadcast_to(params["a"], x_t.shape)

    def look(self, params, x, t, cond):
        self.features.append((params, x, t))
        return [2 * x, t[:, None]]

    def judge(self, params, taps, t, cond):
        self.heads.append((t, cond))
        return (taps[0] * params["w"]).sum(axis=1) + params["b"] * taps[1][:, 0]


def made(seen=None, **settings):
    seen = Seen() if seen is None else seen
    base = {
        "schedule": FLOW,
        "parameterization": parameterization.x0(),
        "teacher_params": {"a": jnp.zeros((1, 2))},
        "features": seen.look,
        "heads": seen.judge,
        "init_heads": lambda key, batch: {"w": jnp.array([[0.3, -0.4]]), "b": jnp.zeros((1,))},
        "levels": (1.0, 0.5),
    }
    base |= settings
    method = ad.adversarial_distillation(seen.generate, base.pop("schedule"), **base)
    return method, *method.init(KEY, {})


def batch_of(n=4096, value=POINT):
    return {"x0": jnp.broadcast_to(value, (n, 2))}


def loss_of(method, index, params, aux, batch):
    return method.objectives[index].loss(params, aux, batch, KEY, STEP)


def test_the_student_starts_from_its_levels_and_from_noise_alone_at_the_last():
    seen = Seen()
    method, params, aux = made(seen)
    loss_of(method, 1, params, aux, batch_of(value=jnp.array([300.0, 300.0])))
    x_s, s = (np.asarray(a) for a in seen.network[0])
    assert set(s.tolist()) == {1.0, 0.5} and (s == 1).mean() == pytest.approx(0.5, abs=0.03)
    assert x_s[s == 1].mean() == pytest.approx(0, abs=0.1) and x_s[s == 1].std() == pytest.approx(1, abs=0.03)
    assert x_s[s == 0.5].mean() == pytest.approx(150, abs=0.1)


def test_the_frozen_teacher_looks_at_both_sides_with_noise_of_their_own():
    seen = Seen()
    method, params, aux = made(seen, init_params=lambda key, batch: {"a": jnp.ones((1, 2))})
    loss_of(method, 0, params, aux, batch_of())
    (teacher, real, t), (_, fake, t_fake) = seen.features
    assert teacher is aux["teacher"]
    np.testing.assert_array_equal(t, t_fake)
    logits = np.log(np.asarray(t) / (1 - np.asarray(t)))
    assert logits.mean() == pytest.approx(1.0, abs=0.06) and logits.std() == pytest.approx(1.0, abs=0.06)
    share = np.asarray(t)[:, None]
    noises = [((real - (1 - share) * POINT[None]) / share).ravel(), ((fake - (1 - share)) / share).ravel()]
    np.testing.assert_allclose(np.corrcoef(noises), np.eye(2), atol=0.04)
    assert [round(float(np.std(noise)), 1) for noise in noises] == [1.0, 1.0]


def test_losses_by_hand():
    method, params, aux = made(distillation_weight=0.0)
    loss, metrics = loss_of(method, 0, params, aux, batch_of(16))
    real, fake = np.asarray(metrics["logit_real"]), np.asarray(metrics["logit_fake"])
    np.testing.assert_allclose(loss, (np.maximum(1 - real, 0) + np.maximum(1 + fake, 0)).mean(), rtol=1e-5)
    loss, metrics = loss_of(method, 1, params, aux, batch_of(16))
    np.testing.assert_allclose(loss, -np.asarray(metrics["logit_generated"]).mean(), rtol=1e-5)
    method, params, aux = made(init_params=lambda key, batch: {"a": POINT[None]})
    with_teacher, metrics = loss_of(method, 1, params, aux, batch_of())
    # the teacher says 0, the student POINT; of a uniform t the weight has the mean asinh(1) / sqrt(2)
    assert float(metrics["distillation"].mean()) == pytest.approx(0.2 * np.arcsinh(1) / np.sqrt(2), abs=0.005)
    own = -np.asarray(metrics["logit_generated"]).mean()
    assert float(with_teacher) == pytest.approx(own + 2.5 * float(metrics["distillation"].mean()), rel=1e-4)


@pytest.mark.parametrize("index", [0, 1])
def test_the_heads_are_told_the_condition_and_the_level_as_the_features_are(index):
    seen = Seen()
    method, params, aux = made(seen, parameterization=parameterization.x0(parameterization.scaled_time(1000.0)))
    label = jnp.arange(8)
    loss_of(method, index, params, aux, batch_of(8) | {"label": label})
    for t, cond in seen.heads:
        np.testing.assert_array_equal(t, seen.features[0][2])
        assert list(cond) == ["label"] and cond["label"] is label
    assert len(seen.heads) == 2 and t.min() > 1


@pytest.mark.parametrize("index", [0, 1])
def test_heads_are_summed_and_their_tokens_averaged(index):
    seen = Seen()

    def wide(*shape):
        def heads(params, taps, t, cond):
            logits = seen.judge(params, taps, t, cond)
            return jnp.broadcast_to(logits.reshape(-1, *(1 for _ in shape)), (logits.shape[0], *shape))

        method, params, aux = made(seen, heads=heads, distillation_weight=0.0)
        return float(loss_of(method, index, params, aux, batch_of(8))[0])

    one = wide()
    assert [wide(1), wide(3), wide(3, 5), wide(3, 5, 2)] == pytest.approx([one, 3 * one, 3 * one, 3 * one], rel=1e-5)
    terms = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    np.testing.assert_allclose(ad.over_heads(jnp.asarray(terms)), terms.mean(axis=2).sum(axis=1))


def test_distillation_asks_the_teacher_about_the_noised_prediction_and_holds_its_answer_fixed():
    level, t = FLOW.level(jnp.array([0.25, 0.5])), jnp.array([0.25, 0.5])
    noise = jax.random.normal(KEY, (2, 2))
    asked = []

    def teacher(x_t, t):
        asked.append(x_t)
        return Denoised(3 * x_t)

    prediction = jnp.broadcast_to(POINT, (2, 2))
    error = ad.distillation(prediction, teacher, t, level, noise)
    x_t = q_sample(prediction, noise, level)
    np.testing.assert_array_equal(asked[0], x_t)
    np.testing.assert_allclose(error, np.square(prediction - 3 * x_t).mean(axis=1), rtol=1e-5)
    slope = jax.grad(lambda p: ad.distillation(p, teacher, t, level, noise).sum())(prediction)
    np.testing.assert_allclose(slope, prediction - 3 * x_t, rtol=1e-5)  # 2 (p - x0) / 2 values


def test_r1_is_taken_at_the_inputs_of_the_heads():
    params = {"w": jnp.array([[0.3, -0.4]]), "b": jnp.array([2.0])}
    taps = [jnp.ones((3, 2)), jnp.ones((3, 1))]
    np.testing.assert_allclose(
        ad.head_r1(lambda taps: Seen().judge(params, taps, jnp.zeros(3), {}), taps), [4.25] * 3, rtol=1e-5
    )
    plain, state, aux = made()
    base, _ = loss_of(plain, 0, state, aux, batch_of(8))
    penalised, *_ = made(r1_weight=0.1)
    loss, metrics = loss_of(penalised, 0, state, aux, batch_of(8))
    np.testing.assert_allclose(metrics["r1"], [0.25] * 8, rtol=1e-5)
    assert float(loss - base) == pytest.approx(0.025, rel=1e-4)


def test_the_heads_alone_learn_to_judge_and_the_teacher_never_moves():
    method, params, aux = made(r1_weight=1.0)
    by_params = jax.grad(lambda p: loss_of(method, 0, p, aux, batch_of(16))[0])(params)
    np.testing.assert_array_equal(by_params["model"]["a"], 0.0)
    assert np.abs(by_params["disc"]["w"]).min() > 0
    by_params = jax.grad(lambda p: loss_of(method, 1, p, aux, batch_of(16))[0])(params)
    assert np.abs(by_params["model"]["a"]).min() > 0
    assert method.advance(aux, params, STEP, {}) is aux


def test_features_and_heads_are_a_feature_discriminator_in_two_parts():
    net = DiT(in_channels=2, out_channels=2, input_size=4, width=8, depth=2, num_heads=2, num_classes=None,
              null_label=False)  # fmt: skip
    module, taps = FeatureDiscriminator(net, ("block_0", "block_1")), ("block_0", "block_1")
    rng = np.random.default_rng(0)
    params = init_params(module, KEY, *dit.example_inputs(net))
    params = jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape, np.float32), params)
    x, t = jax.random.normal(KEY, (2, 4, 4, 2)), jnp.array([3.0, 700.0])
    whole = module.apply({"params": params}, x, t, {})
    _, found = net.apply({"params": params["backbone"]}, x, t, {}, return_features=True)
    parts = FeatureHeads().apply({"params": params["heads"]}, [found[name] for name in taps])
    np.testing.assert_allclose(np.asarray(parts), np.asarray(whole), rtol=1e-5, atol=1e-6)


def test_sampling_goes_through_the_first_levels():
    seen = Seen()
    method, params, aux = made(seen, levels=(1.0, 0.75, 0.5), init_params=lambda key, batch: {"a": POINT[None]})
    noise = jax.random.normal(KEY, (3, 2))
    np.testing.assert_allclose(
        method.generate(params, aux, KEY, noise, {}, Sampling()), jnp.broadcast_to(POINT, (3, 2))
    )
    x, t = seen.network[-1]
    np.testing.assert_array_equal(x, noise)
    np.testing.assert_array_equal(t, 1.0)
    half = Sampling(times=jnp.array([1.0, 0.75]))
    np.testing.assert_array_equal(
        method.generate(params, aux, KEY, noise, {}, half), method.generate(params, aux, KEY, noise, {}, Sampling(2))
    )
    with pytest.raises(ValueError, match="knows 3 levels, got num_steps 4"):
        method.generate(params, aux, KEY, noise, {}, Sampling(4))
    with pytest.raises(ValueError, match="takes no guidance_scale"):
        method.generate(params, aux, KEY, noise, {}, Sampling(guidance_scale=jnp.float32(2.0)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parameterization": parameterization.eps()}, "up to inf times its own error"),
        ({"levels": (0.5, 0.25)}, r"levels must decrease from t_max 1, got \[0.5, 0.25\]"),
        ({"levels": (1.0, 1.0)}, "levels must decrease"),
        ({"levels": ()}, "levels must decrease"),
        ({"num_steps": 3}, "knows 2 levels, got num_steps 3"),
        ({"distillation_weight": -1.0}, "distillation_weight must not be negative, got -1.0"),
        ({"r1_weight": -1.0}, "r1_weight must not be negative"),
        (
            {"init_params": lambda key, batch: {"a": jnp.zeros((1, 3))}},
            r"a is \(1, 3\) in the student and \(1, 2\) in the teacher",
        ),
    ],
)
def test_what_cannot_work_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        made(**settings)


def test_another_loss_may_look_at_the_real_logits():
    method, params, aux = made(adversarial=losses.relativistic(), distillation_weight=0.0)
    loss, metrics = loss_of(method, 1, params, aux, batch_of(8))
    fake = np.asarray(metrics["logit_generated"])
    assert abs(float(loss) - np.log1p(np.exp(-fake)).mean()) > 1e-3
