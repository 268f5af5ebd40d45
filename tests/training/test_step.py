"""The train step on two toy methods: what it computes, what it leaves alone, how often it compiles."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_toys as toys

from jaxdiff import health
from jaxdiff.methods.base import Method, Objective
from jaxdiff.training import ema, sharding, step
from jaxdiff.training.state import create_state, set_hyperparameter
from jaxdiff.types import Level

KEY = jax.random.key(0)


def sgd(method, lr=0.1):
    return {objective.player: optax.sgd(lr) for objective in method.objectives}


def start(method, optimizers=None, emas=(), batch_size=8, mesh=None):
    batch = next(toys.Points(batch_size))
    return create_state(method, optimizers or sgd(method), emas, KEY, batch, mesh=mesh)


def run(method, num_steps, *, optimizers=None, emas=(), accumulate=1, mesh=None, batch_size=8):
    optimizers = optimizers or sgd(method)
    mesh = mesh or sharding.single_device()
    state = start(method, optimizers, emas, batch_size, mesh)
    train_step = step.make_train_step(method, optimizers, emas, accumulate=accumulate)
    train_step = sharding.jit_train_step(train_step, mesh, sharding.state_shardings(state, mesh))
    source, history = toys.Points(batch_size), []
    for _ in range(num_steps):
        state, metrics = train_step(state, sharding.put_batch(next(source), mesh))
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


def test_one_step_is_the_update_written_by_hand():
    method = toys.regression(noise=0.0)
    before, batch = start(method), next(toys.Points())
    w, x, y = (np.asarray(a, np.float64) for a in (before.params["model"]["weights"], batch["x0"], batch["target"]))
    after, history = run(method, 1)
    error = x @ w - y
    expected = w - 0.1 * 2 * (error[:, None] * x).mean(0)
    np.testing.assert_allclose(after.params["model"]["weights"], expected, rtol=1e-5)
    assert history[0]["model/loss"] == pytest.approx((error**2).mean(), rel=1e-5)
    assert history[0]["error"] == pytest.approx((error**2).mean(), rel=1e-5)
    slope = 2 * np.append((error[:, None] * x).mean(0), (error * (x @ w)).mean())
    assert history[0]["model/grad_norm"] == pytest.approx(np.linalg.norm(slope), rel=1e-5)
    assert int(after.step) == 1 and history[0]["finite"] == 1
    np.testing.assert_allclose(after.aux["error"], 0.1 * (error**2).mean(), rtol=1e-5)


def test_regression_learns_and_its_average_follows():
    state, history = run(toys.regression(noise=0.0), 150, emas=(ema.constant("slow", 0.8),))
    assert history[-1]["model/loss"] < 1e-6 < history[0]["model/loss"]
    product = state.params["model"]["weights"] * state.params["model"]["scale"]
    np.testing.assert_allclose(product, [1.0, -2.0, 0.5], atol=1e-3)
    averaged = state.ema["slow"]["model"]
    np.testing.assert_allclose(averaged["weights"] * averaged["scale"], [1.0, -2.0, 0.5], atol=1e-3)


@pytest.mark.parametrize("make", [toys.regression, toys.gan])
def test_one_trace_over_many_steps_and_a_changed_learning_rate(make):
    traced = []
    method = make(on_trace=lambda: traced.append(1))
    optimizers = {o.player: optax.inject_hyperparams(optax.adam)(learning_rate=0.1) for o in method.objectives}
    mesh = sharding.single_device()
    state = start(method, optimizers, (ema.warmup("slow", 0.9),))
    train_step = step.make_train_step(method, optimizers, (ema.warmup("slow", 0.9),))
    train_step = sharding.jit_train_step(train_step, mesh, sharding.state_shardings(state, mesh))
    source = toys.Points()
    for lr in (0.1, 0.1, 0.01, 0.0):
        for player in optimizers:
            state = set_hyperparameter(state, player, "learning_rate", lr)
        before = toys.leaves(state.params)
        for _ in range(3):
            state, _ = train_step(state, sharding.put_batch(next(source), mesh))
        moved = any((value != before[path]).any() for path, value in toys.leaves(state.params).items())
        assert moved == (lr > 0)
    assert len(traced) == len(method.objectives)
    assert train_step._cache_size() == 1


def test_a_loss_moves_no_player_but_its_own():
    method = toys.gan()
    one_sided = method._replace(objectives=method.objectives[:1])
    before, (after, _) = start(one_sided), run(one_sided, 3)
    np.testing.assert_array_equal(after.params["model"]["shift"], before.params["model"]["shift"])
    np.testing.assert_array_equal(after.params["model"]["scale"], before.params["model"]["scale"])
    assert (np.asarray(after.params["disc"]["weights"]) != np.asarray(before.params["disc"]["weights"])).all()


def test_a_later_objective_sees_what_an_earlier_one_updated():
    def init(key, batch):
        del key, batch
        return {"first": jnp.ones(()), "second": jnp.zeros(())}, ()

    def first(params, aux, batch, key, step):
        return 2.0 * params["first"], {}

    def second(params, aux, batch, key, step):
        return params["first"] * params["second"], {"seen": params["first"]}

    method = Method(init, (Objective("first", first), Objective("second", second)), toys.generate)
    state, history = run(method, 1, optimizers={"first": optax.sgd(0.25), "second": optax.sgd(1.0)})
    assert history[0]["seen"] == 0.5
    assert float(state.params["second"]) == -0.5


def test_every_objective_and_step_draws_its_own_numbers():
    def init(key, batch):
        del key, batch
        return {"a": jnp.zeros(()), "b": jnp.zeros(())}, ()

    def objective(player):
        def loss(params, aux, batch, key, step):
            return params[player] * 0.0, {f"draw_{player}": jax.random.uniform(key)}

        return Objective(player, loss)

    method = Method(init, (objective("a"), objective("b")), toys.generate)
    _, history = run(method, 3)
    draws = [entry[name] for entry in history for name in ("draw_a", "draw_b")]
    assert len(set(draws)) == 6
    _, again = run(method, 3)
    assert again == history


def test_accumulation_equals_the_big_batch():
    whole, history = run(toys.regression(noise=0.0), 4)
    parts, in_parts = run(toys.regression(noise=0.0), 4, accumulate=4)
    for path, value in toys.leaves(whole).items():
        np.testing.assert_allclose(toys.leaves(parts)[path], value, rtol=2e-6, atol=1e-7, err_msg=path)
    for one, other in zip(history, in_parts, strict=True):
        assert other == pytest.approx(one, rel=1e-5)


def test_accumulated_examples_reach_advance_in_the_order_of_the_batch():
    def init(key, batch):
        del key
        return {"model": jnp.zeros(())}, {"rows": jnp.zeros_like(batch["target"]), "mean": jnp.zeros(())}

    def loss(params, aux, batch, key, step):
        return params["model"] * 1.0, {"rows": batch["target"], "mean": batch["target"].mean()}

    def advance(aux, params, step, metrics):
        return metrics

    method = Method(init, (Objective("model", loss),), toys.generate, advance)
    state, _ = run(method, 1, accumulate=2)
    target = next(toys.Points())["target"]
    np.testing.assert_array_equal(state.aux["rows"], target)
    np.testing.assert_allclose(state.aux["mean"], target.mean(), rtol=1e-4)


def monitored():
    """A method with the metrics of `health`; "share" of a batch is each example's share of noise."""

    def init(key, batch):
        del key, batch
        return {"model": jnp.full((), 0.5)}, {}

    def loss(params, aux, batch, key, step):
        del aux, key, step
        level, prediction = Level(1 - batch["share"], batch["share"]), params["model"] * batch["x0"]
        seen = health.by_level({"size": prediction.mean(axis=1)}, level)
        return (prediction**2).mean(), seen | {"diversity": health.diversity(prediction, batch["x0"], level)}

    return Method(init, (Objective("model", loss),), toys.generate)


@pytest.mark.parametrize("slow", [True, False])
def test_a_micro_batch_without_noisy_examples_leaves_the_metric_to_the_other(monkeypatch, slow):
    monkeypatch.setattr(step, "_nested_is_slow", lambda: slow)
    method, batch = monitored(), next(toys.Points())
    x0 = batch["x0"]
    batch = {"x0": x0, "share": np.float32([1, 0, 1, 0, 1, 0, 1, 0])}  # rows 0, 2, ... are one micro-batch
    train_step = jax.jit(step.make_train_step(method, sgd(method), accumulate=2))
    state = create_state(method, sgd(method), (), KEY, batch)
    after, metrics = train_step(state, batch)
    assert metrics["finite"] and float(metrics["diversity"]) == pytest.approx(0.5, rel=1e-5)
    assert float(metrics["size_0.8"]) == pytest.approx(0.5 * x0[::2].mean(), rel=1e-5)
    assert float(metrics["size_0.0"]) == pytest.approx(0.5 * x0[1::2].mean(), rel=1e-5)
    assert np.isnan(metrics["size_0.4"]) and after.params["model"] != 0.5

    x0[1, 0] = np.nan  # in the other micro-batch
    after, metrics = train_step(state, batch)
    assert not metrics["finite"] and np.isnan(metrics["model/loss"]) and after.params["model"] == 0.5
    assert np.isnan(metrics["size"]) and float(metrics["diversity"]) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("slow", [True, False])
def test_every_skips_steps_and_both_ways_to_skip_agree(monkeypatch, slow):
    traced = []
    monkeypatch.setattr(step, "_nested_is_slow", lambda: slow)
    method = toys.gan(every=3, on_trace=lambda: traced.append(1))
    optimizers = {"disc": optax.adam(0.1), "model": optax.sgd(0.1)}
    state, history = run(method, 6, optimizers=optimizers, accumulate=2)
    fired = [np.isfinite(entry["disc/loss"]) for entry in history]
    assert fired == [True, False, False, True, False, False]
    assert [np.isfinite(entry["logits_real"]) for entry in history] == fired
    assert all(entry["finite"] and np.isfinite(entry["model/loss"]) for entry in history)
    assert int(state.opt_state["disc"][0].count) == 2
    assert len(traced) == 2
    monkeypatch.setattr(step, "_nested_is_slow", lambda: not slow)
    other, _ = run(method, 6, optimizers=optimizers, accumulate=2)
    for path, value in toys.leaves(state).items():
        np.testing.assert_allclose(toys.leaves(other)[path], value, rtol=1e-6, atol=1e-7, err_msg=path)


def test_no_buffer_occurs_twice_and_the_old_state_is_gone_after_a_step():
    method, emas = toys.gan(), (ema.constant("a", 0.9), ema.constant("b", 0.9))
    optimizers = {"disc": optax.adam(0.1), "model": optax.adam(0.1)}
    mesh = sharding.single_device()
    state = start(method, optimizers, emas)
    buffers = jax.tree.leaves(state.replace(key=jax.random.key_data(state.key)))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in buffers]
    assert len(set(pointers)) == len(pointers)
    train_step = step.make_train_step(method, optimizers, emas)
    train_step = sharding.jit_train_step(train_step, mesh, sharding.state_shardings(state, mesh))
    new, _ = train_step(state, sharding.put_batch(next(toys.Points()), mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    again, _ = train_step(new, sharding.put_batch(next(toys.Points()), mesh))
    assert int(again.step) == 2


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_step_number(where):
    def init(key, batch):
        del key, batch
        return {"model": jnp.float32([1.0, 2.0]), "other": jnp.ones(())}, {"count": jnp.int32(0)}

    def good(params, aux, batch, key, step):
        return params["other"] * 1.0, {}

    def bad(params, aux, batch, key, step):
        at_three = jnp.where(step == 2, 0.0, 1.0)
        if where == "loss":
            return params["model"].sum() / at_three, {}
        # the root is 0 there, its slope is not finite
        return jnp.sqrt(at_three * params["model"]).sum(), {}

    def advance(aux, params, step, metrics):
        return {"count": aux["count"] + 1}

    optimizers = {"other": optax.sgd(0.1), "model": optax.sgd(0.01, momentum=0.9)}
    method = Method(init, (Objective("other", good), Objective("model", bad)), toys.generate, advance)
    emas = (ema.constant("slow", 0.5),)
    two, _ = run(method, 2, optimizers=optimizers, emas=emas)
    three, history = run(method, 3, optimizers=optimizers, emas=emas)
    assert [entry["finite"] for entry in history] == [1, 1, 0]
    assert int(three.step) == 3
    for path, value in toys.leaves(two.replace(step=three.step)).items():
        np.testing.assert_array_equal(toys.leaves(three)[path], value, err_msg=path)


@pytest.mark.parametrize("sizes", [(4, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("make", [toys.regression, toys.gan])
def test_four_devices_agree_with_one(make, sizes):
    emas = (ema.constant("slow", 0.9),)
    one, history = run(make(), 5, emas=emas)
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[:4])
    four, on_four = run(make(), 5, emas=emas, mesh=mesh)
    for path, value in toys.leaves(one).items():
        np.testing.assert_allclose(toys.leaves(four)[path], value, rtol=1e-5, atol=1e-5, err_msg=path)
    for entry, other in zip(history, on_four, strict=True):
        assert other == pytest.approx(entry, rel=1e-5, nan_ok=True)


def test_refusals_when_built():
    method = toys.gan()
    with pytest.raises(ValueError, match="player 'disc' has no optimizer: optimizers were given for"):
        step.make_train_step(method, {"model": optax.sgd(0.1)})
    with pytest.raises(ValueError, match="optimizer for 'critic', which no objective trains"):
        step.make_train_step(method, {**sgd(method), "critic": optax.sgd(0.1)})
    with pytest.raises(ValueError, match="accumulate must be at least 1 micro-batch, got 0"):
        step.make_train_step(method, sgd(method), accumulate=0)
    with pytest.raises(ValueError, match="'disc': every must be at least 1, got 0"):
        step.make_train_step(toys.gan(every=0), sgd(method))
    stranger = method._replace(init=lambda key, batch: ({"model": jnp.zeros(())}, ()))
    with pytest.raises(ValueError, match="'disc' has an objective but no parameters: init returned"):
        start(stranger)


def test_a_hyperparameter_that_is_not_kept_is_refused():
    with pytest.raises(ValueError, match="optimizer of 'model' keeps no 'learning_rate': build it with"):
        set_hyperparameter(start(toys.regression()), "model", "learning_rate", 0.1)
    with pytest.raises(ValueError, match="optimizer of 'critic' keeps no"):
        set_hyperparameter(start(toys.regression()), "critic", "learning_rate", 0.1)


def test_refusals_when_traced():
    method = toys.regression()
    with pytest.raises(ValueError, match="batch of 8 does not divide into accumulate=3"):
        run(method, 1, accumulate=3)
    with pytest.raises(ValueError, match=r"aux\['error'\] is float32\[2\], was float32\[\]"):
        run(method._replace(advance=lambda aux, params, step, metrics: {"error": jnp.zeros(2)}), 1)
    with pytest.raises(ValueError, match=r"aux\['error'\] is missing, was float32\[\]"):
        run(method._replace(advance=lambda aux, params, step, metrics: {}), 1)
    twice = method._replace(objectives=method.objectives * 2)
    with pytest.raises(ValueError, match="metric 'error' of model_2 has a name that is taken"):
        run(twice, 1)
