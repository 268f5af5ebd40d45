"""The launchers, run with stand-ins for gcloud, srun and jaxdiff: what is started, logged, stopped and refused."""

import os
import subprocess
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
GCLOUD = """#!/usr/bin/env bash
for word in "$@"; do
  case $word in --command=*) cd "$WORKER_HOME" && HOME=$WORKER_HOME exec bash -c "${word#--command=}" ;; esac
done
echo "gcloud $*"
"""
JAXDIFF = """#!/usr/bin/env bash
trap 'echo saved; exit 130' TERM
printf '<%s>' "$@"; echo
for _ in {1..200}; do sleep 0.05; done
"""


def bash(script, *arguments, env=None):
    base = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *arguments], env=base | (env or {}), capture_output=True, text=True, timeout=60
    )


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def tpu(tmp_path):
    """scripts/tpu_vm.sh with a gcloud that runs what is meant for the workers here."""
    executable(tmp_path / "bin/gcloud", GCLOUD)
    executable(tmp_path / "worker/jaxdiff/.venv/bin/jaxdiff", JAXDIFF)
    env = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "WORKER_HOME": str(tmp_path / "worker"),
        "TPU_NAME": "slice",
        "ZONE": "zone-a",
        "TPU_TYPE": "v4-32",
        "WORKDIR": "gs://bucket/run",
    }
    yield lambda *arguments, **more: bash("tpu_vm.sh", *arguments, env=env | more)
    bash("tpu_vm.sh", "stop", env=env)


def test_scripts_are_valid_bash():
    for script in SCRIPTS.glob("*.sh"):
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0, script.name


def test_cpu_gives_malloc_threads_and_a_device_for_each_core():
    said = bash("cpu.sh", "--dry-run", "jaxdiff", "train", "a b").stdout.splitlines()
    assert f"JAX_NUM_CPU_DEVICES={os.cpu_count()}" in said
    assert {"MALLOC_MMAP_MAX_=0", "MALLOC_ARENA_MAX=1", "OMP_NUM_THREADS=1"} <= set(said)
    assert said[-1].strip() == r"jaxdiff train a\ b"


def test_cpu_keeps_what_is_set_and_runs_the_command():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3", "MALLOC_ARENA_MAX": "4"}
    show = ["sh", "-c", 'echo "$MALLOC_ARENA_MAX $XLA_FLAGS ${JAX_NUM_CPU_DEVICES-none}"; exit 7']
    done = bash("cpu.sh", *show, env=flags)
    expected = "4 --xla_cpu_multi_thread_eigen=false --xla_force_host_platform_device_count=3 none"
    assert (done.returncode, done.stdout.strip()) == (7, expected)
    assert bash("cpu.sh", "printenv", "JAX_NUM_CPU_DEVICES", env={"JAXDIFF_CPU_DEVICES": "3"}).stdout.strip() == "3"


@pytest.mark.parametrize(
    ("script", "arguments", "env", "said"),
    [
        ("cpu.sh", [], {}, "got no command"),
        ("cpu.sh", ["ls"], {"JAXDIFF_CPU_DEVICES": "two"}, "JAXDIFF_CPU_DEVICES must be a whole number"),
        ("slurm.sh", [], {}, "got no experiment"),
        ("tpu_vm.sh", [], {}, "got no action"),
        ("tpu_vm.sh", ["watch"], {}, "variable TPU_NAME is not set"),
        ("tpu_vm.sh", ["destroy"], {"TPU_NAME": "a", "ZONE": "b"}, "unknown action 'destroy'"),
        ("tpu_vm.sh", ["watch", "q"], {"TPU_NAME": "a", "ZONE": "b"}, "watch takes a number of lines or all"),
        ("tpu_vm.sh", ["start", "f"], {"TPU_NAME": "a", "ZONE": "b", "WORKDIR": "runs/a"}, "must be a gs:// folder"),
    ],
)
def test_wrong_use_is_one_line_and_code_2(script, arguments, env, said):
    done = bash(script, *arguments, env=env)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert said in done.stderr


def test_tpu_dry_run_prints_commands_and_runs_none(tpu):
    made = tpu("--dry-run", "create", SPOT="1", PROJECT="p").stdout.split()
    assert made[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "slice"]
    assert {"--zone=zone-a", "--project=p", "--spot", "--accelerator-type=v4-32"} <= set(made)
    for action in ("install", "watch", "resume", "stop", "delete"):
        lines = tpu("--dry-run", action).stdout.splitlines()
        assert {line.split()[0] for line in lines} <= {"gcloud", "tar", "rm"}
        assert all("--zone=zone-a" in line for line in lines if line.startswith("gcloud"))


def test_tpu_start_watch_stop_resume(tpu, tmp_path):
    logs = tmp_path / "worker/jaxdiff/logs"
    assert tpu("resume").returncode == 1
    assert "started" in tpu("start", "my exp.py", "--set", "a=b c").stdout
    until(lambda: "<train>" in (logs / "latest").read_text())
    words = "<train><my exp.py><--set><a=b c><--workdir><gs://bucket/run><--distributed><auto>"
    assert words in tpu("watch").stdout
    assert "already running" in tpu("start", "other.py").stdout
    tpu("stop")
    until(lambda: "saved" in (logs / "latest").read_text())
    until(lambda: "not running" in tpu("stop").stdout)
    tpu("resume")
    until(lambda: len(list(logs.iterdir())) == 3 and words in (logs / "latest").read_text())
    assert "saved" not in tpu("watch", "all").stdout


def test_slurm_requeues_a_run_that_was_stopped_and_nothing_else(tmp_path):
    executable(tmp_path / "srun", '#!/usr/bin/env bash\necho "srun $*"; exit "$CODE"\n')
    executable(tmp_path / "scontrol", '#!/usr/bin/env bash\necho "scontrol $*"\n')
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "9"}
    for code, requeued in (("130", True), ("1", False), ("0", False)):
        done = bash("slurm.sh", "x.py", "--workdir", "w", env=env | {"CODE": code})
        assert done.returncode == int(code)
        assert "train x.py --workdir w --distributed auto" in done.stdout
        assert ("scontrol requeue 9" in done.stdout) == requeued
