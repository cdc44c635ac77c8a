"""Looks at processes from outside: how much memory they have, and whether a failed dump has left them whole."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from criu_transfer.errors import DumpFailed
from criu_transfer.maps import Vma, read_maps
from criu_transfer.proctree import Process

KIB = 1024


def memory_bytes(processes: Sequence[Process]) -> int:
    """Add up the anonymous and shared memory of processes (RssAnon, RssShmem, VmSwap of proc_pid_status(5)).

    Shared memory counts once per process that maps it: an upper bound. A process that goes meanwhile counts as 0.
    """
    return sum(
        sum(_kib(status, field) for field in ("RssAnon", "RssShmem", "VmSwap")) * KIB
        for status in map(_status, processes)
    )


def check(processes: Sequence[Process], before: Mapping[int, list[Vma]] | None) -> None:
    """See that frozen processes are as they were before a dump that failed or was interrupted.

    CRIU takes hold of each by ptrace and maps its parasite into it; a CRIU that dies in between leaves that behind.
    `before`: their mappings by pid, None where nobody looked. Raises DumpFailed saying what is wrong.
    """
    for process in processes:
        tracer = _kib(_status(process), "TracerPid")
        if tracer:
            raise DumpFailed(f"process {process.pid} is still traced by {tracer}")
        mappings = read_maps(process.pid)
        if any("CRIUMFD" in vma.path for vma in mappings):
            raise DumpFailed(f"CRIU's parasite is still in process {process.pid}")
        if before is not None and before.get(process.pid) != mappings:
            raise DumpFailed(f"the mappings of process {process.pid} are not what they were before the dump")
    if before is not None and (missing := before.keys() - {process.pid for process in processes}):
        raise DumpFailed(f"processes {sorted(missing)} are gone since the dump")


def _status(process: Process) -> str:
    try:
        return Path(f"/proc/{process.pid}/status").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _kib(status: str, field: str) -> int:
    line = next((line for line in status.splitlines() if line.startswith(f"{field}:")), "")
    words = line.split()
    return int(words[1]) if len(words) > 1 else 0
