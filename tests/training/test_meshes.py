"""Meshes of eight devices and of two processes; both need processes of their own, as this one has four devices."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import two_processes

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def environment(devices):
    quick_compile = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    flags = f"{quick_compile} --xla_force_host_platform_device_count={devices}"
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}


@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_eight_devices(marked):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(HERE / "eight_devices.py"),
        "-m",
        marked,
    ]
    ran = subprocess.run(command, cwd=ROOT, env=environment(8), capture_output=True, text=True)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    assert " passed" in ran.stdout


def test_two_processes_sample_and_judge_as_one(tmp_path):
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = str(listener.getsockname()[1])
    command = [sys.executable, str(HERE / "two_processes.py"), port, str(tmp_path)]
    workers = [
        subprocess.Popen([*command, str(i)], env=environment(4), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for i in range(2)
    ]
    try:
        said = [worker.communicate(timeout=240)[0].decode() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(said)
    expected = two_processes.alone()
    for i in range(2):
        with np.load(tmp_path / f"{i}.npz") as got:
            np.testing.assert_allclose(got["samples"], expected["samples"], rtol=0, atol=1e-6)
            assert int(got["n"]) == int(expected["n"])
            for name in ("mean", "scatter"):
                np.testing.assert_allclose(got[name], expected[name], rtol=1e-12, atol=1e-12, err_msg=name)
            assert "different extractors, this one" in str(got["refusal"])
            assert "mesh has devices of other processes" in str(got["foreign"])
