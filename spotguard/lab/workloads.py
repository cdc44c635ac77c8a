"""The drill's workloads: what runs in the container, as whom, and which client belongs to it."""

import pwd
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

MIB = 1 << 20
POSTGRES_BIN = "/usr/lib/postgresql/17/bin"  # where Debian's postgresql-17 puts its programs
INITDB_OPTIONS = (
    "-U",
    "postgres",
    "--auth=trust",
    "--locale=C.UTF-8",
    "--encoding=UTF8",
    "--no-sync",
    "--wal-segsize=4",
)
PREPARE_SECONDS = 120.0


@dataclass(frozen=True)
class Volume:
    """A directory of the node that the container sees at `mount_path` (as an emptyDir of a pod)."""

    name: str
    mount_path: str


@dataclass(frozen=True)
class Workload:
    """One container of the drill.

    `command`, `setup` and `files` speak of paths inside the container. `user` is (uid, gid). `client` is the tail of
    `python -m spotguard.lab.clients`, without address, port and ledger. The client itself waits until the server
    answers, so there is no separate probe. stdin, stdout and stderr are meant to be /dev/null.
    """

    name: str
    command: tuple[str, ...]
    port: int
    client: tuple[str, ...]
    memory_hint_bytes: int
    user: tuple[int, int] = (0, 0)
    env: Mapping[str, str] = field(default_factory=dict)
    volumes: tuple[Volume, ...] = ()
    tmpfs: tuple[str, ...] = ("/tmp",)  # noqa: S108 - a mount point inside the container
    files: Mapping[str, str] = field(default_factory=dict)
    setup: tuple[tuple[str, ...], ...] = ()
    needs_ipc_namespace: bool = False


def redis(*, size_mib: int = 64, rate_mb: float = 5.0, connections: int = 4, port: int = 6379) -> Workload:
    """Describe a Redis without persistence that the client fills to `size_mib` and overwrites at `rate_mb` MB/s."""
    options = {
        "port": str(port), "bind": "0.0.0.0", "save": "", "appendonly": "no", "protected-mode": "no",  # noqa: S104 - a container
        "dir": "/tmp", "daemonize": "no", "logfile": "",  # noqa: S108 - the container's own
    }  # fmt: skip
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    return Workload(
        name="redis",
        command=("/usr/bin/redis-server", *arguments),
        port=port,
        client=_client("redis", size_mib, rate_mb, connections),
        memory_hint_bytes=(size_mib + 16) * MIB * 5 // 4,
    )


def postgres(
    *,
    size_mib: int = 16,
    rate_mb: float = 0.5,
    connections: int = 4,
    port: int = 5432,
    shared_buffers_mib: int = 32,
    path: str = "/var/lib/spotguard-postgres",
) -> Workload:
    """Describe a PostgreSQL 17 that runs as the user `postgres` with its data in a volume at `path`.

    It keeps a System V segment as a lock, so it needs an IPC namespace of its own to be moved. It has no Unix socket:
    everything goes over the network. Raises KeyError if this system has no user `postgres`.
    """
    account = pwd.getpwnam("postgres")
    data, access = f"{path}/data", f"{path}/pg_hba.conf"
    options = {
        "listen_addresses": "*", "port": str(port), "unix_socket_directories": "", "hba_file": access,
        "shared_buffers": f"{shared_buffers_mib}MB", "max_connections": "50", "huge_pages": "off", "jit": "off",
        "max_wal_size": "128MB", "min_wal_size": "32MB", "logging_collector": "off",
    }  # fmt: skip
    return Workload(
        name="postgres",
        command=(f"{POSTGRES_BIN}/postgres", "-D", data, *(f"--{name}={value}" for name, value in options.items())),
        port=port,
        client=_client("postgres", size_mib, rate_mb, connections),
        memory_hint_bytes=(shared_buffers_mib + 96) * MIB,
        user=(account.pw_uid, account.pw_gid),
        env={"LANG": "C.UTF-8"},
        volumes=(Volume("postgres", path),),
        files={access: "host all all 0.0.0.0/0 trust\n"},
        setup=((f"{POSTGRES_BIN}/initdb", *INITDB_OPTIONS, "-D", data),),
        needs_ipc_namespace=True,
    )


def java(
    *,
    size_mib: int = 64,
    rate_mb: float = 5.0,
    connections: int = 4,
    port: int = 8080,
    path: str = "/opt/spotguard-java",
    user: tuple[int, int] = (1000, 1000),
) -> Workload:
    """Describe an HTTP server on OpenJDK 21 whose heap the client fills to `size_mib`."""
    source, classes = f"{path}/KeyValueServer.java", f"{path}/classes"
    heap_mib = size_mib * 3 // 2 + 96
    return Workload(
        name="java",
        command=(
            "/usr/bin/java", "-Xms64m", f"-Xmx{heap_mib}m", "-XX:+UseG1GC", "-XX:-UsePerfData",
            # Headers and body leave in two writes: without this, Nagle and delayed acknowledgements add 40 ms each.
            "-Dsun.net.httpserver.nodelay=true",
            # Connections rest between the load and the check: the default closes them after 30 s.
            "-Dsun.net.httpserver.idleInterval=3600",
            "-cp", classes, "KeyValueServer", str(port),
        ),
        port=port,
        client=_client("java", size_mib, rate_mb, connections),
        memory_hint_bytes=(heap_mib + 160) * MIB,
        user=user,
        volumes=(Volume("java", path),),
        files={source: (Path(__file__).parent / "java" / "KeyValueServer.java").read_text(encoding="utf-8")},
        setup=(("/usr/bin/javac", "-J-XX:TieredStopAtLevel=1", "-d", classes, source),),
    )  # fmt: skip


def prepare(workload: Workload, directories: Mapping[str, Path]) -> None:
    """Fill the volumes' directories on the node before the container's first start.

    `directories` maps volume name -> directory of the node (made here if missing). Runs the setup commands outside the
    container, as its user, with the volumes' paths put in place of the container's: the node has the same programs.
    Raises subprocess.CalledProcessError (with stderr) or subprocess.TimeoutExpired.
    """
    uid, gid = workload.user
    for volume in workload.volumes:
        directory = directories[volume.name]
        directory.mkdir(parents=True, exist_ok=True)
        shutil.chown(directory, uid, gid)
    for path, content in workload.files.items():
        target = Path(_outside(path, workload, directories))
        target.write_text(content, encoding="utf-8")
        shutil.chown(target, uid, gid)
    for command in workload.setup:
        subprocess.run(
            [_outside(part, workload, directories) for part in command],
            user=uid, group=gid, extra_groups=(), env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **workload.env},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=PREPARE_SECONDS,
        )  # fmt: skip


def _client(kind: str, size_mib: int, rate_mb: float, connections: int) -> tuple[str, ...]:
    return (kind, "--size", str(size_mib), "--rate", str(rate_mb), "--connections", str(connections))


def _outside(text: str, workload: Workload, directories: Mapping[str, Path]) -> str:
    for volume in workload.volumes:
        if text == volume.mount_path or text.startswith(volume.mount_path + "/"):
            return str(directories[volume.name]) + text[len(volume.mount_path) :]
    return text
