"""Makes the OCI bundle of a pod that no kubelet manages: its root file system, volumes and runc configuration.

Layout below the pod's directory, which must be RAM-backed where memory images may reach it:
    config.json   what runc runs (OCI runtime specification 1.2)
    upper, work   the container's writable layer (overlayfs), over the node image
    rootfs        the two together
    volumes/NAME  emptyDir-like volumes
    memory/N      what the container sees as memory file systems: /dev/shm, then those of the manifest
    criu.conf     CRIU's settings for this container, read through the annotation org.criu.config
"""

import ipaddress
import json
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from handlers.errors import GiveUp

CAPABILITIES = [
    *("CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD"),
    *(
        "CAP_NET_BIND_SERVICE",
        "CAP_NET_RAW",
        "CAP_SETFCAP",
        "CAP_SETGID",
        "CAP_SETPCAP",
        "CAP_SETUID",
        "CAP_SYS_CHROOT",
    ),
]
# As container runtimes' default profiles do. CRIU cannot dump io_uring; without it, programs fall back to epoll.
SHARED_MEMORY, TEMPORARY = "/dev/shm", "/tmp"  # noqa: S108 - places inside the container
NOWHERE = "0.0.0.0"  # noqa: S104 - an address that nobody has
REFUSED_CALLS = ["io_uring_setup", "io_uring_enter", "io_uring_register", "userfaultfd"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,62}\Z")
_ID_MAX = (1 << 32) - 2  # the highest user and group


@dataclass(frozen=True, slots=True)
class VolumeMount:
    """An emptyDir-like volume: a directory of the pod that lives and moves with it."""

    name: str
    path: str


@dataclass(frozen=True, slots=True)
class PodManifest:
    """What a pod is made of, sent to the target so that it can make the same.

    `address`: IP address without prefix. `command`: argument list. `tmpfs`: mount points of memory file systems.
    `memory_bytes`: what the pod may use, for the target's limits.
    """

    name: str
    address: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    uid: int = 0
    gid: int = 0
    volumes: tuple[VolumeMount, ...] = ()
    tmpfs: tuple[str, ...] = ()
    memory_bytes: int = 1 << 30

    def to_json(self) -> dict[str, Any]:
        """Give the manifest as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read a manifest that a peer sent; raises GiveUp naming what is wrong."""
        try:
            ipaddress.ip_address(_text(data["address"]))
            return cls(
                name=_name(data["name"]),
                address=_text(data["address"]),
                command=_command(data["command"]),
                env={_variable(k): _text(v) for k, v in data.get("env", {}).items()},
                uid=_number(data.get("uid", 0), 0, _ID_MAX),
                gid=_number(data.get("gid", 0), 0, _ID_MAX),
                volumes=_volumes(_list(data, "volumes")),
                tmpfs=tuple(_mount_point(path) for path in _list(data, "tmpfs")),
                memory_bytes=_number(data.get("memory_bytes", 1 << 30), 1, 1 << 62),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as wrong:
            raise GiveUp(f"pod manifest: {type(wrong).__name__}: {wrong}") from wrong


def _text(value: object) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"{value!r:.50} is no text")
    return value


def _name(value: object) -> str:
    """Read what becomes part of paths and arguments."""
    if not _NAME.match(_text(value)):
        raise ValueError(f"{value!r:.80} is no name (letters, digits and '-', 63 at most, no '-' first)")
    return _text(value)


def _mount_point(value: object) -> str:
    if not _text(value).startswith("/") or ".." in _text(value).split("/"):
        raise ValueError(f"{value!r:.80} is no absolute path")
    return _text(value)


def _variable(value: object) -> str:
    if not _text(value) or "=" in _text(value):
        raise ValueError(f"{value!r:.50} is no name of a variable")
    return _text(value)


def _number(value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{value!r:.50} is no whole number from {low} to {high}")
    return value


def _command(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{value!r:.50} is no command: a list of words")
    return tuple(_text(word) for word in value)


def _volumes(value: Sequence[Any]) -> tuple[VolumeMount, ...]:
    volumes = tuple(VolumeMount(_name(v["name"]), _mount_point(v["path"])) for v in value)
    if len({volume.name for volume in volumes}) < len(volumes):
        raise ValueError("two volumes have the same name")
    return volumes


def _list(data: Mapping[str, Any], name: str) -> Sequence[Any]:
    value = data.get(name, ())
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name} is no list")
    return value


@dataclass(frozen=True, slots=True)
class Bundle:
    """A pod's directory and the paths in it."""

    directory: Path

    @property
    def upper(self) -> Path:
        """The writable layer."""
        return self.directory / "upper"

    @property
    def rootfs(self) -> Path:
        """The mounted root file system."""
        return self.directory / "rootfs"

    def volume(self, name: str) -> Path:
        """The directory of a volume."""
        return self.directory / "volumes" / name

    def trees(self, manifest: PodManifest) -> dict[str, Path]:
        """Give every directory whose files belong to the pod's state, by a name that both sides share."""
        trees = {"upper": self.upper} | {f"volume-{v.name}": self.volume(v.name) for v in manifest.volumes}
        return trees | {f"memory-{number}": path for number, path in enumerate(self.memory(manifest).values())}

    def memory(self, manifest: PodManifest) -> dict[str, Path]:
        """Give the directories behind the container's memory file systems, by mount point.

        They are directories of ours, as a kubelet's are, because then they are moved ahead as all files are. CRIU
        would move a tmpfs of the container's own in the freeze, by starting tar and gzip on both sides: 10 ms for each.
        """
        return {path: self.directory / "memory" / str(n) for n, path in enumerate((SHARED_MEMORY, *manifest.tmpfs))}

    def config(self) -> dict[str, Any]:
        """Read back the OCI configuration."""
        config: dict[str, Any] = json.loads((self.directory / "config.json").read_text())
        return config

    def manifest(self) -> PodManifest:
        """Read back the manifest that the bundle was made from."""
        return PodManifest.from_json(json.loads((self.directory / "manifest.json").read_text()))


def manifest_or_nothing(bundle: Bundle, name: str) -> PodManifest:
    """Read a pod's manifest; one without address or command when it is not there, as after a restart."""
    try:
        return bundle.manifest()
    except (OSError, ValueError, GiveUp):
        return PodManifest(name=name, address=NOWHERE, command=())


def oci_config(manifest: PodManifest, bundle: Bundle, *, netns: Path, cgroup: str, image_layer: bool) -> dict[str, Any]:
    """Give the OCI configuration; `cgroup` is the path below the cgroup mount."""
    mounts: list[dict[str, Any]] = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
        {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666"]},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
    ]
    mounts += [
        {"destination": p, "type": "bind", "source": str(directory), "options": ["bind", "rw", "nosuid", "nodev"]}
        for p, directory in bundle.memory(manifest).items()
    ]
    mounts += [
        {"destination": v.path, "type": "bind", "source": str(bundle.volume(v.name)), "options": ["bind", "rw"]}
        for v in manifest.volumes
    ]
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": TEMPORARY, "LANG": "C.UTF-8", **manifest.env}
    sets = ("bounding", "effective", "permitted") if manifest.uid == 0 else ("bounding",)
    return {
        "ociVersion": "1.2.0",
        "process": {
            "terminal": False,
            "user": {"uid": manifest.uid, "gid": manifest.gid},
            "args": list(manifest.command),
            "env": [f"{k}={v}" for k, v in env.items()],
            "cwd": "/",
            "capabilities": dict.fromkeys(sets, CAPABILITIES),
            "noNewPrivileges": True,
        },
        "root": {"path": str(bundle.rootfs), "readonly": not image_layer},
        "hostname": manifest.name,
        "mounts": mounts,
        "annotations": {"org.criu.config": str(bundle.directory / "criu.conf")},
        "linux": {
            "cgroupsPath": cgroup,
            "namespaces": [
                {"type": "pid"},
                {"type": "ipc"},
                {"type": "uts"},
                {"type": "mount"},
                {"type": "network", "path": str(netns)},
            ],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sysrq-trigger"],
            "seccomp": {
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": REFUSED_CALLS, "action": "SCMP_ACT_ERRNO", "errnoRet": 1}],
            },
        },
    }


def create(manifest: PodManifest, directory: Path, *, netns: Path, cgroup: str) -> Bundle:
    """Make the bundle of a pod; its layer and volumes are empty, and `mount_rootfs` is still to be called.

    One that is there already is taken as it is. Undone by `destroy`.
    """
    bundle = Bundle(directory)
    for path in (bundle.upper, directory / "work", bundle.rootfs):
        path.mkdir(parents=True, exist_ok=True)
    for volume in manifest.volumes:
        bundle.volume(volume.name).mkdir(parents=True, exist_ok=True)
    for path in bundle.memory(manifest).values():
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o1777)
    partial = directory / "manifest.partial"
    partial.write_text(json.dumps(manifest.to_json()))
    partial.rename(directory / "manifest.json")
    config = oci_config(manifest, bundle, netns=netns, cgroup=cgroup, image_layer=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    return bundle


def mount_rootfs(bundle: Bundle, image: Path) -> None:
    """Mount the root file system: the writable layer over `image`; what is mounted already stays.

    On a target only when all files of the layer have arrived: overlayfs does not define what it shows of changes
    beneath it. Raises GiveUp.
    """
    if bundle.rootfs.is_mount():
        return
    layers = f"lowerdir={image},upperdir={bundle.upper},workdir={bundle.directory / 'work'}"
    done = subprocess.run(
        ["mount", "-t", "overlay", "-o", layers, "overlay", str(bundle.rootfs)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise GiveUp(f"cannot mount the root file system in {bundle.directory}: {done.stderr.strip()}")


def sync(directories: Iterable[Path]) -> None:
    """Bring the file systems of the directories to their disks (syncfs(2)): the workload had synced them elsewhere.

    Raises GiveUp with the words of sync(1).
    """
    paths = [str(directory) for directory in directories if directory.is_dir()]
    if not paths:
        return
    done = subprocess.run(["sync", "--file-system", *paths], capture_output=True, text=True, check=False)
    if done.returncode:
        raise GiveUp(f"the moved files could not be brought to disk: {done.stderr.strip()}")


def destroy(directory: Path) -> None:
    """Unmount and delete a bundle; what is already gone is no error.

    Interrupted, it leaves the bundle as it was or none, and `remains`.
    """
    bundle = Bundle(directory)
    if bundle.rootfs.is_mount():
        subprocess.run(["umount", "--lazy", str(bundle.rootfs)], check=True)
    remove_remains(directory)
    if directory.exists():
        directory.rename(remains(directory))
        remove_remains(directory)


def remains(directory: Path) -> Path:
    """Give the place beside a bundle where one is that is not made yet, or half deleted; no pod has such a name."""
    return directory.with_name(f".{directory.name}")


def remove_remains(directory: Path) -> None:
    """Delete what an interrupted making or `destroy` of this bundle has left."""
    if remains(directory).exists():
        subprocess.run(["rm", "-rf", "--one-file-system", str(remains(directory))], check=True)
