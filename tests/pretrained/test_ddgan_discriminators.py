"""State dicts of DDGAN's discriminators: exact round trips, names, refusals."""

import jax
import numpy as np
import pytest

from jaxdiff.networks.base import init_params
from jaxdiff.networks.ddgan_discriminators import (
    ddgan_large_discriminator,
    ddgan_small_discriminator,
    example_inputs,
)
from jaxdiff.pretrained.ddgan_discriminators import discriminator_entries, export_discriminator, import_discriminator
from jaxdiff.pretrained.families import guess

SMALL = ddgan_small_discriminator().clone(base_channels=4, time_features=8)
LARGE = ddgan_large_discriminator().clone(base_channels=4, time_features=8)


def drawn(net):
    generator = np.random.default_rng(0)
    params = init_params(net, jax.random.key(0), *example_inputs(net))
    return jax.tree.map(lambda a: generator.standard_normal(a.shape, np.float32), params)


@pytest.mark.parametrize("net", [SMALL, LARGE])
def test_round_trip_is_exact(net):
    params = drawn(net)
    state = export_discriminator(params, net)
    assert guess({name: tensor.shape for name, tensor in state.items()}) == "DDGAN discriminator"
    restored = import_discriminator(state, net)
    jax.tree.map(np.testing.assert_array_equal, restored, params)
    again = export_discriminator(restored, net)
    assert list(again) == list(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(again[name], tensor)


def test_names_are_those_of_the_release():
    names = [name for entry in discriminator_entries(LARGE) for name in entry.names]
    assert len(names) == len(set(names)) == 6 + 6 * 7 + 4
    assert {"t_embed.main.2.bias", "conv6.conv1.0.weight", "conv1.skip.0.weight", "end_linear.weight"} < set(names)


def test_the_other_size_does_not_fit():
    with pytest.raises(ValueError, match=r"14 missing \(conv5.conv1.0.bias.* 16 wrongly shaped") as caught:
        import_discriminator(export_discriminator(drawn(SMALL), SMALL), LARGE)
    assert "\n" not in str(caught.value)
