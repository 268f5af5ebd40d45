"""What compiles again and what does not: one program per (shapes, solver), whatever else is asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import parameterization, schedules, times
from jaxdiff.generate import Dials, batches, compiled, start_noise
from jaxdiff.methods.ddpm import ddpm
from jaxdiff.methods.edm import edm
from jaxdiff.solvers.base import sample
from jaxdiff.solvers.ddim import ddim
from jaxdiff.solvers.named import SOLVERS
from jaxdiff.types import Denoised

SHAPE, CLASSES = (3,), 4


def counted(method):
    """The method with a list that grows whenever its `generate` is traced."""
    traces = []

    def generate(*args):
        traces.append(1)
        return method.generate(*args)

    return method._replace(generate=generate), traces


def network(params, x_t, t, cond, *, train=False, key=None):
    del t, train, key
    return x_t * params + 0.1 * cond["label"][:, None].astype(x_t.dtype)


METHODS = {
    "ddpm": ddpm(
        network, schedules.cosine_betas(16), init_params=lambda key, batch: jnp.ones(()), null_label=CLASSES,
        parameterization=parameterization.v(), label_dropout=0.1,
    ),
    "edm": edm(network, init_params=lambda key, batch: jnp.ones(()), null_label=CLASSES, label_dropout=0.1),
}  # fmt: skip


def draw(generate, dials, seed, num=6, batch_size=4):
    parts = batches(
        generate, {"model": jnp.float32(0.5)}, {}, shape=SHAPE, labels=np.arange(num, dtype=np.int32) % CLASSES,
        num=num, batch_size=batch_size, seed=seed, dials=dials,
    )  # fmt: skip
    return np.concatenate(list(parts))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp_2m"])
def test_guidance_eta_and_seed_compile_nothing(method, solver):
    watched, traces = counted(METHODS[method])
    generate = compiled(watched, solver=SOLVERS[solver], num_steps=5)
    settings = [(1.0, 0.0, 0), (3.0, 0.0, 0), (3.0, 1.0, 0), (3.0, 1.0, 1)]
    results = [draw(generate, Dials(np.float32(w), np.float32(eta)), seed) for w, eta, seed in settings]
    assert len(traces) == 1 and generate._cache_size() == 1
    assert np.abs(results[1] - results[0]).max() > 1e-3
    assert (np.abs(results[2] - results[1]).max() > 1e-3) == SOLVERS[solver].takes_eta
    assert np.abs(results[3] - results[2]).max() > 1e-3


def test_another_shape_or_no_guidance_is_another_program():
    watched, traces = counted(METHODS["ddpm"])
    generate = compiled(watched, solver=SOLVERS["ddim"], num_steps=3)
    draw(generate, Dials(np.float32(2), np.float32(0)), 0)
    draw(generate, Dials(None, np.float32(0)), 0)
    assert len(traces) == 2
    draw(generate, Dials(None, np.float32(0)), 0, batch_size=2)
    assert len(traces) == 3


def test_the_start_noise_compiles_once_for_all_batches():
    before = start_noise._cache_size()
    draw(compiled(METHODS["ddpm"], num_steps=2), Dials(), 0, num=20, batch_size=5)
    draw(compiled(METHODS["ddpm"], num_steps=2), Dials(), 1, num=10, batch_size=5)
    assert start_noise._cache_size() - before == 1


def test_another_grid_of_equal_length_compiles_nothing():
    schedule, traces = schedules.ve(0.01, 10.0), []

    @jax.jit
    def run(key, x, grid, eta):
        traces.append(1)
        return sample(ddim(schedule, eta), lambda x, t: Denoised(0.5 * x), key, x, grid)

    x = jnp.ones((2, 3))
    grids = [times.karras(6, 0.01, 10.0), times.karras(6, 0.01, 10.0, 2.0), times.exponential(6, 0.02, 5.0)]
    results = [np.asarray(run(jax.random.key(0), x, jnp.asarray(grid, jnp.float32), jnp.float32(0))) for grid in grids]
    assert len(traces) == 1
    assert len({float(result[0, 0]) for result in results}) == 3
    run(jax.random.key(0), x, jnp.asarray(times.karras(7), jnp.float32), jnp.float32(0))
    assert len(traces) == 2


TRACES = dict.fromkeys(SOLVERS, 1) | {"heun": 2}  # Heun's step calls the network at both ends


@pytest.mark.parametrize("name", SOLVERS)
def test_a_sampler_holds_the_network_once(name):
    schedule, traces = schedules.ve(0.01, 10.0), []

    def denoise(x, t):
        traces.append(1)
        return Denoised(0.5 * x)

    grid = jnp.asarray(times.karras(6, 0.01, 10.0), jnp.float32)
    jax.make_jaxpr(lambda x: sample(SOLVERS[name].make(schedule, 0.0, 6), denoise, jax.random.key(0), x, grid))(
        jnp.ones((2, 3))
    )
    assert len(traces) == TRACES[name]
