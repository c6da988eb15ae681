"""The command `python -m fastmeta demo`: its arguments, and which demonstration they ask for."""

import argparse
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

_ALGORITHMS = ("maml", "fomaml", "anil", "meta-sgd", "imaml", "reptile", "prototypical")
_ONLY_OMNIGLOT = (
    "data",
    "algorithm",
    "network",
    "ways",
    "shots",
    "queries",
    "minutes",
    "test_steps",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the arguments of the demonstrations.

    An argument left out is None: each demonstration has its own defaults.
    """
    add = parser.add_argument
    add("experiment", nargs="?", choices=["sinusoid", "omniglot"], default="sinusoid")
    add("--iterations", type=_count, metavar="N", help="meta-steps (sinusoid 8000, omniglot 20000)")
    add("--full", action="store_true", help="the paper's meta-steps (70000, omniglot 60000)")
    add(
        "--inner-lr",
        type=_positive,
        metavar="A",
        help="inner step size (0.01; omniglot 0.4, imaml 0.1, reptile 0.001)",
    )
    add(
        "--inner-steps",
        type=_count,
        metavar="K",
        help="inner steps in meta-training (1; imaml 16, reptile 5)",
    )
    add("--seed", type=int, default=0, help="of weights and tasks (0)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, … (cpu)")
    add("--output", type=Path, metavar="PNG", help="the picture (fastmeta-<experiment>.png)")

    group = parser.add_argument_group("omniglot only")
    add = group.add_argument
    add("--data", type=Path, metavar="PATH", help="folder with the published zip files, or one")
    add("--algorithm", choices=_ALGORITHMS, help="what trains the network (maml)")
    add("--network", choices=["mlp", "conv"], help="MAML's Omniglot networks (mlp)")
    add("--ways", type=_count, metavar="N", help="classes a task (5)")
    add("--shots", type=_count, metavar="N", help="support images a class (1)")
    add("--queries", type=_count, metavar="N", help="query images a class (1)")
    add("--minutes", type=_positive, metavar="M", help="end meta-training after M minutes")
    add(
        "--test-steps",
        type=_count,
        metavar="K",
        help="inner steps in the test (as in training; reptile 50)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the demonstration that `args` ask for.

    **Returns:** the exit status: 0, or 2 where something is missing, which is said on stderr.
    """
    # What the person can mend is found here, before minutes of training; what goes wrong later is
    # a fault of ours, and keeps its traceback.
    try:
        demonstration = _prepare(args)
    except (OSError, ValueError, ImportError) as error:
        print(f"fastmeta demo: {error}", file=sys.stderr)
        return 2
    demonstration()
    return 0


def _prepare(args: argparse.Namespace) -> Callable[[], None]:
    missing = [name for name in ("rich", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f'the demonstrations take {" and ".join(missing)}: pip install "fastmeta[demo]"'
        )
    if args.output is None:
        args.output = Path(f"fastmeta-{args.experiment}.png")
    if not args.output.absolute().parent.is_dir():
        raise FileNotFoundError(f"--output: there is no folder {args.output.absolute().parent}")
    if args.full and args.iterations is not None:
        raise ValueError("--full and --iterations: both say how many meta-steps; give one of them")
    _require_device(args.device)
    if args.experiment == "omniglot":
        from fastmeta.demo import omniglot

        return omniglot.prepare(args)

    given = [name for name in _ONLY_OMNIGLOT if getattr(args, name) is not None]
    if given:
        option = given[0].replace("_", "-")
        raise ValueError(f"--{option} belongs to the other one: python -m fastmeta demo omniglot")
    from fastmeta.demo import sinusoid

    return sinusoid.prepare(args)


def _require_device(name: str) -> None:
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: {name} can't be used here ({reason})") from error


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}; it must be a whole number from 1 up")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}; it must be a number above 0")
    return value
