"""Distillation through the loop: a run that is cut off goes on to the same bits, a mesh trains as one device does.

What a diffusion model does not have: a target network that follows the student, N and mu that depend on the step, and a
teacher that the student replaces between rounds. All of it must come back from a checkpoint, and lie on the devices as
the parameters do.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_toys as toys

from jaxdiff.training import ema, loop, sharding
from jaxdiff.training.state import create_state
from jaxdiff.training.step import make_train_step

METHODS = {"consistency": toys.distillation, "progressive": functools.partial(toys.distillation, rounds=True)}
STEPS = 12
# What changes while they train, step by step: N of the curriculum, and of the rounds.
CHANGING = {"consistency": ("num_levels", [2, 4, 5, 5, 6, 7, 7, 7, 8, 8, 9, 9]),
            "progressive": ("num_steps", [4, 4, 4, 2, 2, 2, 2, 2, 2, 1, 1, 1])}  # fmt: skip
TREE = {"consistency": "target", "progressive": "teacher"}


class Cut(toys.Points):
    """Gives five batches and fails, as a machine that goes away."""

    def __next__(self):
        if self.step == 5:
            raise RuntimeError("cut off")
        return super().__next__()


def train(name, workdir, data=toys.Points):
    run = toys.experiment(STEPS, method=METHODS[name](), data=data, checkpoint_every=2, log_every=1)
    return loop.train(run, workdir, mesh=sharding.single_device()).state


def differ(tree, other):
    return any(
        (np.asarray(a) != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, (tree, other)), strict=True)
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_run_cut_off_in_the_middle_ends_with_the_same_bits(tmp_path, name):
    with pytest.raises(RuntimeError, match="cut off"):
        train(name, tmp_path / "cut", Cut)
    resumed, whole = train(name, tmp_path / "cut"), train(name, tmp_path / "whole")
    ours, theirs = toys.leaves(resumed), toys.leaves(whole)
    assert list(ours) == list(theirs)
    for path in theirs:
        assert ours[path].tobytes() == theirs[path].tobytes(), path
    metric, expected = CHANGING[name]
    for folder in ("cut", "whole"):
        entries = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        seen = {entry["step"]: entry[metric] for entry in entries}
        assert [seen[step] for step in range(1, STEPS + 1)] == expected
    # Neither what the run began with nor the student: lost in a checkpoint, it would be missed.
    kept = whole.aux[TREE[name]]
    assert differ(kept, METHODS[name]().init(jax.random.key(0), {})[1][TREE[name]])
    assert differ(kept, whole.params["model"])


def on_mesh(name, sizes):
    """Losses and state after 12 steps on a mesh that splits leaves from 16 elements on."""
    method, optimizers = METHODS[name](), {"model": optax.sgd(0.02, momentum=0.9)}
    averages = (ema.constant("slow", 0.9),)
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    source = toys.Points()
    state = create_state(method, optimizers, averages, jax.random.key(0), next(source), mesh=mesh, min_size=16)
    places = sharding.state_shardings(state, mesh, min_size=16)
    train_step = make_train_step(sharding.on_mesh(method, mesh, min_size=16), optimizers, averages)
    traces, logs = [], []

    def counted(state, batch):
        traces.append(1)
        return train_step(state, batch)

    step = sharding.jit_train_step(counted, mesh, places)
    for _ in range(STEPS):
        state, metrics = step(state, sharding.put_batch(next(source), mesh))
        logs.append({key: float(value) for key, value in metrics.items()})
    assert len(traces) == 1
    return state, logs


@pytest.mark.parametrize("name", METHODS)
def test_a_mesh_trains_as_one_device_does(name):
    state, logs = on_mesh(name, (2, 2, 1))
    alone, expected = on_mesh(name, (1, 1, 1))
    for ours, theirs in zip(logs, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    ours, theirs = toys.leaves(state), toys.leaves(alone)
    for path in theirs:
        scale = np.abs(theirs[path].astype(np.float64)).max()
        np.testing.assert_allclose(ours[path], theirs[path], rtol=0, atol=1e-5 * scale, err_msg=path)
    for tree in state.aux.values():
        assert jax.tree.map(lambda leaf: leaf.sharding.spec, tree) == jax.tree.map(
            lambda leaf: leaf.sharding.spec, state.params["model"]
        )
    kernel = state.aux[TREE[name]]["block_0_in"]["kernel"]
    assert kernel.shape == (16, 16) and {shard.data.size for shard in kernel.addressable_shards} == {128}
    assert jnp.isfinite(kernel).all()
