"""Performs the commands of the source's machine on real processes, runc, the network and the wire."""

import asyncio
import errno
import json
import shutil
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial

import tenacity

from criu_transfer import preflight, soundness, stream, worker
from criu_transfer.errors import DeadlinePassed, GiveUp, TrackerUnavailable, TransferError
from criu_transfer.messages import Hello, Totals
from criu_transfer.messages import Mode as WireMode
from criu_transfer.outgoing import Outgoing
from criu_transfer.proctree import processes_of
from criu_transfer.sender import Sender
from handlers import bundle as bundles
from handlers.bundle import manifest_or_nothing
from handlers.control import Offer
from handlers.errors import HandlerError
from handlers.network import backlog, conntrack, frames, routes, sandbox
from handlers.network.hold import Hold
from spotguard.core import commands as c
from spotguard.core.events import Checked, Event, FailureKind, RoundCopied, TargetAnswered
from spotguard.core.state import Mode, Move
from spotguard.frame_forwarder import FrameForwarder
from spotguard.ownership_effects import Ownership
from spotguard.parts import CONNTRACK_FILE, Parts, TransferLimits, announced

DRAIN_SECONDS = 0.004  # what the application gets to take in what its kernel has acknowledged
DRAIN_TRIES = 8
FREEZE_SECONDS = 0.5  # of StayFrozen's time kept for the freeze itself
LAST_FRAMES_SECONDS = 0.2
DOUBLE_RUN_SECONDS = 0.3
# Deleted files that are still open travel in the images: PostgreSQL keeps write-ahead logs of 16 MiB like that.
DUMP_SETTINGS = f"network-lock skip\nghost-limit {64 << 20}\n"


class NotDrained(GiveUp):
    """Connections with data wait in an accept queue: a dump would lose them."""


class SourceEffects:
    """One migration's effects on the source. Idempotent, as core/commands.py asks."""

    def __init__(self, parts: Parts, move: Move) -> None:
        self._parts = parts
        self._move = move
        self._bundle = parts.bundle(move.workload)
        # After a restart the pod may be gone already, all of it or in part.
        self._manifest = manifest_or_nothing(self._bundle, move.workload)
        self._cgroup = parts.pod_cgroup(move.workload)
        self._ownership = Ownership(parts.store, move, self._manifest.address)
        self._work_dir = parts.work_dir(move.migration, "source")
        self._stream: stream.Stream | None = None
        self._outgoing: Outgoing | None = None
        self._hold: Hold | None = None
        self._forwarder: FrameForwarder | None = None
        self._found: sandbox.Sandbox | None = None
        self._worker = parts.worker_cgroup(move.migration, "source")
        self._loop = asyncio.get_running_loop()
        self._sent = 0
        self._left = 0  # bytes that the next round has to send, as far as is known
        self._round_now = (0, 0, 0)  # number, bytes sent before it, bytes to send

    async def perform(self, command: c.Command) -> Event | None:  # noqa: C901, PLR0912 - one line per command
        """Perform one command; see driver.Effects."""
        match command:
            case c.Preflight():
                return await self._preflight()
            case c.CreateOwnership() | c.ReadOwnership() | c.ReclaimOwnership():
                return await self._ownership.perform(command, self._now())
            case c.OfferTarget():
                await self._offer(command)
            case c.AttachTracker():
                await asyncio.to_thread(self._transfer().attach, command.deadline)
            case c.CopyRound():
                return await self._round(command)
            case c.HoldNetwork():
                await self._hold_network(command)
            case c.FreezeProcesses():
                await self._freeze(command)
            case c.DumpAndSend():
                await self._dump_and_send(command)
            case c.RequestRestore():
                return await self._request_restore(command)
            case c.StayFrozen():
                await self._stay_frozen(command)
            case c.VerifySound():
                await asyncio.to_thread(self._verify_sound)
            case c.ReleaseNetwork():
                await self._release()
            case c.ThawProcesses():
                await asyncio.to_thread(self._thaw, command.deadline)
            case c.DetachTracker():
                await asyncio.to_thread(self._detach)
            case c.AbortTarget():
                await self._parts.control.abort(self._move.target, self._move.migration, command.deadline)
            case c.ForwardFrames():
                await self._forward_frames(command)
            case c.DestroySource():
                await self._destroy(command)
            case c.CleanUp():
                await self._clean_up(command)
            case _:
                raise GiveUp(f"{command.name} is no command of a source")
        return None

    def cancel(self, command: str) -> None:
        """Break off what can be broken off: the stream to the target."""
        if command in {c.CopyRound.__name__, c.AttachTracker.__name__} and self._outgoing is not None:
            self._outgoing.stop()

    def failure(self, error: Exception) -> FailureKind:
        """Tell how the machine must react."""
        match error:
            case TrackerUnavailable():
                return FailureKind.TRACKER_UNAVAILABLE
            case DeadlinePassed() | TimeoutError():
                return FailureKind.DEADLINE
            case TransferError() | HandlerError():
                return FailureKind.GIVE_UP
            case _:  # an error that nobody foresaw says nothing about the processes
                return FailureKind.AMBIGUOUS

    # --- before the freeze ------------------------------------------------------------------------------------------

    async def _preflight(self) -> Checked:
        processes = await asyncio.to_thread(processes_of, self._cgroup.path)
        found = await asyncio.to_thread(preflight.check, processes, config=self._bundle.config())
        wanted = self._parts.settings.transfer.mode
        reason = found.delta_reason or self._parts.tracker_reason
        if wanted == "stop-and-copy":
            reason = "transfer.mode says so"
        reasons = found.reasons
        if wanted == "live" and reason:
            reasons = (*reasons, f"transfer.mode is live, but: {reason}")
        memory = self._left = await asyncio.to_thread(soundness.memory_bytes, processes)
        return Checked(
            self._now(),
            movable=found.movable and not (wanted == "live" and reason),
            reasons=reasons,
            deltas=not reason,
            delta_reason=reason,
            memory_bytes=memory,
        )

    async def _offer(self, command: c.OfferTarget) -> None:
        limits = self._limits()
        offer = Offer.new(
            migration=self._move.migration,
            source=self._move.source,
            workload=self._manifest.to_json(),
            limits=limits,
            version=command.version,
            expires=command.expires,
        )
        answer = await self._parts.control.offer(self._move.target, offer, command.deadline)
        self._work_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        await asyncio.to_thread(self._open_stream, answer.stream_host, answer.stream_port, limits, command.deadline)
        self._hold = await asyncio.to_thread(lambda: Hold.prepare(self._box()))
        # Connections that the freeze will need are opened before it.
        await self._parts.store.warm(command.deadline)
        await self._parts.control.warm(self._move.target, command.deadline)

    def _limits(self) -> TransferLimits:
        transfer = self._parts.settings.transfer
        return announced(self._left, transfer.store_memory_max, transfer.max_image_bytes)

    def _open_stream(self, host: str, port: int, limits: TransferLimits, deadline: float) -> None:
        self._stream = stream.connect(host, port, self._parts.credentials, self._move.target, deadline)
        transfer = self._parts.settings.transfer
        sender = Sender(self._stream, progress=self._tell_progress, drop_pages=transfer.fault_drop_pages)
        sender.hello(
            Hello(
                migration=self._move.migration,
                source=self._move.source,
                target=self._move.target,
                max_memory=limits.max_memory,
                max_images=limits.max_images,
                max_files=limits.max_files,
            ),
            deadline,
        )
        # The settings that a restore needs (freeze at resume) must not run in a dump.
        (self._bundle.directory / "criu.conf").write_text(DUMP_SETTINGS)
        self._outgoing = Outgoing(
            self._move.workload,
            self._cgroup.path,
            trees=self._bundle.trees(self._manifest),
            work_dir=self._work_dir,
            tools=replace(self._parts.tools, worker=self._worker),
            sender=sender,
        )

    def _tell_progress(self, totals: Totals) -> None:
        """Hear of the transfer's progress, on its thread."""
        done = totals.data + totals.zero + totals.files
        self._loop.call_soon_threadsafe(self._log_progress, done)

    def _log_progress(self, done: int) -> None:
        self._sent = done
        number, begun, total = self._round_now
        if done > begun:
            self._log("progress", number=number, bytes=done - begun, total=max(total, done - begun))

    async def _round(self, command: c.CopyRound) -> RoundCopied:
        self._round_now = (command.number, self._sent, self._left)
        result = await asyncio.to_thread(self._transfer().round, command.deadline)
        self._left = result.written_bytes
        self._log(
            "round",
            number=command.number,
            bytes=result.sent_bytes,
            written=result.written_bytes,
            seconds=result.seconds,
        )
        return RoundCopied(
            self._now(),
            number=command.number,
            sent_bytes=result.sent_bytes,
            written_bytes=result.written_bytes,
            seconds=result.seconds,
        )

    # --- the freeze -------------------------------------------------------------------------------------------------

    async def _hold_network(self, command: c.HoldNetwork) -> None:
        start = self._now()
        self._engage()
        held = self._now()
        self._log("freeze-step", step="hold", start=start, seconds=held - start)
        await self._parts.clock.sleep_until(min(held + DRAIN_SECONDS, command.deadline))
        self._log("freeze-step", step="drain", start=held, seconds=self._now() - held)

    def _engage(self) -> None:
        if self._hold is None:
            self._hold = Hold.prepare(self._box())
        self._hold.engage()
        if self._forwarder is None:
            self._forwarder = FrameForwarder(self._hold, self._send_frames)
            self._forwarder.start()

    async def _send_frames(self, block: bytes) -> None:
        deadline = self._now() + 1.0
        await self._parts.control.frames(self._move.target, self._move.migration, block, deadline)

    async def _freeze(self, command: c.FreezeProcesses) -> None:
        """Freeze when no connection waits to be accepted with data in it (dangers: a dump would drop it)."""
        start = self._now()
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(NotDrained),
            stop=tenacity.stop_after_attempt(DRAIN_TRIES),
            wait=tenacity.wait_fixed(DRAIN_SECONDS),
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                await asyncio.to_thread(self._freeze_once, command.deadline)
        self._log("freeze-step", step="freeze", start=start, seconds=self._now() - start)

    def _freeze_once(self, deadline: float) -> None:
        self._cgroup.freeze(deadline)
        # A handshake under way cannot end while the network is held: it is given up, and carries no data yet.
        waiting = backlog.undelivered(self._box().netns)
        if waiting.unaccepted:
            self._cgroup.thaw(deadline)
            raise NotDrained(f"{waiting.unaccepted} connections wait to be accepted")

    async def _dump_and_send(self, command: c.DumpAndSend) -> None:
        if self._hold is None or self._forwarder is None:
            raise GiveUp("the network is not held")
        outgoing = self._transfer()
        self._forwarder.add(self._hold.take_sent())
        mode = WireMode.LIVE if command.mode is Mode.LIVE else WireMode.STOP_AND_COPY
        done = await asyncio.to_thread(outgoing.capture, mode, command.deadline, beside=self._beside_the_images)
        for step, start, seconds in done.steps:
            self._log("freeze-step", step=step, start=start, seconds=seconds)
        self._log(
            "captured",
            residual_bytes=done.residual_bytes,
            debt_bytes=done.debt_bytes,
            image_bytes=done.image_bytes,
            file_bytes=done.file_bytes,
        )

    def _beside_the_images(self) -> dict[str, bytes]:
        """Give what the node's connection tracking knows of the pod, for the target; without it, what it can be.

        Runs on the transfer's thread: walking the node's table takes 10 ms.
        """
        try:
            tracked = conntrack.entries(self._manifest.address)
        except OSError as error:
            self._tell(f"connection tracking cannot be read: {error}")
            return {}
        ending = conntrack.unkeepable(tracked, [self._parts.settings.node.address])
        if ending:
            self._tell(f"{len(ending)} connections stand on this node's own address and end with the move")
        kept = [entry for entry in tracked if entry not in ending]
        both = {"keep": conntrack.to_json(kept), "end": conntrack.to_json(ending)}
        return {CONNTRACK_FILE: json.dumps(both).encode()}

    def _tell(self, text: str) -> None:
        """Log a note from any thread."""
        self._loop.call_soon_threadsafe(partial(self._log, "note", text=text))

    async def _request_restore(self, command: c.RequestRestore) -> TargetAnswered:
        if self._forwarder is not None:
            self._forwarder.start_sending()
        answer = await self._parts.control.restore(self._move.target, self._move.migration, command.deadline)
        if answer.resumed:
            self._log("resumed", frames_held=self._forwarder.count if self._forwarder else 0)
        return TargetAnswered(self._now(), resumed=answer.resumed, reason=answer.reason)

    # --- the way back -----------------------------------------------------------------------------------------------

    async def _stay_frozen(self, command: c.StayFrozen) -> None:
        # A CRIU that is still at it needs the processes as it left them: freezing beneath it could hang both.
        try:
            await asyncio.to_thread(worker.end, self._worker, command.deadline - FREEZE_SECONDS)
        finally:
            await self._hold_and_freeze(command.deadline)

    async def _hold_and_freeze(self, deadline: float) -> None:
        try:
            if self._cgroup.path.exists():
                await asyncio.to_thread(partial(self._cgroup.freeze, deadline, thaw_on_failure=False))
        finally:
            if self._find_box() is not None:
                self._engage()

    def _verify_sound(self) -> None:
        """See whether a failed or interrupted dump left the processes as they were."""
        if not worker.wait_empty(self._worker, time.monotonic()):
            raise OSError(errno.EBUSY, "CRIU is still at work on the processes")
        processes = processes_of(self._cgroup.path)
        if not processes:
            raise GiveUp("no process is left")
        soundness.check(processes, self._outgoing.frozen_maps if self._outgoing is not None else None)

    async def _release(self) -> None:
        if self._find_box() is None:
            return  # the pod is gone
        self._engage()
        if self._hold is None:
            return
        kept: list[bytes] = []
        if self._forwarder is not None:
            self._forwarder.collect()
            await self._forwarder.stop()
            kept = self._forwarder.kept
        self._hold.release(*frames.by_direction(kept, self._box().address))
        self._hold.close()
        self._hold = self._forwarder = None

    def _thaw(self, deadline: float) -> None:
        with suppress(FileNotFoundError):  # the pod is gone
            self._cgroup.thaw(deadline)

    def _detach(self) -> None:
        if self._outgoing is not None:
            self._outgoing.detach()

    # --- after the hand-over ----------------------------------------------------------------------------------------

    async def _forward_frames(self, command: c.ForwardFrames) -> None:
        """Let the node forward what still comes here, then send on what the hold has caught until now."""
        if self._find_box() is None:
            return
        target = self._parts.control.address_of(self._move.target)
        await asyncio.to_thread(routes.point, routes.Route(self._box().address, via=target))
        if self._forwarder is not None:
            self._forwarder.start_sending()
            async with asyncio.timeout_at(command.deadline):
                await self._forwarder.flush()

    async def _destroy(self, command: c.DestroySource) -> None:
        if self._parts.settings.transfer.fault_double_run:
            await asyncio.to_thread(self._cgroup.thaw, command.deadline)
            await self._parts.clock.sleep_until(self._now() + DOUBLE_RUN_SECONDS)
        if self._cgroup.path.exists():
            await asyncio.to_thread(worker.kill, self._worker, command.deadline)
            await asyncio.to_thread(self._cgroup.kill, command.deadline)
        await self._parts.runc.delete(self._move.workload, command.deadline)
        if self._forwarder is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_FRAMES_SECONDS):
                    await self._forwarder.flush()
            await self._forwarder.stop()
        await self._close_hold()
        await asyncio.to_thread(sandbox.destroy, self._move.workload)
        await asyncio.to_thread(bundles.destroy, self._bundle.directory)
        await asyncio.to_thread(self._cgroup.remove, command.deadline)

    async def _clean_up(self, command: c.CleanUp) -> None:
        await self._close_hold()
        await asyncio.to_thread(worker.end, self._worker, command.deadline)
        if self._outgoing is not None:
            await asyncio.to_thread(self._outgoing.close)
        if self._stream is not None:
            self._stream.close()
        self._outgoing = self._stream = None
        await asyncio.to_thread(shutil.rmtree, self._work_dir, ignore_errors=True)

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _transfer(self) -> Outgoing:
        if self._outgoing is None:
            raise GiveUp("there is no stream to the target")
        return self._outgoing

    def _find_box(self) -> sandbox.Sandbox | None:
        if self._found is None:  # looking takes milliseconds: not in the freeze
            self._found = sandbox.find(self._move.workload)
        return self._found

    def _box(self) -> sandbox.Sandbox:
        box = self._find_box()
        if box is None:
            raise GiveUp(f"pod {self._move.workload} has no network of ours")
        return box

    async def _close_hold(self) -> None:
        """Let go of the hold; its rules stay with the network, and go with it."""
        if self._forwarder is not None:
            await self._forwarder.stop()  # the event loop must not go on watching a closed descriptor
        if self._hold is not None:
            self._hold.close()
        self._hold = self._forwarder = None

    def _now(self) -> float:
        return self._parts.clock.monotonic()

    def _log(self, event: str, **fields: object) -> None:
        self._parts.log.add(
            event, migration=self._move.migration, workload=self._move.workload, side="source", **fields
        )
