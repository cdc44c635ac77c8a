"""The connection of a migration: TLS 1.3, both sides authenticated, every wait bounded by an absolute deadline.

The socket never blocks in the kernel: each wait is one `poll` of at most what is left until the deadline, so that the
receiver can watch its control channel meanwhile (`watch`).
"""

import contextlib
import errno
import math
import select
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from criu_transfer.errors import DeadlinePassed, PeerGone, ProtocolError

_HANDSHAKE = 5.0  # seconds for one handshake: a silent client must not keep the listener busy
_DEAD_PEER = 10.0  # seconds without any answer of the peer's kernel before a connection is given up
_LONGEST_POLL = 3600.0  # a deadline may be infinite
_IDENTITY = "spiffe://spotguard/node/"


@dataclass(frozen=True, slots=True)
class Credentials:
    """Paths of this node's certificate, its key and the authority that peers must come from; all PEM."""

    cert: Path
    key: Path
    ca: Path

    def context(self, *, server: bool) -> ssl.SSLContext:
        """Build a context for mutual TLS 1.3; raises OSError or ssl.SSLError for files that do not serve."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # nodes are known by URI names: `_check_peer`
        context.verify_mode = ssl.CERT_REQUIRED
        if server:
            context.num_tickets = 0  # nobody resumes a session
        context.load_cert_chain(self.cert, self.key)
        context.load_verify_locations(self.ca)
        return context


def identity(node: str) -> str:
    """Return the URI that the certificate of a node must carry as its only URI name."""
    return _IDENTITY + node


class Watch(Protocol):
    """Something besides the connection that is looked at while waiting; `ready` may raise to end the wait."""

    def fileno(self) -> int:
        """Return the descriptor to poll, or -1 when there is nothing to watch any more."""

    def ready(self) -> None:
        """React to the descriptor being readable."""


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlinePassed("no time is left for the transfer")
    return left


def wait(fd: int, event: int, deadline: float, watch: Watch | None = None) -> None:
    """Wait until `fd` is ready; raises PeerGone when nothing came before the deadline."""
    while True:
        poll = select.poll()
        poll.register(fd, event)
        watched = watch.fileno() if watch is not None else -1
        if watched >= 0:
            poll.register(watched, select.POLLIN)
        left = deadline - time.monotonic()
        ready = dict(poll.poll(max(0, math.ceil(min(left, _LONGEST_POLL) * 1000))))
        if watch is not None and watched in ready:
            watch.ready()
        if fd in ready:
            return
        if left <= 0:
            raise PeerGone("the peer stalled until the deadline")


class Stream:
    """One authenticated connection, used by one thread; `abort` alone may be called from another."""

    def __init__(self, sock: ssl.SSLSocket, peer: str, watch: Watch | None = None) -> None:
        self.peer = peer
        self._sock = sock
        self._watch = watch

    def send(self, data: bytes | bytearray | memoryview, deadline: float) -> None:
        """Send all of `data`, which must not change meanwhile; raises PeerGone, DeadlinePassed."""
        _left(deadline)
        view = memoryview(data)
        while view:
            try:  # after a wait OpenSSL wants to see the same bytes again and goes on where it was
                view = view[self._sock.send(view) :]
            except OSError as error:
                self._wait_or_give_up(error, deadline)

    def recv_exact(self, into: memoryview, deadline: float) -> None:
        """Fill the caller's buffer; raises PeerGone, also when the stream ends before it is full."""
        _left(deadline)
        while into:
            try:
                count = self._sock.recv_into(into)  # one record, 16 KiB at most
            except OSError as error:
                self._wait_or_give_up(error, deadline)
                continue
            if not count:
                raise PeerGone(f"{self.peer} closed the connection")
            into = into[count:]

    def _wait_or_give_up(self, error: OSError, deadline: float) -> None:
        event = _WANTS.get(type(error))
        if event is None:
            raise PeerGone(f"the connection to {self.peer} broke: {error}") from error
        wait(self._sock.fileno(), event, deadline, self._watch)

    def readable(self) -> bool:
        """Tell whether the peer has sent something or closed; never waits."""
        poll = select.poll()
        poll.register(self._sock.fileno(), select.POLLIN)
        return bool(self._sock.pending() or poll.poll(0))

    def finish(self, deadline: float) -> None:
        """End our side and drop what still comes until the peer ends his.

        Closing with unread bytes would send a reset, which eats our last frame on its way.
        """
        scrap = bytearray(64 << 10)
        try:
            socket.socket.shutdown(self._sock, socket.SHUT_WR)
            while True:
                wait(self._sock.fileno(), select.POLLIN, deadline, self._watch)
                if not socket.socket.recv_into(self._sock, scrap):
                    return
        except (OSError, PeerGone):
            return  # the last frame was a courtesy

    def abort(self) -> None:
        """End the connection, from any thread: whoever waits on it gets PeerGone."""
        with contextlib.suppress(OSError):  # it has ended already
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_WANTS: dict[type[OSError], int] = {ssl.SSLWantReadError: select.POLLIN, ssl.SSLWantWriteError: select.POLLOUT}


def connect(host: str, port: int, credentials: Credentials, expected: str, deadline: float) -> Stream:
    """Connect to the node `expected`; raises PeerGone, DeadlinePassed, and ProtocolError for any other peer."""
    context = credentials.context(server=False)
    try:
        sock = socket.create_connection((host, port), _left(deadline))
    except OSError as error:
        raise PeerGone(f"cannot connect to {expected} at {host} port {port}: {error}") from error
    return _secure(sock, context, expected, deadline, None)


class Listener:
    """A listening socket for exactly one migration."""

    def __init__(self, host: str, ports: range, credentials: Credentials) -> None:
        """Bind to the first free port of `ports`; range(0, 1) lets the kernel choose. Raises OSError."""
        self._context = credentials.context(server=True)
        self._sock = _bind(host, ports)
        self._sock.setblocking(False)
        self.port: int = self._sock.getsockname()[1]

    def accept(self, expected: str, deadline: float, watch: Watch | None, rejected: Callable[[str], None]) -> Stream:
        """Wait for the node `expected`.

        Whoever else connects is closed, told to `rejected`, and waiting goes on; a silent client costs 5 s at most.
        Raises PeerGone when nobody came before the deadline.
        """
        while True:
            wait(self._sock.fileno(), select.POLLIN, deadline, watch)
            try:
                sock, address = self._sock.accept()
            except OSError as error:  # the client has gone again
                rejected(f"accept: {error}")
                continue
            try:
                return _secure(
                    sock, self._context, expected, min(deadline, time.monotonic() + _HANDSHAKE), watch, server=True
                )
            except (ProtocolError, PeerGone, DeadlinePassed) as error:
                rejected(f"{address[0]}: {error}")

    def close(self) -> None:
        """Stop listening."""
        self._sock.close()


def _bind(host: str, ports: range) -> socket.socket:
    for port in ports:
        try:
            return socket.create_server((host, port), family=_family(host), backlog=4)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or port == ports[-1]:
                raise
    raise ValueError("no port to listen on")


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _secure(
    sock: socket.socket,
    context: ssl.SSLContext,
    expected: str,
    deadline: float,
    watch: Watch | None,
    *,
    server: bool = False,
) -> Stream:
    """Do the handshake, check who is there, and set the socket up; closes it when that fails."""
    tls = None
    try:
        _tune(sock)
        tls = context.wrap_socket(sock, server_side=server, do_handshake_on_connect=False)
        _handshake(tls, deadline, watch)
        _check_peer(tls, expected)
    except ssl.SSLError as error:
        (tls or sock).close()
        raise ProtocolError(f"TLS with {expected} failed: {error}") from error
    except OSError as error:
        (tls or sock).close()
        raise PeerGone(f"{expected} went away in the handshake: {error}") from error
    except BaseException:
        (tls or sock).close()
        raise
    return Stream(tls, expected, watch)


def _tune(sock: socket.socket) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(_DEAD_PEER * 1000))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)


def _handshake(tls: ssl.SSLSocket, deadline: float, watch: Watch | None) -> None:
    _left(deadline)
    while True:
        try:
            tls.do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            wait(tls.fileno(), _WANTS[type(error)], deadline, watch)
        else:
            return


def _check_peer(tls: ssl.SSLSocket, expected: str) -> None:
    names = (tls.getpeercert() or {}).get("subjectAltName", ())
    uris = [name[1] for name in names if name[0] == "URI"]
    if uris != [identity(expected)]:
        raise ProtocolError(f"the peer is {uris}, not {identity(expected)}")
