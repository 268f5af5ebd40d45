"""From a source to batches: one deterministic, endless stream of examples, cut into global batches and host shares.

The stream is epoch after epoch, each a fresh shuffle that holds every example once. Global batch b is the rows
[b B, (b + 1) B) of the stream, and host h of H owns its h-th block of B / H rows. So the global batch does not depend
on the number of hosts, and batch b follows from (source, seed, B) and b alone: a run resumes exactly from its step.
Reading and ordering are done by grain. Nothing here puts arrays on devices.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxdiff.data.augment import Augmentation
from jaxdiff.data.images import Example, Source

HostBatch = dict[str, np.ndarray]


class Batches(Iterator[HostBatch]):
    """Endless iterator over one host's share of the global batches; make it with `batches`.

    Attributes:
      step: index of the batch that `next` returns.
    """

    def __init__(self, dataset: Any, identity: dict[str, int | bool], start_step: int):
        self._dataset = dataset
        self._identity = identity
        self._iterator: Any = None
        self._move(start_step)

    def __next__(self) -> HostBatch:
        batch = next(self._iterator)
        self.step += 1
        return batch

    def get_state(self) -> dict[str, int | bool]:
        """Position and identity of the stream, a small dict that JSON can hold."""
        return {"step": self.step, **self._identity}

    def set_state(self, state: dict[str, int | bool]) -> None:
        """Moves to the position of `state`, which may come from a run on another number of hosts.

        Raises:
          ValueError: if the state belongs to a stream with another seed, batch size, data set size or order.
        """
        expected = {"step", *self._identity}
        if set(state) != expected:
            raise ValueError(f"data state must have the keys {sorted(expected)}, got {sorted(state)}")
        for name, value in self._identity.items():
            if state[name] != value:
                raise ValueError(
                    f"data state is of a stream with {name} {state[name]}, this one has {value}; "
                    f"build the pipeline with {name}={state[name]}, or resume from the step number alone"
                )
        self._move(int(state["step"]))

    def close(self) -> None:
        """Ends the prefetch threads and worker processes."""
        self._iterator.close()

    def _move(self, step: int) -> None:
        if step < 0:
            raise ValueError(f"start_step must be at least 0, got {step}")
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = iter(self._dataset)
        if step:
            from grain.experimental import set_next_index

            set_next_index(self._iterator, step)
        self.step = step


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    num_hosts: int | None = None,
    host: int | None = None,
    augment: Sequence[Augmentation] = (),
    shuffle: bool = True,
    start_step: int = 0,
    prefetch: int = 0,
    threads: int = 1,
    workers: int = 0,
) -> Batches:
    """Endless batches of one host for training.

    Args:
      source: random access to examples with "x0" and perhaps "label".
      batch_size: B, the number of examples in a global batch, over all hosts; at most len(source).
      seed: 0 to 2^32 - 1; fixes the order and the augmentations.
      num_hosts: H, must divide B; None for `jax.process_count()`.
      host: 0 to H - 1; None for `jax.process_index()`.
      augment: functions (rng, example) -> example, applied in order to float32 examples.
      shuffle: False keeps the source's order in every epoch.
      start_step: index of the first batch to return.
      prefetch: number of batches to prepare ahead in threads; 0 prepares each when asked.
      threads: how many threads read when prefetch > 0.
      workers: number of processes that read and augment, for decoding that one process cannot keep up with; 0 for
        none. They are spawned: the source and the augmentations must pickle, and the script needs a __main__ guard.

    Returns:
      Iterator over dicts of arrays with leading axis B / H: "x0" float32, for images in [-1, 1], and perhaps "label"
      int32.

    Raises:
      ValueError: if a number is out of range, B > len(source), or H does not divide B.
    """
    import grain
    import jax

    num_hosts = jax.process_count() if num_hosts is None else num_hosts
    host = jax.process_index() if host is None else host
    _check_sizes(source, batch_size, seed, num_hosts, host, prefetch, threads, workers)

    dataset = grain.MapDataset.source(source).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    dataset = dataset.repeat().map(normalize)
    for augmentation in augment:
        dataset = dataset.random_map(_Swapped(augmentation))
    # One batch here is one host's rows; consecutive ones belong to hosts 0..H-1 of the same global batch.
    dataset = dataset.batch(batch_size // num_hosts)[host::num_hosts]
    options = grain.ReadOptions(num_threads=threads if prefetch else 0, prefetch_buffer_size=prefetch)
    identity = {"seed": seed, "batch_size": batch_size, "num_examples": len(source), "shuffle": shuffle}
    stream = dataset.to_iter_dataset(options)
    if workers:
        _mark_flags_as_parsed()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return Batches(stream, identity, start_step)


def in_order(source: Source, *, batch_size: int, num_hosts: int = 1, host: int = 0) -> Iterator[HostBatch]:
    """One pass over the source in its order, for statistics: every example once, no augmentation.

    Args:
      source: as in `batches`.
      batch_size: largest number of examples in a batch of this host; the last one may be smaller.
      num_hosts: number of hosts; each example goes to exactly one of them.
      host: this host's index.

    Returns:
      Iterator over dicts of arrays, as `batches` gives.

    Raises:
      ValueError: if batch_size < 1 or the host does not exist.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    _check_host(num_hosts, host)
    mine = range(host, len(source), num_hosts)
    return (_stack(source, mine[i : i + batch_size]) for i in range(0, len(mine), batch_size))


def normalize(example: Example) -> Example:
    """uint8 x0 becomes float32 x / 127.5 - 1; float x0 becomes float32 unchanged; labels become int32."""
    x0 = np.asarray(example["x0"])
    x0 = x0.astype(np.float32) / np.float32(127.5) - 1 if x0.dtype == np.uint8 else x0.astype(np.float32)
    out: Example = {**example, "x0": x0}
    if "label" in example:
        out["label"] = np.int32(example["label"])
    return out


class _Swapped:
    """grain passes (example, rng); ours take the generator first. A class, so that worker processes can pickle it."""

    def __init__(self, augmentation: Augmentation):
        self.augmentation = augmentation

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        return self.augmentation(rng, example)


def _stack(source: Source, rows: range) -> HostBatch:
    examples = [normalize(source[i]) for i in rows]
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def _mark_flags_as_parsed() -> None:
    # grain hands absl's flags to its worker processes and fails if no absl app has parsed them.
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _check_sizes(
    source: Source, batch_size: int, seed: int, num_hosts: int, host: int, prefetch: int, threads: int, workers: int
) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if batch_size > len(source):
        raise ValueError(
            f"batch_size {batch_size} is larger than the data set of {len(source)} examples; use at most {len(source)}"
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be 0 to 2^32 - 1, got {seed}")
    _check_host(num_hosts, host)
    if batch_size % num_hosts:
        raise ValueError(
            f"batch_size {batch_size} cannot be shared evenly by {num_hosts} hosts; use a multiple of {num_hosts}"
        )
    if prefetch < 0 or threads < 1 or workers < 0:
        raise ValueError(
            f"prefetch and workers must be at least 0 and threads at least 1, got {prefetch}, {workers} and {threads}"
        )


def _check_host(num_hosts: int, host: int) -> None:
    if num_hosts < 1 or not 0 <= host < num_hosts:
        raise ValueError(f"host must be 0 to num_hosts - 1, got host {host} of {num_hosts}")
