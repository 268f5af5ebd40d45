"""Where checkpoints lie: full disks, folders that cannot be written, buckets, and several processes at one folder."""

import contextlib
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import training_toys as toys
from etils import epath
from jax.experimental import multihost_utils

from jaxdiff.training.checkpoint import CheckpointError, CheckpointMismatch, Checkpoints, as_path, load_weights
from jaxdiff.training.checkpoint_errors import together
from jaxdiff.training.state import create_state

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


@contextlib.contextmanager
def files_below(size):
    """No file of this process can grow beyond `size` bytes meanwhile: what a write to a full disk looks like."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", [0, 300, 1500], ids=["nothing", "little", "all but the largest file"])
def test_a_disk_without_room_is_one_line_and_the_last_checkpoint_survives(folder, size):
    with pytest.raises(CheckpointError, match="^checkpoint 4: cannot be written, file too large: make room") as caught:
        with files_below(size), Checkpoints(folder, max_to_keep=1) as checkpoints:  # until all its threads have ended
            save(checkpoints, 4, make_state())
            checkpoints.wait()
    assert len(str(caught.value)) < 120
    assert int(read_newest(folder).state.step) == 3


@contextlib.contextmanager
def powerless():
    """An administrator may write into folders that are read-only; so nobody, not the administrator, runs the body."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_a_read_only_folder_is_one_line_and_can_still_be_read(folder):
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders cannot even be entered by others
        os.chmod(place, 0o755)
        copy = shutil.copytree(folder, Path(place) / "copy")
        os.chmod(copy, 0o555)
        with powerless():
            with pytest.raises(CheckpointError, match="^.*/copy is not accessible, permission denied: change its perm"):
                Checkpoints(copy)
            with pytest.raises(CheckpointError, match="is not accessible, permission denied"):
                Checkpoints(copy / "deeper")
            assert load_weights(RUN, copy)[1] == 3
        os.chmod(copy, 0o755)


def test_a_file_system_that_goes_away_while_saving_is_an_error_and_the_rest_is_found_later(folder):
    state = make_state()
    state = state.replace(aux={"error": jax.random.normal(jax.random.key(0), (2**22,))})
    away = folder.parent / "away"
    with pytest.raises(CheckpointError, match="^checkpoint 4: ") as caught:
        with Checkpoints(folder) as checkpoints:
            save(checkpoints, 4, state)
            folder.rename(away)
            folder.write_text("no folder any more")
            checkpoints.wait()
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)
    assert int(read_newest(away).state.step) == 3


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: a file is where a folder is expected"):
        Checkpoints(tmp_path / "file")


def test_addresses_keep_their_slashes():
    address = "gs://bucket/run/checkpoints"
    assert isinstance(as_path(address), epath.Path) and os.fspath(as_path(address)) == address
    assert os.fspath(as_path(as_path(address)) / "3") == address + "/3"
    assert as_path("runs/a") == Path.cwd() / "runs" / "a" and isinstance(as_path(Path("runs")), Path)
    with pytest.raises(ValueError, match="ftp://host/run: no way to reach such an address is known, use gs://"):
        as_path("ftp://host/run")
    with pytest.raises(ValueError, match="gs:/bucket was an address before pathlib.Path took a slash away"):
        as_path(Path("gs://bucket"))


class Bucket(type(epath.backend.os_backend)):
    """The file functions of epath on a folder that plays the bucket; notes every address it is asked for."""

    def __init__(self, root):
        self.root, self.asked = root, []

    def _local(self, path):
        assert str(path).startswith("s3://bucket")
        self.asked.append(str(path))
        return str(path).replace("s3://bucket", str(self.root), 1)


def _redirected(name):
    def call(self, path, *args, **options):
        return getattr(super(Bucket, self), name)(self._local(path), *args, **options)

    return call


for _name in ("open", "exists", "isdir", "listdir", "stat", "mkdir", "makedirs"):
    setattr(Bucket, _name, _redirected(_name))


def test_steps_and_descriptions_are_read_from_a_bucket(folder, monkeypatch):
    bucket = Bucket(folder)
    monkeypatch.setitem(epath.gpath._PREFIX_TO_BACKEND, "s3", bucket)
    with Checkpoints("s3://bucket", create=False) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3]
        assert checkpoints.meta(2)["step"] == 2 and checkpoints.data(2) == {"step": 2}
        assert os.fspath(checkpoints.folder) == "s3://bucket"
    assert "s3://bucket/2/meta/metadata" in bucket.asked
    with pytest.raises(CheckpointMismatch, match="name is 'toy' there and 'other' here"):
        load_weights(toys.experiment(name="other"), "s3://bucket")


def test_an_error_of_one_process_is_an_error_of_all(monkeypatch):
    flags = []
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda flag: flags.append(int(flag)) or [0, flag, 1])
    with pytest.raises(CheckpointError, match="^checkpoint 3, item state: process 2 failed, see its log$"):
        with together(3, "state"):
            pass
    with pytest.raises(CheckpointError, match="^checkpoint 3, item state: cannot be read, KeyError: 'a'$"):
        with together(3, "state"):
            raise KeyError("a")
    assert flags == [0, 1]


WORKER = """
import logging, sys
from pathlib import Path
import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxdiff.training import sharding
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.checkpoint_errors import together
from jaxdiff.training.state import create_state
import training_toys as toys

address, index, folder = sys.argv[1:]
logging.basicConfig(stream=sys.stdout, format="%(name)s %(message)s")
jax.distributed.initialize(address, 2, int(index))
run, folder, batch = toys.experiment(), Path(folder), next(toys.Points())
about = {"experiment": run.describe(), "batch": batch}
mesh = sharding.make_mesh(1, 2)
state = create_state(run.method, run.optimizers, run.ema, jax.random.key(0), batch, mesh=mesh)
split = jax.NamedSharding(mesh, jax.P("fsdp"))
like = state.replace(aux={"error": jax.make_array_from_callback((64, 4), split, lambda at: np.ones((64, 4))[at])})
with Checkpoints(folder) as checkpoints:
    for step in (1, 2, 3):
        checkpoints.save(step, like.replace(step=like.step + step), data={"step": step}, **about)
    checkpoints.wait()
    if index == "0":
        (folder / "3" / "meta" / "metadata").write_text("{")

    def read(step):
        with together(step, "state"):
            if step == 2 and index == "1":
                raise OSError("the disk of one process")
        return checkpoints.restore(step, like, run.describe())

    multihost_utils.sync_global_devices("damaged")
    restored = checkpoints.newest(read, set_aside=True)
    print("RESULT", int(restored.state.step), restored.data, checkpoints.steps())
"""


@pytest.mark.slow
def test_two_processes_agree_on_the_checkpoint_they_start_from(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    paths = os.pathsep.join([*sys.path, str(Path(toys.__file__).parent)])
    environment = os.environ | {"PYTHONPATH": paths, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    command = [sys.executable, "-c", WORKER, address]
    workers = [
        subprocess.Popen([*command, str(index), str(tmp_path)], env=environment, stdout=-1, stderr=-2, text=True)
        for index in range(2)
    ]
    said = [worker.communicate(timeout=300)[0] for worker in workers]
    for index, text in enumerate(said):
        assert "RESULT 1 {'step': 1} [1]" in text, text
        assert "checkpoint 3, item meta: a JSON file in it is cut or garbled; trying the one before" in text
        assert ("process 1 failed, see its log" if index == 0 else "the disk of one process") in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2.damaged1", "3.damaged1"]
