"""The network backend `routes`: where nodes forward for each other freely, a host route says on which node a pod is.

Every host that talks to the pod directly needs it (on the node that has the pod: to its veth; on others: via that
node). Not for a VPC, which drops what is not addressed to an interface's own addresses.
"""

import errno
import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from handlers.errors import GiveUp
from handlers.network.netns import HERE, call_in, iproute

PROTOCOL: Final = 83  # who made the route, in `ip route`: free in /etc/iproute2/rt_protos; tells ours from others'


@dataclass(frozen=True, slots=True)
class Route:
    """One host route: to `address`, via a node's address or to a device of this node."""

    address: str
    via: str | None = None
    dev: str | None = None


def point(route: Route, *, node: Path = HERE) -> None:
    """Set the host route, in place of any other to that address: at no instant is there none.

    Blocking, about 2 ms (0.2 s at the first call of a process): call it through asyncio.to_thread. Raises GiveUp when
    the device or the way to `via` does not exist.
    """

    def replace() -> None:
        with iproute() as ip:
            ip.route("replace", dst=_prefix(route.address), proto=PROTOCOL, **_hop(ip, route))

    _refused_as_give_up(node, replace, f"no route to {route.address}")


def remove(address: str, *, node: Path = HERE) -> None:
    """Remove the host route to `address`, whoever made it. Absent is no error."""

    def delete() -> None:
        with iproute() as ip:
            for found in _find(ip, dst=_prefix(address)):
                ip.route("del", dst=_prefix(found.address))

    _refused_as_give_up(node, delete, f"the route to {address} stays")


def entries(*, node: Path = HERE) -> list[Route]:
    """Return the host routes that `point` has made, sorted by address."""

    def read() -> list[Route]:
        with iproute() as ip:
            return sorted(_find(ip, proto=PROTOCOL), key=lambda route: route.address)

    return call_in(node, read)


def _find(ip: Any, **match: object) -> list[Route]:
    found = []
    for family, bits in ((2, 32), (10, 128)):
        for entry in ip.get_routes(family=family, table=254):
            if entry["dst_len"] != bits:
                continue
            address = entry.get("dst")
            if match in ({"proto": entry["proto"]}, {"dst": _prefix(address)}):
                device = None if entry.get("gateway") else _device(ip, entry.get("oif"))
                found.append(Route(address, via=entry.get("gateway"), dev=device))
    return found


def _hop(ip: Any, route: Route) -> dict[str, object]:
    if route.via is not None:
        return {"gateway": str(ipaddress.ip_address(route.via))}
    indexes = ip.link_lookup(ifname=route.dev) if route.dev is not None else []
    if not indexes:
        raise OSError(errno.ENODEV, f"no device {route.dev}")
    return {"oif": indexes[0]}


def _device(ip: Any, index: int) -> str:
    return str(ip.get_links(index)[0].get("ifname"))


def _prefix(address: str) -> str:
    parsed = ipaddress.ip_address(address)
    return f"{parsed}/{parsed.max_prefixlen}"


def _refused_as_give_up(node: Path, action: Any, complaint: str) -> None:
    from pyroute2.netlink.exceptions import NetlinkError  # imported with IPRoute anyway

    try:
        call_in(node, action)
    except (NetlinkError, OSError) as error:
        raise GiveUp(f"{complaint}: {error}") from error
