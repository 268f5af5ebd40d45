"""One of two processes with four devices each, which sample on one mesh and join their statistics.

`two_processes.py PORT FOLDER PROCESS_ID` writes what this process has in the end to FOLDER/PROCESS_ID.npz.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import generate
from jaxdiff.methods.base import Method
from jaxdiff.metrics import statistics as stats
from jaxdiff.metrics.features import Extractor, Features, extract
from jaxdiff.training import sharding

NUM, WIDTH = 21, 64


def dense(params, aux, key, noise, cond, sampling):
    """Samples that depend on a weight, the label and numbers drawn on the way."""
    del aux, sampling
    drawn = jax.random.normal(key, noise.shape)
    return jnp.tanh(noise @ params["model"]["kernel"] + 0.1 * drawn + cond["label"].astype(noise.dtype)[:, None])


METHOD = Method(lambda key, batch: ({}, ()), (), dense)
EXTRACTOR = Extractor("squares", "none", lambda images: Features(images**2 + 100.0))


def kernel():
    return np.random.default_rng(0).normal(size=(WIDTH, WIDTH)).astype(np.float32) / 8


def sample(mesh=None):
    params = {"model": {"kernel": kernel()}}
    if mesh is not None:
        places = sharding.state_shardings({"params": params}, mesh, min_size=16)["params"]
        params = jax.jit(lambda params: params, out_shardings=places)(params)
    draw = generate.compiled(METHOD, mesh=mesh, min_size=16)
    given = {"shape": (WIDTH,), "labels": generate.labels_for(NUM, 3), "num": NUM, "batch_size": 16}
    return np.concatenate([*generate.batches(draw, params, (), mesh=mesh, **given)])


def alone():
    """The same in one process, on one device."""
    samples = sample()
    found = stats.of(EXTRACTOR, extract(EXTRACTOR, samples).features)
    return {"samples": samples, "n": found.n, "mean": found.mean, "scatter": found.scatter}


def refusal(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def main(port, folder, process):
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
    mesh = sharding.make_mesh(data=1, fsdp=8)
    samples = sample(mesh)
    # Shares of unequal size, as the last files of a data set would be.
    share = samples[:8] if process == 0 else samples[8:]
    mine = sharding.make_mesh(devices=jax.local_devices())
    found = stats.across_processes(stats.of(EXTRACTOR, extract(EXTRACTOR, share, mesh=mine).features))
    other = found._replace(extractor=f"extractor of process {process}")
    np.savez(
        folder / f"{process}.npz",
        samples=samples,
        n=found.n,
        mean=found.mean,
        scatter=found.scatter,
        refusal=refusal(lambda: stats.across_processes(other)),
        foreign=refusal(lambda: extract(EXTRACTOR, share, mesh=mesh)),
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
