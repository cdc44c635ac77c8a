import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criu_transfer.errors import GiveUp, ProtocolError, StoreFull
from criu_transfer.store import PageStore, require_no_swap
from criu_transfer.wire import ADDRESS_END, PAGE


def page(letter: str, count: int = 1) -> memoryview:
    return memoryview(letter.encode() * (PAGE * count))


@pytest.fixture
def store():
    store = PageStore(limit=64 * PAGE)
    store.open(0)
    yield store
    store.close()


def test_pages_come_back_at_their_addresses(store: PageStore) -> None:
    store.write(0, 0x7FFF_0000_0000, page("a", 2))
    store.write(0, 0, page("b"))
    assert store.read(0, 0x7FFF_0000_0000, 2 * PAGE) == page("a", 2)
    assert os.pread(store.fd(0), PAGE, 0) == page("b")
    assert list(store.coverage(0)) == [(0, PAGE), (0x7FFF_0000_0000, 0x7FFF_0000_2000)]
    assert store.held == 3 * PAGE


def test_zero_pages_are_covered_and_free_their_memory(store: PageStore) -> None:
    store.write(0, 0, page("a", 16))
    before = os.fstat(store.fd(0)).st_blocks
    store.zero(0, PAGE, 20 * PAGE)
    assert store.read(0, 0, 21 * PAGE) == bytes(page("a")) + bytes(20 * PAGE)
    assert store.coverage(0).covers(0, 21 * PAGE)
    assert store.held == PAGE
    assert os.fstat(store.fd(0)).st_blocks == before - 15 * PAGE // 512
    assert store.covered == 21 * PAGE


def test_the_limit_counts_pages_once_and_over_all_processes(store: PageStore) -> None:
    store.open(1)
    for _ in range(3):
        store.write(0, 0, page("a", 32))
    store.write(1, 0, page("b", 32))
    with pytest.raises(StoreFull):
        store.write(1, 31 * PAGE, page("c", 2))
    assert store.read(1, 31 * PAGE, PAGE) == page("b")
    store.zero(1, 1 << 40, 1 << 40)  # takes no memory
    store.drop(0)
    store.write(1, 31 * PAGE, page("c", 33))
    assert store.held == 64 * PAGE


@pytest.mark.parametrize(
    ("address", "length"),
    [(1, PAGE), (0, 1), (0, 0), (ADDRESS_END, PAGE), (ADDRESS_END - PAGE, 2 * PAGE), (-PAGE, PAGE)],
)
def test_addresses_that_are_no_pages_are_refused(store: PageStore, address: int, length: int) -> None:
    with pytest.raises(ProtocolError):
        store.write(0, address, memoryview(bytes(length)))
    with pytest.raises(ProtocolError):
        store.zero(0, address, length)


def test_only_announced_processes_have_memory(store: PageStore) -> None:
    with pytest.raises(ProtocolError, match="never announced"):
        store.write(5, 0, page("a"))
    with pytest.raises(ProtocolError, match="announced twice"):
        store.open(0)
    store.drop(0)
    with pytest.raises(ProtocolError, match="never announced"):
        store.coverage(0)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20), st.integers(1, 6)), max_size=25))
def test_store_equals_a_plain_model(steps: list[tuple[bool, int, int]]) -> None:
    store, model = PageStore(limit=1 << 20), {}
    store.open(0)
    for number, (zero, first, count) in enumerate(steps):
        content = 0 if zero else number % 255 + 1
        if zero:
            store.zero(0, first * PAGE, count * PAGE)
        else:
            store.write(0, first * PAGE, memoryview(bytes([content]) * (count * PAGE)))
        model.update(dict.fromkeys(range(first, first + count), content))
    assert store.covered == len(model) * PAGE
    assert store.held == sum(1 for content in model.values() if content) * PAGE
    for number, content in model.items():
        assert store.read(0, number * PAGE, PAGE) == bytes([content]) * PAGE
    store.close()


def test_swap_is_refused_unless_our_cgroup_forbids_it(tmp_path: Path) -> None:
    swaps, cgroup = tmp_path / "swaps", tmp_path / "cgroup"
    header = "Filename Type Size Used Priority\n"
    cgroup.write_text("0::/spotguard/receiver\n")
    swaps.write_text(header)
    require_no_swap(swaps=swaps, cgroup=cgroup, root=tmp_path)
    swaps.write_text(header + "/dev/zram0 partition 1 0 -2\n")
    with pytest.raises(GiveUp, match=r"/dev/zram0: run 'swapoff -a'"):
        require_no_swap(swaps=swaps, cgroup=cgroup, root=tmp_path)
    (tmp_path / "spotguard/receiver").mkdir(parents=True)
    limit = tmp_path / "spotguard/receiver/memory.swap.max"
    limit.write_text("max\n")
    with pytest.raises(GiveUp):
        require_no_swap(swaps=swaps, cgroup=cgroup, root=tmp_path)
    limit.write_text("0\n")
    require_no_swap(swaps=swaps, cgroup=cgroup, root=tmp_path)
