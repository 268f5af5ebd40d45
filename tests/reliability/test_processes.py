"""Two processes of `jax.distributed` on this machine train as one does, and stop together when one gets a signal."""

import json
import signal
import socket

import numpy as np
import pytest
import reliability_runs as runs

from jaxdiff.training import distributed, sharding
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.loop import train

QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
DEVICES = {"XLA_FLAGS": f"{QUICK_COMPILE} --xla_force_host_platform_device_count=2"}
STEPS = 12


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process without a break: (losses, final leaves)."""
    workdir = tmp_path_factory.mktemp("alone")
    return losses(workdir, train_alone(workdir, STEPS))


def test_two_processes_train_as_one_and_one_goes_on(tmp_path, alone):
    processes = launch(tmp_path, STEPS - 4, distributed.local_environments(2))
    said = finish(processes, 0)
    # Only process 0 speaks.
    assert "step 8/8" in said[0] and "step " not in said[1] and "goodput" not in said[1]
    assert saved_steps(tmp_path) == [4, 6, 8]
    both, _ = losses(tmp_path, None)
    np.testing.assert_allclose(both, alone[0][: STEPS - 4], rtol=1e-5)

    state = train_alone(tmp_path, STEPS)
    assert_close(losses(tmp_path, state), alone)


def test_two_processes_take_over_from_one_and_stop_together_at_sigterm(tmp_path, alone):
    check_stop(tmp_path, alone, signal.SIGTERM, slurm_environments(2))


@pytest.mark.slow
def test_two_processes_stop_together_at_sigint(tmp_path, alone):
    check_stop(tmp_path, alone, signal.SIGINT, distributed.local_environments(2))


def check_stop(workdir, alone, number, environments):
    """One process trains 2 steps, two go on until one of them gets a signal, one trains the rest."""
    train_alone(workdir, 2)
    processes = launch(workdir, 1000, environments, delay=0.1)
    heard = []
    while not heard or not heard[-1].startswith("step 3/"):
        heard.append(processes[0].stderr.readline())
        assert heard[-1], "".join(heard)
    processes[1].send_signal(number)
    said = finish(processes, 130)
    stopped = int(said[0].split(f"stopped by {number.name} after step ")[1].split(",")[0])
    assert 3 < stopped < 1000
    assert saved_steps(workdir)[-1] == stopped
    for index in (0, 1):
        line = json.loads((workdir / f"outcome_{index}.json").read_text())
        assert line == {"step": stopped, "stopped": number.name}

    # The loss at every step that both have; the run alone is as long as need be.
    both, _ = losses(workdir, None)
    common = min(len(both), STEPS)
    np.testing.assert_allclose(both[:common], alone[0][:common], rtol=1e-5)
    if stopped < STEPS:
        assert_close(losses(workdir, train_alone(workdir, STEPS)), alone)
    else:
        whole = workdir.parent / f"{workdir.name}_whole"
        ours = train_alone(workdir, stopped + 2)
        assert_close(losses(workdir, ours), losses(whole, train_alone(whole, stopped + 2)))


def launch(workdir, num_steps, environments, delay=0.0):
    processes = [runs.start(workdir, num_steps, delay, DEVICES | environment) for environment in environments]
    for process in processes:
        runs.go(process)
    return processes


def finish(processes, code):
    """What the processes say until they end."""
    try:
        said = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code] * len(processes), "\n".join(said)
    return said


def slurm_environments(num_processes):
    """What Slurm sets for a job step on this machine; JAX derives the port from the number of the job."""
    job = next(job for job in range(1000, 2000) if is_free(job % 2**12 + 65536 - 2**12))
    common = {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(num_processes)}
    return [common | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(num_processes)]


def is_free(port):
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) != 0


def train_alone(workdir, num_steps):
    outcome = train(runs.experiment(workdir, num_steps), workdir, mesh=sharding.single_device())
    assert outcome.step == num_steps
    return outcome.state


def losses(workdir, state):
    """(losses of both players by step, leaves of the state)."""
    entries = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    found = np.array([[entry["disc/loss"], entry["model/loss"]] for entry in entries])
    return found, None if state is None else runs.toys.leaves(state)


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for path, value in ours[1].items():
        np.testing.assert_allclose(value, theirs[1][path], rtol=1e-4, atol=1e-6, err_msg=path)


def saved_steps(workdir):
    with Checkpoints(workdir / "checkpoints", create=False, max_to_keep=None) as checkpoints:
        return checkpoints.steps()
