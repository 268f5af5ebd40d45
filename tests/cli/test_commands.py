"""The way from train to compare on a tiny run: what files appear, what they hold, and what goes on after a stop."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxdiff import cli
from jaxdiff.data.pairs import stored_pairs
from jaxdiff.methods.base import Sampling
from jaxdiff.metrics.evaluate import METRICS
from jaxdiff.runs import open_run, weights_of
from jaxdiff.settings import UsageError
from jaxdiff.solvers.ddim import ddim
from jaxdiff.solvers.named import SOLVERS
from jaxdiff.training import loop, sharding

SIZES = {"frechet", "kernel", "accuracy", "nearest"}


def run(*words):
    return cli.main([str(word) for word in words])


@pytest.fixture
def copy(places, tmp_path):
    return Path(shutil.copytree(places["run"], tmp_path / "run"))


def rows(folder):
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def test_training_leaves_a_picture_a_log_and_a_record(places):
    folder = Path(places["run"])
    assert Image.open(folder / "samples" / "00000004.png").mode == "RGB"
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()][-1] == 4
    record = json.loads((folder / "run.json").read_text())
    assert record["file"] == places["file"]
    assert record["settings"]["chain_length"] == 12 and record["settings"]["sizes"] == [8, 8]


def test_samples_as_grid_arrays_and_folder_are_the_same_images(places, tmp_path, capsys):
    sample = ["sample", places["run"], "--steps", "2", "--num", "6"]
    for name in ("grid.png", "a.npz", "folder"):
        assert run(*sample, "--out", tmp_path / name) == 0
        assert f"6 samples of digits_mlp, step 4, parameters slower in {tmp_path / name}" in capsys.readouterr().out
    assert run(*sample, "--out", tmp_path / "small.npz", "--batch-size", "4") == 0
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "small.npz") as small:
        images, labels = a["arr_0"], a["arr_1"]
        # Other batches only change the noise that a stochastic sampler draws on the way, from the second batch on.
        assert (small["arr_0"][:4] == images[:4]).all()
    assert images.shape == (6, 8, 8, 1) and images.dtype == np.uint8 and len(np.unique(images)) > 20
    assert labels.tolist() == [0, 1, 2, 3, 4, 5]
    files = sorted((tmp_path / "folder").iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(6)]
    assert (np.stack([np.asarray(Image.open(file)) for file in files]) == images[..., 0]).all()
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    factor = grid.shape[1] // 28  # three columns of 8 pixels and four gaps of 1
    assert grid.shape == (19 * factor, 28 * factor, 3)
    assert (grid[factor : 9 * factor : factor, factor : 9 * factor : factor, 0] == images[0, ..., 0]).all()


def test_overwriting_a_folder_leaves_no_old_samples(places, tmp_path):
    sample = ["sample", places["run"], "--steps", "1", "--out", tmp_path / "folder"]
    assert run(*sample, "--num", "6") == 0
    assert run(*sample, "--num", "2", "--overwrite") == 0
    assert sorted(file.name for file in (tmp_path / "folder").iterdir()) == ["000000.png", "000001.png"]


def test_options_reach_the_sampler(places, tmp_path):
    def images(*options):
        out = tmp_path / "a.npz"
        assert run("sample", places["run"], "--num", "4", "--out", out, "--overwrite", *options) == 0
        with np.load(out) as file:
            return file["arr_0"].astype(int), file["arr_1"].tolist()

    ddim = ["--steps", "3", "--solver", "ddim"]
    plain, labels = images(*ddim)
    assert labels == [0, 1, 2, 3]
    assert (images(*ddim)[0] == plain).all()
    assert images(*ddim, "--class", "7")[1] == [7, 7, 7, 7]
    changes = ["--class 7", "--seed 1", "--eta 1", "--guidance 40", "--ema raw"]
    for options in [*(change.split() for change in changes), ["--steps", "2"], ["--solver", "heun"]]:
        assert np.abs(images(*ddim, *options)[0] - plain).max() > 0, options


def test_evaluate_adds_rows_that_say_what_was_measured(copy, capsys):
    command = [
        "evaluate",
        copy,
        "--num",
        "8",
        "--steps",
        "4",
        "--solver",
        "heun",
        "--metrics",
        "frechet,nearest,accuracy",
    ]
    assert run(*command, "--guidance", "1.5", "--seed", "3") == 0
    said = capsys.readouterr().out
    assert "digits_mlp, step 4, parameters slower; sampler heun, steps 4, calls 7, guidance 1.5, seed 3" in said
    assert run("evaluate", copy, "--num", "4", "--metrics", "nearest") == 0
    first, second, third, last = rows(copy)
    assert [row["metric"] for row in (first, second, third, last)] == ["frechet", "nearest", "accuracy", "nearest"]
    assert (first["n"], first["reference"], first["preprocessing"]) == (8, "digits held-out (n=360)", "clip to [-1, 1]")
    assert first["extractor"].startswith("digits") and second["reference"] == "train (n=1437)"
    assert (first["sampler"], first["steps"], first["calls"], first["guidance"], first["seed"]) == (
        "heun",
        4,
        7,
        1.5,
        3,
    )
    assert (last["n"], last["sampler"], last["steps"]) == (4, None, None)
    assert 0 <= third["value"] <= 1 and f"frechet {first['value']:.4g}" in said


def test_pairs_are_noise_and_what_the_sampler_makes_of_it(places, tmp_path, capsys):
    made = ["pairs", places["run"], "--solver", "ddim", "--steps", "2", "--num", "10", "--dtype", "float32"]
    assert run(*made, "--out", tmp_path / "a", "--batch-size", "4") == 0
    assert "10 pairs of digits_mlp, step 4, parameters slower" in capsys.readouterr().out
    source = stored_pairs(tmp_path / "a")
    rows = [source[i] for i in range(len(source))]
    x0, noise, label = (np.stack([row[name] for row in rows]) for name in ("x0", "noise", "label"))
    assert noise.shape == (10, 8, 8, 1) and abs(noise.mean()) < 0.2 and abs(noise.std() - 1) < 0.2
    assert len(set(label.tolist())) > 2 and len(np.unique(noise[:, 0, 0])) == 10
    experiment = open_run(places["run"])
    params, aux, _, _ = weights_of(experiment, places["run"], None, sharding.single_device())
    sampler = Sampling(2, lambda schedule: ddim(schedule, 0.0))
    cond = {"label": jnp.asarray(label)}
    again = experiment.method.generate(params, aux, jax.random.key(5), jnp.asarray(noise), cond, sampler)
    np.testing.assert_allclose(x0, again, atol=1e-5)
    assert run(*made, "--out", tmp_path / "b", "--batch-size", "4", "--class", "3") == 0
    other = stored_pairs(tmp_path / "b")
    assert {int(other[i]["label"]) for i in range(10)} == {3} and (other[9]["noise"] == noise[9]).all()


def test_pairs_are_refused_of_a_stochastic_sampler_and_to_a_folder_in_use(places, tmp_path, capsys):
    made = ["pairs", places["run"], "--steps", "4", "--num", "4", "--out"]
    assert run(*made, tmp_path / "a", "--solver", "ancestral") == 2
    assert "different samples of the same noise" in capsys.readouterr().err and not (tmp_path / "a").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_text("")
    assert run(*made, tmp_path / "b", "--solver", "ddim") == 2
    assert "--out" in (said := capsys.readouterr().err) and "is in use; write pairs to an empty folder" in said


def test_compare_writes_a_table_with_the_floor_first(copy, capsys):
    assert run("compare", copy, "--calls", "4,1") == 0
    text = (copy / "compare.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    head, _, floor, *samplers = lines
    assert head == ["sampler", "calls", "n", "frechet", "kernel", "accuracy", "nearest"]
    assert floor[:3] == ["real training images", "", "32"]
    # Heun's 4 calls are 2 steps, whose 3 calls are the most that fit.
    assert [line[:3] for line in samplers] == [
        ["ddim", "4", "32"], ["ddim", "1", "32"], ["heun", "3", "32"], ["heun", "1", "32"],
    ]  # fmt: skip
    assert float(floor[3]) < min(float(line[3]) for line in samplers)
    assert "mean of 8 random subsets (frechet " in text and "nearest is there that of the held-out images" in text
    assert text.strip() in capsys.readouterr().out
    assert {row["metric"] for row in rows(copy)} == SIZES and len(rows(copy)) == 16
    assert Image.open(copy / "compare.png").size[0] >= 384 and (copy / "grid.png").is_file()


def test_training_goes_on_where_it_stopped(places, tmp_path, capsys):
    def weights(folder, step=None):
        found = weights_of(open_run(folder), folder, None, sharding.single_device(), step=step)
        return jax.device_get(found[0])

    whole, halved = tmp_path / "whole", tmp_path / "halved"
    assert run("train", places["file"], "--workdir", whole, "--set", "num_steps=6") == 0
    assert run("train", places["file"], "--workdir", halved, "--set", "num_steps=3") == 0
    third = weights(halved)
    capsys.readouterr()
    assert run("train", places["file"], "--workdir", halved, "--set", "num_steps=6") == 0
    assert "continued from the checkpoint of step 3" in capsys.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, weights(halved), weights(whole))
    jax.tree.map(np.testing.assert_array_equal, weights(halved, step=3), third)
    with pytest.raises(UsageError, match="run .*halved: .*5"):
        weights(halved, step=5)
    assert run("train", places["file"], "--workdir", halved, "--set", "num_steps=6") == 0
    assert "all 6 steps are done" in capsys.readouterr().err


def test_a_stopped_training_returns_130(places, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train", lambda *args, **options: loop.Outcome(None, 1, "SIGINT"))
    assert run("train", places["file"], "--workdir", tmp_path / "w") == 130


def test_a_failed_run_returns_1_and_one_line(places, tmp_path, capsys):
    capsys.readouterr()
    assert run("train", places["file"], "--workdir", tmp_path / "w", "--set", "lr=1e38") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and "not finite" in last and "lower the learning rate" in last


def test_info_prints_the_costs(places, capsys):
    assert run("info", places["file"], "--mesh", "data=2,fsdp=2") == 0
    said = capsys.readouterr().out
    assert "digits_mlp: 8 examples of 8x8x1 a step, on data=2, fsdp=2" in said
    assert "M parameters (" in said and "FLOP an example" in said and "activations " in said


@pytest.mark.parametrize("command", ["", "train", "sample", "pairs", "evaluate", "compare", "info"])
def test_help_fits_a_terminal_and_names_every_choice(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*filter(None, [command]), "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: jaxdiff") and max(map(len, said.splitlines())) <= 120
    if command in ("sample", "evaluate", "compare"):
        assert all(f" {name}" in said for name in SOLVERS)
    if command == "evaluate":
        assert all(f" {name}" in said for name in METRICS)
