"""Every setting of SpotGuard's processes. docs/settings.md is made from this file.

`python -m spotguard.settings` prints the reference.
"""

# ruff: noqa: RUF009 - setting() is dataclasses.field() with a meaning

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from spotguard import kinds
from spotguard.config import describe, setting
from spotguard.errors import Unsupported
from spotguard.kinds import PortRange

_ANYWHERE = "0.0.0.0"  # noqa: S104 - other nodes have to reach it; who may is up to TLS and the firewall
_MIB = 1 << 20
_GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class NodeSettings:
    """Which node this is and where it keeps things."""

    name: str = setting(kinds.NAME, "This node's name; must be the one in its certificate.")
    address: str = setting(kinds.IP, "Address at which other nodes reach this one.")
    runtime_dir: Path = setting(
        kinds.PATH,
        "Images of memory are put here: must be RAM-backed (tmpfs), for they hold the workload's secrets.",
        default=Path("/run/spotguard"),
    )
    state_dir: Path = setting(
        kinds.PATH, "Journal of migrations; must survive a restart of the agent.", default=Path("/var/lib/spotguard")
    )


@dataclass(frozen=True, kw_only=True)
class ControlSettings:
    """The agent's control API and the ports on which memory arrives."""

    listen: str = setting(kinds.IP, "Address to listen on for other agents.", default=_ANYWHERE)
    port: int = setting(kinds.PORT, "Port of the control API.", default=9711)
    stream_ports: PortRange = setting(
        kinds.PORT_RANGE,
        "Ports of the receivers, one per migration at a time; open them between the nodes.",
        default=PortRange(9720, 9739),
    )


@dataclass(frozen=True, kw_only=True)
class TlsSettings:
    """Who this process is; all three are PEM files."""

    cert: Path = setting(kinds.PATH, "Certificate, with spiffe://spotguard/node/NAME as its only URI.")
    key: Path = setting(kinds.PATH, "Private key of the certificate; only its owner may read it.")
    ca: Path = setting(kinds.PATH, "Authority whose certificates are believed; nothing else must be signed by it.")


@dataclass(frozen=True, kw_only=True)
class ImdsSettings:
    """The instance metadata service."""

    endpoint: str = setting(kinds.url("http", "https"), "Base URL of the service.", default="http://169.254.169.254")
    interval_s: float = setting(kinds.number(0.05, 5), "Time between two looks for a notice.", default=1.0, unit="s")


@dataclass(frozen=True, kw_only=True)
class OwnerClientSettings:
    """The owner store, as the agents use it."""

    url: str = setting(kinds.url("https"), "Base URL of the owner store; it must be outside the nodes that can die.")
    name: str = setting(kinds.NAME, "Name in the owner store's certificate.", default="owner-store")


@dataclass(frozen=True, kw_only=True)
class TransferSettings:
    """How memory moves."""

    mode: Literal["auto", "live", "stop-and-copy"] = setting(
        kinds.choice("auto", "live", "stop-and-copy"),
        "auto takes live where writes can be tracked and stop-and-copy else; live refuses what cannot be tracked.",
        default="auto",
    )
    target_freeze_ms: int = setting(
        kinds.integer(1, 60_000), "Rounds go on until the predicted freeze is at most this.", default=100, unit="ms"
    )
    max_rounds: int = setting(kinds.integer(1, 1000), "Rounds of copying before the freeze, at most.", default=30)
    reserve_s: float = setting(
        kinds.number(0, 60), "Time before the node's death at which everything must be over.", default=5.0, unit="s"
    )
    store_memory_max: int = setting(
        kinds.SIZE,
        "Memory for arriving pages, of all migrations to this node together.",
        default=4 * _GIB,
        unit="bytes",
    )
    max_image_bytes: int = setting(
        kinds.SIZE,
        "CRIU's images beside the memory in them (shared memory, or all in stop-and-copy), per migration.",
        default=256 * _MIB,
        unit="bytes",
    )
    fault_drop_pages: int = setting(
        kinds.integer(0), "For drills that must fail: so many pages are not sent.", default=0, unit="pages"
    )
    fault_double_run: bool = setting(
        kinds.BOOLEAN, "For drills that must fail: the source thaws although it lost the workload.", default=False
    )


@dataclass(frozen=True, kw_only=True)
class RuntimeSettings:
    """The containers of this node."""

    runc_root: Path = setting(kinds.PATH, "runc's state directory.", default=Path("/run/runc"))
    pods_dir: Path = setting(
        kinds.PATH, "Bundles, writable layers and volumes of the pods.", default=Path("/var/lib/spotguard/pods")
    )
    image: Path = setting(kinds.PATH, "Root file system below every pod's writable layer.", default=Path("/"))
    cgroup: Path = setting(
        kinds.PATH,
        "cgroup v2 directory of this node; pods and helpers get theirs below it.",
        default=Path("/sys/fs/cgroup/spotguard"),
    )


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """How a moved pod keeps its address."""

    backend: Literal["routes"] = setting(
        kinds.choice("routes"),
        "routes: a /32 to the new node, on every node; only where nodes forward for each other freely, not in a VPC.",
        default="routes",
    )


@dataclass(frozen=True, kw_only=True)
class MetricsSettings:
    """Prometheus metrics and health, plain HTTP."""

    listen: str = setting(kinds.IP, "Address to listen on.", default=_ANYWHERE)
    port: int = setting(kinds.PORT, "Port of /metrics, /healthz and /readyz.", default=9712)


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """The log, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = setting(
        kinds.choice("debug", "info", "warning", "error"), "Nothing below this is written.", default="info"
    )
    format: Literal["json", "console"] = setting(
        kinds.choice("json", "console"), "json: one object per line; console: for a person.", default="json"
    )


@dataclass(frozen=True, kw_only=True)
class AgentSettings:
    """Everything that `spotguard agent` can be told."""

    node: NodeSettings
    tls: TlsSettings
    owner_store: OwnerClientSettings
    control: ControlSettings = ControlSettings()
    imds: ImdsSettings = ImdsSettings()
    transfer: TransferSettings = TransferSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    network: NetworkSettings = NetworkSettings()
    metrics: MetricsSettings = MetricsSettings()
    log: LogSettings = LogSettings()
    peers: Mapping[str, str] = setting(
        kinds.PEERS,
        "Nodes that may be targets, each with the address of its control API; the port is this node's own if none.",
        default=MappingProxyType({}),
    )

    def problems(self) -> list[str]:
        """Return what is wrong between settings that are right by themselves."""
        found = []
        for name, port in (("control.port", self.control.port), ("metrics.port", self.metrics.port)):
            if port in self.control.stream_ports:
                found.append(
                    f"{name} is {port}; expected a port outside control.stream_ports {self.control.stream_ports}"
                )
        if self.control.port == self.metrics.port:
            found.append(f"metrics.port is {self.metrics.port}; expected another one than control.port")
        if self.node.name in self.peers:
            found.append(f"peers names '{self.node.name}', which is this node; expected other nodes only")
        if self.transfer.max_image_bytes > self.transfer.store_memory_max:
            found.append("transfer.max_image_bytes is more than transfer.store_memory_max; expected at most as much")
        return found


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """The owner store's server."""

    listen: str = setting(kinds.IP, "Address to listen on.", default=_ANYWHERE)
    port: int = setting(kinds.PORT, "Port of the owner store.", default=9713)
    journal: Path = setting(
        kinds.PATH, "File that keeps every change; on a disk that survives.", default=Path("/var/lib/spotguard/owners")
    )
    heartbeat_s: float = setting(
        kinds.number(0.05, 5), "Time between two signs of life to watchers.", default=2.0, unit="s"
    )


@dataclass(frozen=True, kw_only=True)
class OwnerStoreSettings:
    """Everything that `spotguard owner-store` can be told."""

    tls: TlsSettings
    serve: ServeSettings = ServeSettings()
    log: LogSettings = LogSettings()


def check_runtime_dir(path: Path, mountinfo: str | None = None) -> None:
    """Raise Unsupported unless files in `path` are kept in memory (tmpfs or ramfs; see proc_pid_mountinfo(5)).

    `path` must exist. `mountinfo`: text of that file, read from /proc when None.
    """
    lines = (Path("/proc/self/mountinfo").read_text("utf-8") if mountinfo is None else mountinfo).splitlines()
    real, best, kind = path.resolve(), Path(), ""
    for line in lines:
        before, _, after = line.partition(" - ")
        point = Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), before.split(" ")[4]))
        # Of two mounts at one place the later one is seen, hence >=.
        if real.is_relative_to(point) and len(point.parts) >= len(best.parts):
            best, kind = point, after.split(" ")[0]
    if kind not in {"tmpfs", "ramfs"}:
        raise Unsupported(
            f"node.runtime_dir {path} is on {kind or 'an unknown file system'}: images of memory hold secrets",
            remedy="put it on a tmpfs, for example below /run",
        )


def reference() -> str:
    """Write docs/settings.md."""
    return "\n".join(
        [
            "# Settings",
            "",
            "Made from `spotguard/settings.py`; do not edit (`python -m spotguard.settings > docs/settings.md`).",
            "",
            "Field `mode` of group `transfer` can be set by, the first that is there wins:",
            "",
            "1. the flag `--transfer-mode VALUE`",
            "2. the environment variable `SPOTGUARD_TRANSFER__MODE` (two underscores before the field)",
            "3. `mode` below `[transfer]` in the TOML file that `--config` or `SPOTGUARD_CONFIG` names",
            "",
            "All mistakes are told at once, and unknown names are mistakes.",
            "",
            describe(AgentSettings, "spotguard agent"),
            describe(OwnerStoreSettings, "spotguard owner-store"),
        ]
    )


if __name__ == "__main__":
    sys.stdout.write(reference())
