"""Write tracking by userfaultfd's asynchronous write protection (kernel >= 6.7; arm64 >= 6.10).

A userfaultfd made inside the process by one injected system call, taken out with pidfd_getfd(2) and set to WP_ASYNC,
lets the kernel itself resolve write faults on protected pages; PAGEMAP_SCAN returns and re-protects what was written,
page by page atomically. The process stops once, for about a millisecond; scans stop nothing.

What is tracked is private anonymous memory. Private mappings of files are left to CRIU: a page of theirs that is
written, scanned and then dropped would read as clean. A page never protected reads as written, so memory that is new,
moved by mremap(2) (since 6.12.11), or that lies in a forked child is never taken for clean. DMA escapes write
protection: pre-flight keeps such processes away.

While tracked, huge pages are split at the first write to each, and new ones are not made: detach when not needed.
"""

import contextlib
import errno
import os
import types
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

from criu_transfer import kernel, uffd
from criu_transfer.errors import TrackerUnavailable
from criu_transfer.maps import Vma, read_maps
from criu_transfer.proctree import Process, is_alive
from criu_transfer.ranges import RangeSet
from criu_transfer.tracker import inject

# The kernel holds the process's memory lock during a scan: never more address space than this in one.
SCAN_BYTES = 256 << 20
# How far one look for the next present page may reach over nothing; empty page tables cost it about 1 ns a page.
PROBE_BYTES = 8 << 30

_HUGE_PAGE = 2 << 20
_REGIONS = 16384
_FEATURES = uffd.FEATURE_WP_ASYNC | uffd.FEATURE_WP_UNPOPULATED
_SCAN_FLAGS = kernel.PM_SCAN_WP_MATCHING | kernel.PM_SCAN_CHECK_WPASYNC
_PRESENT = kernel.PAGE_IS_PRESENT | kernel.PAGE_IS_SWAPPED
_REFUSED = {errno.EINVAL, errno.EPERM}


@dataclass(frozen=True)
class _Handles:
    """What attaching gave; closed together."""

    pid: int
    pidfd: int
    uffd: int
    pagemap: int


class ProcessTracker:
    """Tracks one process; a `Tracker`. Not safe for several threads at a time."""

    def __init__(self) -> None:
        self._handles: _Handles | None = None
        self._vector = kernel.region_vector(_REGIONS)
        self._registered: set[tuple[int, int]] = set()
        self._excluded = kernel.PAGE_IS_FILE | kernel.PAGE_IS_PFNZERO
        self.tracked: RangeSet = RangeSet()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.detach()

    # --- attaching

    def attach(self, process: Process, deadline: float) -> None:
        """Start tracking a process; it stops for about a millisecond.

        Raises TrackerUnavailable: the kernel cannot do it, or the process cannot be stopped now (a thread in D state,
        or waiting for its vfork child: trying again later may succeed). It then runs as before.
        """
        if self._handles:
            raise ValueError("already attached")
        with contextlib.ExitStack() as opened:
            try:
                pidfd = os.pidfd_open(process.pid)
                opened.callback(os.close, pidfd)
                if not is_alive(process):
                    raise TrackerUnavailable(f"process {process.pid} is gone")
                taken, pagemap = inject.run(process.pid, deadline, lambda group: _take(group, pidfd))
                opened.callback(os.close, taken)
                opened.callback(os.close, pagemap)
                uffd.api(taken, _FEATURES)
                self._excluded |= _guard_category(pagemap)
            except OSError as error:
                raise TrackerUnavailable(f"writes of process {process.pid} cannot be tracked: {error}") from error
            opened.pop_all()
        self._handles = _Handles(process.pid, pidfd, taken, pagemap)

    def detach(self) -> None:
        """Stop tracking: the kernel drops all protection as the descriptor closes. Harmless when repeated."""
        handles, self._handles = self._handles, None
        self.tracked = RangeSet()
        self._registered.clear()
        if handles:
            for fd in (handles.uffd, handles.pagemap, handles.pidfd):
                os.close(fd)

    # --- scanning

    def scan(self, *, frozen: bool = False) -> list[tuple[int, int]]:
        """Return the ranges of tracked memory that are present and were written since the last scan; protect them.

        Mappings made meanwhile are registered first and reported whole. Ranges are sorted and disjoint. `frozen`
        makes no difference here. Raises TrackerUnavailable when the process has exited or runs another program now:
        the tracker is of no use any more.
        """
        del frozen
        handles = self._attached()
        self.tracked = RangeSet()
        vmas = self._register_all(handles)
        written: list[tuple[int, int]] = []
        try:
            for vma in vmas:
                for start, end in self._populated(handles, vma.start, vma.end):
                    written += self._scan_piece(handles, vma, start, end)
        except OSError as error:
            raise TrackerUnavailable(f"memory of process {handles.pid} cannot be scanned: {error}") from error
        return in_order(written)

    def pending(self) -> int:
        """Count the bytes that the next scan would return as of now, of mappings that are known; protects nothing.

        Raises TrackerUnavailable as `scan` does.
        """
        handles = self._attached()
        try:
            pieces = (piece for vma in self.tracked for piece in self._populated(handles, *vma))
            written = (self._walk(handles, *piece, 0, kernel.PAGE_IS_WRITTEN) for piece in pieces)
            return sum(end - start for ranges in written for start, end in ranges)
        except OSError as error:
            raise TrackerUnavailable(f"memory of process {handles.pid} cannot be scanned: {error}") from error

    def _attached(self) -> _Handles:
        if not self._handles:
            raise TrackerUnavailable("not attached")
        return self._handles

    def _register_all(self, handles: _Handles) -> list[Vma]:
        """Register every mapping that is new; returns those that are tracked now."""
        try:
            vmas = [vma for vma in read_maps(handles.pid) if vma.anonymous]
        except (FileNotFoundError, ProcessLookupError) as error:
            raise TrackerUnavailable(f"process {handles.pid} is gone") from error
        known, self._registered = self._registered, set()
        tracked: list[Vma] = []
        for vma in vmas:
            span = (vma.start, vma.end)
            # The first is registered each time, which changes nothing, to see that this is still the same memory.
            if (span in known and tracked) or self._register(handles, *span):
                self._registered.add(span)
                self.tracked.add(*span)
                tracked.append(vma)
        if not tracked:
            raise TrackerUnavailable(f"process {handles.pid} has no memory that can be tracked")
        return tracked

    def _register(self, handles: _Handles, start: int, end: int) -> bool:
        """Register one mapping; False when the kernel refuses it, or when it has gone meanwhile."""
        try:
            uffd.register(handles.uffd, start, end - start, uffd.MODE_WP)
        except OSError as error:
            if error.errno in _REFUSED:
                return False
            raise TrackerUnavailable(f"memory of process {handles.pid} cannot be tracked: {error}") from error
        return True

    def _populated(self, handles: _Handles, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Cut a mapping into pieces to scan, leaping over what has no page: reservations may be terabytes.

        Cuts lie on huge page borders, for a huge page protected in part would be split.
        """
        while start < end:
            if end - start > SCAN_BYTES:
                reach = min(end, start + PROBE_BYTES)
                found, _ = kernel.pagemap_scan(
                    handles.pagemap, start, reach, self._vector, anyof=_PRESENT, return_mask=_PRESENT, max_pages=1
                )
                if not found:
                    start = reach
                    continue
                start = max(start, self._vector[0] & -_HUGE_PAGE)
            stop = min(end, (start + SCAN_BYTES) & -_HUGE_PAGE)
            yield start, stop
            start = stop

    def _scan_piece(self, handles: _Handles, vma: Vma, start: int, end: int) -> list[tuple[int, int]]:
        """Scan and protect one piece of a mapping; raises OSError when not even looking at it works."""
        with contextlib.suppress(OSError):
            return self._walk(handles, start, end, _SCAN_FLAGS, kernel.PAGE_IS_WRITTEN)
        # Another mapping came into its place. What lies before that one may be protected already and was not reported:
        # all that is there counts as written.
        if self._register(handles, vma.start, vma.end):
            with contextlib.suppress(OSError):
                return self._walk(handles, start, end, _SCAN_FLAGS)
        # It changes faster than we look. Without protection, pages go on reading as written: nothing is lost.
        self._registered.discard((vma.start, vma.end))
        self.tracked.discard(vma.start, vma.end)
        return self._walk(handles, start, end, 0)

    def _walk(self, handles: _Handles, start: int, end: int, flags: int, category: int = 0) -> list[tuple[int, int]]:
        """Return the present pages of [start, end) that are anonymous and have `category`, as ranges."""
        ranges: list[tuple[int, int]] = []
        vector = self._vector
        while start < end:
            found, start = kernel.pagemap_scan(
                handles.pagemap,
                start,
                end,
                vector,
                flags=flags,
                inverted=self._excluded,
                mask=self._excluded | category,
                anyof=_PRESENT,
                return_mask=kernel.PAGE_IS_WPALLOWED,
            )
            ranges.extend(zip(vector[0 : 3 * found : 3], vector[1 : 3 * found : 3], strict=True))
        return ranges


def in_order(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the ranges sorted and disjoint, as they nearly always are.

    A process that changes its mappings while it is scanned (a JVM that grows its heap was seen to) may have the same
    pages reported twice: they are written all the same.
    """
    if all(here[1] <= there[0] for here, there in pairwise(ranges)):
        return ranges
    return list(RangeSet(ranges))


def _take(group: inject.StoppedGroup, pidfd: int) -> tuple[int, int]:
    """Make a userfaultfd in a stopped process and take it out; returns it, and the process's pagemap opened.

    The process is left without a trace of it. UFFD_USER_MODE_ONLY is what an unprivileged process may have; writes by
    the kernel on its behalf are tracked all the same.
    """
    with contextlib.ExitStack() as opened:
        number = group.call(group.layout.userfaultfd, os.O_CLOEXEC | os.O_NONBLOCK | uffd.USER_MODE_ONLY)
        try:
            taken = kernel.pidfd_getfd(pidfd, number)
            opened.callback(os.close, taken)
        finally:
            group.call(group.layout.close, number)
        # Now, for it stays with the memory that the process has at this moment.
        pagemap = os.open(f"/proc/{group.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        opened.pop_all()
    return taken, pagemap


def _guard_category(pagemap: int) -> int:
    """Return the category of guard pages (MADV_GUARD_INSTALL) where the kernel knows it, else 0."""
    try:
        guard = kernel.PAGE_IS_GUARD
        kernel.pagemap_scan(pagemap, 0, kernel.PAGE_SIZE, kernel.region_vector(1), mask=guard, return_mask=guard)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return 0
    return kernel.PAGE_IS_GUARD
