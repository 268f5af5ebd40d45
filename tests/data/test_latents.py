"""Latents on disk: what is read is what was written, and folders that hold something else are refused."""

import numpy as np
import pytest

from jaxdiff.data.latents import Latents, RandomLatents

RNG = np.random.default_rng(0)
GOOD = {
    "latents": RNG.standard_normal((3, 4, 4, 2)).astype(np.float16),
    "context": RNG.standard_normal((3, 5, 6)).astype(np.float32),
    "null_context": np.zeros((5, 6), np.float32),
}


def folder_of(path, **changes):
    for name, array in (GOOD | changes).items():
        if array is not None:
            np.save(path / f"{name}.npy", array)
    return path


def test_examples_are_the_rows_in_float32(tmp_path):
    source = Latents(folder_of(tmp_path), guided=True)
    assert len(source) == 3
    for i in range(3):
        assert source[i]["x0"].dtype == source[i]["context"].dtype == np.float32
        np.testing.assert_array_equal(source[i]["x0"], GOOD["latents"][i].astype(np.float32))
        np.testing.assert_array_equal(source[i]["context"], GOOD["context"][i])
    np.testing.assert_array_equal(source.null_context, GOOD["null_context"])


def test_without_guidance_the_empty_text_may_be_missing(tmp_path):
    folder_of(tmp_path, null_context=None)
    assert Latents(tmp_path).null_context is None
    with pytest.raises(ValueError, match="has no null_context.npy, expected latents, context, null_context"):
        Latents(tmp_path, guided=True)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"latents": None}, "has no latents.npy"),
        ({"context": GOOD["context"][:2]}, r"got \(3, 4, 4, 2\) and \(2, 5, 6\)"),
        ({"latents": GOOD["latents"][0]}, r"expected latents \[n, h, w, c\]"),
        ({"null_context": np.zeros((4, 6))}, r"null_context is \(4, 6\), expected \(5, 6\)"),
        ({"context": np.array([{}] * 3, object)}, "context.npy cannot be read as .npy without objects"),
    ],
)
def test_other_folders_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Latents(folder_of(tmp_path, **changes))


def test_random_latents_repeat_themselves():
    source = RandomLatents()
    assert source[3]["x0"].shape == (8, 8, 4) and source[3]["context"].shape == source.null_context.shape
    np.testing.assert_array_equal(source[3]["x0"], RandomLatents()[3]["x0"])
    assert (source[3]["x0"] != source[4]["x0"]).any()
