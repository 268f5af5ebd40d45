import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff import losses, parameterization, process, schedules, times, weighting
from jaxdiff.methods.base import Sampling
from jaxdiff.methods.ddpm import Loss, chain_denoiser, chain_loss, ddpm, tabulate
from jaxdiff.solvers.ddim import ddim
from jaxdiff.solvers.heun import heun

MEAN, STD = np.array([0.4, -0.3], np.float32), 0.5  # data ~ N(MEAN, STD^2) in the plane
BETAS = schedules.linear_betas(40)
KEY = jax.random.key(0)


def mlp(params, x_t, t, cond, *, train=False, key=None):
    """A residual network of points: x_t scaled by functions of t, plus a bias per class."""
    time = jnp.stack([jnp.ones_like(t), t / 40, (t / 40) ** 2, jnp.exp(-t / 4)], axis=-1)
    hidden = jnp.tanh(jnp.concatenate([x_t, time], axis=-1) @ params["w1"] + params["b1"].reshape(1, -1))
    out = hidden @ params["w2"]
    return out + params["label"][cond["label"]] if "label" in cond else out


def mlp_params(key, batch, out=2):
    a, b = jax.random.split(key)
    return {
        "w1": jax.random.normal(a, (6, 64)) / 6**0.5,
        "b1": jnp.zeros(64),
        "w2": jax.random.normal(b, (64, out)) / 64,
        "label": jnp.zeros((4, out)),
    }


def gaussian_batch(key, n):
    return {"x0": MEAN.reshape(1, 2) + STD * jax.random.normal(key, (n, 2))}


def exact_eps(schedule):
    """The best eps network for data N(MEAN, STD^2): it has no parameters."""

    def network(params, x_t, t, cond, *, train=False, key=None):
        level = schedule.level(t)
        a, s = level.alpha[:, None], level.sigma[:, None]
        return s * (x_t - a * MEAN.reshape(1, 2)) / (a**2 * STD**2 + s**2)

    return network


def least_loss():
    """What is left of eps when x_t is known, 1 - s^2 / (a^2 STD^2 + s^2), on average over t."""
    level = schedules.discrete(BETAS).level(jnp.arange(40.0))
    a, s = np.asarray(level.alpha), np.asarray(level.sigma)
    return np.mean(a**2 * STD**2 / (a**2 * STD**2 + s**2))


def make(network=mlp, betas=BETAS, **settings):
    # unwrapped, since the type checks of the tests would refuse a bad `loss` before the library does
    return inspect.unwrap(ddpm)(network, betas, **({"init_params": mlp_params} | settings))


def first_loss(method, batch, key=KEY):
    params, aux = method.init(key, batch)
    return loss_of(method)(params, aux, batch, key, jnp.int32(0))


def loss_of(method):
    return jax.jit(method.objectives[0].loss)


def samples_of(method, params, aux, noise, cond, sampling):
    return jax.jit(functools.partial(method.generate, sampling=sampling))(params, aux, KEY, noise, cond)


def test_the_exact_network_has_the_known_minimum():
    method = make(exact_eps(schedules.discrete(BETAS)), init_params=lambda key, batch: {})
    loss, metrics = first_loss(method, gaussian_batch(KEY, 20_000))
    assert float(loss) == pytest.approx(least_loss(), rel=0.03)
    assert metrics["mse"].shape == (20_000,)


def test_ddpm_learns_a_gaussian_and_samples_its_moments():
    method = make(time_sampler=times.stratified_index(40), clip=None)
    params, aux = method.init(KEY, gaussian_batch(KEY, 4))
    adam = optax.scale_by_adam()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, opt, key, rate):
        data_key, key = jax.random.split(key)
        grad_fn = jax.value_and_grad(method.objectives[0].loss, has_aux=True)
        (loss, _), grads = grad_fn(params, aux, gaussian_batch(data_key, 256), key, jnp.int32(0))
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to its integer count
            updates, opt = adam.update(grads, opt)
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), opt, loss

    opt, seen = adam.init(params), []
    for i in range(800):
        params, opt, loss = step(params, opt, jax.random.fold_in(KEY, i), jnp.float32(1e-2 * (1 - i / 800)))
        seen.append(float(loss))
    assert np.mean(seen[-50:]) < 0.5 * np.mean(seen[:5])
    noise = jax.random.normal(KEY, (4000, 2))
    samples = np.asarray(samples_of(method, params, aux, noise, {}, Sampling()))
    assert samples.mean(axis=0) == pytest.approx(MEAN, abs=0.06)
    assert samples.std(axis=0) == pytest.approx(STD, abs=0.06)


MEANINGS = {
    "eps": parameterization.eps(),
    "x0": parameterization.x0(),
    "v": parameterization.v(),
    "previous_x": parameterization.previous_x(schedules.discrete(BETAS)),
}
VARIANCES = [process.fixed_small, process.fixed_large, process.learned, process.learned_range]


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("meaning", MEANINGS)
def test_a_perfect_output_has_no_divergence(meaning, variance):
    """With the target as output and the posterior's variance, KL at t > 0 is 0 and so is the mse."""
    x0, eps = jax.random.uniform(KEY, (3, 2, 2, 1), minval=-1.0), jax.random.normal(KEY, (3, 2, 2, 1))
    t = jnp.array([1, 7, 39])
    chain = tabulate(BETAS, MEANINGS[meaning])
    level = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), chain.schedule.level(t.astype(jnp.float32)))
    between = process.chain_bridge(chain.tables, t)
    output = parameterization.target(MEANINGS[meaning], x0, eps, level)
    if variance is process.learned:
        output = jnp.concatenate([output, jnp.broadcast_to(between.log_variance.reshape(3, 1, 1, 1), x0.shape)], -1)
    if variance is process.learned_range:
        output = jnp.concatenate([output, -jnp.ones_like(x0)], -1)

    @jax.jit
    def both(output):
        mse, kl = (chain_loss(chain, output, x0, eps, t, variance=variance, loss=loss) for loss in (Loss.MSE, Loss.KL))
        return mse["mse"], kl["total"]

    mse, kl = both(output)
    assert mse == pytest.approx(0, abs=1e-6)
    if variance is not process.fixed_large:
        assert kl == pytest.approx(0, abs=2e-5)


def test_the_hybrid_bound_leaves_the_mean_channels_alone():
    x0, eps, output = (jax.random.normal(jax.random.key(i), (4, 2, 2, c)) for i, c in enumerate((1, 1, 2)))
    t, chain = jnp.array([0, 3, 20, 39]), tabulate(BETAS, parameterization.eps())
    losses_of = functools.partial(chain_loss, chain, x0=x0, eps=eps, t=t, variance=process.learned_range)

    @jax.jit
    def gradients(f):
        def total(f, name, loss):
            return losses_of(f, loss=loss)[name].sum()

        return jax.grad(total)(f, "vb", Loss.RESCALED_MSE), jax.grad(total)(f, "total", Loss.KL)

    vb, kl = gradients(output)
    assert (vb[..., 0] == 0).all() and (vb[..., 1] != 0).all()
    assert (kl[..., 0] != 0).any()
    plain, rescaled, kl, whole = jax.jit(lambda f: [losses_of(f, loss=loss) for loss in Loss])(output)
    assert rescaled["vb"] == pytest.approx(plain["vb"] * 40 / 1000)
    assert rescaled["total"] == pytest.approx(plain["mse"] + plain["vb"] * 40 / 1000)
    assert whole["total"] == pytest.approx(40 * kl["total"])


@pytest.mark.parametrize("loss", Loss)
def test_every_loss_is_finite_on_images_with_a_learned_variance(loss):
    def network(params, x_t, t, cond, *, train=False, key=None):
        return params["scale"].reshape(1, 1, 1, 6) * jnp.concatenate([x_t, x_t], axis=-1)

    def scale(key, batch):
        return {"scale": jnp.full(6, 0.1)}

    method = make(network, init_params=scale, variance=process.learned_range, loss=loss, loss_history=2)
    batch = {"x0": jnp.round(jax.random.uniform(KEY, (8, 4, 4, 3)) * 255) / 127.5 - 1}
    params, aux = method.init(KEY, batch)
    gradient = jax.jit(jax.value_and_grad(method.objectives[0].loss, has_aux=True))
    (value, metrics), grads = gradient(params, aux, batch, KEY, 0)
    chex.assert_tree_all_finite((value, metrics, grads))
    samples = samples_of(method, params, aux, jax.random.normal(KEY, (2, 4, 4, 3)), {}, Sampling(num_steps=4))
    assert samples.shape == (2, 4, 4, 3) and jnp.abs(samples).max() <= 1


def test_weighting_and_importance_are_unbiased_factors():
    network = exact_eps(schedules.discrete(BETAS))
    batch = gaussian_batch(KEY, 60_000)
    method = make(network, init_params=lambda k, b: {}, loss_history=1)
    history = times.LossHistory(jnp.linspace(1.0, 4.0, 40)[:, None], jnp.ones(40, jnp.int32))
    reweighted, metrics = loss_of(method)({"model": {}}, {"history": history}, batch, KEY, 0)
    assert float(reweighted) == pytest.approx(least_loss(), rel=0.03)
    assert metrics["t"].mean() > 22  # later steps had the larger losses; uniform draws would give 19.5
    plain, _ = first_loss(make(network, init_params=lambda k, b: {}), batch)
    doubled, _ = first_loss(
        make(network, init_params=lambda k, b: {}, weighting=lambda level: 2 * weighting.uniform(level)), batch
    )
    assert float(doubled) == pytest.approx(2 * float(plain))


def test_advance_records_unweighted_losses_in_order():
    method = make(loss_history=2)
    batch = gaussian_batch(KEY, 16)
    params, aux = method.init(KEY, batch)
    _, metrics = loss_of(method)(params, aux, batch, KEY, jnp.int32(0))
    after = method.advance(aux, params, jnp.int32(0), metrics)
    expected = times.update_history(aux["history"], metrics["t"], metrics["mse"])
    chex.assert_trees_all_close(after["history"], expected)
    assert after["history"].counts.sum() == 16


@pytest.mark.parametrize("rate, share", [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0)])
def test_label_dropout_replaces_that_share(rate, share):
    def network(params, x_t, t, cond, *, train=False, key=None):
        assert train and key is not None
        return jnp.broadcast_to(cond["label"][:, None].astype(x_t.dtype), x_t.shape) * 1e3

    method = make(network, init_params=lambda k, b: {}, label_dropout=rate, null_label=3, distance=losses.l1)
    batch = {"x0": jnp.zeros((4000, 2)), "label": jnp.ones(4000, jnp.int32)}
    _, metrics = first_loss(method, batch)
    assert np.mean(metrics["mse"] > 2000) == pytest.approx(share, abs=0.03)


def test_generation_starts_at_the_noisiest_level_for_any_number_of_steps():
    seen = []

    def network(params, x_t, t, cond, *, train=False, key=None):
        jax.debug.callback(lambda t: seen.append(float(t[0])), t)
        return jnp.zeros_like(x_t)

    method = make(network, init_params=lambda k, b: {})
    noise = jax.random.normal(KEY, (2, 4, 4, 1))
    for n in (1, 2, 5):
        seen.clear()
        method.generate({"model": {}}, {}, KEY, noise, {}, Sampling(num_steps=n, solver=ddim))
        jax.effects_barrier()
        assert sorted(seen, reverse=True) == list(times.evenly(40, n))
        assert max(seen) == 39


def test_sampling_times_and_solver_replace_the_defaults():
    schedule = schedules.discrete(BETAS)
    method = make(exact_eps(schedule), init_params=lambda k, b: {}, clip=None)
    noise = jax.random.normal(KEY, (3, 2))
    grid = jnp.array([39.0, 20.0, 3.0])
    chosen = samples_of(method, {"model": {}}, {}, noise, {}, Sampling(times=grid, solver=ddim))
    (alpha,), (sigma,) = (np.asarray(a) for a in schedule.level(grid[:1]))
    exact = MEAN + STD / np.sqrt(alpha**2 * STD**2 + sigma**2) * (sigma * np.asarray(noise) - alpha * MEAN)
    assert chosen.shape == (3, 2)
    assert not np.allclose(chosen, samples_of(method, {"model": {}}, {}, noise, {}, Sampling(num_steps=3)))
    full = samples_of(method, {"model": {}}, {}, noise, {}, Sampling(solver=heun))
    assert full == pytest.approx(exact, abs=0.02)


def test_guidance_one_is_the_condition_and_missing_labels_are_null():
    method = make(null_label=3, label_dropout=0.1)
    params = {"model": mlp_params(KEY, None) | {"label": jnp.arange(8.0).reshape(4, 2)}}
    noise, label = jax.random.normal(KEY, (5, 2)), {"label": jnp.full(5, 1, jnp.int32)}
    run = functools.partial(samples_of, method, params, {}, noise)
    plain = np.asarray(run(label, Sampling(num_steps=3)))
    assert run(label, Sampling(num_steps=3, guidance_scale=jnp.float32(1))) == pytest.approx(plain, abs=1e-6)
    null = np.asarray(run({"label": jnp.full(5, 3, jnp.int32)}, Sampling(num_steps=3)))
    assert run({}, Sampling(num_steps=3)) == pytest.approx(null)
    assert run(label, Sampling(num_steps=3, guidance_scale=jnp.float32(0))) == pytest.approx(null, abs=1e-6)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"betas": schedules.zero_terminal_snr(BETAS)}, "use v or x0"),
        ({"loss": "mse"}, "loss must be one of"),
        ({"loss": Loss.KL, "distance": losses.l1}, "no use for a distance"),
        ({"loss_history": 10, "time_sampler": times.uniform_index(40)}, "give one of them"),
        ({"label_dropout": 0.1}, "needs null_label"),
        ({"label_dropout": 1.5, "null_label": 3}, r"probability in \[0, 1\]"),
        ({"loss_history": 0}, "length must be at least 1"),
    ],
)
def test_refused_when_built(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings).init(KEY, gaussian_batch(KEY, 2))


def test_refused_when_traced():
    batch = gaussian_batch(KEY, 4)
    with pytest.raises(ValueError, match=r"output is \(4, 2\), expected \(4, 4\).*build it with 4 output channels"):
        first_loss(make(variance=process.learned), batch)
    with pytest.raises(ValueError, match="build it with 2 output channels"):
        first_loss(make(init_params=functools.partial(mlp_params, out=4)), batch)
    with pytest.raises(ValueError, match="a batch needs 'x0'"):
        first_loss(make(), {"image": batch["x0"]})
    with pytest.raises(ValueError, match="a batch needs 'label'"):
        first_loss(make(label_dropout=0.1, null_label=3), batch)
    schedule = schedules.discrete(BETAS)
    with pytest.raises(ValueError, match="guidance_scale needs"):
        chain_denoiser(mlp, {}, schedule, parameterization.eps(), guidance_scale=2.0)


def test_zero_terminal_snr_trains_and_samples_with_v():
    betas = schedules.zero_terminal_snr(BETAS)
    method = make(betas=betas, parameterization=parameterization.v())
    batch = gaussian_batch(KEY, 64)
    params, aux = method.init(KEY, batch)
    gradient = jax.jit(jax.grad(method.objectives[0].loss, has_aux=True))
    chex.assert_tree_all_finite(gradient(params, aux, batch, KEY, 0))
    chex.assert_tree_all_finite(samples_of(method, params, aux, batch["x0"], {}, Sampling()))
