"""Steps that are not finite, jump or hang; disks that are full or gone: what is kept, what is said, what goes on."""

import json
import os
import resource
import threading
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_toys as toys

from jaxdiff.training import faults, logs, sharding
from jaxdiff.training.checkpoint import CheckpointError, Checkpoints, load_weights
from jaxdiff.training.goodput import INPUT, STEP, Stopwatch
from jaxdiff.training.lines import Lines, read_lines
from jaxdiff.training.loop import train

NOT_FINITE = {"finite": jnp.bool_(False), "model/loss": jnp.float32(jnp.nan)}


def run(workdir, num_steps=6, *, on_sample=None, **changes):
    return train(toys.experiment(num_steps, **changes), workdir, mesh=sharding.single_device(), on_sample=on_sample)


def with_nan(*bad):
    return lambda: toys.Points(bad=bad)


@contextmanager
def largest_file(size):
    """Writing past this many bytes of any file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_steps_that_are_not_finite_are_skipped_counted_and_their_batches_kept(tmp_path, capsys):
    outcome = run(tmp_path, 8, data=with_nan(2, 3, 6), max_skipped=2)
    assert outcome.step == 8 and int(outcome.state.step) == 8
    assert all(np.isfinite(value).all() for value in toys.leaves(outcome.state.params).values())
    entries = read_lines(tmp_path / "metrics.jsonl")
    assert [entry["skipped"] for entry in entries] == [0.0, 2.0, 0.0, 1.0]
    # The mean of a window is over the steps that count; a window without any has none.
    assert entries[1]["model/loss"] is None and np.isfinite(entries[3]["model/loss"])
    assert sorted(path.name for path in (tmp_path / "faults").iterdir()) == ["step_3.npz", "step_4.npz", "step_7.npz"]
    source = toys.Points(bad=(3,))
    source.set_state({"step": 3})
    with np.load(tmp_path / "faults" / "step_4.npz", allow_pickle=False) as file:
        for name, value in next(source).items():
            np.testing.assert_array_equal(file[name], value)
    said = capsys.readouterr().err
    assert f"its batch is in {tmp_path / 'faults' / 'step_4.npz'}; going on, 2 of at most 2 in a row" in said
    assert "step 7 is not finite and was not applied (model/loss=nan" in said and "1 of at most 2 in a row" in said


def test_a_skipped_step_leaves_what_training_would_have_without_it(tmp_path):
    state = {}
    hook = {"sample_every": 1, "on_sample": lambda at, step: state.update({step: toys.leaves(at)})}
    run(tmp_path, 4, data=with_nan(2), max_skipped=1, **hook)
    for path, value in state[2].items():
        if "step" not in path:
            np.testing.assert_array_equal(state[3][path], value, err_msg=path)
    assert any((state[4][path] != value).any() for path, value in state[3].items() if "params" in path)


def test_too_many_in_a_row_stop_the_run_which_may_go_on_with_more(tmp_path):
    with pytest.raises(FloatingPointError) as caught:
        run(tmp_path, data=with_nan(1, 3, 4), max_skipped=1)
    message = str(caught.value)
    assert message.startswith("step 5 is not finite and was not applied (model/loss=nan")
    assert "), nor were the 1 before it; last good state: the checkpoint of step 4 in" in message
    outcome = run(tmp_path, data=with_nan(1, 3, 4), max_skipped=2)
    assert outcome.step == 6


def test_a_batch_that_cannot_be_kept_costs_nothing(tmp_path, capsys):
    (tmp_path / "faults").write_text("a file")
    run(tmp_path, data=with_nan(2), max_skipped=1)
    assert f"could not be written to {tmp_path / 'faults' / 'step_3.npz'} (File exists)" in capsys.readouterr().err
    inspector = faults.Inspector(tmp_path / "other", 1000, lambda line: None)
    for step in range(faults.MAX_BATCHES + 5):
        inspector.sent(step, NOT_FINITE, {"x0": np.zeros(2)})
    inspector.look()
    assert len(list((tmp_path / "other").iterdir())) == faults.MAX_BATCHES


def test_objects_are_never_pickled(tmp_path):
    said = []
    inspector = faults.Inspector(tmp_path, 1, said.append)
    batch = {"x0": np.array([object()])}
    inspector.sent(1, NOT_FINITE, batch)
    inspector.look()
    assert "its batch could not be written" in said[0] and not list(tmp_path.iterdir())


def test_a_spike_is_noted_and_changes_nothing(tmp_path, capsys):
    class Outlier(toys.Points):
        def __next__(self):
            batch = super().__next__()
            return {**batch, "target": batch["target"] + np.float32(100.0 * (self.step == 80))}

    quiet = {"log_every": 100, "checkpoint_every": 100, "optimizers": {"model": optax.sgd(1e-3)}}
    run(tmp_path, 90, data=Outlier, **quiet)
    entries = read_lines(tmp_path / "faults" / "spikes.jsonl")
    assert [(entry["step"], entry["name"]) for entry in entries] == [(80, "model/loss")]
    assert entries[0]["loss"] > 1e3 > 100 * entries[0]["median"] and entries[0]["deviations"] > 10
    assert capsys.readouterr().err.count("deviations above its median") == 1


@pytest.mark.parametrize(("last", "found"), [(1.4, 0), (8.0, 1), (float("inf"), 1), (float("nan"), 0), (-50.0, 0)])
def test_what_counts_as_a_spike(tmp_path, last, found):
    # Median 1, median absolute deviation 0.1: ten robust deviations end at 1 + 1.4826.
    said = []
    spikes = faults.Spikes(tmp_path, said.append, window=21)
    values = [1.0 + 0.1 * (index % 5 - 2) for index in range(20)]
    for step, value in enumerate([*values, last]):
        spikes.look(step, {"model/loss": np.float32(value)})
    assert len(said) == found == len(read_lines(tmp_path / faults.SPIKES))


def test_spikes_of_steps_that_run_again_are_dropped(tmp_path):
    lines = Lines(tmp_path / faults.SPIKES, print)
    for step in (3, 7):
        lines.append({"step": step})
    faults.Spikes(tmp_path, print, 5)
    assert read_lines(tmp_path / faults.SPIKES) == [{"step": 3}]


def test_a_hang_is_reported_while_it_lasts_and_when_it_is_over():
    said, spoken, stopwatch = [], threading.Event(), Stopwatch()

    def say(line):
        said.append(line)
        spoken.set()

    watchdog = faults.Watchdog(stopwatch, say, floor_s=0.2)
    try:
        for step in range(5):
            stopwatch.enter(STEP)
            watchdog.step_done(step)
        stopwatch.enter(INPUT)
        assert spoken.wait(30)
        assert said[0].startswith("after step 4: the wait for data has taken") and "(a step takes " in said[0]
        # It goes on, and is mentioned again after twice the time; then the data come.
        spoken.clear()
        stopwatch.enter(STEP)
        assert spoken.wait(30)
        assert any(line.startswith("after step 4: the wait for data is over after") for line in said)
    finally:
        watchdog.close()
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_spares_the_last_one(tmp_path):
    def init(key, batch):
        params, aux = toys.regression().init(key, batch)
        return {"model": {**params["model"], "unused": jax.random.normal(key, (300, 300))}}, aux

    large = {"method": toys.regression()._replace(init=init)}
    outcome = run(tmp_path, 4, **large)

    def fill(state, step):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    with largest_file(resource.RLIM_INFINITY), pytest.raises(CheckpointError, match="^checkpoint 6") as caught:
        run(tmp_path, 8, sample_every=5, on_sample=fill, **large)
    assert "\n" not in str(caught.value)
    weights, step = load_weights(toys.experiment(4, **large), tmp_path / "checkpoints")
    assert step == 4
    for path, value in toys.leaves(outcome.state.params).items():
        np.testing.assert_array_equal(toys.leaves(weights.params)[path], value)
    assert run(tmp_path, 8, **large).step == 8


def test_a_log_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys):
    def block(state, step):
        if step == 2:
            (tmp_path / "metrics.jsonl").rename(tmp_path / "before.jsonl")
            (tmp_path / "metrics.jsonl").mkdir()

    assert run(tmp_path, sample_every=2, on_sample=block).step == 6
    said = capsys.readouterr().err
    assert said.count(f"{tmp_path / 'metrics.jsonl'} cannot be written (Is a directory): going on, its lines are") == 1
    with Checkpoints(tmp_path / "checkpoints", create=False) as checkpoints:
        assert checkpoints.steps() == [2, 4, 6]


def test_a_picture_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys):
    def full(state, step):
        raise OSError(28, "No space left on device")

    assert run(tmp_path, sample_every=4, on_sample=full).step == 6
    line = "the sample hook failed at step 4 ([Errno 28] No space left on device): going on without it"
    assert line in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, 8, sample_every=4, on_sample=lambda state, step: 1 / 0)


def test_lines_wait_for_a_full_disk(tmp_path):
    said, path = [], tmp_path / "file.jsonl"
    lines = Lines(path, said.append)
    lines.append({"number": 1})
    path.rename(tmp_path / "real.jsonl")
    path.symlink_to("/dev/full")
    lines.append({"number": 2})
    lines.append({"number": 3})
    assert len(said) == 1 and said[0].startswith(f"{path} cannot be written (No space left on device): going on")
    path.unlink()
    (tmp_path / "real.jsonl").rename(path)
    lines.append({"number": 4})
    assert [entry["number"] for entry in read_lines(path)] == [1, 2, 3, 4]
    assert said[1:] == [f"{path} can be written again, no line is lost"]


def test_a_line_written_in_two_halves_stays_one_line(tmp_path):
    path = tmp_path / "file.jsonl"
    lines = Lines(path, lambda line: None)
    lines.append({"number": 1})
    with largest_file(path.stat().st_size + 5):
        lines.append({"number": 22})
    assert path.read_text().endswith('{"num')
    lines.append({"number": 3})
    assert [entry["number"] for entry in read_lines(path)] == [1, 22, 3]


def test_tensorboard_gives_up_with_one_line(tmp_path):
    said = []
    writer = logs.TensorBoard(tmp_path / "tensorboard", 0, said.append)
    writer.write(1, {"loss": 1.0})
    (path,) = (tmp_path / "tensorboard").iterdir()
    with largest_file(path.stat().st_size):
        for step in range(2, 5):
            writer.write(step, {"loss": 1.0})
        writer.close()
    assert said == [f"{tmp_path / 'tensorboard'} cannot be written (File too large): no more of it in this process"]


def test_a_terminal_that_has_gone_does_not_end_the_run():
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        progress = logs.Progress(4, stream=stream)
        progress.say("nobody hears this")
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)  # for what the file tries again when it is closed
    progress.close()


def test_all_finite_is_one_scalar_on_any_mesh():
    mesh = sharding.make_mesh(fsdp=4, data=1, devices=jax.devices()[:4])
    tree = sharding.shard_state({"a": jnp.zeros((256, 256)), "b": {"c": jnp.ones(3)}, "n": jnp.arange(3)}, mesh)
    assert faults.all_finite(tree).shape == () and bool(faults.all_finite(tree))
    broken = {**tree, "b": {"c": tree["b"]["c"].at[1].set(jnp.inf)}}
    assert not faults.all_finite(broken)
    assert faults.first_not_finite(broken) == "b/c" and faults.first_not_finite(tree) == ""
    assert bool(faults.all_finite({}))


def test_a_bucket_gets_whole_files(tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    from etils import epath

    memory = fsspec.filesystem("memory")
    monkeypatch.setattr(epath.backend.fsspec_backend, "_get_filesystem", lambda name: memory)
    folder = epath.Path(f"gs://bucket/{tmp_path.name}")
    writer = logs.JsonLines(folder / "metrics.jsonl", 0)
    for step in (1, 2, 3):
        writer.write(step, {"loss": float(step)})
    logs.JsonLines(folder / "metrics.jsonl", 2).write(3, {"loss": 9.0})
    assert [entry["loss"] for entry in read_lines(folder / "metrics.jsonl")] == [1.0, 2.0, 9.0]
    said = []
    inspector = faults.Inspector(folder / "faults", 1, said.append)
    inspector.sent(5, NOT_FINITE, {"x0": np.arange(3)})
    inspector.look()
    assert f"its batch is in {folder / 'faults' / 'step_5.npz'}" in said[0]
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]) == {"step": 1, "loss": 1.0}
