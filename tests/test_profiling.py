"""Profiles: what is counted agrees with the counters, what is timed is timed, and what is printed is one story."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdiff.info import info
from jaxdiff.profiling import PEAKS, Machine, Row, describe, json_lines, measured_rate, peak_of, profile
from jaxdiff.runs import experiment_from
from jaxdiff.training import sharding

TOY = Path(__file__).parents[1] / "experiments" / "toy_ddpm.py"
MACHINE = Machine("NVIDIA H100 80GB HBM3", 2, "x86_64, 8 cores", "0.10.2", 2e15, "data sheet, dense bf16")
ROW = Row(
    "toy", "train step", 32, 1.0, 0.5, 10.25, 4e12, 2.5e12, 3 * 2.0**30, 2**20, 2**21, 0.004, 0.003, 0.0055, 7, MACHINE
)


def toy(**changes):
    return dataclasses.replace(experiment_from(TOY, ["smoke=true"]), **changes)


@pytest.fixture(scope="module")
def rows():
    return profile(toy(), sharding.make_mesh(data=2, fsdp=2), steps=3)


def test_a_train_step_and_a_sampler_step_are_measured(rows):
    train, sampler = rows
    assert (train.name, sampler.name) == ("train step", "sampler step")
    assert train.flops == info(toy()).flops
    # A step of the sampler calls the network once, on as many examples as a train step.
    assert 0 < 2.5 * sampler.flops < train.flops < 3.5 * sampler.flops
    for row in rows:
        assert row.examples == 16 and row.repeats == 3 and row.experiment == "toy_ddpm"
        assert 0 < row.low_s <= row.seconds <= row.high_s
        assert min(row.trace_s, row.lower_s, row.compile_s) > 0
        assert min(row.xla_flops, row.bytes_accessed) > 0
        assert row.peak_bytes > row.temporary_bytes >= 0
        assert row.rate == row.flops / row.seconds and row.mfu == row.rate / row.machine.peak
    assert train.machine == sampler.machine
    assert (train.machine.devices, train.machine.peak_source) == (4, "measured, a matrix product")
    assert train.machine.kind == jax.devices()[0].device_kind


def test_micro_batches_are_what_the_sampler_draws_and_a_trace_is_written(tmp_path):
    train, sampler = profile(toy(accumulate=4), sharding.single_device(), steps=1, trace=tmp_path / "deep" / "trace")
    assert (train.examples, sampler.examples) == (16, 4)
    assert list((tmp_path / "deep" / "trace").rglob("*.xplane.pb"))


def test_a_sampler_without_a_grid_is_measured_whole():
    def one_step(params, aux, key, noise, cond, sampling):
        return noise @ np.eye(2, dtype=np.float32)

    experiment = toy()
    fixed = experiment.method._replace(generate=one_step)
    _, sampler = profile(dataclasses.replace(experiment, method=fixed), sharding.single_device(), steps=2)
    assert (sampler.name, sampler.flops) == ("generate", 2 * 16 * 2 * 2)

    def refuses(params, aux, key, noise, cond, sampling):
        if sampling.num_steps is not None:
            raise ValueError("one grid only")
        return one_step(params, aux, key, noise, cond, sampling)

    refusing = dataclasses.replace(experiment, method=experiment.method._replace(generate=refuses))
    assert profile(refusing, sharding.single_device(), steps=1)[1].name == "generate"


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("Tesla T4", 65e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("TPU v3", 61.5e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA L40", None),
        ("NVIDIA GH200 480GB", None),
        ("cpu", None),
    ],
)
def test_peaks_by_device_kind(kind, peak):
    assert peak_of(kind) == peak


def test_every_peak_is_found_under_its_own_name():
    assert all(peak_of(name) == peak for name, peak in PEAKS.items())


def test_the_rate_of_a_product_counts_all_devices(monkeypatch):
    ticks = map(float, range(100))
    monkeypatch.setattr("jaxdiff.profiling.time.perf_counter", lambda: next(ticks))
    # A second a run by this clock: 2 n^3 on each device.
    assert measured_rate(sharding.make_mesh(), size=8) == 4 * 2 * 8**3
    assert measured_rate(sharding.single_device(), size=8) == 2 * 8**3


def test_rows_in_words_and_in_json():
    assert ROW.rate == pytest.approx(1e15) and ROW.mfu == pytest.approx(0.5)
    assert describe([ROW]).splitlines() == [
        "toy on 2 x NVIDIA H100 80GB HBM3 (x86_64, 8 cores), jax 0.10.2; peak 2.000 PFLOP/s (data sheet, dense bf16)",
        "  train step, 32 examples",
        "    compile   trace 1.00 s, lower 0.50 s, compile 10.25 s",
        "    work      4.000 TFLOP; by XLA, on a device: 2.500 TFLOP, 3.000 GiB accessed",
        "    memory    1.000 MiB temporary, 2.000 MiB with arguments and results, on a device",
        "    time      4.00 ms (3.00 to 5.50, 7 runs): 1.000 PFLOP/s, MFU 50.0 %",
    ]
    first, second = (json.loads(line) for line in json_lines([ROW, ROW._replace(name="generate")]).splitlines())
    assert first["kind"] == MACHINE.kind and first["flops"] == 4e12 and first["mfu"] == pytest.approx(0.5)
    assert set(first) == {*Row._fields, *Machine._fields, "rate", "mfu"} - {"machine"}
    assert second["name"] == "generate"


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 6}, {}, "batch_size / accumulate is 6, which does not divide among data x fsdp = 4 devices"),
    ],
)
def test_bad_requests_are_refused(changes, options, message):
    with pytest.raises(ValueError, match=message):
        profile(toy(**changes), sharding.make_mesh(), **options)


def test_a_trace_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="trace folder .* cannot be made: .*; choose another one"):
        profile(toy(), sharding.single_device(), trace=tmp_path / "file" / "trace")
