"""The stages of cifar10_rectified_flow and sd_instaflow that smoke mode alone does not build: reflow, distillation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cifar10_rectified_flow, sd_instaflow
from jaxdiff.info import batch_shapes
from jaxdiff.methods.base import Sampling
from jaxdiff.networks.autoencoder_blocks import example_input
from jaxdiff.networks.autoencoder_kl import AutoencoderKL
from jaxdiff.networks.base import init_params
from jaxdiff.networks.lpips import LPIPS
from jaxdiff.pretrained import folders
from jaxdiff.pretrained.kinds import Spec
from jaxdiff.solvers.ddim import ddim

AUTOENCODER = AutoencoderKL(
    base_channels=8, channel_mult=(1, 2), num_res_blocks=1, z_channels=4, embed_dim=4, norm_groups=4
)
REFLOW = {"pairs": "made", "dropout": 0.0}
STAGES = [
    (cifar10_rectified_flow, REFLOW, False),
    (cifar10_rectified_flow, {"distil": True, "dropout": 0.0}, True),
    (sd_instaflow, {"context_dropout": 0.0}, False),
    (sd_instaflow, {"distil": True}, True),
]
IDS = ["cifar10-reflow", "cifar10-distillation", "sd-reflow", "sd-distillation"]


@pytest.fixture
def published(monkeypatch):
    """Tiny random networks in the place of imported ones."""
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    lpips, key = LPIPS(width=4), jax.random.key(1)
    loaded = {
        "lpips": folders.Imported("lpips", Spec(lpips), init_params(lpips, key, image, image)),
        "vae": folders.Imported(
            "diffusers-autoencoder", Spec(AUTOENCODER), init_params(AUTOENCODER, key, example_input(AUTOENCODER))
        ),
    }
    monkeypatch.setattr(folders, "load", lambda path: loaded[path])
    return loaded


def sampled(experiment, sampling):
    """The program that samples, traced."""
    params, aux = jax.eval_shape(experiment.method.init, jax.random.key(0), batch_shapes(experiment))
    noise = jnp.zeros((2, *experiment.sample_shape))

    def generate(params, aux, noise):
        return experiment.method.generate(params, aux, jax.random.key(0), noise, {}, sampling)

    return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(generate)(params, aux, noise)))


def test_a_reflow_on_cifar10_is_sampled_adaptively_and_its_distillation_in_one_step():
    reflow = cifar10_rectified_flow.build(**REFLOW, smoke=True)
    assert " while[" in sampled(reflow, Sampling()) and " while[" not in sampled(reflow, Sampling(1))
    with pytest.raises(ValueError, match="solved adaptively"):
        sampled(reflow, Sampling(solver=ddim))
    distilled = cifar10_rectified_flow.build(distil=True, smoke=True)
    assert sampled(distilled, Sampling()) == sampled(distilled, Sampling(1)) != sampled(distilled, Sampling(2))


def test_a_flow_of_sd_instaflow_is_sampled_in_25_steps_and_its_distillation_in_one():
    for distil, steps in ((False, 25), (True, 1)):
        experiment = sd_instaflow.build(distil=distil, smoke=True)
        assert (
            sampled(experiment, Sampling()) == sampled(experiment, Sampling(steps)) != sampled(experiment, Sampling(2))
        )


@pytest.mark.parametrize(("module", "settings", "at_noise"), STAGES, ids=IDS)
def test_a_distillation_learns_at_the_noisy_end_alone(module, settings, at_noise):
    experiment = module.build(**settings, smoke=True)
    batch = next(experiment.data())
    assert {name: a.shape for name, a in batch.items()} == {n: a.shape for n, a in batch_shapes(experiment).items()}
    batch = jax.tree.map(jnp.asarray, batch)
    params, aux = experiment.method.init(jax.random.key(0), batch)
    params = jax.tree.map(lambda a: a + 0.02, params)  # a fresh network answers 0 at every time
    loss = jax.jit(lambda key: experiment.method.objectives[0].loss(params, aux, batch, key, jnp.int32(0))[0])
    first, second = (float(loss(jax.random.key(i))) for i in (0, 1))
    assert np.isfinite(first) and (first == second) == at_noise


@pytest.mark.parametrize("module", [cifar10_rectified_flow, sd_instaflow])
def test_a_distillation_can_compare_by_lpips(module, published):
    settings = {"autoencoder": "vae"} if module is sd_instaflow else {}
    experiment = module.build(distil=True, lpips="lpips", **settings, smoke=True)
    batch = batch_shapes(experiment)
    objective = experiment.method.objectives[0]
    params, aux = jax.eval_shape(experiment.method.init, jax.random.key(0), batch)
    by_l2 = module.build(distil=True, smoke=True).method.objectives[0]

    def program(loss):
        return str(jax.make_jaxpr(loss)(params, aux, batch, jax.random.key(0), jnp.int32(0)))

    loss, _ = jax.eval_shape(objective.loss, params, aux, batch, jax.random.key(0), jnp.int32(0))
    assert loss.shape == () and loss.dtype == jnp.float32
    assert "reduce_window_max" in program(objective.loss) and "reduce_window_max" not in program(by_l2.loss)


def test_latents_are_compared_as_the_images_they_stand_for(published):
    latents = jax.random.normal(jax.random.key(0), (2, 2, 8, 8, 4))
    lpips, vae = published["lpips"], published["vae"]
    images = [AUTOENCODER.apply({"params": vae.params}, z / 0.18215, method="decode").clip(-1, 1) for z in latents]
    expected = lpips.spec.network.apply({"params": lpips.params}, *images)
    distance = sd_instaflow.decoded_distance("lpips", "vae")
    np.testing.assert_allclose(distance(*latents), expected, rtol=1e-5)
    assert (expected > 0).all() and float(distance(latents[0], latents[0]).max()) < 1e-6


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="distil needs the pairs of a flow"):
        cifar10_rectified_flow.build(distil=True)
    for module in (cifar10_rectified_flow, sd_instaflow):
        with pytest.raises(ValueError, match="lpips weights is a distance of images, for one step"):
            module.build(lpips="weights", smoke=True)
