"""Golden topics of zero-shot editing: the image release on an analytic denoiser, the CIFAR-10 notebook on a network.

Torch arrays are NCHW. The notebook takes the first entry of `ts`, an index, for the deviation of the first noise; its
start is rebuilt here, and everything after it is algorithm 4.
"""

import jax.numpy as jnp
import numpy as np
from golden_consistency_denoise import CONSISTENCY, SIGMA_MAX, SIGMA_MIN, VE, arrays, net_of, ve_level
from golden_consistency_samplers import KEY, normal_denoiser, points
from golden_harness import topic

from jaxdiff import editing
from jaxdiff.denoiser import clip_x0
from jaxdiff.process import q_sample
from jaxdiff.solvers.base import integrate
from jaxdiff.solvers.stochastic_iterative import stochastic_iterative

ATOL = 1e-4
CONSISTENT = stochastic_iterative(VE, SIGMA_MIN)


def nhwc(x):
    return jnp.moveaxis(x, -3, -1)


def nchw(x):
    return jnp.moveaxis(x, -1, -3)


def edited(denoise, view, y, x, grid, noise):
    """The release's loop: the last of the times only takes back the noise that is left there."""
    return integrate(CONSISTENT, editing.hold(clip_x0(denoise), view, y), KEY, x, grid, noise=noise)


@topic("consistency/editing")
def torch_editing(file):
    mean, images, noise, x = map(nhwc, arrays(file, "mean", "images", "noises", "x"))
    grid = points(file.input("ts"), int(file.input("steps")))
    q = editing.orthogonal_from(np.array([0.2989, 0.5870, 0.1140]))
    file.compare("color_Q", q, atol=1e-6)
    file.compare("sr_Q8", editing.orthogonal_from(np.ones(64)), atol=1e-6)
    views = {"color": editing.grey_values(), "sr": editing.patch_means(8)}
    for name, view in views.items():
        shown = editing.replace_known(view, images, jnp.zeros_like(images))
        file.compare(f"{name}_ref", nchw(shown), atol=ATOL)
        out = edited(normal_denoiser(mean), view, images, x, grid, noise)
        file.compare(f"{name}_out", nchw(out), atol=ATOL)

    names = ("inpaint_mean", "inpaint_images", "inpaint_noises", "inpaint_x", "inpaint_mask")
    mean, images, noise, x, mask = map(nhwc, arrays(file, *names))
    view = editing.region(mask)
    file.compare("inpaint_ref", nchw(editing.replace_known(view, images, -jnp.ones_like(images))), atol=ATOL)
    file.compare("inpaint_out", nchw(edited(normal_denoiser(mean), view, images, x, grid, noise)), atol=ATOL)


@topic("consistency/editing_jax")
def jax_editing(file):
    images, noise, z, abc = arrays(file, "images_nhwc", "noises", "init_z", "abc")
    ts = file.input("ts")
    grid = points(ts, int(file.input("train_N")))
    f = net_of(abc, CONSISTENCY)
    mask = jnp.ones([1, 32, 32, 1]).at[:, 8:24, 8:24].set(0.0)
    views = {
        "inpaint": editing.region(mask),
        "color": editing.grey_values(),
        "sr": editing.patch_means(int(file.input("sr_patch"))),
    }
    for name, view in views.items():
        shown = editing.replace_known(view, images, jnp.zeros_like(images))
        file.compare(f"{name}_ref", shown, atol=ATOL)
        x = shown + float(ts[0]) * noise[0]
        file.compare(f"{name}_out", edited(f, view, images, x, grid, noise[1:]), atol=ATOL)

    x = SIGMA_MAX * z
    file.compare("multistep_out", integrate(CONSISTENT, clip_x0(f), KEY, x, grid, noise=noise), atol=ATOL)
    file.compare("onestep_out", f(x, jnp.full(x.shape[:1], SIGMA_MAX)).x0, atol=ATOL)
    std = jnp.full(images.shape[:1], float(file.input("denoise_std")))
    file.compare("denoise_out", f(q_sample(images, z, ve_level(std)), std).x0, atol=ATOL)
    weight = jnp.asarray(file.input("slerp_t"), jnp.float32)
    ends = (jnp.broadcast_to(a, (weight.size, *a.shape)) for a in (z[0], z[1]))
    file.compare("slerp_out", editing.slerp(*ends, weight), atol=ATOL)
