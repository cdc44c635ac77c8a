import ctypes
import itertools
import mmap
import os
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criu_transfer import pages, wire
from criu_transfer.pages import CopyStats, Memory, PageCopier, batches
from criu_transfer.ranges import RangeSet
from criu_transfer.wire import HEADER, MAX_DATA, PAGE, RUN, Type

pytestmark = pytest.mark.kernel


class Receiver:
    """Takes frames apart, and keeps the pages by number."""

    def __init__(self, base: int = 0) -> None:
        self.base, self.pages, self.frames = base, {}, []

    def __call__(self, raw: memoryview, data_bytes: int, zero_bytes: int) -> None:
        header = wire.decode_header(raw[: HEADER.size])
        assert len(raw) == HEADER.size + header.payload
        table, data = (
            raw[HEADER.size :][: header.offset * RUN.size],
            bytes(raw[HEADER.size + header.offset * RUN.size :]),
        )
        runs = wire.decode_runs(header, table)
        self.frames.append((header.type, len(runs)))
        assert sum(length for _, length in runs) == data_bytes + zero_bytes
        assert (data_bytes == 0) == (header.type is Type.ZERO)
        for address, length in runs:
            for number in range((address - self.base) // PAGE, (address + length - self.base) // PAGE):
                if header.type is Type.ZERO:
                    self.pages[number] = "-"
                else:
                    page, data = data[:PAGE], data[PAGE:]
                    assert page == page[:1] * PAGE
                    self.pages[number] = page[:1].decode()

    def plan(self) -> str:
        return "".join(self.pages.get(n, "?") for n in range(max(self.pages) + 1))


def copied(child, *ranges: tuple[int, int], memory: Memory | None = None) -> tuple[str, CopyStats]:
    receiver = Receiver(child.base)
    stats = PageCopier().copy(memory or Memory(child.pid, 0), [child.range(*r) for r in ranges], receiver)
    return receiver.plan() if receiver.pages else "", stats


def test_pages_zero_pages_and_runs_arrive(child) -> None:
    plan = "ab--c-d" * 3
    assert copied(child(plan), (0, 21))[0] == plan
    got, stats = copied(child(plan), (0, 2), (5, 7), (20, 21))
    assert got == "ab???-d" + "?" * 13 + "d"
    assert stats == CopyStats(4 * PAGE, PAGE, ())


def test_scattered_pages_travel_in_one_frame(child) -> None:
    source = child("ab" * 40)
    receiver = Receiver(source.base)
    PageCopier().copy(Memory(source.pid, 0), [source.range(n, n + 1) for n in range(0, 80, 2)], receiver)
    assert receiver.frames == [(Type.PAGES, 40)]


def test_memory_beyond_one_buffer(child) -> None:
    plan = ("a" * 300 + "-" * 200 + "b" * 13) * 5
    source = child(plan)
    memory = Memory(source.pid, 0)
    assert copied(source, (0, len(plan)), memory=memory)[0] == plan
    assert list(memory.ledger) == [source.range(0, len(plan))]


def test_pages_that_only_begin_with_zeros_are_no_zero_pages() -> None:
    area = mmap.mmap(-1, 2 * PAGE)
    area[PAGE - 1] = 1
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    frames = []
    PageCopier().copy(
        Memory(os.getpid(), 0), [(address, address + 2 * PAGE)], lambda raw, *_: frames.append(bytes(raw))
    )
    assert [raw[0] for raw in frames] == [Type.PAGES, Type.ZERO]
    assert frames[0][-1] == 1


def test_pages_without_read_permission_are_read_all_the_same(child) -> None:
    plan = "axxbx-"
    got, stats = copied(child(plan), (0, 6))
    assert (got, stats.owed) == (plan, ())


def test_unmapped_pages_are_owed_and_the_rest_goes_on(child) -> None:
    source = child("auab-uxbbbbbbb")
    memory = Memory(source.pid, 0)
    got, stats = copied(source, (0, 14), memory=memory)
    assert got == "a?ab-?xbbbbbbb"
    assert list(stats.owed) == list(memory.owed) == [source.range(1, 2), source.range(5, 6)]
    assert list(memory.ledger) == [source.range(0, 1), source.range(2, 5), source.range(6, 14)]


def test_a_large_hole_costs_few_calls_and_little_of_what_follows(child, monkeypatch) -> None:
    calls = []
    real = pages.process_vm_readv
    monkeypatch.setattr("criu_transfer.pages.process_vm_readv", lambda *args: calls.append(1) or real(*args))
    source = child("a" + "u" * 400 + "b" * 600)
    got, stats = copied(source, (0, 1001))
    assert len(calls) < 20
    assert got.count("b") > 600 - 400
    missing = RangeSet(stats.owed)
    assert missing.total == (1001 - got.count("a") - got.count("b")) * PAGE


def test_the_ledger_forgets_what_was_written_again_and_cannot_be_read(child) -> None:
    source = child("abc")
    memory = Memory(source.pid, 0)
    copied(source, (0, 3), memory=memory)
    source.put(1, "u")
    assert copied(source, (1, 2), memory=memory)[1].owed == (source.range(1, 2),)
    assert list(memory.ledger) == [source.range(0, 1), source.range(2, 3)]


def test_debts_are_paid_by_a_later_copy(child) -> None:
    source = child("abc")
    memory = Memory(source.pid, 0)
    memory.owed.add(*source.range(0, 2))
    copied(source, (0, 1), memory=memory)
    assert list(memory.owed) == [source.range(1, 2)]


def test_everything_is_owed_of_a_process_that_has_ended(child) -> None:
    source = child("abc")
    os.kill(source.pid, signal.SIGKILL)
    source.process.wait()
    got, stats = copied(source, (0, 3))
    assert (got, RangeSet(stats.owed).total) == ("", 3 * PAGE)


def test_a_failed_send_leaves_nothing_in_the_ledger(child) -> None:
    source = child("abc")
    memory = Memory(source.pid, 0)
    copied(source, (0, 3), memory=memory)

    def fail(*_: object) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        PageCopier().copy(memory, [source.range(1, 2)], fail)
    assert not memory.ledger


def test_a_stopped_copy_owes_the_rest(child) -> None:
    source = child("a" * 3000)
    memory = Memory(source.pid, 0)
    memory.ledger.add(*source.range(0, 3000))
    receiver = Receiver(source.base)
    ranges = [source.range(0, 1500), source.range(1500, 2999)]
    stats = PageCopier().copy(memory, ranges, receiver, lambda: len(receiver.frames) == 1)
    assert RangeSet(stats.owed) == memory.owed == RangeSet([source.range(1024, 2999)])
    assert list(memory.ledger) == [source.range(0, 1024), source.range(2999, 3000)]


@pytest.mark.parametrize("ranges", [[(0, 0)], [(PAGE, 0)], [(1, PAGE)], [(PAGE, 2 * PAGE), (0, PAGE)]])
def test_ranges_out_of_order_are_a_bug(ranges) -> None:
    with pytest.raises(ValueError, match="out of order"):
        list(batches(ranges))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3000)), max_size=40))
def test_batches_keep_every_page_within_the_limits(steps: list[tuple[int, int]]) -> None:
    ranges, at = [], 0
    for gap, count in steps:
        ranges.append((at + gap * PAGE, at + (gap + count) * PAGE))
        at = ranges[-1][1]
    cut = list(batches(ranges))
    assert RangeSet(r for batch in cut for r in batch) == RangeSet(ranges)
    assert all(sum(end - start for start, end in batch) <= MAX_DATA and len(batch) <= 1024 for batch in cut)


@given(st.text("-abc", min_size=1, max_size=40), st.data())
def test_any_mix_of_zero_pages_arrives(plan: str, data: st.DataObject) -> None:
    area = mmap.mmap(-1, len(plan) * PAGE)
    for number, letter in enumerate(plan):
        area[number * PAGE : (number + 1) * PAGE] = (b"\0" if letter == "-" else letter.encode()) * PAGE
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(plan)), min_size=2, max_size=9)) | {0, len(plan)})
    ranges = [(base + a * PAGE, base + b * PAGE) for a, b in itertools.pairwise(cuts)]
    receiver = Receiver(base)
    PageCopier().copy(Memory(os.getpid(), 0), ranges, receiver)
    assert receiver.plan() == plan
