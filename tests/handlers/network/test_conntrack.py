import ipaddress
import socket
import subprocess

import pytest

from handlers.network import netns
from handlers.network.conntrack import Entry, Tuple, entries, recreate, unkeepable
from handlers.network.routes import Route, point

pytestmark = pytest.mark.kernel

POD, SERVICE, CLIENT, NODE = "10.77.1.10", "10.96.0.1", "10.77.0.50", "10.77.0.1"
RULES = f"""
table ip services {{
  chain pre {{ type nat hook prerouting priority -100; ip daddr {SERVICE} tcp dport 80 dnat to {CLIENT}:8080; }}
  chain post {{ type nat hook postrouting priority 100; tcp dport 8081 masquerade; }}
}}"""


def nft(where, rules: str) -> None:
    netns.call_in(where, lambda: subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True))


def connect(box, lab, address: tuple[str, int], port: int) -> tuple[socket.socket, socket.socket]:
    """Connect from the pod; return both ends."""
    with netns.open_socket(lab.client, socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((CLIENT, port))
        listener.listen()
        listener.settimeout(5)
        near = netns.open_socket(box.netns, socket.AF_INET, socket.SOCK_STREAM)
        near.settimeout(5)
        near.connect(address)
        far, _ = listener.accept()
    return near, far


def test_a_connection_through_a_service_lives_on_at_the_other_node(lab):
    box = lab.pod("one", "node-a")
    lab.route("node-a")
    nft(box.node, RULES)
    near, far = connect(box, lab, (SERVICE, 80), 8080)
    with near, far:
        (entry,) = entries(POD, node=box.node)
        pod, service, client = map(ipaddress.ip_address, (POD, SERVICE, CLIENT))
        port = near.getsockname()[1]
        assert entry.original == Tuple(pod, port, service, 80)
        assert entry.reply == Tuple(client, 8080, pod, port)
        assert (entry.protocol, entry.state) == (socket.IPPROTO_TCP, 3)
        assert unkeepable([entry], [NODE]) == []

        # The same pod's veth now belongs to another node, as far as its packets can tell.
        other = lab.nodes["node-b"]
        nft(other, RULES)
        assert recreate([entry], node=other) == []
        assert recreate([entry], node=other) == []
        (copied,) = entries(POD, node=other)
        assert (copied.original, copied.reply, copied.state) == (entry.original, entry.reply, entry.state)
        assert 0 < copied.timeout <= entry.timeout
        subprocess.run(["ip", "-n", "node-a", "link", "set", box.host_dev, "netns", "node-b"], check=True)
        subprocess.run(["ip", "-n", "node-b", "link", "set", box.host_dev, "up"], check=True)
        neighbour = f"neigh replace {POD} lladdr {box.mac.hex(':')} dev {box.host_dev}"
        subprocess.run(["ip", "-n", "node-b", *neighbour.split()], check=True)
        gateway = f"neigh replace 169.254.1.1 lladdr {box.host_mac.hex(':')} dev eth0 nud permanent"
        subprocess.run(["ip", "-n", "pod-one", *gateway.split()], check=True)
        point(Route(POD, dev=box.host_dev), node=other)
        lab.route("node-b")
        near.sendall(b"still here")
        far.settimeout(5)
        assert far.recv(10) == b"still here"
        far.sendall(b"yes")
        assert near.recv(3) == b"yes"
    subprocess.run(["ip", "-n", "node-b", "link", "del", box.host_dev], check=True)


def test_masqueraded_connections_cannot_be_kept(lab):
    box = lab.pod("one", "node-a")
    lab.route("node-a")
    nft(box.node, RULES)
    near, far = connect(box, lab, (CLIENT, 8081), 8081)
    with near, far:
        tracked = entries(POD, node=box.node)
        assert unkeepable(tracked, [NODE]) == tracked
        assert len(tracked) == 1


def test_a_node_that_tracks_nothing_has_no_entries(lab):
    box = lab.pod("one", "node-a")
    assert entries(POD, node=box.node) == []
    assert entries("fd00::1", node=box.node) == []


def test_ipv6_and_udp_entries_can_be_made_and_read(lab):
    one, two, three = map(ipaddress.ip_address, ("fd00::1", "fd00::2", "fd00::3"))
    made = Entry(socket.IPPROTO_UDP, Tuple(one, 1000, two, 53), Tuple(three, 5353, one, 1000), timeout=30, mark=7)
    assert recreate([made], node=lab.client) == []
    (read,) = entries("fd00::1", node=lab.client)
    assert (read.original, read.reply, read.mark) == (made.original, made.reply, 7)


def test_what_the_kernel_refuses_is_told(lab):
    pod, other = map(ipaddress.ip_address, (POD, CLIENT))
    bad = Entry(socket.IPPROTO_TCP, Tuple(pod, 1, other, 2), Tuple(other, 2, pod, 1), timeout=30, state=200)
    assert recreate([bad], node=lab.client) == [bad]
