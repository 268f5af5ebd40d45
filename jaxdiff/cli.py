"""The command line: train, sample, pairs, evaluate, compare, freeze, info, profile, checkpoint, edit, import,
export, inspect.

It reads arguments, calls the library and prints. Whatever a person can put right is one line on standard error and
exit code 2, before any work is lost; JAXDIFF_TRACEBACK=1 shows where it came from.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from jaxdiff import options
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

KINDS = """kinds:
  auto (of import: told from the names), lora (of import: merged into --base)
  compvis, compvis-unet, compvis-autoencoder, compvis-first-stage, compvis-discriminator, controlnet
  diffusers-unet, diffusers-autoencoder, diffusers-controlnet, diffusers-consistency-decoder-vae,
  diffusers-consistency-decoder, diffusers-encoder, clip-text, open-clip-text, class-embedder
  openai-unet, openai-classifier, consistency-unet, consistency-decoder
  ddpm-unet, edm, ncsnpp, progdist-unet, ddgan-generator, ddgan-discriminator, dit, inception, lpips"""


def parser() -> Parser:
    """All commands and their options."""
    top = Parser("jaxdiff", description="Train, sample and evaluate diffusion models in JAX.", epilog=EXAMPLES)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, text: str, epilog: str = "") -> Parser:
        return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", epilog=epilog)

    train = command("train", "train an experiment, or go on with a run that was stopped")
    options.experiment(train)
    train.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run: checkpoints, logs, pictures")
    options.devices(train)

    sample = command("sample", "draw samples from a run, or from a file that `freeze` wrote", SOLVERS)
    options.sampling(sample, num=64)
    sample.add_argument("--out", required=True, metavar="PATH", help="grid (.png), arrays (.npz), or a folder of PNGs")
    sample.add_argument("--overwrite", action="store_true", help="replace the samples that lie there")

    pairs = command("pairs", "noise and what a deterministic sampler makes of it: the data of a reflow", SOLVERS)
    options.sampling(pairs, num=50_000, eta=False)
    pairs.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    pairs.add_argument(
        "--dtype", choices=("float16", "float32"), default="float16", help="of noise and samples (default: float16)"
    )

    evaluate = command("evaluate", "judge samples of a run against held-out data", f"{SOLVERS}\n\n{METRICS}")
    options.sampling(evaluate, num=None)
    evaluate.add_argument("--metrics", metavar="NAMES", help="comma-separated (default: the experiment's)")
    options.judging(evaluate)

    compare = command("compare", "quality against number of network calls, for several solvers", SOLVERS)
    options.sampling(compare, num=None, grid=False)
    compare.add_argument("--solvers", metavar="NAMES", help="comma-separated (default: the experiment's)")
    options.judging(compare)
    compare.add_argument(
        "--calls", metavar="NUMBERS", help="of the network, comma-separated (default: the experiment's)"
    )

    freeze = command("freeze", "write a sampler and its weights into one file that `sample` runs anywhere", SOLVERS)
    freeze.add_argument("run_folder", metavar="RUN", help="folder of a run")
    options.sampler(freeze, eta=False)
    freeze.add_argument(
        "--batch-size", type=whole(1), metavar="N", help="of every call (default: chosen when the file is run)"
    )
    freeze.set_defaults(guidance=None, label=None)
    freeze.add_argument("--out", required=True, metavar="FILE", help="where the sampler goes, such as digits.jaxdiff")
    freeze.add_argument("--overwrite", action="store_true", help="replace the file that lies there")

    options.experiment(command("info", "parameters, FLOPs a step, bytes a device; nothing is allocated"))

    profile = command("profile", "time, FLOPs, bytes and MFU of the train step and of a network call")
    options.experiment(profile)
    profile.add_argument("--steps", type=whole(1), default=10, metavar="N", help="timed repetitions (default: 10)")
    profile.add_argument("--trace", metavar="DIR", help="write a profiler trace there")
    profile.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    options.devices(profile)

    checkpoint = command("checkpoint", "what checkpoints hold, and whether every leaf is as it was written")
    checkpoint.add_argument(
        "action", choices=("inspect", "verify"), help="describe them, or read and check all of them"
    )
    checkpoint.add_argument("folder", metavar="DIR", help="folder of a run, or its checkpoints")
    checkpoint.add_argument("--step", type=whole(0), metavar="N", help="verify this one only (default: all)")

    edit = command("edit", "edit a picture with a run: inpaint, colorize, superres, stroke, denoise, interpolate")
    options.editing(edit)

    read = command("import", "make a folder of our parameters from published weights", KINDS)
    options.weights(read)
    read.add_argument("files", nargs="+", metavar="FILE", help="weight file, or folder of diffusers; LPIPS has two")
    read.add_argument("out", metavar="OUT", help="folder to make")
    read.add_argument("--dtype", default="float32", metavar="D", help="float32, bfloat16 or float16 (default: float32)")
    read.add_argument("--prefix", metavar="P", help="of the tensors' names (default: that of the kind)")
    read.add_argument("--skip", action="append", default=[], metavar="P", help="pass over names that begin so")
    read.add_argument("--ema", action="store_true", help="a CompVis checkpoint's moving average")
    read.add_argument("--base", metavar="DIR", help="of lora: the imported network that it is merged into")
    read.add_argument("--weight", type=number(), default=1.0, metavar="W", help="of lora: how much of it (default: 1)")

    write = command("export", "write parameters of ours in the layout of a publisher", KINDS)
    options.weights(write)
    write.add_argument("folder", metavar="DIR", help="folder from import, or of a run")
    write.add_argument("out", metavar="FILE", help="*.safetensors, or a folder with config.json (diffusers, clip-text)")
    write.add_argument("--dtype", metavar="D", help="float32, bfloat16 or float16 (default: as it is)")
    write.add_argument("--player", default="model", metavar="NAME", help="of a run: which player (default: model)")
    write.add_argument("--average", metavar="NAME", help="of a run: EMA, or raw (default: the last EMA)")
    write.add_argument("--experiment", metavar="FILE", help="of a run: its experiment file, if it has moved")

    inspect = command(
        "inspect", "what a weight file or imported folder holds, or the published networks of a kind", KINDS
    )
    inspect.add_argument("file", metavar="FILE", help="weight file, imported folder, or kind")
    return top


def _run(args: argparse.Namespace) -> int:
    if args.command == "edit":
        from jaxdiff.edit import edit

        return edit(args)
    if args.command in ("import", "export", "inspect"):
        from jaxdiff import weights

        return {"import": weights.import_, "export": weights.export, "inspect": weights.inspect}[args.command](args)
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
