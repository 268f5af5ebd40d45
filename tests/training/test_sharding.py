"""The mesh and the size rule, on the four emulated devices of the test session."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_toys as toys
from jax.sharding import AxisType, PartitionSpec

from jaxdiff.training import ema, sharding
from jaxdiff.training.state import create_state

FOUR = jax.devices()[:4]


def test_the_mesh_takes_the_rest_and_is_auto_everywhere():
    mesh = sharding.make_mesh(fsdp=2, devices=FOUR)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert dict(sharding.single_device().shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (8, 1, 1), (1, 1, 1)])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(ValueError, match=r"does not fit 4 device\(s\): their product must be 4"):
        sharding.make_mesh(*sizes, devices=FOUR)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (-1, -1, 1), (2, -2, 1)])
def test_impossible_mesh_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="mesh sizes must be at least 1, and at most one of them -1"):
        sharding.make_mesh(*sizes, devices=FOUR)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 3, 64, 64), PartitionSpec(None, None, None, "fsdp")),
        ((512, 64), PartitionSpec("fsdp", None)),
        ((1023, 66), PartitionSpec(None, "fsdp")),
        ((1023, 33), PartitionSpec()),
        ((64,), PartitionSpec()),
        ((), PartitionSpec()),
    ],
)
def test_the_size_rule(shape, expected):
    assert sharding.leaf_spec(shape, 2) == expected
    assert sharding.leaf_spec(shape, 1) == PartitionSpec()


def test_moments_and_averages_lie_with_their_parameters_and_bytes_fall():
    method = toys.regression()

    def init(key, batch):
        del batch
        return {"model": {"weights": jax.random.normal(key, (128, 256)), "bias": jnp.zeros(256)}}, ()

    mesh = sharding.make_mesh(1, 4, devices=FOUR)
    emas = (ema.constant("slow", 0.9),)
    example = next(toys.Points())
    state = create_state(
        method._replace(init=init), {"model": optax.adam(0.1)}, emas, jax.random.key(0), example, mesh=mesh
    )
    tables = [state.params["model"], state.opt_state["model"][0].mu, state.opt_state["model"][0].nu]
    for tree in [*tables, state.ema["slow"]["model"]]:
        assert tree["weights"].sharding.spec == PartitionSpec(None, "fsdp")
        assert tree["weights"].addressable_shards[0].data.shape == (128, 64)
        assert tree["bias"].sharding.spec == PartitionSpec()
    moved = sharding.shard_state(state, sharding.make_mesh(4, devices=FOUR))
    np.testing.assert_array_equal(moved.params["model"]["weights"], state.params["model"]["weights"])
    assert moved.params["model"]["weights"].addressable_shards[0].data.shape == (128, 256)


def test_a_batch_is_split_over_data_and_fsdp():
    mesh = sharding.make_mesh(2, 2, devices=FOUR)
    batch = next(toys.Points())
    placed = sharding.put_batch(batch, mesh)
    np.testing.assert_array_equal(placed["x0"], batch["x0"])
    assert {shard.data.shape for shard in placed["x0"].addressable_shards} == {(2, 3)}
    assert len({str(shard.index) for shard in placed["target"].addressable_shards}) == 4


def test_batches_that_cannot_be_split_are_refused():
    mesh = sharding.make_mesh(4, devices=FOUR)
    with pytest.raises(ValueError, match="a batch of 6 does not divide among 4 devices"):
        sharding.put_batch({"x0": np.zeros((6, 2))}, mesh)
    with pytest.raises(ValueError, match="one leading axis for all, got leading sizes"):
        sharding.put_batch({"x0": np.zeros((8, 2)), "label": np.zeros(4)}, mesh)
    with pytest.raises(ValueError, match="one leading axis for all"):
        sharding.put_batch({"x0": np.zeros(())}, mesh)
