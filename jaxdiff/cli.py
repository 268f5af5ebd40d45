"""The command line: train, sample, evaluate, compare, info.

It reads arguments, calls the library and prints. Whatever a person can put right is one line on standard error and
exit code 2, before any work is lost; JAXDIFF_TRACEBACK=1 shows where it came from.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxdiff.settings import UsageError, first_line, hint

EXAMPLES = """examples:
  jaxdiff train experiments/digits_ddpm.py --workdir runs/digits --set num_steps=2000
  jaxdiff sample runs/digits --num 64 --steps 20 --solver dpmpp_2m --out grid.png
  jaxdiff evaluate runs/digits --num 1024 --steps 50
  jaxdiff compare runs/digits --calls 50,20,10,1
  jaxdiff info experiments/cifar10_ddpm.py --mesh data=4,fsdp=2"""


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str):
        raise UsageError(f"{message}; see {self.prog} --help")


def parser() -> Parser:
    """All commands and their options."""
    top = Parser(prog="jaxdiff", description="Train, sample and evaluate diffusion models in JAX.", epilog=EXAMPLES)
    top.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train an experiment, or go on with a run that was stopped")
    train.add_argument("file", help="experiment file with a function build(...)")
    train.add_argument("--workdir", required=True, help="folder of the run: checkpoints, logs, sample grids")
    _settings(train)
    train.add_argument("--mesh", default="", help="devices per axis, such as data=4,fsdp=2 (default: all along data)")
    train.set_defaults(run=_train)

    sample = commands.add_parser("sample", help="draw samples from a run")
    _sampling(sample, num=64)
    sample.add_argument("--out", required=True, help="grid (.png), arrays (.npz), or a folder of PNGs")
    sample.add_argument("--overwrite", action="store_true", help="replace what --out names")
    sample.set_defaults(run=_sample)

    evaluate = commands.add_parser("evaluate", help="judge samples of a run against held-out data")
    _sampling(evaluate, num=None)
    evaluate.add_argument("--metrics", default=None, help="comma-separated names (default: the experiment's)")
    evaluate.set_defaults(run=_evaluate)

    compare = commands.add_parser("compare", help="quality against number of network calls, for several solvers")
    _sampling(compare, num=None, grid=False)
    compare.add_argument("--solvers", default=None, help="comma-separated names (default: a choice for the method)")
    compare.add_argument("--calls", default=None, help="comma-separated numbers of network calls")
    compare.set_defaults(run=_compare)

    info = commands.add_parser("info", help="parameters, FLOPs a step, bytes a device; nothing is allocated")
    info.add_argument("file", help="experiment file")
    _settings(info)
    info.add_argument("--mesh", default="", help="devices per axis, such as data=4,fsdp=2")
    info.set_defaults(run=_info)
    return top


def _settings(command: argparse.ArgumentParser) -> None:
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of build(...)")


def _sampling(command: argparse.ArgumentParser, num: int | None, grid: bool = True) -> None:
    command.add_argument("run_folder", metavar="RUN", help="folder of a run")
    command.add_argument("--num", type=int, default=num, help="number of samples")
    if grid:
        command.add_argument("--steps", type=int, default=None, help="solver steps (default: the method's)")
        command.add_argument("--solver", default=None, help="name of a solver (default: the method's)")
        command.add_argument("--eta", type=float, default=None, help="noise of DDIM: 0 none, 1 as much as ancestral")
    command.add_argument("--guidance", type=float, default=None, help="classifier-free guidance scale; 1 is none")
    command.add_argument("--class", type=int, default=None, dest="label", help="one class (default: all in turn)")
    command.add_argument("--seed", type=int, default=0, help="seed of everything drawn")
    command.add_argument("--batch-size", type=int, default=None, help="samples in one compiled call")
    command.add_argument("--ema", default=None, help="which average to use, or raw (default: the last one)")
    command.add_argument("--experiment", default=None, metavar="FILE", help="experiment file, if it has moved")


def _train(args) -> int:
    from jaxdiff import commands

    return commands.train(args.file, Path(args.workdir), args.set, mesh_sizes(args.mesh))


def _sample(args) -> int:
    from jaxdiff import commands

    return commands.sample(args)


def _evaluate(args) -> int:
    from jaxdiff import commands

    return commands.evaluate(args)


def _compare(args) -> int:
    from jaxdiff import commands

    return commands.compare(args)


def _info(args) -> int:
    from jaxdiff.info import describe, info
    from jaxdiff.runs import experiment_from

    experiment = experiment_from(args.file, args.set)
    print(describe(experiment, info(experiment, mesh_sizes(args.mesh))))
    return 0


def mesh_sizes(text: str) -> dict[str, int]:
    """`data=4,fsdp=2` as {"data": 4, "fsdp": 2}.

    Raises:
      UsageError: for an unknown axis or a size that is not a whole number of at least 1.
    """
    sizes = {}
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in ("data", "fsdp", "tensor"):
            raise UsageError(f"unknown mesh axis {axis!r}; {hint(axis, ('data', 'fsdp', 'tensor'))}")
        if not size.isdigit() or int(size) < 1:
            raise UsageError(f"mesh axis {axis} must be a whole number of at least 1, got {size!r}; write {axis}=2")
        sizes[axis] = int(size)
    return sizes


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 for a run that failed, 2 for something to put right."""
    expected: tuple[type[BaseException], ...] = (ValueError, OSError, AssertionError)
    try:
        args = parser().parse_args(argv)
        from jaxdiff.training.checkpoint import CheckpointError

        expected = (*expected, CheckpointError)
        return args.run(args)
    except FloatingPointError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except expected as error:
        return _fail(error, 2)
    except Exception as error:  # a bug of ours: still no traceback unless asked for
        return _fail(error, 1, prefix=f"internal error ({type(error).__name__}), JAXDIFF_TRACEBACK=1 shows where: ")


def _fail(error: BaseException, code: int, prefix: str = "error: ") -> int:
    if os.environ.get("JAXDIFF_TRACEBACK"):
        raise error
    print(prefix + first_line(error), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
