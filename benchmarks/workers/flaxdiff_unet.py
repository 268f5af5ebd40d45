"""FlaxDiff as a worker: its Unet, its TrainState (Adam and an average) and its DDIMSampler.

Not the same network: its Unet wants attention at 8x8 and in the middle too, has fewer blocks on the way up, and its
attention looks at a context, for which 256 tokens stand here, so that it costs what self-attention at 16x16 would.
Its trainer needs a text encoder, so the step is made of its public parts in the order its trainer uses them.
"""

# pyright: reportMissingImports=false

import importlib.metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flaxdiff.inputs import DiffusionInputConfig
from flaxdiff.models.simple_unet import Unet
from flaxdiff.predictors import EpsilonPredictionTransform
from flaxdiff.samplers.ddim import DDIMSampler
from flaxdiff.schedulers import LinearNoiseSchedule
from flaxdiff.trainer.diffusion_trainer import TrainState
from flaxdiff.trainer.simple_trainer import Metrics
from flaxdiff.utils import RandomMarkovState

from benchmarks import workload

SHAPE = (workload.BATCH, workload.SIZE, workload.SIZE, workload.CHANNELS)
CONTEXT = (workload.BATCH, 256, 64)


class Peer:
    """Answers the commands of `benchmarks.worker`."""

    def __init__(self) -> None:
        self.train = self.noise = None

    def build(self) -> None:
        attention = {
            "heads": workload.HEADS,
            "dtype": jnp.float32,
            "only_pure_attention": True,
            "use_projection": False,
            "use_self_and_cross": False,
        }
        self.net = Unet(
            output_channels=workload.CHANNELS,
            emb_features=4 * workload.BASE_CHANNELS,
            feature_depths=[workload.BASE_CHANNELS * mult for mult in workload.CHANNEL_MULT],
            attention_configs=(None, attention, attention),
            num_res_blocks=workload.RES_BLOCKS,
            num_middle_res_blocks=1,
            norm_groups=8,
        )
        self.schedule, self.transform = LinearNoiseSchedule(workload.CHAIN_LENGTH), EpsilonPredictionTransform()
        self.context = jnp.zeros(CONTEXT)
        self.x0 = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, SHAPE), jnp.float32)
        init = jax.jit(self.net.init)
        self.params = init(jax.random.key(0), self.x0, jnp.zeros(workload.BATCH), self.context)
        inputs = DiffusionInputConfig(sample_data_key="image", sample_data_shape=SHAPE[1:], conditions=[])
        self.sampler = DDIMSampler(self.net, self.schedule, self.transform, input_config=inputs)
        jax.block_until_ready(self.params)

    def train_step(self) -> float:
        if self.train is None:
            self.train = jax.jit(self._step, donate_argnums=0)
            self.random = RandomMarkovState(jax.random.PRNGKey(2))
            self.state = TrainState.create(
                apply_fn=self.net.apply,
                params=jax.tree.map(jnp.copy, self.params),
                ema_params=jax.tree.map(jnp.copy, self.params),
                tx=optax.adam(workload.LEARNING_RATE),
                rngs=jax.random.PRNGKey(1),
                metrics=Metrics.empty(),
                dynamic_scale=None,
            )
        self.state, loss, self.random = self.train(self.state, self.random, self.x0)
        return float(loss)

    def sampler_step(self) -> float:
        if self.noise is None:
            self.noise = jax.random.normal(jax.random.key(1), SHAPE)

        def model(x: jax.Array, t: jax.Array, *cond: Any) -> Any:
            return self.sampler.sample_model(self.params, x, t, *cond)

        state = RandomMarkovState(jax.random.PRNGKey(3))
        x, _ = self.sampler.sample_step(model, self.noise, 500, (self.context,), next_step=480, state=state)
        return float(x.sum())

    def sample(self) -> float:
        images = self.sampler.generate_samples(
            self.params,
            num_samples=workload.BATCH,
            resolution=workload.SIZE,
            diffusion_steps=workload.DDIM_STEPS,
            start_step=workload.CHAIN_LENGTH - 1,
            model_conditioning_inputs=(self.context,),
        )
        return float(images.sum())

    def facts(self) -> dict[str, Any]:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return {
            "versions": {"jax": jax.__version__, "flaxdiff": importlib.metadata.version("flaxdiff")},
            "parameters": count,
        }

    def _step(self, state: Any, random: Any, x0: jax.Array) -> Any:
        random, key = random.get_random_key()
        t, local = self.schedule.generate_timesteps(workload.BATCH, RandomMarkovState(key))
        _, key = local.get_random_key()
        rates = self.schedule.get_rates(t, (-1, 1, 1, 1))
        x_t, scale, target = self.transform.forward_diffusion(x0, jax.random.normal(key, x0.shape), rates)

        def loss_of(params: Any) -> jax.Array:
            output = self.net.apply(params, *self.schedule.transform_inputs(x_t * scale, t), self.context)
            return jnp.mean(optax.l2_loss(self.transform.pred_transform(x_t, output, rates), target))

        loss, grads = jax.value_and_grad(loss_of)(state.params)
        return state.apply_gradients(grads=grads).apply_ema(workload.EMA_DECAY), loss, random
