"""Manifests that peers send, and bundles on a real overlay."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers import bundle as bundles
from handlers.bundle import Bundle, PodManifest, VolumeMount
from handlers.errors import GiveUp

MANIFEST = PodManifest(
    name="redis-0",
    address="10.77.1.10",
    command=("/usr/bin/redis-server", "--port", "6379"),
    env={"LANG": "C"},
    uid=999,
    gid=998,
    volumes=(VolumeMount("data", "/var/lib/redis"),),
    tmpfs=("/tmp",),
    memory_bytes=256 << 20,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FIELDS = tuple(MANIFEST.to_json())


def changed(**changes: Any) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(json.dumps(MANIFEST.to_json()))
    return raw | changes


def test_a_manifest_comes_through_json_as_it_was() -> None:
    assert PodManifest.from_json(changed()) == MANIFEST
    least = PodManifest.from_json({"name": "a", "address": "::1", "command": ["/bin/true"]})
    assert least == PodManifest("a", "::1", ("/bin/true",))


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "a b", "a,b", "a:b", "a\n", "a\0", "-a", "-", "é", "x" * 64]
)
def test_names_become_paths_and_arguments_and_are_strict(name: str) -> None:
    with pytest.raises(GiveUp, match=r"is no (name|text)"):
        PodManifest.from_json(changed(name=name))
    with pytest.raises(GiveUp, match=r"is no (name|text)"):
        PodManifest.from_json(changed(volumes=[{"name": name, "path": "/data"}]))


@pytest.mark.parametrize(
    "changes",
    [
        {"address": "redis"},
        {"address": "10.77.1.10/32"},
        {"address": "10.77.1.10\nlink set lo down"},
        {"command": "/bin/sh"},
        {"command": []},
        {"uid": -1},
        {"gid": 1 << 32},
        {"uid": "root"},
        {"memory_bytes": float("inf")},
        {"memory_bytes": float("nan")},
        {"memory_bytes": 0},
        {"volumes": [{"name": "data"}]},
        {"volumes": ["data"]},
        {"volumes": [{"name": "data", "path": "relative"}]},
        {"volumes": [{"name": "data", "path": "/a"}, {"name": "data", "path": "/b"}]},
        {"tmpfs": "/tmp"},
        {"tmpfs": ["tmp"]},
        {"env": []},
        {"env": {"A=B": "c"}},
        {"env": None},
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(GiveUp, match="pod manifest"):
        PodManifest.from_json(changed(**changes))


@given(st.sampled_from(FIELDS), JSON)
def test_whatever_a_field_holds_only_give_up_escapes(field: str, value: Any) -> None:
    try:
        manifest = PodManifest.from_json(changed(**{field: value}))
    except GiveUp:
        return
    assert PodManifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    config = bundles.oci_config(manifest, Bundle(Path("/b")), netns=Path("/n"), cgroup="/c", image_layer=True)
    assert json.loads(json.dumps(config)) == config


@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=4), JSON, max_size=9))
def test_whatever_an_object_holds_only_give_up_escapes(raw: dict[str, Any]) -> None:
    try:
        PodManifest.from_json(raw)
    except GiveUp:
        return


def test_the_configuration_says_what_the_manifest_asks_for() -> None:
    config = bundles.oci_config(
        MANIFEST, Bundle(Path("/pods/redis-0")), netns=Path("/run/netns/x"), cgroup="/sg/pods/redis-0", image_layer=True
    )
    process = config["process"]
    assert process["user"] == {"uid": 999, "gid": 998}
    assert process["args"] == list(MANIFEST.command)
    assert process["env"] == ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/tmp", "LANG=C"]
    assert process["capabilities"].keys() == {"bounding"}  # none in effect for a user that is not root
    mounts = {mount["destination"]: mount for mount in config["mounts"]}
    assert mounts["/var/lib/redis"]["source"] == "/pods/redis-0/volumes/data"
    assert [mounts[path]["source"] for path in ("/dev/shm", "/tmp")] == [
        "/pods/redis-0/memory/0", "/pods/redis-0/memory/1"
    ]  # fmt: skip
    assert {"type": "network", "path": "/run/netns/x"} in config["linux"]["namespaces"]
    assert config["linux"]["cgroupsPath"] == "/sg/pods/redis-0"
    assert config["annotations"] == {"org.criu.config": "/pods/redis-0/criu.conf"}
    refused = config["linux"]["seccomp"]["syscalls"][0]["names"]
    assert {"io_uring_setup", "userfaultfd"} <= set(refused)


def test_the_trees_that_move_are_the_writable_layer_the_volumes_and_what_is_in_memory() -> None:
    bundle = Bundle(Path("/pods/redis-0"))
    assert bundle.trees(MANIFEST) == {
        "upper": Path("/pods/redis-0/upper"),
        "volume-data": Path("/pods/redis-0/volumes/data"),
        "memory-0": Path("/pods/redis-0/memory/0"),
        "memory-1": Path("/pods/redis-0/memory/1"),
    }


def make_image(directory: Path) -> Path:
    image = directory / "image"
    (image / "etc").mkdir(parents=True)
    (image / "etc/issue").write_text("of the image")
    return image


@pytest.mark.kernel
def test_a_bundle_is_made_written_to_and_unmade(tmp_path: Path) -> None:
    image, directory = make_image(tmp_path), tmp_path / "pods/redis-0"
    made = bundles.create(MANIFEST, directory, netns=Path("/run/netns/x"), cgroup="/sg/pods/redis-0")
    bundles.mount_rootfs(made, image)
    try:
        assert made.rootfs.is_mount()
        assert (made.rootfs / "etc/issue").read_text() == "of the image"
        (made.rootfs / "etc/issue").write_text("of the pod")
        assert (made.upper / "etc/issue").read_text() == "of the pod"
        assert (image / "etc/issue").read_text() == "of the image"
        assert list(made.volume("data").iterdir()) == []
        assert made.manifest() == MANIFEST
        assert made.config()["root"] == {"path": str(made.rootfs), "readonly": False}
        again = bundles.create(MANIFEST, directory, netns=Path("/run/netns/x"), cgroup="/sg/pods/redis-0")
        bundles.mount_rootfs(again, image)
        assert (again.rootfs / "etc/issue").read_text() == "of the pod"
    finally:
        bundles.destroy(directory)
    assert not directory.exists()
    assert (image / "etc/issue").read_text() == "of the image"
    bundles.destroy(directory)


@pytest.mark.kernel
def test_a_bundle_without_an_image_is_refused_with_mounts_words_and_can_be_unmade(tmp_path: Path) -> None:
    directory = tmp_path / "pods/redis-0"
    with pytest.raises(GiveUp, match=r"cannot mount the root file system in .*redis-0: .*overlay"):
        bundles.mount_rootfs(bundles.create(MANIFEST, directory, netns=Path("/n"), cgroup="/c"), tmp_path / "none")
    bundles.destroy(directory)
    assert not directory.exists()


@pytest.mark.kernel
def test_what_is_open_in_a_bundle_does_not_keep_it_from_being_unmade(tmp_path: Path) -> None:
    directory = tmp_path / "pods/redis-0"
    made = bundles.create(MANIFEST, directory, netns=Path("/n"), cgroup="/c")
    bundles.mount_rootfs(made, make_image(tmp_path))
    with (made.rootfs / "etc/issue").open():
        bundles.destroy(directory)
    assert not directory.exists()
