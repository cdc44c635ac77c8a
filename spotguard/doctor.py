"""`spotguard doctor`: tells what this machine can do, and what to mend."""

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict

from spotguard.doctor_checks import Check, examine, verdict
from spotguard.doctor_host import Host, ThisHost

_MARKS = {"ok": "ok", "limited": "limited", "missing": "MISSING"}
_VERDICTS = {
    "live": "Containers are moved live. Always by stop-and-copy: those with files opened O_DIRECT, asynchronous I/O, "
    "pinned memory or RDMA, whose writes cannot be tracked.",
    "stop-and-copy": "Containers are moved by stop-and-copy: they stand still while all of their memory is copied.",
    "none": "Containers cannot be moved on this machine until what is MISSING is there.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line of `spotguard doctor`."""
    parser.description = (
        "Try what SpotGuard needs of this machine and tell what to mend. Run it as root on each node. Nothing is "
        "changed. Exit status: 0 when containers can be moved, 1 when something required is missing."
    )
    parser.add_argument(
        "--output", choices=("text", "json"), default="text", help="a table for people, or JSON (default: %(default)s)"
    )


def main(args: argparse.Namespace, host: Host | None = None) -> int:
    """Run all checks and print them; 1 when something required is missing."""
    checks = examine(host or ThisHost())
    moves = verdict(checks)
    sys.stdout.write(as_json(checks, moves) if args.output == "json" else as_text(checks, moves))
    return 1 if moves == "none" else 0


def as_json(checks: Sequence[Check], moves: str) -> str:
    """Give the findings as JSON: `moves` is live, stop-and-copy or none; `level` is ok, limited or missing."""
    return json.dumps({"moves": moves, "checks": [asdict(check) for check in checks]}, indent=2) + "\n"


def as_text(checks: Sequence[Check], moves: str) -> str:
    """Give the findings as a table."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{_MARKS[check.level]:<8} {check.name:<{width}}  {check.found}")
        if check.remedy:
            lines.append(f"{'':<8} {'':<{width}}  -> {check.remedy}")
    return "\n".join([*lines, "", *textwrap.wrap(_VERDICTS[moves], 100)]) + "\n"
