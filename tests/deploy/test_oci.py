"""The container image's packer."""

import gzip
import hashlib
import importlib.util
import io
import json
import os
import socket
import tarfile
from pathlib import Path
from typing import Any

import pytest

_spec = importlib.util.spec_from_file_location("oci", Path(__file__).parents[2] / "deploy/image/oci.py")
assert _spec
assert _spec.loader
oci = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oci)

CONFIG = {"Entrypoint": ["/bin/tool"], "Labels": {"a": "b=c"}}


def make_tree(root: Path, *, backwards: bool = False) -> Path:
    """Make a directory with every kind of entry; `backwards`: the same by another order, at another time."""
    root.mkdir()
    names = ["z", "bin/tool", "bin/a ünicode", "bin.d/x", "a" * 150]
    for name in reversed(names) if backwards else names:
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
        os.utime(path, (7, 7 if backwards else 1e9))
    (root / "bin/tool").chmod(0o4755)
    (root / "empty").mkdir(mode=0o700)
    (root / "link").symlink_to("/nowhere/absolute")
    (root / "dirlink").symlink_to("bin")
    (root / "same").hardlink_to(root / "z")
    return root


def pack(archive: Path, *layers: Path) -> Path:
    oci.pack(archive, layers, CONFIG, 86400, "name:1")
    return archive


def read(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar if m.isreg()}  # type: ignore[union-attr]  # regular files


def test_the_same_content_makes_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = pack(tmp_path / "one.tar", make_tree(tmp_path / "one/layer"))
    two = pack(tmp_path / "two.tar", make_tree(tmp_path / "two/layer", backwards=True))
    assert one.read_bytes() == two.read_bytes()
    (tmp_path / "two/layer/z").chmod(0o600)
    assert pack(two, tmp_path / "two/layer").read_bytes() != one.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "one.tar", "two.tar"}


def test_the_archive_is_an_image_layout(tmp_path: Path) -> None:
    lower, upper = make_tree(tmp_path / "lower"), make_tree(tmp_path / "upper")
    (upper / "more").touch()
    files = read(pack(tmp_path / "image.tar", lower, upper))
    assert json.loads(files["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}

    def blob(descriptor: dict[str, Any]) -> bytes:
        kind, _, name = descriptor["digest"].partition(":")
        content = files.pop(f"blobs/{kind}/{name}")
        assert (kind, name, descriptor["size"]) == ("sha256", hashlib.sha256(content).hexdigest(), len(content))
        return content

    (top,) = json.loads(files["index.json"])["manifests"]
    assert top["annotations"] == {"org.opencontainers.image.ref.name": "name:1"}
    assert top["platform"] == {
        "os": "linux",
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine],
    }
    manifest = json.loads(blob(top))
    image = json.loads(blob(manifest["config"]))
    packed = [blob(layer) for layer in manifest["layers"]]
    assert {layer[3:8] for layer in packed} == {bytes(5)}  # RFC 1952: no file name, no time
    layers = [gzip.decompress(layer) for layer in packed]
    assert image["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers]
    assert (image["created"], image["config"]) == ("1970-01-02T00:00:00Z", CONFIG)
    assert [layer["mediaType"] for layer in manifest["layers"]] == ["application/vnd.oci.image.layer.v1.tar+gzip"] * 2
    assert set(files) == {"index.json", "oci-layout"}  # no blob that nothing names

    with tarfile.open(fileobj=io.BytesIO(layers[0])) as tar:
        members = {member.name: member for member in tar}
    assert "more" not in members
    assert list(members) == sorted(members, key=lambda name: name.split("/"))
    assert {(m.mtime, m.uname, m.gname) for m in members.values()} == {(0, "", "")}
    assert (members["bin/tool"].mode, members["empty"].mode) == (0o4755, 0o700)
    assert (members["link"].linkname, members["dirlink"].issym()) == ("/nowhere/absolute", True)
    assert (members["z"].islnk(), members["z"].linkname) == (True, "same")


def test_unpacking_gives_the_layers_one_over_the_other(tmp_path: Path) -> None:
    lower, upper, target = make_tree(tmp_path / "lower"), tmp_path / "upper", tmp_path / "target"
    (upper / "bin").mkdir(parents=True)
    (upper / "bin/tool").write_text("newer")
    target.mkdir()
    archive = pack(tmp_path / "image.tar", lower, upper)
    assert oci.unpack(archive, target)["config"] == CONFIG
    assert {p.relative_to(target) for p in target.rglob("*")} == {p.relative_to(lower) for p in lower.rglob("*")}
    assert (target / "bin/tool").read_text() == "newer"
    assert (target / ("a" * 150)).read_text() == "a" * 150
    assert (target / "z").samefile(target / "same")
    assert (target / "link").readlink() == Path("/nowhere/absolute")
    assert (target / "empty").stat().st_mode & 0o7777 == 0o700


def test_a_damaged_layer_is_refused(tmp_path: Path) -> None:
    archive = pack(tmp_path / "image.tar", make_tree(tmp_path / "layer"))
    with tarfile.open(archive) as tar:
        largest = max(tar, key=lambda member: member.size)
    content = bytearray(archive.read_bytes())
    content[largest.offset_data + largest.size // 2] ^= 1
    archive.write_bytes(content)
    (tmp_path / "target").mkdir()
    with pytest.raises(ValueError, match="is damaged"):
        oci.unpack(archive, tmp_path / "target")


@pytest.mark.parametrize("kind", ["pipe", "socket", "removal"])
def test_what_a_layer_cannot_hold_is_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_tree(tmp_path / "layer")
    if kind == "pipe":
        os.mkfifo(layer / "x")
    elif kind == "socket":
        monkeypatch.chdir(layer)  # a socket's path is short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("x")
    else:
        (layer / ".wh.x").touch()
    with pytest.raises(ValueError, match="cannot be part of a layer"):
        pack(tmp_path / "image.tar", layer)
    assert not (tmp_path / "image.tar").exists()


def test_the_command_line(tmp_path: Path) -> None:
    make_tree(tmp_path / "layer")
    archive, target = str(tmp_path / "image.tar"), tmp_path / "target"
    oci.main([
        "pack", archive, str(tmp_path / "layer"), "--name", "n:2", "--created", "1",
        "--entrypoint=python", "--entrypoint=-m", "--env", "PATH=/bin", "--label", "a=b=c",
    ])  # fmt: skip
    oci.main(["unpack", archive, str(tmp_path)])
    assert (tmp_path / "same").read_text() == "z"
    target.mkdir()
    assert oci.unpack(Path(archive), target)["config"] == {
        "Entrypoint": ["python", "-m"], "Env": ["PATH=/bin"], "Labels": {"a": "b=c"}, "WorkingDir": "/",
    }  # fmt: skip
