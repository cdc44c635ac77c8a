"""Starts a workload of the drill as a pod on the node that this runs in, as a kubelet would.

`python -m spotguard.lab.pod redis --address 10.77.1.10 --config /etc/spotguard/agent.toml`, inside a node.
"""

import argparse
import asyncio
import os
import sys
import time
from dataclasses import dataclass

from handlers import bundle as bundles
from handlers.network import sandbox
from handlers.runtime import Runc
from spotguard.config import add_arguments, load
from spotguard.lab import workloads
from spotguard.settings import AgentSettings

START_SECONDS = 60.0
PRESETS = {"redis": workloads.redis, "postgres": workloads.postgres, "java": workloads.java}


@dataclass(frozen=True, slots=True)
class PodOptions:
    """What the drill lets a person choose of a workload: size in MiB, write rate in MB/s, connections."""

    name: str
    size_mib: int
    rate_mb: float
    connections: int

    def workload(self) -> workloads.Workload:
        """Give the workload's description."""
        return PRESETS[self.name](size_mib=self.size_mib, rate_mb=self.rate_mb, connections=self.connections)

    def arguments(self) -> list[str]:
        """Give these options as this module's own arguments."""
        size, rate, count = str(self.size_mib), str(self.rate_mb), str(self.connections)
        return [self.name, "--size-mib", size, "--rate-mb", rate, "--connections", count]


def manifest_of(workload: workloads.Workload, address: str) -> bundles.PodManifest:
    """Give the pod's manifest."""
    return bundles.PodManifest(
        name=workload.name,
        address=address,
        command=workload.command,
        env=workload.env,
        uid=workload.user[0],
        gid=workload.user[1],
        volumes=tuple(bundles.VolumeMount(v.name, v.mount_path) for v in workload.volumes),
        tmpfs=workload.tmpfs,
        memory_bytes=workload.memory_hint_bytes,
    )


async def start(workload: workloads.Workload, address: str, settings: AgentSettings) -> None:
    """Make network, bundle and volumes, then run the container."""
    where = settings.runtime
    manifest = manifest_of(workload, address)
    box = sandbox.create(workload.name, address)
    cgroup = where.cgroup / "pods" / workload.name
    made = bundles.create(
        manifest,
        where.pods_dir / workload.name,
        netns=box.netns,
        cgroup="/" + str(cgroup.relative_to("/sys/fs/cgroup")),
    )
    bundles.mount_rootfs(made, where.image)
    workloads.prepare(workload, {v.name: made.volume(v.name) for v in workload.volumes})
    await Runc(where.runc_root).run(workload.name, made.directory, time.monotonic() + START_SECONDS)


def main(argv: list[str] | None = None) -> int:
    """Start one pod."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=sorted(PRESETS))
    parser.add_argument("--size-mib", type=int, required=True)
    parser.add_argument("--rate-mb", type=float, required=True)
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--address", required=True)
    add_arguments(parser, AgentSettings)
    args = parser.parse_args(argv)
    options = PodOptions(args.workload, args.size_mib, args.rate_mb, args.connections)
    settings = load(AgentSettings, args, os.environ)
    asyncio.run(start(options.workload(), args.address, settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
