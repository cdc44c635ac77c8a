"""The receiver: one process for one migration, on the target. `python -m criu_transfer.receiver --control-fd N`.

It takes the state in and then gives the restored processes their memory; it outlives its agent when it was told to.
Exit status: 0 all is done; 1 it failed (the reason is the last event); 2 wrong use; 3 the agent went away too early.
"""

import argparse
import ctypes
import math
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

# All of it at the start: importing rewrite and pager when they are needed would be part of the freeze.
from criu_transfer import pager, rewrite
from criu_transfer.control import Control, ControlClosed
from criu_transfer.errors import GiveUp, ProtocolError
from criu_transfer.images import FILLED
from criu_transfer.keeper import kill_cgroup
from criu_transfer.messages import IMAGES, Fields, Mode
from criu_transfer.session import Complete, Expected, Limits, MakeLazy, Range, Session, StoredMemory
from criu_transfer.store import require_no_swap
from criu_transfer.stream import Credentials, Listener

_CONFIGURATION_SECONDS = 10.0
_RESTORE_SECONDS = 300.0  # for CRIU to ask for memory; the agent's own deadline is shorter
_PR_SET_DUMPABLE = 4  # linux/prctl.h


@dataclass(frozen=True, slots=True)
class Configuration:
    """What the agent says first. `ports`: first and last, 0 and 0 for any; `cgroup`: of the restored container."""

    expected: Expected
    credentials: Credentials
    host: str
    ports: range
    cgroup: Path
    deadline: float
    fill_gate: int | None = None  # descriptor: its other end is closed when the background fill may begin

    @classmethod
    def parse(cls, fields: Fields) -> "Configuration":
        """Read it; raises ProtocolError. `deadline` may be left out: the agent ends us by closing the channel."""
        limits = Fields(fields.mapping("limits"))
        expected = Expected(
            migration=fields.text("migration", 253),
            source=fields.text("source", 253),
            target=fields.text("target", 253),
            limits=Limits(*(limits.integer(name) for name in ("max_memory", "max_images", "max_files"))),
            image_dir=_path(fields.take("image_dir")),
            trees={name: _path(value) for name, value in fields.mapping("trees").items()},
        )
        if IMAGES in expected.trees:
            raise ProtocolError(f"no tree can be named '{IMAGES}'")
        limits.end()
        configuration = cls(
            expected,
            Credentials(_path(fields.take("cert")), _path(fields.take("key")), _path(fields.take("ca"))),
            fields.text("host", 253),
            _ports(fields.take("ports")),
            _path(fields.take("cgroup")),
            _deadline(fields),
        )
        fields.end()
        return configuration


def _path(value: object) -> Path:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ProtocolError(f"{value!a} is no absolute path")
    return Path(value)


def _ports(value: object) -> range:
    match value:
        case [int(first), int(last)] if 0 <= first <= last < 1 << 16:
            return range(first, last + 1)
    raise ProtocolError(f"'ports' is {value!a}; expected the first and the last")


def _deadline(fields: Fields) -> float:
    if "deadline" not in fields.names():
        return math.inf
    value = fields.take("deadline")
    if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value):
        raise ProtocolError("'deadline' is no number of seconds")
    return float(value)


type Serve = Callable[[Configuration, Complete, Control], None]


def receive(configuration: Configuration, control: Control, *, make_lazy: MakeLazy, serve: Serve) -> None:
    """Receive one migration and serve its memory; return when the agent has let us go. Raises GiveUp, OSError."""
    require_no_swap()
    complete = _take_in(configuration, control, make_lazy)
    lazy = sum(end - start for ranges in complete.lazy.values() for start, end in ranges)
    seconds = round(complete.rewrite_seconds, 6)
    control.emit({"event": "state-complete", "mode": complete.mode, "rewrite_s": seconds, "lazy_bytes": lazy})
    if complete.mode is Mode.LIVE:
        serve(configuration, complete, control)
    else:
        control.emit({"event": "filled", "bytes": 0, "faults": 0, "seconds": 0.0})
    (configuration.expected.image_dir / FILLED).touch()
    control.wait_for_keep()


def _take_in(configuration: Configuration, control: Control, make_lazy: MakeLazy) -> Complete:
    expected, deadline = configuration.expected, configuration.deadline
    listener = Listener(configuration.host, configuration.ports, configuration.credentials)
    try:
        control.emit({"event": "listening", "port": listener.port})
        stream = listener.accept(
            expected.source, deadline, control, lambda reason: control.emit({"event": "rejected", "reason": reason})
        )
    finally:
        listener.close()
    with stream:
        control.emit({"event": "connected"})
        return Session(stream, expected, emit=control.emit, make_lazy=make_lazy, deadline=deadline).run()


def _rewrite(image_dir: Path, sources: Mapping[int, StoredMemory]) -> Mapping[int, list[Range]]:
    return rewrite.make_lazy(image_dir, sources)


def _serve(configuration: Configuration, complete: Complete, control: Control) -> None:
    """Become the keeper of a pager. Without us memory would read as zeros: an end of ours is the container's too."""
    try:
        control.watch_by_signal()
        pager.serve(
            configuration.expected.image_dir,
            complete.lazy,
            complete.sources,
            cgroup=configuration.cgroup,
            notify=control.emit,
            deadline_for_connect=min(configuration.deadline, time.monotonic() + _RESTORE_SECONDS),
            fill_gate=configuration.fill_gate,
        )
    except (GiveUp, OSError):
        kill_cgroup(configuration.cgroup)
        raise


def _protect_memory() -> None:
    """Keep the images out of core files, and let one process have many memories open (prctl(2), core(5))."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(arguments: list[str] | None = None, *, make_lazy: MakeLazy = _rewrite, serve: Serve = _serve) -> int:
    """Run one receiver; returns the exit status."""
    parser = argparse.ArgumentParser(prog="criu_transfer.receiver", description="Receives one migration.")
    parser.add_argument("--control-fd", type=int, required=True, help="Unix stream socket to the agent")
    parser.add_argument("--fill-gate-fd", type=int, help="pipe from the agent: the background fill waits for its end")
    parsed = parser.parse_args(arguments)
    fd, gate = parsed.control_fd, parsed.fill_gate_fd
    os.umask(0)
    _protect_memory()
    with socket.socket(fileno=fd) as sock:
        control = Control(sock)
        try:
            configuration = Configuration.parse(control.configuration(time.monotonic() + _CONFIGURATION_SECONDS))
            configuration = replace(configuration, fill_gate=gate)
            receive(configuration, control, make_lazy=make_lazy, serve=serve)
        except ControlClosed:
            return 3
        except (GiveUp, OSError) as error:
            # The error goes to the agent; nothing else is lost by ending here.
            control.fail(error)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
