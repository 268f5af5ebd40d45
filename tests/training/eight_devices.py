"""Tests on eight emulated devices; `test_meshes.py` runs them in a process of its own.

Every mesh trains the same networks from the same seed for 20 steps. SGD with momentum, because Adam turns the sign of
a gradient that rounds to zero into a full step. Losses agree to 1e-5 and parameters to 1e-4 of the largest in their
leaf. What devices send each other is read from the compiled program. On the command line:
`XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m pytest tests/training/eight_devices.py -m ""`
"""

import functools
import re
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_toys as toys

from jaxdiff import generate, schedules
from jaxdiff.methods.base import Method, Objective
from jaxdiff.methods.ddpm import ddpm
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.partition import UNET
from jaxdiff.networks.unet import UNet, example_inputs
from jaxdiff.training import ema, loop, sharding
from jaxdiff.training.state import abstract_state, create_state, set_hyperparameter
from jaxdiff.training.step import make_train_step

ONE, DATA, FSDP, TENSOR, ALL = (1, 1, 1), (8, 1, 1), (2, 4, 1), (4, 1, 2), (2, 2, 2)
MESHES = (DATA, FSDP, ALL)
STEPS, BATCH, SIZE = 20, 16, 8
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# The first two have five residual blocks on one level; "deep" has eight on two, "adm" ten, two of which resample.
UNETS = {
    "attention": {"channel_mult": (1,), "num_heads": 2},
    "conv": {"channel_mult": (1,), "mid_attention": False},
    "deep": {"channel_mult": (1, 2), "attention_factors": (2,), "num_heads": 2},
    "adm": {"channel_mult": (1, 2), "mid_attention": False, "scale_shift_norm": True, "resample": "resblock"},
    "transformer": {"channel_mult": (1,), "num_heads": 2, "transformer_depth": 1},
}


class Images:
    def __init__(self):
        self.step = 0

    def __next__(self):
        self.step += 1
        draw = np.random.default_rng(self.step)
        return {"x0": draw.uniform(-1, 1, (BATCH, SIZE, SIZE, 3)).astype(np.float32)}


class Run(NamedTuple):
    """20 steps on a mesh."""

    state: Any
    logs: list[dict[str, float]]
    compiled: Any
    places: Any


def unet_method(name):
    unet = UNet(base_channels=16, num_res_blocks=1, norm_groups=4, dropout=0.1, **UNETS[name])
    init = lambda key, batch: init_params(unet, key, *example_inputs(unet))  # noqa: E731
    return ddpm(as_network(unet), schedules.linear_betas(100), init_params=init)


def points():
    draw = np.random.default_rng(0)
    while True:
        yield {"x0": draw.normal(1.0, 1.0, (BATCH, 64)).astype(np.float32)}


POINTS = {"ddgan": toys.diffusion_gan, "consistency": toys.distillation}
POINTS |= {"progressive": functools.partial(toys.distillation, rounds=True)}
METHODS = {name: functools.partial(unet_method, name) for name in UNETS} | {"gan": functools.partial(toys.gan, 2)}
METHODS |= POINTS


def source_of(name):
    if name in POINTS:
        return toys.Points(BATCH)
    return points() if name == "gan" else Images()


def mesh_of(sizes):
    return sharding.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])


def rules_of(name):
    """Leaves that small are not split by default; those of the toys have 16 to 256 elements."""
    return {"partition": UNET, "min_size": 256 if name in UNETS else 16}


@functools.cache
def parts(name):
    """Method, optimisers, averages and a state on one device."""
    method, emas = METHODS[name](), (ema.constant("slow", 0.9),)
    players = sorted({objective.player for objective in method.objectives})
    optimizers = {player: optax.inject_hyperparams(optax.sgd)(0.02, momentum=0.9) for player in players}
    state = create_state(method, optimizers, emas, jax.random.key(0), next(source_of(name)))
    return method, optimizers, emas, state


@functools.cache
def compiled_step(name, sizes, accumulate):
    method, optimizers, emas, state = parts(name)
    mesh = mesh_of(sizes)
    places = sharding.state_shardings(state, mesh, **rules_of(name))
    step = make_train_step(sharding.on_mesh(method, mesh, **rules_of(name)), optimizers, emas, accumulate=accumulate)
    step = sharding.jit_train_step(step, mesh, places)
    batch = sharding.put_batch(next(source_of(name)), mesh)
    return step.lower(jax.device_put(state, places), batch).compile(), places


@functools.cache
def run(name, sizes, accumulate=1, again=0):
    """Trains; `again` is 1 for a second run of the same.

    The step is compiled before the first batch, so it refuses whatever would compile it a second time.
    """
    del again
    mesh = mesh_of(sizes)
    step, places = compiled_step(name, sizes, accumulate)
    state, logs, source = jax.device_put(jax.tree.map(jnp.copy, parts(name)[-1]), places), [], source_of(name)
    for i in range(STEPS):
        if i == STEPS // 2:
            for player in sorted(state.opt_state):
                state = set_hyperparameter(state, player, "learning_rate", 0.01)
        old = state
        state, metrics = step(state, sharding.put_batch(next(source), mesh))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.params)), "a state was not donated"
        logs.append({k: float(v) for k, v in metrics.items()})
    return Run(state, logs, step, places)


def collectives(text):
    """{kind: [(shape, bytes)]} of a compiled program's text, an entry for every array that is sent."""
    found = {kind: [] for kind in KINDS}
    for types, kind in re.findall(rf"^\s*(?:ROOT )?%?[\w.-]+ = (.+?) ({'|'.join(KINDS)})(?:-start)?\(", text, re.M):
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", types):
            shape = tuple(map(int, filter(None, dims.split(","))))
            found[kind].append((shape, int(np.prod(shape)) * BYTES[dtype]))
    return found


def sent(name, sizes, accumulate=1):
    return collectives(run(name, sizes, accumulate).compiled.as_text())


def sizes_of(shapes):
    """The shapes as a multiset; a compiler may transpose a weight before it gathers it."""
    return Counter(tuple(sorted(shape)) for shape in shapes)


def total(arrays):
    return sum(size for _, size in arrays)


def param_leaves(name, sizes):
    """[(path, shape, place)] of the parameters."""
    found = run(name, sizes)
    leaves = jax.tree_util.tree_leaves_with_path({"params": found.state.params})
    places = jax.tree.leaves(found.places.params)
    keystr = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return [(keystr(path), leaf.shape, place) for (path, leaf), place in zip(leaves, places, strict=True)]


def assert_same_training(got, expected):
    for i, (ours, theirs) in enumerate(zip(got.logs, expected.logs, strict=True)):
        for metric in theirs:
            # a mean of logits of order 1 may be near 0: its digits are those of its terms
            np.testing.assert_allclose(
                ours[metric], theirs[metric], rtol=1e-5, atol=1e-6, err_msg=f"{metric} of step {i}"
            )
    ours, theirs = toys.leaves(got.state), toys.leaves(expected.state)
    for path in theirs:
        scale = np.abs(theirs[path].astype(np.float64)).max()
        np.testing.assert_allclose(ours[path], theirs[path], rtol=0, atol=1e-4 * scale, err_msg=path)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def test_there_are_eight_devices():
    assert jax.device_count() == 8


# A UNet compiles for long on eight devices, so all but the two-player toys run in `make test-full`. Distillation is
# on four devices in the default suite: `test_distillation.py`.
CASES = [("gan", 1), ("gan", 2), ("ddgan", 1)]
SLOW_CASES = [
    ("consistency", 1),
    ("progressive", 2),
    ("attention", 1),
    ("conv", 1),
    ("deep", 1),
    ("adm", 1),
    ("transformer", 1),
    ("conv", 2),
]


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize(("name", "accumulate"), [*CASES, *(slow(*case) for case in SLOW_CASES)])
def test_a_mesh_trains_as_one_device_does(name, accumulate, sizes):
    got = run(name, sizes, accumulate)
    assert_same_training(got, run(name, ONE, accumulate))
    assert got.logs[-1]["model/loss"] != got.logs[0]["model/loss"]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [*(("gan", s) for s in MESHES), slow("attention", ALL), slow("attention", DATA), slow("deep", FSDP)],
)
def test_the_same_mesh_gives_the_same_bits(name, sizes):
    first, second = (toys.leaves(run(name, sizes, 1, again).state) for again in (0, 1))
    for path in first:
        assert first[path].tobytes() == second[path].tobytes(), path


@pytest.mark.parametrize("sizes", MESHES)
def test_a_state_is_made_where_it_belongs(sizes):
    *made_of, expected = parts("gan")
    mesh, example = mesh_of(sizes), next(points())
    state = create_state(*made_of, jax.random.key(0), example, mesh=mesh, **rules_of("gan"))
    places = sharding.state_shardings(state, mesh, **rules_of("gan"))
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == places
    like = abstract_state(*made_of, example, mesh=mesh, **rules_of("gan"))
    assert jax.tree.map(lambda leaf: leaf.sharding, like) == places
    assert ("fsdp" in places.ema["slow"]["model"]["shift"].spec) == (sizes[1] > 1)
    assert places.key.spec == places.step.spec == jax.P()
    ours, theirs = toys.leaves(state), toys.leaves(expected)
    for path in theirs:
        assert ours[path].tobytes() == theirs[path].tobytes(), path


@pytest.mark.parametrize(
    ("name", "sizes"), [slow("attention", s) for s in MESHES] + [slow("deep", s) for s in (*MESHES, TENSOR)]
)
def test_bytes_on_a_device_are_those_of_device_shape(name, sizes):
    state, mesh = run(name, sizes).state, dict(zip(sharding.AXES, sizes, strict=True))
    held = expected = whole = 0
    for part in ("params", "opt_state", "ema"):
        for path, leaf in jax.tree_util.tree_leaves_with_path({part: getattr(state, part)}):
            path = jax.tree_util.keystr(path, simple=True, separator="/")
            shape = sharding.device_shape(path, leaf.shape, mesh, UNET, min_size=256)
            shards = [shard.data for shard in leaf.addressable_shards]
            assert {shard.shape for shard in shards} == {shape}, path
            held += sum(shard.nbytes for shard in shards) // 8
            expected += int(np.prod(shape)) * leaf.dtype.itemsize
            whole += leaf.nbytes
    assert held == expected
    split = sizes[1] * sizes[2]
    # At these widths up to a quarter stays whole: small leaves, and on the tensor axis what no rule names.
    assert whole / split <= held <= whole * (0.75 / split + 0.25)


@pytest.mark.parametrize("name", [slow("attention"), slow("conv"), slow("deep"), slow("adm"), slow("transformer")])
def test_data_parallel_devices_exchange_gradients_and_nothing_else(name):
    messages = sent(name, DATA)
    leaves = param_leaves(name, DATA)
    assert {kind for kind, arrays in messages.items() if arrays} == {"all-reduce"}
    assert len(messages["all-reduce"]) <= len(leaves) + 4
    weights = sum(4 * int(np.prod(shape)) for _, shape, _ in leaves)
    assert weights < total(messages["all-reduce"]) <= weights + 64


@pytest.mark.parametrize(
    "name", ["gan", slow("attention"), slow("conv"), slow("deep"), slow("adm"), slow("transformer")]
)
def test_fsdp_gathers_each_split_weight_once_and_no_activation(name):
    messages = sent(name, FSDP)
    leaves = param_leaves(name, FSDP)
    split = sizes_of(shape for _, shape, place in leaves if "fsdp" in place.spec)
    assert split
    assert {kind for kind, arrays in messages.items() if arrays} <= {"all-reduce", "all-gather", "reduce-scatter"}
    gathered = sizes_of(shape for shape, _ in messages["all-gather"])
    if name == "gan":  # two objectives, and the target network is gathered as well
        assert set(gathered) == set(split) == {(64,)}
    else:
        assert gathered == split
        weights = sum(4 * int(np.prod(shape)) for _, shape, _ in leaves)
        assert total(messages["all-reduce"]) + 4 * total(messages["reduce-scatter"]) <= weights + 64


@pytest.mark.parametrize(
    ("name", "sizes", "blocks"),
    [slow("attention", ALL, 5), slow("conv", TENSOR, 5), slow("conv", ALL, 5), slow("deep", TENSOR, 8)],
)
def test_tensor_parallel_blocks_sum_once_forward_and_once_backward(name, sizes, blocks):
    messages = sent(name, sizes)
    images = [
        shape for shape, _ in messages["all-reduce"] if len(shape) == 4 and shape[0] == BATCH // np.prod(sizes[:2])
    ]
    assert len(images) == 2 * blocks
    assert not messages["all-to-all"] and not messages["collective-permute"]
    mesh = dict(zip(sharding.AXES, sizes, strict=True))
    used = sizes_of(
        sharding.device_shape(path, shape, {"tensor": mesh["tensor"]}, UNET)
        for path, shape, place in param_leaves(name, sizes)
        if "fsdp" in place.spec
    )
    gathered = sizes_of(shape for shape, _ in messages["all-gather"])
    assert gathered == (used if mesh["fsdp"] > 1 else Counter())


@pytest.mark.slow
def test_the_tensor_axis_halves_the_work():
    def flops(sizes):
        return run("conv", sizes).compiled.cost_analysis()["flops"]

    # Half of the devices along data leaves each with twice the examples, and the tensor axis with half of each.
    assert flops(TENSOR) == pytest.approx(flops(DATA), rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [FSDP, ALL, DATA])
def test_samples_are_those_of_one_device(sizes):
    method, params = parts("attention")[0], run("attention", ONE).state.params
    given = {"shape": (SIZE, SIZE, 3), "labels": None, "num": 12, "batch_size": 8, "seed": 3}
    expected = [*generate.batches(generate.compiled(method, num_steps=3), params, (), **given)]
    mesh, rules = mesh_of(sizes), rules_of("attention")
    places = sharding.state_shardings({"params": params}, mesh, **rules)["params"]
    placed = jax.device_put(params, places)
    noise = generate.start_noise(jax.random.key(0), jnp.int32(0), 8, given["shape"], mesh)
    assert noise.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 4)
    draw = generate.compiled(method, num_steps=3, mesh=mesh, **rules)
    draw = draw.lower(placed, (), jax.random.key(0), noise, {}, generate.PLAIN).compile()
    got = [*generate.batches(draw, placed, (), mesh=mesh, **given)]
    assert [len(part) for part in got] == [8, 4]
    # At the noisiest level a chain multiplies the network's rounding by sigma / alpha, here 150.
    np.testing.assert_allclose(np.concatenate(got), np.concatenate(expected), rtol=0, atol=2e-4)
    split = sum("fsdp" in place.spec for place in jax.tree.leaves(places))
    gathers = collectives(draw.as_text())["all-gather"]
    assert len(gathers) == split, "weights are gathered once a call, not once a step"


def wide_regression():
    """A linear map of 128 x 256, large enough to be split by the default rule."""

    def init(key, batch):
        del batch
        return {"model": {"kernel": 0.1 * jax.random.normal(key, (128, 256)), "bias": jnp.zeros(256)}}, ()

    def loss(params, aux, batch, key, step):
        del aux, step
        x = batch["x0"] + 0.1 * jax.random.normal(key, batch["x0"].shape)
        error = x @ params["model"]["kernel"] + params["model"]["bias"][None] - batch["target"]
        return (error**2).mean(), {}

    return Method(init, (Objective("model", loss),), toys.generate)


class Rows(toys.Points):
    def __next__(self):
        draw = np.random.default_rng(self.step)
        self.step += 1
        x = draw.normal(size=(8, 128)).astype(np.float32)
        return {"x0": x, "target": np.concatenate([x, -x], axis=1)}


def test_a_run_continues_on_other_meshes(tmp_path):
    def wide(num_steps):
        optimizers = {"model": optax.sgd(0.5, momentum=0.9)}
        partition = (("kernel$", ("tensor", None)),)
        return toys.experiment(
            num_steps, method=wide_regression(), data=Rows, optimizers=optimizers, partition=partition
        )

    for number, sizes in enumerate((DATA, FSDP, ALL, ONE), 1):
        moved = loop.train(wide(2 * number), tmp_path / "moved", mesh=mesh_of(sizes))
        kernel = moved.state.params["model"]["kernel"]
        assert kernel.sharding.shard_shape(kernel.shape) == (128 // sizes[2], 256 // sizes[1])
    stayed = loop.train(wide(8), tmp_path / "stayed", mesh=mesh_of(ONE))
    assert moved.step == stayed.step == 8
    ours, theirs = toys.leaves(moved.state), toys.leaves(stayed.state)
    assert ours.keys() == theirs.keys()
    for path in theirs:
        np.testing.assert_allclose(ours[path], theirs[path], rtol=1e-4, atol=1e-6, err_msg=path)
