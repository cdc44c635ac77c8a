"""The program that runs runc in a cgroup of its own."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from criu_transfer import checkpoint
from criu_transfer.keeper import kill_cgroup

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.build_in_cgroup(tmp_path_factory.mktemp("in-cgroup"))


@pytest.fixture
def group() -> Iterator[Path]:
    path = Path(f"/sys/fs/cgroup/test-in-cgroup-{os.getpid()}")
    path.mkdir()
    yield path
    kill_cgroup(path)
    path.rmdir()


def test_a_command_is_born_in_the_group_and_its_end_is_told(program: Path, group: Path) -> None:
    command = ["sh", "-c", "cat /proc/self/cgroup; exit 7"]
    done = subprocess.run([program, group, *command], capture_output=True, text=True, check=False)
    assert f"0::/{group.name}\n" in done.stdout
    assert done.returncode == 7


def test_a_command_that_was_killed_tells_the_signal(program: Path, group: Path) -> None:
    done = subprocess.run([program, group, "sh", "-c", "kill -9 $$"], check=False)
    assert done.returncode == 128 + signal.SIGKILL


def test_the_command_ends_with_the_program(program: Path, group: Path) -> None:
    with subprocess.Popen([program, group, "sh", "-c", "echo on; exec sleep 60"], stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"on\n"
        assert (group / "cgroup.procs").read_text().strip() not in {"", str(running.pid)}
        running.kill()
        assert running.stdout.read() == b""  # closed by the last holder's end


@pytest.mark.parametrize("arguments", [["/sys/fs/cgroup/absent", "true"], ["GROUP", "/absent"], []])
def test_what_cannot_be_run_is_told(program: Path, group: Path, arguments: list[str]) -> None:
    words = [str(group) if word == "GROUP" else word for word in arguments]
    done = subprocess.run([program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 127
    assert "in_cgroup" in done.stderr
