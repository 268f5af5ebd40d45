"""Wrong inputs to `train` and `info`: one line, exit code 2, and no folder made or touched."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from jaxdiff.cli import main

# Both commands build the experiment, so both refuse what cannot be built.
BUILD = [
    ("{toy} --set lr", "setting 'lr' has no value", "--set lr=VALUE"),
    ("{toy} --set chain_lenght=10", "unknown setting 'chain_lenght'", "did you mean 'chain_length'?"),
    ("{toy} --set lr=fast", "setting lr must be a finite number, got 'fast'", "--set lr=0.002"),
    ("{toy} --set lr=inf", "setting lr must be a finite number, got 'inf'"),
    ("{toy} --set lr=nan", "setting lr must be a finite number, got 'nan'", "--set lr=0.002"),
    ("{file} --set num_steps=-5", "num_steps must be an integer of at least 1, got -5"),
    ("{toy} --set num_steps=2.5", "setting num_steps must be a whole number, got '2.5'", "--set num_steps=10000"),
    ("{toy} --set smoke=maybe", "setting smoke must be true or false, got 'maybe'", "--set smoke=false"),
    ("{file} --set chain=cosin", "setting chain must be one of cosine, linear, zero_snr, got 'cosin'"),
    ("{file} --set sizes=8,x", "setting sizes must be a comma-separated list (a whole number each), got '8,x'"),
    ("{file} --set chain=linear --set chain_length=10", "linear_betas: betas must lie in (0, 1]", "at least 20"),
    ("{toy} --set chain_length=0", "cosine_betas: betas must be a non-empty list", "use num_steps >= 1"),
    ("{file} --set chain=zero_snr --set output=eps", "does not determine x0", "use v or x0 (not eps)"),
    ("{toy} --set batch_size=0", "batch_size must be an integer of at least 1, got 0"),
    ("{file} --set num_steps=0", "num_steps must be an integer of at least 1, got 0"),
    ("{file} --set accumulate=3", "accumulate must divide batch_size, got 3 and 8"),
    ("{toy} --set seed=-1", "seed must be at least 0, got -1"),
    ("{toy} --set features=2", "an MLP needs at least 4 features", "got features 2"),
    ("{toy} --mesh date=2", "unknown mesh axis 'date'", "did you mean 'data'?"),
    ("{toy} --mesh data=0", "mesh axis data must be a whole number of at least 1, got '0'", "data=2"),
    ("{toy} --mesh data", "mesh axis data must be a whole number of at least 1, got ''", "data=2"),
    ("{toy} --mesh data=2,data=4", "mesh axis data is given twice"),
    ("{file} --mesh data=2,fsdp=2 --set batch_size=6", "batch_size / accumulate is 6", "4 devices"),
    ("{toy}x", "toy_ddpm.pyx does not exist", "did you mean '{toy}'?"),
    ("{tmp}/absent/x.py", "experiment file {tmp}/absent/x.py does not exist", "experiments/digits_ddpm.py"),
    ("{run}", "{run} is a folder", "give a .py file"),
    ("{run}/run.json", "run.json is not Python", "expected a .py file"),
    ("{toy} --sett lr=1", "has no option --sett", "did you mean '--set'?"),
    ("{toy} extra", "no use for 'extra'"),
]
TRAIN = [
    ("train {toy}", "required: --workdir", "jaxdiff train --help"),
    ("train --workdir {tmp}/w", "required: FILE"),
    ("train {toy} --workdir {tmp}/w --mesh data=8", "mesh data=8", "does not fit 4 device(s)", "must be 4"),
    ("train {file} --workdir {tmp}/w --set batch_size=2000", "batch_size 2000 is larger than the data set of 1437"),
    ("train {file} --workdir {tmp}/w --set data=digit", "unknown data 'digit'", "did you mean 'digits'?"),
    ("train {file} --workdir {tmp}/w --set data=folder:{tmp}/no", "{tmp}/no: no such folder", "one subfolder"),
    ("train {file} --workdir {tmp}/w --set data=npz:{tmp}/no.npz", "{tmp}/no.npz"),
    ("train {file} --workdir {run} --set lr=0.5", "{run} holds another run: config.lr is 0.001 there and 0.5 here"),
    ("train {file} --workdir {run} --set batch_size=4", "batch_size is 8 there and 4 here", "another workdir"),
    ("train {toy} --workdir {run} --set smoke=true", "{run} holds another run: name is 'digits_mlp' there"),
    ("train {file} --workdir {torn_record}", "run.json is damaged", "restore it or use another folder"),
    ("train {file} --workdir {torn_config}", "config.json is not JSON", "restore it"),
    ("train {file} --workdir {file}", "workdir {file} is a file, expected a folder", "another name"),
    ("train {file} --workdir {file}/w", "workdir {file}/w cannot be made", "choose another folder"),
]
FILES = {
    "no_build": ("x = 1\n", "has no function build(...)", "returns an Experiment"),
    "none": ("def build(*, lr: float = 1.0):\n    pass\n", "build(...) returned NoneType, expected an Experiment"),
    "syntax": ("def build(:\n", "cannot be imported: SyntaxError", "mend the file"),
    "imports": ("import jaxdif\n", "ModuleNotFoundError: No module named 'jaxdif'"),
    "exits": ("raise SystemExit(0)\n", "cannot be imported: SystemExit"),
    "swallows": ("def build(**options):\n    pass\n", "takes **options, expected settings with names"),
    "required": (
        "def build(*, lr: float):\n    pass\n",
        "setting lr has no default and was not given",
        "--set lr=VALUE",
    ),
    "raises": ("def build():\n    raise KeyError('width')\n", "build(...) failed with KeyError: 'width'"),
    "annotated": (
        "def build(*, lr: 'Rate' = 1):\n    pass\n",
        "annotated with a type that is not defined",
        "import it",
    ),
}


@pytest.mark.parametrize("case", BUILD, ids=[case[0] for case in BUILD])
@pytest.mark.parametrize("command", ["train", "info"])
def test_both_refuse_what_cannot_be_built(refused, command, case):
    template, *needles = case
    refused(f"{command} {template}" + (" --workdir {tmp}/w" if command == "train" else ""), *needles)


@pytest.mark.parametrize("case", TRAIN, ids=[case[0] for case in TRAIN])
def test_train_refuses(refused, case):
    refused(*case)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("command", ["train", "info"])
def test_both_refuse_bad_experiment_files(refused, tmp_path, command, name):
    text, *needles = FILES[name]
    (tmp_path / f"{name}.py").write_text(text)
    options = " --workdir {tmp}/w" if command == "train" else ""
    refused(
        f"{command} {{tmp}}/{name}.py{options}", f"{name}.py" if name not in ("required", "annotated") else "", *needles
    )


def test_train_refuses_a_setting_that_cannot_be_typed(refused, tmp_path):
    (tmp_path / "typed.py").write_text("def build(*, net: dict = {}):\n    pass\n")
    refused("info {tmp}/typed.py --set net=a", "setting net of type dict cannot be typed", "annotate net as int")


def test_train_refuses_a_folder_of_other_things(refused, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "thesis.txt").write_text("mine")
    refused("train {toy} --workdir {tmp}/w", "{tmp}/w is not empty and not a run of jaxdiff", "choose another folder")


def test_train_refuses_a_folder_it_may_not_write(refused, tmp_path, monkeypatch):
    (tmp_path / "w").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path / "w"))
    refused("train {toy} --workdir {tmp}/w --set smoke=true", "workdir {tmp}/w is not writable", "another folder")


def test_train_refuses_bad_image_folders(refused, tmp_path):
    train = "train {file} --workdir {tmp}/w --set data=folder:{tmp}/images"
    images = tmp_path / "images"
    images.mkdir()
    refused(train, "{tmp}/images: no class folders", "one subfolder of images per class")
    (images / "cats").mkdir()
    refused(train, "{tmp}/images/cats: no image files below it", "expected files ending in .png")
    (images / "cats" / "a.png").write_bytes(b"not a picture")
    refused(train, "{tmp}/images/cats/a.png: not a readable image", "remove it")
    (images / "cats" / "a.png").write_bytes(b"")
    refused(train, "{tmp}/images/cats/a.png: the file is empty")


def test_train_refuses_data_without_labels(refused, tmp_path):
    np.savez(tmp_path / "images.npz", images=np.zeros([16, 8, 8, 1], np.uint8))
    refused("train {file} --workdir {tmp}/w --set data=npz:{tmp}/images.npz", "needs labels, and the data set has none")


@pytest.mark.parametrize(("label", "needle"), [(10, "0 to 9"), (-1, "integers >= 0")])
def test_train_refuses_labels_out_of_range(refused, tmp_path, label, needle):
    labels = np.full(16, label, np.int64)
    np.savez(tmp_path / "images.npz", images=np.zeros([16, 8, 8, 1], np.uint8), labels=labels)
    refused("train {file} --workdir {tmp}/w --set data=npz:{tmp}/images.npz", "label", needle)


def test_other_commands_are_refused(refused):
    refused("trian {toy}", "unknown command 'trian'", "did you mean 'train'?")
    refused("", "required: COMMAND", "jaxdiff --help")
    refused("--verbose info", "jaxdiff has no option --verbose", "choose from: --help")


def test_without_a_cache_folder_a_command_goes_on(places, tmp_path, monkeypatch, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    import jax

    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        assert main(["sample", places["run"], "--num", "2", "--steps", "1", "--out", str(tmp_path / "a.png")]) == 0
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert "warning: compilation cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    "template",
    ["trian {file}", "sample {torn_arrays} --out a.png"],
    ids=["before anything is imported", "while other threads read a damaged checkpoint"],
)
def test_a_process_exits_with_2_and_one_line(places, tmp_path, template):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "jaxdiff.cli", *template.format(**places).split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_traceback_is_shown_when_asked_for(monkeypatch):
    monkeypatch.setenv("JAXDIFF_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown command 'trian'"):
        main(["trian"])


def test_a_changed_experiment_file_is_mentioned(places, tmp_path, capsys):
    run = shutil.copytree(places["run"], tmp_path / "run")
    file = tmp_path / "digits_mlp.py"
    file.write_text(open(places["file"]).read() + "\n# another line\n")
    words = ["sample", str(run), "--num", "2", "--steps", "1", "--out", str(tmp_path / "a.png")]
    assert main([*words, "--experiment", str(file)]) == 0
    assert "has changed since" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    assert capsys.readouterr().err == ""
