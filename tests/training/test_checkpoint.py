"""Checkpoints: what comes back is what went in, and everything else is refused in one line."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_toys as toys

from jaxdiff.training import sharding
from jaxdiff.training.checkpoint import (
    CheckpointError,
    CheckpointMismatch,
    Checkpoints,
    leaf_table,
    load_weights,
)
from jaxdiff.training.digests import json_digest
from jaxdiff.training.state import create_state
from jaxdiff.training.step import make_train_step

RUN = toys.experiment()
EXAMPLE = next(toys.Points())


def make_state(run=RUN, mesh=None):
    return create_state(run.method, run.optimizers, run.ema, jax.random.key(run.seed), EXAMPLE, mesh=mesh)


def save(checkpoints, step, state, run=RUN):
    checkpoints.save(step, state, data={"step": step}, experiment=run.describe(), batch=EXAMPLE)


@pytest.fixture
def folder(tmp_path):
    """Three checkpoints: steps 1, 2 and 3, each with its number in `params`."""
    state = make_state()
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            params = jax.tree.map(lambda leaf, step=step: jnp.full_like(leaf, step), state.params)
            save(checkpoints, step, state.replace(step=jnp.int32(step), params=params))
    return tmp_path


def read_newest(folder, run=RUN, like=None, **options):
    like = make_state(run) if like is None else like
    with Checkpoints(folder) as checkpoints:
        return checkpoints.newest(lambda step: checkpoints.restore(step, like, run.describe()), **options)


@pytest.mark.parametrize("make", [toys.regression, toys.gan])
def test_round_trip_is_bit_for_bit_with_keys_and_data_state(tmp_path, make):
    method = make()
    optimizers = {objective.player: optax.adam(0.1) for objective in method.objectives}
    run = toys.experiment(method=method, optimizers=optimizers)
    state = make_state(run)
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 5, state, run)
    state_back, data = read_newest(tmp_path, run)
    assert jax.tree.structure(state_back) == jax.tree.structure(state)
    for path, value in toys.leaves(state).items():
        np.testing.assert_array_equal(toys.leaves(state_back)[path], value, err_msg=path)
    assert state_back.key.dtype == state.key.dtype
    assert data == {"step": 5}


def test_steps_that_reuse_the_saved_buffers_do_not_reach_the_checkpoint(tmp_path):
    mesh = sharding.single_device()
    state = make_state()
    step = sharding.jit_train_step(
        make_train_step(RUN.method, RUN.optimizers, RUN.ema), mesh, sharding.state_shardings(state, mesh)
    )
    before = {path: value.copy() for path, value in toys.leaves(state).items()}
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, state)
        for _ in range(5):
            state, _ = step(state, sharding.put_batch(EXAMPLE, mesh))
    back = toys.leaves(read_newest(tmp_path).state)
    for path, value in before.items():
        np.testing.assert_array_equal(back[path], value, err_msg=path)


def test_a_checkpoint_of_one_mesh_comes_back_on_another(tmp_path):
    four = sharding.make_mesh(2, 2, devices=jax.devices()[:4])
    state = make_state(mesh=four)
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, state)
    one = read_newest(tmp_path).state
    assert one.params["model"]["weights"].sharding.num_devices == 1
    for path, value in toys.leaves(state).items():
        np.testing.assert_array_equal(toys.leaves(one)[path], value, err_msg=path)


def test_old_checkpoints_go_and_chosen_ones_stay(tmp_path):
    with Checkpoints(tmp_path, max_to_keep=2, keep_every=2) as checkpoints:
        for step in (1, 2, 3, 4, 5, 6, 7):
            save(checkpoints, step, make_state())
        checkpoints.wait()
        assert checkpoints.steps() == [2, 4, 6, 7]


def test_weights_come_without_optimiser_or_data(folder):
    for path in (folder / "3" / "data").iterdir():
        path.unlink()
    weights, step = load_weights(RUN, folder)
    assert step == 3
    np.testing.assert_array_equal(weights.params["model"]["weights"], 3.0)
    np.testing.assert_array_equal(weights.select(None)["model"]["scale"], 3.0)
    np.testing.assert_array_equal(
        weights.select("slow")["model"]["weights"], make_state().ema["slow"]["model"]["weights"]
    )
    assert load_weights(RUN, folder, step=2)[0].params["model"]["scale"] == 2.0
    with pytest.raises(ValueError, match=r"no EMA is called 'fast': \['edm', 'slow'\] are here"):
        weights.select("fast")


def test_another_experiment_is_refused_by_its_first_different_field(folder):
    other = toys.experiment(name="other")
    with pytest.raises(CheckpointMismatch, match="checkpoint 3, item meta: of another experiment: name is 'toy' there"):
        read_newest(folder, other)
    changed = toys.experiment(config={"lr": 0.1})
    with pytest.raises(CheckpointMismatch, match=r"config.lr is 0.05 there and 0.1 here"):
        load_weights(changed, folder)


def weights_as(leaf):
    state = make_state()
    return state.replace(params={"model": {**state.params["model"], "weights": leaf}})


@pytest.mark.parametrize(
    ("leaf", "reason"),
    [
        (jnp.zeros(4), r"leaf params/model/weights has shape \[3\], expected \[4\]"),
        (jnp.zeros(3, jnp.bfloat16), "leaf params/model/weights has dtype float32, expected bfloat16"),
        ({"kernel": jnp.zeros(3)}, "leaf params/model/weights/kernel is missing"),
    ],
)
def test_another_shape_dtype_or_tree_is_refused_before_reading(folder, leaf, reason):
    with pytest.raises(CheckpointMismatch, match="checkpoint 3, item state: " + reason):
        read_newest(folder, like=weights_as(leaf))
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]


def test_a_leaf_too_many_is_refused(folder):
    state = make_state()
    with pytest.raises(CheckpointMismatch, match="leaf aux/error is not expected"):
        read_newest(folder, like=state.replace(aux={}))


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def truncate_arrays(folder):
    for path in (folder / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:10])


def garble_meta(folder):
    (folder / "meta" / "metadata").write_text('{"experiment": {"na')


def lose_leaves(folder):
    meta = json.loads((folder / "meta" / "metadata").read_text())
    (folder / "meta" / "metadata").write_text(json.dumps({**meta, "leaves": 3}))


def lose_state(folder):
    shutil.rmtree(folder / "state")


def lose_data(folder):
    (folder / "data" / "metadata").unlink()


DAMAGE = [empty, truncate_arrays, garble_meta, lose_leaves, lose_state, lose_data]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_line(folder, damage, caplog):
    damage(folder / "3")
    restored = read_newest(folder)
    assert int(restored.state.step) == 2
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("jaxdiff")]
    assert len(lines) == 1 and lines[0].startswith("checkpoint 3")
    assert lines[0].endswith("trying the one before") and "\n" not in lines[0] and len(lines[0]) < 160
    assert (folder / "3").exists()


def test_damaged_checkpoints_are_set_aside_so_that_their_steps_can_be_saved_again(folder):
    for step in (2, 3):
        garble_meta(folder / str(step))
    like = make_state()
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.newest(lambda step: checkpoints.restore(step, like, RUN.describe()), set_aside=True)
        assert int(restored.state.step) == 1
        assert checkpoints.steps() == [1]
        save(checkpoints, 2, restored.state.replace(step=jnp.int32(2)))
        save(checkpoints, 3, restored.state.replace(step=jnp.int32(3)))
    assert int(read_newest(folder).state.step) == 3
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "2.damaged1", "3", "3.damaged1"]


def test_when_none_can_be_read_nothing_is_touched(folder):
    for step in (1, 2, 3):
        garble_meta(folder / str(step))
    with pytest.raises(CheckpointError, match=r"none can be read \(tried 3, 2, 1\): restore a copy"):
        read_newest(folder, set_aside=True)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]


def test_what_json_cannot_hold_is_an_error_and_leaves_the_older_ones(folder):
    with pytest.raises(CheckpointError, match="checkpoint 4: .*not JSON serializable"):
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(4, make_state(), data={"step": object()}, experiment=RUN.describe(), batch=EXAMPLE)
            checkpoints.wait()
    assert int(read_newest(folder).state.step) == 3


def rewrite(folder, change):
    """Changes the item `meta` and gives it the digest that belongs to it."""
    path = folder / "meta" / "metadata"
    meta = json.loads(path.read_text())
    del meta["digest"]
    change(meta)
    path.write_text(json.dumps(meta | {"digest": json_digest(meta)}))


def test_a_leaf_that_changed_on_disk_is_named_and_passed_over(folder, caplog):
    rewrite(folder / "3", lambda meta: meta["leaves"]["ema/edm/model/scale"].update(digest="0" * 16))
    assert int(read_newest(folder).state.step) == 2
    said = "checkpoint 3, item state: leaf ema/edm/model/scale is not what was saved: its digest differs; trying the"
    assert said in caplog.text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda meta: meta.pop("data_digest"), "item meta: entry 'data_digest' is missing"),
        (lambda meta: meta.update(step=2), "item meta: was written as step 2: give the folder its old name"),
        (lambda meta: meta.update(data_digest="0"), "item data: is not what was saved"),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_refused(folder, change, reason):
    rewrite(folder / "3", change)
    with pytest.raises(CheckpointError, match="^checkpoint 3, " + reason):
        with Checkpoints(folder) as checkpoints:
            checkpoints.restore(3, make_state(), RUN.describe())


@pytest.mark.parametrize(
    "old, new", [('"digest"', '"digesu"'), ('"toy"', '"tox"'), ("[3]", "[2]"), ('"digest"', '"x"')]
)
def test_any_change_of_meta_is_seen(folder, old, new):
    path = folder / "3" / "meta" / "metadata"
    path.write_text(new.join(path.read_text().rsplit(old, 1)))
    with pytest.raises(CheckpointError, match="^checkpoint 3, item meta: ") as caught:
        with Checkpoints(folder) as checkpoints:
            checkpoints.restore(3, make_state(), RUN.describe())
    assert not isinstance(caught.value, CheckpointMismatch)


def without_digests(folder):
    """The checkpoint as it was written before there were digests."""
    path = folder / "meta" / "metadata"
    meta = json.loads(path.read_text())
    for leaf in meta["leaves"].values():
        del leaf["digest"]
    path.write_text(json.dumps({name: meta[name] for name in ("experiment", "versions", "batch", "leaves")}))


def test_checkpoints_without_digests_are_restored_with_a_warning(folder, caplog):
    without_digests(folder / "3")
    restored = read_newest(folder)
    assert int(restored.state.step) == 3 and restored.data == {"step": 3}
    assert caplog.text.count("checkpoint 3 carries no digests: what it holds is not verified") == 1
    assert load_weights(RUN, folder)[1] == 3


GAN = toys.experiment(
    method=toys.gan(), optimizers={"model": optax.adam(0.1), "disc": optax.sgd(0.1)}, config={"gan": True}
)


@pytest.mark.parametrize(
    "choose",
    [
        lambda state: {"params": state.params},
        lambda state: {"params": {"disc": state.params["disc"]}},
        lambda state: {"ema": {"slow": {"model": state.ema["slow"]["model"]}}, "step": state.step},
        lambda state: {"ema": {"edm": state.ema["edm"]}, "key": state.key},
        lambda state: {"opt_state": {"model": state.opt_state["model"]}},
        lambda state: {"aux": state.aux, "ema": {}},
    ],
    ids=["parameters", "one player", "a player's average", "one average", "an optimiser", "aux"],
)
def test_a_part_comes_alone_and_only_its_digests_count(tmp_path, choose):
    state = make_state(GAN)
    part = choose(state)
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, state, GAN)
    asked = set(leaf_table(part))

    def spoil(meta):
        for path, leaf in meta["leaves"].items():
            leaf["digest"] = leaf["digest"] if path in asked else "0" * 16

    rewrite(tmp_path / "1", spoil)
    shutil.rmtree(tmp_path / "1" / "data")
    with Checkpoints(tmp_path) as checkpoints:
        back = checkpoints.restore_part(1, part, GAN.describe())
        with pytest.raises(CheckpointError, match="leaf .* is not what was saved"):
            checkpoints.restore(1, state, GAN.describe())
    assert jax.tree.structure(back) == jax.tree.structure(part)
    for path, value in toys.leaves(part).items():
        np.testing.assert_array_equal(toys.leaves(back)[path], value, err_msg=path)


def test_a_part_must_be_complete_and_fit(tmp_path):
    state = make_state(GAN)
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, state, GAN)

        def ask(like):
            return checkpoints.restore_part(1, like, GAN.describe())

        with pytest.raises(CheckpointMismatch, match="leaf params/model/shift is not expected"):
            ask({"params": {"model": {"scale": state.params["model"]["scale"]}}})
        with pytest.raises(CheckpointMismatch, match="leaf params/teacher/scale is missing"):
            ask({"params": {"teacher": state.params["model"]}})
        with pytest.raises(CheckpointMismatch, match="leaf parameters/disc/weights is missing"):
            ask({"parameters": state.params})
        with pytest.raises(CheckpointMismatch, match="of another experiment"):
            checkpoints.restore_part(1, {"params": state.params}, RUN.describe())


def test_asking_for_what_is_not_there(tmp_path, folder):
    with pytest.raises(CheckpointError, match=r"^checkpoint 7: does not exist, \[1, 2, 3\] do: choose one"):
        load_weights(RUN, folder, step=7)
    with pytest.raises(CheckpointError, match="^there is no folder .*: train first"):
        load_weights(RUN, tmp_path / "nowhere")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(CheckpointError, match="^no checkpoint in .*: train first"):
        load_weights(RUN, tmp_path / "hollow")
