"""The UNet's behaviour that no released network shows: refusals, switches, gradients everywhere, features, control."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.flops import count_flops
from jaxdiff.networks import attention, convolution
from jaxdiff.networks.attention import portable
from jaxdiff.networks.base import as_network, init_params, num_params, param_shapes
from jaxdiff.networks.initializers import fan_average, fan_average_tiny
from jaxdiff.networks.unet import Block, UNet, example_inputs, unet_plan

TINY = UNet(base_channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4, attention_factors=(2,))
# One level: what compiles takes half the time.
SMALL = TINY.clone(channel_mult=(1,), attention_factors=())
EVERYTHING = UNet(
    in_channels=2,
    out_channels=3,
    base_channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_factors=(2,),
    head_channels=4,
    transformer_depth=1,
    context_dim=6,
    num_classes=3,
    null_label=True,
    vector_dim=5,
    low_res_channels=2,
    concat_channels=1,
    scale_shift_norm=True,
    resample="resblock",
    norm_groups=4,
)
BATCH = 2


def inputs(unet, size=4, seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    x_t = jax.random.normal(next(keys), (BATCH, size, size, unet.in_channels))
    cond = {}
    if unet.num_classes is not None:
        cond["label"] = jnp.arange(BATCH, dtype=jnp.int32)
    if unet.context_dim is not None:
        cond["context"] = jax.random.normal(next(keys), (BATCH, 3, unet.context_dim))
    if unet.vector_dim is not None:
        cond["vector"] = jax.random.normal(next(keys), (BATCH, unet.vector_dim))
    if unet.low_res_channels:
        cond["low_res"] = jax.random.normal(next(keys), (BATCH, size // 2, size // 2, unet.low_res_channels))
    if unet.concat_channels:
        cond["concat"] = jax.random.normal(next(keys), (BATCH, size, size, unet.concat_channels))
    return x_t, jnp.asarray([3.0, 700.0]), cond


@functools.cache
def active_params(unet):
    """Parameters none of which is zero: what training makes of the zero-initialised layers."""
    params = init_params(unet, jax.random.key(0), *example_inputs(unet))
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda a: a + 0.05 * generator.standard_normal(a.shape, np.float32), params)


@functools.cache
def compiled(unet, train=False):
    def run(params, x_t, t, cond, key):
        return as_network(unet)(params, x_t, t, cond, train=train, key=key)

    return jax.jit(run)


def run(unet, x_t, t, cond, *, train=False, key=None):
    return compiled(unet, train)(active_params(unet), x_t, t, cond, key)


def shaped(unet, x_t, t, cond, **options):
    """Traces a call, which raises what a call would raise."""
    params = param_shapes(unet, *example_inputs(unet))
    return jax.eval_shape(lambda p: unet.apply({"params": p}, x_t, t, cond, **options), params)


def test_the_untrained_network_answers_zero():
    params = init_params(SMALL, jax.random.key(0), *example_inputs(SMALL))
    np.testing.assert_array_equal(compiled(SMALL)(params, *inputs(SMALL), None), 0.0)


def test_the_untrained_ddpm_network_answers_almost_zero():
    unet = SMALL.clone(layer_rule=fan_average, output_rule=fan_average_tiny)
    out = compiled(SMALL)(init_params(unet, jax.random.key(0), *example_inputs(unet)), *inputs(unet), None)
    assert 0 < np.abs(out).max() < 1e-4


@pytest.mark.slow
def test_gradient_reaches_every_parameter():
    x_t, t, cond = inputs(EVERYTHING)

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: jnp.mean(EVERYTHING.apply({"params": p}, x_t, t, cond) ** 2))(params)

    largest = jax.tree.leaves_with_path(
        jax.tree.map(lambda g: float(jnp.abs(g).max()), gradient(active_params(EVERYTHING)))
    )
    silent = [jax.tree_util.keystr(path) for path, size in largest if not size > 1e-9]
    assert silent == []


@pytest.mark.parametrize("name", ["label", "context", "vector", "low_res", "concat"])
def test_each_condition_changes_the_answer_of_its_own_example_only(name):
    x_t, t, cond = inputs(EVERYTHING)
    changed = dict(cond)
    changed[name] = cond[name].at[0].set(cond[name][0] + 1)
    before, after = run(EVERYTHING, x_t, t, cond), run(EVERYTHING, x_t, t, changed)
    assert np.abs(before[0] - after[0]).max() > 1e-4
    np.testing.assert_allclose(before[1], after[1], atol=1e-6)


def test_the_null_label_is_one_more_row():
    shapes = param_shapes(EVERYTHING, *example_inputs(EVERYTHING))
    assert shapes["label"]["embedding"].shape == (4, 32)
    x_t, t, cond = inputs(EVERYTHING)
    assert np.isfinite(run(EVERYTHING, x_t, t, cond | {"label": jnp.asarray([3, 3])})).all()
    assert np.isnan(run(EVERYTHING, x_t, t, cond | {"label": jnp.asarray([4, 4])})).all()


def test_bfloat16_computes_alike_and_returns_float32():
    half = SMALL.clone(dtype=jnp.bfloat16)
    x_t, t, cond = inputs(SMALL)
    exact, rough = run(SMALL, x_t, t, cond), compiled(half)(active_params(SMALL), x_t, t, cond, None)
    assert rough.dtype == jnp.float32
    difference = np.abs(exact - rough).max() / np.abs(exact).max()
    assert 1e-5 < difference < 0.1


def test_dropout_acts_in_training_only_and_follows_its_key():
    dropping = SMALL.clone(dropout=0.5)
    x_t, t, cond = inputs(SMALL)
    still, dropped = (
        str(jax.make_jaxpr(functools.partial(as_network(u), cond=cond))(active_params(SMALL), x_t, t))
        for u in (SMALL, dropping)
    )
    assert still == dropped
    k0, k1 = jax.random.split(jax.random.key(0))
    first, again, other = (compiled(dropping, True)(active_params(SMALL), x_t, t, cond, key) for key in (k0, k0, k1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert np.abs(first - run(SMALL, x_t, t, cond)).max() > 1e-3
    with pytest.raises(ValueError, match=r"train=True with dropout 0.5 needs a random key"):
        shaped(dropping, x_t, t, cond, train=True)


@pytest.mark.slow
def test_remat_changes_neither_values_nor_gradients():
    saving, params, (x_t, t, cond) = SMALL.clone(remat=True), active_params(SMALL), inputs(SMALL)

    def loss(p, unet):
        return jnp.mean(unet.apply({"params": p}, x_t, t, cond) ** 2)

    results = [jax.jit(jax.value_and_grad(functools.partial(loss, unet=unet)))(params) for unet in (saving, SMALL)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *results)


def test_remat_wraps_every_block_of_the_same_tree_also_with_dropout():
    saving = TINY.clone(remat=True, dropout=0.1)
    assert param_shapes(saving, *example_inputs(saving)) == param_shapes(TINY, *example_inputs(TINY))
    x_t, t, cond = inputs(TINY)
    call = functools.partial(as_network(saving), cond=cond, train=True, key=jax.random.key(0))
    primitives = [equation.primitive.name for equation in jax.make_jaxpr(call)(active_params(TINY), x_t, t).eqns]
    # residual blocks: 2 down, 2 in the middle, 4 up; attention: 1 down, 1 in the middle, 2 up
    assert sum(name.startswith("remat") for name in primitives) == 8 + 4


def test_features_carry_the_names_of_the_plan():
    x_t, t, cond = inputs(TINY)
    _, features = shaped(TINY, x_t, t, cond, return_features=True)
    assert {name: leaf.shape[1:] for name, leaf in features.items()} == {
        "conv_in": (4, 4, 8),
        "down_0_0": (4, 4, 8),
        "down_0_downsample": (2, 2, 8),
        "down_1_0": (2, 2, 16),
        "mid": (2, 2, 16),
        "up_1_0": (2, 2, 16),
        "up_1_1": (2, 2, 16),
        "up_1_upsample": (4, 4, 16),
        "up_0_0": (4, 4, 8),
        "up_0_1": (4, 4, 8),
    }


def test_control_residuals_are_added_to_skips_and_middle():
    x_t, t, cond = inputs(SMALL)
    _, features = shaped(SMALL, x_t, t, cond, return_features=True)
    names = ["conv_in", "down_0_0", "mid"]
    params = active_params(SMALL)
    controlled = jax.jit(lambda control: SMALL.apply({"params": params}, x_t, t, cond, control=control))
    zeros = [jnp.zeros(features[name].shape) for name in names]
    before = run(SMALL, x_t, t, cond)
    np.testing.assert_allclose(controlled(zeros), before, atol=1e-6)
    for i, zero in enumerate(zeros):
        ramp = jnp.cos(jnp.arange(zero.size, dtype=zero.dtype)).reshape(zero.shape)
        assert np.abs(controlled([*zeros[:i], ramp, *zeros[i + 1 :]]) - before).max() > 1e-3
    with pytest.raises(ValueError, match="control needs 3 residuals for this UNet, got 2"):
        shaped(SMALL, x_t, t, cond, control=zeros[:2])


def test_heads_can_differ_by_level_and_on_the_way_up():
    unet = TINY.clone(attention_factors=(1, 2), num_heads=(2, 4), num_heads_up=1)
    plan = unet_plan(unet)
    heads = {step.name: step.heads for step in (*plan.down, plan.mid, *plan.up) if isinstance(step, Block)}
    assert heads == {"down_0_0": 2, "down_1_0": 4, "mid": 4, "up_1_0": 1, "up_1_1": 1, "up_0_0": 1, "up_0_1": 1}


def test_the_middle_can_do_without_attention():
    assert "mid_attention" not in param_shapes(TINY.clone(mid_attention=False), *example_inputs(TINY))


def test_plain_resampling_has_no_parameters():
    names = set(param_shapes(TINY, *example_inputs(TINY)))
    plain = set(param_shapes(TINY.clone(resample="plain"), *example_inputs(TINY)))
    assert names - plain == {"down_0_downsample", "up_1_upsample"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_factors": (2, 4)}, r"attention factor 4 never occurs: 2 levels have factors \[1, 2\]"),
        ({"base_channels": 6}, "level 0 has 6 channels, which do not split into 4 norm groups"),
        ({"num_heads": 3}, "down_1_0 has 16 channels, which do not split into 3 heads"),
        ({"head_channels": 5}, "down_1_0 has 16 channels, which do not split into heads of 5 channels"),
        ({"num_heads": 2, "head_channels": 4}, "give num_heads or head_channels, not both"),
        ({"num_heads_up": 2, "head_channels": 4}, "num_heads_up has no effect with head_channels"),
        ({"num_heads": (1, 1, 1)}, r"num_heads \(1, 1, 1\) needs one entry for each of the 2 levels"),
        ({"resample": "resblocks"}, "got 'resblocks'; did you mean 'resblock'"),
        ({"context_dim": 8}, "context_dim 8 needs a transformer_depth of at least 1, got 0"),
        ({"null_label": True}, "null_label needs num_classes"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"channel_mult": ()}, "at least one level"),
    ],
)
def test_contradicting_fields_are_refused_when_built(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        TINY.clone(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, t, c: (x[:, :3], t, c), "height and width must be divisible by 2 for 2 levels, got 3 x 4"),
        (lambda x, t, c: (x[..., :1], t, c), r"x_t must be \[B, H, W, 2\] for this UNet, got \(2, 4, 4, 1\)"),
        (lambda x, t, c: (x, t, c | {"lable": c["label"]}), "cond has 'lable', .*did you mean 'label'"),
        (lambda x, t, c: (x, t, {k: v for k, v in c.items() if k != "label"}), r"this UNet needs cond\['label'\]"),
        (lambda x, t, c: (x, t, c | {"context": c["vector"][:, None]}), r"cond\['context'\] must have 6 channels"),
        (lambda x, t, c: (x, t, c | {"concat": c["concat"][:, :2]}), r"must have the batch, height and width of"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        shaped(EVERYTHING, *change(*inputs(EVERYTHING)))
    assert "\n" not in str(caught.value)


def test_conditioning_the_network_would_ignore_is_refused():
    x_t, t, _ = inputs(TINY)
    with pytest.raises(ValueError, match="cond has 'label' but this UNet is not built for it"):
        shaped(TINY, x_t, t, {"label": jnp.zeros(BATCH, jnp.int32)})


def peer_unet_loss():
    """The network that the peers' benchmark runs: eight heads of eight channels at 16 x 16 and in the middle."""
    unet = UNet(base_channels=32, channel_mult=(1, 2, 2), attention_factors=(2,), head_channels=8)
    params = param_shapes(unet, *example_inputs(unet))
    x = jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.float32)
    return params, x, lambda p, x: jnp.mean(as_network(unet)(p, x, jnp.zeros(16), {}) ** 2)


def test_the_peers_network_has_their_parameters_and_flops():
    params, x, loss = peer_unet_loss()
    assert num_params(params) == 1_624_323
    with portable():  # doubling and a convolution in one takes fewer products, on a CPU
        forward = count_flops(jax.make_jaxpr(loss)(params, x).jaxpr)
    products_of_attention = 4 * 16 * 8 * 8 * (5 * 256**2 + 64**2)
    assert forward - products_of_attention == pytest.approx(12.0e9, rel=0.02)  # the peers' counter leaves them out
    first_layers = 2 * 16 * (32 * 32 * 27 * 32 + 32 * 128)
    with portable():
        both = count_flops(jax.make_jaxpr(jax.value_and_grad(loss))(params, x).jaxpr)
    # Each layer once forward and twice backward, but the inputs of the first layers need no gradient.
    assert both == pytest.approx(3 * forward - first_layers, rel=1e-3)


def test_the_network_exports_for_every_platform(monkeypatch):
    for module, threshold in ((attention, "MANY_SCORES"), (convolution, "MANY_PRODUCTS")):
        monkeypatch.setattr(module, threshold, 0)
    x_t, t, cond = inputs(TINY)

    def loss(params, x_t):
        return jnp.mean(as_network(TINY)(params, x_t, t, cond) ** 2)

    with portable():
        exported = jax.export.export(jax.jit(jax.value_and_grad(loss)), platforms=["cpu", "cuda", "tpu"])(
            active_params(TINY), x_t
        )
    assert exported.platforms == ("cpu", "cuda", "tpu")


def test_forward_mode_of_the_network_is_asked_for(monkeypatch):
    monkeypatch.setattr(convolution, "MANY_PRODUCTS", 0)
    x_t, t, cond = inputs(TINY)

    def slope(network):
        params = active_params(TINY)
        return jax.jit(lambda x: jax.jvp(lambda x: network(params, x, t, cond), (x,), (x,))[1]).lower(x_t)

    with pytest.raises(TypeError, match="forward-mode"):
        slope(as_network(TINY))
    assert slope(as_network(TINY, forward_mode=True)).out_info.shape == x_t.shape
