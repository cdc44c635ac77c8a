"""The line between a receiver and its agent: JSON objects, one a line, both ways, over a Unix stream socket."""

import contextlib
import json
import math
import select
import signal
import socket
from fcntl import F_GETFL, F_SETFL, F_SETOWN, fcntl
from os import O_ASYNC, getpid

from criu_transfer.errors import GiveUp, ProtocolError
from criu_transfer.messages import Fields
from criu_transfer.stream import wait
from criu_transfer.wire import decode_json

_MAX_LINE = 64 << 10


class ControlClosed(GiveUp):
    """The agent is gone, and it had not said that this migration is to outlive it."""


class Control:
    """Our end. A stream watches it while it waits (`criu_transfer.stream.Watch`)."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._received = bytearray()
        self._closed = False
        self.keep = False  # told to go on without the agent

    def configuration(self, deadline: float) -> Fields:
        """Return the first line; raises ControlClosed, PeerGone at the deadline, ProtocolError for what is none."""
        while (line := self._line()) is None:
            wait(self._sock.fileno(), select.POLLIN, deadline)
            self._read()
            if self._closed:
                raise ControlClosed("the agent closed the control channel before it said what to receive")
        return Fields(decode_json(line))

    def emit(self, event: dict[str, object]) -> None:
        """Tell the agent something; never blocks. An agent that does not read misses it."""
        if self._closed:
            return
        try:
            self._sock.send(json.dumps(event).encode() + b"\n", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError):
            self._end()

    def fail(self, error: Exception) -> None:
        """Tell the agent why we end, if it is still there."""
        with contextlib.suppress(ControlClosed):
            self.emit({"event": "failed", "error": str(error)[:4000], "kind": type(error).__name__})

    def fileno(self) -> int:
        """Return the descriptor to wait for, -1 when it is closed."""
        return -1 if self._closed else self._sock.fileno()

    def ready(self) -> None:
        """Take in what the agent says; raises ControlClosed when it has gone without having said {"do": "keep"}."""
        self._read()
        while (line := self._line()) is not None:
            if decode_json(line).get("do") != "keep":
                raise ProtocolError(f"the agent said {line[:80]!a}")
            self.keep = True
        if self._closed:
            self._end()

    def wait_for_keep(self) -> None:
        """Wait until the agent lets us go; raises ControlClosed."""
        signal.signal(signal.SIGIO, signal.SIG_IGN)  # else a handler could take the line that we wait for
        while not self.keep:
            wait(self._sock.fileno(), select.POLLIN, math.inf)
            self.ready()

    def watch_by_signal(self) -> None:
        """From here on look at the channel whenever something comes (SIGIO, fcntl(2)).

        For the keeper, which waits in calls of its own: ControlClosed is raised out of any of them.
        """
        signal.signal(signal.SIGIO, lambda *_: self._peek())
        fcntl(self._sock, F_SETOWN, getpid())
        fcntl(self._sock, F_SETFL, fcntl(self._sock, F_GETFL) | O_ASYNC)
        self._peek()

    def _peek(self) -> None:
        poll = select.poll()
        if not self._closed:
            poll.register(self._sock, select.POLLIN)
            if poll.poll(0):
                self.ready()

    def _read(self) -> None:
        try:
            more = self._sock.recv(_MAX_LINE)
        except ConnectionResetError:
            more = b""
        self._closed = not more
        self._received += more
        if len(self._received) > 2 * _MAX_LINE:
            raise ProtocolError("a line of the control channel is too long")

    def _line(self) -> bytes | None:
        line, end, rest = self._received.partition(b"\n")
        if not end:
            return None
        self._received = rest
        return bytes(line)

    def _end(self) -> None:
        self._closed = True
        if not self.keep:
            raise ControlClosed("the agent has gone")
