"""pgbench as the load: its script, its log as the ledger, its connections as `ss` shows them.

The log has a line for each completed transaction: client, number (from 1), microseconds, script, and the time of
completion as seconds and microseconds since the epoch (PostgreSQL manual, pgbench, "Per-Transaction Logging").
"""

import asyncio
import re
import signal
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Self

from spotguard.lab.clients.result import TcpSummary
from spotguard.lab.ledger import GapRecorder

PAUSE_MS = 4  # between a connection's transactions: the grain of the measured gaps
TRANSACTIONS_PER_SECOND = 200  # about, per connection, with that pause; only sizes the payload
LONGEST_RUN_SECONDS = 86400
ABORTED = re.compile(r"client (\d+) (?:script \d+ )?aborted")


# The variable n counts up in each client on its own; `pause` and `repeats` are set for all.
SCRIPT = """\\sleep :pause ms
\\set n :n + 1
INSERT INTO ledger (client, n, payload) VALUES (:client_id, :n, repeat(md5(:client_id || '-' || :n), :repeats));
"""


@dataclass
class Log:
    """The acknowledged transactions so far, as pgbench has written them down.

    `offset` turns seconds since the epoch into monotonic seconds. pgbench writes 4 KiB at a time, and the rest when
    it ends.
    """

    clients: int
    offset: float
    gaps: GapRecorder = field(default_factory=GapRecorder)
    acknowledged: list[int] = field(default_factory=list)
    ledger: list[tuple[int, int, float, float]] = field(default_factory=list)  # client, n, monotonic s, latency s
    latency: array[float] = field(default_factory=lambda: array("d"))
    surprises: list[str] = field(default_factory=list)
    _rest: str = ""

    def begin(self, now: float) -> None:
        """Start measuring the gaps."""
        self.acknowledged = [0] * self.clients
        for client in range(self.clients):
            self.gaps.begin(client, now)

    def feed(self, text: str) -> None:
        """Take what was added to the log; a line without its end waits for the rest."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            client, number, microseconds, _, seconds, fraction = line.split()[:6]
            self._completed(int(client), int(number), microseconds, int(seconds) + int(fraction) / 1e6)

    def _completed(self, client: int, number: int, microseconds: str, epoch: float) -> None:
        if number != self.acknowledged[client] + 1:
            self.surprises.append(f"client {client} completed {number} after {self.acknowledged[client]}")
        if not microseconds.isdigit():
            self.surprises.append(f"transaction {number} of client {client}: {microseconds}")  # "failed", "skipped"
            return
        at, latency = epoch + self.offset, max(0.0, int(microseconds) / 1e6 - PAUSE_MS / 1e3)
        self.acknowledged[client] = number
        self.gaps.completed(client, at)
        self.latency.append(latency)
        self.ledger.append((client, number, at, latency))


class Pgbench:
    """A running pgbench."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log
        self._file: IO[str] | None = None
        self._errors: list[str] = []

    @classmethod
    async def start(cls, where: Sequence[str], folder: Path, clients: int, repeats: int) -> Self:
        """Start it; `where` is the address as psql's options, `folder` gets script and log."""
        file = folder / "ledger.sql"
        file.write_text(SCRIPT, encoding="utf-8")
        process = await asyncio.create_subprocess_exec(
            "pgbench", *where, "--no-vacuum", f"--client={clients}", "--jobs=1", f"--time={LONGEST_RUN_SECONDS}",
            "--define=n=0", f"--define=repeats={repeats}", f"--define=pause={PAUSE_MS}", f"--file={file}",
            "--log", f"--log-prefix={folder}/log", "postgres",
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        return cls(process, folder / f"log.{process.pid}")

    def read(self) -> str:
        """Return what the log has got since the last call."""
        if self._file is None and self._log.exists():
            self._file = self._log.open(encoding="ascii")
        return self._file.read() if self._file is not None else ""

    async def watch_errors(self) -> None:
        """Collect what pgbench complains of, until it ends."""
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            self._errors.append(line.decode(errors="replace").strip())

    @property
    def aborted(self) -> dict[int, str]:
        """Return the clients whose connection failed, with pgbench's words; it never opens one again."""
        return {int(m[1]): line for line in self._errors if (m := ABORTED.search(line))}

    @property
    def errors(self) -> list[str]:
        """Return all that pgbench complained of."""
        return self._errors

    @property
    def running(self) -> bool:
        """Tell whether pgbench has not ended."""
        return self._process.returncode is None

    async def stop(self, seconds: float) -> bool:
        """Let every client finish its transaction, and end; False if that took too long and pgbench was killed.

        SIGALRM is how pgbench itself ends a run of --time (pgbench.c, handle_sig_alarm); SIGINT would lose the log.
        """
        if self.running:
            self._process.send_signal(signal.SIGALRM)
        try:
            async with asyncio.timeout(seconds):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
            return False
        return True

    def close(self) -> None:
        """Make sure that nothing goes on."""
        if self.running:
            self._process.kill()
        if self._file is not None:
            self._file.close()


async def connections(address: str, port: int) -> dict[int, TcpSummary]:
    """Return this network namespace's open connections to a server, by local port (ss(8), -i)."""
    process = await asyncio.create_subprocess_exec(
        "ss", "-tinHO", "state", "established", "dst", f"{address}:{port}",
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, _ = await process.communicate()
    return {summary.local_port: summary for summary in map(_summary, output.decode().splitlines())}


def _summary(line: str) -> TcpSummary:
    words = line.split()
    values = dict(word.split(":", 1) for word in words[4:] if ":" in word)
    return TcpSummary(
        local_port=int(words[2].rpartition(":")[2]),
        total_retransmits=int(values.get("retrans", "0/0").partition("/")[2]),
        worst_backoff=int(values.get("backoff", "0")),
        rtt_us=round(float(values.get("rtt", "0").partition("/")[0]) * 1e3),
    )
