"""ControlNet: a new one changes nothing, copies its UNet, learns through its zero convolutions, refuses bad hints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.networks.base import init_params, num_params, param_shapes
from jaxdiff.networks.controlnet import (
    controlled_network,
    controlnet_for,
    copy_encoder,
    example_inputs,
    guess_scales,
    middle_scales,
    scale_control,
)
from jaxdiff.networks.unet import UNet
from jaxdiff.networks.unet import example_inputs as unet_inputs
from jaxdiff.networks.unet_presets import stable_diffusion_unet

UNET = UNet(
    in_channels=2,
    out_channels=2,
    base_channels=8,
    channel_mult=(1,),
    num_res_blocks=1,
    transformer_depth=1,
    context_dim=6,
    norm_groups=4,
)
CONTROLNET = controlnet_for(UNET, hint_widths=(4, 8))


def inputs():
    keys = jax.random.split(jax.random.key(1), 3)
    cond = {"context": jax.random.normal(keys[1], (2, 3, 6)), "hint": jax.random.uniform(keys[2], (2, 8, 8, 3))}
    return jax.random.normal(keys[0], (2, 4, 4, 2)), jnp.asarray([3.0, 700.0]), cond


@pytest.fixture(scope="module")
def params():
    unet = init_params(UNET, jax.random.key(0), *unet_inputs(UNET))
    # The UNet's own last layers start at zero too, so that nothing would be seen through them.
    unet = jax.tree.map(lambda a: a + 0.05, unet)
    fresh = init_params(CONTROLNET, jax.random.key(1), *example_inputs(CONTROLNET))
    return {"unet": unet, "controlnet": copy_encoder(fresh, unet)}


def test_a_new_controlnet_changes_nothing_and_can_learn(params):
    x, t, cond = inputs()
    network = controlled_network(UNET, CONTROLNET)

    def loss(controlnet):
        out = network({"unet": params["unet"], "controlnet": controlnet}, x, t, cond)
        return jnp.mean(out**2), out

    (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params["controlnet"])
    plain = jax.jit(lambda p: UNET.apply({"params": p}, x, t, {"context": cond["context"]}))(params["unet"])
    np.testing.assert_allclose(out, plain, atol=1e-6)
    zero_layers = [name for name in gradient if name.endswith("_zero")]
    assert len(zero_layers) == 3
    for name in zero_layers:
        assert np.any(np.asarray(gradient[name]["kernel"])), name
    upstream = {name: tree for name, tree in gradient.items() if name not in zero_layers}
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(upstream))


def test_the_copy_is_the_unets_and_shares_no_buffer(params):
    unet, copy = params["unet"], params["controlnet"]
    shared = set(unet) & set(copy)
    assert {"conv_in", "time_in", "time_out", "down_0_0_res", "mid_attention", "mid_res_out"} <= shared
    for name in shared:
        jax.tree.map(np.testing.assert_array_equal, copy[name], unet[name])
    assert copy["conv_in"]["kernel"].unsafe_buffer_pointer() != unet["conv_in"]["kernel"].unsafe_buffer_pointer()
    assert not {name for name in copy if name.startswith(("up_", "norm_out", "conv_out"))}


def test_parameter_count_is_the_released_one():
    controlnet = controlnet_for(stable_diffusion_unet(1))
    count = num_params(param_shapes(controlnet, *example_inputs(controlnet)))
    assert round(count / 1e6, 3) == 361.279


def test_scales():
    control = [jnp.full((1, 1, 1, 2), value) for value in (1.0, 2.0, 3.0)]
    assert [float(c[0, 0, 0, 0]) for c in scale_control(control, 0.5)] == [0.5, 1.0, 1.5]
    assert [float(c[0, 0, 0, 0]) for c in scale_control(control, middle_scales(3))] == [0.0, 0.0, 3.0]
    assert guess_scales(3) == pytest.approx((0.680625, 0.825, 1.0))
    with pytest.raises(ValueError, match=r"one number or 3, one a residual, got shape \(2,\)"):
        scale_control(control, (1.0, 2.0))


def test_what_does_not_fit_is_refused(params):
    x, t, cond = inputs()

    def apply(cond):
        return CONTROLNET.apply({"params": params["controlnet"]}, x, t, cond)

    with pytest.raises(ValueError, match=r"needs cond\['hint'\] \[B, 8, 8, 3\], got \['context'\]"):
        apply({"context": cond["context"]})
    with pytest.raises(ValueError, match=r"must be \[B, 8, 8, 3\] .* got \[2, 8, 4, 3\]; resize"):
        apply({**cond, "hint": cond["hint"][:, :, :4]})
    with pytest.raises(ValueError, match="takes no low_res image, got low_res_channels 3"):
        controlnet_for(UNET.clone(low_res_channels=3))
    with pytest.raises(ValueError, match=r"conv_in/kernel is \(3, 3, 2, 8\) in the ControlNet and \(3, 3, 1, 8\)"):
        copy_encoder({"conv_in": {"kernel": jnp.zeros((3, 3, 2, 8))}}, {"conv_in": {"kernel": jnp.zeros((3, 3, 1, 8))}})
