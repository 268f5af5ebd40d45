"""Two hundred random damages to a checkpoint: each is named in one line, or what is restored is equal bit for bit.

Files are drawn by what they hold, so that the few large files of arrays do not hide the many small ones. Run
`python -m pytest tests/reliability/test_damage.py -m "" -s` for the table.
"""

import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff.methods.base import Method, Objective
from jaxdiff.training import ema
from jaxdiff.training.checkpoint import CheckpointError, Checkpoints
from jaxdiff.training.experiment import Experiment
from jaxdiff.training.state import create_state
from jaxdiff.training.verification import verify

STEP = 5
BATCH = {"x0": np.zeros((4, 3), np.float32)}
COUNTS = {"bit flip": 120, "truncation": 40, "deletion": 40}
# What a file holds, by a part of its path, the first that fits; and how often it is hit.
HOLDS = {"arrays": "/d/", "manifest": "manifest.ocdbt", "tree": "_METADATA", "layout": "state/", "JSON": "metadata"}
SHARES = {"arrays": 5, "manifest": 2, "tree": 2, "layout": 2, "JSON": 3, "commit": 1}


def init(key, batch):
    del batch
    keys = jax.random.split(key, 3)
    model = {
        "kernel": jax.random.normal(keys[0], (48, 40)),
        "half": jax.random.normal(keys[1], (40,)).astype(jnp.bfloat16),
        "scale": jnp.ones(()),
    }
    aux = {"key": keys[2], "mask": jnp.arange(300) % 3 == 0, "count": jnp.arange(64, dtype=jnp.int32)}
    return {"model": model, "disc": {"weights": jnp.linspace(-1.0, 1.0, 50)}}, aux


def no_loss(params, aux, batch, key, step):
    raise NotImplementedError


def no_samples(params, aux, key, noise, cond, sampling):
    raise NotImplementedError


RUN = Experiment(
    name="everything",
    method=Method(init, (Objective("disc", no_loss), Objective("model", no_loss)), no_samples),
    data=lambda: iter(()),
    optimizers={"model": optax.adam(0.1), "disc": optax.sgd(0.1, momentum=0.9)},
    sample_shape=(3,),
    batch_size=4,
    num_steps=10,
    ema=(ema.constant("slow", 0.9),),
    config={"lr": 0.1},
)
DATA = {"step": STEP, "epoch": 0, "source": "toy"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """(state, folder) of a checkpoint with everything in it."""
    folder = tmp_path_factory.mktemp("sound")
    state = create_state(RUN.method, RUN.optimizers, RUN.ema, jax.random.key(0), BATCH)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(STEP, state, data=DATA, experiment=RUN.describe(), batch=BATCH)
    return state, folder


def damages(counts):
    """(kind, generator) of each damage; the generator is seeded with kind and number."""
    return [(kind, random.Random(f"{kind} {number}")) for kind, count in counts.items() for number in range(count)]


def inflict(kind, draw, folder):
    """Damages one file of a checkpoint; returns what was done."""
    files = {}
    for path in sorted(path for path in (folder / str(STEP)).rglob("*") if path.is_file()):
        commit = path.name == "commit_success.txt"
        name = str(path.relative_to(folder))
        holds = "commit" if commit else next((what for what, part in HOLDS.items() if part in name), "commit")
        files.setdefault(holds, []).append(path)
    holds = draw.choices(sorted(files), [SHARES[what] for what in sorted(files)])[0]
    path = draw.choices(files[holds], [path.stat().st_size + 1 for path in files[holds]])[0]
    content = path.read_bytes()
    position = draw.randrange(len(content)) if content else 0
    if kind == "deletion":
        path.unlink()
    elif kind == "truncation":
        path.write_bytes(content[:position])
    else:
        bit = 1 << draw.randrange(8)
        path.write_bytes(content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :])
    return f"{kind} in {path.relative_to(folder)} ({holds}) at {position}"


def plain(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def same(a, b):
    a, b = jax.tree.map(plain, (a, b))
    equal = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y)), a, b)
    return all(jax.tree.leaves(equal))


def outcome(read):
    """("detected", line) or ("read", result)."""
    try:
        return "read", read()
    except CheckpointError as error:
        line = str(error)
        assert line.startswith(f"checkpoint {STEP}") and "\n" not in line and len(line) < 200, line
        return "detected", line


def survive(sound, folder, counts):
    """Damages copies of the checkpoint one by one; returns {(kind, verdict): number}, and what was silent.

    Silent is a restored state that differs, and a restore that fails on a checkpoint that `verify` calls sound.
    """
    state, original = sound
    with Checkpoints(original, create=False) as checkpoints:
        meta = checkpoints.meta(STEP)
    table, silent = {}, []
    for number, (kind, draw) in enumerate(damages(counts)):
        copy = shutil.copytree(original, folder / str(number))
        done = inflict(kind, draw, copy)
        with Checkpoints(copy, create=False) as checkpoints:
            verdict, found = outcome(lambda: checkpoints.restore(STEP, state, RUN.describe()))
            whole, _ = outcome(lambda: verify(checkpoints, STEP))
            if verdict == "read":
                equal = same(found.state, state) and found.data == DATA and checkpoints.meta(STEP) == meta
                verdict = "harmless" if equal else "silent"
            elif whole == "read":
                verdict = "silent"
        if verdict == "silent":
            silent.append(done)
        table[kind, verdict] = table.get((kind, verdict), 0) + 1
        shutil.rmtree(copy)
    return table, silent


def report(table, counts):
    verdicts = ("detected", "harmless", "silent")
    print(f"\n{'damage':<12}{'tried':>8}" + "".join(f"{verdict:>10}" for verdict in verdicts))
    for kind, count in counts.items():
        print(f"{kind:<12}{count:>8}" + "".join(f"{table.get((kind, v), 0):>10}" for v in verdicts))


def test_ten_damages_are_named_or_harmless(sound, tmp_path):
    table, silent = survive(sound, tmp_path, {kind: count // 20 for kind, count in COUNTS.items()})
    assert silent == []
    assert all(table[kind, "detected"] > 0 for kind in COUNTS)


@pytest.mark.slow
def test_two_hundred_damages_are_named_or_harmless(sound, tmp_path, capsys):
    table, silent = survive(sound, tmp_path, COUNTS)
    with capsys.disabled():
        report(table, COUNTS)
    assert silent == []
    assert sum(table.values()) == sum(COUNTS.values())
    assert all(table[kind, "detected"] >= COUNTS[kind] // 3 for kind in COUNTS)


# Some files hold nothing that restoring needs; what they are is stated here, so that this list cannot grow unseen.
NOT_NEEDED = {
    f"{STEP}/_CHECKPOINT_METADATA",
    f"{STEP}/commit_success.txt",
    f"{STEP}/data/commit_success.txt",
    f"{STEP}/meta/commit_success.txt",
    f"{STEP}/state/commit_success.txt",
    f"{STEP}/state/_sharding",
    f"{STEP}/state/ocdbt.process_0/manifest.ocdbt",
}


def test_every_deleted_file_is_missed_or_known_to_be_superfluous(sound, tmp_path):
    state, original = sound
    harmless = set()
    for path in sorted(path for path in original.rglob("*") if path.is_file()):
        copy = shutil.copytree(original, tmp_path / "copy")
        (copy / path.relative_to(original)).unlink()
        with Checkpoints(copy, create=False) as checkpoints:
            verdict, found = outcome(lambda: checkpoints.restore(STEP, state, RUN.describe()))
        if verdict == "read":
            assert same(found.state, state) and found.data == DATA
            harmless.add(str(path.relative_to(original)))
        shutil.rmtree(copy)
    # Orbax joins the files of all processes when it commits and leaves behind parts of the index that it replaced.
    named = {name for name in harmless if "/ocdbt.process_0/d/" not in name}
    assert named <= NOT_NEEDED and f"{STEP}/commit_success.txt" in named


def test_empty_folders_and_stray_files_change_nothing(sound, tmp_path, caplog):
    state, original = sound
    copy = shutil.copytree(original, tmp_path / "copy")
    (copy / "9").mkdir()
    (copy / "8" / "state").mkdir(parents=True)
    (copy / "notes").mkdir()
    for name in ("7", "notes.txt", "5.bak", f"{STEP}/stray", f"{STEP}/state/stray", f"{STEP}/meta/stray"):
        (copy / name).write_text("stray")
    with Checkpoints(copy, create=False) as checkpoints:
        restored = checkpoints.newest(lambda step: checkpoints.restore(step, state, RUN.describe()))
    assert same(restored.state, state) and restored.data == DATA
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("jaxdiff")]
    assert lines == [
        "checkpoint 9: its folder is empty; trying the one before",
        "checkpoint 8, item meta: its folder is missing; trying the one before",
    ]
