"""scripts/sd_pairs.py on a tiny UNet: its samples are guided ones, and sd_instaflow reads what it writes."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import sd_instaflow
from jaxdiff import cli, runs, schedules
from jaxdiff.methods.base import Sampling
from jaxdiff.networks.base import as_network, init_params
from jaxdiff.networks.unet import UNet, example_inputs
from jaxdiff.pretrained import folders
from jaxdiff.pretrained.kinds import Spec
from jaxdiff.solvers.base import sample
from jaxdiff.solvers.dpm_solver import dpm_solver
from jaxdiff.types import Denoised

ROOT = Path(__file__).parents[1]
UNET = UNet(
    in_channels=4,
    out_channels=4,
    base_channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_factors=(1,),
    num_heads=1,
    transformer_depth=1,
    context_dim=8,
)
NETWORK = as_network(UNET)
CONTEXTS = np.random.default_rng(1).standard_normal((3, 2, 8)).astype(np.float32)
NULL = np.full((2, 8), 0.5, np.float32)
SCALE, STEPS = 3.0, 3


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("sd_pairs")


@pytest.fixture(scope="module")
def params():
    """Random everywhere: fresh UNets answer 0."""
    rng = np.random.default_rng(2)
    fresh = init_params(UNET, jax.random.key(0), *example_inputs(UNET))
    return jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape).astype(np.float32), fresh)


@pytest.fixture
def captions(tmp_path):
    folder = tmp_path / "captions"
    folder.mkdir()
    np.save(folder / "context.npy", CONTEXTS)
    np.save(folder / "null_context.npy", NULL)
    return folder


def noise_of(n):
    return jnp.asarray(np.random.default_rng(3).standard_normal((n, 8, 8, 4)).astype(np.float32))


def distance(a, b):
    """The largest difference over the largest value."""
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


@jax.jit
def by_hand(params, noise, context, scale):
    """DPM-Solver++ 2M of eps_null + scale (eps - eps_null), in two calls of the network."""
    schedule = schedules.discrete(schedules.scaled_linear_betas(1000))

    def denoise(x, t):
        alpha, sigma = (a.reshape(-1, 1, 1, 1) for a in schedule.level(t))
        eps, null = (
            NETWORK(params, x, t, {"context": c}) for c in (context, jnp.broadcast_to(NULL[None], context.shape))
        )
        return Denoised((x - sigma * (null + scale * (eps - null))) / alpha)

    return sample(dpm_solver(schedule), denoise, jax.random.key(0), noise, jnp.array([999.0, 666.0, 333.0]))


def test_pairs_of_the_teacher_are_guided(script, params):
    generate = script.sampler(script.diffusion(NETWORK, STEPS), SCALE)
    made = {"shape": (8, 8, 4), "num": 5, "batch_size": 2, "seed": 0}
    chunks = list(script.pairs_of(lambda *args: generate(params, *args), CONTEXTS, NULL, **made))
    assert [len(chunk["x0"]) for chunk in chunks] == [2, 2, 1]
    assert generate._cache_size() == 1
    pairs = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    np.testing.assert_array_equal(pairs["context"], CONTEXTS[[0, 1, 2, 0, 1]])
    guided, plain = (by_hand(params, pairs["noise"], pairs["context"], scale) for scale in (SCALE, 1.0))
    assert distance(pairs["x0"], guided) < 1e-3 < distance(pairs["x0"], plain)


def test_pairs_of_a_flow_are_what_its_method_samples_under_guidance(script, params):
    method, null = sd_instaflow.build(smoke=True, bf16=False).method, np.zeros_like(NULL)
    context = jnp.asarray(CONTEXTS)
    made = script.sampler(script.flow(NETWORK, STEPS))(params, noise_of(3), context, null)

    @jax.jit
    def sampled(scale):
        sampling = Sampling(STEPS, guidance_scale=scale)
        return method.generate({"model": params}, {}, jax.random.key(0), noise_of(3), {"context": context}, sampling)

    assert distance(made, sampled(jnp.float32(1.5))) < 1e-3 < distance(made, sampled(jnp.float32(1.0)))


def test_sd_instaflow_reads_what_the_command_writes(script, params, captions, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(folders, "load", lambda path: folders.Imported("diffusers-unet", Spec(UNET), params))
    out = tmp_path / "pairs"
    command = ["weights", "--captions", str(captions), "--out", str(out), "--size", "8", "--steps", str(STEPS)]
    command += ["--guidance", str(SCALE), "--num", "4", "--batch-size", "3", "--dtype", "float32"]
    assert script.main(command) == 0
    assert capsys.readouterr().out == f"4 pairs in {out}\n"
    source, null_context = sd_instaflow.open_pairs(str(out))
    np.testing.assert_array_equal(null_context, NULL)
    pairs = {name: np.stack([source[i][name] for i in range(len(source))]) for name in source[0]}
    np.testing.assert_array_equal(pairs["context"], CONTEXTS[[0, 1, 2, 0]])
    assert distance(pairs["x0"], by_hand(params, pairs["noise"], pairs["context"], SCALE)) < 1e-3


@pytest.mark.slow
def test_a_run_makes_the_pairs_of_its_distillation(script, captions, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "pairs"
    file = str(ROOT / "experiments" / "sd_instaflow.py")
    assert cli.main(["train", file, "--workdir", str(run), "--set", "smoke=true"]) == 0
    command = [str(run), "--captions", str(captions), "--out", str(out), "--steps", str(STEPS), "--dtype", "float32"]
    assert script.main(command) == 0, capsys.readouterr().err
    source, _ = sd_instaflow.open_pairs(str(out))
    assert len(source) == 3
    unet, pairs = runs.open_run(run).networks["model"], [source[i] for i in range(3)]
    noise, context, x0 = (np.stack([pair[name] for pair in pairs]) for name in ("noise", "context", "x0"))
    generate = script.sampler(script.flow(as_network(unet), STEPS), 1.5)
    expected = generate(runs.player_params(run), noise, context, NULL)
    np.testing.assert_allclose(x0, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--steps": "0"}, "--steps and --size must be at least 1, got 0 and 8"),
        ({"--num": "0"}, "num and batch_size are at least 1"),
        ({"--captions": "nowhere"}, "nowhere: expected context.npy and null_context.npy"),
        ({"--out": "."}, "is in use; write pairs to an empty folder"),
    ],
)
def test_wrong_use_is_one_line_and_code_2(script, params, captions, tmp_path, monkeypatch, capsys, change, said):
    monkeypatch.setattr(folders, "load", lambda path: folders.Imported("diffusers-unet", Spec(UNET), params))
    monkeypatch.chdir(captions)
    options = {"--captions": str(captions), "--out": str(tmp_path / "pairs"), "--size": "8"} | change
    assert script.main(["weights", *(word for pair in options.items() for word in pair)]) == 2
    refused(capsys, said)
    assert not (tmp_path / "pairs").exists()


def test_networks_and_captions_that_do_not_fit_are_refused(script, captions, tmp_path, monkeypatch, capsys):
    command = ["--captions", str(captions), "--out", str(tmp_path / "pairs")]
    assert script.main([str(tmp_path), *command]) == 2
    refused(capsys, "has no network.json; expected a folder that jaxdiff import made")
    toy, run = ROOT / "experiments" / "toy_ddpm.py", tmp_path / "run"
    run.mkdir()
    runs.write_record(run, toy, runs.experiment_from(toy, ["smoke=true"]))
    assert script.main([str(run), *command]) == 2
    refused(capsys, "is a run of toy_ddpm; name one of sd_instaflow")
    for unet, said in (
        (UNET.clone(context_dim=None, transformer_depth=0), "holds no UNet of a text and noise alone"),
        (UNET.clone(context_dim=16), "contexts are 8 wide, the network takes 16"),
    ):
        loaded = folders.Imported("diffusers-unet", Spec(unet), {})
        monkeypatch.setattr(folders, "load", lambda path, loaded=loaded: loaded)
        assert script.main(["weights", *command]) == 2
        refused(capsys, said)
    np.save(captions / "null_context.npy", NULL[:1])
    assert script.main(["weights", *command]) == 2
    refused(capsys, "got (3, 2, 8) and (1, 8); encode them again")


def refused(capsys, said):
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and said in errors[0], errors
