"""What an experiment costs on the devices at hand: compile times, FLOPs, memory traffic, memory, time and MFU.

The train step and one step of the method's sampler are compiled ahead of time, looked at, and run on random data of the
right shape, so that no data set is opened. MFU is FLOPs / time / peak: the FLOPs of `flops.count_flops` (convolutions
and matrix products, all devices), the median time, and the bf16 peak of the devices, or on a device without a data
sheet here the rate of a large matrix product. Input pipelines and checkpoints are not timed.
"""

import contextlib
import json
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdiff.flops import count_flops
from jaxdiff.generate import PLAIN, compiled
from jaxdiff.info import batch_shapes, micro_batch, scaled
from jaxdiff.training import sharding
from jaxdiff.training.experiment import Experiment
from jaxdiff.training.state import TrainState, create_state
from jaxdiff.training.step import make_train_step

# Dense bf16 FLOP/s of what JAX calls a device (a core on TPU v2 and v3), fp16 where there is no bf16 (T4, V100).
# Source: the vendors' data sheets; figures with sparsity are halved.
PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "A100": 312e12,
    "L4": 121e12,
    "T4": 65e12,
    "V100": 125e12,
    "RTX 4090": 165e12,
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}
SHORT, LONG = 2, 10  # grids whose difference gives the time of a sampler's step


class Machine(NamedTuple):
    """Where it was measured. `peak` is in FLOP/s over all devices, `peak_source` says where it is from."""

    kind: str
    devices: int
    host: str
    jax: str
    peak: float
    peak_source: str


class Row(NamedTuple):
    """One program, all seconds in wall time.

    Attributes:
      experiment: its name.
      name: "train step"; "sampler step", a step of the method's own solver; or "generate", all of a sampler that has
        no grid to lengthen.
      examples: in one call, over all devices.
      trace_s, lower_s, compile_s: the stages; the last is short where a compilation cache had the answer.
      flops: of convolutions and matrix products, over all devices.
      xla_flops, bytes_accessed: XLA's own figures for one device, elementwise work included, the body of a loop once.
      temporary_bytes, peak_bytes: on one device; the peak is arguments, results and temporary memory together.
      seconds, low_s, high_s: median, least and largest of `repeats` runs after a warm-up.
      repeats: their number.
      machine: where.
    """

    experiment: str
    name: str
    examples: int
    trace_s: float
    lower_s: float
    compile_s: float
    flops: float
    xla_flops: float
    bytes_accessed: float
    temporary_bytes: int
    peak_bytes: int
    seconds: float
    low_s: float
    high_s: float
    repeats: int
    machine: Machine

    @property
    def rate(self) -> float:
        """FLOP/s over all devices."""
        return self.flops / self.seconds

    @property
    def mfu(self) -> float:
        """The rate's share of the peak."""
        return self.rate / self.machine.peak


class _Program(NamedTuple):
    run: Callable[..., Any]
    flops: float
    costs: dict[str, Any]


def profile(
    experiment: Experiment, mesh: Mesh, *, steps: int = 10, trace: str | os.PathLike[str] | None = None
) -> list[Row]:
    """Measures the train step and a step of the sampler.

    Args:
      experiment: any experiment whose batches are x0 and label.
      mesh: from `sharding.make_mesh`.
      steps: how often each is run, after one run that does not count.
      trace: folder for `jax.profiler`'s record of the timed runs, or None.

    Returns:
      A row for the train step and one for the sampler, which draws as many examples as a micro-batch has.

    Raises:
      ValueError: if the mesh does not divide the batch, steps is below 1, or the folder cannot be made.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    micro_batch(experiment, sharding.batch_devices(mesh))
    record = contextlib.nullcontext()
    if trace is not None:
        try:
            Path(trace).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"trace folder {trace} cannot be made: {error.strerror}; choose another one") from None
        record = jax.profiler.trace(os.fspath(trace))
    partition = experiment.partition
    example = _random_batch(experiment, experiment.batch_size)
    method = sharding.on_mesh(experiment.method, mesh, partition=partition)
    parts = (experiment.optimizers, experiment.ema)
    key = jax.random.key(experiment.seed)
    state = create_state(experiment.method, *parts, key, example, mesh=mesh, partition=partition)
    step = make_train_step(method, *parts, accumulate=experiment.accumulate)
    places = sharding.state_shardings(state, mesh, partition=partition)
    batch = sharding.put_batch(example, mesh)
    train = _compile(sharding.jit_train_step(step, mesh, places), state, batch)
    sampler = _Sampler(experiment, mesh, partition, state)
    machine = _machine(mesh)
    with record:
        state, times = _time_training(train, state, batch, steps)
        name, flops, sampler_times = sampler.time(state, steps)
    return [
        _row(experiment, "train step", experiment.batch_size, train, train.flops, times, machine),
        _row(experiment, name, sampler.examples, sampler.programs[0], flops, sampler_times, machine),
    ]


class _Sampler:
    """The method's sampler on two grids, or on its only one."""

    def __init__(self, experiment: Experiment, mesh: Mesh, partition: sharding.Partition, state: TrainState):
        self.examples = experiment.batch_size // experiment.accumulate
        example = sharding.put_batch(_random_batch(experiment, self.examples), mesh)
        self.noise = example.pop("x0")
        self.cond = example

        def program(num_steps: int | None) -> _Program:
            generate = compiled(experiment.method, num_steps=num_steps, mesh=mesh, partition=partition)
            return _compile(generate, *self._arguments(state))

        self.programs = []
        with contextlib.suppress(ValueError):  # a sampler with one grid only says so in this way
            self.programs = [program(SHORT), program(LONG)]
        if not self.programs or self.programs[0].flops == self.programs[1].flops:
            self.programs = [program(None)]

    def _arguments(self, state: TrainState) -> tuple[Any, ...]:
        return state.params, state.aux, jax.random.key(0), self.noise, self.cond, PLAIN

    def time(self, state: TrainState, steps: int) -> tuple[str, float, list[float]]:
        """What was timed, its FLOPs, and the times."""
        arguments = self._arguments(state)
        for program in self.programs:
            jax.block_until_ready(program.run(*arguments))
        rounds = [[_seconds(program.run, *arguments) for program in self.programs] for _ in range(steps)]
        if len(self.programs) == 1:
            return "generate", self.programs[0].flops, [times[0] for times in rounds]
        short, long = self.programs
        each = [(late - soon) / (LONG - SHORT) for soon, late in rounds]
        if min(each) <= 0:  # too short to tell from what surrounds the steps
            each = [late / LONG for _, late in rounds]
        return "sampler step", (long.flops - short.flops) / (LONG - SHORT), each


def _compile(function: Any, *arguments: Any) -> _Program:
    start = time.perf_counter()
    traced = function.trace(*arguments)
    at_trace = time.perf_counter()
    lowered = traced.lower()
    at_lower = time.perf_counter()
    run = lowered.compile()
    at_compile = time.perf_counter()
    analysis, memory = run.cost_analysis() or {}, run.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    costs = {
        "trace_s": at_trace - start,
        "lower_s": at_lower - at_trace,
        "compile_s": at_compile - at_lower,
        "xla_flops": float(analysis.get("flops", 0.0)),
        "bytes_accessed": float(analysis.get("bytes accessed", 0.0)),
        "temporary_bytes": int(memory.temp_size_in_bytes),
        "peak_bytes": int(held + memory.temp_size_in_bytes),
    }
    return _Program(run, count_flops(traced.jaxpr.jaxpr), costs)


def _time_training(train: _Program, state: TrainState, batch: Any, steps: int) -> tuple[TrainState, list[float]]:
    state, _ = jax.block_until_ready(train.run(state, batch))
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(train.run(state, batch))
        times.append(time.perf_counter() - start)
    return state, times


def _seconds(function: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def _row(experiment, name, examples, program, flops, times, machine) -> Row:
    return Row(
        experiment=experiment.name, name=name, examples=examples, flops=flops, seconds=float(np.median(times)),
        low_s=min(times), high_s=max(times), repeats=len(times), machine=machine, **program.costs,
    )  # fmt: skip


def _random_batch(experiment: Experiment, size: int) -> dict[str, np.ndarray]:
    draw, batch = np.random.default_rng(0), {}
    for name, shape in batch_shapes(experiment, size).items():
        classes = experiment.num_classes or 1
        values = draw.integers(0, classes, shape.shape) if name == "label" else draw.uniform(-1, 1, shape.shape)
        batch[name] = values.astype(shape.dtype)
    return batch


def peak_of(kind: str) -> float | None:
    """Dense bf16 FLOP/s of one device by JAX's `device_kind`, or None for a kind that is not in `PEAKS`."""
    found = [name for name in PEAKS if re.search(rf"\b{re.escape(name)}\b", kind)]
    return PEAKS[max(found, key=len)] if found else None


def measured_rate(mesh: Mesh, size: int | None = None, repeats: int = 5) -> float:
    """FLOP/s of a matrix product, size x size on every device at once: the best of some runs.

    Args:
      mesh: whose devices take part.
      size: of the matrices; None for 1024 in float32 on a CPU and 8192 in bfloat16 elsewhere.
      repeats: runs, after one that does not count.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    n, dtype = size or (1024 if on_cpu else 8192), jnp.float32 if on_cpu else jnp.bfloat16
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    x = jax.device_put(jnp.ones((n * mesh.size, n), dtype), rows)
    w = jax.device_put(jnp.ones((n, n), dtype), sharding.replicated(mesh))
    product = jax.jit(jnp.matmul, out_shardings=rows)
    jax.block_until_ready(product(x, w))
    return 2.0 * mesh.size * n**3 / min(_seconds(product, x, w) for _ in range(repeats))


def _machine(mesh: Mesh) -> Machine:
    kind = mesh.devices.flat[0].device_kind
    peak = peak_of(kind)
    host = f"{platform.machine()}, {os.cpu_count()} cores"
    if peak is None:
        return Machine(kind, mesh.size, host, jax.__version__, measured_rate(mesh), "measured, a matrix product")
    return Machine(kind, mesh.size, host, jax.__version__, peak * mesh.size, "data sheet, dense bf16")


def describe(rows: Sequence[Row]) -> str:
    """The rows as text for people."""
    machine = rows[0].machine
    peak = f"peak {scaled(machine.peak, 1000).lstrip()}FLOP/s ({machine.peak_source})"
    where = f"{machine.devices} x {machine.kind} ({machine.host}), jax {machine.jax}"
    lines = [f"{rows[0].experiment} on {where}; {peak}"]
    for row in rows:
        flops, own = (scaled(value, 1000).lstrip() for value in (row.flops, row.xla_flops))
        read, temporary, most = (
            scaled(float(value), 1024).lstrip() for value in (row.bytes_accessed, row.temporary_bytes, row.peak_bytes)
        )
        median, low, high = (f"{1000 * value:.2f}" for value in (row.seconds, row.low_s, row.high_s))
        lines += [
            f"  {row.name}, {row.examples} examples",
            f"    compile   trace {row.trace_s:.2f} s, lower {row.lower_s:.2f} s, compile {row.compile_s:.2f} s",
            f"    work      {flops}FLOP; by XLA, on a device: {own}FLOP, {read}B accessed",
            f"    memory    {temporary}B temporary, {most}B with arguments and results, on a device",
            f"    time      {median} ms ({low} to {high}, {row.repeats} runs): "
            f"{scaled(row.rate, 1000).lstrip()}FLOP/s, MFU {100 * row.mfu:.1f} %",
        ]
    return "\n".join(lines)


def json_lines(rows: Sequence[Row]) -> str:
    """The rows as JSON, one a line: the fields of `Row` and `Machine`, rate and mfu."""
    flat = []
    for row in rows:
        fields = row._asdict() | row.machine._asdict() | {"rate": row.rate, "mfu": row.mfu}
        del fields["machine"]
        flat.append(json.dumps(fields))
    return "\n".join(flat)
