"""A pod's own network: a namespace, a veth pair, the address, and the way out, wired as the AWS VPC CNI does it.

Inside, the pod has its address as a host route on `eth0` and sends everything to a gateway that exists only as a
permanent neighbour entry (the other end of the pair). Outside, the node routes the address to its end of the pair.
Both neighbour entries are permanent: while a hold drops everything, nobody could answer for them.

How others reach the address is the business of `routes`. The node forwards (ip_forward=1), with redirects off.
"""

import errno
import hashlib
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from handlers.errors import GiveUp
from handlers.network import netlink, netns, nft
from handlers.network.netns import HERE, iproute

POD_DEVICE: Final = "eth0"
_PREFIX: Final = "pod-"
_GATEWAYS: Final = {4: "169.254.1.1", 6: "fe80::1"}
_BITS: Final = {4: 32, 6: 128}
_NUD_PERMANENT = 0x80
_ONLINK = 4
_IFA_F_NODAD = 2


@dataclass(frozen=True, slots=True)
class Sandbox:
    """The network of one pod on one node.

    netns: path of the pod's namespace. node: path of the namespace that `host_dev` is in. `mac` is the pod's hardware
    address, `host_mac` that of the node's end.
    """

    name: str
    address: str
    netns: Path
    pod_dev: str
    host_dev: str
    mac: bytes
    host_mac: bytes
    node: Path = HERE

    @property
    def pod_table(self) -> str:
        """The nftables table in the pod's namespace that holds what comes in."""
        return "spotguard-hold"

    @property
    def host_table(self) -> str:
        """The nftables table in the node's namespace that holds what the pod sends."""
        return _host_table(self.host_dev)

    @property
    def play_mac(self) -> bytes:
        """The sender's address of played frames: a hold lets them pass. Not guessable from outside the node."""
        return b"\x06" + hashlib.blake2s(self.mac + self.host_mac + b"play", digest_size=5).digest()


def create(name: str, address: str, *, mac: bytes | None = None, node: Path = HERE, held: bool = False) -> Sandbox:
    """Create the network of pod `name` with `address` on the node whose network namespace is `node`.

    `held`: everything is dropped, both ways, from before the first link comes up, and the node gets no route to the
    address yet: for the target of a migration, where the address is still in use elsewhere. `routes.point` and
    `Hold.release` end that. Raises GiveUp when it exists already or the kernel refuses; nothing is left behind then.
    """
    ipaddress.ip_address(address)
    try:
        path = netns.create(_PREFIX + name)
    except FileExistsError as error:
        raise GiveUp(f"the pod network {name} exists already: destroy it first") from error
    box = Sandbox(name, address, path, POD_DEVICE, _host_device(name), mac or _random_mac(), _random_mac(), node)
    try:
        _wire(box, held=held)
    except Exception as error:
        destroy(name, node=node)
        raise GiveUp(f"the network of pod {name} could not be made: {error}") from error
    return box


def destroy(name: str, *, node: Path = HERE) -> None:
    """Remove the pod's network, silently: no FIN or RST of its sockets gets out. Absent is no error.

    The veth pair goes first, and its hold stays until it is gone. Processes must have ended, or they keep the
    namespace, deaf and mute.
    """
    netns.call_in(node, lambda: _remove_link(_host_device(name)))
    _remove_table(_host_device(name), node)
    netns.remove(_PREFIX + name)


def existing() -> list[str]:
    """Return the names of all pods that have a network here."""
    return [name.removeprefix(_PREFIX) for name in netns.names() if name.startswith(_PREFIX)]


def find(name: str, *, node: Path = HERE) -> Sandbox | None:
    """Read a pod's network back from the kernel, as after a restart; None when it is not there or only in part."""
    path = netns.path_of(_PREFIX + name)
    if _PREFIX + name not in netns.names():
        return None
    host_dev = _host_device(name)
    host_mac = netns.call_in(node, lambda: _hardware_address(host_dev))
    mac = netns.call_in(path, lambda: _hardware_address(POD_DEVICE))
    address = netns.call_in(path, lambda: _global_address(POD_DEVICE))
    if not (host_mac and mac and address):
        return None
    return Sandbox(name, address, path, POD_DEVICE, host_dev, mac, host_mac, node)


def _wire(box: Sandbox, *, held: bool) -> None:
    _remove_table(box.host_dev, box.node)
    netns.call_in(box.node, lambda: _make_pair(box))
    if held:
        hold(box)
    netns.call_in(box.netns, lambda: _configure_pod(box))
    netns.call_in(box.node, lambda: _configure_node(box, route=not held))


def hold(box: Sandbox) -> None:
    """Drop everything from and to the pod from now on. What is dropped is lost; `Hold` keeps it."""
    for where, table, device in (
        (box.netns, box.pod_table, box.pod_dev),
        (box.node, box.host_table, box.host_dev),
    ):
        with netlink.Socket(where, netlink.NETFILTER) as rules:
            rules.execute(nft.hold_request(table, device, box.play_mac))


def _make_pair(box: Sandbox) -> None:
    with iproute() as ip, box.netns.open("rb") as pod:
        peer = {"ifname": box.pod_dev, "address": _text(box.mac), "net_ns_fd": pod.fileno()}
        ip.link("add", ifname=box.host_dev, kind="veth", address=_text(box.host_mac), peer=peer)


def _configure_pod(box: Sandbox) -> None:
    version = ipaddress.ip_address(box.address).version
    with iproute() as ip:
        ip.link("set", index=_index(ip, "lo"), state="up")
        index = _index(ip, box.pod_dev)
        flags = {"flags": _IFA_F_NODAD} if version == 6 else {}
        ip.addr("add", index=index, address=box.address, prefixlen=_BITS[version], **flags)
        ip.link("set", index=index, state="up")
        gateway = _GATEWAYS[version]
        ip.neigh("replace", dst=gateway, lladdr=_text(box.host_mac), ifindex=index, state=_NUD_PERMANENT)
        ip.route("add", dst="default" if version == 4 else "::/0", gateway=gateway, oif=index, flags=_ONLINK)


def _configure_node(box: Sandbox, *, route: bool) -> None:
    with iproute() as ip:
        index = _index(ip, box.host_dev)
        ip.link("set", index=index, state="up")
        ip.neigh("replace", dst=box.address, lladdr=_text(box.mac), ifindex=index, state=_NUD_PERMANENT)
        if route:
            bits = _BITS[ipaddress.ip_address(box.address).version]
            ip.route("replace", dst=f"{box.address}/{bits}", oif=index)


def _remove_table(host_dev: str, node: Path) -> None:
    """Remove the hold of a device that is gone: the kernel keeps the table, from 6.16 on with its chain."""
    with netlink.Socket(node, netlink.NETFILTER) as rules:
        nft.release(rules, nft.release_request(_host_table(host_dev)))


def _host_table(host_dev: str) -> str:
    return f"spotguard-hold-{host_dev}"


def _remove_link(device: str) -> None:
    from pyroute2.netlink.exceptions import NetlinkError

    with iproute() as ip:
        for index in ip.link_lookup(ifname=device):
            try:
                ip.link("del", index=index)
            except NetlinkError as error:
                if error.code != errno.ENODEV:
                    raise


def _hardware_address(device: str) -> bytes | None:
    with iproute() as ip:
        for index in ip.link_lookup(ifname=device):
            return bytes.fromhex(ip.get_links(index)[0].get("address").replace(":", ""))
    return None


def _global_address(device: str) -> str | None:
    with iproute() as ip:
        for index in ip.link_lookup(ifname=device):
            for address in ip.get_addr(index=index, scope=0):
                return str(address.get("address"))
    return None


def _index(ip: Any, device: str) -> int:
    return int(ip.link_lookup(ifname=device)[0])


def _host_device(name: str) -> str:
    return "sg" + hashlib.blake2s(name.encode(), digest_size=6).hexdigest()  # 14 characters; 15 are allowed


def _random_mac() -> bytes:
    return b"\x02" + os.urandom(5)


def _text(mac: bytes) -> str:
    return mac.hex(":")
