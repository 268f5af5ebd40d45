"""The stream of batches: fixed by the seed, the same for any number of hosts, resumable, complete in every epoch."""

import json

import numpy as np
import pytest

from jaxdiff.data.augment import flip_horizontally, random_crop, shift
from jaxdiff.data.images import ArraySource
from jaxdiff.data.pipeline import batches, in_order


def numbered(n=21):
    """Images 4 x 4 of which each pixel is known, and the index as the label."""
    pixels = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1) + np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1)
    return ArraySource(pixels, np.arange(n))


AUGMENT = (flip_horizontally, shift(1))


def take(stream, n):
    return [next(stream) for _ in range(n)]


def equal(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True)
    )


@pytest.fixture(scope="module")
def first_ten():
    return take(batches(numbered(), batch_size=8, seed=3, augment=AUGMENT), 10)


def test_batches_have_the_agreed_form(first_ten):
    batch = first_ten[0]
    assert batch["x0"].shape == (8, 4, 4, 1) and batch["x0"].dtype == np.float32
    assert batch["label"].shape == (8,) and batch["label"].dtype == np.int32


def test_uint8_is_scaled():
    source = ArraySource(np.array([0, 51, 255], np.uint8).reshape(3, 1, 1, 1))
    (batch,) = in_order(source, batch_size=3)
    assert np.allclose(batch["x0"].ravel(), [-1, 51 / 127.5 - 1, 1], atol=1e-7) and set(batch) == {"x0"}


def test_the_seed_fixes_everything(first_ten):
    again = take(batches(numbered(), batch_size=8, seed=3, augment=AUGMENT), 10)
    other = take(batches(numbered(), batch_size=8, seed=4, augment=AUGMENT), 10)
    assert equal(first_ten, again) and not equal(first_ten, other)


@pytest.mark.parametrize("num_hosts", [2, 4])
def test_hosts_share_the_same_global_batches(first_ten, num_hosts):
    streams = [
        batches(numbered(), batch_size=8, seed=3, augment=AUGMENT, num_hosts=num_hosts, host=h)
        for h in range(num_hosts)
    ]
    joined = []
    for _ in range(10):
        parts = [next(stream) for stream in streams]
        assert all(len(part["x0"]) == 8 // num_hosts for part in parts)
        joined.append({key: np.concatenate([part[key] for part in parts]) for key in parts[0]})
    assert equal(first_ten, joined)


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_holds_every_example_once(shuffle):
    # 21 examples in batches of 6: batches straddle the epochs.
    stream = batches(numbered(), batch_size=6, seed=0, shuffle=shuffle)
    labels = np.concatenate([batch["label"] for batch in take(stream, 14)])
    epochs = labels.reshape(4, 21)
    assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(21), (4, 1)))
    in_source_order = [np.array_equal(epoch, np.arange(21)) for epoch in epochs]
    assert in_source_order == [not shuffle] * 4
    assert len({tuple(epoch) for epoch in epochs}) == (4 if shuffle else 1)


def test_resumes_from_the_step_alone(first_ten):
    assert equal(first_ten[7:], take(batches(numbered(), batch_size=8, seed=3, augment=AUGMENT, start_step=7), 3))


def test_resumes_from_a_json_state(first_ten):
    stream = batches(numbered(), batch_size=8, seed=3, augment=AUGMENT)
    take(stream, 6)
    state = json.loads(json.dumps(stream.get_state()))
    assert state["step"] == stream.step == 6
    fresh = batches(numbered(), batch_size=8, seed=3, augment=AUGMENT)
    fresh.set_state(state)
    assert equal(first_ten[6:], take(fresh, 4)) and fresh.step == 10
    fresh.set_state({**state, "step": 0})
    assert equal(first_ten, take(fresh, 10))


def test_resumes_on_another_number_of_hosts(first_ten):
    stream = batches(numbered(), batch_size=8, seed=3, augment=AUGMENT)
    take(stream, 5)
    second = batches(numbered(), batch_size=8, seed=3, augment=AUGMENT, num_hosts=2, host=1)
    second.set_state(stream.get_state())
    assert equal([{k: v[4:] for k, v in batch.items()} for batch in first_ten[5:]], take(second, 5))


def test_prefetching_changes_nothing(first_ten):
    stream = batches(numbered(), batch_size=8, seed=3, augment=AUGMENT, prefetch=4, threads=2, start_step=2)
    assert equal(first_ten[2:], take(stream, 8))
    assert stream.get_state()["step"] == 10
    stream.close()


@pytest.mark.parametrize("change", ["seed", "batch_size", "num_examples", "shuffle"])
def test_a_state_of_another_stream_is_refused(change):
    stream = batches(numbered(), batch_size=8, seed=3)
    state = stream.get_state()
    with pytest.raises(ValueError, match=f"data state is of a stream with {change}"):
        stream.set_state({**state, change: 7})
    with pytest.raises(ValueError, match="data state must have the keys"):
        stream.set_state({"step": 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 22}, "batch_size 22 is larger than the data set of 21 examples"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_hosts": 3}, "batch_size 8 cannot be shared evenly by 3 hosts; use a multiple of 3"),
        ({"num_hosts": 2, "host": 2}, "host must be 0 to num_hosts - 1, got host 2 of 2"),
        ({"num_hosts": 0}, "got host 0 of 0"),
        ({"seed": -1}, r"seed must be 0 to 2\^32 - 1, got -1"),
        ({"start_step": -1}, "start_step must be at least 0, got -1"),
        ({"prefetch": -1}, "prefetch and workers must be at least 0"),
        ({"threads": 0}, "threads at least 1, got 0, 0 and 0"),
    ],
)
def test_wrong_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        batches(numbered(), **{"batch_size": 8, "seed": 0, **options})


@pytest.mark.parametrize("num_hosts", [1, 2, 3])
def test_in_order_reads_every_example_once(num_hosts):
    hosts = [
        np.concatenate([b["label"] for b in in_order(numbered(), batch_size=4, num_hosts=num_hosts, host=h)])
        for h in range(num_hosts)
    ]
    assert np.array_equal(np.sort(np.concatenate(hosts)), np.arange(21))
    assert np.array_equal(hosts[0], np.arange(0, 21, num_hosts))


def test_in_order_refuses_an_empty_batch():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        in_order(numbered(), batch_size=0)


def test_flip_mirrors_half_of_the_images():
    image = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    rng = np.random.default_rng(0)
    out = [flip_horizontally(rng, {"x0": image, "label": 1}) for _ in range(400)]
    flipped = [np.array_equal(o["x0"], image[:, ::-1]) for o in out]
    assert all(f or np.array_equal(o["x0"], image) for f, o in zip(flipped, out, strict=True))
    assert 150 < sum(flipped) < 250 and out[0]["label"] == 1


def test_shift_moves_and_repeats_the_border():
    image = np.arange(9, dtype=np.float32).reshape(3, 3, 1)
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    windows = {padded[i : i + 3, j : j + 3].tobytes() for i in range(3) for j in range(3)}
    rng = np.random.default_rng(0)
    assert {shift(1)(rng, {"x0": image})["x0"].tobytes() for _ in range(200)} == windows


def test_random_crop_reaches_every_place():
    image = np.arange(12, dtype=np.float32).reshape(3, 4, 1)
    rng = np.random.default_rng(0)
    crops = {random_crop(2)(rng, {"x0": image})["x0"].tobytes() for _ in range(200)}
    assert crops == {image[i : i + 2, j : j + 2].tobytes() for i in range(2) for j in range(3)}


def test_augmentations_refuse_wrong_sizes():
    with pytest.raises(ValueError, match="pixels must be at least 1, got 0"):
        shift(0)
    with pytest.raises(ValueError, match="size must be 1 to 3 for this image, got 5"):
        random_crop(5)(np.random.default_rng(0), {"x0": np.zeros((3, 4, 1))})
