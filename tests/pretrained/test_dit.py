"""State dicts of facebookresearch's DiT: exact round trips, both forms of the blocks, refusals."""

import jax
import numpy as np
import pytest

from jaxdiff.networks.base import init_params
from jaxdiff.networks.dit import DiT, dit_preset, example_inputs
from jaxdiff.pretrained.dit import dit_entries, dit_from_config, export_dit, import_dit
from jaxdiff.pretrained.families import guess

TINY = DiT(in_channels=2, out_channels=3, input_size=8, width=8, depth=3, num_heads=2, num_classes=3)


def drawn(dit):
    generator = np.random.default_rng(0)
    params = init_params(dit, jax.random.key(0), *example_inputs(dit))
    return jax.tree.map(lambda a: generator.standard_normal(a.shape, np.float32), params)


@pytest.mark.parametrize(
    "dit", [TINY, TINY.clone(scan=True), TINY.clone(patch_size=4), TINY.clone(num_classes=None, null_label=False)]
)
def test_round_trip_is_exact(dit):
    params = drawn(dit)
    state = export_dit(params, dit)
    restored = import_dit(state, dit)
    jax.tree.map(np.testing.assert_array_equal, restored, params)
    again = export_dit(restored, dit)
    assert again.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(again[name], tensor)


def test_stacked_blocks_have_the_same_state_dict():
    state = export_dit(drawn(TINY), TINY)
    scanned = TINY.clone(scan=True)
    again = export_dit(import_dit(state, scanned), scanned)
    assert again.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(again[name], tensor)


def test_names_are_those_of_the_release():
    names = {name for entry in dit_entries(dit_preset("XL/2")) for name in entry.names}
    assert len(names) == 7 + 28 * 10 + 4
    assert {"y_embedder.embedding_table.weight", "blocks.27.adaLN_modulation.1.bias", "blocks.0.mlp.fc2.weight"} < names
    assert guess({name: tensor.shape for name, tensor in export_dit(drawn(TINY), TINY).items()}) == "DiT"


def test_half_precision_weights_become_float32():
    state = {name: tensor.astype(np.float16) for name, tensor in export_dit(drawn(TINY), TINY).items()}
    assert {leaf.dtype for leaf in jax.tree.leaves(import_dit(state, TINY))} == {np.dtype(np.float32)}


def test_other_positions_are_refused():
    state = export_dit(drawn(TINY), TINY)
    with pytest.raises(ValueError, match=r"pos_embed of the state dict is not the fixed table .* a trained table is"):
        import_dit(state | {"pos_embed": state["pos_embed"] + 0.01}, TINY)
    with pytest.raises(ValueError, match=r"pos_embed of this DiT must be \(1, 4, 8\), got \(1, 16, 8\)"):
        import_dit(state, TINY.clone(input_size=4))


def test_tensors_that_do_not_fit_are_named():
    state = export_dit(drawn(TINY), TINY)
    damaged = {name: tensor for name, tensor in state.items() if name != "blocks.1.attn.qkv.bias"}
    damaged |= {"blocks.3.attn.qkv.bias": np.zeros(24), "x_embedder.proj.weight": np.zeros((8, 2, 4, 4))}
    with pytest.raises(ValueError) as caught:
        import_dit(damaged, TINY)
    message = str(caught.value)
    assert "1 missing (blocks.1.attn.qkv.bias)" in message and "1 unexpected (blocks.3.attn.qkv.bias)" in message
    assert "1 wrongly shaped (x_embedder.proj.weight (8, 2, 4, 4), expected (8, 2, 2, 2))" in message
    assert "\n" not in message


def test_settings():
    assert dit_from_config({}) == dit_preset("XL/2")
    config = {"input_size": 8, "in_channels": 3, "hidden_size": 32, "depth": 3, "num_heads": 4, "patch_size": 4}
    dit = dit_from_config({**config, "learn_sigma": False, "class_dropout_prob": 0.0, "num_classes": 5})
    assert (dit.out_channels, dit.null_label, dit.num_classes, dit.width, dit.depth) == (3, False, 5, 32, 3)
    with pytest.raises(ValueError, match="'learn_sigmas' is not a setting of the released DiT; known are .*depth"):
        dit_from_config({"learn_sigmas": True})
    with pytest.raises(ValueError, match="only whole mlp_ratio are supported, got 2.5"):
        dit_from_config({"mlp_ratio": 2.5})
