"""Does write tracking work on the kernel that runs? Tried, not looked up: fixes are back-ported, and bugs too.

    python -m criu_transfer.tracker.selftest

A child process (victim.py) makes memory; it is scanned and copied; it changes its memory in each of the ways that are
known to be dangerous; what was written since is scanned and copied again. Then every page that the tracker takes for
clean must equal the copy. Kernels that are known to fail: before 6.7 (no PAGEMAP_SCAN), arm64 before 6.10 (no write
protection), before 6.12.11 (mremap kept protection bits: moved memory seemed clean, CVE-2025-21696).
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from criu_transfer import kernel
from criu_transfer.errors import TrackerUnavailable
from criu_transfer.maps import read_maps
from criu_transfer.proctree import Process, read_process
from criu_transfer.tracker import victim
from criu_transfer.tracker.wp_async import ProcessTracker

PAGE = kernel.PAGE_SIZE


@dataclass(frozen=True)
class Case:
    """One way of changing memory, and whether the tracker saw it."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class SelfTest:
    """`ok`: deltas may be trusted on this machine; else `reason` says what failed."""

    ok: bool
    reason: str
    cases: tuple[Case, ...]


class Copy:
    """A tracked process and what was copied of it, page by page."""

    def __init__(self, process: Process, deadline: float) -> None:
        self.pid = process.pid
        self.tracker = ProcessTracker()
        self.tracker.attach(process, deadline)
        self.pages: dict[int, bytes] = {}
        self.last: set[int] = set()

    def round(self) -> None:
        """Copy what was written since the last round."""
        self.last = {page for start, end in self.tracker.scan() for page in range(start, end, PAGE)}
        for page in self.last:
            self.pages[page] = read_page(self.pid, page)

    def stale(self, start: int, length: int) -> list[int]:
        """List the pages that the tracker takes for clean and whose copy is missing or wrong."""
        return [
            page
            for page in clean_pages(self.pid, start, start + length)
            if page in self.tracker.tracked and self.pages.get(page) != read_page(self.pid, page)
        ]


def read_page(pid: int, page: int) -> bytes:
    """Read one page of a process; nothing when it cannot be read now."""
    buffer = bytearray(PAGE)
    try:
        kernel.process_vm_readv(pid, buffer, [(page, page + PAGE)])
    except OSError:
        return b""
    return bytes(buffer)


def clean_pages(pid: int, start: int, end: int) -> Iterator[int]:
    """Yield the present pages that the kernel says were not written since they were protected."""
    vector = kernel.region_vector((end - start) // PAGE)
    excluded = kernel.PAGE_IS_WRITTEN | kernel.PAGE_IS_FILE | kernel.PAGE_IS_PFNZERO
    present = kernel.PAGE_IS_PRESENT | kernel.PAGE_IS_SWAPPED
    pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        found, _ = kernel.pagemap_scan(
            pagemap, start, end, vector, inverted=excluded, mask=excluded, anyof=present, return_mask=present
        )
    finally:
        os.close(pagemap)
    for region in range(found):
        yield from range(vector[3 * region], vector[3 * region + 1], PAGE)


def selftest(seconds: float = 10.0) -> SelfTest:
    """Run all cases on the running kernel; takes about 0.2 s, never more than about `seconds`. Raises nothing."""
    deadline = time.monotonic() + seconds
    command = [sys.executable, "-S", str(Path(victim.__file__))]
    try:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as child:
            try:
                cases = tuple(_run(child, deadline))
            finally:
                child.kill()
    except (TrackerUnavailable, OSError) as error:
        return SelfTest(ok=False, reason=str(error), cases=())
    failed = [f"{case.name}: {case.detail}" for case in cases if not case.ok]
    return SelfTest(ok=not failed, reason="; ".join(failed), cases=cases)


def _run(child: "subprocess.Popen[bytes]", deadline: float) -> Iterator[Case]:
    if not child.stdin or not child.stdout:
        raise OSError("the self-test's process has no pipes")
    process = read_process(child.pid)
    if not process:
        raise TrackerUnavailable("the self-test's process did not start")
    made = _read_areas(child.stdout, deadline)
    copy = Copy(process, deadline)
    with copy.tracker:
        copy.round()
        child.stdin.write(b"\n")
        changed = _read_areas(child.stdout, deadline) | _read_areas(child.stdout, deadline)
        _write_from_outside(child.pid, made["by another process"][0][0])
        forked = changed.pop("pid of forked")[0][0]
        ((start, length),) = changed.pop("forked")
        copy.round()
        for name, areas in changed.items():
            yield _judge(name, [page for area in areas for page in copy.stale(*area)])
        stack = next(vma for vma in read_maps(child.pid) if vma.path == "[stack]")
        yield _judge("stack", copy.stale(stack.start, stack.end - stack.start))
        yield _judge_work(copy, made)
        yield from _judge_fork(forked, start, length, deadline)


def _write_from_outside(pid: int, start: int) -> None:
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(start)
        memory.write(b"\xfd" * PAGE)


def _judge(name: str, stale: list[int]) -> Case:
    detail = f"{len(stale)} changed pages were taken for clean" if stale else "every clean page equals its copy"
    return Case(name, not stale, detail)


def _judge_work(copy: Copy, made: dict[str, list[tuple[int, int]]]) -> Case:
    """A tracker that calls everything written is right, and useless: what rested must not come a second time."""
    start, length = made["quiet"][0]
    again = [page for page in range(start, start + length, PAGE) if page in copy.last]
    return Case("rested", not again, f"{len(again)} untouched pages were reported as written")


def _judge_fork(pid: int, start: int, length: int, deadline: float) -> Iterator[Case]:
    """A child has no protection: nothing in it may seem clean before its own tracker has copied it."""
    yield _judge("forked child, untracked", list(clean_pages(pid, start, start + length)))
    process = read_process(pid)
    if not process:
        raise TrackerUnavailable("the self-test's forked process has gone")
    copy = Copy(process, deadline)
    with copy.tracker:
        copy.round()
        yield _judge("forked child", copy.stale(start, length))


def _read_areas(stream: IO[bytes], deadline: float) -> dict[str, list[tuple[int, int]]]:
    ready, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
    line = stream.readline() if ready else b""
    if not line:
        raise TrackerUnavailable("the self-test's process ended or says nothing")
    return {str(name): [(int(a), int(b)) for a, b in areas] for name, areas in json.loads(line).items()}


def main() -> int:
    """Print the cases; exit status 0 when all hold."""
    begun = time.monotonic()
    result = selftest()
    lines = [f"{'ok  ' if case.ok else 'FAIL'} {case.name}: {case.detail}" for case in result.cases]
    verdict = "write tracking works here" if result.ok else f"write tracking cannot be used here: {result.reason}"
    lines.append(f"{verdict} ({(time.monotonic() - begun) * 1000:.0f} ms)")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main())
