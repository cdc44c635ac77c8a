"""The codec of CRIU's memory images: round trips, garbage, and pycriu as the second opinion."""

import contextlib
import io
import random
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criu_transfer.images import (
    PE_LAZY,
    PE_PARENT,
    PE_PRESENT,
    Entry,
    ImageError,
    Pagemap,
    decode_pagemap,
    encode_pagemap,
    joined,
    pagemap_path,
    parent_pages,
    process_ids,
    read_pagemap,
    read_vmas,
    write_pagemap,
    write_parent,
)

PAGE = 4096


@st.composite
def pagemaps(draw: st.DrawFn) -> Pagemap:
    """Sorted entries with gaps of every size, so that addresses take 1 to 10 bytes."""
    entries: list[Entry] = []
    at = 0
    for gap, pages, flags in draw(
        st.lists(
            st.tuples(st.one_of(st.integers(0, 3), st.integers(0, 1 << 48)), st.integers(1, 1 << 40), st.integers(0, 7))
        )
    ):
        at += gap * PAGE
        if at + pages * PAGE > 1 << 64:
            break
        entries.append((at, pages, flags))
        at += pages * PAGE
    return Pagemap(draw(st.integers(0, (1 << 32) - 1)), entries)


@given(pagemaps())
def test_a_pagemap_survives_encoding_and_decoding(pagemap: Pagemap) -> None:
    assert decode_pagemap(encode_pagemap(pagemap)) == pagemap


@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused(data: bytes) -> None:
    with contextlib.suppress(ImageError):
        decode_pagemap(data)


@given(pagemaps(), st.data())
def test_damaged_pagemaps_are_decoded_or_refused_and_never_out_of_order(pagemap: Pagemap, data: st.DataObject) -> None:
    raw = bytearray(encode_pagemap(pagemap))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    for damaged in (bytes(raw), bytes(raw[:cut])):
        try:
            entries = decode_pagemap(damaged).entries
        except ImageError:
            continue
        last = 0
        for address, pages, _ in entries:
            assert address >= last
            assert pages > 0
            last = address + pages * PAGE


@given(st.binary(max_size=300))
def test_any_mappings_image_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    directory = tmp_path_factory.getbasetemp()
    (directory / "mm-7.img").write_bytes(bytes.fromhex("1943565420284957") + data)
    try:
        vmas = read_vmas(directory, 7)
    except ImageError:
        return
    assert all(vma.start < vma.end for vma in vmas)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([(0x1001, 1, PE_PRESENT)], "0x1001"),
        ([(0x2000, 1, PE_PRESENT), (0x1000, 1, PE_PRESENT)], "0x1000"),
        ([(0x1000, 2, PE_PRESENT), (0x2000, 1, PE_PRESENT)], "0x2000"),
        ([(0x1000, 0, PE_PRESENT)], "0 pages"),
        ([((1 << 64) - PAGE, 2, PE_PRESENT)], "beyond"),
        ([(0x1000, 1, 8)], "flags 8"),
    ],
)
def test_impossible_entries_are_refused_by_name(entries: list[Entry], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        decode_pagemap(encode_pagemap(Pagemap(1, entries)))


def test_old_entries_are_understood_as_criu_understands_them() -> None:
    def framed(message: bytes) -> bytes:
        return len(message).to_bytes(4, "little") + message

    head = framed(b"\x08\x05")
    in_parent = framed(b"\x08\x80\x20\x10\x03\x18\x01")
    plain = framed(b"\x08\x80\x80\x01\x10\x02")
    both = framed(b"\x08\x80\x80\x02\x10\x09\x20\x02\x28\x04")
    assert decode_pagemap(head + in_parent + plain + both) == Pagemap(
        5, [(0x1000, 3, PE_PARENT), (0x4000, 2, PE_PRESENT), (0x8000, 4, PE_LAZY)]
    )


def test_the_fast_reader_does_not_trust_a_wrong_length() -> None:
    raw = bytearray(encode_pagemap(Pagemap(1, [(0x7F0000000000, 1, 1), (0x7F0000002000, 1, 1)])))
    raw[6] += 1
    with pytest.raises(ImageError):
        decode_pagemap(bytes(raw))


def test_a_missing_or_foreign_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"pagemap-3\.img: No such file"):
        read_pagemap(pagemap_path(tmp_path, 3))
    (tmp_path / "mm-3.img").write_bytes(b"\x7fELF....")
    with pytest.raises(ImageError, match=r"mm-3\.img is no image of its kind: it starts with 7f454c46"):
        read_vmas(tmp_path, 3)


def test_pages_in_the_parent_are_listed_by_process(tmp_path: Path) -> None:
    write_pagemap(
        pagemap_path(tmp_path, 1),
        Pagemap(1, [(0x1000, 2, PE_PARENT), (0x3000, 1, PE_PARENT), (0x4000, 1, PE_PRESENT), (0x5000, 1, PE_PARENT)]),
    )
    write_pagemap(pagemap_path(tmp_path, 12), Pagemap(2, [(0x1000, 2, PE_PRESENT)]))
    (tmp_path / "pagemap-shmem-4.img").write_bytes(b"not ours")
    assert process_ids(tmp_path) == [1, 12]
    assert parent_pages(tmp_path) == {1: [(0x1000, 0x4000), (0x5000, 0x6000)], 12: []}


def test_ranges_are_joined_only_where_they_touch() -> None:
    assert joined([]) == []
    assert joined([(0, 1), (1, 3), (4, 5)]) == [(0, 3), (4, 5)]


def test_pycriu_reads_what_is_written(tmp_path: Path) -> None:
    images = pytest.importorskip("pycriu.images")
    vmas = [(0x400000, 0x402000), (0x7FFF00000000, 0x7FFF00100000)]
    write_parent(tmp_path, [(1, vmas), (31, vmas[1:])], uptime_us=123_456_789)
    with (tmp_path / "inventory.img").open("rb") as file:
        entry = images.load(file)["entries"][0]
    assert (entry["img_version"], entry["fdinfo_per_id"], entry["ns_per_id"]) == (2, True, True)
    assert entry["dump_uptime"] == 123_456_789
    with pagemap_path(tmp_path, 1).open("rb") as file:
        head, *entries = images.load(file)["entries"]
    assert head == {"pages_id": 1}
    assert [(entry["vaddr"], entry["nr_pages"], entry["flags"]) for entry in entries] == [
        (0x400000, 2, PE_PRESENT),
        (0x7FFF00000000, 256, PE_PRESENT),
    ]
    with pagemap_path(tmp_path, 31).open("rb") as file:
        assert images.load(file)["entries"][0] == {"pages_id": 2}
    assert (tmp_path / "pages-2.img").read_bytes() == b""


def test_what_pycriu_writes_is_read(tmp_path: Path) -> None:
    images = pytest.importorskip("pycriu.images")
    vma = {"pgoff": 0, "shmid": 0, "prot": 3, "flags": 0x22, "fd": -1}
    mm = dict.fromkeys(("mm_start_code", "mm_end_code", "mm_start_data", "mm_end_data", "mm_start_stack"), 0)
    mm |= dict.fromkeys(("mm_start_brk", "mm_brk", "mm_arg_start", "mm_arg_end", "mm_env_start", "mm_env_end"), 0)
    mm |= {"exe_file_id": 1, "mm_saved_auxv": [1, 2, 3]}
    mm["vmas"] = [
        vma | {"start": 0x1000, "end": 0x3000, "status": 0x201, "madv": 1 << 18},
        vma | {"start": 0x7FFF00000000, "end": 0x7FFF00001000, "status": 0x201},
        vma | {"start": 0x1000, "end": 0x2000, "status": 1 << 16},
    ]
    with (tmp_path / "mm-5.img").open("wb") as file:
        images.dump({"magic": "MM", "entries": [mm]}, file)
    first, second = read_vmas(tmp_path, 5)
    assert (first.start, first.end, first.prot, first.flags, first.status, first.advice) == (
        0x1000,
        0x3000,
        3,
        0x22,
        0x201,
        1 << 18,
    )
    assert (second.start, second.advice) == (0x7FFF00000000, 0)
    buffer = io.BytesIO()
    entries = [
        {"vaddr": 0x7F0000000000 + i * 0x3000, "compat_nr_pages": 0, "flags": 4, "nr_pages": 1} for i in range(9)
    ]
    images.dump({"magic": "PAGEMAP", "entries": [{"pages_id": 6}, *entries]}, buffer)
    assert decode_pagemap(buffer.getvalue()[8:]) == Pagemap(6, [(0x7F0000000000 + i * 0x3000, 1, 4) for i in range(9)])


def test_forty_thousand_entries_take_a_fraction_of_the_freeze() -> None:
    dice = random.Random(1)
    at, entries = 0x400000, []
    for _ in range(40_000):
        at += PAGE * dice.randint(1, 9)
        pages = dice.choice([1, 1, 1, 2, 40, 300])
        entries.append((at, pages, dice.choice([PE_PARENT, PE_PRESENT])))
        at += pages * PAGE
    pagemap = Pagemap(1, entries)
    best = min(_seconds(pagemap) for _ in range(3))
    assert best < 0.2, f"{best * 1e3:.0f} ms; about 45 ms on an idle core"


def _seconds(pagemap: Pagemap) -> float:
    start = time.process_time()
    assert decode_pagemap(encode_pagemap(pagemap)) == pagemap
    return time.process_time() - start
