"""The nftables rules of a hold, by netlink: one table with one `netdev` ingress chain that drops.

    table netdev NAME { chain hold { type filter hook ingress device "DEVICE" priority -500; policy drop;
                                     ether saddr PASS accept } }

Built by hand and not by libnftables because it runs while the application is frozen: 0.1 ms whatever other rules the
machine has (libnftables reads them all first: 0.8 ms at 5,000 chains), errors come as an errno and not as prose, and
nothing is imported. Layouts: linux/netfilter/nf_tables.h; `nft list ruleset` shows the result.
"""

import errno
import socket
import struct
from typing import Final

from handlers.network.netlink import ACK, CREATE, DUMP, EXCLUSIVE, Socket, attribute, attributes, message, nested

PRIORITY: Final = -500
_NETDEV = 5  # NFPROTO_NETDEV
_SUBSYSTEM = 10 << 8  # NFNL_SUBSYS_NFTABLES
_NEWTABLE, _GETTABLE, _DELTABLE, _NEWCHAIN, _NEWRULE = 0, 1, 2, 3, 6
_BATCH_BEGIN, _BATCH_END = 16, 17
_DROP, _ACCEPT = 0, 1
_REGISTER = 1
_CHAIN = "hold"


def hold_request(table: str, device: str, accept_from: bytes) -> bytes:
    """Build the request that drops what comes in on `device`, except from the hardware address `accept_from`.

    One transaction. It fails with EEXIST when the table is there: replacing it (delete and add in one transaction) lets
    frames through on Linux 6.18, some per hundred replacements, so a hold that exists is never touched.
    """
    name = attribute(1, _text(table))
    hook = nested(4, attribute(1, _u32(0)), attribute(2, struct.pack(">i", PRIORITY)), attribute(3, _text(device)))
    chain = name + attribute(3, _text(_CHAIN)) + hook + attribute(5, _u32(_DROP)) + attribute(7, _text("filter"))
    rule = name + attribute(2, _text(_CHAIN)) + _accept_from(accept_from)
    return _transaction(
        _message(_NEWTABLE, CREATE | EXCLUSIVE, name),
        _message(_NEWCHAIN, CREATE, chain),
        _message(_NEWRULE, CREATE | ACK, rule),
    )


def release_request(table: str) -> bytes:
    """Build the request that removes the table."""
    return _transaction(_message(_DELTABLE, ACK, attribute(1, _text(table))))


def release(netlink: Socket, request: bytes) -> None:
    """Send a release request; a table that is gone already is no error."""
    try:
        netlink.execute(request)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise


def tables(netlink: Socket) -> list[str]:
    """Return the names of all `netdev` tables in the socket's namespace."""
    found = []
    for _, body in netlink.dump(_message(_GETTABLE, DUMP, b"")):
        found += [data.rstrip(b"\0").decode() for kind, data in attributes(body[4:]) if kind == 1]
    return found


def _accept_from(mac: bytes) -> bytes:
    # payload load 6b @ link header + 6 => reg 1; cmp eq reg 1 MAC; immediate verdict accept
    load = attribute(1, _u32(_REGISTER)) + attribute(2, _u32(0)) + attribute(3, _u32(6)) + attribute(4, _u32(6))
    compare = attribute(1, _u32(_REGISTER)) + attribute(2, _u32(0)) + nested(3, attribute(1, mac))
    verdict = attribute(1, _u32(0)) + nested(2, nested(2, attribute(1, _u32(_ACCEPT))))
    return nested(4, _expression("payload", load), _expression("cmp", compare), _expression("immediate", verdict))


def _expression(name: str, data: bytes) -> bytes:
    return nested(1, attribute(1, _text(name)), nested(2, data))


def _transaction(*messages: bytes) -> bytes:
    mark = struct.pack("=BBH", 0, 0, socket.htons(_SUBSYSTEM >> 8))
    return message(_BATCH_BEGIN, 0, mark) + b"".join(messages) + message(_BATCH_END, 0, mark)


def _message(kind: int, flags: int, body: bytes) -> bytes:
    return message(_SUBSYSTEM | kind, flags, struct.pack("=BBH", _NETDEV, 0, 0) + body)


def _text(value: str) -> bytes:
    return value.encode() + b"\0"


def _u32(value: int) -> bytes:
    return struct.pack(">I", value)
