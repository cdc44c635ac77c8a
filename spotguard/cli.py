"""The command line: one subcommand per process of SpotGuard and per task of a person."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from spotguard import __version__
from spotguard.errors import SpotGuardError

# name -> (module with add_arguments(parser) and main(args) -> exit code, one line of help)
COMMANDS = {
    "drill": ("spotguard.lab.drill", "interrupt a node on this machine and watch its containers move"),
    "agent": ("spotguard.agent", "run the agent of a node"),
    "doctor": ("spotguard.doctor", "tell what this machine can do, and what to mend"),
    "owner-store": ("spotguard.owner_store", "run the store of who owns a workload (lab)"),
    "imds-sim": ("spotguard.lab.imds_sim", "run a simulated instance metadata service"),
}


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """Build the parser; with `only`, load that command's module alone, for imports cost memory and time."""
    about = "Moves running containers off interrupted Spot nodes."
    parser = argparse.ArgumentParser(prog="spotguard", description=about)
    parser.add_argument("--version", action="version", version=f"spotguard {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if only in {None, name}:
            import_module(module).add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code; errors made for people are printed with their remedy."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    named = next((word for word in arguments if word in COMMANDS), "")
    args = build_parser(named).parse_args(arguments)
    try:
        code: int = import_module(COMMANDS[args.command][0]).main(args)
    except SpotGuardError as error:
        print(f"spotguard {args.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"spotguard {args.command}: interrupted", file=sys.stderr)
        return 130
    return code
