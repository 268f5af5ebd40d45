"""`jaxdiff import`, `export` and `inspect`: published weights into folders of ours, and back.

What a file is, which network it fits and how leaves are translated is the business of `pretrained`; here are progress,
the choice of what to export (an imported folder or a run) and what is printed.
"""

import argparse
import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from tqdm import tqdm

from jaxdiff import runs
from jaxdiff.networks.base import num_params
from jaxdiff.networks.lora import merge
from jaxdiff.pretrained import catalog, files, folders, lora, plans
from jaxdiff.pretrained.kinds import Deferred, Spec, spec_of
from jaxdiff.settings import UsageError, hint

LORA = "lora"
LARGE = 200_000_000  # bytes from which on progress is shown


def import_(args: argparse.Namespace) -> int:
    """`jaxdiff import`: makes a folder of one or several networks from published files."""
    start = time.monotonic()
    folders.check_target(Path(args.out))
    if args.kind == LORA:
        planned = [_merged(args)]
    else:
        _check_kind(args.kind, extra=(plans.AUTO,))
        if args.base is not None:
            raise UsageError("--base is for import lora; leave it out")
        planned = plans.plan_import(
            args.kind, args.files, config=_config(args.config), dtype=args.dtype, prefix=args.prefix, skip=args.skip,
            ema=args.ema,
        )  # fmt: skip
    with _progress(sum(leaf.nbytes for plan in planned for leaf in plan.leaves.values())) as progress:
        folders.write_import(planned, args.out, progress)
    for plan in planned:
        about = plan.record
        chosen = about["config"] if isinstance(about["config"], str) else "its own configuration"
        place = Path(args.out) / plan.name
        print(f"{about['kind']} ({chosen}): {about['parameters'] / 1e6:.3f} M parameters, {about['dtype']}, in {place}")
    if passed := planned[0].passed_over:
        print(f"{passed} tensors that are no weights of these networks were passed over")
    print(f"{time.monotonic() - start:.1f} s, peak memory {_peak() / 1e9:.2f} GB")
    return 0


def export(args: argparse.Namespace) -> int:
    """`jaxdiff export`: writes an imported folder, or the newest weights of a run, in the layout of a publisher."""
    start, source = time.monotonic(), Path(args.folder)
    _check_kind(args.kind)
    if args.kind in catalog.BUNDLES:
        names = folders.parts_of(source)
        if not names:
            raise UsageError(f"{source} holds no imported networks to put together; expected a folder from import")
        parts = {name: folders.load(source / name) for name in names}
        with _progress(_bytes(part.params for part in parts.values())) as progress:
            count = folders.export_bundle(args.kind, parts, args.out, dtype=args.dtype, progress=progress)
    else:
        spec, params = _source(args, source)
        with _progress(_bytes([params])) as progress:
            count = folders.export_weights(args.kind, spec, params, args.out, dtype=args.dtype, progress=progress)
    print(f"{count} tensors as {args.kind} in {args.out}")
    print(f"{time.monotonic() - start:.1f} s, peak memory {_peak() / 1e9:.2f} GB")
    return 0


def inspect(args: argparse.Namespace) -> int:
    """`jaxdiff inspect`: what a weight file or an imported folder holds, or the published networks of a kind."""
    path = Path(args.file)
    if args.file in catalog.KINDS and not path.exists():
        kind = catalog.KINDS[args.file]
        print(f"{args.file}: {kind.about}")
        for name, build in kind.published.items():
            print(f"  {name:<24}{num_params(kind.shapes(build().network)) / 1e6:10.3f} M parameters")
        return 0
    if not path.exists() and not path.is_symlink():
        raise UsageError(f"{path} is neither a file nor a kind of weights; kinds are {', '.join(catalog.KINDS)}")
    for name in folders.parts_of(path) or [""]:
        if (path / name / folders.NETWORK).is_file():
            kind, spec = folders.read_record(path / name)
            count = num_params(catalog.KINDS[kind].shapes(spec.network))
            print(f"{name or path.name}: {kind}, {catalog.KINDS[kind].about}, {count / 1e6:.3f} M parameters")
            path_of_file = path / name / folders.PARAMS
        else:
            path_of_file = plans.weights_in(path) if path.is_dir() else path
        print(files.describe(files.summary(path_of_file)))
    return 0


def _source(args: argparse.Namespace, source: Path) -> tuple[Spec, Any]:
    """Network and parameters to export: of an imported folder, or of a player of a run."""
    chosen = _config(args.config)
    given = None if chosen is None else spec_of(catalog.KINDS[args.kind], chosen)
    if (source / folders.NETWORK).is_file():
        imported = folders.load(source)
        same = imported.kind == args.kind
        return given or (imported.spec if same else _as_kind(args.kind, imported.spec)), imported.params
    if not (source / runs.RECORD).is_file():
        inside = folders.parts_of(source)
        what = f"holds {', '.join(inside)}, name one of them" if inside else "is neither imported weights nor a run"
        raise UsageError(f"{source} {what}; expected a folder from jaxdiff import or jaxdiff train")
    experiment = runs.open_run(source, args.experiment)
    runs.average_name(experiment, args.average)
    if given is None and args.player not in experiment.networks:
        named = ", ".join(experiment.networks) or "none"
        raise UsageError(
            f"experiment {experiment.name} names no network of player {args.player!r} (it names {named}); "
            "give --config with its configuration, or networks={player: module} in the experiment"
        )
    params = runs.params_of(experiment, source, args.player, args.average)
    return given or _as_kind(args.kind, Spec(experiment.networks[args.player])), params


def _as_kind(name: str, spec: Spec) -> Spec:
    """A network under the layout that another kind has by default."""
    row = catalog.KINDS[name]
    fitting = {type(build().network) for build in row.published.values()}
    if type(spec.network) not in fitting:
        names = " or ".join(sorted(fit.__name__ for fit in fitting))
        raise UsageError(f"{name} is for {names}, this network is a {type(spec.network).__name__}; choose another kind")
    try:
        row.translate(spec.network)
    except TypeError:
        raise UsageError(f"{name} needs more than the network, such as its image size; give --config") from None
    return Spec(spec.network)


def _merged(args: argparse.Namespace) -> plans.Plan:
    """An imported network with a LoRA file added to its kernels."""
    if args.base is None:
        raise UsageError("import lora needs --base with the imported network that it changes")
    if len(args.files) != 1:
        raise UsageError(f"import lora takes one file, got {len(args.files)}")
    base = folders.load(args.base)
    row = catalog.KINDS[base.kind]
    additions = lora.read_for(args.files[0], base.spec.network, base.spec.options, row.shapes(base.spec.network))
    params: Any = traverse_util.flatten_dict(merge(base.params, additions, args.weight), sep="/")
    leaves = {
        path: Deferred(tuple(a.shape), np.dtype(a.dtype), lambda a=a: np.asarray(a)) for path, a in params.items()
    }
    record = json.loads((Path(args.base) / folders.NETWORK).read_text())
    return plans.Plan("", leaves, record | {"lora": Path(args.files[0]).name, "lora_weight": args.weight}, 0)


def _check_kind(name: str, extra: tuple[str, ...] = ()) -> None:
    known = (*extra, *catalog.KINDS, *catalog.BUNDLES)
    if name not in known:
        raise UsageError(f"unknown kind {name!r}; {hint(name, known)}")


def _config(text: str | None) -> Any:
    """A published name, or the content of a JSON file."""
    if text is None or not text.endswith(".json"):
        return text
    if not Path(text).is_file():
        raise UsageError(f"--config {text} is not there; give a JSON file or the name of a published configuration")
    return plans.read_json(Path(text))


def _bytes(trees: Any) -> int:
    return sum(leaf.nbytes for tree in trees for leaf in jax.tree.leaves(tree))


def _peak() -> int:
    """Bytes that this process has had in memory at most, pages of mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    silent = total < LARGE or not sys.stderr.isatty()
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=silent) as bar:
        yield lambda count: (bar.update(count), None)[1]
