"""Performs the commands of the target's machine: sandbox, receiver, restore, hand-over, resume."""

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from criu_transfer import worker
from criu_transfer.errors import DeadlinePassed, RestoreFailed, TransferError
from criu_transfer.images import FILLED
from criu_transfer.restore import restore, write_criu_settings
from handlers import bundle as bundles
from handlers.bundle import PodManifest
from handlers.cgroup import Cgroup
from handlers.errors import GiveUp, HandlerError
from handlers.network import closing, conntrack, frames, routes, sandbox
from handlers.network.hold import Hold
from spotguard.core import commands as c
from spotguard.core.events import Event, FailureKind, PagerDied, StateComplete, StreamLost
from spotguard.core.state import Move
from spotguard.ownership_effects import Ownership
from spotguard.parts import CONNTRACK_FILE, Parts, TransferLimits
from spotguard.receiver_process import ReceiverProcess, available_bytes

CLAIM = "migration"  # names, in a pod's directory, the migration that has made it
COMES_UP_FROZEN_SECONDS = 0.5
RECEIVER_BYTES = 128 << 20  # for the receiver itself, beside what it stores
PLAYED_LATE_LIMIT = 8 << 20


@dataclass(slots=True)
class Answers:
    """What the source waits for: the offer's answer and the restore's; set once each."""

    offered: asyncio.Future[tuple[bool, str]]
    restored: asyncio.Future[tuple[bool, str]]
    timings: dict[str, float] = field(default_factory=dict)


class TargetEffects:
    """One migration's effects on the target. Idempotent, as core/commands.py asks."""

    def __init__(
        self, parts: Parts, move: Move, manifest: PodManifest, limits: TransferLimits, post: Callable[[Event], None]
    ) -> None:
        """`post`: hands the machine an event of the receiver's."""
        self._parts = parts
        self._move = move
        self._manifest = manifest
        self._limits = limits
        self._post = post
        self._bundle = parts.bundle(move.workload)
        self._cgroup = parts.pod_cgroup(move.workload)
        self._ownership = Ownership(parts.store, move, manifest.address)
        self._work_dir = parts.work_dir(move.migration, "target")
        self._receiver: ReceiverProcess | None = None
        self._hold: Hold | None = None
        self._frames: list[bytes] = []
        self._frame_bytes = 0
        self._found: sandbox.Sandbox | None = None
        self._lazy = False
        self._lazy_bytes = 0
        self._filled = False
        self._pager_failed = ""
        self._orphaned = False  # the pager has lost its keeper, which told us how it fares
        self._news = asyncio.Event()  # of the pager
        self._worker = parts.worker_cgroup(move.migration, "target")
        loop = asyncio.get_running_loop()
        self.answers = Answers(loop.create_future(), loop.create_future())

    async def perform(self, command: c.Command) -> Event | None:  # noqa: C901, PLR0912 - one line per command
        """Perform one command; see driver.Effects."""
        match command:
            case c.PrepareSandbox():
                await self._prepare(command)
            case c.AnswerOffer():
                self._answer(self.answers.offered, command.accepted, command.reason)
            case c.AnswerSource():
                self._answer(self.answers.restored, command.resumed, command.reason)
            case c.RestoreProcesses():
                await self._timed("restore", self._restore(command))
            case c.KeepPager():
                await self._keep_pager()
            case c.TakeOwnership() | c.ReadOwnership():
                return await self._timed("owner", self._ownership.perform(command, self._now()))
            case c.VerifySound():
                await asyncio.to_thread(self._verify_sound)
            case c.MoveRoute():
                await self._timed("route", self._move_route())
            case c.ReleaseNetwork():
                await self._timed("release", self._release())
            case c.ThawProcesses():
                await self._timed("thaw", asyncio.to_thread(self._cgroup.thaw, command.deadline))
                if self._receiver is not None:
                    self._receiver.open_fill_gate()
            case c.AwaitFill():
                await self._await_fill(command)
            case c.DestroyRestored():
                await self._destroy(command)
            case c.CleanUp():
                await self._clean_up(command)
            case _:
                raise GiveUp(f"{command.name} is no command of a target")
        return None

    def cancel(self, command: str) -> None:
        """Break off the wait for the fill; every other command ends at its deadline."""
        if command == c.AwaitFill.__name__:
            self._news.set()

    def failure(self, error: Exception) -> FailureKind:
        """Tell how the machine must react."""
        match error:
            case DeadlinePassed() | TimeoutError():
                return FailureKind.DEADLINE
            case TransferError() | HandlerError():
                return FailureKind.GIVE_UP
            case _:  # an error that nobody foresaw says nothing about the processes
                return FailureKind.AMBIGUOUS

    def keep_frames(self, block: bytes) -> None:
        """Take frames that the source has held; played at the release, or now when that has been."""
        taken = frames.unpack(block)
        if self._released:
            self._play_late(taken)
            return
        for frame in taken:
            self._frame_bytes += len(frame)
            if self._frame_bytes <= PLAYED_LATE_LIMIT:
                self._frames.append(frame)

    @property
    def stream_port(self) -> int:
        """Where the receiver listens; 0 when there is none."""
        return self._receiver.port if self._receiver else 0

    # --- receiving --------------------------------------------------------------------------------------------------

    async def _prepare(self, command: c.PrepareSandbox) -> None:
        where = self._parts.settings.runtime
        self._claim()
        box = await asyncio.to_thread(sandbox.create, self._move.workload, self._manifest.address, held=True)
        self._found = box
        self._hold = await asyncio.to_thread(self._take_hold, box)
        made = await asyncio.to_thread(
            bundles.create,
            self._manifest,
            self._bundle.directory,
            netns=box.netns,
            cgroup="/" + str(self._cgroup.path.relative_to("/sys/fs/cgroup")),
        )
        write_criu_settings(
            made.directory, cgroup=self._cgroup.path, parking=where.cgroup / "parking" / self._move.migration
        )
        image_dir = self._work_dir / "images"
        image_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        path, memory_v1 = self._parts.receiver_cgroup(self._move.migration)
        group = Cgroup.create(path, memory_max=self._limits.ram + RECEIVER_BYTES, memory_v1=memory_v1)
        self._receiver = await ReceiverProcess.start(
            self._parts,
            self._move,
            image_dir=image_dir,
            trees={name: str(path) for name, path in made.trees(self._manifest).items()},
            limits=self._limits,
            group=group,
            container_cgroup=self._cgroup.path,
            on_event=self._on_receiver,
            deadline=command.deadline,
        )
        await self._parts.store.warm(command.deadline)

    def _claim(self) -> None:
        """Take the pod's directory for this migration. Raises GiveUp when a pod of that name is on this node."""
        directory = self._bundle.directory
        taken = self._cgroup.path.exists() or sandbox.find(self._move.workload) is not None
        if taken or directory.exists():
            raise GiveUp(f"a pod {self._move.workload} is on this node already")
        # At once with the claim in it: without one it would be nobody's, and in the way for ever.
        bundles.remove_remains(directory)
        partial = bundles.remains(directory)
        partial.mkdir(parents=True)
        (partial / CLAIM).write_text(self._move.migration)
        partial.rename(directory)

    def _is_ours(self) -> bool:
        """Tell whether the pod of that name here is this migration's, and not one that was here before."""
        claim = self._bundle.directory / CLAIM
        return claim.exists() and claim.read_text() == self._move.migration

    def _take_hold(self, box: sandbox.Sandbox) -> Hold:
        return Hold.adopt(box)

    def _on_receiver(self, event: dict[str, Any]) -> None:
        """React to one line of the receiver's."""
        now = self._now()
        match event.get("event"):
            case "state-complete":
                self._lazy = event.get("mode") == "live"
                self._lazy_bytes = int(event.get("lazy_bytes", 0))
                rewrite = float(event.get("rewrite_s", 0.0))
                self._log("freeze-step", step="rewrite", start=now - rewrite, seconds=rewrite)
                if not self._lazy:
                    self._post(StateComplete(now))
            case "pager-listening":  # only now may CRIU ask it
                self._post(StateComplete(now))
            case "mark":
                self._log("stored", bytes=int(event.get("held", 0)))
            case "rejected":
                self._log("note", text=f"the receiver turned a caller away: {event.get('reason')}")
            case "failed":
                self._post(StreamLost(now, str(event.get("error", "the receiver failed"))))
            case "filled":
                self._log("filled", bytes=event.get("bytes"), faults=event.get("faults"), seconds=event.get("seconds"))
                self._filled = True
                self._news.set()
            case "pager-died":
                self._log("pager-died", carried_on=event.get("carried_on"))
                if not event.get("carried_on"):
                    self._pager_lost("the pager died and its state was uncertain")
            case "ended":
                self._receiver_ended(event.get("code"))
            case _:
                return

    def _receiver_ended(self, code: object) -> None:
        """React to the end of the receiver, which may be the keeper of a pager by now."""
        if self._memory_is_whole():  # whether or not it could say so
            self._filled = True
            self._news.set()
        elif self._pager_lives():
            self._log("note", text=f"the keeper ended with {code}; the pager goes on without it")
            self._orphaned = True
            self._news.set()
        else:
            self._pager_lost(f"the receiver ended with {code}")

    def _pager_lost(self, reason: str) -> None:
        """Kill the container at once: what it reads from now on could be zeros that never were."""
        self._pager_failed = reason
        with suppress(OSError):  # there is no container yet
            (self._cgroup.path / "cgroup.kill").write_text("1")
        self._news.set()
        self._post(PagerDied(self._now(), reason))

    # --- hand-over --------------------------------------------------------------------------------------------------

    async def _restore(self, command: c.RestoreProcesses) -> None:
        self._require_room()
        await asyncio.to_thread(bundles.mount_rootfs, self._bundle, self._parts.settings.runtime.image)
        await asyncio.to_thread(
            restore,
            self._move.workload,
            self._bundle.directory,
            self._work_dir / "images",
            lazy=self._lazy,
            tools=replace(self._parts.tools, worker=self._worker),
            deadline=command.deadline,
        )
        # Asked for at CRIU's pre-resume, it takes effect as the tasks come out of CRIU's hands.
        soon = min(command.deadline, self._now() + COMES_UP_FROZEN_SECONDS)
        if not await asyncio.to_thread(worker.wait_frozen, self._cgroup.path, soon):
            await asyncio.to_thread(self._cgroup.kill, command.deadline)
            raise RestoreFailed("the restored container did not come up frozen; it was killed")
        if not self._cgroup.populated:  # an empty group counts as frozen
            raise RestoreFailed("no process of the restored container is left")

    def _require_room(self) -> None:
        """Refuse a restore that this node has no memory for: pages that forked processes share come apart here.

        Raises RestoreFailed. As the container's pages are filled the store gives up its own, so one copy is enough.
        """
        free = available_bytes()
        if self._lazy_bytes > free + self._receiver_bytes():
            raise RestoreFailed(f"the workload needs {self._lazy_bytes} bytes of memory here, {free} are available")

    def _receiver_bytes(self) -> int:
        try:
            return self._receiver_group().memory_usage()
        except (HandlerError, OSError):
            return 0

    async def _keep_pager(self) -> None:
        if self._receiver is None or self._pager_failed:
            raise GiveUp(self._pager_failed or "the receiver is gone")
        await self._receiver.keep()

    def _verify_sound(self) -> None:
        if not self._cgroup.path.exists() or not self._cgroup.populated:
            raise GiveUp("no process of the restored container is left")
        if not self._memory_is_whole() and not self._pager_lives():
            raise GiveUp("the pager is gone and pages are missing")

    def _memory_is_whole(self) -> bool:
        # The directory goes in one step, and of a copy that owns only when all memory was there.
        return self._filled or (self._work_dir / "images" / FILLED).exists() or not self._work_dir.exists()

    def _pager_lives(self) -> bool:
        """Tell whether receiver, keeper or pager are there: also those of an agent before us."""
        group = self._receiver_group()
        return group.path.exists() and group.populated

    def _receiver_group(self) -> Cgroup:
        path, memory_v1 = self._parts.receiver_cgroup(self._move.migration)
        return Cgroup(path, memory_v1=memory_v1)

    async def _move_route(self) -> None:
        box = self._box()
        await asyncio.to_thread(routes.point, routes.Route(box.address, dev=box.host_dev))

    @property
    def _released(self) -> bool:
        return "release" in self.answers.timings

    async def _release(self) -> None:
        hold = self._hold if self._hold is not None else Hold.prepare(self._box())
        self._hold = hold
        for text in await asyncio.to_thread(self._take_over_connections):
            self._log("connections", text=text)
        held, self._frames = self._frames, []
        try:
            done = await asyncio.to_thread(hold.release, *frames.by_direction(held, self._manifest.address))
        except OSError:
            self._frames = [*held, *self._frames]  # for the next try
            raise
        self._log("released", played=done.played, sent=done.sent, dropped=done.dropped)
        late, self._frames = self._frames, []
        self._play_late(late)

    def _take_over_connections(self) -> list[str]:
        """Make the node know the connections that it translates for the pod, before their next packet passes, and
        close those that stood on the old node's address. Returns what is worth telling.

        Nothing here may fail the release: without it the workload loses some connections, frozen for ever it loses all.
        """
        path = self._work_dir / "images" / CONNTRACK_FILE
        if not path.exists():
            return []
        try:
            found = json.loads(path.read_bytes())
            refused = conntrack.recreate(conntrack.from_json(found["keep"]))
            ending = conntrack.from_json(found["end"])
            seen = [conntrack.as_the_pod_sees(entry, self._manifest.address) for entry in ending]
            closed = closing.close(self._box().netns, seen)
        except (HandlerError, OSError, ValueError, KeyError, TypeError) as error:
            return [f"connection tracking could not be taken over: {error}"]
        told = [f"{len(refused)} tracked connections were refused by the kernel"] if refused else []
        return told + [
            f"the connection with {ends.destination} port {ends.destination_port} stood on the old node, and is closed"
            for ends in closed
        ]

    def _play_late(self, taken: list[bytes]) -> None:
        if self._hold is not None:
            self._hold.play(frames.by_direction(taken, self._manifest.address)[0])

    async def _await_fill(self, command: c.AwaitFill) -> None:
        if self._receiver is not None:
            async with asyncio.timeout_at(command.deadline):
                await self._news.wait()
            if self._pager_failed:
                raise GiveUp(self._pager_failed)
            if not (self._filled or self._orphaned):
                raise TimeoutError("the wait for the fill was broken off")
        if self._receiver is None or self._orphaned:  # nobody will tell us: the pager's end and what it leaves do
            await asyncio.to_thread(self._wait_for_orphan, command.deadline)
            if not self._memory_is_whole():
                self._pager_lost("the pager has ended before all memory was there")
                raise GiveUp(self._pager_failed)
        trees = self._bundle.trees(self._manifest).values()
        await asyncio.to_thread(bundles.sync, list(trees))

    def _wait_for_orphan(self, deadline: float) -> None:
        group = self._receiver_group()
        if group.path.exists():
            group.remove(deadline)

    # --- the end ----------------------------------------------------------------------------------------------------

    async def _destroy(self, command: c.DestroyRestored) -> None:
        # A restore that an earlier agent began may still be at it, and would make what is destroyed here.
        await asyncio.to_thread(worker.kill, self._worker, command.deadline)
        if not self._is_ours():
            await asyncio.to_thread(self._kill_receiver, command.deadline)
            await asyncio.to_thread(bundles.remove_remains, self._bundle.directory)
            return
        if self._cgroup.path.exists():
            await asyncio.to_thread(self._cgroup.kill, command.deadline)
        await asyncio.to_thread(self._kill_receiver, command.deadline)
        await self._parts.runc.delete(self._move.workload, command.deadline)
        if self._hold is not None:
            self._hold.close()
            self._hold = None
        await asyncio.to_thread(sandbox.destroy, self._move.workload)
        await asyncio.to_thread(self._cgroup.remove, command.deadline)
        await asyncio.to_thread(bundles.destroy, self._bundle.directory)

    def _kill_receiver(self, deadline: float) -> None:
        group = self._receiver_group()
        if group.path.exists():
            group.kill(deadline)

    async def _clean_up(self, command: c.CleanUp) -> None:
        where = self._parts.settings.runtime
        await asyncio.to_thread(worker.end, self._worker, command.deadline)
        group = self._receiver_group()
        if self._receiver is not None:
            await self._receiver.wait(command.deadline)
        if group.path.exists():
            await asyncio.to_thread(group.remove, command.deadline)
        parking = Cgroup(where.cgroup / "parking" / self._move.migration)
        if parking.path.exists():
            await asyncio.to_thread(parking.remove, command.deadline)
        if self._hold is not None:
            self._hold.close()
            self._hold = None
        await asyncio.to_thread(self._remove_work_dir)

    def _remove_work_dir(self) -> None:
        gone = self._work_dir.with_name(f".{self._work_dir.name}")
        with suppress(FileNotFoundError):
            self._work_dir.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    # --- helpers ----------------------------------------------------------------------------------------------------

    async def _timed[T](self, step: str, work: Awaitable[T]) -> T:
        start = self._now()
        result = await work
        self.answers.timings[step] = self._now() - start
        self._log("freeze-step", step=step, start=start, seconds=self._now() - start)
        return result

    def _answer(self, future: "asyncio.Future[tuple[bool, str]]", good: bool, reason: str) -> None:
        if not future.done():
            future.set_result((good, reason))

    def _box(self) -> sandbox.Sandbox:
        if self._found is not None:
            return self._found
        box = self._found = sandbox.find(self._move.workload)  # takes milliseconds: once
        if box is None:
            raise GiveUp(f"pod {self._move.workload} has no network of ours")
        return box

    def _now(self) -> float:
        return self._parts.clock.monotonic()

    def _log(self, event: str, **fields: object) -> None:
        self._parts.log.add(
            event, migration=self._move.migration, workload=self._move.workload, side="target", **fields
        )
