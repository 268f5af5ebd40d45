"""Two tiny trained runs for the tests of the command line, and copies of one of them with something broken."""

import json
import shutil
from pathlib import Path

import pytest

from jaxdiff.cli import main

TOY = Path(__file__).parents[2] / "experiments" / "toy_ddpm.py"
DIGITS = '''
"""A class-conditional MLP on the embedded digits: images, labels and an evaluation, compiled in a moment."""

from typing import Literal

import jax.numpy as jnp
import optax

from jaxdiff import parameterization, schedules
from jaxdiff.data.images import digits
from jaxdiff.data.named import open_source
from jaxdiff.data.pipeline import batches
from jaxdiff.evaluation import Evaluation
from jaxdiff.methods.ddpm import ddpm
from jaxdiff.metrics.digits import digits_extractor
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.mlp import MLP
from jaxdiff.training import ema
from jaxdiff.training.experiment import Experiment


def build(
    *,
    data: str = "digits",
    num_steps: int = 4,
    batch_size: int = 8,
    accumulate: int = 1,
    lr: float = 1e-3,
    chain: Literal["cosine", "linear", "zero_snr"] = "cosine",
    chain_length: int = 12,
    output: Literal["v", "eps"] = "v",
    labelled: bool = True,
    null_label: bool = True,
    sizes: tuple[int, ...] = (8, 8),
) -> Experiment:
    num_classes = 10 if labelled else None
    null_label = null_label and labelled
    mlp = MLP(out_features=64, features=8, num_blocks=1, num_classes=num_classes, null_label=null_label)
    network = as_network(mlp)

    def flat(params, x_t, t, cond, *, train=False, key=None):
        return network(params, x_t.reshape(-1, 64), t, cond, train=train, key=key).reshape(x_t.shape)

    betas = {
        "cosine": schedules.cosine_betas,
        "linear": schedules.linear_betas,
        "zero_snr": lambda n: schedules.zero_terminal_snr(schedules.cosine_betas(n)),
    }[chain](chain_length)
    cond = {"label": jnp.zeros([1], jnp.int32)} if labelled else {}
    method = ddpm(
        flat,
        betas,
        init_params=lambda key, batch: init_params(mlp, key, jnp.zeros([1, 64]), jnp.zeros([1]), cond),
        parameterization=parameterization.v() if output == "v" else parameterization.eps(),
        label_dropout=0.1 if null_label else 0.0,
        null_label=10 if null_label else None,
    )

    def source():
        return open_source(data, size=8, channels=1, num_classes=num_classes)

    return Experiment(
        name="digits_mlp",
        method=method,
        data=lambda: batches(source(), batch_size=batch_size, seed=0),
        optimizers={"model": optax.adam(lr)},
        ema=(ema.constant("slow", 0.9), ema.constant("slower", 0.99)),
        sample_shape=(*sizes, 1),
        num_classes=num_classes,
        batch_size=batch_size,
        accumulate=accumulate,
        num_steps=num_steps,
        checkpoint_every=2,
        sample_every=4,
        evaluation=Evaluation(
            name="digits held-out",
            extractor=digits_extractor,
            held_out=lambda: digits("held_out"),
            train=lambda: digits("train"),
            num=32,
            solvers=("ddim", "heun"),
            calls=(4, 1),
        ),
    )
'''


def listing(folder):
    """Every file and folder below, with size and time of change; compiled Python aside."""
    paths = (path for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts)
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """Names for argument templates: experiment files, trained runs, and broken copies of them."""
    root = tmp_path_factory.mktemp("cli")
    file = root / "digits_mlp.py"
    file.write_text(DIGITS)
    found = {"file": file, "toy": TOY, "run": root / "run", "toyrun": root / "toyrun", "plain": root / "plain"}
    assert main(["train", str(file), "--workdir", str(found["run"])]) == 0
    assert main(["train", str(TOY), "--workdir", str(found["toyrun"]), "--set", "smoke=true"]) == 0
    unlabelled = ["--set", "labelled=false", "--set", "null_label=false"]
    assert main(["train", str(file), "--workdir", str(found["plain"]), *unlabelled]) == 0
    return {name: str(path) for name, path in (found | _broken(root, found["run"])).items()}


def _broken(root, run):
    def copy(name):
        return Path(shutil.copytree(run, root / name))

    def edited(name, **changes):
        record = copy(name) / "run.json"
        about = json.loads(record.read_text())
        about["settings"] |= changes.pop("settings", {})
        record.write_text(json.dumps(about | changes))
        return record.parent

    found = {
        "torn_record": copy("torn_record"),
        "torn_config": copy("torn_config"),
        "unstarted": copy("unstarted"),
        "damaged": copy("damaged"),
        "torn_arrays": copy("torn_arrays"),
        "other_settings": edited("other_settings", settings={"lr": 0.5}),
        "other_names": edited("other_names", settings={"depth": 3}),
        "other_types": edited("other_types", settings={"chain_length": "long"}),
        "lost_file": edited("lost_file", file=str(root / "gone.py")),
        "inside": edited("inside", file=str(root / "inside" / "digits_mlp.py")),
    }
    (found["torn_record"] / "run.json").write_text('{"file": ')
    (found["torn_config"] / "config.json").write_text("{")
    shutil.rmtree(found["unstarted"] / "checkpoints")
    for path in found["damaged"].glob("checkpoints/*/state/**/*"):
        if path.is_file():
            path.write_bytes(b"")
    for path in found["torn_arrays"].glob("checkpoints/*/state/manifest.ocdbt"):
        path.write_bytes(b"")
    shutil.copy(root / "digits_mlp.py", found["inside"] / "digits_mlp.py")
    return found


@pytest.fixture(autouse=True)
def no_cache_in_home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("JAXDIFF_TRACEBACK", raising=False)


@pytest.fixture
def refused(places, tmp_path, capsys):
    """Runs a command line that must be refused: one line, exit code 2, no file touched."""

    def run(template, *needles):
        names = {**places, "tmp": str(tmp_path)}
        root = Path(places["file"]).parent
        before = listing(root) | listing(tmp_path)
        capsys.readouterr()
        code = main([word.format(**names) for word in template.split()])
        out, err = capsys.readouterr()
        assert code == 2, err
        assert out == ""
        assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
        for needle in needles:
            assert needle.format(**names) in err
        assert listing(root) | listing(tmp_path) == before

    return run
