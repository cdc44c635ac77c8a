import contextlib
import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.network import frames
from handlers.network.frames import FrameError

POD = ipaddress.ip_address("10.77.1.10")
CLIENT = ipaddress.ip_address("10.77.0.50")
MAC, OTHER = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")


def vnet(*, flags: int = 0, gso_type: int = 0, hdr_len: int = 0, gso_size: int = 0, start: int = 0, offset: int = 0):
    return struct.pack("=BBHHHH", flags, gso_type, hdr_len, gso_size, start, offset)


def ipv4(payload: bytes = b"data", *, head: bytes | None = None, to: bytes = MAC) -> bytes:
    header = bytes(12) + CLIENT.packed + POD.packed
    return (vnet() if head is None else head) + to + OTHER + b"\x08\x00" + header + payload


def ipv6(payload: bytes = b"data", *, next_header: int = 6) -> bytes:
    header = bytes(6) + bytes([next_header, 64]) + bytes(15) + b"\1" + bytes(15) + b"\2"
    return vnet() + MAC + OTHER + b"\x86\xdd" + header + payload


def test_addresses_are_read_from_both_families():
    assert (frames.source(ipv4()), frames.destination(ipv4())) == (CLIENT, POD)
    assert [str(a) for a in (frames.source(ipv6()), frames.destination(ipv6()))] == ["::1", "::2"]
    assert frames.source_mac(ipv4()) == OTHER


def test_readdressing_changes_the_hardware_addresses_alone():
    changed = frames.readdress(ipv4(), to=OTHER, sender=MAC)
    assert changed == vnet() + OTHER + MAC + ipv4()[22:]


@pytest.mark.parametrize(
    "frame",
    [
        ipv4(),
        ipv6(),
        ipv4(head=vnet(flags=1, start=34, offset=2)),
        ipv4(bytes(3000), head=vnet(flags=1, gso_type=1, hdr_len=54, gso_size=1448, start=34, offset=16)),
        ipv4(bytes(3000), head=vnet(gso_type=0x81, hdr_len=54, gso_size=1448)),
    ],
)
def test_ordinary_frames_are_kept(frame):
    frames.check(frame)
    assert frames.worth_keeping(frame)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        vnet() + MAC,
        vnet() + MAC + OTHER + b"\x08\x06" + bytes(28),
        ipv6()[:60],
        ipv4(head=vnet(flags=1, start=34, offset=16)),
        ipv4(head=vnet(gso_type=9, gso_size=1000)),
        ipv4(head=vnet(gso_type=1)),
        ipv4(head=vnet(gso_type=1, gso_size=1000, hdr_len=500)),
        ipv4(bytes(frames.MAX_FRAME)),
    ],
    ids=["empty", "short", "arp", "short6", "checksum", "segment-type", "segment-size", "header-length", "long"],
)
def test_malformed_frames_are_refused(frame):
    with pytest.raises(FrameError):
        frames.check(frame)
    assert not frames.worth_keeping(frame)


def test_neighbour_discovery_and_multicast_are_not_kept():
    assert not frames.worth_keeping(ipv6(b"\x87" + bytes(23), next_header=58))
    assert frames.worth_keeping(ipv6(b"\x80" + bytes(23), next_header=58))
    assert not frames.worth_keeping(ipv4(to=b"\x01\x00\x5e\x00\x00\x01"))


@given(st.lists(st.binary(max_size=200).map(ipv4), max_size=20))
def test_a_block_gives_back_what_was_put_in(kept):
    assert frames.unpack(frames.pack(kept)) == kept


@given(st.binary(max_size=300))
def test_garbage_raises_nothing_but_frame_error(data):
    for block in (data, b"SGFR" + data, struct.pack(">4sHHII", b"SGFR", 1, 0, 1, len(data)) + data):
        with contextlib.suppress(FrameError):
            frames.unpack(block)
    frames.worth_keeping(data)


@given(st.integers(0, 200), st.integers(0, 255))
def test_a_damaged_block_raises_nothing_but_frame_error(at, value):
    block = bytearray(frames.pack([ipv4(), ipv6()]))
    block[at % len(block)] = value
    with contextlib.suppress(FrameError):
        for frame in frames.unpack(bytes(block)):
            frames.check(frame)


def test_a_cut_block_is_refused():
    block = frames.pack([ipv4(), ipv6()])
    for end in range(len(block)):
        with pytest.raises(FrameError):
            frames.unpack(block[:end])
    with pytest.raises(FrameError):
        frames.unpack(block + b"x")


def test_the_oldest_are_kept_and_the_rest_counted():
    some = [ipv4(bytes([n]) * 100) for n in range(10)]
    limit = len(frames.pack(some[:4]))
    assert frames.keep_oldest(some, limit) == (some[:4], 6)
    assert frames.keep_oldest(some) == (some, 0)
    large = [ipv4(bytes(60_000))] * 150
    with pytest.raises(FrameError):
        frames.pack(large)
    kept, dropped = frames.keep_oldest(large)
    assert len(kept) + dropped == 150
    assert len(frames.pack(kept)) <= frames.MAX_BLOCK
