"""A small lab: a bridge with two nodes and a client on it, each a network namespace, and pods on the nodes."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from handlers.network import netns, sandbox
from handlers.network.sandbox import Sandbox

POD = "10.77.1.10"


def ip(*lines: str, where: str | None = None) -> None:
    command = ["ip", *(["-n", where] if where else []), "-batch", "-"]
    subprocess.run(command, input="\n".join(lines), text=True, check=True)


@dataclass
class Lab:
    """What a test acts on; `client` sees the pod's address by way of a node."""

    client: Path
    nodes: dict[str, Path]
    addresses: dict[str, str]
    pods: ExitStack

    def pod(self, name: str, node: str, *, held: bool = False, mac: bytes | None = None) -> Sandbox:
        box = sandbox.create(name, POD, node=self.nodes[node], held=held, mac=mac)
        self.pods.callback(sandbox.destroy, name, node=self.nodes[node])
        return box

    def route(self, node: str) -> None:
        ip(f"route replace {POD}/32 via {self.addresses[node]}", where="client")


@pytest.fixture
def lab() -> Iterator[Lab]:
    with ExitStack() as made:
        paths: dict[str, Path] = {}
        for name in ("fabric", "client", "node-a", "node-b"):
            paths[name] = netns.create(name)
            made.callback(netns.remove, name)
        ip("link add br0 type bridge", "link set br0 up", where="fabric")
        addresses = {"node-a": "10.77.0.1", "node-b": "10.77.0.2", "client": "10.77.0.50"}
        for name, address in addresses.items():
            ip(
                f"link add {name} type veth peer name eth0 netns {name}",
                f"link set {name} master br0 up",
                where="fabric",
            )
            ip("link set lo up", f"addr add {address}/24 dev eth0", "link set eth0 up", where=name)
        for node in ("node-a", "node-b"):
            netns.call_in(paths[node], _forward)
        nodes = {name: paths[name] for name in ("node-a", "node-b")}
        with ExitStack() as pods:
            yield Lab(paths["client"], nodes, addresses, pods)


def _forward() -> None:
    settings = Path("/proc/sys/net/ipv4")  # of the calling thread's namespace
    for name, value in (("ip_forward", "1"), ("conf/all/send_redirects", "0"), ("conf/eth0/send_redirects", "0")):
        (settings / name).write_text(value)
