"""A pod's connection tracking entries: what its node knows of connections that it translates for the pod.

A connection through a ClusterIP lives only where its entry is; so the entries go with the pod. Those that stand on an
address of the old node (masquerading, node ports) cannot: `unkeepable` names them for the report.

Where the node tracks nothing (no rule asks for it, or no nf_conntrack) there are no entries. ctnetlink, layouts:
linux/netfilter/nfnetlink_conntrack.h. Only TCP and UDP; other protocols have nothing that a client would miss.
"""

import errno
import ipaddress
import socket
import struct
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from handlers.errors import GiveUp
from handlers.network import netlink
from handlers.network.netlink import ACK, CREATE, DUMP, EXCLUSIVE, attribute, attributes, message, nested
from handlers.network.netns import HERE

type Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_SUBSYSTEM = 1 << 8  # NFNL_SUBSYS_CTNETLINK
_NEW, _GET = 0, 1
_ORIGINAL, _REPLY, _STATUS, _PROTOCOL_INFO, _NAT_SRC, _TIMEOUT, _MARK, _NAT_DST = 1, 2, 3, 4, 6, 7, 8, 13
_SEEN_REPLY_ASSURED_CONFIRMED = 14
_LIBERAL = b"\x08\x08"  # do not check windows: the new node has not seen the connection's beginning
_PROTOCOLS: Final = frozenset({socket.IPPROTO_TCP, socket.IPPROTO_UDP})


@dataclass(frozen=True, slots=True)
class Tuple:
    """One direction of a connection, as its packets look."""

    source: Address
    source_port: int
    destination: Address
    destination_port: int

    def reversed(self) -> "Tuple":
        """Return how an answer looks when nothing is translated."""
        return Tuple(self.destination, self.destination_port, self.source, self.source_port)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tracked connection. `reply` differs from the reversed `original` by the translation.

    protocol: IPPROTO_TCP or IPPROTO_UDP. state: of TCP, as in enum tcp_conntrack (3: established). timeout: seconds.
    """

    protocol: int
    original: Tuple
    reply: Tuple
    timeout: int
    mark: int = 0
    state: int | None = None


def as_the_pod_sees(entry: Entry, address: str) -> Tuple:
    """Return a connection with the pod's own end as source: what its socket says."""
    pod = ipaddress.ip_address(address)
    return entry.original if entry.original.source == pod else entry.reply


def to_json(tracked: Iterable[Entry]) -> list[dict[str, Any]]:
    """Give entries as JSON types, to send them to another node."""
    return [
        {
            "protocol": entry.protocol,
            "original": _ends_to_json(entry.original),
            "reply": _ends_to_json(entry.reply),
            "timeout": entry.timeout,
            "mark": entry.mark,
            "state": entry.state,
        }
        for entry in tracked
    ]


def from_json(data: Any) -> list[Entry]:
    """Read what `to_json` gave and a peer sent; raises GiveUp for anything else."""
    try:
        return [
            Entry(
                protocol=_number(one["protocol"], 255),
                original=_ends_from_json(one["original"]),
                reply=_ends_from_json(one["reply"]),
                timeout=_number(one["timeout"], 1 << 31),
                mark=_number(one["mark"], (1 << 32) - 1),
                state=None if one["state"] is None else _number(one["state"], 255),
            )
            for one in list(data)
        ]
    except (KeyError, TypeError, ValueError) as wrong:
        raise GiveUp(f"no list of tracked connections: {type(wrong).__name__}: {wrong}") from wrong


def _ends_to_json(ends: Tuple) -> list[str | int]:
    return [str(ends.source), ends.source_port, str(ends.destination), ends.destination_port]


def _ends_from_json(data: Any) -> Tuple:
    source, source_port, destination, destination_port = data
    return Tuple(
        ipaddress.ip_address(source),
        _number(source_port, 65535),
        ipaddress.ip_address(destination),
        _number(destination_port, 65535),
    )


def _number(value: object, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(f"{str(value)[:40]!r} is no number from 0 to {most}")
    return value


def entries(address: str, *, node: Path = HERE) -> list[Entry]:
    """Return the node's entries in which the pod's address occurs, in either direction. Raises OSError (EPERM)."""
    pod = ipaddress.ip_address(address)
    found = []
    with netlink.Socket(node, netlink.NETFILTER) as tracking:
        try:
            for _, body in tracking.dump(_message(pod, _GET, DUMP, b"")):
                # A node may track 100,000 connections: look for the address before taking an entry apart.
                if pod.packed in body and (entry := _parse(body[4:])) is not None and _ends_at(entry, pod):
                    found.append(entry)
        except OSError as error:
            if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL}:  # ctnetlink is not in this kernel
                raise
    return found


def unkeepable(tracked: Iterable[Entry], node_addresses: Collection[str]) -> list[Entry]:
    """Return those that stand on an address of the node, and so end with the move."""
    own = {ipaddress.ip_address(address) for address in node_addresses}
    return [entry for entry in tracked if own & {entry.original.destination, entry.reply.destination}]


def recreate(tracked: Iterable[Entry], *, node: Path = HERE) -> list[Entry]:
    """Make the entries on this node; return those that the kernel refused. One that is there already is kept.

    To be called before the first packet of the connection passes: that would make an entry without translation.
    """
    refused = []
    with netlink.Socket(node, netlink.NETFILTER) as tracking:
        for entry in tracked:
            try:
                tracking.execute(_message(entry.original.source, _NEW, CREATE | EXCLUSIVE | ACK, _encode(entry)))
            except OSError as error:
                if error.errno != errno.EEXIST:
                    refused.append(entry)
    return refused


def _ends_at(entry: Entry, pod: Address) -> bool:
    return pod in {entry.original.source, entry.original.destination, entry.reply.source, entry.reply.destination}


def _parse(data: bytes) -> Entry | None:
    """Take one entry apart; None when it is neither TCP nor UDP."""
    parts = dict(attributes(data))
    protocol, original = _parse_tuple(parts[_ORIGINAL])
    if protocol not in _PROTOCOLS or original is None:
        return None
    _, reply = _parse_tuple(parts[_REPLY])
    state = None
    if protocol == socket.IPPROTO_TCP and _PROTOCOL_INFO in parts:
        state = dict(attributes(dict(attributes(parts[_PROTOCOL_INFO]))[1]))[1][0]
    timeout, mark = (int.from_bytes(parts.get(kind, b"")) for kind in (_TIMEOUT, _MARK))
    return Entry(protocol, original, reply or original.reversed(), timeout, mark, state)


def _parse_tuple(data: bytes) -> tuple[int, Tuple | None]:
    parts = dict(attributes(data))
    hosts, ports = dict(attributes(parts[1])), dict(attributes(parts[2]))
    protocol = ports[1][0]
    if protocol not in _PROTOCOLS:
        return protocol, None
    source, destination = (ipaddress.ip_address(hosts[v4] if v4 in hosts else hosts[v4 + 2]) for v4 in (1, 2))
    return protocol, Tuple(source, int.from_bytes(ports[2]), destination, int.from_bytes(ports[3]))


def _encode(entry: Entry) -> bytes:
    """Encode the connection as it would be untranslated, and the translation beside it: the kernel combines them."""
    plain = entry.original.reversed()
    data = _encode_tuple(_ORIGINAL, entry.protocol, entry.original) + _encode_tuple(_REPLY, entry.protocol, plain)
    data += attribute(_STATUS, _u32(_SEEN_REPLY_ASSURED_CONFIRMED)) + attribute(_TIMEOUT, _u32(entry.timeout))
    if entry.mark:
        data += attribute(_MARK, _u32(entry.mark))
    if entry.state is not None:
        tcp = attribute(1, bytes([entry.state])) + attribute(4, _LIBERAL) + attribute(5, _LIBERAL)
        data += nested(_PROTOCOL_INFO, nested(1, tcp))
    if (entry.reply.source, entry.reply.source_port) != (plain.source, plain.source_port):
        data += _encode_translation(_NAT_DST, entry.reply.source, entry.reply.source_port)
    if (entry.reply.destination, entry.reply.destination_port) != (plain.destination, plain.destination_port):
        data += _encode_translation(_NAT_SRC, entry.reply.destination, entry.reply.destination_port)
    return data


def _encode_tuple(kind: int, protocol: int, ends: Tuple) -> bytes:
    first = 1 if ends.source.version == 4 else 3
    hosts = attribute(first, ends.source.packed) + attribute(first + 1, ends.destination.packed)
    ports = attribute(1, bytes([protocol])) + attribute(2, _u16(ends.source_port))
    return nested(kind, nested(1, hosts), nested(2, ports, attribute(3, _u16(ends.destination_port))))


def _encode_translation(kind: int, address: Address, port: int) -> bytes:
    low, high = (1, 2) if address.version == 4 else (4, 5)
    ports = nested(3, attribute(1, _u16(port)), attribute(2, _u16(port)))
    return nested(kind, attribute(low, address.packed), attribute(high, address.packed), ports)


def _message(family_of: Address, kind: int, flags: int, body: bytes) -> bytes:
    family = socket.AF_INET if family_of.version == 4 else socket.AF_INET6
    return message(_SUBSYSTEM | kind, flags, struct.pack("=BBH", family, 0, 0) + body)


def _u16(value: int) -> bytes:
    return struct.pack(">H", value)


def _u32(value: int) -> bytes:
    return struct.pack(">I", value)
