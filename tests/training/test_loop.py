"""The loop: exact resume, real signals, non-finite steps, logs, and refusals that leave the workdir alone."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_toys as toys

from jaxdiff.training import sharding
from jaxdiff.training.checkpoint import CheckpointMismatch, Checkpoints, load_weights
from jaxdiff.training.loop import enable_compilation_cache, train

ROOT = Path(__file__).parents[2]


def run(workdir, num_steps=6, *, experiment=None, **options):
    experiment = experiment or toys.experiment(num_steps)
    return train(experiment, workdir, mesh=sharding.single_device(), **options)


def saved_steps(workdir):
    with Checkpoints(workdir / "checkpoints", create=False, max_to_keep=None) as checkpoints:
        return checkpoints.steps()


def entries(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same(state, other):
    ours, theirs = toys.leaves(state), toys.leaves(other)
    assert list(ours) == list(theirs)
    for path, value in ours.items():
        np.testing.assert_array_equal(theirs[path], value, err_msg=path)


def snapshot(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_continued_twice_equals_one_without_a_break(tmp_path):
    whole = run(tmp_path / "whole", 7)
    for num_steps in (3, 5, 7):
        parts = run(tmp_path / "parts", num_steps)
        assert parts.step == num_steps and parts.stopped is None
    assert_same(whole.state, parts.state)
    assert [entry["step"] for entry in entries(tmp_path / "parts")] == [2, 3, 4, 5, 6, 7]


def test_a_finished_run_is_not_trained_again(tmp_path, capsys):
    first = run(tmp_path)
    again = run(tmp_path)
    assert again.step == 6
    assert_same(first.state, again.state)
    assert "toy: all 6 steps are done" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_the_run_goes_on_to_the_same_bits(tmp_path, name):
    workdir, num_steps = tmp_path / "killed", 60
    command = [sys.executable, str(ROOT / "tests" / "training" / "training_toys.py"), str(workdir), str(num_steps)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*command, "slow"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    seen = []
    for line in process.stderr:
        seen.append(line.decode())
        if line.startswith(b"step 4/"):
            process.send_signal(getattr(signal, name))
            break
    out, rest = process.communicate(timeout=120)
    assert process.returncode == 0, "".join(seen) + rest.decode()
    stopped = int(out.split()[-1])
    assert 4 <= stopped < num_steps and out.decode().startswith(f"stopped {name}")
    assert f"stopped by {name} after step {stopped}, saved: the same command goes on from here" in rest.decode()
    assert saved_steps(workdir) == [stopped]

    settings = {"checkpoint_every": 1000}
    resumed = run(workdir, experiment=toys.experiment(num_steps, **settings))
    whole = run(tmp_path / "whole", experiment=toys.experiment(num_steps, **settings))
    assert resumed.step == whole.step == num_steps
    assert_same(whole.state, resumed.state)


def test_a_second_signal_ends_at_once(tmp_path):
    def interrupt_twice(state, step):
        if step == 2:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, experiment=toys.experiment(6, sample_every=2), on_sample=interrupt_twice)
    assert saved_steps(tmp_path) == [2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_training_works_outside_the_main_thread(tmp_path):
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(run(tmp_path, 3)))
    thread.start()
    thread.join(timeout=120)
    assert outcomes[0].step == 3


@pytest.mark.parametrize(("bad", "kept"), [(4, 4), (5, 4), (0, None)])
def test_a_step_that_is_not_finite_stops_the_run_by_its_number(tmp_path, bad, kept):
    experiment = toys.experiment(20, data=lambda: toys.Points(bad=(bad,)))
    last = f"the checkpoint of step {kept} in" if kept else "no checkpoint yet"
    with pytest.raises(FloatingPointError) as caught:
        run(tmp_path, experiment=experiment)
    message = str(caught.value)
    assert message.startswith(f"step {bad + 1} is not finite and was not applied (model/loss=nan")
    assert last in message and message.endswith("lower the learning rate or clip gradients") and "\n" not in message
    assert saved_steps(tmp_path) == [step for step in (2, 4) if step <= (kept or 0)]
    assert entries(tmp_path)[-1]["step"] == bad + 1 and entries(tmp_path)[-1]["model/loss"] is None
    if kept:
        weights, step = load_weights(experiment, tmp_path / "checkpoints")
        good = run(tmp_path / "good", kept)
        assert step == kept
        assert_same(good.state.params, weights.params)


def test_parameters_that_an_update_broke_are_not_saved(tmp_path):
    def rate(count):
        return jnp.where(count == 3, jnp.inf, 0.01)

    with pytest.raises(FloatingPointError, match="parameter model/scale is not finite after step 4, nothing was saved"):
        run(tmp_path, experiment=toys.experiment(optimizers={"model": optax.sgd(rate)}))
    assert saved_steps(tmp_path) == [2]
    assert np.isfinite(load_weights(toys.experiment(), tmp_path / "checkpoints")[0].params["model"]["weights"]).all()


def test_a_damaged_newest_checkpoint_costs_two_steps_and_no_bit(tmp_path, caplog):
    whole = run(tmp_path / "whole", 8)
    run(tmp_path / "parts", 6)
    (tmp_path / "parts" / "checkpoints" / "6" / "meta" / "metadata").write_text("{")
    parts = run(tmp_path / "parts", 8)
    assert_same(whole.state, parts.state)
    assert "checkpoint 6, item meta:" in caplog.text and "trying the one before" in caplog.text
    assert [entry["step"] for entry in entries(tmp_path / "parts")] == [2, 4, 6, 8]


def test_logs_are_means_over_their_window(tmp_path):
    state_of = {}
    experiment = toys.experiment(5, sample_every=1)
    run(tmp_path, experiment=experiment, on_sample=lambda state, step: state_of.update({step: float(state.step)}))
    lines = entries(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 5]
    names = {"model/loss", "model/grad_norm", "error", "scale", "steps_per_s", "examples_per_s", "input_s"}
    assert set(lines[0]) == {"step", *names, "model/drift_slow", "model/drift_edm"}
    single = entries_of_single_steps(tmp_path)
    for start, line in zip((0, 2, 4), lines, strict=True):
        window = [single[index]["model/loss"] for index in range(start, line["step"])]
        assert line["model/loss"] == pytest.approx(np.mean(window), rel=1e-6)
        assert line["examples_per_s"] == pytest.approx(8 * line["steps_per_s"])
    assert state_of == {step: float(step) for step in range(1, 6)}


def entries_of_single_steps(tmp_path):
    run(tmp_path / "single", experiment=toys.experiment(5, log_every=1))
    return entries(tmp_path / "single")


def test_lines_of_steps_that_run_again_are_dropped(tmp_path):
    run(tmp_path, experiment=toys.experiment(4, log_every=1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "model/loss": 77}\n{"step": 6, "mod')
    run(tmp_path, experiment=toys.experiment(6, log_every=1))
    lines = entries(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[4]["model/loss"] != 77


def test_tensorboard_gets_the_same_numbers(tmp_path):
    run(tmp_path)
    content = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"model/loss" in content and b"examples_per_s" in content


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    run(tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("first step after ") for line in lines)
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["2/6", "4/6", "6/6"]
    assert all("model/loss" in line and line.endswith("steps/s") for line in steps)


def test_all_devices_agree_with_one(tmp_path):
    one = run(tmp_path / "one")
    four = train(toys.experiment(6), tmp_path / "four", mesh=sharding.make_mesh(devices=jax.devices()[:4]))
    for path, value in toys.leaves(one.state).items():
        np.testing.assert_allclose(toys.leaves(four.state)[path], value, rtol=1e-5, atol=1e-5, err_msg=path)


def test_on_open_is_called_for_a_workdir_that_may_be_used(tmp_path):
    opened = []
    run(tmp_path, on_open=lambda: opened.append(sorted(path.name for path in tmp_path.iterdir())))
    assert opened == [["config.json"]]
    with pytest.raises(ValueError, match="holds another run"):
        run(tmp_path, experiment=toys.experiment(seed=1), on_open=lambda: opened.append("called"))
    assert len(opened) == 1


def test_another_experiment_in_the_workdir_is_refused_and_nothing_changes(tmp_path):
    run(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="holds another run: config.lr is 0.05 there and 0.1 here; use its settings"):
        run(tmp_path, experiment=toys.experiment(9, config={"lr": 0.1}))
    with pytest.raises(ValueError, match="already holds a run: pass resume=True, or choose another workdir"):
        run(tmp_path, resume=False)
    (tmp_path / "config.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(ValueError, match=r"holds a run but no config.json: choose another workdir"):
        run(tmp_path)
    (tmp_path / "elsewhere.json").rename(tmp_path / "config.json")
    assert snapshot(tmp_path) == before


def test_a_model_that_changed_behind_the_same_config_is_refused(tmp_path):
    run(tmp_path)
    before = snapshot(tmp_path / "checkpoints")
    method = toys.regression()

    def init(key, batch):
        params, aux = method.init(key, batch)
        return {"model": {**params["model"], "bias": params["model"]["scale"]}}, aux

    with pytest.raises(CheckpointMismatch, match="item state: leaf params/model/bias is missing"):
        run(tmp_path, experiment=toys.experiment(9, method=method._replace(init=init)))
    assert snapshot(tmp_path / "checkpoints") == before


def test_workdirs_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"workdir .*file.run cannot be made: .*; choose another folder"):
        run(tmp_path / "file" / "run")
    run(tmp_path, 1)
    (tmp_path / "config.json").write_text("no json")
    with pytest.raises(ValueError, match="config.json is not JSON: restore it, or choose another workdir"):
        run(tmp_path)


def test_a_run_that_failed_before_its_first_log_line_does_not_block_the_workdir(tmp_path):
    def broken(key, batch):
        raise ValueError("cannot be initialised")

    with pytest.raises(ValueError, match="cannot be initialised"):
        run(tmp_path, experiment=toys.experiment(seed=5, method=toys.regression()._replace(init=broken)))
    assert run(tmp_path, 1).step == 1
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0


def test_data_and_mesh_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data gives batches of \[4\], expected 8: batch_size"):
        run(tmp_path / "a", experiment=toys.experiment(data=lambda: toys.Points(4)))
    assert not (tmp_path / "a").exists()
    mesh = sharding.make_mesh(devices=jax.devices()[:4])
    with pytest.raises(ValueError, match="batch_size / accumulate is 2, which does not divide among 4 devices"):
        train(toys.experiment(accumulate=4), tmp_path / "b", mesh=mesh)

    class Short(toys.Points):
        def __next__(self):
            if self.step == 3:
                raise StopIteration
            return super().__next__()

    with pytest.raises(ValueError, match="data ended before step 4: a batch source must be endless"):
        run(tmp_path / "c", experiment=toys.experiment(data=Short))


def test_the_compilation_cache_keeps_every_program(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        enable_compilation_cache(tmp_path / "cache")
        jax.jit(lambda x: x * 3.25 + time.time())(2.0).block_until_ready()
        assert len(list((tmp_path / "cache").iterdir())) >= 1
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.experimental.compilation_cache.compilation_cache.reset_cache()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="compilation cache .* cannot be made: .*; choose another folder"):
        enable_compilation_cache(tmp_path / "file" / "cache")
