"""PostgreSQL under pgbench: pgbench's log says what was acknowledged, psql reads back what is there."""

import asyncio
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import tenacity

from spotguard.clock import SystemClock, deadline_from_epoch
from spotguard.lab.clients import pgbench
from spotguard.lab.clients.control import Orders, emit
from spotguard.lab.clients.options import Options
from spotguard.lab.clients.pgbench import Log, Pgbench
from spotguard.lab.clients.result import Result, TcpSummary, ms
from spotguard.lab.ledger import Verdict, compare_log

TELL_SECONDS = 0.5
STOP_SECONDS = 15.0
SQL_SECONDS = 60.0
ROW_BYTES = 8000
FILL_ROWS = 512  # per statement
LOST_LOG_BYTES = 4096  # of pgbench's buffer, if it has to be killed: the shortest line is 20 bytes
# The rows are not compressed and not unique by a constraint: a doubled write has to show as a row, not as an error.
SCHEMA = """
CREATE TABLE ledger (id bigserial PRIMARY KEY, client int, n int, payload text);
CREATE INDEX ledger_by_number ON ledger (client, n);
CREATE TABLE filling (id int PRIMARY KEY, body text);
ALTER TABLE filling ALTER body SET STORAGE EXTERNAL;
ALTER TABLE ledger ALTER payload SET STORAGE EXTERNAL;
CREATE EXTENSION amcheck;
"""
FILL = "INSERT INTO filling SELECT id, repeat(md5(id::text), :repeats) FROM generate_series(:first, :last) id"
READ_FILLING = "SELECT count(*), count(*) FILTER (WHERE body = repeat(md5(id::text), :repeats)) FROM filling"
READ_LEDGER = """
COPY (SELECT client, n, payload = repeat(md5(client || '-' || n), :repeats) FROM ledger ORDER BY id) TO STDOUT
"""


class SqlError(Exception):
    """psql failed; the text is its complaint."""


class PostgresClient:
    """All phases of the client."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._where = (f"--host={options.address}", f"--port={options.port}", "--username=postgres")
        self._rows = max(1, int(options.size * 2**20) // ROW_BYTES)
        per_second = pgbench.TRANSACTIONS_PER_SECOND * options.connections
        self._repeats = max(1, round(options.rate * 1e6 / per_second / 32))
        self._tcp: dict[int, TcpSummary] = {}
        self._missing: set[int] = set()

    async def run(self, folder: Path) -> bool:
        """Run all phases; return whether the server kept every promise on every connection."""
        orders = await Orders.open()
        await self._fill()
        log = Log(self._options.connections, offset=deadline_from_epoch(0.0, SystemClock()))
        log.begin(time.monotonic())
        bench = await Pgbench.start(self._where, folder, self._options.connections, self._repeats)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(bench.watch_errors())
                await self._until_ready(bench, log)
                emit("ready", values=self._rows, bytes=self._rows * ROW_BYTES, connections=self._options.connections)
                telling = group.create_task(self._tell(bench, log))
                await orders.wait_for("stop")
                telling.cancel()
                await self._sample()
                stopped = await bench.stop(STOP_SECONDS)
            log.feed(bench.read())
        finally:
            bench.close()
        log.gaps.close(time.monotonic())
        self._save(log)
        lost = self._lost(bench)
        emit("stopped", acknowledged=sum(log.acknowledged), connections_lost=lost)
        if not await orders.wait_for("verify"):
            return False
        result = await self._check(bench, log, stopped=stopped)
        emit("result", **result.fields())
        return result.sound

    async def _until_ready(self, bench: Pgbench, log: Log) -> None:
        while not all(log.acknowledged):
            await asyncio.sleep(0.05)
            log.feed(bench.read())
            if not bench.running:
                raise SqlError(f"pgbench ended at once: {'; '.join(bench.errors)}")
            if time.monotonic() > self._options.deadline:
                raise TimeoutError("pgbench has completed nothing on some connection")
        self._tcp = await pgbench.connections(self._options.address, self._options.port)

    async def _tell(self, bench: Pgbench, log: Log) -> None:
        while True:
            await asyncio.sleep(TELL_SECONDS)
            log.feed(bench.read())
            await self._sample()
            longest = log.gaps.longest
            emit(
                "progress", phase="load", acknowledged=sum(log.acknowledged), connections_lost=self._lost(bench),
                waiting_ms=ms(log.gaps.waiting(time.monotonic())), longest_gap_ms=ms(longest.seconds if longest else 0),
            )  # fmt: skip

    async def _sample(self) -> None:
        now = await pgbench.connections(self._options.address, self._options.port)
        self._missing |= set(self._tcp) - set(now)
        for port, seen in now.items():
            if port in self._tcp:
                worst = max(seen.worst_backoff, self._tcp[port].worst_backoff)
                self._tcp[port] = replace(seen, worst_backoff=worst)

    def _lost(self, bench: Pgbench) -> int:
        return max(len(bench.aborted), len(self._missing))

    def _save(self, log: Log) -> None:
        with self._options.ledger.open("w", encoding="utf-8") as out:
            for client, number, at, latency in log.ledger:
                out.write(f"{client} {number} {at:.6f} {latency * 1e3:.3f}\n")

    async def _fill(self) -> None:
        async for attempt in tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(SqlError),
            wait=tenacity.wait_fixed(0.1),
            stop=lambda _: time.monotonic() >= self._options.deadline,
            reraise=True,
        ):
            with attempt:
                await self._sql("SELECT 1")
        await self._sql(SCHEMA)
        for first in range(0, self._rows, FILL_ROWS):
            last = min(first + FILL_ROWS, self._rows) - 1
            await self._sql(FILL, first=first, last=last, repeats=ROW_BYTES // 32)
            emit("progress", phase="fill", done=last + 1, total=self._rows)

    async def _check(self, bench: Pgbench, log: Log, *, stopped: bool) -> Result:
        faults = [*bench.aborted.values(), *log.surprises]
        if not stopped:
            faults.append(f"pgbench did not end within {STOP_SECONDS:.0f} s and was killed, with the end of its log")
        try:
            verdict, checked, complete = await self._compare(bench, log, stopped=stopped), self._rows, True
        except (SqlError, TimeoutError) as e:
            faults.append(f"the check could not be finished: {e or 'no answer'}")
            total = sum(log.acknowledged)
            verdict, checked, complete = Verdict(acknowledged=total, lost=total), 0, False
        return Result(
            verdict=verdict,
            gaps=log.gaps,
            latency=log.latency,
            connections=self._options.connections,
            connections_lost=self._lost(bench),
            tcp=list(self._tcp.values()),
            faults=faults,
            checked_values=checked,
            complete=complete,
        )

    async def _compare(self, bench: Pgbench, log: Log, *, stopped: bool) -> Verdict:
        rows = await self._sql(READ_LEDGER, repeats=self._repeats)
        found: list[list[int]] = [[] for _ in range(self._options.connections)]
        verdict = Verdict()
        for row in rows.splitlines():
            client, number, intact = row.split("\t")
            found[int(client)].append(int(number))
            verdict += Verdict(wrong=intact != "t")
        for i, last in enumerate(log.acknowledged):
            open_ends = range(last + 1, last + 2 if stopped else last + LOST_LOG_BYTES // 20)
            unanswered = open_ends if i in bench.aborted or not stopped else []
            verdict += compare_log(range(1, last + 1), unanswered, found[i])
        return verdict + await self._compare_filling()

    async def _compare_filling(self) -> Verdict:
        counted = await self._sql(READ_FILLING, repeats=ROW_BYTES // 32)
        there, intact = map(int, counted.split("|"))
        # Reads every index entry and looks for its row, and the other way round; raises on the first that is wrong.
        for index in ("ledger_by_number", "ledger_pkey", "filling_pkey"):
            await self._sql("SELECT bt_index_check(:'index', true)", index=index)
        return Verdict(lost=max(0, self._rows - there), doubled=max(0, there - self._rows), wrong=there - intact)

    async def _sql(self, statement: str, **variables: str | int) -> str:
        process = await asyncio.create_subprocess_exec(
            "psql", *self._where, "--no-psqlrc", "--no-align", "--tuples-only", "--quiet", "--set=ON_ERROR_STOP=1",
            *(f"--set={name}={value}" for name, value in variables.items()), "postgres",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            async with asyncio.timeout(SQL_SECONDS):
                output, errors = await process.communicate(f"{statement};\n".encode())
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            raise SqlError(errors.decode(errors="replace").strip())
        return output.decode()


async def run_postgres(options: Options) -> bool:
    """Run all phases of the client; see PostgresClient."""
    with tempfile.TemporaryDirectory(prefix="pgbench-") as folder:
        return await PostgresClient(options).run(Path(folder))
