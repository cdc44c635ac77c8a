import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from handlers import cgroup
from handlers.cgroup import Cgroup, FreezerV1
from handlers.errors import GiveUp

MEMORY_V1 = Path("/run/cgroup1/memory")


def soon(seconds: float = 5) -> float:
    return time.monotonic() + seconds


@pytest.fixture
def group():
    made = Cgroup.create(cgroup.ROOT / f"test-{os.getpid()}")
    yield made
    made.kill(soon())
    made.remove(soon())


@pytest.fixture
def counter():
    """A process that writes one byte per millisecond to its stdout."""
    code = "import os, select\nwhile True: os.write(1, b'.'); select.select([], [], [], 0.001)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        process.stdout.read(1)
        yield process
        process.kill()


def running(process) -> bool:
    """Empty its pipe, then see whether more comes within 50 ms."""
    os.set_blocking(process.stdout.fileno(), False)
    while process.stdout.read(65536):
        pass
    return bool(select.select([process.stdout], [], [], 0.05)[0])


@pytest.mark.kernel
def test_a_frozen_group_stands_still_and_goes_on_when_thawed(group, counter):
    group.attach(counter.pid)
    assert (group.populated, group.frozen, group.pids()) == (True, False, [counter.pid])
    assert cgroup.of_process(counter.pid) == group.path
    group.freeze(soon())
    assert group.frozen
    assert not running(counter)
    group.thaw(soon())
    assert not group.frozen
    assert running(counter)


@pytest.mark.kernel
def test_groups_below_freeze_and_end_with_it(group, counter):
    below = Cgroup.create(group.path / "one" / "two")
    below.attach(counter.pid)
    group.freeze(soon())
    assert below.frozen
    assert group.pids() == [counter.pid]
    assert not running(counter)
    group.kill(soon())
    assert (group.populated, group.pids()) == (False, [])
    group.remove(soon())
    assert not group.path.exists()
    group.remove(soon())
    group.kill(soon())


@pytest.mark.kernel
def test_waiting_ends_at_the_deadline(group, counter):
    group.attach(counter.pid)
    with pytest.raises(GiveUp, match="populated"):
        group.remove(soon(0.02))
    below = Cgroup.create(group.path / "below")
    below.attach(counter.pid)
    group.freeze(soon())
    with pytest.raises(GiveUp, match="frozen"):
        below.thaw(soon(0.02))
    group.thaw(soon())


def test_a_freeze_that_does_not_finish_is_undone(tmp_path):
    (tmp_path / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    with pytest.raises(GiveUp, match="frozen"):
        Cgroup(tmp_path).freeze(soon(0.01))
    assert (tmp_path / "cgroup.freeze").read_text() == "0"


@pytest.mark.kernel
def test_freezing_takes_little_time(group, counter):
    group.attach(counter.pid)
    spent = []
    for _ in range(10):
        start = time.perf_counter()
        group.freeze(soon())
        spent.append(time.perf_counter() - start)
        group.thaw(soon())
    print(f"freeze {sorted(spent)[5] * 1e3:.2f} ms")
    assert min(spent) < 0.01


@pytest.mark.kernel
@pytest.mark.skipif(not MEMORY_V1.is_dir(), reason="no version 1 memory controller here")
def test_memory_is_limited_by_version_1():
    name = f"test-memory-{os.getpid()}"
    made = Cgroup.create(cgroup.ROOT / name, memory_max=16 << 20, memory_v1=MEMORY_V1 / name)
    code = "import sys; sys.stdin.read(1); x = bytearray(64 << 20); print('survived')"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as greedy:
        made.attach(greedy.pid)
        output, _ = greedy.communicate(b"x", timeout=20)
    assert output == b""
    assert greedy.returncode == -9
    assert made.memory_usage() <= 16 << 20
    made.remove(soon())
    assert not (MEMORY_V1 / name).exists()


@pytest.mark.kernel
@pytest.mark.skipif((cgroup.ROOT / "memory.stat").exists(), reason="version 2 has the controller here")
def test_a_limit_that_nobody_would_hold_is_refused(group):
    with pytest.raises(GiveUp, match="memory controller"):
        Cgroup.create(group.path / "below", memory_max=1 << 20)
    with pytest.raises(GiveUp, match="memory controller"):
        group.memory_usage()


def test_memory_is_limited_by_version_2(tmp_path):
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("4096\n")
    made = Cgroup.create(tmp_path, memory_max=1 << 20)
    assert (tmp_path / "memory.max").read_text() == str(1 << 20)
    assert made.memory_usage() == 4096


def test_the_memory_controller_is_passed_down_to_a_limited_group(tmp_path):
    """As on a machine with version 2 alone; plain files stand for the kernel's, which is not such a one here."""
    root, helpers = tmp_path / "root", tmp_path / "root/helpers"
    group = helpers / "one"
    group.mkdir(parents=True)
    for directory, passed_on in ((root, "cpu memory"), (helpers, "cpu")):
        (directory / "cgroup.controllers").write_text("cpu memory pids")
        (directory / "cgroup.subtree_control").write_text(passed_on)
    (group / "memory.max").write_text("max")
    (group / "memory.swap.max").write_text("max")
    Cgroup.create(group, memory_max=5 << 20)
    assert (root / "cgroup.subtree_control").read_text() == "cpu memory", "it has it on already"
    assert (helpers / "cgroup.subtree_control").read_text() == "+memory"
    assert (group / "memory.max").read_text() == str(5 << 20)
    assert (group / "memory.swap.max").read_text() == "0", "memory images must not reach a disk"


def test_a_process_that_is_gone_is_in_no_group():
    with pytest.raises(GiveUp, match="gone"):
        cgroup.of_process(2**22)


def test_the_freezer_of_version_1_waits_until_frozen(tmp_path):
    state = tmp_path / "freezer.state"
    state.write_text("THAWED\n")
    freezer = FreezerV1(tmp_path)
    freezer.freeze(soon())
    assert freezer.frozen
    freezer.thaw(soon())
    assert not freezer.frozen


class StuckFreezer(FreezerV1):
    """Some task never stops."""

    def _state(self) -> str:
        return "FREEZING"


def test_the_freezer_of_version_1_thaws_what_it_could_not_freeze(tmp_path):
    with pytest.raises(GiveUp, match="did not freeze"):
        StuckFreezer(tmp_path).freeze(soon(0.01))
    assert (tmp_path / "freezer.state").read_text() == "THAWED"
    with pytest.raises(GiveUp, match="did not thaw"):
        StuckFreezer(tmp_path).thaw(soon(0.01))
