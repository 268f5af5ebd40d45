"""The command line: train, sample, evaluate, compare, info.

It reads arguments, calls the library and prints. Whatever a person can put right is one line on standard error and
exit code 2, before any work is lost; JAXDIFF_TRACEBACK=1 shows where it came from.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxdiff.settings import UsageError, convert, first_line, hint, mesh_sizes

EXAMPLES = """examples:
  jaxdiff train experiments/digits_ddpm.py --workdir runs/digits --set num_steps=2000
  jaxdiff sample runs/digits --num 64 --steps 20 --solver dpmpp_2m --out grid.png
  jaxdiff evaluate runs/digits --num 1024 --steps 50
  jaxdiff compare runs/digits --calls 50,20,10,1
  jaxdiff info experiments/cifar10_ddpm.py --mesh data=4,fsdp=2"""
SOLVERS = """solvers:
  ancestral, ddim, euler, heun, dpm_2m, dpmpp_2m, dpmpp_3m, dpmpp_2m_sde, dpmpp_2s, dpmpp_3s, pndm, unipc
  A step is one call of the network; with heun it is two, and one in the last step."""
METRICS = """metrics:
  frechet, kernel, precision, recall, density, coverage, inception_score, accuracy, nearest"""


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, spelling hints, and no abbreviations: they break when an option is added."""

    def __init__(self, prog: str, *, description: str = "", epilog: str = ""):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, epilog=epilog, formatter_class=formatter, allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else list(args)
        commands = next((a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction)), None)
        if commands and words and not words[0].startswith("-") and words[0] not in commands:
            raise UsageError(f"unknown command {words[0]!r}; {hint(words[0], commands)}")
        known = self._option_string_actions
        for word in words[:1] if commands else words:
            name = word.partition("=")[0]
            if name.startswith("--") and name != "--" and name not in known:
                raise UsageError(f"{self.prog} has no option {name}; {hint(name, [o for o in known if o[:2] == '--'])}")
        found, rest = super().parse_known_args(words, namespace)
        if rest:
            raise UsageError(f"{self.prog} has no use for {rest[0]!r}; leave it out, or see {self.prog} --help")
        return found, rest

    def error(self, message: str):
        raise UsageError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """The type of an option that takes whole numbers from low to high."""
    wanted = f"of at least {low}" if high is None else f"from {low} to {high}"

    def parse(text: str) -> int:
        try:
            value = convert(text, int)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"expected a whole number {wanted}, got {text!r}")
        return value

    return parse


def number(low: float | None = None, high: float | None = None) -> Callable[[str], float]:
    """The type of an option that takes finite numbers, from low to high if these are given."""
    wanted = "a finite number" if low is None else f"a number from {low:g} to {high:g}"

    def parse(text: str) -> float:
        try:
            value = convert(text, float)
        except ValueError:
            value = float("nan")
        if not (low is None or low <= value) or not (high is None or value <= high) or value != value:
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
        return value

    return parse


def parser() -> Parser:
    """All commands and their options."""
    top = Parser("jaxdiff", description="Train, sample and evaluate diffusion models in JAX.", epilog=EXAMPLES)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, text: str, epilog: str = "") -> Parser:
        return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", epilog=epilog)

    train = command("train", "train an experiment, or go on with a run that was stopped")
    _experiment(train)
    train.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run: checkpoints, logs, pictures")

    sample = command("sample", "draw samples from a run", SOLVERS)
    _sampling(sample, num=64)
    sample.add_argument("--out", required=True, metavar="PATH", help="grid (.png), arrays (.npz), or a folder of PNGs")
    sample.add_argument("--overwrite", action="store_true", help="replace the samples that lie there")

    evaluate = command("evaluate", "judge samples of a run against held-out data", f"{SOLVERS}\n\n{METRICS}")
    _sampling(evaluate, num=None)
    evaluate.add_argument("--metrics", metavar="NAMES", help="comma-separated (default: the experiment's)")

    compare = command("compare", "quality against number of network calls, for several solvers", SOLVERS)
    _sampling(compare, num=None, grid=False)
    compare.add_argument("--solvers", metavar="NAMES", help="comma-separated (default: the experiment's)")
    compare.add_argument(
        "--calls", metavar="NUMBERS", help="of the network, comma-separated (default: the experiment's)"
    )

    _experiment(command("info", "parameters, FLOPs a step, bytes a device; nothing is allocated"))
    return top


def _experiment(command: Parser) -> None:
    command.add_argument("file", metavar="FILE", help="experiment file, Python with a function build(...)")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of build(...)")
    devices = "one" if command.prog.endswith("info") else "all along data"
    command.add_argument("--mesh", default="", help=f"devices by axis, such as data=4,fsdp=2 (default: {devices})")


def _sampling(command: Parser, num: int | None, grid: bool = True) -> None:
    command.add_argument("run_folder", metavar="RUN", help="folder of a run")
    usual = "the experiment's" if num is None else num
    command.add_argument("--num", type=whole(1), default=num, metavar="N", help=f"number of samples (default: {usual})")
    if grid:
        command.add_argument("--steps", type=whole(1), metavar="S", help="solver steps (default: the method's)")
        command.add_argument("--solver", metavar="NAME", help="name of a solver (default: the method's)")
        command.add_argument(
            "--eta", type=number(0.0, 1.0), help="noise of ddim, 0 to 1: none to that of ancestral (default: 0)"
        )
    command.add_argument("--guidance", type=number(), metavar="W", help="classifier-free guidance scale; 1 is none")
    command.add_argument("--class", type=whole(0), dest="label", metavar="C", help="one class (default: all in turn)")
    command.add_argument(
        "--seed", type=whole(0, 2**32 - 1), default=0, metavar="K", help="of all that is drawn (default: 0)"
    )
    command.add_argument("--batch-size", type=whole(1), default=256, metavar="N", help="samples at once (default: 256)")
    command.add_argument("--ema", metavar="NAME", help="which average to use, or raw (default: the last one)")
    command.add_argument("--experiment", metavar="FILE", help="experiment file, if it has moved")


def _run(args: argparse.Namespace) -> int:
    from jaxdiff import commands

    if args.command == "train":
        return commands.train(args.file, Path(args.workdir), args.set, mesh_sizes(args.mesh))
    if args.command == "info":
        return commands.info(args.file, args.set, mesh_sizes(args.mesh))
    return {"sample": commands.sample, "evaluate": commands.evaluate, "compare": commands.compare}[args.command](args)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 for a run that failed, 2 for something to put right."""
    expected: tuple[type[BaseException], ...] = (ValueError, OSError, AssertionError, ImportError)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _without_late_callbacks
    try:
        args = parser().parse_args(argv)
        from jaxdiff.training.checkpoint import CheckpointError

        expected = (*expected, CheckpointError)
        return _run(args)
    except FloatingPointError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except expected as error:
        return _fail(error, 2)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return _fail(error, 1, "error: out of memory, make the batch size smaller: ")
        # a bug of ours: still no traceback unless asked for
        return _fail(error, 1, f"internal error ({type(error).__name__}), JAXDIFF_TRACEBACK=1 shows where: ")


def _without_late_callbacks(unraisable) -> None:
    # When a read of a damaged checkpoint fails, the others that are under way end in Orbax's closed loop, in threads
    # of their own, each with a traceback that says nothing.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _fail(error: BaseException, code: int, prefix: str = "error: ") -> int:
    if os.environ.get("JAXDIFF_TRACEBACK"):
        raise error
    print(prefix + first_line(error), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
