"""CRIU's memory images: the list of pages (pagemap), the mappings (mm), and a synthetic parent image.

An image starts with two magic numbers, u32 little-endian each: 0x54564319 and one that names the kind. Then come
messages, each a u32 length and a protobuf encoding (CRIU's images/pagemap.proto, mm.proto, vma.proto, inventory.proto).
A pagemap is one pagemap_head {pages_id = 1} and then, by rising address, one pagemap_entry per run of pages:
    vaddr = 1, compat_nr_pages = 2 (u32, old images), in_parent = 3 (old images), flags = 4 (PE_*), nr_pages = 5
The bytes of its PE_PRESENT entries lie in `pages-PAGES_ID.img`, in this order, without gaps.

Everything here is read and written while an application stands still, so it is parsed by hand: importing pycriu alone
costs 100 ms, and its parser takes a second for 40,000 entries. These images come from another machine: whatever the
bytes are, only ImageError is raised.
"""

import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from mmap import PAGESIZE
from pathlib import Path

from criu_transfer.errors import GiveUp

PE_PARENT = 1
PE_LAZY = 2
PE_PRESENT = 4

# vma_entry.status, CRIU's criu/include/image.h.
VMA_REGULAR = 1 << 0
VMA_VSYSCALL = 1 << 2
VMA_VDSO = 1 << 3
VMA_ANON_PRIVATE = 1 << 9
VMA_VVAR = 1 << 12
VMA_AIORING = 1 << 13
VMA_SHADOW_STACK = 1 << 15
VMA_GUARD = 1 << 16
VMA_UPROBES = 1 << 17
VMA_PLUGIN = 1 << 27

FILLED = "spotguard-filled"  # appears beside the images when no page is missing any more: for an agent that restarts
_MAGIC = struct.Struct("<II")
_LENGTH = struct.Struct("<I")
_COMMON = 0x54564319
_INVENTORY = 0x58313116
_PAGEMAP = 0x56084025
_MM = 0x57492820
_TOP = 1 << 64

type Range = tuple[int, int]
type Entry = tuple[int, int, int]
"""Address, number of pages, PE_* flags."""


class ImageError(GiveUp):
    """An image is missing, damaged, or says what cannot be."""


@dataclass(frozen=True, slots=True)
class Pagemap:
    """The pages of one process: entries by rising address that do not overlap; `pages_id` names their bytes' file."""

    pages_id: int
    entries: list[Entry]


@dataclass(frozen=True, slots=True)
class ImageVma:
    """One mapping: [start, end), PROT_*, MAP_*, VMA_*, and a mask with bit n set for madvise(2) advice n."""

    start: int
    end: int
    prot: int
    flags: int
    status: int
    advice: int


def pagemap_path(directory: Path, vpid: int) -> Path:
    """Name the list of pages of the process with this pid in its own pid namespace."""
    return directory / f"pagemap-{vpid}.img"


def pages_path(directory: Path, pages_id: int) -> Path:
    """Name the file with the bytes of a list of pages."""
    return directory / f"pages-{pages_id}.img"


def process_ids(directory: Path) -> list[int]:
    """List the processes that have a list of pages here, by pid in their own namespace."""
    names = (re.fullmatch(r"pagemap-([1-9][0-9]{0,9})\.img", path.name) for path in directory.iterdir())
    return sorted(int(name[1]) for name in names if name)


def read_pagemap(path: Path) -> Pagemap:
    """Read a list of pages. Raises ImageError."""
    data = _read(path, _PAGEMAP)
    try:
        return decode_pagemap(data)
    except ImageError as error:
        raise ImageError(f"{path.name}: {error}") from None


def write_pagemap(path: Path, pagemap: Pagemap) -> None:
    """Write a list of pages. Raises OSError."""
    path.write_bytes(_MAGIC.pack(_COMMON, _PAGEMAP) + encode_pagemap(pagemap))


def read_vmas(directory: Path, vpid: int) -> list[ImageVma]:
    """Read a process's mappings, by rising address, without CRIU's made-up entries for guard pages.

    Raises ImageError.
    """
    path = directory / f"mm-{vpid}.img"
    data = _read(path, _MM)
    try:
        message = next(_messages(data), b"")
        vmas = [_decode_vma(value) for number, value in _fields(message) if number == 14 and isinstance(value, bytes)]
        vmas = [vma for vma in vmas if not vma.status & VMA_GUARD]
        _check_order((vma.start, vma.end) for vma in vmas)
    except ImageError as error:
        raise ImageError(f"{path.name}: {error}") from None
    return vmas


def parent_pages(directory: Path) -> dict[int, list[Range]]:
    """List, by process, the memory that CRIU left to the parent image: joined ranges by rising address.

    This is what must be in the target's store before anything may be resumed. Raises ImageError.
    """
    found = {}
    for vpid in process_ids(directory):
        pagemap = read_pagemap(pagemap_path(directory, vpid))
        found[vpid] = joined((at, at + pages * PAGESIZE) for at, pages, flags in pagemap.entries if flags & PE_PARENT)
    return found


def joined(ranges: Iterable[Range]) -> list[Range]:
    """Join neighbours of sorted, disjoint ranges."""
    result: list[Range] = []
    here = there = -1
    for start, end in ranges:
        if start != there:
            if here >= 0:
                result.append((here, there))
            here = start
        there = end
    if here >= 0:
        result.append((here, there))
    return result


def write_parent(directory: Path, processes: Sequence[tuple[int, Sequence[Range]]], uptime_us: int) -> None:
    """Write a parent image that claims every page of the given private mappings, by process.

    CRIU then leaves out each page that is not marked as written. It needs every private mapping here, [vdso] too (whose
    bytes then have to be in the store), but not [vvar] and [vsyscall]. `uptime_us` is microseconds of CLOCK_BOOTTIME
    after the start of the youngest process: an older one makes CRIU suspect a reused pid and dump everything.
    Raises OSError.
    """
    directory.mkdir(parents=True, exist_ok=True)
    inventory = _encode({1: 2, 2: 1, 4: 1, 8: uptime_us})  # img_version, fdinfo_per_id, ns_per_id, dump_uptime
    # The inventory alone carries no common magic before its own (criu/image.c, img_check_magic).
    (directory / "inventory.img").write_bytes(struct.pack("<I", _INVENTORY) + _framed(inventory))
    for pages_id, (vpid, vmas) in enumerate(processes, start=1):
        entries = [(start, (end - start) // PAGESIZE, PE_PRESENT) for start, end in sorted(vmas)]
        write_pagemap(pagemap_path(directory, vpid), Pagemap(pages_id, entries))
        pages_path(directory, pages_id).write_bytes(b"")


def decode_pagemap(data: bytes) -> Pagemap:
    """Decode the messages of a list of pages, magic numbers left out. Raises ImageError."""
    head = next(_messages(data), None)
    if head is None:
        raise ImageError("no head")
    pages_id = dict(_fields(head)).get(1)
    if not isinstance(pages_id, int) or pages_id >= 1 << 32:
        raise ImageError("the head names no file of pages")
    body = data[4 + len(head) :]
    entries = _fast_entries(body)
    if entries is None:
        entries = [_decode_entry(message) for message in _messages(body)]
    last = 0
    for address, pages, flags in entries:
        if address < last or address % PAGESIZE or not pages or flags > 7:
            raise ImageError(f"impossible entry: address {address:#x}, {pages} pages, flags {flags}")
        last = address + pages * PAGESIZE
    if last > _TOP:
        raise ImageError("the last entry ends beyond the address space")
    return Pagemap(pages_id, entries)


def encode_pagemap(pagemap: Pagemap) -> bytes:
    """Encode a list of pages, magic numbers left out."""
    parts = [_framed(_encode({1: pagemap.pages_id}))]
    pairs, varints = _PAIR_BYTES, _Encoded()
    for address, pages, flags in pagemap.entries:
        if address >> 28:
            vaddr = pairs[address & 0x3FFF] + pairs[address >> 14 & 0x3FFF] + varints[address >> 28]
        else:
            vaddr = varints[address]
        message = b"\x08%b\x10\x00\x20%c\x28%b" % (vaddr, flags, varints[pages])
        parts.append(b"%c\x00\x00\x00%b" % (len(message), message))
    return b"".join(parts)


# The varint of an address above 2**28 starts with four bytes that all continue: two pairs of 14 bits, looked up here.
_PAIR_BYTES = [bytes([low | 0x80, high | 0x80]) for high in range(128) for low in range(128)]
_PAIRS = {pair: value for value, pair in enumerate(_PAIR_BYTES)}
_UPPER_PAIRS = {pair: value << 14 for value, pair in enumerate(_PAIR_BYTES)}
# An entry as CRIU writes it since 4.0, its address whole or in three pieces. Lengths are checked afterwards.
_ENTRY = re.compile(
    rb"(.)\x00\x00\x00"
    rb"\x08(?:([\x80-\xff]{2})([\x80-\xff]{2}))?([\x80-\xff]{0,5}[\x00-\x7f])"
    rb"\x10\x00"
    rb"\x20([\x00-\x07])"
    rb"\x28([\x80-\xff]{0,8}[\x00-\x7f])",
    re.DOTALL,
)


class _Encoded(dict[int, bytes]):
    def __missing__(self, value: int) -> bytes:
        encoded = self[value] = _varint(value)
        return encoded


class _Decoded(dict[bytes, int]):
    """Values of varints, shifted left by `shift`; each different one is decoded once."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self._shift = shift

    def __missing__(self, encoded: bytes) -> int:
        value = self[encoded] = _take_varint(encoded, 0)[0] << self._shift
        return value


def _fast_entries(body: bytes) -> list[Entry] | None:
    """Decode entries of the form that today's CRIU writes, 0.6 us each; None when there is any other."""
    numbers, tops = _Decoded(0), _Decoded(28)
    low, high = _PAIRS, _UPPER_PAIRS
    size = 0
    entries = []
    for length, first, second, rest, flags, pages in _ENTRY.findall(body):
        # findall skips what does not match: the stated lengths must be the matched ones and add up to the whole.
        stated = length[0]
        if stated != (10 if first else 6) + len(rest) + len(pages):
            return None
        size += 4 + stated
        address = low[first] | high[second] | tops[rest] if first else numbers[rest]
        entries.append((address, numbers[pages], flags[0]))
    return entries if size == len(body) else None


def _decode_entry(message: bytes) -> Entry:
    fields = dict(_fields(message))
    values = [fields.get(number) for number in (1, 2, 3, 4, 5)]
    if any(isinstance(value, bytes) for value in values):
        raise ImageError("an entry's field has the wrong type")
    address, compat, in_parent, flags, pages = (value if isinstance(value, int) else None for value in values)
    if address is None:
        raise ImageError("an entry has no address")
    # As CRIU's init_compat_pagemap_entry.
    if in_parent:
        flags = (flags or 0) | PE_PARENT
    elif flags is None:
        flags = PE_PRESENT
    return address, (compat or 0) if pages is None else pages, flags


def _decode_vma(message: bytes) -> ImageVma:
    fields: Mapping[int, int | bytes] = {9: 0, **dict(_fields(message))}
    values = [fields.get(number) for number in (1, 2, 5, 6, 7, 9)]
    if not all(isinstance(value, int) for value in values):
        raise ImageError("a mapping's field is missing or has the wrong type")
    start, end, prot, flags, status, advice = (value for value in values if isinstance(value, int))
    if start >= end or start % PAGESIZE or end % PAGESIZE:
        raise ImageError(f"impossible mapping {start:#x}-{end:#x}")
    return ImageVma(start, end, prot, flags, status, advice)


def _check_order(ranges: Iterable[Range]) -> None:
    last = 0
    for start, end in ranges:
        if start < last:
            raise ImageError(f"mappings overlap or are not sorted at {start:#x}")
        last = end


def _read(path: Path, kind: int) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot read the image {path.name}: {error.strerror}") from error
    if data[:8] != _MAGIC.pack(_COMMON, kind):
        raise ImageError(f"{path.name} is no image of its kind: it starts with {data[:8].hex() or 'nothing'}")
    return data[8:]


def _messages(data: bytes) -> Iterator[bytes]:
    position, end = 0, len(data)
    while position < end:
        start = position + 4
        if start > end:
            raise ImageError(f"cut off in a length at byte {position}")
        position = start + int(_LENGTH.unpack_from(data, position)[0])
        if position > end:
            raise ImageError(f"a message at byte {start} ends beyond the image")
        yield data[start:position]


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield field numbers and values of a protobuf message; the last of repeated ones counts, as protobuf says."""
    position, end = 0, len(message)
    while position < end:
        tag, position = _take_varint(message, position)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, position = _take_varint(message, position)
            yield number, value
            continue
        if wire == 2:
            size, position = _take_varint(message, position)
        elif wire in {1, 5}:
            size = 8 if wire == 1 else 4
        else:
            raise ImageError(f"unknown wire type {wire}")
        start, position = position, position + size
        if position > end:
            raise ImageError("a field ends beyond its message")
        yield number, message[start:position]


def _take_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    try:
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
            if shift > 63:
                raise ImageError("a number is too long")
    except IndexError:
        raise ImageError("cut off in a number") from None
    if value >= _TOP:
        raise ImageError("a number is too large")
    return value, position


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _encode(numbers: Mapping[int, int]) -> bytes:
    return b"".join(_varint(number << 3) + _varint(value) for number, value in numbers.items())


def _framed(message: bytes) -> bytes:
    return _LENGTH.pack(len(message)) + message
