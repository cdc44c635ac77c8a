"""Turns the event log into metrics and log lines, so that effects report a thing once and in one place."""

from typing import Any

import structlog

from spotguard.events_log import EventLog
from spotguard.observability import Metrics, Mode, Outcome, Phase

_LOG = structlog.get_logger()
# The command of the core -> the phase that its duration counts for.
PHASES: dict[str, Phase] = {
    "Preflight": "decide",
    "OfferTarget": "prepare",
    "PrepareSandbox": "prepare",
    "CopyRound": "precopy",
    "HoldNetwork": "hold",
    "FreezeProcesses": "freeze",
    "DumpAndSend": "dump",
    "RestoreProcesses": "restore",
    "TakeOwnership": "handover",
    "ReleaseNetwork": "release",
    "AwaitFill": "fill",
    "CleanUp": "finish",
}
OUTCOMES: dict[str, tuple[Outcome, Mode]] = {
    "moved": ("moved", "live"),
    "moved-by-stop-and-copy": ("moved", "stop-and-copy"),
    "rolled-back": ("rolled_back", "live"),
    "left-to-eviction": ("refused", "live"),
    "unmovable": ("refused", "live"),
    "lost": ("lost", "live"),
}
# What asks the owner store; its round trip is timed.
STORE_COMMANDS = frozenset({"CreateOwnership", "ReadOwnership", "ReclaimOwnership", "TakeOwnership"})
NOTICE_SECONDS = 120.0  # what AWS gives before it terminates or stops a Spot instance


async def observe(log: EventLog, metrics: Metrics) -> None:
    """Follow the log for ever. Should it be too slow once, what it missed is missing, and it goes on."""
    observer = Observer(metrics)
    past = True
    while True:
        async for entry in log.follow(past=past):
            fields = {key: value for key, value in entry.items() if key not in {"event", "t"}}
            _LOG.info(entry["event"], **fields)
            observer.count(entry)
        past = False
        _LOG.warning("the event log was read too slowly: some of it is in no log line and no metric")


class Observer:
    """Counts entries; remembers of each migration what a later entry needs."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._deadline: float | None = None
        self._frozen: dict[str, float] = {}
        self._held: dict[str, float] = {}
        self._rounds: dict[str, int] = {}

    def count(self, entry: dict[str, Any]) -> None:
        """Take one entry into account; unknown ones are nothing."""
        metrics, migration = self._metrics, str(entry.get("migration", ""))
        match entry:
            case {"event": "notice"}:
                self._notice(entry)
            case {"event": "done", "command": command, "seconds": float(seconds)}:
                self._command(str(command), seconds, str(entry.get("result", "")))
            case {"event": "freeze-step", "step": "hold", "start": start}:
                self._held[migration] = start
            case {"event": "freeze-step", "step": "freeze", "start": start}:
                self._frozen[migration] = start
            case {"event": "round", "bytes": size}:
                metrics.copied("memory", size)
                self._rounds[migration] = self._rounds.get(migration, 0) + 1
            case {"event": "captured", "image_bytes": images, "file_bytes": files}:
                metrics.copied("images", images)
                metrics.copied("files", files)
            case {"event": "resumed"}:
                self._resumed(migration, entry["t"])
            case {"event": "released", "played": played, "dropped": dropped}:
                metrics.frames(played, {"hold": dropped})
            case {"event": "stored", "bytes": size}:
                metrics.store_memory(size)
            case {"event": "filled", "faults": faults}:
                metrics.pager_faults(faults)
                metrics.store_memory(0)
            case {"event": "finished", "side": "source", "outcome": outcome} if outcome in OUTCOMES:
                metrics.migrated(*OUTCOMES[outcome])
                metrics.rounds(self._rounds.pop(migration, 0))
            case _:
                return

    def _notice(self, entry: dict[str, Any]) -> None:
        self._metrics.notice(str(entry["action"]))
        left = entry.get("left_s")
        if left is None:
            return
        self._deadline = entry["t"] + left
        if entry["action"] in {"terminate", "stop"} and 0 < left <= NOTICE_SECONDS:
            self._metrics.detected(NOTICE_SECONDS - left)

    def _command(self, command: str, seconds: float, result: str) -> None:
        if command in PHASES:
            self._metrics.phase(PHASES[command], seconds)
        if command in STORE_COMMANDS:
            answer = result.partition(": ")[2].partition("(")[0] or "none"
            self._metrics.owner_store(command, answer, seconds)

    def _resumed(self, migration: str, now: float) -> None:
        if migration in self._frozen:
            self._metrics.froze(now - self._frozen.pop(migration))
        if migration in self._held:
            self._metrics.paused(now - self._held.pop(migration))
        if self._deadline is not None:
            self._metrics.margin(self._deadline - now)
