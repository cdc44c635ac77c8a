"""`spotguard drill`: interrupts a node on this machine and reports what became of its workloads."""

import argparse
import asyncio
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from spotguard import __version__
from spotguard.clock import SystemClock
from spotguard.core.state import SourcePhase, TargetPhase
from spotguard.errors import SpotGuardError, Unsupported
from spotguard.lab import assemble
from spotguard.lab.pod import PRESETS, PodOptions
from spotguard.lab.report import Report, terminal_summary, write_json
from spotguard.lab.report_html import write_html
from spotguard.lab.run import SOURCE, TARGET, Run, RunOptions, RunResult
from spotguard.lab.teller import Teller

DEFAULT_WORKLOADS = ("redis", "postgres", "java")
HARMLESS = frozenset({"lo", "sit0", "tunl0", "ip6tnl0", "gre0", "gretap0", "erspan0"})  # made with every namespace
FAULTS = ("drop-page", "double-run")
_SIZE = re.compile(r"(\d+)\s*(MiB|GiB)?\Z")
_RATE = re.compile(r"\d+(\.\d+)?(k|m|g)bit\Z")


def mebibytes(text: str) -> int:
    """Read "256", "256MiB" or "1GiB" as MiB."""
    found = _SIZE.match(text)
    if found is None or not int(found[1]):
        raise argparse.ArgumentTypeError(f"'{text}' is no size: a number of MiB, or with the unit MiB or GiB")
    return int(found[1]) * (1024 if found[2] == "GiB" else 1)


def link_rate(text: str) -> str:
    """Check a link speed in tc's words."""
    if not _RATE.match(text):
        raise argparse.ArgumentTypeError(f"'{text}' is no link speed: for example 100mbit, 1gbit, 10gbit")
    return text


def positive(text: str) -> float:
    """Read a number above 0."""
    try:
        number = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no number") from error
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"'{text}' is not between 0 and 1,000,000")
    return number


def node_phase(text: str) -> tuple[str, str]:
    """Read NODE:PHASE."""
    node, _, phase = text.partition(":")
    phases = {SOURCE: SourcePhase, TARGET: TargetPhase}
    if node not in phases or phase not in [str(one) for one in phases[node]]:
        known = "; ".join(f"{name}: {', '.join(map(str, kinds))}" for name, kinds in phases.items())
        raise argparse.ArgumentTypeError(f"'{text}' is no NODE:PHASE ({known})")
    return node, phase


def check_place(interfaces: Path = Path("/sys/class/net")) -> None:
    """See that the lab may make its network here. Raises Unsupported: never does it touch a machine's own network."""
    if os.geteuid() != 0:
        raise Unsupported("the drill makes namespaces and moves containers, which takes root", remedy="run it by sudo")
    others = sorted(path.name for path in interfaces.iterdir() if path.is_dir() and path.name not in HARMLESS)
    if others:
        raise Unsupported(
            f"this network namespace has {', '.join(others)}: the drill wants one of its own",
            remedy="run it by `make drill`, which enters the node image",
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "--workload", choices=sorted(PRESETS), action="append", metavar="NAME",
        help=f"workload to run, may be repeated (default: {', '.join(DEFAULT_WORKLOADS)})",
    )  # fmt: skip
    parser.add_argument(
        "--memory", type=mebibytes, default=256, metavar="SIZE",
        help="what each client fills its workload to, in MiB or with a unit (default: 256MiB); postgres gets a quarter",
    )  # fmt: skip
    parser.add_argument(
        "--write-rate", type=positive, default=5.0, metavar="MB/S", help="what each client overwrites (default: 5)"
    )
    parser.add_argument("--connections", type=int, default=4, metavar="N", help="connections per client (default: 4)")
    parser.add_argument("--link", type=link_rate, metavar="RATE", help="shape links, e.g. 1gbit (default: unshaped)")
    parser.add_argument(
        "--action", choices=("terminate", "stop", "hibernate"), default="terminate", help="the notice's action"
    )
    parser.add_argument(
        "--time-left", type=positive, default=120.0, metavar="SECONDS", help="that the notice gives (default: 120)"
    )
    parser.add_argument(
        "--mode", choices=("auto", "live", "stop-and-copy"), default="auto", help="how memory moves (default: auto)"
    )
    parser.add_argument(
        "--fault", choices=FAULTS, action="append", default=[], metavar="NAME",
        help="break something on purpose, to see that it would be found: drop-page (pages are not sent), "
        "double-run (the source thaws after the hand-over); the drill then fails",
    )  # fmt: skip
    parser.add_argument(
        "--kill-agent", type=node_phase, action="append", default=[], metavar="NODE:PHASE",
        help="kill -9 the agent of node-a (source) or node-b (target) when it enters that phase, and start it again",
    )  # fmt: skip
    parser.add_argument("--runs", type=int, default=1, metavar="N", help="how many runs (default: 1)")
    parser.add_argument(
        "--no-comparison", action="store_true", help="leave out the run by plain stop-and-copy that is compared with"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("build/drill"), metavar="DIR", help="for reports (default: build/drill)"
    )


def pods(args: argparse.Namespace) -> tuple[PodOptions, ...]:
    """Give the workloads that the flags ask for."""
    names = tuple(dict.fromkeys(args.workload or DEFAULT_WORKLOADS))
    return tuple(
        PodOptions(name, max(1, args.memory // 4) if name == "postgres" else args.memory, args.write_rate,
                   args.connections)
        for name in names
    )  # fmt: skip


async def drill(args: argparse.Namespace) -> int:
    """Run the drill as asked and write its reports; the exit code is the worst of all runs'."""
    output: Path = args.output
    output.mkdir(parents=True, exist_ok=True)
    options = RunOptions(
        pods=pods(args),
        mode=args.mode,
        link=args.link,
        action=args.action,
        time_left_s=args.time_left,
        faults=tuple(args.fault),
        kills=tuple(args.kill_agent),
    )
    compare = not (args.no_comparison or args.fault or args.kill_agent)
    worst = 0
    for number in range(args.runs):
        name = "report" if args.runs == 1 else f"report-{number + 1}"
        report = await _one(options, output, compare=compare)
        write_json(report, output / f"{name}.json")
        write_html(report, output / f"{name}.html")
        print(f"\n{terminal_summary(report)}\n\nreport: {output / name}.html, {output / name}.json", flush=True)
        worst = max(worst, report.exit_code, key=lambda code: {1: 2, 2: 1}.get(code, 0))
    return worst


async def _one(options: RunOptions, output: Path, *, compare: bool) -> Report:
    started = datetime.fromtimestamp(SystemClock().wall(), UTC).isoformat(timespec="seconds")
    teller = Teller(sys.stdout)
    try:
        return await _told(options, output, started, teller, compare=compare)
    finally:
        teller.close()


async def _told(options: RunOptions, output: Path, started: str, teller: Teller, *, compare: bool) -> Report:
    teller.headline("live: memory ahead, a short freeze" if options.mode != "stop-and-copy" else "stop-and-copy")
    result = await _run(options, output / "logs", teller)
    compared: RunResult | None = None
    if compare:
        teller.headline("for comparison: the same move by plain stop-and-copy")
        compared = await _run(replace(options, mode="stop-and-copy"), output / "logs-stop-and-copy", teller)
    return Report(
        version=__version__,
        started=started,
        machine=assemble.machine(assemble.tracker_of(result)),
        notice=assemble.notice(result),
        notes=assemble.notes(result),
        workloads=tuple(assemble.workload(result, pod.name, compared) for pod in options.pods),
    )


async def _run(options: RunOptions, logs: Path, teller: Teller) -> RunResult:
    shutil.rmtree(logs, ignore_errors=True)

    def tell(what: str, fields: Mapping[str, Any]) -> None:
        teller.hear(what, fields)

    return await Run(options, logs, tell).execute()


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.runs < 1 or args.connections < 1:
        raise SpotGuardError("--runs and --connections must be at least 1")
    check_place()
    return asyncio.run(drill(args))
