"""The watcher sees a double run, and takes neither a dying nor a frozen copy for one."""

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotguard.lab.watcher import Interval, Record, Side, Watch

ROOT = Path("/sys/fs/cgroup")
LOOKS = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40)


@given(LOOKS)
def test_intervals_cover_exactly_the_looks_that_saw_it_run(looks: list[tuple[bool, bool]]) -> None:
    record = Record()
    for at, (a, b) in enumerate(looks):
        record.look(float(at), {"a": a, "b": b}, double=a and b)
    watched = record.finish(float(len(looks)), ["a", "b"])
    for column, name in enumerate(("a", "b")):
        assert sum(interval.seconds for interval in watched.running[name]) == sum(look[column] for look in looks)
    assert watched.double_run_ms == sum(a and b for a, b in looks) * 1e3
    assert all(x.end < y.start for x, y in zip(watched.overlaps, watched.overlaps[1:], strict=False))
    assert watched.looks == len(looks) + 1
    assert watched.blind_ms == (1e3 if looks else 0.0)


def pause(seconds: float) -> None:
    select.select([], [], [], seconds)


@pytest.fixture
def cgroup(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Path]]:
    made: list[Path] = []

    def make(name: str) -> Path:
        path = ROOT / f"watch-{os.getpid()}-{name}"
        path.mkdir()
        made.append(path)
        return path

    yield make
    for path in made:
        (path / "cgroup.kill").write_text("1")
        end = time.monotonic() + 5
        while "populated 1" in (path / "cgroup.events").read_text() and time.monotonic() < end:
            pause(0.01)
        path.rmdir()


@pytest.fixture
def spin() -> Iterator[Callable[[Path], subprocess.Popen[bytes]]]:
    """Start a process in a cgroup that executes all the time, gently."""
    started: list[subprocess.Popen[bytes]] = []

    def start(path: Path) -> subprocess.Popen[bytes]:
        code = "import select\nwhile True: select.select([], [], [], 0.0005)"
        process = subprocess.Popen(["sh", "-c", 'echo $$ >"$0/cgroup.procs"; exec python3 -c "$1"', str(path), code])
        started.append(process)
        while "populated 1" not in (path / "cgroup.events").read_text():
            pause(0.001)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def freeze(path: Path, state: str) -> None:
    (path / "cgroup.freeze").write_text(state)
    while f"frozen {state}" not in (path / "cgroup.events").read_text():
        pause(0.001)


@pytest.mark.kernel
def test_a_hand_over_without_overlap_is_clean_and_the_killed_original_no_second_copy(
    cgroup: Callable[[str], Path], spin: Callable[[Path], subprocess.Popen[bytes]]
) -> None:
    source, target = cgroup("source"), ROOT / f"watch-{os.getpid()}-target"
    original = spin(source)
    with Watch({"source": source, "target": target}) as watch:
        pause(0.05)
        freeze(source, "1")
        frozen_at = time.monotonic()
        assert cgroup("target") == target
        freeze(target, "1")
        spin(target)
        pause(0.02)
        freeze(target, "0")
        thawed_at = time.monotonic()
        pause(0.02)
        (source / "cgroup.kill").write_text("1")
        assert original.wait() == -signal.SIGKILL
        pause(0.02)
        watched = watch.stop()
    assert watched.overlaps == ()
    assert watched.double_run_ms == 0
    (ran,) = watched.running["source"][:1]
    assert abs(ran.end - frozen_at) < 0.02
    assert abs(watched.running["target"][-1].start - thawed_at) < 0.02
    assert watched.looks > 50
    assert watched.blind_ms < 100


@pytest.mark.kernel
def test_a_double_thaw_is_seen(cgroup: Callable[[str], Path], spin: Callable[[Path], subprocess.Popen[bytes]]) -> None:
    source, target = cgroup("source"), cgroup("target")
    spin(source)
    freeze(target, "1")
    spin(target)
    with Watch({"source": source, "target": target}) as watch:
        freeze(target, "0")
        start = time.monotonic()
        pause(0.03)
        freeze(source, "1")
        seconds = time.monotonic() - start
        watched = watch.stop()
    assert len(watched.overlaps) == 1
    assert abs(watched.double_run_ms - seconds * 1e3) < 20
    assert isinstance(watched.overlaps[0], Interval)


@pytest.mark.kernel
def test_stopped_and_dying_tasks_execute_nothing(
    cgroup: Callable[[str], Path], spin: Callable[[Path], subprocess.Popen[bytes]]
) -> None:
    path = cgroup("one")
    process = spin(path)
    side = Side(path)
    assert side.may_run()
    assert side.executes()
    freeze(path, "1")
    assert not side.may_run()
    os.kill(process.pid, signal.SIGSTOP)
    freeze(path, "0")
    pause(0.02)
    assert side.may_run()
    assert not side.executes()
    process.kill()
    pause(0.02)
    assert not side.executes()  # a zombie, until it is waited for
    side.close()
