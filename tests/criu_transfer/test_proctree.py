"""Processes found through real cgroups."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from criu_transfer.proctree import Process, is_alive, processes_of, read_process

pytestmark = pytest.mark.kernel

SLEEPER = [sys.executable, "-c", "import signal; print('up', flush=True); signal.pause()"]


@pytest.fixture
def cgroup() -> Iterator[Path]:
    top = Path("/sys/fs/cgroup/test-proctree")
    inner = top / "a" / "b"
    inner.mkdir(parents=True)
    yield top
    for directory in (inner, top / "a", top):
        directory.rmdir()


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    children: list[subprocess.Popen[bytes]] = []
    yield children
    for child in children:
        child.kill()
        child.wait()
        if child.stdout:
            child.stdout.close()


def sleeper(children: list[subprocess.Popen[bytes]], *prefix: str) -> subprocess.Popen[bytes]:
    child = subprocess.Popen([*prefix, *SLEEPER], stdout=subprocess.PIPE)
    children.append(child)
    assert child.stdout
    child.stdout.readline()
    return child


def test_processes_of_a_cgroup_and_those_below(cgroup: Path, sleepers: list[subprocess.Popen[bytes]]) -> None:
    pids = [sleeper(sleepers).pid for _ in range(3)]
    for pid, directory in zip(pids, (cgroup, cgroup / "a", cgroup / "a" / "b"), strict=True):
        (directory / "cgroup.procs").write_text(str(pid))
    found = processes_of(cgroup)
    assert [process.pid for process in found] == sorted(pids)
    assert [process.vpid for process in found] == sorted(pids)
    assert all(is_alive(process) for process in found)


def test_zombies_are_left_out(cgroup: Path, sleepers: list[subprocess.Popen[bytes]]) -> None:
    child = sleeper(sleepers)
    (cgroup / "cgroup.procs").write_text(str(child.pid))
    (process,) = processes_of(cgroup)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert processes_of(cgroup) == []
    assert not is_alive(process)


def test_a_process_whose_main_thread_has_exited_is_no_zombie(sleepers: list[subprocess.Popen[bytes]]) -> None:
    program = """
import ctypes, threading, time
def other():
    while open('/proc/self/stat').read().rpartition(')')[2].split()[0] != 'Z': time.sleep(0.001)
    print('up', flush=True)
    time.sleep(60)
threading.Thread(target=other).start()
ctypes.CDLL(None).pthread_exit(None)
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    sleepers.append(child)
    assert child.stdout
    child.stdout.readline()
    process = read_process(child.pid)
    assert process is not None
    assert is_alive(process)


def test_vpid_is_what_the_process_sees_itself_as(sleepers: list[subprocess.Popen[bytes]]) -> None:
    outer = subprocess.Popen(["unshare", "--pid", "--fork", "--kill-child", *SLEEPER], stdout=subprocess.PIPE)
    sleepers.append(outer)
    assert outer.stdout
    outer.stdout.readline()
    (inner,) = (int(word) for word in Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split())
    process = read_process(inner)
    assert process is not None
    assert (process.pid, process.vpid) == (inner, 1)


def test_a_name_may_look_like_fields(tmp_path: Path) -> None:
    program = tmp_path / "x) Z 1 ("
    program.symlink_to("/usr/bin/sleep")
    child = subprocess.Popen([program, "60"])
    process = read_process(child.pid)
    assert process is not None
    assert (process.pid, process.vpid) == (child.pid, child.pid)
    child.kill()
    child.wait()


def test_another_process_with_the_same_pid_is_not_alive() -> None:
    process = read_process(os.getpid())
    assert process is not None
    assert is_alive(process)
    assert not is_alive(Process(process.pid, process.vpid, process.starttime - 1))
    assert read_process(0) is None


def test_a_missing_cgroup_is_an_error() -> None:
    with pytest.raises(FileNotFoundError):
        processes_of("/sys/fs/cgroup/no-such-group")
