"""The workloads' descriptions hold together."""

import subprocess
from pathlib import Path

import pytest

from spotguard.lab.workloads import Volume, Workload, java, postgres, prepare, redis


@pytest.mark.parametrize("workload", [redis(), postgres(), java()], ids=lambda w: w.name)
def test_everything_named_is_below_a_volume(workload: Workload) -> None:
    mounts = tuple(volume.mount_path + "/" for volume in workload.volumes)
    assert all(path.startswith(mounts) for path in workload.files)
    assert workload.command[0].startswith("/")
    assert workload.client[0] == workload.name
    assert workload.memory_hint_bytes > 0


def test_only_postgres_needs_its_own_ipc_namespace() -> None:
    assert [w.name for w in (redis(), postgres(), java()) if w.needs_ipc_namespace] == ["postgres"]


def test_preparing_puts_the_node_s_paths_in_place_of_the_container_s(public_path: Path) -> None:
    workload = Workload(
        name="x", command=("/bin/true",), port=1, client=("x",), memory_hint_bytes=1, user=(1234, 1235),
        volumes=(Volume("data", "/inside"),), files={"/inside/file": "content"},
        setup=(
            ("/bin/cp", "/inside/file", "/inside/copy"),
            ("/bin/sh", "-c", 'id -u >"$0"; id -G >>"$0"', "/inside/id"),
        ),
    )  # fmt: skip
    prepare(workload, {"data": public_path / "volume"})
    assert (public_path / "volume/copy").read_text() == "content"
    assert (public_path / "volume/id").read_text().split() == ["1234", "1235"]
    assert (public_path / "volume").stat().st_uid == 1234


def test_a_failing_setup_says_why(public_path: Path) -> None:
    workload = Workload(
        name="x", command=("/bin/true",), port=1, client=("x",), memory_hint_bytes=1,
        setup=(("/bin/sh", "-c", "echo broken >&2; exit 3"),),
    )  # fmt: skip
    with pytest.raises(subprocess.CalledProcessError) as e:
        prepare(workload, {})
    assert e.value.stderr == "broken\n"
