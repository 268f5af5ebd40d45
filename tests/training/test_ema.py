"""Moving averages against their closed forms in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.training import ema

BATCH = 16


def decays(spec, num_steps):
    return [1 - float(spec.rate(jnp.int32(step), BATCH)) for step in range(num_steps)]


def test_constant_decay_after_n_steps_is_a_geometric_sum():
    spec = ema.constant("slow", 0.9)
    params = {"model": {"w": jnp.float32([1.0, -2.0])}}
    averages = ema.start([spec], params)
    np.testing.assert_array_equal(averages["slow"]["model"]["w"], params["model"]["w"])
    moved = {"model": {"w": jnp.float32([3.0, 5.0])}}
    for step in range(7):
        averages = ema.update([spec], averages, moved, jnp.int32(step), BATCH)
    expected = 0.9**7 * np.array([1.0, -2.0]) + (1 - 0.9**7) * np.array([3.0, 5.0])
    np.testing.assert_allclose(averages["slow"]["model"]["w"], expected, rtol=1e-6)


def test_a_decay_near_one_keeps_its_digits():
    rate = float(ema.constant("slow", 0.9999).rate(jnp.int32(0), BATCH))
    assert rate == pytest.approx(1e-4, rel=1e-7)


def test_warmup_counts_its_updates_from_one():
    expected = [min(0.6, (1 + n) / (10 + n)) for n in range(1, 30)]
    np.testing.assert_allclose(decays(ema.warmup("ldm", 0.6), 29), expected, rtol=1e-6)
    assert expected[-1] == 0.6 and expected[0] == 2 / 11


def test_after_first_begins_with_the_parameters_of_the_first_update():
    assert decays(ema.after_first("late", 0.9), 3) == pytest.approx([0, 0.9, 0.9])


def test_half_life_with_ramp_is_the_edm_formula():
    images, ramp = 200.0, 0.5
    life = [min(images, ramp * BATCH * step) for step in range(60)]
    expected = [0.5 ** (BATCH / max(h, 1e-8)) for h in life]
    np.testing.assert_allclose(decays(ema.half_life("edm", images, ramp_up=ramp), 60), expected, atol=2e-7)
    assert expected[0] == 0 and life[-1] == images


def test_half_life_halves_the_weight_of_the_start():
    spec = ema.half_life("edm", 10 * BATCH, ramp_up=None)
    averages = ema.start([spec], {"model": {"w": jnp.ones(())}})
    for step in range(10):
        averages = ema.update([spec], averages, {"model": {"w": jnp.zeros(())}}, jnp.int32(step), BATCH)
    assert float(averages["edm"]["model"]["w"]) == pytest.approx(0.5, rel=1e-6)


def test_only_the_chosen_players_are_averaged():
    params = {"model": {"w": jnp.ones(2)}, "disc": {"w": jnp.ones(3)}}
    averages = ema.start([ema.constant("a", 0.5, players=("model",)), ema.constant("b", 0.5)], params)
    assert {name: sorted(players) for name, players in averages.items()} == {"a": ["model"], "b": ["disc", "model"]}


def test_averages_of_bfloat16_are_float32_and_move():
    params = {"model": {"w": jnp.ones(2, jnp.bfloat16), "count": jnp.int32(3)}}
    averages = ema.start([ema.constant("slow", 0.9999)], params)
    moved = jax.tree.map(lambda a: a + a, params)
    averages = ema.update([ema.constant("slow", 0.9999)], averages, moved, jnp.int32(0), BATCH)
    assert averages["slow"]["model"]["w"].dtype == jnp.float32
    np.testing.assert_allclose(averages["slow"]["model"]["w"], 1.0001, rtol=1e-7)
    assert int(averages["slow"]["model"]["count"]) == 6


@pytest.mark.parametrize("make", [ema.constant, ema.warmup, ema.after_first])
@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_outside_its_range_is_refused(make, decay):
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\), got"):
        make("slow", decay)


def test_other_refusals_name_the_value():
    with pytest.raises(ValueError, match="must be above 0, got images=0"):
        ema.half_life("edm", 0)
    with pytest.raises(ValueError, match="unknown player 'critic': players are"):
        ema.start([ema.constant("slow", 0.9, players=("critic",))], {"model": {}})


def test_drift_is_the_relative_distance_from_an_average_and_from_the_start():
    specs = (ema.constant("slow", 0.5), ema.initial("start", players=("model",)))
    params = {"model": {"w": jnp.array([3.0, 4.0])}, "disc": {"w": jnp.array([1.0])}}
    averages = ema.start(specs, params)
    assert {float(value) for value in ema.drift(averages, params).values()} == {0.0}
    moved = {"model": {"w": jnp.array([3.0, 9.0])}, "disc": {"w": jnp.array([1.0])}}
    averages = ema.update(specs, averages, moved, jnp.int32(0), 8)
    np.testing.assert_array_equal(averages["start"]["model"]["w"], params["model"]["w"])
    found = {name: float(value) for name, value in ema.drift(averages, moved).items()}
    assert found == pytest.approx(
        {"model/drift_slow": 2.5 / np.hypot(3, 6.5), "disc/drift_slow": 0.0, "model/drift_start": 1.0}
    )
