"""runc itself: what runs, what is there, what it says when it fails."""

import json
import os
import select
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from handlers import bundle as bundles
from handlers import cgroup
from handlers.bundle import PodManifest, VolumeMount
from handlers.cgroup import Cgroup
from handlers.errors import GiveUp
from handlers.runtime import Container, Runc

pytestmark = pytest.mark.criu
PARENT = cgroup.ROOT / f"test-runtime-{os.getpid()}"


def soon(seconds: float = 20) -> float:
    return time.monotonic() + seconds


class Pods:
    """Bundles over this very file system; their containers write to a fifo when they run."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.runc = Runc(directory / "runc")

    def bundle(self, name: str, *command: str) -> Path:
        manifest = PodManifest(name, "127.0.0.1", command, volumes=(VolumeMount("report", "/report"),))
        made = bundles.create(
            manifest, self.directory / name, netns=Path("/proc/self/ns/net"), cgroup=f"/{PARENT.name}/{name}"
        )
        bundles.mount_rootfs(made, Path("/"))
        os.mkfifo(made.volume("report") / "fifo")
        return made.directory

    def wait_for_line(self, name: str) -> bytes:
        fifo = os.open(self.directory / name / "volumes/report/fifo", os.O_RDWR | os.O_NONBLOCK)
        try:
            assert select.select([fifo], [], [], 20)[0], "the container says nothing"
            return os.read(fifo, 4096)
        finally:
            os.close(fifo)


@pytest.fixture
async def pods(tmp_path: Path) -> AsyncIterator[Pods]:
    made = Pods(tmp_path)
    PARENT.mkdir()
    yield made
    for directory in tmp_path.iterdir():
        if (directory / "config.json").exists():
            await made.runc.delete(directory.name, soon())
            bundles.destroy(directory)
    group = Cgroup(PARENT)
    group.kill(soon())
    group.remove(soon())


async def test_a_container_runs_detached_is_seen_and_is_gone(pods: Pods) -> None:
    runc = pods.runc
    assert await runc.containers(soon()) == []
    script = "ls -l /proc/self/fd >/report/fifo; exec sleep 1000"
    await runc.run("one", pods.bundle("one", "/bin/sh", "-c", script), soon())
    opened = [line.split("-> ")[1] for line in pods.wait_for_line("one").decode().splitlines() if "->" in line]
    assert opened[0] == opened[2] == "/dev/null"
    assert all(path in {"/dev/null", "/report/fifo"} or path.startswith("/proc/") for path in opened), opened
    found = await runc.container("one", soon())
    assert (found.name, found.status, found.bundle) == ("one", "running", pods.directory / "one")
    assert cgroup.of_process(found.pid) == PARENT / "one"
    assert await runc.containers(soon()) == [found]
    await runc.delete("one", soon())
    assert await runc.container("one", soon()) == Container("one", "absent", 0, Path())
    assert not Path(f"/proc/{found.pid}").exists()
    await runc.delete("one", soon())  # an absent one is no error


async def test_a_frozen_container_is_seen_as_paused_and_can_be_deleted(pods: Pods) -> None:
    await pods.runc.run("one", pods.bundle("one", "/bin/sleep", "1000"), soon())
    Cgroup(PARENT / "one").freeze(soon())
    assert (await pods.runc.container("one", soon())).status == "paused"
    Cgroup(PARENT / "one").kill(soon())
    await pods.runc.delete("one", soon())
    assert await pods.runc.containers(soon()) == []


async def test_a_container_that_has_ended_is_stopped(pods: Pods) -> None:
    await pods.runc.run("one", pods.bundle("one", "/bin/sleep", "1000"), soon())
    Cgroup(PARENT / "one").kill(soon())
    found = await pods.runc.container("one", soon())
    assert (found.status, found.pid) == ("stopped", 0)


async def test_runcs_own_words_are_in_the_error(pods: Pods) -> None:
    directory = pods.bundle("one", "/no/such/program")
    with pytest.raises(GiveUp, match=r"runc run failed \(1\): .*/no/such/program"):
        await pods.runc.run("one", directory, soon())
    with pytest.raises(GiveUp, match=r"config\.json"):
        await pods.runc.run("two", pods.directory, soon())
    config = json.loads((directory / "config.json").read_text())
    config["process"]["args"] = ["/bin/true"]
    (directory / "config.json").write_text(json.dumps(config))
    await pods.runc.run("one", directory, soon())  # nothing was left behind


async def test_at_the_deadline_runc_is_killed(pods: Pods, monkeypatch: pytest.MonkeyPatch) -> None:
    pods.runc.root.mkdir()
    slow = pods.directory / "bin"
    slow.mkdir()
    (slow / "runc").write_text(f"#!/bin/sh\necho $$ >{slow}/pid\nexec sleep 1000\n")
    (slow / "runc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow}:{os.environ['PATH']}")
    with pytest.raises(GiveUp, match="runc list did not end before its deadline"):
        await pods.runc.containers(soon(0.3))
    assert not Path(f"/proc/{(slow / 'pid').read_text().strip()}").exists()
