"""Packs directories as the layers of an OCI image archive, and unpacks such an archive.

The same directories make the same bytes: names are sorted, times are zero, users are numbers. The format is that of the
OCI image specification 1.1 (image-layout, manifest, config). Runs with nothing but Python's standard library.
"""

import argparse
import gzip
import hashlib
import json
import platform
import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}  # as Go names them, which the specification refers to
MEDIA = "application/vnd.oci.image."
BUFFER = 1 << 20


def write_tar(directory: Path, file: IO[bytes]) -> None:
    """Write what is below a directory as a tar archive.

    Raises ValueError for what a layer cannot hold: devices, pipes, sockets, names that mean "removed" in a layer.
    """
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(directory.rglob("*")):
            member = tar.gettarinfo(path, str(path.relative_to(directory)))
            # The type checker's stubs do not know that gettarinfo() gives None for a socket.
            if not (path.is_symlink() or path.is_dir() or path.is_file()) or path.name.startswith(".wh."):
                raise ValueError(f"{path} cannot be part of a layer")
            member.mtime = 0
            member.uname = member.gname = ""
            if member.isreg():
                with path.open("rb") as content:
                    tar.addfile(member, content)
            else:
                tar.addfile(member)


def pack(archive: Path, layers: Sequence[Path], config: dict[str, Any], created: int, name: str) -> None:
    """Write an image for this machine's architecture out of directories, the lowest layer first.

    `config`: the part of the image's configuration that a runtime uses (Entrypoint, Env, Labels...). `created`: seconds
    since 1970. `name`: NAME:TAG, for tools that import the archive.
    """
    stamp = datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    target = {"architecture": ARCHITECTURES[platform.machine()], "os": "linux"}
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix="layout.") as temporary:
        layout = Path(temporary)
        (layout / "blobs/sha256").mkdir(parents=True)
        packed = [_add_layer(layout, layer) for layer in layers]
        image = {
            "created": stamp,
            **target,
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in packed]},
            "history": [{"created": stamp, "created_by": f"layer {layer.name}"} for layer in layers],
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": MEDIA + "manifest.v1+json",
            "config": _add_json(layout, "config.v1+json", image),
            "layers": [descriptor for descriptor, _ in packed],
        }
        top = _add_json(layout, "manifest.v1+json", manifest) | {
            "platform": target,
            "annotations": {"org.opencontainers.image.ref.name": name},
        }
        index = {"schemaVersion": 2, "mediaType": MEDIA + "index.v1+json", "manifests": [top]}
        (layout / "index.json").write_bytes(_json(index))
        (layout / "oci-layout").write_bytes(_json({"imageLayoutVersion": "1.0.0"}))
        with archive.open("wb") as file:
            write_tar(layout, file)


def _add_layer(layout: Path, directory: Path) -> tuple[dict[str, Any], str]:
    """Compress a directory into a blob; give its descriptor, and the digest of what was compressed."""
    blob = layout / "layer"
    with tempfile.TemporaryFile(dir=layout) as plain:
        write_tar(directory, plain)
        diff_id = _digest(plain)
        # No file name and no time in the header: they would differ.
        with blob.open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as compressed:
            shutil.copyfileobj(plain, compressed, BUFFER)
    return _add_blob(layout, blob, "layer.v1.tar+gzip"), diff_id


def _add_json(layout: Path, kind: str, content: dict[str, Any]) -> dict[str, Any]:
    blob = layout / "json"
    blob.write_bytes(_json(content))
    return _add_blob(layout, blob, kind)


def _add_blob(layout: Path, blob: Path, kind: str) -> dict[str, Any]:
    """Move a file to where its content belongs, and give its descriptor."""
    with blob.open("rb") as file:
        digest = _digest(file)
    kept = blob.rename(layout / "blobs" / digest.replace(":", "/"))
    kept.chmod(0o644)
    return {"mediaType": MEDIA + kind, "digest": digest, "size": kept.stat().st_size}


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _digest(file: IO[bytes]) -> str:
    """Give the digest of a whole file, and leave it at its beginning."""
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(BUFFER):
        digest.update(chunk)
    file.seek(0)
    return f"sha256:{digest.hexdigest()}"


def unpack(archive: Path, directory: Path) -> dict[str, Any]:
    """Unpack an archive that pack() wrote, as root, and give its configuration; ValueError where a digest is wrong."""
    with tarfile.open(archive) as outer:
        with _member(outer, "index.json") as file:
            top = json.load(file)["manifests"][0]
        with _blob(outer, top) as file:
            manifest = json.load(file)
        with _blob(outer, manifest["config"]) as file:
            image: dict[str, Any] = json.load(file)
        for layer, diff_id in zip(manifest["layers"], image["rootfs"]["diff_ids"], strict=True):
            with _blob(outer, layer) as raw, tempfile.TemporaryFile(dir=archive.parent) as plain:
                with gzip.open(raw) as compressed:
                    shutil.copyfileobj(compressed, plain, BUFFER)
                if _digest(plain) != diff_id:
                    raise ValueError(f"layer {layer['digest']} does not hold {diff_id}")
                with tarfile.open(fileobj=plain) as tar:
                    for member in tar:
                        tar.extract(member, directory, numeric_owner=True, filter="fully_trusted")
    return image


def _member(tar: tarfile.TarFile, name: str) -> IO[bytes]:
    file = tar.extractfile(name)
    if file is None:
        raise ValueError(f"{name} is no file")
    return file


def _blob(tar: tarfile.TarFile, descriptor: dict[str, Any]) -> IO[bytes]:
    file = _member(tar, "blobs/" + descriptor["digest"].replace(":", "/"))
    if _digest(file) != descriptor["digest"] or file.seek(0, 2) != descriptor["size"]:
        raise ValueError(f"{descriptor['digest']} is damaged")
    file.seek(0)
    return file


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("archive", type=Path)
    packing.add_argument("layers", type=Path, nargs="+", metavar="layer")
    packing.add_argument("--name", required=True, help="NAME:TAG")
    packing.add_argument("--created", type=int, default=0, help="seconds since 1970")
    packing.add_argument("--entrypoint", action="append", default=[], help="one word of it; may be repeated")
    packing.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    packing.add_argument("--label", action="append", default=[], metavar="NAME=VALUE")
    unpacking = commands.add_parser("unpack")
    unpacking.add_argument("archive", type=Path)
    unpacking.add_argument("directory", type=Path)
    args = parser.parse_args(arguments)
    if args.command == "unpack":
        unpack(args.archive, args.directory)
        return
    labels = dict(label.split("=", 1) for label in args.label)
    config = {"Entrypoint": args.entrypoint, "Env": args.env, "Labels": labels, "WorkingDir": "/"}
    pack(args.archive, args.layers, config, args.created, args.name)


if __name__ == "__main__":
    main()
