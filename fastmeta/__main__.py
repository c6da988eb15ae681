"""`python -m fastmeta`: what is live on this machine, and a demonstration."""

import argparse
import sys
from collections.abc import Sequence

from fastmeta.backends import describe


def main(arguments: Sequence[str]) -> int:
    """Runs one command and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fastmeta", description="Meta-learning for PyTorch, exact and fast."
    )
    commands = parser.add_subparsers(dest="command", metavar="command")
    commands.add_parser("info", help="what is live on this machine and, for what is not, why")
    demo = commands.add_parser("demo", help="learn to learn, and watch it")

    # The demo is imported only when asked for, so that info also answers where the demo can't run.
    if list(arguments[:1]) == ["demo"]:
        from fastmeta.demo import command

        command.add_arguments(demo)
        return command.run(parser.parse_args(arguments))

    if parser.parse_args(arguments).command is None:
        parser.print_help()
        return 2
    print(describe())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
