"""Dump and restore of a real container through runc: it comes up frozen, or not at all."""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from criu_transfer import checkpoint, soundness, worker
from criu_transfer.checkpoint import Tools
from criu_transfer.errors import DeadlinePassed, DumpFailed, RestoreFailed
from criu_transfer.maps import read_maps
from criu_transfer.proctree import processes_of
from criu_transfer.restore import restore, write_criu_settings

pytestmark = [pytest.mark.criu, pytest.mark.kernel]

NAME = f"test-checkpoint-{os.getpid()}"
CGROUP = Path("/sys/fs/cgroup") / NAME
PARKING = Path("/sys/fs/cgroup") / f"{NAME}-parking"
WORKER = Path("/sys/fs/cgroup") / f"{NAME}-worker"
# Counts in a file, one line each millisecond; `extra` runs first.
COUNTER = """
import os, select
{extra}
out, number = os.open("/state/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 0
while True:
    os.write(out, b"%d\\n" % number)
    number += 1
    select.select([], [], [], 0.001)
"""
GHOST = """
ghost = os.open("/state/ghost", os.O_RDWR | os.O_CREAT)
os.unlink("/state/ghost")
os.pwrite(ghost, b"x" * (8 << 20), 0)
"""  # larger than CRIU takes along


def soon(seconds: float = 30) -> float:
    return time.monotonic() + seconds


def until(condition: Callable[[], object], what: str) -> None:
    deadline = soon()
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        select.select([], [], [], 0.002)


def frozen() -> bool:
    return "frozen 1" in (CGROUP / "cgroup.events").read_text()


def kill(cgroup: Path) -> None:
    if cgroup.exists():
        (cgroup / "cgroup.kill").write_text("1")
        until(lambda: "populated 0" in (cgroup / "cgroup.events").read_text(), f"{cgroup.name} is empty")


class Container:
    """One container that counts, over this very file system."""

    def __init__(self, directory: Path, tools: Tools) -> None:
        self.directory = directory
        self.tools = tools
        self.images = directory / "images"
        self.log = directory / "state/log"
        for name in ("rootfs", "state", "images"):
            (directory / name).mkdir()
        for name in ("lib", "lib64"):
            (directory / "rootfs" / name).symlink_to(f"usr/{name}")

    def start(self, extra: str = "") -> None:
        code = COUNTER.format(extra=extra)
        config = {
            "ociVersion": "1.2.0",
            "process": {
                "user": {"uid": 0, "gid": 0},
                "args": [sys.executable, "-S", "-c", code],
                "env": ["PATH=/usr/bin"],
                "cwd": "/",
            },
            "root": {"path": str(self.directory / "rootfs")},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                *(
                    {"destination": path, "type": "bind", "source": path, "options": ["rbind", "ro"]}
                    for path in ("/usr", "/opt")
                ),
                {
                    "destination": "/state",
                    "type": "bind",
                    "source": str(self.directory / "state"),
                    "options": ["bind", "rw"],
                },
            ],
            "annotations": {"org.criu.config": str(self.directory / "criu.conf")},
            "linux": {
                "cgroupsPath": f"/{NAME}",
                "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")],
            },
        }
        (self.directory / "config.json").write_text(json.dumps(config))
        (self.directory / "criu.conf").write_text("network-lock skip\n")
        null = subprocess.DEVNULL
        command = self.tools.runc("run", "--detach", "--bundle", str(self.directory), NAME)
        subprocess.run(command, check=True, stdin=null, stdout=null, stderr=null)
        until(lambda: self.count() > 5, "it counts")

    def count(self) -> int:
        """Count the lines; the state is that of one run without a gap or a repeat."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        assert lines == [str(number) for number in range(len(lines))]
        return len(lines)

    def freeze(self) -> None:
        (CGROUP / "cgroup.freeze").write_text("1")
        until(frozen, "it is frozen")

    def thaw(self) -> None:
        before = self.count()
        (CGROUP / "cgroup.freeze").write_text("0")
        until(lambda: self.count() > before + 5, "it goes on")

    def dump(self, deadline: float | None = None) -> None:
        checkpoint.dump(NAME, self.images, parent=None, tools=self.tools, deadline=deadline or soon())

    def delete(self) -> None:
        kill(CGROUP)
        subprocess.run(self.tools.runc("delete", "--force", NAME), check=True, capture_output=True)

    def settings(self, cgroup: Path = CGROUP, parking: Path = PARKING) -> None:
        write_criu_settings(self.directory, cgroup=cgroup, parking=parking)

    def restore(self, deadline: float | None = None) -> None:
        restore(NAME, self.directory, self.images, lazy=False, tools=self.tools, deadline=deadline or soon())


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Tools:
    directory = tmp_path_factory.mktemp("tools")
    made = checkpoint.prepare_tools(directory / "bin", directory / "runc", checkpoint.build_library(directory), soon())
    assert checkpoint.KERNEL_CACHE.exists()
    return made


@pytest.fixture
def container(tmp_path: Path, tools: Tools) -> Iterator[Container]:
    made = Container(tmp_path, tools)
    yield made
    made.delete()
    kill(PARKING)
    if PARKING.exists():
        PARKING.rmdir()


def test_a_container_is_dumped_frozen_and_restored_frozen_and_goes_on_where_it_was(container: Container) -> None:
    container.start()
    container.freeze()
    processes, count = processes_of(CGROUP), container.count()
    before = {process.pid: read_maps(process.pid) for process in processes}
    assert soundness.memory_bytes(processes) > 1 << 20
    container.dump()
    assert frozen()
    assert processes_of(CGROUP) == processes
    soundness.check(processes, before)  # CRIU has left no trace
    container.delete()
    container.settings()
    container.restore()
    assert frozen()
    assert [process.vpid for process in processes_of(CGROUP)] == [process.vpid for process in processes]
    assert container.count() == count
    assert not (PARKING / "cgroup.procs").read_text()  # CRIU and the script have gone
    container.thaw()


def test_the_source_of_a_dump_can_go_on(container: Container) -> None:
    container.start()
    container.freeze()
    container.dump()
    container.thaw()


@pytest.mark.parametrize("broken", ["parking", "cgroup"])
def test_a_restore_that_cannot_be_frozen_is_killed(broken: str, container: Container) -> None:
    container.start()
    container.freeze()
    container.dump()
    count = container.count()
    container.delete()
    if broken == "parking":
        container.settings(parking=Path("/proc/no-cgroup"))
    else:
        # The script sees a cgroup whose freezer it may not write: everything else in it is the real one.
        seen = container.directory / "seen"
        seen.mkdir()
        (seen / "cgroup.freeze").mkdir()
        for name in ("cgroup.kill", "cgroup.procs"):
            (seen / name).symlink_to(CGROUP / name)
        container.settings(cgroup=seen)
    with pytest.raises(RestoreFailed):
        container.restore()
    assert "pre-resume" in (container.images / "restore.log").read_text()
    until(lambda: not CGROUP.exists() or "populated 0" in (CGROUP / "cgroup.events").read_text(), "all is killed")
    assert container.count() == count  # it never ran


def test_a_dump_that_fails_names_criu_s_own_error_and_leaves_the_container_whole(container: Container) -> None:
    container.start(extra=GHOST)
    container.freeze()
    processes = processes_of(CGROUP)
    before = {process.pid: read_maps(process.pid) for process in processes}
    with pytest.raises(DumpFailed, match=r"runc checkpoint failed.*; CRIU: .*ghost file"):
        container.dump()
    assert frozen()
    soundness.check(processes, before)
    container.thaw()


def test_a_restore_that_fails_names_criu_s_own_error(container: Container) -> None:
    container.start()
    container.freeze()
    container.dump()
    container.delete()
    container.settings()
    next(container.images.glob("core-*.img")).unlink()
    with pytest.raises(RestoreFailed, match=r"runc restore failed.*; CRIU: .*Unexpected EOF"):
        container.restore()


def test_no_step_begins_after_its_deadline(container: Container) -> None:
    with pytest.raises(DeadlinePassed, match="no time left for runc checkpoint"):
        container.dump(soon(-1))
    with pytest.raises(DeadlinePassed, match="no time left for runc restore"):
        container.restore(soon(-1))


def test_at_the_deadline_the_command_is_killed(tmp_path: Path, tools: Tools) -> None:
    script = f"echo $$ >{tmp_path}/pid; exec sleep 1000"
    with pytest.raises(DeadlinePassed, match="the dump was stopped at the deadline"):
        checkpoint.run(["sh", "-c", script], tools, soon(0.2), DumpFailed, "the dump")
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_at_the_deadline_a_worker_s_children_are_waited_for_and_never_killed(
    tmp_path: Path, tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = replace(tools, worker=WORKER)
    child = f"(sleep 0.3; echo done >{tmp_path}/ended) & exec sleep 1000"
    with pytest.raises(DeadlinePassed, match="the dump was stopped at the deadline"):
        checkpoint.run(["sh", "-c", child], inside, soon(0.1), DumpFailed, "the dump")
    assert (tmp_path / "ended").read_text() == "done\n"
    monkeypatch.setattr(checkpoint, "AFTERMATH", 0.2)
    with pytest.raises(DeadlinePassed):
        checkpoint.run(["sh", "-c", "sleep 1000 & exec sleep 1000"], inside, soon(0.1), DumpFailed, "the dump")
    assert not worker.wait_empty(WORKER, soon(0)), "a CRIU that is killed leaves its parasite in the processes"
    monkeypatch.setattr(worker, "KILL_SECONDS", 0.1)
    worker.end(WORKER, soon(0.2))
    assert not WORKER.exists()


def test_a_dump_that_is_stopped_at_its_deadline_leaves_the_container_whole(container: Container) -> None:
    container.start(extra="memory = b'x' * (256 << 20)")
    container.freeze()
    processes = processes_of(CGROUP)
    before = {process.pid: read_maps(process.pid) for process in processes}
    container.tools = replace(container.tools, worker=WORKER)
    with pytest.raises(DeadlinePassed):
        container.dump(soon(0.04))
    soundness.check(processes, before)
    assert frozen()
    container.thaw()


def test_a_command_s_last_words_are_in_the_error(tools: Tools) -> None:
    with pytest.raises(DumpFailed, match=r"the dump failed \(3\): .*no such thing"):
        checkpoint.run(["sh", "-c", "echo no such thing >&2; exit 3"], tools, soon(), DumpFailed, "the dump")
    assert checkpoint.run(["sh", "-c", "command -v criu"], tools, soon(), DumpFailed, "x").strip() == str(
        tools.criu_dir / "criu"
    )


def test_the_last_error_lines_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "dump.log"
    assert checkpoint.last_errors(log) == ""
    log.write_bytes(b"(00.1) fine\n" + b"".join(b"(00.2) Error (x.c:%d): \xff bad\n" % n for n in range(7)))
    assert checkpoint.last_errors(log).split(" | ") == [f"(00.2) Error (x.c:{n}): \ufffd bad" for n in range(2, 7)]


def test_the_settings_of_a_restore(tmp_path: Path) -> None:
    path = write_criu_settings(tmp_path, cgroup=CGROUP, parking=PARKING)
    script = tmp_path / "freeze-at-resume"
    assert path.read_text() == f"network-lock skip\naction-script {script}\n"
    assert os.access(script, os.X_OK)
    environment = {"PATH": os.environ["PATH"], "CRTOOLS_SCRIPT_ACTION": "post-dump"}
    assert subprocess.run([str(script)], env=environment, check=False).returncode == 0  # nothing to do for others
    assert not PARKING.exists()
