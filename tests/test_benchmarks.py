"""The benchmarks' cheap facts: equal networks, honest tables, workers that answer; nothing is timed here."""

import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import (
    install_size,
    jvp_cpu,
    one_step,
    report,
    sd_cpu,
    startup,
    two_cores,
    unet_cpu,
    unet_gpu,
    worker,
    workload,
)
from benchmarks.gpu_shapes import SHAPES, out_of_memory
from benchmarks.processes import Spec
from benchmarks.workers import gpu_jaxdiff, jaxdiff_unet
from benchmarks.workers.diffusers_names import entries
from jaxdiff.flops import count_flops
from jaxdiff.networks.base import num_params, param_shapes
from jaxdiff.networks.unet import example_inputs
from jaxdiff.networks.unet_presets import adm_unet, stable_diffusion_unet

TIMES = {"train step": {"a": {"wall": [2.0, 4.0, 3.0]}, "b": {"wall": [1.5, 1.0, 2.0]}, "c": {"skip": "not offered"}}}


def shapes(unet):
    return param_shapes(unet, *example_inputs(unet))


def test_the_workload_has_the_parameters_of_diffusers():
    assert num_params(shapes(jaxdiff_unet.unet())) == workload.PARAMETERS == 1_624_323


def test_every_parameter_has_a_name_in_diffusers():
    tree = shapes(jaxdiff_unet.unet())
    named = entries(jaxdiff_unet.unet())
    names = [name for entry in named for name in entry.names]
    assert len(set(names)) == len(names)
    assert {entry.path.split("/")[0] for entry in named} == set(tree)


@pytest.mark.parametrize(
    ("name", "preset"),
    [("adm64", adm_unet(64).clone(out_channels=3)), ("sd", stable_diffusion_unet(1))],
)
def test_the_gpu_networks_are_the_presets_in_bfloat16(name, preset):
    assert gpu_jaxdiff.unet(name, SHAPES[name]) == preset.clone(dropout=0.0, dtype=jnp.bfloat16)


def test_comparison_shows_medians_minima_ratios_and_what_is_missing():
    table = report.comparison("T", TIMES, ["a", "b", "c"], "wall")
    assert table.header == ["", "a", "b", "ratio", "c", "ratio"]
    assert table.rows == [["train step", "3.00 (2.00)", "1.50 (1.00)", "0.500", "not offered", ""]]


def test_page_and_figures_are_written(tmp_path):
    table = report.comparison("Steps", TIMES, ["a", "b"], "wall", "A note.")
    page = report.write(tmp_path, "d", "Title", {"cores": "2"}, [table], {"raw": TIMES})
    assert page.read_text() == (
        "# Title\n\n- cores: 2\n\n## Steps\n\n|  | a | b | ratio |\n| --- | --- | --- | --- |\n"
        "| train step | 3.00 (2.00) | 1.50 (1.00) | 0.500 |\n\nA note.\n"
    )
    assert '"cores": "2"' in (tmp_path / "d.json").read_text()


def test_every_section_writes_its_tables_from_made_up_figures():
    def times(seconds):
        return {"wall": [seconds], "cpu": [seconds]}

    peers = ["diffusers", "jaxdiff"]
    figures = {figure: {name: times(2.0) for name in peers} for figure in unet_cpu.COMMANDS}
    figures["sampler step"]["jaxdiff"] = times(0.03)
    facts = {name: {"parameters": 7} for name in peers}
    raw = {"peers": peers, "facts": facts, "figures": figures, "traces": {"train step": 1}}
    found = unet_cpu.tables(raw | {"equal": {"difference": 3e-6, "largest": 2.0}})
    assert found[2].rows == [["diffusers", "0.0200", "0.0200"], ["jaxdiff", "1.33", "1.33"]]
    assert "1 for the train step" in found[0].note and "at most 3.0e-06" in found[0].note

    pairs = {"train step": {"a, one core": times(4.0), "a, two cores": times(2.0)}}
    assert two_cores.tables({"peers": list(pairs["train step"]), "figures": pairs})[1].rows == [["train step", "2.00"]]

    starts = {"a: cold": {"import": times(1.0), "build": times(1.0), "first": times(2.0), "total": times(5.0)}}
    loaded, began = startup.tables({"imports": {"x": times(1.0) | {"heavy": ["torch"]}}, "starts": starts})
    assert (loaded.rows[0][-1], began.rows[0][-1]) == ("torch", "5.00")
    assert startup.tables({"imports": {}, "starts": {"a": {"error": "gone"}}})[1].rows[0][1] == "failed: gone"

    assert install_size.tables({"core": {"jax": 2_000_000, "numpy": 1_000_000}})[0].rows[0][1:3] == ["3", "2"]

    peers = {"diffusers": times(2.0), "jaxdiff": times(1.5)}
    facts = {"diffusers": {"parameters": 3_800_000, "memory": 62.4}, "jaxdiff": {"memory": 10.0}}
    text = {"first": peers, "call": peers, "equal": {"difference": 2e-6, "largest": 3.4}, "facts": facts}
    found = sd_cpu.tables({"text": text}, sd_cpu.NETWORKS)
    assert found[1].rows == [["text", "2.00", "1.50", "0.750"]]
    assert found[4].rows == [["text", "3.8 M", "2.0e-06", "3.40", "62", "10"]]

    passes = dict(zip(jvp_cpu.PASSES, (2.0, 3.0, 5.0), strict=True))
    timed = {what: times(seconds) for what, seconds in passes.items()}
    found = jvp_cpu.tables({"mlp": {"times": timed, "first": timed, "flops": passes, "difference": 1e-6}})
    assert found[0].rows == [["mlp", "2.00", "3.00", "1.50", "5.00", "2.50"]]
    assert found[1].rows == [["mlp", "2.00", "3.00", "5.00", "2.50"]]
    assert found[3].rows[0][-2:] == ["2.50", "1.0e-06"]

    one = {"batch": 4, "seconds": [0.5], "memory": 2e9, "first": 3.0, "flops": 1e12, "parameters": 10}
    row = unet_gpu.table("n", {"jaxdiff": [one], "diffusers": []}, 4e12).rows[0]
    assert row[:5] == ["4", "0.500", "8.00", "50.0%", "2.0"]
    assert row[6] == "does not fit"


def test_a_crooked_table_is_refused():
    with pytest.raises(ValueError, match=r"rows of \[1, 2\] cells"):
        report.markdown("T", {}, [report.Table("crooked", ["", "a"], [["b"]])])


@pytest.mark.parametrize(
    ("value", "text"), [(0.00523, "0.00523"), (0.0523, "0.0523"), (0.563, "0.563"), (12.34, "12.3"), (1280.4, "1280")]
)
def test_numbers_have_three_digits(value, text):
    assert report.number(value) == text


def test_the_machine_is_described_without_its_name():
    assert set(report.machine()) <= {"processor", "cores", "memory", "system"}


def test_a_peer_gets_its_cores_and_nothing_of_the_callers_settings(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "somewhere")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    env = Spec("jaxdiff", "jaxdiff", "python", (3, 5)).environment()
    assert (env["BENCH_CORES"], env["JAX_NUM_CPU_DEVICES"], env["OMP_NUM_THREADS"]) == ("3,5", "2", "1")
    assert "JAX_COMPILATION_CACHE_DIR" not in env
    assert "device_count" not in env["XLA_FLAGS"]
    assert Spec("torch", "diffusers", "python", (0, 1)).environment()["OMP_NUM_THREADS"] == "2"
    assert "cpu.sh" in " ".join(Spec("a", "jaxdiff", "python", (0,)).command("serve"))
    assert "cpu.sh" not in " ".join(Spec("a", "jaxdiff", "python", (0,), launcher=False).command("serve"))


def test_a_worker_times_what_it_is_asked_and_refuses_the_rest():
    class Peer:
        steps = 0

        def train_step(self):
            self.steps += 1
            return 0.0

        sampler_step = sample = train_step

    peer = Peer()
    said = worker.answer(peer, "train", "3")
    assert (peer.steps, len(said["wall"]), len(said["cpu"])) == (3, 3, 3)
    with pytest.raises(ValueError, match="a worker knows build, facts"):
        worker.answer(peer, "trian", "3")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--peer", "torch=python"], "--peer takes NAME=PYTHON"),
        (["--only", "stesp"], "--only takes steps"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_one_line(argv, said, capsys):
    with pytest.raises(SystemExit):
        unet_cpu.arguments(argv)
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--diffusers", "absent/python"], "--diffusers takes the interpreter of an environment with diffusers"),
        (["--diffusers", sys.executable, "--only", "unet_23"], "--only takes unet_32, unet_64"),
        (["--diffusers", sys.executable, "--rounds", "0"], "--rounds must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_of_the_stable_diffusion_benchmark_are_one_line(argv, said, capsys):
    with pytest.raises(SystemExit):
        sd_cpu.arguments(argv)
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "said"),
    [(["--only", "unet_9"], "--only takes mlp, unet_8, unet_32"), (["--rounds", "0"], "--rounds must be at least 1")],
)
def test_wrong_arguments_of_the_derivative_benchmark_are_one_line(argv, said, capsys):
    with pytest.raises(SystemExit):
        jvp_cpu.arguments(argv)
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", jvp_cpu.CALLS)
def test_a_pass_with_the_derivative_also_gives_the_plain_one(name):
    module, shape = jvp_cpu.network_of(name)
    x, t = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, shape[:1]))
    params = param_shapes(module, x, t, {})
    outs = [jax.eval_shape(function, params, x, t, x) for function in jvp_cpu.passes_of(module).values()]
    assert [jax.tree.map(jnp.shape, out) for out in outs] == [shape, shape, (shape, shape)]


@pytest.mark.parametrize("name", ["unet_32", "vae_64", "text"])
def test_the_stable_diffusion_networks_take_their_inputs(name):
    shape = sd_cpu.NETWORKS[name]
    network = sd_cpu.JaxdiffNetwork(shape)
    out = jax.eval_shape(network.apply, network.shapes(), *network.inputs)
    side = shape.size * (8 if shape.kind == "vae" else 1)
    widths = {"unet": 4, "vae": 3, "text": shape.width}
    assert out.shape == ((1, shape.size) if shape.kind == "text" else (1, side, side)) + (widths[shape.kind],)


def test_memory_errors_of_both_frameworks_are_known():
    assert out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"))
    assert not out_of_memory(RuntimeError("INVALID_ARGUMENT"))


def test_one_step_is_one_pass_of_the_network_and_no_more():
    functions, given = one_step.functions_of(2)
    flops = {name: count_flops(jax.make_jaxpr(function)(*given).jaxpr) for name, function in functions.items()}
    assert list(flops) == list(one_step.CALLS)
    assert flops["one step"] == flops["network"] and flops["50 steps"] == 50 * flops["network"]
    timed = {name: {"wall": [2.0, 1.0], "cpu": [3.0, 4.0]} for name in flops}
    cpu, _, products = one_step.tables({"times": timed, "flops": flops}, 2)
    assert cpu.rows == [["2 images", "3.50 (3.00)", "3.50 (3.00)", "1.00", "3.50 (3.00)", "1.00"]]
    assert products.rows[0][2::2] == ["1.00", "1.00", "50.0"]
    with pytest.raises(SystemExit):
        one_step.arguments(["--rounds", "0"])
