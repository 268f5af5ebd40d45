"""Inspecting and verifying checkpoints without the experiment that wrote them."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff.inspection import inspect, verify
from jaxdiff.methods.base import Method, Objective
from jaxdiff.training import ema, sharding, verification
from jaxdiff.training.checkpoint import CheckpointError, Checkpoints
from jaxdiff.training.digests import json_digest
from jaxdiff.training.experiment import Experiment
from jaxdiff.training.state import create_state

BATCH = {"x0": np.zeros((4, 3), np.float32)}


def init(key, batch):
    del batch
    model = {"kernel": jax.random.normal(key, (20, 30)), "half": jnp.ones(5, jnp.bfloat16)}
    return {"model": model, "disc": {"weights": jnp.ones(7)}}, {"key": key, "mask": jnp.arange(9) > 3}


def nothing(*args):
    raise NotImplementedError


RUN = Experiment(
    name="pair",
    method=Method(init, (Objective("disc", nothing), Objective("model", nothing)), nothing),
    data=lambda: iter(()),
    optimizers={"model": optax.adam(0.1), "disc": optax.sgd(0.1)},
    sample_shape=(3,),
    batch_size=4,
    num_steps=10,
    ema=(ema.constant("slow", 0.9, players=("model",)),),
    config={"lr": 0.1},
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    state = create_state(RUN.method, RUN.optimizers, RUN.ema, jax.random.key(0), BATCH)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, state, data={"step": step}, experiment=RUN.describe(), batch=BATCH)
    return workdir


@pytest.fixture
def run(written, tmp_path):
    return shutil.copytree(written, tmp_path / "run")


def spoil(folder):
    """Makes the digest of one leaf another one."""
    path = folder / "meta" / "metadata"
    meta = json.loads(path.read_text())
    del meta["digest"]
    meta["leaves"]["params/model/kernel"]["digest"] = "0" * 16
    path.write_text(json.dumps(meta | {"digest": json_digest(meta)}))


def test_inspect_says_what_is_there(run):
    (run / "checkpoints" / "3.damaged1").mkdir()
    (run / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()
    (run / "checkpoints" / "notes.txt").write_text("mine")
    text = inspect(run)
    assert "2 checkpoints (2, 4)" in text.splitlines()[0]
    for words in (
        "experiment  pair: batch_size=4, num_steps=10",
        "config      lr=0.1",
        "jax 0.",
        "player      model: 605 parameters",
        "player      disc: 7 parameters",
        "average     slow: constant decay 0.9, of model",
        "data        step=4",
        "meta        a digest of every leaf",
        "3.damaged1, 0 B: damaged and set aside",
        "6.orbax-checkpoint-tmp, 0 B: left by a save that was killed",
        "notes.txt, 4 B: no checkpoint, not read",
    ):
        assert words in text, text
    # Bytes: kernel 2400, half 10 (20 in its average, which is float32), disc 28, and a key of two words.
    assert "params 3 leaves of 2.4 kB" in text and "ema 2 leaves of 2.4 kB" in text and "key 1 leaf of 8 B" in text
    assert inspect(run / "checkpoints") == text


def test_inspect_goes_on_where_something_is_damaged(run):
    (run / "checkpoints" / "4" / "meta" / "metadata").write_text("{")
    (run / "checkpoints" / "2" / "data" / "metadata").unlink()
    text = inspect(run)
    assert "step 4, " in text and "damaged: a JSON file in it is cut or garbled" in text
    assert "data        damaged: data/metadata is missing" in text


def test_verify_reads_everything_and_names_what_is_damaged(run):
    text, sound = verify(run)
    assert sound
    lines = text.splitlines()
    leaves = len(jax.tree.leaves(create_state(RUN.method, RUN.optimizers, RUN.ema, jax.random.key(0), BATCH)))
    assert len(lines) == 2 and lines[0].startswith(f"step 2: sound, {leaves} leaves, ") and lines[0].endswith(" kB")
    spoil(run / "checkpoints" / "4")
    text, sound = verify(run / "checkpoints")
    assert not sound
    assert text.splitlines()[0] == lines[0]
    assert text.splitlines()[1] == (
        "step 4: damaged: item state: leaf params/model/kernel is not what was saved: its digest differs"
    )
    assert verify(run, 2) == (lines[0], True)
    assert verify(run, 4)[1] is False


def test_verify_holds_few_leaves_at_once(run, monkeypatch):
    whole = verify(run)
    monkeypatch.setattr(verification, "GROUP", 100)
    assert verify(run) == whole
    spoil(run / "checkpoints" / "4")
    assert "leaf params/model/kernel is not" in verify(run)[0]


def test_verify_reads_what_four_devices_wrote_in_double_precision(tmp_path):
    with jax.enable_x64(True):
        mesh = sharding.make_mesh(1, 4, devices=jax.devices()[:4])
        state = create_state(RUN.method, RUN.optimizers, RUN.ema, jax.random.key(0), BATCH, mesh=mesh)
        place = jax.NamedSharding(mesh, jax.P("fsdp"))
        wide = {"wide": jax.device_put(jnp.arange(400, dtype=jnp.float64).reshape(40, 10), place)}
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, state.replace(aux=wide), data={}, experiment=RUN.describe(), batch=BATCH)
    assert not jax.config.jax_enable_x64
    assert verify(tmp_path)[1]


def test_a_checkpoint_without_digests_is_not_called_sound(run):
    path = run / "checkpoints" / "4" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    for leaf in meta["leaves"].values():
        del leaf["digest"]
    path.write_text(json.dumps({name: meta[name] for name in ("experiment", "versions", "batch", "leaves")}))
    text, sound = verify(run)
    assert not sound and "step 4: carries no digests, all can be read but not verified, " in text
    assert "meta        no digests" in inspect(run)


def test_what_is_no_run_is_refused(tmp_path, run):
    for ask in (inspect, verify):
        with pytest.raises(CheckpointError, match="^there is no folder .*nowhere': name a run"):
            ask(tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match="^no checkpoint in .*: train first, or name a run"):
            ask(tmp_path)
    with pytest.raises(CheckpointError, match=r"^checkpoint 3: does not exist, \[2, 4\] do: choose one of them"):
        verify(run, 3)
