"""The record of a run: written, read back, and refused when damaged or unsafe."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdiff import runs
from jaxdiff.cli import main
from jaxdiff.networks.base import init_params
from jaxdiff.networks.unet import UNet, example_inputs
from jaxdiff.pretrained import folders
from jaxdiff.pretrained.kinds import Spec
from jaxdiff.settings import UsageError

TOY = Path(__file__).parents[1] / "experiments" / "toy_ddpm.py"


@pytest.fixture
def recorded(tmp_path):
    experiment = runs.experiment_from(TOY, ["smoke=true", "lr=0.1"])
    folder = tmp_path / "run"
    folder.mkdir()
    runs.write_record(folder, TOY, experiment)
    return folder, experiment


def test_a_run_opens_as_what_it_was(recorded):
    folder, experiment = recorded
    opened = runs.open_run(folder)
    assert opened.describe() == experiment.describe()
    assert opened.config["lr"] == 0.1 and opened.config["features"] == 128
    assert runs.source_of(folder) == TOY


def test_lists_in_the_record_are_tuples_again(recorded):
    folder, experiment = recorded
    runs.write_record(folder, TOY, dataclasses.replace(experiment, config={"sizes": (1, 2)}))
    assert runs.read_record(folder).settings == {"sizes": (1, 2)}


def test_a_changed_file_is_noticed(recorded, tmp_path):
    folder, _ = recorded
    assert runs.changed(folder, TOY) is None
    assert runs.changed(tmp_path, TOY) is None
    other = tmp_path / "toy_ddpm.py"
    other.write_text(TOY.read_text() + "\n")
    assert "toy_ddpm.py has changed since" in runs.changed(folder, other)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"file": 3, "sha256": "", "settings": {}}', '{"file": "a", "sha256": "", "settings": 5}', "\x00"],
)
def test_damaged_records_are_refused(recorded, text):
    folder, _ = recorded
    (folder / "run.json").write_text(text)
    for use in (runs.open_run, runs.check_workdir):
        with pytest.raises(UsageError, match=r"run.json is damaged, expected JSON with file, sha256 and settings"):
            use(folder)


def test_code_inside_a_run_folder_is_not_run_unasked(recorded):
    folder, _ = recorded
    trap = folder / "trap.py"
    trap.write_text("from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\n")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"file": str(folder / "sub" / ".." / "trap.py")}))
    with pytest.raises(UsageError, match="names code inside the run folder"):
        runs.open_run(folder)
    assert not trap.with_suffix(".ran").exists()


def test_averages_by_name(recorded):
    _, experiment = recorded
    assert runs.average_name(experiment, None) == "ema"
    assert runs.average_name(experiment, "raw") == "raw"
    assert runs.average_name(dataclasses.replace(experiment, ema=()), None) == "raw"
    with pytest.raises(UsageError, match="has no EMA 'emma'; did you mean 'ema'"):
        runs.average_name(experiment, "emma")


def test_a_teacher_is_a_run(tmp_path):
    folder = tmp_path / "run"
    assert main(["train", str(TOY), "--workdir", str(folder), "--set", "smoke=true"]) == 0
    jax.tree.map(np.testing.assert_array_equal, runs.teacher_params(folder), runs.player_params(folder))
    raw = runs.player_params(folder, average="raw")
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), runs.teacher_params(folder), raw)
    assert any(jax.tree.leaves(changed)), "a teacher is the moving average"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_teacher_is_a_folder_of_imported_weights_in_float32(tmp_path, dtype):
    unet = UNet(base_channels=32, channel_mult=(1,), num_res_blocks=1)
    params = init_params(unet, jax.random.key(0), *example_inputs(unet))
    folders.export_weights("openai-unet", Spec(unet), params, tmp_path / "unet.safetensors")
    config = {"model_channels": 32, "out_channels": 3, "num_res_blocks": 1, "channel_mult": [1]}
    config |= {"attention_resolutions": [], "num_heads": 1, "use_scale_shift_norm": False}
    folders.import_weights("openai-unet", tmp_path / "unet.safetensors", tmp_path / "unet", config=config, dtype=dtype)
    loaded = runs.teacher_params(tmp_path / "unet")
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), loaded, params)
    with (tmp_path / "unet" / "params.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(UsageError, match="^teacher: .*params.safetensors"):
        runs.teacher_params(tmp_path / "unet")


def test_a_teacher_that_is_neither_is_refused(tmp_path):
    with pytest.raises(UsageError, match="neither a run nor imported weights; train it with: .*, or get it with: "):
        runs.teacher_params(tmp_path)
    for name in ("unet", "vae"):
        (tmp_path / name).mkdir()
        (tmp_path / name / folders.NETWORK).write_text("{}")
    with pytest.raises(UsageError, match="holds several networks; name one of unet, vae"):
        runs.teacher_params(tmp_path)
