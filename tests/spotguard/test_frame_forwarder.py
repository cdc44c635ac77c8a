"""The forwarder, with a hold that is a pipe: order, the way back, failing sends, the end."""

import asyncio
import os
import struct
from collections.abc import AsyncIterator, Callable
from typing import cast

import pytest

from handlers.control import MAX_FRAMES
from handlers.errors import GiveUp, Retry
from handlers.network import frames
from handlers.network.hold import Hold
from spotguard import frame_forwarder
from spotguard.frame_forwarder import FrameForwarder


def frame(number: int, size: int = 60) -> bytes:
    """Give an IPv4 frame that says its number."""
    ethernet = b"\x02" * 12 + b"\x08\x00"
    return (bytes(10) + ethernet + struct.pack(">I", number)).ljust(size, b"\0")


class PipeHold:
    """What the forwarder needs of a Hold: readable when there are frames."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_NONBLOCK)
        self._frames: list[bytes] = []

    def put(self, *taken: bytes) -> None:
        self._frames += taken
        os.write(self._write, b".")

    def fileno(self) -> int:
        return self._read

    def take(self) -> list[bytes]:
        taken, self._frames = self._frames, []
        if taken:
            os.read(self._read, 4096)
        return taken

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)


class Target:
    """Takes blocks; `gate` keeps a send waiting, `error` makes it fail."""

    def __init__(self) -> None:
        self.blocks: list[list[bytes]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    async def send(self, block: bytes) -> None:
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.blocks.append(list(frames.unpack(block)))

    @property
    def got(self) -> list[bytes]:
        return [one for block in self.blocks for one in block]


@pytest.fixture
def target() -> Target:
    return Target()


@pytest.fixture
async def hold() -> AsyncIterator[PipeHold]:
    made = PipeHold()
    yield made
    made.close()


@pytest.fixture
async def forwarder(hold: PipeHold, target: Target) -> AsyncIterator[FrameForwarder]:
    made = FrameForwarder(cast(Hold, hold), target.send)
    made.start()
    yield made
    await made.stop()


async def until(condition: Callable[[], object]) -> None:
    """Let others run until the condition holds."""
    for _ in range(100_000):
        if condition():
            return
        await asyncio.sleep(0)
    pytest.fail("it never happened")


async def test_nothing_is_sent_before_the_target_is_there_then_all_in_order(
    forwarder: FrameForwarder, hold: PipeHold, target: Target
) -> None:
    hold.put(frame(0), frame(1))
    await until(lambda: forwarder.count == 2)
    forwarder.add([frame(2)])
    await forwarder.flush()
    assert target.blocks == []
    forwarder.start_sending()
    hold.put(frame(3))
    await forwarder.flush()
    hold.put(frame(4))
    await until(lambda: len(target.got) == 5)
    assert target.got == [frame(n) for n in range(5)]
    assert forwarder.kept == target.got  # for the way back
    assert (forwarder.count, forwarder.lost) == (5, 0)


async def test_one_block_at_a_time_and_none_larger_than_the_target_takes(
    forwarder: FrameForwarder, hold: PipeHold, target: Target
) -> None:
    target.gate.clear()
    forwarder.start_sending()
    forwarder.add([frame(0)])
    await asyncio.sleep(0)  # the first send is under way
    big = [frame(n, 60_000) for n in range(1, 121)]
    forwarder.add(big)
    target.gate.set()
    await forwarder.flush()
    assert target.got == [frame(0), *big]
    assert len(target.blocks) == 3
    assert all(len(frames.pack(block)) <= MAX_FRAMES for block in target.blocks)


@pytest.mark.parametrize("error", [Retry("busy"), GiveUp("unknown migration")])
async def test_a_send_that_fails_costs_its_block_and_no_more(
    error: Exception, forwarder: FrameForwarder, target: Target
) -> None:
    forwarder.start_sending()
    target.error = error
    forwarder.add([frame(0), frame(1)])
    await forwarder.flush()
    assert (forwarder.lost, target.got) == (2, [])
    target.error = None
    forwarder.add([frame(2)])
    await forwarder.flush()
    assert (forwarder.lost, target.got) == (2, [frame(2)])
    assert forwarder.kept == [frame(0), frame(1), frame(2)]


async def test_what_does_not_fit_is_dropped_and_counted_the_oldest_stay(
    forwarder: FrameForwarder, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_forwarder, "KEPT_BYTES", 150)
    forwarder.add([frame(0), frame(1), frame(2)])
    assert forwarder.kept == [frame(0), frame(1)]
    assert (forwarder.count, forwarder.lost) == (3, 1)


async def test_after_the_stop_nothing_is_taken_nor_sent(
    forwarder: FrameForwarder, hold: PipeHold, target: Target
) -> None:
    target.gate.clear()
    forwarder.start_sending()
    forwarder.add([frame(0)])
    await asyncio.sleep(0)
    await forwarder.stop()
    target.gate.set()
    hold.put(frame(1))
    for _ in range(5):
        await asyncio.sleep(0)
    assert (target.got, forwarder.count) == ([], 1)


async def test_a_bug_in_sending_is_not_swallowed(forwarder: FrameForwarder, target: Target) -> None:
    target.error = ZeroDivisionError()
    forwarder.start_sending()
    forwarder.add([frame(0)])
    with pytest.raises(ZeroDivisionError):
        await forwarder.flush()
