"""Nodes of the lab: each with its own mount, pid, network, uts and ipc namespaces and cgroup, on one bridge.

lab namespace (this process): bridge 10.77.0.1, owner store, metadata simulators
  ├─ node-a 10.77.0.11      ├─ node-b 10.77.0.12
  └─ client 10.77.0.50 (a network namespace only)
"""

import os
import secrets
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from handlers.cgroup import Cgroup
from spotguard.errors import LabError

BRIDGE = "br0"
BRIDGE_MAC = "02:53:47:00:00:01"
LAB_ADDRESS = "10.77.0.1"
CGROUP_ROOT = Path("/sys/fs/cgroup")
LAB_CGROUP = CGROUP_ROOT / "spotguard-lab"
END_SECONDS = 20.0
MEMORY_V1 = Path("/run/cgroup1/memory")

# What a node's first process does before it becomes an init that only reaps. /etc/spotguard is the node's own folder.
NODE_SETUP = """
set -eu
mount --bind "$NODE_ETC" /etc/spotguard
mount -t proc proc /proc
mount -t tmpfs -o mode=1777 tmpfs /tmp
# Where the kernel can (Linux 6.4), memory images are kept off a machine's swap.
mount -t tmpfs -o mode=755,noswap tmpfs /run 2>/dev/null || mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=711 tmpfs /var/lib/spotguard
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t sysfs sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
if ! grep -qw memory /sys/fs/cgroup/cgroup.controllers; then
  mkdir -p /run/cgroup1/memory
  mount -t cgroup -o memory memory /run/cgroup1/memory || rmdir /run/cgroup1/memory
fi
mkdir -p /run/netns
hostname "$NODE_NAME"
ip link set lo up
echo 1 >/proc/sys/net/ipv4/ip_forward
echo 0 >/proc/sys/net/ipv4/conf/all/send_redirects
echo 0 >/proc/sys/net/ipv4/conf/default/send_redirects
exec tini -s -- sleep infinity
"""


def sh(*command: str) -> str:
    """Run a set-up command of the lab; raises LabError with its words."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"{shlex.join(command)}: {done.stderr.strip()}")
    return done.stdout


@dataclass
class Host:
    """One place that commands can run in: a node or the client."""

    name: str
    address: str
    enter: tuple[str, ...] = ()
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def popen(self, command: Sequence[str], *, output: IO[str] | int, pipes: bool = False) -> subprocess.Popen[str]:
        """Start a command inside, ended with the host. `pipes`: talk to it by stdin and stdout; output is stderr's."""
        process = subprocess.Popen(
            [*self.enter, *command],
            stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipes else output,
            stderr=output,
            text=True,
            bufsize=1,
        )
        self.processes.append(process)
        return process

    def run(self, *command: str) -> str:
        """Run a command inside to its end; raises LabError with its words."""
        return sh(*self.enter, *command)

    def stop(self) -> None:
        """End everything that was started inside by `popen`."""
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        for process in self.processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()


@dataclass
class Node(Host):
    """A node: namespaces of its own under an init that only reaps."""

    etc: Path = Path()
    init: subprocess.Popen[str] | None = None
    pid: int = 0

    @property
    def cgroup(self) -> Path:
        """The node's cgroup: `system` for its own processes, `pods` for its containers."""
        return LAB_CGROUP / self.name

    def pod_cgroup(self, pod: str) -> Path:
        """The cgroup of a pod's container."""
        return self.cgroup / "pods" / pod

    def die(self) -> None:
        """End the node as the end of an instance does: everything at once, no signal first."""
        for directory in (self.cgroup / "pods").glob("*/"):
            (directory / "cgroup.kill").write_text("1")
        if self.init and self.init.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.init.wait()
        self.stop()


def children(pid: int) -> list[int]:
    """Give the pids of a process's children."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Fabric:
    """The bridge and the hosts on it. Use as a context manager: leaving it ends all hosts."""

    def __init__(self, directory: Path, *, rate: str | None = None) -> None:
        """`rate`: link speed of every host in tc's words ("1gbit"), None for no shaping."""
        self.directory = directory
        self.rate = rate
        self.hosts: list[Host] = []

    def __enter__(self) -> "Fabric":
        # An address of its own: else the bridge takes a port's, and changes it when that node dies.
        sh("ip", "link", "add", BRIDGE, "address", BRIDGE_MAC, "type", "bridge", "forward_delay", "0")
        sh("ip", "addr", "add", f"{LAB_ADDRESS}/24", "dev", BRIDGE)
        sh("ip", "link", "set", BRIDGE, "up")
        for group in (LAB_CGROUP,):
            self._make_cgroup(group)
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            host.die() if isinstance(host, Node) else host.stop()
        sh("ip", "link", "del", BRIDGE)
        for host in self.hosts:
            if not isinstance(host, Node):
                sh("ip", "netns", "del", host.name)
        deadline = time.monotonic() + END_SECONDS
        beside = MEMORY_V1 / LAB_CGROUP.relative_to(CGROUP_ROOT)
        lab = Cgroup(LAB_CGROUP, memory_v1=beside if beside.is_dir() else None)
        lab.kill(deadline)
        lab.remove(deadline)

    @staticmethod
    def _make_cgroup(path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        if "memory" in (path.parent / "cgroup.controllers").read_text().split():
            (path.parent / "cgroup.subtree_control").write_text("+memory")

    def node(self, name: str, address: str) -> Node:
        """Start a node; its folder DIRECTORY/NAME appears inside as /etc/spotguard."""
        etc = self.directory / name
        etc.mkdir(parents=True, exist_ok=True)
        node = Node(name=name, address=address, etc=etc)
        for path in (node.cgroup, node.cgroup / "system", node.cgroup / "pods"):
            self._make_cgroup(path)
        unshare = "unshare --mount --pid --net --uts --ipc --fork --kill-child --propagation private"
        node.init = subprocess.Popen(
            ["sh", "-c", f'echo $$ >{node.cgroup}/system/cgroup.procs; exec {unshare} sh -c "$0"', NODE_SETUP],
            env={**os.environ, "NODE_ETC": str(etc), "NODE_NAME": name},
            stdin=subprocess.DEVNULL,
            text=True,
        )
        self.hosts.append(node)
        node.pid = self._wait_for_init(node.init)
        node.enter = ("nsenter", "--target", str(node.pid), "--mount", "--pid", "--net", "--uts", "--ipc", "--")
        self._plug(node, str(node.pid))
        return node

    def client(self, name: str, address: str) -> Host:
        """Make a host that is only a network namespace."""
        sh("ip", "netns", "add", name)
        host = Host(name=name, address=address, enter=("ip", "netns", "exec", name))
        self.hosts.append(host)
        host.run("ip", "link", "set", "lo", "up")
        self._plug(host, name)
        return host

    def _plug(self, host: Host, netns: str) -> None:
        # The port of a node that has died goes a while after it: names are never used twice.
        port = f"{host.name[:9]}-{secrets.token_hex(2)}"
        sh("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", netns)
        sh("ip", "link", "set", port, "master", BRIDGE, "up")
        host.run("ip", "addr", "add", f"{host.address}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
        if self.rate:
            shape = ("root", "tbf", "rate", self.rate, "burst", "256kb", "latency", "50ms")
            sh("tc", "qdisc", "add", "dev", port, *shape)
            host.run("tc", "qdisc", "add", "dev", "eth0", *shape)

    @staticmethod
    def _wait_for_init(unshare: subprocess.Popen[str]) -> int:
        """Wait until the node's first process has become its init, and give its pid as seen from here."""
        while unshare.poll() is None:
            for pid in children(unshare.pid):
                if Path(f"/proc/{pid}/comm").read_text().strip() == "tini":
                    return pid
            try:
                unshare.wait(0.01)
            except subprocess.TimeoutExpired:
                continue
        raise LabError(f"a node's set-up failed with {unshare.returncode}; its words are above")
