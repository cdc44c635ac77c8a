"""What every migration of an agent shares; built once, by the composition root."""

from dataclasses import dataclass
from pathlib import Path

from criu_transfer.checkpoint import Tools
from criu_transfer.stream import Credentials
from handlers.bundle import Bundle
from handlers.cgroup import Cgroup
from handlers.control import ControlClient
from handlers.owner import HttpOwnerStore
from handlers.runtime import Runc
from spotguard.clock import Clock
from spotguard.events_log import EventLog
from spotguard.settings import AgentSettings

CONNTRACK_FILE = "spotguard-conntrack.json"  # travels beside CRIU's images
IMAGE_BYTES = 64 << 20  # CRIU's images of a live move beside the pages, without shared memory
GROWTH_BYTES = 256 << 20
CGROUP_MOUNT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class TransferLimits:
    """What a source announces and a target accepts for one migration, in bytes.

    Memory comes as pages (live) or within CRIU's images (stop-and-copy), never as both.
    """

    max_memory: int
    max_images: int
    max_files: int

    @property
    def ram(self) -> int:
        """What the target must have for it at most, beside the files."""
        return max(self.max_memory, self.max_images) + IMAGE_BYTES


def announced(memory: int, most: int, image_bytes: int) -> TransferLimits:
    """Return what a source announces for a workload that has `memory` bytes now; `most`: transfer.store_memory_max.

    It may grow, forked children have pages of their own on the target, and the tracker may fail at any time: then all
    memory is in the images. One that has more than `most` already says so, and is refused before anything is copied.
    """
    grown = memory + memory // 2 + GROWTH_BYTES
    cap = max(most, memory)
    return TransferLimits(max_memory=min(grown, cap), max_images=min(grown + image_bytes, cap), max_files=most)


@dataclass(frozen=True, slots=True)
class Parts:
    """The agent's neighbours and places. `tracker_reason`: why writes cannot be tracked here, empty when they can."""

    settings: AgentSettings
    clock: Clock
    log: EventLog
    runc: Runc
    tools: Tools
    store: HttpOwnerStore
    control: ControlClient
    tracker_reason: str
    memory_v1: Path | None

    @property
    def credentials(self) -> Credentials:
        """This node's certificate for streams."""
        tls = self.settings.tls
        return Credentials(cert=tls.cert, key=tls.key, ca=tls.ca)

    def bundle(self, workload: str) -> Bundle:
        """The bundle of a pod, there or not."""
        return Bundle(self.settings.runtime.pods_dir / workload)

    def pod_cgroup(self, workload: str) -> Cgroup:
        """The cgroup of a pod's container."""
        return Cgroup(self.settings.runtime.cgroup / "pods" / workload)

    def receiver_cgroup(self, migration: str) -> tuple[Path, Path | None]:
        """The cgroup of a receiver, and its directory below version 1's memory controller where that is the one."""
        path = self.settings.runtime.cgroup / "receivers" / migration
        if self.memory_v1 is None:
            return path, None
        return path, self.memory_v1 / path.relative_to(CGROUP_MOUNT)

    def worker_cgroup(self, migration: str, side: str) -> Path:
        """The cgroup that runc and CRIU of one side of a migration run in."""
        return self.settings.runtime.cgroup / "workers" / f"{migration}-{side}"

    def work_dir(self, migration: str, side: str) -> Path:
        """The RAM-backed directory of one side of one migration."""
        return self.settings.node.runtime_dir / side / migration
