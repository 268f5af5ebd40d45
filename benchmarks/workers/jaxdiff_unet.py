"""jaxdiff as a worker: its own train step, sharded over the host devices it finds, and its compiled sampler.

One device is the usual case; with more (JAX_NUM_CPU_DEVICES) the batch is split over them in training and sampling
alike. The weights of diffusers' UNet can be loaded to show that the outputs are equal.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import workload
from benchmarks.workers.diffusers_names import params_from_diffusers
from jaxdiff import parameterization, schedules
from jaxdiff.generate import PLAIN, compiled
from jaxdiff.methods.ddpm import chain_denoiser, ddpm
from jaxdiff.networks.base import as_network, init_params, num_params
from jaxdiff.networks.unet import UNet, example_inputs
from jaxdiff.solvers.ddim import ddim
from jaxdiff.solvers.named import named_solver
from jaxdiff.training import ema, sharding
from jaxdiff.training.state import create_state
from jaxdiff.training.step import make_train_step

SHAPE = (workload.BATCH, workload.SIZE, workload.SIZE, workload.CHANNELS)
BETAS = schedules.linear_betas(workload.CHAIN_LENGTH)


def unet() -> UNet:
    """The UNet of the workload."""
    return UNet(
        base_channels=workload.BASE_CHANNELS,
        channel_mult=workload.CHANNEL_MULT,
        num_res_blocks=workload.RES_BLOCKS,
        attention_factors=(workload.ATTENTION_FACTOR,),
        num_heads=workload.HEADS,
    )


class Peer:
    """Answers the commands of `benchmarks.worker`."""

    def __init__(self) -> None:
        self.traces = 0
        self.net = unet()
        plain = as_network(self.net)

        def network(*args: Any, **kwargs: Any) -> jax.Array:
            self.traces += 1
            return plain(*args, **kwargs)

        def init(key: jax.Array, batch: dict[str, jax.Array]) -> Any:
            del batch
            return init_params(self.net, key, *example_inputs(self.net))

        self.network = network
        self.method = ddpm(network, BETAS, init_params=init)
        self.generate = compiled(self.method, solver=named_solver("ddim"), num_steps=workload.DDIM_STEPS)
        self.train = self.step = None

    def build(self) -> None:
        self.mesh = sharding.usual_mesh()
        params, _ = self.method.init(jax.random.key(0), {})
        self.params = jax.block_until_ready(jax.device_put(params, sharding.replicated(self.mesh)))
        if num_params(self.params) != workload.PARAMETERS:
            raise ValueError(
                f"expected {workload.PARAMETERS} parameters as in diffusers, got {num_params(self.params)}"
            )
        self.x0 = np.random.default_rng(0).uniform(-1, 1, SHAPE).astype(np.float32)
        noise = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
        self.noise = jax.device_put(noise, sharding.batch_sharding(self.mesh))

    def train_step(self) -> float:
        if self.train is None:
            optimizers = {"model": optax.adam(workload.LEARNING_RATE)}
            averages = (ema.constant("ema", workload.EMA_DECAY),)
            self.batch = sharding.put_batch({"x0": self.x0}, self.mesh)
            self.state = create_state(
                self.method, optimizers, averages, jax.random.key(2), {"x0": self.x0}, mesh=self.mesh
            )
            places = sharding.state_shardings(self.state, self.mesh)
            step = make_train_step(sharding.on_mesh(self.method, self.mesh), optimizers, averages)
            self.train = sharding.jit_train_step(step, self.mesh, places)
        self.state, metrics = self.train(self.state, self.batch)
        return float(metrics["model/loss"])

    def sampler_step(self) -> float:
        if self.step is None:
            schedule, output = schedules.discrete(BETAS), parameterization.eps()

            def step(params: Any, x: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
                denoise = chain_denoiser(self.network, params["model"], schedule, output)
                return ddim(schedule).step(x, None, x, t, s, denoise)[0]

            self.step = jax.jit(step)
            batch = sharding.batch_sharding(self.mesh)
            self.times = [jax.device_put(jnp.full(workload.BATCH, t), batch) for t in (500.0, 480.0)]
        return float(np.asarray(self.step(self.params, self.noise, *self.times)).sum())

    def sample(self) -> float:
        return float(np.asarray(self.generate(self.params, {}, jax.random.key(3), self.noise, {}, PLAIN)).sum())

    def load(self, path: str) -> dict[str, float]:
        """Takes over weights that a peer has dumped, and compares the outputs on its input."""
        with np.load(path) as dumped:
            arrays = dict(dumped)
        x, t, theirs = (arrays.pop(f"/{name}") for name in ("x", "t", "output"))
        params = {"model": params_from_diffusers(arrays, self.net)}
        self.params = jax.device_put(params, sharding.replicated(self.mesh))
        ours = as_network(self.net)(self.params["model"], jnp.asarray(x), jnp.asarray(t), {})
        return {"largest": float(np.abs(theirs).max()), "difference": float(np.abs(np.asarray(ours) - theirs).max())}

    def facts(self) -> dict[str, Any]:
        return {
            "versions": {"jax": jax.__version__, "numpy": np.__version__},
            "parameters": num_params(self.params),
            "devices": jax.local_device_count(),
            "traces": self.traces,
        }
