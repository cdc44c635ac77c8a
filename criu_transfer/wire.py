"""Frames of the transfer stream: pack and check headers and tables; no sockets here (docs/protocol.md).

Everything is bounded before memory is taken for it, and whatever is not allowed raises ProtocolError, nothing else.
"""

import enum
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from criu_transfer.errors import ProtocolError

VERSIONS = (1,)  # that this code speaks, best first

PAGE = 4096
MAX_DATA = 4 << 20  # bytes of memory or of a file in one frame
MAX_RUNS = 1024  # page runs in one frame; IOV_MAX, and 4 MiB of single pages
ADDRESS_END = 1 << 48  # end of user addresses: 47 bits on x86-64, 48 on arm64
MAX_NUMBER = (1 << 20) - 1  # processes of one migration
MAX_OFFSET = (1 << 63) - 1  # of a file: what the kernel allows

# Header: big endian, 24 bytes
#   0  u8   type
#   1  u8   flags, 0 in version 1
#   2  u16  reserved, 0
#   4  u32  number: of the process, or of the file that a FILE frame opened
#   8  u64  offset: in the file; for PAGES and ZERO the number of runs; for HELLO the magic
#  16  u64  length: bytes of payload that follow; for FILE_HOLE the length of the hole, and nothing follows
HEADER = struct.Struct("!BBHIQQ")
# A run of pages: u64 address, u64 length in bytes; both multiples of 4096, runs ascending, disjoint and below 2^48
RUN = struct.Struct("!QQ")
MAGIC = int.from_bytes(b"SPOTGRD\n")
MAX_TABLE = MAX_RUNS * RUN.size
MAX_PAYLOAD = MAX_DATA + MAX_TABLE  # the largest payload of all frames: what a receive buffer must hold


class Type(enum.IntEnum):
    """What a frame is."""

    HELLO = 1
    ACCEPT = 2
    REFUSE = 3
    PROCESS = 4
    GONE = 5
    PAGES = 6
    ZERO = 7
    FILE = 8
    FILE_DATA = 9
    FILE_HOLE = 10
    FILE_DELETE = 11
    MARK = 12
    ACK = 13
    END = 14
    ERROR = 15


class Header(NamedTuple):
    """A checked header; `payload` bytes follow it on the wire."""

    type: Type
    number: int
    offset: int
    length: int

    @property
    def payload(self) -> int:
        """Count the bytes that follow this header."""
        return 0 if self.type is Type.FILE_HOLE else self.length


@dataclass(frozen=True, slots=True)
class _Rule:
    """What a header of one type may say: the highest value of each field, and the lowest length and offset."""

    max_length: int
    min_length: int = 1
    max_number: int = 0
    min_offset: int = 0
    max_offset: int = 0


_JSON = _Rule(64 << 10)
_RULES = {
    Type.HELLO: _Rule(64 << 10, min_offset=MAGIC, max_offset=MAGIC),
    Type.ACCEPT: _JSON,
    Type.REFUSE: _JSON,
    Type.PROCESS: _Rule(64 << 10, max_number=MAX_NUMBER),
    Type.GONE: _Rule(0, min_length=0, max_number=MAX_NUMBER),
    Type.PAGES: _Rule(MAX_PAYLOAD, RUN.size + PAGE, MAX_NUMBER, 1, MAX_RUNS),
    Type.ZERO: _Rule(MAX_TABLE, RUN.size, MAX_NUMBER, 1, MAX_RUNS),
    Type.FILE: _Rule(256 << 10, max_number=(1 << 32) - 1),  # extended attributes may be long
    Type.FILE_DATA: _Rule(MAX_DATA, max_number=(1 << 32) - 1, max_offset=MAX_OFFSET),
    Type.FILE_HOLE: _Rule(MAX_OFFSET, max_number=(1 << 32) - 1, max_offset=MAX_OFFSET),
    Type.FILE_DELETE: _JSON,
    Type.MARK: _JSON,
    Type.ACK: _JSON,
    Type.END: _Rule(1 << 20),  # names every process
    Type.ERROR: _JSON,
}
# A plain integer, for its type is looked up a million times in a large transfer.
_TYPES = {int(kind): (kind, rule) for kind, rule in _RULES.items()}


def encode_header(header: Header) -> bytes:
    """Pack a header; raises ProtocolError when the receiver would refuse it, so a bug shows on the sending side."""
    packed = HEADER.pack(header.type, 0, 0, header.number, header.offset, header.length)
    decode_header(packed)
    return packed


def decode_header(data: bytes | bytearray | memoryview) -> Header:
    """Unpack and check the 24 bytes of a header."""
    if len(data) != HEADER.size:
        raise ProtocolError(f"a header has {HEADER.size} bytes, not {len(data)}")
    code, flags, reserved, number, offset, length = HEADER.unpack(data)
    kind, rule = _TYPES.get(code, (None, None))
    if kind is None or rule is None:
        raise ProtocolError(f"unknown frame type {code}")
    if flags or reserved:
        raise ProtocolError(f"{kind.name}: flags {flags:#x} or reserved {reserved:#x} are not zero")
    if not rule.min_length <= length <= rule.max_length:
        raise ProtocolError(f"{kind.name}: length {length} is not in {rule.min_length}..{rule.max_length}")
    if number > rule.max_number:
        raise ProtocolError(f"{kind.name}: number {number} is over {rule.max_number}")
    if not rule.min_offset <= offset <= rule.max_offset:
        raise ProtocolError(f"{kind.name}: offset {offset} is not in {rule.min_offset}..{rule.max_offset}")
    if rule.max_offset == MAX_OFFSET and offset + length > MAX_OFFSET:
        raise ProtocolError(f"{kind.name}: ends beyond the largest file")
    return Header(kind, number, offset, length)


def frame(kind: Type, payload: bytes = b"", *, number: int = 0, offset: int = 0) -> bytes:
    """Pack a small frame, header and payload in one."""
    return encode_header(Header(kind, number, offset, len(payload))) + payload


def encode_runs(runs: Sequence[tuple[int, int]]) -> bytes:
    """Pack a table of (address, length in bytes)."""
    flat = [value for run in runs for value in run]
    return struct.pack(f"!{len(flat)}Q", *flat)


def decode_runs(header: Header, table: bytes | bytearray | memoryview) -> list[tuple[int, int]]:
    """Unpack and check the table of a PAGES or ZERO frame.

    `table`: the first `header.offset` * 16 bytes of the payload. Returns (address, length) ascending and disjoint;
    for PAGES the lengths add up to the rest of the payload.
    """
    if len(table) != header.offset * RUN.size or len(table) > header.length:
        raise ProtocolError(f"{header.type.name}: {header.offset} runs do not fit {header.length} bytes")
    runs: list[tuple[int, int]] = list(RUN.iter_unpack(table))
    position = total = 0
    for address, length in runs:
        if address < position or (address | length) % PAGE or not length or address + length > ADDRESS_END:
            raise ProtocolError(f"{header.type.name}: run {address:#x}+{length:#x} is unaligned, out of order or range")
        position = address + length
        total += length
    data = header.length - len(table)
    if data != (total if header.type is Type.PAGES else 0):
        raise ProtocolError(f"{header.type.name}: {total} bytes are named and {data} follow")
    return runs


def encode_json(fields: dict[str, object]) -> bytes:
    """Pack a JSON object. File names that are not UTF-8 travel as the escapes \\udc80 to \\udcff (os.fsdecode)."""
    return json.dumps(fields, separators=(",", ":")).encode("ascii")


def decode_json(payload: bytes | bytearray | memoryview) -> dict[str, object]:
    """Unpack a JSON object; the header has already limited its length."""
    try:
        fields = json.loads(bytes(payload).decode("ascii"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not the JSON of this protocol: {error}") from error
    if not isinstance(fields, dict):
        raise ProtocolError("the JSON of a frame must be an object")
    return fields


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key stands twice")
    return fields
