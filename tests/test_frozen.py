"""Frozen samplers: the bits of the sampler they were made from, without our networks, or one line why not."""

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import parameterization, schedules
from jaxdiff.frozen import ABOUT, WEIGHTS, FrozenError, freeze, load, run, save
from jaxdiff.generate import Dials, batches, compiled, labels_for
from jaxdiff.methods.ddpm import ddpm
from jaxdiff.networks.attention import portable
from jaxdiff.runs import experiment_from
from jaxdiff.solvers.named import SOLVERS

ROOT = Path(__file__).parents[1]
DIGITS, TOY = (ROOT / "experiments" / name for name in ("digits_ddpm.py", "toy_ddpm.py"))
CLASSES = 4
DDIM = SOLVERS["ddim"]


def made(file=DIGITS) -> tuple[Any, Any, Any]:
    experiment = experiment_from(file, ["smoke=true"])
    batch = jax.tree.map(jnp.asarray, dict(next(experiment.data())))
    params, aux = experiment.method.init(jax.random.key(0), batch)
    # Output layers start at zero: random ones, so that what is drawn depends on every weight.
    fill = lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape)  # noqa: E731
    return experiment, jax.tree.map(fill, params), aux


def draw(
    experiment, params, aux, num, batch_size=4, *, solver=None, num_steps=None, dials=None, label=None, seed=0,
    form=portable,
):  # fmt: skip
    """What `jaxdiff sample` draws on one device, with the portable form of the network or its usual one."""
    with form():
        parts = batches(
            compiled(experiment.method, solver=solver, num_steps=num_steps), params, aux,
            shape=experiment.sample_shape, labels=labels_for(num, experiment.num_classes, label), num=num,
            batch_size=batch_size, seed=seed, dials=dials or Dials(),
        )  # fmt: skip
        return np.concatenate(list(parts))


def small(network=None, *, null_label: int | None = CLASSES):
    """A method on points whose network is one product, as (experiment, params, aux)."""

    def usual(params, x_t, t, cond, *, train=False, key=None):
        del t, train, key
        return x_t * params["w"].astype(x_t.dtype)[None] + 0.1 * cond["label"][:, None].astype(x_t.dtype)

    method = ddpm(
        network or usual, schedules.cosine_betas(16), init_params=lambda key, batch: {"w": jnp.ones((3,))},
        parameterization=parameterization.v(), label_dropout=0.1 if null_label else 0.0, null_label=null_label,
    )  # fmt: skip
    experiment = dataclasses.replace(
        experiment_from(TOY, ["smoke=true"]), name="small", method=method, sample_shape=(3,), num_classes=CLASSES
    )
    return experiment, {"model": {"w": jnp.arange(3, dtype=jnp.bfloat16) / 8}}, {}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A UNet with attention: (experiment, params, aux), the path of its file, and the sampler read back from it."""
    parts = made()
    path = tmp_path_factory.mktemp("frozen") / "digits.jaxdiff"
    save(freeze(*parts, solver=SOLVERS["dpmpp_2m"], num_steps=3, step=7, average="ema"), path)
    return parts, path, load(path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("frozen") / "tiny.jaxdiff"
    save(freeze(*small(), solver=DDIM, num_steps=3), path)
    return path


def test_a_file_gives_the_bits_of_the_sampler_it_was_made_from(digits):
    parts, _, frozen = digits
    drawn = np.concatenate(list(run(frozen, 6, batch_size=4, seed=3)))
    wanted = draw(*parts, 6, solver=SOLVERS["dpmpp_2m"], num_steps=3, seed=3)
    np.testing.assert_array_equal(drawn, wanted)
    assert wanted.std() > 0.1
    # On a CPU the usual form of a network of this size is the portable one.
    usual = draw(*parts, 6, solver=SOLVERS["dpmpp_2m"], num_steps=3, seed=3, form=contextlib.nullcontext)
    np.testing.assert_array_equal(drawn, usual)
    # Another batch size is another program, and the first samples stay the same up to rounding.
    np.testing.assert_allclose(np.concatenate(list(run(frozen, 2, seed=3))), wanted[:2], atol=1e-5)


def test_guidance_is_a_dial_of_the_file(digits):
    parts, _, frozen = digits
    for scale in (1.5, 3.0):
        drawn = np.concatenate(list(run(frozen, 4, batch_size=4, guidance=scale, label=2)))
        dials = Dials(jnp.asarray(scale, jnp.float32))
        wanted = draw(*parts, 4, solver=SOLVERS["dpmpp_2m"], num_steps=3, dials=dials, label=2)
        np.testing.assert_array_equal(drawn, wanted)
    assert frozen.generates["guided"]._cache_size() == 1


def test_about_says_what_it_is(digits):
    (experiment, params, _), path, frozen = digits
    about = json.loads(zipfile.ZipFile(path).read(ABOUT))
    assert {name: value for name, value in about.items() if name != "sha256"} == frozen.about
    assert (about["experiment"], about["step"], about["average"]) == ("digits_ddpm", 7, "ema")
    assert (about["solver"], about["num_steps"], about["sample_shape"]) == (
        "dpmpp_2m",
        3,
        list(experiment.sample_shape),
    )
    assert about["platforms"] == ["cpu", "cuda", "tpu"] and about["guidance"] and about["num_classes"] == 10
    assert sorted(about["sha256"]) == ["guided.bin", "sample.bin", "weights.bin"]
    assert sum(int(np.prod(shape)) for _, shape in about["weights"]) == sum(a.size for a in jax.tree.leaves(params))


def test_it_runs_without_networks_and_experiments(digits, tmp_path):
    parts, path, _ = digits
    code = f"""
import sys, numpy as np
from jaxdiff.frozen import load, run
np.save({str(tmp_path / "drawn.npy")!r}, np.concatenate(list(run(load({str(path)!r}), 4, batch_size=4))))
ours = ("jaxdiff.networks", "jaxdiff.methods.d", "experiments", "jaxdiff_")
print(sorted(m for m in sys.modules if m.startswith(ours)))
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
    wanted = draw(*parts, 4, solver=SOLVERS["dpmpp_2m"], num_steps=3)
    np.testing.assert_array_equal(np.load(tmp_path / "drawn.npy"), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "heun"])
def test_every_solver_freezes_to_its_own_bits(name):
    frozen = freeze(*small(), solver=SOLVERS[name], num_steps=4)
    drawn = np.concatenate(list(run(frozen, 5, batch_size=5)))
    np.testing.assert_array_equal(drawn, draw(*small(), 5, 5, solver=SOLVERS[name], num_steps=4))


def test_heun_freezes_to_its_bits_on_one_platform_and_for_one_batch_size():
    frozen = freeze(*small(), solver=SOLVERS["heun"], num_steps=4, batch_size=5, platforms=("cpu",))
    wanted = draw(*small(), 5, 5, solver=SOLVERS["heun"], num_steps=4)
    np.testing.assert_array_equal(np.concatenate(list(run(frozen, 5))), wanted)
    anywhere = freeze(*small(), solver=SOLVERS["heun"], num_steps=4)
    np.testing.assert_allclose(np.concatenate(list(run(anywhere, 5, batch_size=5))), wanted, atol=1e-6)


def test_a_sampler_for_one_batch_size_draws_whole_batches_and_cuts_the_last():
    frozen = freeze(*small(), num_steps=3, batch_size=4)
    parts = list(run(frozen, 6))
    assert [len(part) for part in parts] == [4, 2]
    np.testing.assert_array_equal(np.concatenate(parts), draw(*small(), 6, 4, num_steps=3))
    assert [len(part) for part in run(frozen, 3)] == [3]
    with pytest.raises(FrozenError, match="frozen for batches of 4, got 5; leave the batch size out"):
        run(frozen, 5, batch_size=5)


def test_eta_is_a_dial_where_the_solver_takes_it(tiny):
    frozen = load(tiny)
    results = []
    for eta in (None, 0.0, 0.7):
        results.append(np.concatenate(list(run(frozen, 4, batch_size=4, eta=eta))))
        dials = Dials(None, None if eta is None else jnp.asarray(eta, jnp.float32))
        np.testing.assert_array_equal(results[-1], draw(*small(), 4, solver=DDIM, num_steps=3, dials=dials))
    assert np.abs(results[2] - results[1]).max() > 1e-3


def test_weights_that_sampling_does_not_use_stay_outside_and_keys_come_along(tmp_path):
    def network(params, x_t, t, cond, *, train=False, key=None):
        del t, cond, train, key
        return x_t * params["w"][None] + jax.random.normal(params["key"], (3,))[None]

    experiment, _, _ = small(network)
    params = {"model": {"key": jax.random.key(5), "unused": jnp.ones((1000,)), "w": jnp.full((3,), 0.5)}}
    aux = {"teacher": jnp.ones((50, 50))}
    frozen = freeze(experiment, params, aux, num_steps=2)
    assert frozen.about["weights"] == [["uint32", [2]], ["float32", [3]]]
    save(frozen, tmp_path / "keys.jaxdiff")
    drawn = np.concatenate(list(run(load(tmp_path / "keys.jaxdiff"), 4, batch_size=4)))
    np.testing.assert_array_equal(drawn, draw(experiment, params, aux, 4, num_steps=2))


def test_bfloat16_weights_keep_their_bits(tiny):
    frozen = load(tiny)
    assert frozen.about["weights"] == [["bfloat16", [3]]]
    assert frozen.weights[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(frozen.weights[0], np.arange(3, dtype=jnp.bfloat16) / 8)


def test_the_same_sampler_makes_the_same_file(tiny, tmp_path):
    save(load(tiny), tmp_path / "again.jaxdiff")
    assert (tmp_path / "again.jaxdiff").read_bytes() == tiny.read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["again.jaxdiff"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": CLASSES}, f"class must be 0 to {CLASSES - 1}, got {CLASSES}"),
        ({"label": -1}, "class must be 0 to"),
        ({"num": 0}, "number of samples must be at least 1, got 0"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_drawn(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        run(load(tiny), **({"num": 2} | options))


def test_dials_that_a_sampler_lacks_are_refused():
    frozen = freeze(*small(null_label=None), num_steps=2)
    with pytest.raises(FrozenError, match="small was frozen without guidance, got scale 2; leave it out"):
        run(frozen, 2, guidance=2.0)
    with pytest.raises(FrozenError, match=r"eta has no effect on this sampler, got 0\.5; leave it out, or freeze"):
        run(frozen, 2, eta=0.5)


def test_another_platform_is_refused():
    frozen = freeze(*small(), num_steps=2, platforms=("cuda", "tpu"))
    with pytest.raises(FrozenError, match="frozen for cuda, tpu, and this device is cpu; freeze it for cpu"):
        run(frozen, 2)


def test_freezing_without_flatbuffers_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(
        FrozenError, match=r"needs flatbuffers, which is not installed; pip install 'jaxdiff\[export\]'"
    ):
        freeze(*small(), num_steps=2)


def test_a_network_that_needs_a_batch_size_is_refused_without_one():
    def network(params, x_t, t, cond, *, train=False, key=None):
        del t, cond, train, key
        return x_t * params["w"][None] if x_t.shape[0] > 1 else x_t

    experiment, _, _ = small(network)
    params = {"model": {"w": jnp.full((3,), 0.5)}}
    with pytest.raises(FrozenError, match="needs a batch size to be frozen"):
        freeze(experiment, params, {}, num_steps=2)
    assert len(np.concatenate(list(run(freeze(experiment, params, {}, num_steps=2, batch_size=2), 3)))) == 3


def test_files_are_not_replaced_unasked(tiny, tmp_path):
    frozen, path = load(tiny), tmp_path / "a.jaxdiff"
    path.write_text("mine")
    with pytest.raises(FrozenError, match="exists already; choose another name"):
        save(frozen, path)
    assert path.read_text() == "mine"
    save(frozen, path, overwrite=True)
    assert load(path).about == frozen.about
    with pytest.raises(FrozenError, match="folder .* does not exist; make it"):
        save(frozen, tmp_path / "none" / "a.jaxdiff")


def rewritten(path, change):
    """The members of a file after `change({name: bytes})`, as a new file's bytes."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    change(members)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    return content.getvalue()


def swap(name, old, new):
    return lambda members: members.update({name: members[name].replace(old, new)})


def flip(name):
    return lambda members: members.update({name: bytes([members[name][0] ^ 1]) + members[name][1:]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip(WEIGHTS), "is damaged or no frozen sampler .weights.bin does not have its SHA-256.; make it anew"),
        (flip("sample.bin"), "sample.bin does not have its SHA-256"),
        (lambda members: members.pop("guided.bin"), "is damaged"),
        (lambda members: members.pop(ABOUT), "is damaged"),
        (swap(ABOUT, b"{", b"["), "is damaged"),
        (swap(ABOUT, b"bfloat16", b"bfloat99"), "is damaged"),
        (swap(ABOUT, b"bfloat16", b"float32"), "is damaged"),
        (swap(ABOUT, b'"format": 1', b'"format": 2'), "has format 2, expected 1; freeze the run again"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tiny, tmp_path, change, message):
    path = tmp_path / "damaged.jaxdiff"
    path.write_bytes(rewritten(tiny, change))
    with pytest.raises(FrozenError, match=message) as raised:
        load(path)
    assert "\n" not in str(raised.value)


def test_what_is_no_zip_or_half_a_zip_is_refused(tiny, tmp_path):
    with pytest.raises(FrozenError, match="does not exist; make one with: jaxdiff freeze RUN --out"):
        load(tmp_path / "none.jaxdiff")
    whole, path = tiny.read_bytes(), tmp_path / "half.jaxdiff"
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:-1], whole[:200] + whole[300:]):
        path.write_bytes(content)
        with pytest.raises(FrozenError, match="is damaged or no frozen sampler"):
            load(path)


def test_every_flipped_byte_of_the_content_is_found(tiny, tmp_path):
    whole, path = tiny.read_bytes(), tmp_path / "flipped.jaxdiff"
    with zipfile.ZipFile(tiny) as file:
        last = max(info.header_offset for info in file.infolist())
    for at in np.random.default_rng(0).integers(64, last, 20):
        changed = bytearray(whole)
        changed[at] ^= 0x10
        path.write_bytes(bytes(changed))
        try:
            again = load(path)
        except FrozenError:
            continue
        # A byte of a member's own header, which readers take from the directory at the end.
        np.testing.assert_array_equal(again.weights[0], load(tiny).weights[0])


def test_a_program_that_calls_out_of_xla_is_refused(tmp_path):
    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    foreign = jax.export.export(
        jax.jit(lambda x: jax.ffi.ffi_call("host_program", shape)(x)),
        platforms=("cpu",),
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("host_program")],
    )(shape)
    frozen = freeze(*small(null_label=None), num_steps=2, batch_size=2)
    save(frozen._replace(programs={"sample": foreign}), tmp_path / "foreign.jaxdiff")
    with pytest.raises(FrozenError, match="calls host_program, which samplers do not need; do not use it"):
        load(tmp_path / "foreign.jaxdiff")


def test_a_sampler_that_calls_back_to_python_is_not_frozen():
    def network(params, x_t, t, cond, *, train=False, key=None):
        del params, t, cond, train, key
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x_t.shape, x_t.dtype), x_t)

    experiment, params, aux = small(network)
    with pytest.raises(FrozenError, match="cannot be frozen .*allback"):
        freeze(experiment, params, aux, num_steps=2, batch_size=2)
