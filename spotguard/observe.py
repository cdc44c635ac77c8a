"""Turns the event log into metrics and log lines, so that effects report a thing once and in one place."""

import structlog

from spotguard.events_log import EventLog
from spotguard.observability import Metrics, Phase

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
OUTCOMES = {
    "moved": ("moved", "live"),
    "moved-by-stop-and-copy": ("moved", "stop-and-copy"),
    "rolled-back": ("rolled_back", "live"),
    "left-to-eviction": ("refused", "live"),
    "unmovable": ("refused", "live"),
    "lost": ("lost", "live"),
}


async def observe(log: EventLog, metrics: Metrics) -> None:
    """Follow the log for ever."""
    async for entry in log.follow():
        fields = {key: value for key, value in entry.items() if key not in {"event", "t"}}
        _LOG.info(entry["event"], **fields)
        _count(entry, metrics)


def _count(entry: dict[str, object], metrics: Metrics) -> None:
    seconds = entry.get("seconds")
    match entry["event"]:
        case "notice":
            metrics.notice(str(entry["action"]))
        case "done" if entry["command"] in PHASES and isinstance(seconds, float):
            metrics.phase(PHASES[str(entry["command"])], seconds)
        case "round":
            metrics.copied("memory", int(str(entry["bytes"])))
        case "captured":
            metrics.copied("images", int(str(entry["image_bytes"])))
            metrics.copied("files", int(str(entry["file_bytes"])))
        case "released":
            metrics.frames(int(str(entry["played"])), {"hold": int(str(entry["dropped"]))})
        case "finished" if entry.get("side") == "source" and entry["outcome"] in OUTCOMES:
            outcome, mode = OUTCOMES[str(entry["outcome"])]
            metrics.migrated(outcome, mode)  # type: ignore[arg-type]  # the table holds only its literals
        case _:
            return
