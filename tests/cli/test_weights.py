"""`jaxdiff import`, `export` and `inspect`: round trips through the command line, and what they refuse."""

import json
import math

import numpy as np
import pytest

from jaxdiff.cli import main
from jaxdiff.networks.unet import UNet
from jaxdiff.pretrained import files, folders
from jaxdiff.pretrained.catalog import KINDS
from jaxdiff.pretrained.diffusers_write import unet_config
from jaxdiff.pretrained.kinds import Spec, released

UNET = UNet(base_channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4, attention_factors=(2,))


def drawn(name, network):
    """A state dict of small numbers under the names of a kind."""
    import jax

    random = np.random.default_rng(0)
    kind = KINDS[name]
    params = jax.tree.map(lambda a: random.standard_normal(a.shape, np.float32), kind.shapes(network))
    return {tensor: np.asarray(array) for tensor, array in released(kind, Spec(network), params).items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder as diffusers saves it."""
    folder = tmp_path_factory.mktemp("published")
    files.write(folder / "diffusion_pytorch_model.safetensors", drawn("diffusers-unet", UNET))
    (folder / "config.json").write_text(json.dumps(unet_config(UNET)))
    return folder


@pytest.fixture(scope="module")
def ours(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported") / "unet"
    assert main(["import", "diffusers-unet", str(model), str(folder)]) == 0
    return folder


def test_a_diffusers_folder_goes_in_and_comes_out_the_same(model, ours, tmp_path, capsys):
    assert main(["export", "diffusers-unet", str(ours), str(tmp_path / "out")]) == 0
    assert "tensors as diffusers-unet" in capsys.readouterr().out
    name = "diffusion_pytorch_model.safetensors"
    before, after = files.read(model / name), files.read(tmp_path / "out" / name)
    assert before.keys() == after.keys()
    assert all(before[n].tobytes() == after[n].tobytes() for n in before)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == unet_config(UNET)


def test_another_form_of_the_same_network(ours, tmp_path):
    file = tmp_path / "ldm.safetensors"
    assert main(["export", "compvis-unet", str(ours), str(file)]) == 0
    theirs = KINDS["compvis-unet"].translate(UNET).entries
    assert files.read(file).keys() == {name for entry in theirs for name in entry.names}


def test_the_kind_is_guessed(model, tmp_path, capsys):
    assert main(["import", "auto", str(model), str(tmp_path / "ours"), "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("diffusers-unet (its own configuration): ") and ", bfloat16, in " in out
    assert {a.dtype.name for a in files.read(tmp_path / "ours" / folders.PARAMS).values()} == {"bfloat16"}


def test_inspect_describes_a_file_a_folder_and_a_kind(model, ours, capsys):
    assert main(["inspect", str(model)]) == 0
    out = capsys.readouterr().out
    assert "UNet2DModel (diffusers)" in out and "float32" in out
    assert main(["inspect", str(ours)]) == 0
    assert capsys.readouterr().out.startswith("unet: diffusers-unet, ")
    assert main(["inspect", "ddgan-discriminator"]) == 0
    out = capsys.readouterr().out
    assert "12.742 M" in out and "27.737 M" in out


def test_weights_of_a_run_are_exported(run_with_unet, tmp_path):
    assert main(["export", "diffusers-unet", str(run_with_unet), str(tmp_path / "out")]) == 0
    assert main(["import", "diffusers-unet", str(tmp_path / "out"), str(tmp_path / "ours")]) == 0
    assert main(["export", "diffusers-unet", str(run_with_unet), str(tmp_path / "raw"), "--average", "raw"]) == 0
    name = "diffusion_pytorch_model.safetensors"
    averaged, raw = files.read(tmp_path / "out" / name), files.read(tmp_path / "raw" / name)
    assert averaged.keys() == raw.keys()
    assert any(averaged[n].tobytes() != raw[n].tobytes() for n in raw)


EXPERIMENT = '''
"""A small UNet, trained for a moment."""

import jax.numpy as jnp
import optax

from jaxdiff import schedules
from jaxdiff.data.images import digits
from jaxdiff.data.pipeline import batches
from jaxdiff.methods.ddpm import ddpm
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.unet import UNet, example_inputs
from jaxdiff.training import ema
from jaxdiff.training.experiment import Experiment


def build(*, num_steps: int = 2):
    unet = UNet(
        in_channels=1, out_channels=1, base_channels=8, channel_mult=(1,), num_res_blocks=1, norm_groups=4,
        num_classes=10,
    )
    return Experiment(
        name="small",
        method=ddpm(
            as_network(unet),
            schedules.cosine_betas(8),
            init_params=lambda key, batch: init_params(unet, key, *example_inputs(unet)),
        ),
        networks={"model": unet},
        data=lambda: batches(digits("train"), batch_size=4, seed=0),
        optimizers={"model": optax.adam(1e-2)},
        ema=(ema.constant("ema", 0.5),),
        sample_shape=(8, 8, 1),
        num_classes=10,
        batch_size=4,
        num_steps=num_steps,
        checkpoint_every=2,
    )
'''


@pytest.fixture(scope="module")
def run_with_unet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "small.py").write_text(EXPERIMENT)
    assert main(["train", str(folder / "small.py"), "--workdir", str(folder / "run")]) == 0
    return folder / "run"


def broken(model, **changes):
    """A copy of the published tensors with some replaced (None: left out)."""
    state = dict(files.read(model / "diffusion_pytorch_model.safetensors")) | changes
    return {name: array for name, array in state.items() if array is not None}


def test_damaged_weights_are_refused_and_leave_nothing(model, tmp_path, capsys):
    weights = model / "diffusion_pytorch_model.safetensors"
    state = files.read(weights)
    nan = np.array(state["conv_in.weight"])
    nan[0, 0, 0, 0] = math.nan
    cases = {
        "missing": (broken(model, **{"conv_in.weight": None}), r"1 missing (conv_in.weight)"),
        "unexpected": (broken(model, extra=np.zeros(3)), "1 unexpected (extra)"),
        "shape": (
            broken(model, **{"conv_in.bias": np.zeros(9)}),
            "1 wrongly shaped (conv_in.bias (9,), expected (8,))",
        ),
        "nan": (broken(model, **{"conv_in.weight": nan}), "NaN or infinite numbers in conv_in.weight"),
        "other": ({"x.weight": np.zeros((2, 2))}, "missing"),
    }
    for name, (tensors, text) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        files.write(folder / weights.name, tensors)
        (folder / "config.json").write_text((model / "config.json").read_text())
        assert main(["import", "diffusers-unet", str(folder), str(tmp_path / "out")]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and text in message
        assert sorted(entry.name for entry in tmp_path.iterdir() if "out" in entry.name) == []


BAD = {
    "no such kind": (["import", "diffusers-unit", "{model}", "{out}"], "unknown kind 'diffusers-unit'"),
    "no such file": (["import", "auto", "{out}/nothing.pt", "{out}2"], "is not there"),
    "a text": (["import", "auto", "{model}/config.json", "{out}"], "is JSON without a weight_map"),
    "no such dtype": (["import", "auto", "{model}", "{out}", "--dtype", "int8"], "dtype must be one of float32"),
    "no such configuration": (
        ["import", "edm", "{file}", "{out}", "--config", "edm-cifar"],
        "did you mean 'edm-cifar10",
    ),
    "configuration is no file": (["import", "edm", "{file}", "{out}", "--config", "x.json"], "--config x.json is not"),
    "another family": (["import", "dit", "{file}", "{out}"], "as dit: no published configuration fits"),
    "out is taken": (["import", "auto", "{model}", "{model}"], "exists and is not an empty folder"),
    "out has no parent": (["import", "auto", "{model}", "{out}/a/b"], "there is no folder"),
    "everything skipped": (["import", "auto", "{model}", "{out}", "--skip", ""], "nothing is left without the names"),
    "no average": (["import", "diffusers-unet", "{model}", "{out}", "--ema"], "has no model_ema."),
    "base without lora": (["import", "auto", "{model}", "{out}", "--base", "x"], "--base is for import lora"),
    "lora without base": (["import", "lora", "{file}", "{out}"], "needs --base"),
    "no lora in it": (["import", "lora", "{file}", "{out}", "--base", "{ours}"], "holds no LoRA, got names such as"),
    "the same file twice": (
        ["import", "diffusers-unet", "{file}", "{file}", "{out}"],
        "which the files before it hold",
    ),
    "one form for another": (
        ["export", "clip-text", "{ours}", "{out}.safetensors"],
        "clip-text is for ClipText, this network is a UNet",
    ),
    "not imported": (["export", "diffusers-unet", "{model}", "{out}"], "neither imported weights nor a run"),
    "file is taken": (["export", "diffusers-unet", "{ours}", "{file}"], "exists; choose another name"),
    "no safetensors": (["export", "openai-unet", "{ours}", "{out}.pt"], "give a name ending in .safetensors"),
    "no bundle": (["export", "compvis", "{ours}", "{out}.safetensors"], "holds no imported networks"),
    "inspect nothing": (["inspect", "{out}"], "is neither a file nor a kind of weights"),
    "no files": (["import", "auto", "{out}"], "the following arguments are required"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals_are_one_line_and_leave_nothing(name, model, ours, tmp_path, capsys):
    words, text = BAD[name]
    places = {"model": model, "ours": ours, "out": tmp_path / "out"}
    places["file"] = model / "diffusion_pytorch_model.safetensors"
    assert main([word.format(**places) for word in words]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and text in message
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_was_changed_is_refused(ours, tmp_path, capsys):
    import shutil

    for content, text in (("{", "is not a JSON object"), ('{"kind": "x", "config": {}}', "expected a known kind")):
        folder = tmp_path / "copy"
        shutil.copytree(ours, folder)
        (folder / folders.NETWORK).write_text(content)
        assert main(["inspect", str(folder)]) == 2
        assert text in capsys.readouterr().err
        shutil.rmtree(folder)
