"""Hold a pod's network, both ways, and keep what comes meanwhile.

Two rules and two capturing sockets, one pair at each end of the pod's veth:

    coming in:  chain on the pod's eth0 (ingress, in the pod's namespace) drops; a packet socket there keeps a copy
    going out:  chain on the node's end (ingress, in the node's namespace) drops; a packet socket there keeps a copy

Both are ingress hooks because packet sockets see a frame before an ingress hook drops it, but after an egress hook
has; and a drop in an egress hook tells the pod's TCP about congestion, while behind the veth the frame counts as sent.

The rules are the kernel's and outlive this process: a pod stays held until somebody releases it (`Hold.adopt` after a
restart; what came between was lost, and TCP sends it again). Played frames carry a sender's hardware address that the
rule lets pass, so that they go in, in order, before any new frame may.

`lo` inside the pod is left alone: for a pod with one container, whose processes freeze as one, it carries nothing then.
Pods of several containers would need it held too (not done: refuse them).
"""

import errno
import ipaddress
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from handlers.errors import GiveUp
from handlers.network import frames, netlink, netns, nft
from handlers.network.sandbox import Sandbox

TAKE_LIMIT: Final = 8 << 20  # bytes per call of take()
KERNEL_LIMIT: Final = 16 << 20  # bytes of kernel memory per direction; the newest are dropped, and counted

_ETH_P_ALL = 3
_SO_RCVBUFFORCE = 33
_SOL_PACKET = 263
_PACKET_STATISTICS = 6
_PACKET_VNET_HDR = 15
_PACKET_IGNORE_OUTGOING = 23


@dataclass(frozen=True, slots=True)
class Released:
    """What a release did: frames given to the pod, frames sent for it, frames that were lost (all reasons)."""

    played: int
    sent: int
    dropped: int


class Hold:
    """The hold on one sandbox. Not for use from two threads at once.

    Order of calls: `prepare` (before the freeze; slow), `engage` (0.3 ms), then `take` and `take_sent` as often as
    wanted, `release` where the pod goes on, `close` in any case. On the side that has lost the pod, never release:
    `sandbox.destroy` ends it.
    """

    def __init__(self, sandbox: Sandbox, resources: ExitStack) -> None:
        self._sandbox = sandbox
        self._resources = resources
        self._pod_rules = resources.enter_context(netlink.Socket(sandbox.netns, netlink.NETFILTER))
        self._host_rules = resources.enter_context(netlink.Socket(sandbox.node, netlink.NETFILTER))
        # Rules that are there already stay as they are: a hold is not replaced without a gap.
        self._pod_held = sandbox.pod_table in nft.tables(self._pod_rules)
        self._host_held = sandbox.host_table in nft.tables(self._host_rules)
        self._pod_end = _Tap(sandbox.netns, sandbox.pod_dev, resources)
        self._host_end = _Tap(sandbox.node, sandbox.host_dev, resources)
        self._address = ipaddress.ip_address(sandbox.address)
        self._released = False

    @classmethod
    def prepare(cls, sandbox: Sandbox) -> Self:
        """Open all that `engage` needs; nothing is held yet. Raises GiveUp when the sandbox is not (wholly) there."""
        with ExitStack() as resources:
            try:
                hold = cls(sandbox, resources)
            except OSError as error:
                raise GiveUp(f"the network of pod {sandbox.name} cannot be held: {error}") from error
            hold._resources = resources.pop_all()
            return hold

    @classmethod
    def adopt(cls, sandbox: Sandbox) -> Self:
        """Take over a hold whose process has died, without a gap. Raises GiveUp when nothing is held."""
        if not is_held(sandbox):
            raise GiveUp(f"the network of pod {sandbox.name} is not held")
        hold = cls.prepare(sandbox)
        hold.engage()
        return hold

    def engage(self) -> None:
        """Hold from now on. A frame that arrives within this call may be both delivered and kept, never neither.

        (TCP discards what it has already; for others this is an ordinary duplicate.) Raises GiveUp when the kernel
        refuses; then nothing is held that was not before. What is held already stays so.
        """
        box = self._sandbox
        begun = False
        try:
            self._pod_end.start()
            if not self._pod_held:
                self._pod_rules.execute(nft.hold_request(box.pod_table, box.pod_dev, box.play_mac))
                self._pod_held = begun = True
            self._host_end.start()
            if not self._host_held:
                self._host_rules.execute(nft.hold_request(box.host_table, box.host_dev, box.play_mac))
                self._host_held = True
        except OSError as error:
            if begun:
                nft.release(self._pod_rules, nft.release_request(box.pod_table))
                self._pod_held = False
            raise GiveUp(f"the network of pod {box.name} cannot be held: {error}") from error
        self._released = False

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when `take` has something."""
        return self._pod_end.fileno()

    def take(self) -> list[bytes]:
        """Return the frames that have come for the pod since the last call: IPv4 and IPv6, oldest first.

        At most 8 MiB, later ones are dropped and counted. On the source this goes on after the hand-over: what still
        comes here wants forwarding.
        """
        return self._pod_end.take(self._sandbox.play_mac)

    def take_sent(self) -> list[bytes]:
        """Return the frames that the pod has sent since the hold, oldest first: answers written just before the freeze.

        For the target to send after the hand-over, else their receiver waits for a retransmission, 1 s after a restore.
        Call it between freeze and dump, never after the source's processes have been killed: their FIN and RST follow.
        """
        return self._host_end.take(self._sandbox.play_mac)

    @property
    def dropped(self) -> int:
        """How many frames could not be kept so far."""
        return self._pod_end.dropped + self._host_end.dropped

    def release(self, play: Sequence[bytes] = (), sent: Sequence[bytes] = ()) -> Released:
        """Let the pod talk again: what it has sent goes out, then the frames that came for it go in, oldest first.

        `play`, `sent`: frames that were taken before, here or on the other side; what the sockets still hold is added
        behind them. The pod may be frozen or running. A second call does nothing. Frames that are not for or from
        the pod's address, or malformed, are dropped and counted. Raises OSError if the kernel refuses; call again.
        After a restart `prepare` and `release` end a hold, and do no harm where it has ended already.
        """
        if self._released:
            return Released(0, 0, self.dropped)
        box = self._sandbox
        nft.release(self._host_rules, nft.release_request(box.host_table))
        went_out = self._play_out([*sent, *self.take_sent()])
        went_in = self._play_in([*play, *self.take()])
        nft.release(self._pod_rules, nft.release_request(box.pod_table))
        went_in += self._play_in(self.take())
        self._pod_held = self._host_held = False
        self._released = True
        return Released(went_in, went_out, self.dropped)

    def play(self, late: Sequence[bytes]) -> int:
        """Give the pod frames that come after the release, as those that the source still gets; returns how many."""
        return self._play_in(late)

    def close(self) -> None:
        """Close the sockets. The rules stay, unless `release` has removed them."""
        self._resources.close()

    def _play_in(self, kept: Sequence[bytes]) -> int:
        box = self._sandbox
        mine = [frame for frame in kept if _address(frame, frames.destination) == self._address]
        self._pod_end.dropped += len(kept) - len(mine)
        return self._host_end.send(frames.readdress(frame, to=box.mac, sender=box.play_mac) for frame in mine)

    def _play_out(self, kept: Sequence[bytes]) -> int:
        box = self._sandbox
        mine = [frame for frame in kept if _address(frame, frames.source) == self._address]
        self._host_end.dropped += len(kept) - len(mine)
        return self._pod_end.send(frames.readdress(frame, to=box.host_mac, sender=box.mac) for frame in mine)


def is_held(sandbox: Sandbox) -> bool:
    """Tell whether at least one direction of the sandbox is held."""
    for where, table in ((sandbox.netns, sandbox.pod_table), (sandbox.node, sandbox.host_table)):
        with netlink.Socket(where, netlink.NETFILTER) as rules:
            if table in nft.tables(rules):
                return True
    return False


def find_holds(sandboxes: Iterable[Sandbox]) -> list[Sandbox]:
    """Return those that are held, as after a restart: each wants to be adopted or destroyed."""
    return [sandbox for sandbox in sandboxes if is_held(sandbox)]


def _address(frame: bytes, which: Callable[[bytes], frames.Address]) -> frames.Address | None:
    try:
        frames.check(frame)
    except frames.FrameError:
        return None
    return which(frame)


class _Tap:
    """A packet socket on one device: captures what comes in on it, and sends out of it."""

    def __init__(self, where: Path, device: str, resources: ExitStack) -> None:
        # Protocol 0: captures nothing until bound to one, so that the traffic before the hold does not fill it.
        self._socket = resources.enter_context(netns.open_socket(where, socket.AF_PACKET, socket.SOCK_RAW))
        self._socket.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        self._socket.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, KERNEL_LIMIT // 2)  # the kernel doubles it
        self._socket.bind((device, 0))
        self._device = device
        self.dropped = 0

    def fileno(self) -> int:
        return self._socket.fileno()

    def start(self) -> None:
        self._socket.bind((self._device, _ETH_P_ALL))

    def take(self, played_by: bytes) -> list[bytes]:
        taken: list[bytes] = []
        size = 0
        while (frame := self._next()) is not None:
            if frames.source_mac(frame) == played_by or not frames.worth_keeping(frame[: frames.MAX_FRAME]):
                continue
            size += len(frame)
            if len(frame) > frames.MAX_FRAME or size > TAKE_LIMIT:
                self.dropped += 1
            else:
                taken.append(frame)
        self.dropped += int.from_bytes(self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)[4:8], "little")
        return taken

    def send(self, outgoing: Iterable[bytes]) -> int:
        count = 0
        for frame in outgoing:
            try:
                self._socket.send(frame)
                count += 1
            except OSError as error:
                # The kernel finds fault with this frame (a header that check() cannot judge), or has no memory for it.
                if error.errno not in {errno.EINVAL, errno.EMSGSIZE, errno.ENOBUFS}:
                    raise
                self.dropped += 1
        return count

    def _next(self) -> bytes | None:
        while True:
            try:
                return self._socket.recv(frames.MAX_FRAME + 1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            except OSError as error:
                if error.errno != errno.ENETDOWN:  # told once when the link goes down
                    raise
