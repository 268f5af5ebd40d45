"""diffusers (PyTorch, eager) as a worker: UNet2DModel, its schedulers and its EMAModel, used as its guide uses them."""

# pyright: reportMissingImports=false

import os
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel

from benchmarks import workload

SHAPE = (workload.BATCH, workload.CHANNELS, workload.SIZE, workload.SIZE)


class Peer:
    """Answers the commands of `benchmarks.worker`."""

    def __init__(self) -> None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        torch.set_num_interop_threads(1)
        self.optimizer = None

    def build(self) -> None:
        torch.manual_seed(0)
        plain = [level != workload.ATTENTION_FACTOR // 2 for level in range(len(workload.CHANNEL_MULT))]
        self.net = UNet2DModel(
            sample_size=workload.SIZE,
            in_channels=workload.CHANNELS,
            out_channels=workload.CHANNELS,
            layers_per_block=workload.RES_BLOCKS,
            block_out_channels=tuple(workload.BASE_CHANNELS * mult for mult in workload.CHANNEL_MULT),
            down_block_types=tuple("DownBlock2D" if p else "AttnDownBlock2D" for p in plain),
            up_block_types=tuple("UpBlock2D" if p else "AttnUpBlock2D" for p in reversed(plain)),
            attention_head_dim=workload.BASE_CHANNELS * max(workload.CHANNEL_MULT) // workload.HEADS,
        )
        self.noiser = DDPMScheduler(num_train_timesteps=workload.CHAIN_LENGTH)
        self.ddim = DDIMScheduler(num_train_timesteps=workload.CHAIN_LENGTH)
        self.ddim.set_timesteps(workload.DDIM_STEPS)
        self.x0 = torch.rand(SHAPE) * 2 - 1
        self.noise = torch.randn(SHAPE)

    def train_step(self) -> float:
        if self.optimizer is None:
            self.optimizer = torch.optim.Adam(self.net.parameters(), lr=workload.LEARNING_RATE)
            self.ema = EMAModel(self.net.parameters(), decay=workload.EMA_DECAY)
        self.net.train()
        eps = torch.randn_like(self.x0)
        t = torch.randint(0, workload.CHAIN_LENGTH, (workload.BATCH,))
        x_t = self.noiser.add_noise(self.x0, eps, t)
        loss = torch.nn.functional.mse_loss(self.net(x_t, t).sample, eps)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.net.parameters())
        return loss.item()

    @torch.no_grad()
    def sampler_step(self) -> float:
        self.net.eval()
        t = self.ddim.timesteps[10]
        return self.ddim.step(self.net(self.noise, t).sample, t, self.noise).prev_sample.sum().item()

    @torch.no_grad()
    def sample(self) -> float:
        self.net.eval()
        x = self.noise
        for t in self.ddim.timesteps:
            x = self.ddim.step(self.net(x, t).sample, t, x).prev_sample
        return x.sum().item()

    @torch.no_grad()
    def dump(self, path: str) -> dict[str, Any]:
        """Writes the weights with one input and its output, channels last."""
        self.net.eval()
        t = torch.linspace(0, workload.CHAIN_LENGTH - 1, workload.BATCH).round()
        output = self.net(self.noise, t).sample
        arrays = {name: value.numpy() for name, value in self.net.state_dict().items()}
        x, output = (a.permute(0, 2, 3, 1).numpy() for a in (self.noise, output))
        np.savez(path, **{"/x": x, "/t": t.numpy(), "/output": output}, **arrays)
        return {}

    def facts(self) -> dict[str, Any]:
        return {
            "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
            "parameters": sum(p.numel() for p in self.net.parameters()),
            "threads": torch.get_num_threads(),
        }
