"""Captured frames: what they look like, which are kept, and how many travel as one block.

A frame is what an AF_PACKET socket with PACKET_VNET_HDR gives and takes: a `virtio_net_hdr` of 10 bytes in native byte
order (linux/virtio_net.h), then Ethernet. The header carries the checksum and segmentation work that is still to do: on
veth nothing is filled in yet.

    virtio_net_hdr: u8 flags, u8 gso_type, u16 hdr_len, u16 gso_size, u16 csum_start, u16 csum_offset
    Ethernet:       6 bytes destination, 6 bytes source, u16 type (big endian), payload

A block, for the wire, all big endian:

    4 bytes magic "SGFR", u16 version = 1, u16 zero, u32 number of frames, u32 length of the rest,
    then per frame: u32 length, the frame
"""

import ipaddress
import struct
from collections.abc import Iterable, Sequence

type Address = ipaddress.IPv4Address | ipaddress.IPv6Address

MAX_FRAME = 10 + 14 + 65535 + 40  # one segmentation offload unit; larger ones (BIG TCP) are cut and refused
MAX_BLOCK = 8 << 20
MAX_FRAMES = 1 << 16

_VNET = struct.Struct("=BBHHHH")
_BLOCK = struct.Struct(">4sHHII")
_LENGTH = struct.Struct(">I")
_MAGIC = b"SGFR"
_VERSION = 1
_ETHERNET = _VNET.size  # offset of the Ethernet header
_IP = _ETHERNET + 14  # offset of the IP header
_IPV4, _IPV6 = b"\x08\x00", b"\x86\xdd"
_NEEDS_CSUM = 1
_GSO_TYPES = frozenset({0, 1, 3, 4, 5})  # none, TCPv4, UDP, TCPv6, UDP_L4
_GSO_ECN = 0x80
_ICMPV6 = 58
_NEIGHBOUR_DISCOVERY = range(133, 138)


class FrameError(ValueError):
    """These bytes are no frame, or no block of frames, that we would play."""


def check(frame: bytes) -> None:
    """Raise FrameError unless `frame` is whole, IPv4 or IPv6, and its offload header fits its length."""
    if not _IP + 20 <= len(frame) <= MAX_FRAME:
        raise FrameError(f"a frame of {len(frame)} bytes")
    kind = frame[_IP - 2 : _IP]
    if kind not in {_IPV4, _IPV6} or (kind == _IPV6 and len(frame) < _IP + 40):
        raise FrameError(f"neither IPv4 nor IPv6: Ethernet type {kind.hex()}")
    flags, gso_type, header_length, gso_size, start, offset = _VNET.unpack_from(frame)
    size = len(frame) - _ETHERNET
    if flags & _NEEDS_CSUM and start + offset + 2 > size:
        raise FrameError("the checksum lies behind the end of the frame")
    if gso_type & ~_GSO_ECN not in _GSO_TYPES:
        raise FrameError(f"unknown segmentation type {gso_type}")
    if gso_type and (not gso_size or header_length > size):
        raise FrameError("segmentation without a size")


def worth_keeping(frame: bytes) -> bool:
    """Tell whether to play this frame later: unicast IPv4 or IPv6, no neighbour discovery."""
    try:
        check(frame)
    except FrameError:
        return False
    if frame[_ETHERNET] & 1:
        return False
    return not (
        frame[_IP - 2 : _IP] == _IPV6
        and frame[_IP + 6] == _ICMPV6
        and len(frame) > _IP + 40
        and frame[_IP + 40] in _NEIGHBOUR_DISCOVERY
    )


def source_mac(frame: bytes) -> bytes:
    """Return the six bytes of the sender's hardware address."""
    return frame[_ETHERNET + 6 : _ETHERNET + 12]


def source(frame: bytes) -> Address:
    """Return the sender's IP address of a frame that `check` accepts."""
    if frame[_IP - 2 : _IP] == _IPV4:
        return ipaddress.IPv4Address(frame[_IP + 12 : _IP + 16])
    return ipaddress.IPv6Address(frame[_IP + 8 : _IP + 24])


def destination(frame: bytes) -> Address:
    """Return the receiver's IP address of a frame that `check` accepts."""
    if frame[_IP - 2 : _IP] == _IPV4:
        return ipaddress.IPv4Address(frame[_IP + 16 : _IP + 20])
    return ipaddress.IPv6Address(frame[_IP + 24 : _IP + 40])


def readdress(frame: bytes, *, to: bytes, sender: bytes) -> bytes:
    """Return the frame with other hardware addresses: those in it belong to the node that captured it."""
    return frame[:_ETHERNET] + to + sender + frame[_ETHERNET + 12 :]


def by_direction(frames: Iterable[bytes], address: str) -> tuple[list[bytes], list[bytes]]:
    """Split frames that `check` accepts into those for the pod with `address` and those that it sent, in order."""
    pod = ipaddress.ip_address(address)
    incoming: list[bytes] = []
    outgoing: list[bytes] = []
    for frame in frames:
        (outgoing if source(frame) == pod else incoming).append(frame)
    return incoming, outgoing


def keep_oldest(frames: Iterable[bytes], limit: int = MAX_BLOCK) -> tuple[list[bytes], int]:
    """Return the first frames that fit one block of `limit` bytes, and how many were left out.

    The oldest are the ones to keep: TCP takes what follows in order, and sends the rest again.
    """
    kept: list[bytes] = []
    dropped, size = 0, _BLOCK.size
    for frame in frames:
        size += _LENGTH.size + len(frame)
        if dropped or size > limit or len(kept) == MAX_FRAMES:
            dropped += 1
        else:
            kept.append(frame)
    return kept, dropped


def pack(frames: Sequence[bytes]) -> bytes:
    """Put frames into one block. Raises FrameError when they do not fit: see `keep_oldest`."""
    body = b"".join(_LENGTH.pack(len(frame)) + frame for frame in frames)
    if len(frames) > MAX_FRAMES or _BLOCK.size + len(body) > MAX_BLOCK:
        raise FrameError(f"{len(frames)} frames of {len(body)} bytes are too much for one block")
    return _BLOCK.pack(_MAGIC, _VERSION, 0, len(frames), len(body)) + body


def unpack(block: bytes) -> list[bytes]:
    """Take a block apart; every frame in it has passed `check`. Raises FrameError, nothing else."""
    if not _BLOCK.size <= len(block) <= MAX_BLOCK:
        raise FrameError(f"a block of {len(block)} bytes")
    magic, version, zero, count, length = _BLOCK.unpack_from(block)
    if (magic, version, zero) != (_MAGIC, _VERSION, 0):
        raise FrameError("no block of frames, or of another version")
    if count > MAX_FRAMES or length != len(block) - _BLOCK.size:
        raise FrameError("the block's header does not fit its length")
    frames, at = [], _BLOCK.size
    for _ in range(count):
        if at + _LENGTH.size > len(block):
            raise FrameError("the block ends inside a length")
        (size,) = _LENGTH.unpack_from(block, at)
        at += _LENGTH.size
        frame = block[at : at + size]
        if len(frame) != size:
            raise FrameError("the block ends inside a frame")
        check(frame)
        frames.append(frame)
        at += size
    if at != len(block):
        raise FrameError("bytes after the last frame")
    return frames
