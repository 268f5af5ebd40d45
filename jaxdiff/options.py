"""The options that several commands of the command line share; which commands there are stands in `cli.py`."""

from pathlib import Path

from jaxdiff.arguments import Parser, number, whole


def experiment(command: Parser) -> None:
    """An experiment file, its settings and a mesh."""
    command.add_argument("file", metavar="FILE", help="experiment file, Python with a function build(...)")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of build(...)")
    devices = "one" if command.prog.endswith("info") else "all along data, of a CPU along fsdp"
    command.add_argument("--mesh", default="", help=f"devices by axis, such as data=4,fsdp=2 (default: {devices})")


def devices(command: Parser) -> None:
    """Devices of a CPU, and other processes."""
    command.add_argument(
        "--cpu-devices", type=whole(1), metavar="N", help="share batches among N devices of a CPU, one for each core"
    )
    command.add_argument(
        "--distributed", choices=("auto", "off"), default="auto",
        help="join the other processes if the environment names them (TPU pod, Slurm, Open MPI, JAXDIFF_COORDINATOR)",
    )  # fmt: skip


def sampling(command: Parser, num: int | None, grid: bool = True, eta: bool = True) -> None:
    """A run and what to draw from it; num is the usual number of samples, None for the experiment's."""
    command.add_argument("run_folder", metavar="RUN", help="folder of a run")
    usual = "the experiment's" if num is None else num
    command.add_argument("--num", type=whole(1), default=num, metavar="N", help=f"number of samples (default: {usual})")
    sampler(command, grid, eta)
    command.add_argument("--guidance", type=number(), metavar="W", help="classifier-free guidance scale; 1 is none")
    command.add_argument("--class", type=whole(0), dest="label", metavar="C", help="one class (default: all)")
    command.add_argument(
        "--seed", type=whole(0, 2**32 - 1), default=0, metavar="K", help="of all that is drawn (default: 0)"
    )
    command.add_argument("--batch-size", type=whole(1), metavar="N", help="samples at once (default: 256)")
    devices(command)


def sampler(command: Parser, grid: bool = True, eta: bool = True) -> None:
    """Solver, grid and parameters of a sampler."""
    if grid:
        command.add_argument("--steps", type=whole(1), metavar="S", help="solver steps (default: the method's)")
        command.add_argument("--solver", metavar="NAME", help="name of a solver (default: the method's)")
    if grid and eta:
        command.add_argument(
            "--eta", type=number(0.0, 1.0), help="noise of ddim, 0 to 1: none to that of ancestral (default: 0)"
        )
    command.add_argument("--ema", metavar="NAME", help="which average to use, or raw (default: the last one)")
    command.add_argument("--experiment", metavar="FILE", help="experiment file, if it has moved")


def editing(command: Parser) -> None:
    """A run, a task, pictures and how they are edited."""
    command.add_argument("run_folder", metavar="RUN", help="folder of a run whose method needs few calls")
    command.add_argument("task", metavar="TASK", help="inpaint, colorize, superres, stroke, denoise or interpolate")
    command.add_argument("--image", type=Path, metavar="FILE", help="the picture, of the size that the run makes")
    command.add_argument("--mask", type=Path, metavar="FILE", help="of inpaint: white where the picture is redrawn")
    command.add_argument(
        "--factor", type=whole(2), default=2, metavar="N", help="of superres: side of a patch (default: 2)"
    )
    command.add_argument(
        "--noise", type=number(0.001, 1000.0), metavar="S", help="of stroke and denoise: level sigma/alpha"
    )
    command.add_argument("--steps", type=whole(1), default=10, metavar="S", help="calls of the network (default: 10)")
    command.add_argument("--num", type=whole(1), default=4, metavar="N", help="results (default: 4)")
    command.add_argument("--class", type=whole(0), dest="label", metavar="C", help="one class (default: all in turn)")
    command.add_argument("--seed", type=whole(0, 2**32 - 2), default=0, metavar="K", help="of all that is drawn")
    command.add_argument("--resize", action="store_true", help="scale pictures of another size")
    command.add_argument("--ema", metavar="NAME", help="which average to use, or raw (default: the last one)")
    command.add_argument("--experiment", metavar="FILE", help="experiment file, if it has moved")
    command.add_argument("--out", type=Path, required=True, metavar="PATH", help="strip (.png) or arrays (.npz)")


def judging(command: Parser) -> None:
    """Who judges samples."""
    command.add_argument(
        "--inception", metavar="FILE", help="pytorch-fid's weights, to judge by (default: the experiment's extractor)"
    )


def weights(command: Parser) -> None:
    """Kind, configuration and dtype of published weights."""
    command.add_argument("kind", metavar="KIND", help="form of the weights, see the list below")
    command.add_argument(
        "--config", metavar="NAME", help="a published configuration, or a JSON file with the publisher's own"
    )
