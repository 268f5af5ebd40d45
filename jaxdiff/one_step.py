"""One-step generators: how a trained diffusion network becomes one, and what every one of them can do.

`from_diffusion` wraps a network so that it answers with x0 at every level of a schedule, pure noise included; its
`judge` shows noised data to a discriminator as the same network was trained to see them. Then one call makes data from
noise, or edits data. No network is known here: a discriminator's first parameters are
`networks.unet_discriminator.on_backbone`'s, a student's `networks.base.grown`'s (both refuse other shapes), and
one-step generation under a ControlNet is `from_diffusion` of `networks.controlnet.controlled_network`. Editing with
known pixels is `editing.zero_shot`, sampling in more steps `solvers.stochastic_iterative`.
"""

import numbers
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff import parameterization as parameterizations
from jaxdiff.denoiser import denoiser
from jaxdiff.parameterization import Parameterization
from jaxdiff.process import half_log_snr, q_sample
from jaxdiff.schedules import Schedule
from jaxdiff.solvers.base import level_like
from jaxdiff.types import Cond, Denoiser, Key, Level, Network, Params, expand

Seen = Callable[[Array, Array], tuple[Array, Array]]
MAX_GAIN = 10.0
"""Largest factor on a network's error that one call may have. Of eps it is sigma / alpha: 14.6 at the last index of
Stable Diffusion's chain, 157 at that of DDPM's."""


class Generator(NamedTuple):
    """A network that is safe to call once at pure noise, and what its times and its output mean.

    Attributes:
      network: (params, x_t, t, cond) -> x0 [B, ...].
      schedule: of x_t and t.
      parameterization: x0.
      seen: (x_t [B, ...], t [B]) -> the scaled x_t and the time that the diffusion network is given.
    """

    network: Network
    schedule: Schedule
    parameterization: Parameterization
    seen: Seen

    def denoiser(self, params: Params, cond: Cond | None = None) -> Denoiser:
        """The generator as a Denoiser."""
        return denoiser(self.network, params, self.schedule, self.parameterization, cond)

    def judge(self, discriminator: Network) -> Network:
        """`judge_from_diffusion` of a discriminator on the same diffusion network: (params, x_s, s, cond) -> logits."""
        return _judge(discriminator, self.seen)


def from_diffusion(
    network: Network,
    schedule: Schedule,
    parameterization: Parameterization,
    *,
    onto: Schedule | None = None,
    last_time: float | None = None,
) -> Generator:
    """A trained diffusion network as a generator that answers with x0. Its parameters stay what they are.

    A level of `onto` is translated to the trained level of the same ratio alpha / sigma, and x_t to its scale, so that
    the answer is the trained one. Levels noisier than `last_time`, down to pure noise, are answered as if they were
    that level: there an eps-prediction still determines x0.

    Args:
      network: (params, x_t, t, cond) -> [B, ...], trained on `schedule`; perhaps a `controlled_network`.
      schedule: the one that it was trained on.
      parameterization: what its output means.
      onto: schedule of the generator, e.g. of `schedules.zero_terminal_snr`; None for the same.
      last_time: noisiest time of `schedule` that the network is asked at; None for its t_max.

    Returns:
      Generator on `onto`, with x0 for its output.

    Raises:
      ValueError: if the output hardly determines x0 at last_time, as that of an eps-prediction at the end of its
        chain; or last_time lies outside of the schedule.

    Source: Lin et al. 2023 (arXiv:2305.08891) section 3 on what goes wrong at the last level; the cap is ours.
    """
    require_safe(schedule, parameterization, last_time)
    translate = _translation(schedule, onto, last_time)

    def generator(
        params: Params, x_t: Array, t: Array, cond: Cond, *, train: bool = False, key: Key | None = None
    ) -> Array:
        denoise = denoiser(network, params, schedule, parameterization, cond, train=train, key=key)
        return denoise(*translate(x_t, t)).x0

    seen = as_trained(schedule, parameterization, onto=onto, last_time=last_time)
    return Generator(generator, schedule if onto is None else onto, parameterizations.x0(), seen)


def judge_from_diffusion(
    discriminator: Network,
    schedule: Schedule,
    parameterization: Parameterization,
    *,
    onto: Schedule | None = None,
    last_time: float | None = None,
) -> Network:
    """A discriminator on the backbone of a diffusion network, called as (params, x_s, s, cond) -> logits.

    Args:
      discriminator: (params, x, t, cond) -> logits, which takes x and t as the backbone was trained to take them.
      schedule, parameterization, onto, last_time: as for `from_diffusion`; x_s and s are of `onto`.
    """
    return _judge(discriminator, as_trained(schedule, parameterization, onto=onto, last_time=last_time))


def as_trained(
    schedule: Schedule,
    parameterization: Parameterization,
    *,
    onto: Schedule | None = None,
    last_time: float | None = None,
) -> Seen:
    """(x_t [B, ...], t [B]) of `onto` -> what a network trained on `schedule` is given: scaled x_t, and its time.

    Args: as for `from_diffusion`.
    """
    translate = _translation(schedule, onto, last_time)

    def seen(x_t: Array, t: Array) -> tuple[Array, Array]:
        x, t = translate(x_t, t)
        scale = parameterization.coefficients(level_like(schedule, t, x)).scale_in
        return expand(scale, x) * x, parameterization.net_time(t)

    return seen


def require_safe(schedule: Schedule, parameterization: Parameterization, last_time: float | None = None) -> None:
    """Refuses a network whose error one call at the last level would multiply by more than MAX_GAIN.

    Raises:
      ValueError: with the noisiest time that is safe.
    """
    last = schedule.t_max if last_time is None else last_time
    if not schedule.t_min <= last <= schedule.t_max:
        raise ValueError(
            f"one step: last_time must lie in the schedule's {schedule.t_min:g} to {schedule.t_max:g}, got {last:g}"
        )
    gain = _gain(schedule, parameterization, np.array([last]))[0]
    if gain <= MAX_GAIN:
        return
    grid = np.linspace(schedule.t_max, schedule.t_min, 1000)
    safe = grid[_gain(schedule, parameterization, grid) <= MAX_GAIN]
    remedy = f"from_diffusion with last_time={np.floor(safe[0] * 1000) / 1000:g} or less, or " if safe.size else ""
    raise ValueError(
        f"one step: at t = {last:g} this output (eps?) determines x0 only up to {gain:.3g} times its own error, at "
        f"most {MAX_GAIN:g} is safe; use {remedy}a network that predicts v or x0"
    )


def pure_noise(noise: Float[Array, "b ..."], level: Level) -> Float[Array, "b ..."]:
    """What a generator makes data from: noise with the deviation of x_t, sqrt(alpha^2 + sigma^2), for unit data.

    Args:
      noise: [B, ...] unit normal, returned as it is where the schedule preserves the variance.
      level: [B].
    """
    return expand(_deviation(level), noise) * noise


def ending_in_noise(schedule: Schedule, t: Float[Array, " b"], level: Level) -> Level:
    """The levels of t, with no signal at t_max: there a generator should learn from what it will sample from.

    It is what `schedules.zero_terminal_snr` does to a chain's last level, for any schedule and without moving others.
    """
    at_end = t >= jnp.asarray(schedule.t_max, t.dtype)
    alpha = jnp.where(at_end, jnp.zeros_like(level.alpha), level.alpha)
    return Level(alpha, jnp.where(at_end, _deviation(level), level.sigma))


def require_same_form(params: Params, teacher_params: Params) -> None:
    """Refuses a student that differs from its teacher in a name or a shape.

    Raises:
      ValueError: naming the first parameter that differs.
    """
    ours, theirs = (
        {jax.tree_util.keystr(path, simple=True, separator="/"): jnp.shape(leaf) for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (params, teacher_params))
    )
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"student and teacher differ: {name} is {ours.get(name, 'absent')} in the student and "
                f"{theirs.get(name, 'absent')} in the teacher; build both as the same network"
            )


def from_noise(denoise: Denoiser, schedule: Schedule, noise: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Data from unit noise [B, ...] in one call, at the schedule's last level."""
    t = jnp.full(noise.shape[:1], schedule.t_max, noise.dtype)
    return denoise(pure_noise(noise, level_like(schedule, t, noise)), t).x0


def image_to_image(
    denoise: Denoiser,
    schedule: Schedule,
    x0: Float[Array, "b ..."],
    strength: float | Float[Array, ""],
    noise: Float[Array, "b ..."],
) -> Float[Array, "b ..."]:
    """Edits data in one call: noised to a level, and back with the condition inside `denoise`.

    Args:
      denoise: the generator, with the condition to edit towards.
      schedule: its schedule.
      x0: [B, ...] data, or latents.
      strength: in (0, 1], may be traced: `time_of_share` of the level. Small ones keep x0, 1 is the last level.
      noise: [B, ...] unit normal.

    Raises:
      ValueError: for a strength outside of (0, 1] (numbers only; a traced value is not checked).

    Source: Meng et al. 2021 (arXiv:2108.01073) with one step, as in Xu et al. 2023 (arXiv:2311.09257) section 5.
    """
    if isinstance(strength, numbers.Real) and not 0 < strength <= 1:
        raise ValueError(f"image_to_image: strength must be in (0, 1], got {strength}; 1 ignores the image")
    t = time_of_share(schedule, jnp.full(x0.shape[:1], strength, x0.dtype))
    return denoise(q_sample(x0, noise, level_like(schedule, t, x0)), t).x0


def time_of_share(schedule: Schedule, share: Float[Array, " b"]) -> Float[Array, " b"]:
    """The time of the level with sigma / (alpha + sigma) = share, a flow's t; held between t_min and t_max.

    Args:
      schedule: any.
      share: [B] in [0, 1].
    """
    h = jnp.log1p(-share) - jnp.log(share)
    ends = [_half_log_snr(schedule, t) for t in (schedule.t_max, schedule.t_min)]
    return jnp.clip(schedule.time(jnp.clip(h, *ends)), schedule.t_min, schedule.t_max)


def _judge(discriminator: Network, seen: Seen) -> Network:
    def judge(
        params: Params, x_t: Array, t: Array, cond: Cond, *, train: bool = False, key: Key | None = None
    ) -> Array:
        return discriminator(params, *seen(x_t, t), cond, train=train, key=key)

    return judge


def _translation(
    trained: Schedule, onto: Schedule | None, last_time: float | None
) -> Callable[[Array, Array], tuple[Array, Array]]:
    """(x, t) on `onto` -> (x, t) on `trained`, at most last_time."""
    last = trained.t_max if last_time is None else last_time
    here, lowest = trained if onto is None else onto, _half_log_snr(trained, last)

    def translate(x: Array, t: Array) -> tuple[Array, Array]:
        ours = level_like(here, t, x)
        if onto is not None:
            t = jnp.maximum(trained.time(jnp.maximum(half_log_snr(ours), lowest)), trained.t_min)
        t = jnp.minimum(t, last)
        theirs = level_like(trained, t, x)
        return expand(_deviation(theirs) / _deviation(ours), x) * x, t

    return translate


def _deviation(level: Level) -> Array:
    return jnp.sqrt(level.alpha**2 + level.sigma**2)


def _half_log_snr(schedule: Schedule, t: float) -> float:
    with jax.ensure_compile_time_eval():
        return float(half_log_snr(schedule.level(jnp.full([1], t, jnp.float32)))[0])


def _gain(schedule: Schedule, parameterization: Parameterization, t: np.ndarray) -> np.ndarray:
    with jax.ensure_compile_time_eval():
        out = np.abs(np.asarray(parameterization.coefficients(schedule.level(jnp.asarray(t, jnp.float32))).out))
    return np.where(np.isfinite(out), out, np.inf)
