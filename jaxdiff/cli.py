"""The command line: train, sample, evaluate, compare, freeze, info, profile, checkpoint.

It reads arguments, calls the library and prints. Whatever a person can put right is one line on standard error and
exit code 2, before any work is lost; JAXDIFF_TRACEBACK=1 shows where it came from.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from jaxdiff.arguments import Parser, number, whole
from jaxdiff.settings import first_line, mesh_sizes

EXAMPLES = """examples:
  jaxdiff train experiments/digits_ddpm.py --workdir runs/digits --set num_steps=2000
  jaxdiff sample runs/digits --num 64 --steps 20 --solver dpmpp_2m --out grid.png
  jaxdiff evaluate runs/digits --num 1024 --steps 50
  jaxdiff compare runs/digits --calls 50,20,10,1
  jaxdiff info experiments/cifar10_ddpm.py --mesh data=4,fsdp=2
  jaxdiff checkpoint verify runs/digits"""
SOLVERS = """solvers:
  ancestral, ddim, euler, heun, dpm_2m, dpmpp_2m, dpmpp_3m, dpmpp_2m_sde, dpmpp_2s, dpmpp_3s, pndm, unipc
  A step is one call of the network; with heun it is two, and one in the last step."""
METRICS = """metrics:
  frechet, kernel, precision, recall, density, coverage, inception_score, accuracy, nearest"""


def parser() -> Parser:
    """All commands and their options."""
    top = Parser("jaxdiff", description="Train, sample and evaluate diffusion models in JAX.", epilog=EXAMPLES)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, text: str, epilog: str = "") -> Parser:
        return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", epilog=epilog)

    train = command("train", "train an experiment, or go on with a run that was stopped")
    _experiment(train)
    train.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run: checkpoints, logs, pictures")
    _devices(train)

    sample = command("sample", "draw samples from a run, or from a file that `freeze` wrote", SOLVERS)
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

    freeze = command("freeze", "write a sampler and its weights into one file that `sample` runs anywhere", SOLVERS)
    freeze.add_argument("run_folder", metavar="RUN", help="folder of a run")
    _sampler(freeze, eta=False)
    freeze.add_argument(
        "--batch-size", type=whole(1), metavar="N", help="of every call (default: chosen when the file is run)"
    )
    freeze.set_defaults(guidance=None, label=None)
    freeze.add_argument("--out", required=True, metavar="FILE", help="where the sampler goes, such as digits.jaxdiff")
    freeze.add_argument("--overwrite", action="store_true", help="replace the file that lies there")

    _experiment(command("info", "parameters, FLOPs a step, bytes a device; nothing is allocated"))

    profile = command("profile", "time, FLOPs, bytes and MFU of the train step and of a network call")
    _experiment(profile)
    profile.add_argument("--steps", type=whole(1), default=10, metavar="N", help="timed repetitions (default: 10)")
    profile.add_argument("--trace", metavar="DIR", help="write a profiler trace there")
    profile.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    _devices(profile)

    checkpoint = command("checkpoint", "what checkpoints hold, and whether every leaf is as it was written")
    checkpoint.add_argument(
        "action", choices=("inspect", "verify"), help="describe them, or read and check all of them"
    )
    checkpoint.add_argument("folder", metavar="DIR", help="folder of a run, or its checkpoints")
    checkpoint.add_argument("--step", type=whole(0), metavar="N", help="verify this one only (default: all)")
    return top


def _experiment(command: Parser) -> None:
    command.add_argument("file", metavar="FILE", help="experiment file, Python with a function build(...)")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of build(...)")
    devices = "one" if command.prog.endswith("info") else "all along data, of a CPU along fsdp"
    command.add_argument("--mesh", default="", help=f"devices by axis, such as data=4,fsdp=2 (default: {devices})")


def _devices(command: Parser) -> None:
    command.add_argument(
        "--cpu-devices", type=whole(1), metavar="N", help="share batches among N devices of a CPU, one for each core"
    )
    command.add_argument(
        "--distributed", choices=("auto", "off"), default="auto",
        help="join the other processes if the environment names them (TPU pod, Slurm, Open MPI, JAXDIFF_COORDINATOR)",
    )  # fmt: skip


def _sampling(command: Parser, num: int | None, grid: bool = True) -> None:
    what = "folder of a run" if num is None else "folder of a run, or a frozen sampler (.jaxdiff)"
    command.add_argument("run_folder", metavar="RUN", help=what)
    usual = "the experiment's" if num is None else num
    command.add_argument("--num", type=whole(1), default=num, metavar="N", help=f"number of samples (default: {usual})")
    _sampler(command, grid)
    command.add_argument("--guidance", type=number(), metavar="W", help="classifier-free guidance scale; 1 is none")
    command.add_argument("--class", type=whole(0), dest="label", metavar="C", help="one class (default: all in turn)")
    command.add_argument(
        "--seed", type=whole(0, 2**32 - 1), default=0, metavar="K", help="of all that is drawn (default: 0)"
    )
    command.add_argument("--batch-size", type=whole(1), metavar="N", help="samples at once (default: 256)")
    _devices(command)


def _sampler(command: Parser, grid: bool = True, eta: bool = True) -> None:
    if grid:
        command.add_argument("--steps", type=whole(1), metavar="S", help="solver steps (default: the method's)")
        command.add_argument("--solver", metavar="NAME", help="name of a solver (default: the method's)")
    if grid and eta:
        command.add_argument(
            "--eta", type=number(0.0, 1.0), help="noise of ddim, 0 to 1: none to that of ancestral (default: 0)"
        )
    command.add_argument("--ema", metavar="NAME", help="which average to use, or raw (default: the last one)")
    command.add_argument("--experiment", metavar="FILE", help="experiment file, if it has moved")


def _run(args: argparse.Namespace) -> int:
    from jaxdiff import commands

    if hasattr(args, "distributed"):
        commands.open_devices(args.cpu_devices, args.distributed)
    if args.command == "train":
        return commands.train(args.file, args.workdir, args.set, mesh_sizes(args.mesh))
    if args.command == "info":
        return commands.info(args.file, args.set, mesh_sizes(args.mesh))
    return getattr(commands, args.command)(args)


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
