import socket
import subprocess
import threading
from contextlib import closing
from pathlib import Path

import pytest

from handlers.errors import GiveUp
from handlers.network import netns, sandbox
from handlers.network.hold import Hold, is_held
from handlers.network.routes import Route, point

pytestmark = pytest.mark.kernel

POD = "10.77.1.10"


def ip(*arguments: str, where: str) -> str:
    return subprocess.run(["ip", "-n", where, *arguments], capture_output=True, text=True, check=True).stdout


def ping(box, address: str = "10.77.0.50") -> bool:
    """One datagram there and back."""

    def exchange() -> bool:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with (
            netns.open_socket(netns.path_of("client"), family, socket.SOCK_DGRAM) as far,
            socket.socket(family, socket.SOCK_DGRAM) as near,
        ):
            far.bind((address, 0))
            far.settimeout(0.2)
            near.settimeout(0.2)
            near.bind((box.address, 0))
            near.sendto(b"ping", far.getsockname())
            try:
                data, sender = far.recvfrom(10)
                far.sendto(data, sender)
                return near.recv(10) == b"ping"
            except TimeoutError:
                return False

    return netns.call_in(box.netns, exchange)


def test_a_pod_is_wired_as_the_vpc_cni_does_it(lab):
    mac = bytes.fromhex("02aabbccdd01")
    box = lab.pod("one", "node-a", mac=mac)
    lab.route("node-a")
    assert box.mac == mac
    assert f"{POD}/32" in ip("address", "show", "eth0", where="pod-one")
    assert "default via 169.254.1.1 dev eth0" in ip("route", where="pod-one")
    assert f"lladdr {box.host_mac.hex(':')} PERMANENT" in ip("neigh", where="pod-one")
    assert f"{POD} dev {box.host_dev}" in ip("route", where="node-a")
    assert f"{POD} dev {box.host_dev} lladdr {mac.hex(':')} PERMANENT" in ip("neigh", where="node-a")
    assert sandbox.find("one", node=box.node) == box
    assert sandbox.existing() == ["one"]
    assert not is_held(box)
    assert ping(box)


def test_what_is_destroyed_leaves_nothing_behind(lab):
    box = lab.pod("one", "node-a")
    with closing(Hold.prepare(box)) as hold:
        hold.engage()
    for _ in range(2):
        sandbox.destroy("one", node=box.node)
        assert sandbox.existing() == []
        assert sandbox.find("one", node=box.node) is None
        assert box.host_dev not in ip("link", where="node-a")
        assert POD not in ip("route", where="node-a")
        rules = netns.call_in(
            box.node, lambda: subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True)
        )
        assert rules.stdout == ""


def test_a_held_sandbox_says_nothing_until_it_is_released(lab):
    tap = netns.open_socket(lab.client, socket.AF_PACKET, socket.SOCK_RAW)
    with closing(tap):
        box = lab.pod("two", "node-b", held=True)
        lab.route("node-b")
        assert is_held(box)
        assert POD not in ip("route", where="node-b")
        with closing(Hold.adopt(box)) as hold:
            point(Route(POD, dev=box.host_dev), node=box.node)
            assert not ping(box)
            hold.release()
    assert ping(box)


def test_a_held_sandbox_lets_nothing_out_from_its_first_moment(lab):
    """Bringing an interface up makes the kernel send by itself: multicast reports, router solicitations."""
    held = lab.pod("held", "node-a", held=True)
    free = lab.pod("free", "node-a")
    with netns.open_socket(free.node, socket.AF_PACKET, socket.SOCK_RAW) as tap:
        tap.settimeout(5)
        tap.bind((held.host_dev, 3))
        assert tap.recv(2000)  # a packet socket sees what the hold drops
        tap.bind((free.host_dev, 3))
        while not _received(free):
            tap.recv(2000)
    assert _received(held) == 0


def test_the_hold_is_there_before_the_link_comes_up(lab, monkeypatch):
    configure, seen = sandbox._configure_pod, []

    def look_first(box) -> None:
        seen.append((is_held(box), "state DOWN" in ip("link", "show", "eth0", where="pod-two")))
        configure(box)

    monkeypatch.setattr(sandbox, "_configure_pod", look_first)
    lab.pod("two", "node-b", held=True)
    assert seen == [(True, True)]


def _received(box) -> int:
    """How many IPv6 packets the node's own stack has had from the pod."""

    def read() -> str:
        return Path(f"/proc/thread-self/net/dev_snmp6/{box.host_dev}").read_text()

    return int(dict(line.split() for line in netns.call_in(box.node, read).splitlines())["Ip6InReceives"])


def test_a_name_is_used_once(lab):
    lab.pod("one", "node-a")
    with pytest.raises(GiveUp, match="exists"):
        lab.pod("one", "node-a")


def test_a_sandbox_that_cannot_be_made_leaves_nothing(lab):
    with pytest.raises(GiveUp, match="could not be made"):
        sandbox.create("one", POD, mac=bytes.fromhex("010000000000"), node=lab.nodes["node-a"])  # a multicast address
    assert sandbox.existing() == []
    with pytest.raises(ValueError, match="address"):
        sandbox.create("one", "no address", node=lab.nodes["node-a"])


def test_an_ipv6_pod_has_its_address_at_once(lab):
    box = sandbox.create("six", "fd00::77", node=lab.nodes["node-a"])
    try:
        assert sandbox.find("six", node=box.node) == box
        assert "tentative" not in ip("address", "show", "eth0", "to", "fd00::77", where="pod-six")
        assert "default via fe80::1 dev eth0" in ip("-6", "route", where="pod-six")
        with closing(Hold.prepare(box)) as hold:
            hold.engage()
            hold.release()
    finally:
        sandbox.destroy("six", node=box.node)


def test_acting_in_a_namespace_leaves_the_process_where_it_is(lab):
    before, threads = netns.HERE.readlink(), threading.active_count()

    def fail() -> None:
        raise LookupError("inside")

    assert netns.call_in(lab.client, lambda: Path("/proc/thread-self/ns/net").readlink()) != before
    with pytest.raises(LookupError, match="inside"):
        netns.call_in(lab.client, fail)
    assert netns.HERE.readlink() == before
    assert threading.active_count() == threads


def test_a_half_made_namespace_is_used_again():
    path = netns.path_of("half")
    path.parent.mkdir(exist_ok=True)
    path.touch()
    assert "half" not in netns.names()
    netns.create("half")
    assert "half" in netns.names()
    with pytest.raises(FileExistsError):
        netns.create("half")
    netns.remove("half")
    netns.remove("half")
    assert not path.exists()
