"""Rewriting CRIU's images for a lazy restore."""

import os
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criu_transfer.errors import StateMissing
from criu_transfer.images import (
    PE_LAZY,
    PE_PARENT,
    PE_PRESENT,
    VMA_ANON_PRIVATE,
    VMA_GUARD,
    VMA_REGULAR,
    VMA_VDSO,
    Entry,
    ImageError,
    ImageVma,
    Pagemap,
    pagemap_path,
    pages_path,
    read_pagemap,
    write_pagemap,
)
from criu_transfer.ranges import RangeSet
from criu_transfer.rewrite import can_be_lazy, make_lazy, total_bytes

PAGE = 4096
ANON = VMA_REGULAR | VMA_ANON_PRIVATE
PRIVATE_ANON = 0x22


@dataclass
class Source:
    """A page source whose pages can be recognised."""

    fd: int = field(default_factory=lambda: os.memfd_create("source"))
    coverage: RangeSet = field(default_factory=RangeSet)

    def put(self, start: int, pages: int) -> None:
        for page in range(start // PAGE, start // PAGE + pages):
            os.pwrite(self.fd, stored(page), page * PAGE)
        self.coverage.add(start, start + pages * PAGE)

    def __del__(self) -> None:
        os.close(self.fd)


def stored(page: int) -> bytes:
    return b"store%11d" % page * 256


def dumped(page: int) -> bytes:
    return b"dump.%11d" % page * 256


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def write_mm(directory: Path, vpid: int, vmas: list[tuple[int, int, int, int]]) -> None:
    """Write the mappings: start, end, flags, status."""
    body = b""
    for start, end, flags, status in vmas:
        fields = {1: start, 2: end, 3: 0, 4: 0, 5: 3, 6: flags, 7: status}
        message = b"".join(varint(number << 3) + varint(value) for number, value in fields.items())
        body += varint(14 << 3 | 2) + varint(len(message)) + message
    raw = bytes.fromhex("1943565420284957") + len(body).to_bytes(4, "little") + body
    (directory / f"mm-{vpid}.img").write_bytes(raw)


def write_images(directory: Path, vpid: int, entries: list[Entry], vmas: list[tuple[int, int, int, int]]) -> None:
    write_pagemap(pagemap_path(directory, vpid), Pagemap(vpid, entries))
    pages = [n for at, count, flags in entries if flags & PE_PRESENT for n in range(at // PAGE, at // PAGE + count)]
    pages_path(directory, vpid).write_bytes(b"".join(dumped(page) for page in pages))
    write_mm(directory, vpid, vmas)


def test_pages_left_out_become_lazy_or_are_put_in(tmp_path: Path) -> None:
    (tmp_path / "parent").symlink_to("../pre")
    entries = [
        (0x10000, 4, PE_PARENT),  # the file mapping and, touching it, the anonymous one
        (0x14000, 1, PE_PRESENT | PE_LAZY),
        (0x15000, 3, PE_PARENT),  # two anonymous mappings
        (0x30000, 2, PE_PARENT),  # the vdso
        (0x32000, 1, PE_PRESENT),
    ]
    vmas = [
        (0x10000, 0x12000, 2, VMA_REGULAR | 1 << 6),
        (0x12000, 0x16000, PRIVATE_ANON, ANON),
        (0x16000, 0x18000, PRIVATE_ANON, ANON),
        (0x30000, 0x32000, PRIVATE_ANON, ANON | VMA_VDSO),
        (0x32000, 0x33000, PRIVATE_ANON, ANON),
        (0x17000, 0x18000, PRIVATE_ANON, VMA_GUARD),
    ]
    write_images(tmp_path, 7, entries, vmas)
    source = Source()
    source.put(0x10000, 8)
    source.put(0x30000, 2)

    lazy = make_lazy(tmp_path, {7: source})

    assert lazy == {7: [(0x12000, 0x14000), (0x15000, 0x16000), (0x16000, 0x18000)]}
    assert total_bytes(lazy) == 5 * PAGE
    assert read_pagemap(pagemap_path(tmp_path, 7)).entries == [
        (0x10000, 2, PE_PRESENT),
        (0x12000, 2, PE_LAZY),
        (0x14000, 1, PE_PRESENT),
        (0x15000, 1, PE_LAZY),
        (0x16000, 2, PE_LAZY),
        (0x30000, 2, PE_PRESENT),
        (0x32000, 1, PE_PRESENT),
    ]
    expected = [stored(0x10), stored(0x11), dumped(0x14), stored(0x30), stored(0x31), dumped(0x32)]
    assert pages_path(tmp_path, 7).read_bytes() == b"".join(expected)
    assert not (tmp_path / "parent").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mm-7.img", "pagemap-7.img", "pages-7.img"]


def test_a_process_without_pages_left_out_needs_no_source(tmp_path: Path) -> None:
    write_images(tmp_path, 3, [(0x10000, 2, PE_PRESENT)], [])
    before = pages_path(tmp_path, 3).read_bytes()
    assert make_lazy(tmp_path, {}) == {3: []}
    assert pages_path(tmp_path, 3).read_bytes() == before


def test_a_page_that_never_came_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    vmas = [(0x10000, 0x20000, PRIVATE_ANON, ANON)]
    for vpid in (1, 2):
        write_images(tmp_path, vpid, [(0x10000, 16, PE_PARENT)], vmas)
    whole, holed = Source(), Source()
    whole.put(0x10000, 16)
    holed.put(0x10000, 5)
    holed.put(0x16000, 10)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(StateMissing, match="process 2: the page at 0x15000"):
        make_lazy(tmp_path, {1: whole, 2: holed})
    with pytest.raises(StateMissing, match="process 2: the page at 0x10000"):
        make_lazy(tmp_path, {1: whole})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("entries", "vmas", "message"),
    [
        ([(0x10000, 2, PE_PARENT)], [(0x10000, 0x11000, 0x22, ANON)], "0x11000 is in no mapping"),
        ([(0x10000, 1, PE_PARENT)], [(0x20000, 0x21000, 0x22, ANON)], "0x10000 is in no mapping"),
        ([(0x10000, 1, PE_PARENT | PE_PRESENT)], [(0x10000, 0x11000, 0x22, ANON)], "neither left out nor dumped"),
        ([(0x10000, 1, PE_LAZY)], [(0x10000, 0x11000, 0x22, ANON)], "neither left out nor dumped"),
    ],
)
def test_images_that_contradict_themselves_are_refused(
    tmp_path: Path, entries: list[Entry], vmas: list[tuple[int, int, int, int]], message: str
) -> None:
    write_images(tmp_path, 1, entries, vmas)
    source = Source()
    source.put(0x10000, 4)
    with pytest.raises(ImageError, match=message):
        make_lazy(tmp_path, {1: source})


def test_a_short_file_of_pages_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path, 1, [(0x10000, 2, PE_PRESENT)], [])
    os.truncate(pages_path(tmp_path, 1), PAGE)
    with pytest.raises(ImageError, match=r"pages-1\.img is shorter than the 8 KiB"):
        make_lazy(tmp_path, {})


@pytest.mark.parametrize(
    ("flags", "status", "advice", "lazy"),
    [
        (0x22, ANON, 0, True),
        (0x122, ANON, 1 << 10, True),  # a stack; MADV_DONTFORK
        (0x21, VMA_REGULAR, 0, False),  # shared
        (0x02, VMA_REGULAR | 1 << 6, 0, False),  # a private file mapping
        (0x2022, ANON, 0, False),  # locked
        (0x40022, ANON, 0, False),  # huge pages of hugetlbfs
        (0x22, ANON | VMA_VDSO, 0, False),
        (0x22, ANON | 1 << 12, 0, False),  # vvar
        (0x22, ANON | 1 << 2, 0, False),  # vsyscall
        (0x22, ANON, 1 << 18, False),  # MADV_WIPEONFORK
    ],
)
def test_only_private_anonymous_memory_is_lazy(flags: int, status: int, advice: int, lazy: bool) -> None:
    assert can_be_lazy(ImageVma(0x1000, 0x2000, 3, flags, status, advice)) is lazy


@st.composite
def process(draw: st.DrawFn) -> tuple[list[Entry], list[tuple[int, int, int, int]]]:
    """Mappings side by side or apart, and entries that may reach across their borders."""
    vmas, entries = [], []
    at = 16
    for gap, size, flags, pattern in draw(
        st.lists(
            st.tuples(
                st.integers(0, 2),
                st.integers(1, 6),
                st.sampled_from([0x22, 0x02, 0x2022]),
                st.lists(st.sampled_from([0, PE_PARENT, PE_PRESENT]), min_size=6, max_size=6),
            ),
            max_size=6,
        )
    ):
        at += gap
        vmas.append((at * PAGE, (at + size) * PAGE, flags, ANON if flags & 0x20 else VMA_REGULAR))
        for page, flag in zip(range(at, at + size), pattern, strict=False):
            if entries and flag and entries[-1][2] == flag and entries[-1][0] // PAGE + entries[-1][1] == page:
                entries[-1] = (entries[-1][0], entries[-1][1] + 1, flag)
            elif flag:
                entries.append((page * PAGE, 1, flag))
        at += size
    return entries, vmas


@given(process())
def test_each_page_is_afterwards_lazy_or_in_the_file_with_its_own_bytes(
    tmp_path_factory: pytest.TempPathFactory, made: tuple[list[Entry], list[tuple[int, int, int, int]]]
) -> None:
    entries, vmas = made
    directory = tmp_path_factory.mktemp("images")
    write_images(directory, 1, entries, vmas)
    source = Source()
    kinds = {}
    for at, pages, flags in entries:
        for page in range(at // PAGE, at // PAGE + pages):
            kinds[page] = flags
            if flags == PE_PARENT:
                source.put(page * PAGE, 1)

    lazy = make_lazy(directory, {1: source})[1]

    content = pages_path(directory, 1).read_bytes()
    seen = {}
    for at, pages, flags in read_pagemap(pagemap_path(directory, 1)).entries:
        assert any(start <= at and at + pages * PAGE <= end for start, end, _, _ in vmas) or flags == PE_PRESENT
        for page in range(at // PAGE, at // PAGE + pages):
            if flags == PE_LAZY:
                assert any(start <= page * PAGE < end and kind == 0x22 for start, end, kind, _ in vmas)
                seen[page] = PE_PARENT
            else:
                assert flags == PE_PRESENT
                assert content[:PAGE] == (stored(page) if kinds[page] == PE_PARENT else dumped(page))
                content = content[PAGE:]
                seen[page] = kinds[page]
    assert seen == kinds
    assert content == b""
    assert sum(end - start for start, end in lazy) == total_bytes({1: lazy})


def test_forty_thousand_entries_take_a_fraction_of_the_freeze(tmp_path: Path) -> None:
    dice = random.Random(2)
    at, entries = 0x7F0000000000, []
    source = Source()
    for _ in range(40_000):
        at += PAGE * dice.randint(1, 9)
        pages = dice.choice([1, 1, 1, 2, 40])
        entries.append((at, pages, PE_PARENT))
        source.coverage.add(at, at + pages * PAGE)
        at += pages * PAGE
    vmas = [(start, start + (1 << 24), PRIVATE_ANON, ANON) for start in range(0x7F0000000000, at, 1 << 24)]
    write_images(tmp_path, 1, entries, vmas)
    start = time.process_time()
    lazy = make_lazy(tmp_path, {1: source})
    took = time.process_time() - start
    assert total_bytes(lazy) == sum(pages * PAGE for _, pages, _ in entries)
    assert took < 0.4, f"{took * 1e3:.0f} ms; about 70 ms on an idle core"
