"""Every file of experiments/, in smoke mode, through the same contract. A new experiment is found by itself."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff.info import batch_shapes
from jaxdiff.methods.base import Sampling
from jaxdiff.settings import load_build, settings_of
from jaxdiff.training import sharding
from jaxdiff.training.state import create_state
from jaxdiff.training.step import make_train_step

FILES = sorted((Path(__file__).parents[1] / "experiments").glob("[!_]*.py"))
# These differ from the others in numbers more than in programs, and a UNet compiles for long: only `make test-full`.
COMPILED_IN_FULL = (
    "celebahq256_ddgan",
    "cifar10_consistency",
    "cifar10_continuous_consistency",
    "cifar10_ddgan",
    "cifar10_ddpm",
    "cifar10_easy_consistency",
    "cifar10_edm",
    "cifar10_edm_ncsnpp",
    "cifar10_iddpm",
    "cifar10_improved_consistency",
    "cifar10_progressive",
    "cifar10_progressive_edm",
    "cifar10_rectified_flow",
    "cifar10_siddm",
    "cifar10_ufogen",
    "digits_adversarial_distillation",
    "digits_consistency_decoder",
    "digits_continuous_consistency",
    "digits_ddgan",
    "digits_dmd2",
    "digits_easy_consistency",
    "digits_edm",
    "digits_guided_distillation",
    "digits_improved_consistency",
    "digits_lcm",
    "digits_progressive",
    "digits_rectified_flow",
    "digits_siddm",
    "digits_ufogen",
    "imagenet64_adm",
    "imagenet64_consistency",
    "imagenet64_continuous_consistency",
    "imagenet64_dmd2",
    "imagenet64_edm",
    "imagenet64_guided_distillation",
    "imagenet64_iddpm",
    "imagenet64_improved_consistency",
    "imagenet64_progressive",
    "imagenet64_siddm",
    "imagenet64_ufogen",
    "lsun_adm",
    "lsun_consistency",
    "lsun_ddgan",
    "lsun_ddpm",
    "lsun_edm",
    "lsun_progressive",
    "sd_instaflow",
    "sd_lcm",
    "sd_ufogen",
)
ON_FOUR_DEVICES = ("toy_ddpm", "toy_edm", pytest.param("digits_ddpm", marks=pytest.mark.slow))


def files(slow=()):
    marks = {True: [pytest.mark.slow], False: []}
    return [pytest.param(f, id=f.stem, marks=marks[f.stem in slow]) for f in FILES]


def experiment_of(file):
    return load_build(file)(smoke=True)


def forms(tree):
    return jax.tree.map(
        lambda a: (jnp.shape(a), str(jnp.result_type(a)) if not hasattr(a, "dtype") else str(a.dtype)), tree
    )


def start(experiment, mesh):
    batch = next(experiment.data())
    state = create_state(experiment.method, experiment.optimizers, experiment.ema, jax.random.key(0), batch, mesh=mesh)
    step = make_train_step(experiment.method, experiment.optimizers, experiment.ema, accumulate=experiment.accumulate)
    return state, step


@pytest.mark.parametrize("file", files(COMPILED_IN_FULL))
def test_experiment_keeps_the_contract(file):
    experiment = experiment_of(file)
    assert experiment.name == file.stem
    assert settings_of(load_build(file))["smoke"] is False
    mesh = sharding.single_device()
    source = experiment.data()
    first = next(source)
    for name, expected in batch_shapes(experiment).items():
        assert (first[name].shape, first[name].dtype) == (expected.shape, expected.dtype), name
    state, step = start(experiment, mesh)
    before = forms(state)
    traces = []

    def counted(state, batch):
        traces.append(1)
        return step(state, batch)

    run = sharding.jit_train_step(counted, mesh, sharding.state_shardings(state, mesh))
    for _ in range(3):
        state, metrics = run(state, sharding.put_batch(next(source), mesh))
        assert all(np.isfinite(np.asarray(value, np.float64)) for value in metrics.values()), metrics
    assert len(traces) == 1
    assert forms(state) == before
    assert int(state.step) == 3
    noise = jax.random.normal(jax.random.key(1), (2, *experiment.sample_shape))
    cond = {} if experiment.num_classes is None else {"label": jnp.zeros([2], jnp.int32)}
    generate = jax.jit(lambda *args: experiment.method.generate(*args, Sampling(num_steps=2)))
    samples = generate(state.params, state.aux, jax.random.key(2), noise, cond)
    assert samples.shape == noise.shape and samples.dtype == noise.dtype
    assert np.isfinite(samples).all()


@pytest.mark.parametrize("file", files())
def test_each_objective_moves_only_its_player(file):
    experiment = experiment_of(file)
    batch = batch_shapes(experiment)
    for objective in experiment.method.objectives:
        alone = experiment.method._replace(objectives=(objective,))
        params, aux = jax.eval_shape(alone.init, jax.random.key(0), batch)
        assert objective.player in params
        key = jax.eval_shape(lambda: jax.random.key(0))
        loss, metrics = jax.eval_shape(objective.loss, params, aux, batch, key, jax.ShapeDtypeStruct((), jnp.int32))
        assert loss.shape == () and loss.dtype == jnp.float32
        sizes = {value.shape for value in metrics.values()}
        assert sizes <= {(), (experiment.batch_size,)}, "a metric is a scalar or has one entry an example"


@pytest.mark.parametrize("name", ON_FOUR_DEVICES)
def test_four_devices_agree_with_one(name):
    experiment = experiment_of(next(f for f in FILES if f.stem == name))
    experiment = dataclasses.replace(experiment, optimizers={p: optax.sgd(1e-2) for p in experiment.optimizers})
    losses, params = [], []
    for mesh in (sharding.single_device(), sharding.make_mesh(data=4)):
        source = experiment.data()
        state, step = start(experiment, mesh)
        run = sharding.jit_train_step(step, mesh, sharding.state_shardings(state, mesh))
        for _ in range(2):
            state, metrics = run(state, sharding.put_batch(next(source), mesh))
        losses.append({k: float(v) for k, v in metrics.items()})
        params.append(jax.device_get(state.params))
    for name in losses[0]:
        np.testing.assert_allclose(losses[1][name], losses[0][name], rtol=1e-4, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *params)
