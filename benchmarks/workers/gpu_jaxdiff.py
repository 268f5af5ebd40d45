"""One network in jaxdiff, bfloat16, at growing batch sizes: a line of JSON for each, until the memory is used up.

python -m benchmarks.workers.gpu_jaxdiff NAME smoke|full BATCH [BATCH ...]
"""

import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.gpu_shapes import CHAIN_LENGTH, ROUNDS, SHAPES, SMOKE, STEPS, Shape, out_of_memory
from jaxdiff import schedules
from jaxdiff.flops import count_flops
from jaxdiff.methods.ddpm import ddpm
from jaxdiff.networks.base import as_network, init_params, num_params
from jaxdiff.networks.unet import UNet, example_inputs
from jaxdiff.networks.unet_presets import adm_unet, stable_diffusion_unet
from jaxdiff.training import ema, sharding
from jaxdiff.training.state import create_state
from jaxdiff.training.step import make_train_step


def unet(name: str, shape: Shape) -> UNet:
    """The preset of that name with the numbers of the shape."""
    preset = adm_unet(64) if name == "adm64" else stable_diffusion_unet(1)
    return preset.clone(
        in_channels=shape.channels,
        out_channels=shape.channels,
        base_channels=shape.base,
        channel_mult=shape.mult,
        num_res_blocks=shape.res_blocks,
        attention_factors=tuple(2**level for level, attends in enumerate(shape.attends) if attends),
        num_heads=shape.heads,
        head_channels=shape.head_channels,
        num_classes=shape.classes or None,
        context_dim=shape.context[1] if shape.context else None,
        dropout=0.0,
        dtype=jnp.bfloat16,
    )


def measure(name: str, shape: Shape, batch_size: int) -> dict[str, Any]:
    """Seconds of a train step, its FLOPs and the memory it takes."""
    net = unet(name, shape)
    plain = as_network(net)
    rng = np.random.default_rng(0)
    batch: dict[str, Any] = {"x0": rng.uniform(-1, 1, (batch_size, shape.size, shape.size, shape.channels))}
    batch["x0"] = batch["x0"].astype(np.float32)
    if shape.classes:
        batch["label"] = rng.integers(0, shape.classes, batch_size).astype(np.int32)
    tokens = rng.standard_normal(shape.context or (1, 1)).astype(np.float32)

    def network(params: Any, x_t: jax.Array, t: jax.Array, cond: Any, **options: Any) -> jax.Array:
        if shape.context:
            # Made from x_t, because XLA would compute what depends on a constant context ahead of time.
            cond = {**cond, "context": x_t.mean((1, 2, 3))[:, None, None] + jnp.asarray(tokens)[None]}
        return plain(params, x_t, t, cond, **options)

    method = ddpm(
        network,
        schedules.linear_betas(CHAIN_LENGTH),
        init_params=lambda key, batch: init_params(net, key, *example_inputs(net)),
    )
    optimizers, averages, mesh = {"model": optax.adam(1e-4)}, (ema.constant("ema", 0.9999),), sharding.single_device()
    state = create_state(method, optimizers, averages, jax.random.key(0), batch, mesh=mesh)
    parameters = num_params(state.params)
    step = make_train_step(method, optimizers, averages)
    flops = count_flops(jax.make_jaxpr(step)(state, batch).jaxpr)
    train = sharding.jit_train_step(step, mesh, sharding.state_shardings(state, mesh))
    batch = sharding.put_batch(batch, mesh)
    start = time.perf_counter()
    state, metrics = train(state, batch)
    loss = float(metrics["model/loss"])
    compiled = time.perf_counter() - start
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(STEPS):
            state, metrics = train(state, batch)
        loss = float(metrics["model/loss"])
        seconds.append((time.perf_counter() - start) / STEPS)
    device = jax.local_devices()[0]
    return {
        "first": compiled,
        "seconds": seconds,
        "flops": flops,
        "memory": (device.memory_stats() or {}).get("peak_bytes_in_use", 0),
        "parameters": parameters,
        "loss": loss,
        "device": device.device_kind,
        "version": f"jax {jax.__version__}",
    }


def main(name: str, kind: str, *batch_sizes: str) -> None:
    """A line for each batch size."""
    shape = (SMOKE if kind == "smoke" else SHAPES)[name]
    for batch_size in map(int, batch_sizes):
        try:
            found = measure(name, shape, batch_size)
        except jax.errors.JaxRuntimeError as error:
            if not out_of_memory(error):
                raise
            return
        print(json.dumps({"batch": batch_size} | found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
