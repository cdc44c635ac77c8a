"""Turns CRIU's images with memory left out into images for a lazy restore.

CRIU's page lists say of almost every page "in the parent image", and there is no parent: the bytes are in the
receiver's store. Where CRIU can restore a page lazily its entry becomes PE_LAZY, for the pager to fill; elsewhere it
becomes PE_PRESENT and its bytes are put into the file of pages. Pages that CRIU dumped itself stay as they are.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE
from pathlib import Path
from typing import Protocol

from criu_transfer.errors import StateMissing
from criu_transfer.images import (
    PE_LAZY,
    PE_PARENT,
    PE_PRESENT,
    VMA_AIORING,
    VMA_ANON_PRIVATE,
    VMA_PLUGIN,
    VMA_SHADOW_STACK,
    VMA_UPROBES,
    VMA_VDSO,
    VMA_VSYSCALL,
    VMA_VVAR,
    Entry,
    ImageError,
    ImageVma,
    Pagemap,
    Range,
    joined,
    pagemap_path,
    pages_path,
    process_ids,
    read_pagemap,
    read_vmas,
    write_pagemap,
)
from criu_transfer.ranges import RangeSet

_MAP_LOCKED = 0x2000
_MAP_HUGETLB = 0x40000
_ADVICE_WIPEONFORK = 1 << 18
_NEVER_LAZY = VMA_VSYSCALL | VMA_VDSO | VMA_VVAR | VMA_AIORING | VMA_SHADOW_STACK | VMA_UPROBES | VMA_PLUGIN


class PageSource(Protocol):
    """Bytes of one process's pages: in the file `fd` at offset = virtual address, for what `coverage` holds."""

    @property
    def fd(self) -> int:
        """The file, readable; sparse, where a hole is zeros."""
        ...

    @property
    def coverage(self) -> RangeSet:
        """The addresses whose bytes are there."""
        ...


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes of the new file of pages: out of the old one, or out of the store."""

    from_store: bool
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class _Plan:
    vpid: int
    pagemap: Pagemap
    pieces: list[_Piece]
    lazy: list[Range]


def make_lazy(image_dir: Path, sources: Mapping[int, PageSource]) -> dict[int, list[Range]]:
    """Rewrite the images in `image_dir` for `criu restore --lazy-pages` and return the lazy ranges by process.

    `sources` by the process's pid in its own namespace. The ranges of a process are sorted, and each lies in one
    mapping. Nothing is changed when this raises: StateMissing for a page that CRIU left out and that is in no source,
    ImageError for images that contradict themselves. Writing raises OSError, and then the images are of no use.
    """
    plans = [_plan(image_dir, vpid, sources.get(vpid)) for vpid in process_ids(image_dir)]
    for plan in plans:
        if any(piece.from_store for piece in plan.pieces):
            _write_pages(pages_path(image_dir, plan.pagemap.pages_id), plan.pieces, sources[plan.vpid].fd)
        write_pagemap(pagemap_path(image_dir, plan.vpid), plan.pagemap)
    (image_dir / "parent").unlink(missing_ok=True)
    return {plan.vpid: plan.lazy for plan in plans}


def total_bytes(lazy: Mapping[int, Iterable[Range]]) -> int:
    """Sum the memory that a lazy restore will fill: what the container's limit must have room for.

    Filling gives every process pages of its own. What forked processes shared by copy-on-write on the source is
    counted once for each of them, as it will be on the target.
    """
    return sum(end - start for ranges in lazy.values() for start, end in ranges)


def can_be_lazy(vma: ImageVma) -> bool:
    """Tell whether CRIU registers this mapping with the pager's userfaultfd.

    As CRIU's vma_entry_can_be_lazy (criu/include/vma.h), and narrower: a mapping that the kernel wipes in forked
    children must not be filled there from what the parent lacked.
    """
    wanted = MAP_ANONYMOUS | MAP_PRIVATE
    return (
        vma.flags & (wanted | _MAP_LOCKED | _MAP_HUGETLB) == wanted
        and bool(vma.status & VMA_ANON_PRIVATE)
        and not vma.status & _NEVER_LAZY
        and not vma.advice & _ADVICE_WIPEONFORK
    )


def _plan(image_dir: Path, vpid: int, source: PageSource | None) -> _Plan:
    pagemap = read_pagemap(pagemap_path(image_dir, vpid))
    left_out = joined((at, at + pages * PAGESIZE) for at, pages, flags in pagemap.entries if flags & PE_PARENT)
    _require(left_out, source, vpid)
    # Without a page left out there is nothing to split, and no mapping is needed.
    vmas = read_vmas(image_dir, vpid) if left_out else []
    try:
        entries, pieces, lazy = _split(pagemap.entries, vmas)
    except ImageError as error:
        raise ImageError(f"process {vpid}: {error}") from None
    path = pages_path(image_dir, pagemap.pages_id)
    dumped = sum(piece.length for piece in pieces if not piece.from_store)
    if dumped and (not path.exists() or path.stat().st_size < dumped):
        raise ImageError(f"{path.name} is shorter than the {dumped >> 10} KiB that process {vpid}'s list names")
    return _Plan(vpid, Pagemap(pagemap.pages_id, entries), pieces, lazy)


def _require(wanted: Sequence[Range], source: PageSource | None, vpid: int) -> None:
    held = list(source.coverage) if source else []
    at = 0
    for start, end in wanted:
        while at < len(held) and held[at][1] <= start:
            at += 1
        # RangeSet joins neighbours: a range is covered by one of its ranges or not at all.
        if at == len(held) or not held[at][0] <= start or end > held[at][1]:
            missing = next(RangeSet(held).missing(start, end))[0]
            raise StateMissing(f"process {vpid}: the page at {missing:#x} was neither dumped nor received")


class _Mappings:
    """The mappings by rising address, walked once along with the entries."""

    def __init__(self, vmas: Sequence[ImageVma]) -> None:
        self._left = [(vma.start, vma.end, can_be_lazy(vma)) for vma in reversed(vmas)]
        self._start = self._end = 0
        self._lazy = False

    def cut(self, start: int, end: int) -> list[tuple[int, int, bool]]:
        """Cut [start, end) at the borders of mappings; each part comes with whether it can be lazy."""
        parts = []
        while start < end:
            while self._end <= start:
                if not self._left:
                    raise ImageError(f"the page at {start:#x} is in no mapping")
                self._start, self._end, self._lazy = self._left.pop()
            if start < self._start:
                raise ImageError(f"the page at {start:#x} is in no mapping")
            stop = min(end, self._end)
            parts.append((start, stop, self._lazy))
            start = stop
        return parts


def _split(entries: Sequence[Entry], vmas: Sequence[ImageVma]) -> tuple[list[Entry], list[_Piece], list[Range]]:
    """Split left-out entries at the borders of mappings and sort them into lazy and present ones."""
    result: list[Entry] = []
    pieces: list[_Piece] = []
    lazy: list[Range] = []
    mappings = _Mappings(vmas)
    dumped = 0
    for entry in entries:
        address, pages, flags = entry
        length = pages * PAGESIZE
        # A dump may mark what it wrote as lazy too; CRIU would then wait for the pager to bring it.
        if flags & ~PE_LAZY == PE_PRESENT:
            result.append((address, pages, PE_PRESENT))
            pieces.append(_Piece(False, dumped, length))
            dumped += length
            continue
        if flags != PE_PARENT:
            raise ImageError(f"the entry at {address:#x} is neither left out nor dumped (flags {flags})")
        for start, end, lazily in mappings.cut(address, address + length):
            result.append((start, (end - start) // PAGESIZE, PE_LAZY if lazily else PE_PRESENT))
            if lazily:
                lazy.append((start, end))
            else:
                pieces.append(_Piece(True, start, end - start))
    return result, pieces, lazy


def _write_pages(path: Path, pieces: Sequence[_Piece], store: int) -> None:
    """Put the pieces in order into a new file and move it over the old one; the kernel copies, once."""
    fresh = path.with_suffix(".new")
    with fresh.open("wb") as target:
        old = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for piece in _coalesced(pieces):
                _send(target.fileno(), store if piece.from_store else old, piece.offset, piece.length)
        finally:
            os.close(old)
    fresh.replace(path)


def _coalesced(pieces: Sequence[_Piece]) -> list[_Piece]:
    result: list[_Piece] = []
    for piece in pieces:
        last = result[-1] if result else None
        if last and last.from_store == piece.from_store and last.offset + last.length == piece.offset:
            result[-1] = _Piece(last.from_store, last.offset, last.length + piece.length)
        else:
            result.append(piece)
    return result


def _send(target: int, source: int, offset: int, length: int) -> None:
    while length:
        count = os.sendfile(target, source, offset, length)
        if count == 0:
            raise ImageError(f"a file of pages ended {length} bytes early")
        offset += count
        length -= count
