"""Joining other processes: what is asked of the environment, and one line for what is wrong with it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from jaxdiff.training import distributed

ROOT = Path(__file__).parents[2]
COORDINATOR, COUNT, INDEX = distributed.VARIABLES
CLUSTER = ("SLURM_", "OMPI_", "PMIX_", "KUBERNETES_", "TPU_", "MEGASCALE_")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in list(os.environ):
        if name.startswith(CLUSTER) or name in distributed.VARIABLES:
            monkeypatch.delenv(name)


def give(monkeypatch, *values):
    for name, value in zip(distributed.VARIABLES, values, strict=True):
        if value is not None:
            monkeypatch.setenv(name, value)


def test_one_process_joins_nobody():
    assert distributed.start("auto") is False
    assert distributed.start("off") is False
    assert not jax.distributed.is_initialized()
    distributed.wait_for_all("nobody")


def test_off_ignores_the_environment(monkeypatch):
    give(monkeypatch, "localhost:1", "2", "1")
    assert distributed.start("off") is False


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((None, "2", "0"), f"{COUNT}, {INDEX} is set but {COORDINATOR} is not: set all three, or none"),
        (("localhost:1", None, None), f"{COORDINATOR} is set but {COUNT} and {INDEX} is not: set all three, or none"),
        (("localhost", "2", "0"), f"{COORDINATOR} takes host:port of process 0, got 'localhost'"),
        (("localhost:x", "2", "0"), f"{COORDINATOR} takes host:port of process 0, got 'localhost:x'"),
        (("localhost:1", "two", "0"), f"{COUNT} takes a whole number, got 'two'"),
        (("localhost:1", "2", "-1"), f"{INDEX} takes a whole number, got '-1'"),
        (("localhost:1", "2", "2"), f"{INDEX} is 2, expected 0 to {COUNT} - 1 = 1"),
        (("localhost:1", "0", "0"), f"{INDEX} is 0, expected 0 to {COUNT} - 1 = -1"),
    ],
)
def test_variables_that_make_no_sense_are_refused(monkeypatch, values, message):
    give(monkeypatch, *values)
    with pytest.raises(ValueError) as caught:
        distributed.start("auto")
    assert str(caught.value) == message


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="distributed takes 'auto' or 'off', got 'on'"):
        distributed.start("on")


def test_a_coordinator_that_does_not_answer(monkeypatch):
    environment = distributed.local_environments(2)[1]
    give(monkeypatch, *(environment[name] for name in distributed.VARIABLES))
    began = time.monotonic()
    with pytest.raises(ConnectionError) as caught:
        distributed.start("auto", timeout_s=1)
    assert time.monotonic() - began >= 1
    address = environment[COORDINATOR]
    assert str(caught.value).startswith(f"process 0 does not answer at {address} after 1 s (")
    assert str(caught.value).endswith(f"start it, or correct {COORDINATOR}")


def test_others_that_do_not_come(tmp_path):
    environment = {**os.environ, **distributed.local_environments(2)[0], "PYTHONPATH": str(ROOT)}
    code = "from jaxdiff.training import distributed; distributed.start('auto', timeout_s=1)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    line = f"error: not all 2 processes at {environment[COORDINATOR]} have come after 1 s: start the others"
    assert done.stderr.splitlines()[-1] == line


def test_slurm_is_seen_and_a_job_of_one_is_alone(monkeypatch):
    assert distributed.cluster_processes() == 1
    job = {"JOB_ID": "7", "STEP_NODELIST": "node[1-3]", "NTASKS": "3", "PROCID": "1", "LOCALID": "0"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert distributed.cluster_processes() == 3
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert distributed.start("auto") is False


def test_local_environments_differ_in_the_index_alone():
    first, second = distributed.local_environments(2)
    assert first.keys() == set(distributed.VARIABLES)
    assert {**first, INDEX: "1"} == second and first[COUNT] == "2"
