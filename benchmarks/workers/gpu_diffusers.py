"""The same networks in diffusers: autocast to bfloat16, torch.compile, channels last, fused Adam; see `gpu_jaxdiff`.

    python -m benchmarks.workers.gpu_diffusers NAME smoke|full BATCH [BATCH ...]

The smoke run is eager, since torch.compile wants a C++ compiler on a CPU.
"""

# pyright: reportMissingImports=false

import json
import sys
import time
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.training_utils import EMAModel

from benchmarks.gpu_shapes import CHAIN_LENGTH, ROUNDS, SHAPES, SMOKE, STEPS, Shape, out_of_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def unet(shape: Shape) -> Any:
    """The network of a shape."""
    widths = tuple(shape.base * mult for mult in shape.mult)
    common = dict(
        sample_size=shape.size,
        in_channels=shape.channels,
        out_channels=shape.channels,
        block_out_channels=widths,
        layers_per_block=shape.res_blocks,
    )
    if shape.context:
        # Its attention_head_dim is the number of heads.
        return UNet2DConditionModel(
            **common,
            down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in shape.attends),
            up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(shape.attends)),
            cross_attention_dim=shape.context[1],
            attention_head_dim=shape.heads,
        )
    return UNet2DModel(
        **common,
        down_block_types=tuple("AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in shape.attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(shape.attends)),
        attention_head_dim=shape.head_channels,
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
        num_class_embeds=shape.classes,
    )


def measure(shape: Shape, batch_size: int, *, compiled: bool) -> dict[str, Any]:
    """Seconds of a train step and the memory it takes."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    net = unet(shape).to(DEVICE, memory_format=torch.channels_last).train()
    run = torch.compile(net) if compiled else net
    noiser = DDPMScheduler(num_train_timesteps=CHAIN_LENGTH)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, fused=DEVICE == "cuda")
    average = EMAModel(net.parameters(), decay=0.9999, foreach=True)
    x0 = torch.rand(batch_size, shape.channels, shape.size, shape.size, device=DEVICE) * 2 - 1
    x0 = x0.contiguous(memory_format=torch.channels_last)
    cond: dict[str, Any] = {}
    if shape.context:
        cond["encoder_hidden_states"] = torch.randn(batch_size, *shape.context, device=DEVICE)
    else:
        cond["class_labels"] = torch.randint(0, shape.classes, (batch_size,), device=DEVICE)

    def train() -> torch.Tensor:
        eps = torch.randn_like(x0)
        t = torch.randint(0, CHAIN_LENGTH, (batch_size,), device=DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            output = run(noiser.add_noise(x0, eps, t), t, **cond).sample
        loss = torch.nn.functional.mse_loss(output.float(), eps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.step(net.parameters())
        return loss

    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    loss = train().item()
    first = time.perf_counter() - start
    train().item()  # torch.compile may compile once more when gradients have been allocated
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(STEPS):
            last = train()
        loss = last.item()
        seconds.append((time.perf_counter() - start) / STEPS)
    memory = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
    return {"first": first, "seconds": seconds, "memory": memory, "loss": loss,
            "parameters": sum(p.numel() for p in net.parameters()),
            "version": f"torch {torch.__version__}, diffusers {diffusers.__version__}"}  # fmt: skip


def main(name: str, kind: str, *batch_sizes: str) -> None:
    """A line for each batch size."""
    shape = (SMOKE if kind == "smoke" else SHAPES)[name]
    for batch_size in map(int, batch_sizes):
        try:
            found = measure(shape, batch_size, compiled=kind != "smoke")
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return
        print(json.dumps({"batch": batch_size} | found), flush=True)
        torch.compiler.reset()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(*sys.argv[1:])
