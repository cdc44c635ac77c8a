import threading
import time
from pathlib import Path

import pytest

from criu_transfer import quickmoves
from criu_transfer.quickmoves import own_cgroup, quick_moves


def here() -> str:
    return next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))


@pytest.mark.kernel
def test_this_process_moves_all_the_time_and_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    group, before = own_cgroup(), here()
    assert group is not None
    moved = threading.Event()
    original = quickmoves._move_to

    def move(group: Path, ended: threading.Event) -> None:
        moved.set()
        original(group, ended)

    monkeypatch.setattr(quickmoves, "_move_to", move)
    with quick_moves():
        assert moved.wait(5)
        assert here() == before
    assert here() == before
    assert [thread.name for thread in threading.enumerate() if thread.name == "quick moves"] == []


def test_moves_into_the_same_group_are_made_until_the_end(tmp_path: Path) -> None:
    procs = tmp_path / "cgroup.procs"
    procs.write_bytes(b"")
    ended = threading.Event()
    thread = threading.Thread(target=quickmoves._move_to, args=(tmp_path, ended))
    thread.start()
    deadline = time.monotonic() + 5
    while procs.stat().st_size < 3 and time.monotonic() < deadline:
        ended.wait(0.001)
    ended.set()
    thread.join()
    assert set(procs.read_bytes()) == {ord("0")}
    assert procs.stat().st_size >= 3


def test_what_cannot_be_moved_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for group in (None, tmp_path / "gone"):
        monkeypatch.setattr(quickmoves, "own_cgroup", lambda group=group: group)
        with quick_moves():
            pass
