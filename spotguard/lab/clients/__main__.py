"""Starts a client: `python -m spotguard.lab.clients NAME --address IP --port P --ledger FILE ...`."""

import argparse
import asyncio
import signal
import sys
import time
from pathlib import Path

from spotguard.lab.clients.java import JavaSession
from spotguard.lab.clients.options import Options
from spotguard.lab.clients.postgres import run_postgres
from spotguard.lab.clients.redis import RedisSession
from spotguard.lab.clients.run import run_keyed


def main() -> int:
    """Parse the arguments and run; the exit code is 0 if every promise was kept, 1 if not."""
    parser = argparse.ArgumentParser(prog="spotguard.lab.clients", description=__doc__)
    parser.add_argument("name", choices=["redis", "postgres", "java"])
    parser.add_argument("--address", required=True, help="the server's IP address")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ledger", type=Path, required=True, help="file for the acknowledged writes")
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--rate", type=float, default=5.0, help="MB/s to overwrite, 10^6 bytes each")
    parser.add_argument("--size", type=float, default=64.0, help="MiB of values to fill in")
    parser.add_argument("--seed", type=int, default=1, help="from which the values are derived")
    parser.add_argument("--connect-within", type=float, default=30.0, metavar="SECONDS", help="for the server to start")
    arguments = parser.parse_args()
    options = Options(
        address=arguments.address, port=arguments.port, ledger=arguments.ledger, connections=arguments.connections,
        rate=arguments.rate, size=arguments.size, seed=arguments.seed,
        deadline=time.monotonic() + arguments.connect_within,
    )  # fmt: skip
    try:
        return 0 if asyncio.run(_guarded(arguments.name, options)) else 1
    except asyncio.CancelledError:
        return 128 + signal.SIGTERM


async def _guarded(name: str, options: Options) -> bool:
    """Run, and end in order at SIGTERM: pgbench must not go on without us."""
    running = asyncio.ensure_future(_run(name, options))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    return await running


async def _run(name: str, options: Options) -> bool:
    match name:
        case "redis":
            return await run_keyed(options, RedisSession)
        case "java":
            return await run_keyed(options, JavaSession)
        case "postgres":
            return await run_postgres(options)
    raise ValueError(f"no client named {name!r}")


if __name__ == "__main__":
    sys.exit(main())
