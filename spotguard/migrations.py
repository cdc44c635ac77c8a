"""The migrations of one agent, both sides: starts their machines, finds them again, goes on after a restart."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from handlers.bundle import PodManifest, manifest_or_nothing
from handlers.control import Offer, OfferAnswer, RestoreAnswer
from handlers.errors import GiveUp
from spotguard.core import source, target
from spotguard.core.deadline import Limits
from spotguard.core.events import (
    AbortRequested,
    AgentRestarted,
    DeadlineMoved,
    Event,
    NoticeWithdrawn,
    Offered,
    RestoreRequested,
    StartMigration,
)
from spotguard.core.state import Mode, Move, Outcome, Record, Role
from spotguard.driver import Driver
from spotguard.journal import Journal
from spotguard.parts import Parts, TransferLimits
from spotguard.source_effects import SourceEffects
from spotguard.target_effects import TargetEffects


@dataclass(slots=True)
class _Receiving:
    move: Move  # the machine knows it only once it has run
    driver: Driver
    effects: TargetEffects
    peer: str
    ram: int  # bytes that it may take


class Migrations:
    """All migrations of this node that are under way. Drivers run in `tasks`: one that breaks ends the agent, which
    then starts anew from its journal."""

    def __init__(self, parts: Parts, journal: Journal, tasks: asyncio.TaskGroup) -> None:
        self._parts = parts
        self._journal = journal
        self._tasks = tasks
        self._leaving: dict[str, Driver] = {}  # by workload
        self._arriving: dict[str, _Receiving] = {}  # by migration
        self._ended = asyncio.Condition()
        self.unwilling = ""  # why this node takes no workloads now; empty when it does
        transfer = parts.settings.transfer
        self._limits = Limits(
            target_freeze=transfer.target_freeze_ms / 1000, rounds_max=transfer.max_rounds, reserve=transfer.reserve_s
        )

    # --- source -----------------------------------------------------------------------------------------------------

    def start(self, move: Move, deadline: float, mode: Mode, ended: Callable[[str, Outcome], None]) -> None:
        """Move a workload away; `ended` is called with workload and outcome. Raises GiveUp when that cannot be."""
        if move.workload in self._leaving:
            raise GiveUp(f"{move.workload} is being moved already")
        if self._is_arriving(move.workload):
            raise GiveUp(f"{move.workload} is still arriving: its memory is not complete")
        driver = self._source_driver(move)
        driver.post(StartMigration(self._now(), move, deadline, mode))
        self._run_source(move, driver, ended)

    def tighten(self, workload: str, deadline: float) -> None:
        """Tell a move that its node dies earlier."""
        if workload in self._leaving:
            self._leaving[workload].post(DeadlineMoved(self._now(), deadline))

    def withdraw(self, workload: str) -> None:
        """Tell a move that it is not needed any more."""
        if workload in self._leaving:
            self._leaving[workload].post(NoticeWithdrawn(self._now()))

    def _source_driver(self, move: Move) -> Driver:
        return Driver(
            move.migration,
            source.step,
            source.SourceState(limits=self._limits),
            SourceEffects(self._parts, move),
            journal=self._journal,
            clock=self._parts.clock,
            log=self._parts.log,
            fields={"workload": move.workload, "side": "source"},
        )

    def _run_source(self, move: Move, driver: Driver, ended: Callable[[str, Outcome], None]) -> None:
        self._leaving[move.workload] = driver

        async def run() -> None:
            result = await driver.run()
            del self._leaving[move.workload]
            ended(move.workload, result.outcome)
            await self._tell_ended()

        self._tasks.create_task(run(), name=f"source of {move.migration}")

    # --- target: what the control API opens onto --------------------------------------------------------------------

    async def offer(self, peer: str, offer: Offer, deadline: float) -> OfferAnswer:
        """Prepare for a workload that `peer` wants to send. Raises GiveUp with the reason when that cannot be."""
        manifest = PodManifest.from_json(offer.workload)
        here = self._parts.settings.node.name
        move = Move(migration=offer.migration, workload=manifest.name, source=peer, target=here)
        if offer.migration in self._arriving:
            raise GiveUp(f"migration {offer.migration} is here already")
        self._require_willing()
        name = manifest.name  # an earlier try may still be cleaning up
        await self._wait_until(
            lambda: not self._is_arriving(name) and name not in self._leaving,
            deadline,
            f"an earlier move of {name} goes on",
        )
        self._require_willing()
        limits = self._accepted(offer)
        driver, effects = self._target_driver(move, manifest, limits)
        expires = self._now() + offer.expires_in_s
        driver.post(Offered(self._now(), move, expires, offer.owner_version))
        self._run_target(move, _Receiving(move, driver, effects, peer, max(limits.max_memory, limits.max_images)))
        async with asyncio.timeout_at(deadline):
            accepted, reason = await asyncio.shield(effects.answers.offered)
        if not accepted:
            raise GiveUp(reason)
        return OfferAnswer(stream_host=self._parts.settings.node.address, stream_port=effects.stream_port)

    def _require_willing(self) -> None:
        if self.unwilling:
            raise GiveUp(f"{self._parts.settings.node.name} takes nothing: {self.unwilling}")

    async def settled(self, deadline: float) -> None:
        """Wait until nothing leaves this node any more, as after a restart. Raises GiveUp at the deadline."""
        await self._wait_until(lambda: not self._leaving, deadline, "earlier moves go on")

    async def _tell_ended(self) -> None:
        async with self._ended:
            self._ended.notify_all()

    async def _wait_until(self, condition: Callable[[], bool], deadline: float, complaint: str) -> None:
        try:
            async with asyncio.timeout_at(deadline), self._ended:
                await self._ended.wait_for(condition)
        except TimeoutError as late:
            raise GiveUp(complaint) from late

    def _is_arriving(self, workload: str) -> bool:
        return any(other.move.workload == workload for other in self._arriving.values())

    def _accepted(self, offer: Offer) -> TransferLimits:
        """Check the announced sizes against what this node has left for arriving memory, of all migrations together."""
        most = self._parts.settings.transfer.store_memory_max
        wanted = TransferLimits(max_memory=offer.max_memory, max_images=offer.max_images, max_files=offer.max_files)
        taken = sum(receiving.ram for receiving in self._arriving.values())
        if max(wanted.max_memory, wanted.max_images) + taken > most:
            raise GiveUp(
                f"{offer.max_memory} bytes of memory and {offer.max_images} of images are announced, other moves take "
                f"{taken}, and this node takes {most} in all (setting transfer.store_memory_max)"
            )
        return wanted

    def _target_driver(self, move: Move, manifest: PodManifest, limits: TransferLimits) -> tuple[Driver, TargetEffects]:
        def post(event: Event) -> None:
            driver.post(event)

        effects = TargetEffects(self._parts, move, manifest, limits, post)
        driver = Driver(
            move.migration,
            target.step,
            target.TargetState(limits=self._limits),
            effects,
            journal=self._journal,
            clock=self._parts.clock,
            log=self._parts.log,
            fields={"workload": move.workload, "side": "target"},
        )
        return driver, effects

    def _run_target(self, move: Move, receiving: _Receiving) -> None:
        self._arriving[move.migration] = receiving

        async def run() -> None:
            await receiving.driver.run()
            del self._arriving[move.migration]
            await self._tell_ended()

        self._tasks.create_task(run(), name=f"target of {move.migration}")

    async def restore(self, peer: str, migration: str, deadline: float) -> RestoreAnswer:
        """Restore, take ownership, resume; answer when that is done or has failed."""
        receiving = self._of(peer, migration)
        receiving.driver.post(RestoreRequested(self._now(), deadline))
        async with asyncio.timeout_at(deadline):
            resumed, reason = await asyncio.shield(receiving.effects.answers.restored)
        return RestoreAnswer(
            outcome="resumed" if resumed else "failed",
            reason=reason,
            timings=dict(receiving.effects.answers.timings),
        )

    async def frames(self, peer: str, migration: str, block: bytes) -> None:
        """Take frames that the source has held for the pod."""
        self._of(peer, migration).effects.keep_frames(block)

    async def status(self, peer: str, migration: str) -> dict[str, Any]:
        """Say where a migration stands."""
        return {"phase": str(self._of(peer, migration).driver.state.phase)}

    async def abort(self, peer: str, migration: str) -> None:
        """The source wants no copy here."""
        receiving = self._arriving.get(migration)
        if receiving is not None and receiving.peer == peer:
            receiving.driver.post(AbortRequested(self._now(), f"{peer} has given up"))

    def _of(self, peer: str, migration: str) -> _Receiving:
        receiving = self._arriving.get(migration)
        if receiving is None or receiving.peer != peer:
            raise GiveUp(f"migration {migration} is not arriving here from {peer}")
        return receiving

    # --- both -------------------------------------------------------------------------------------------------------

    def resume(self, ended: Callable[[str, Outcome], None]) -> None:
        """Go on with every migration of the journal. Raises RecordError or JournalError for a record it cannot read."""
        for _, raw in self._journal.records():
            record = Record.from_json(raw)
            self._parts.log.add("restarted", migration=record.move.migration, phase=record.phase, side=str(record.role))
            if record.role is Role.SOURCE:
                driver = self._source_driver(record.move)
                driver.post(AgentRestarted(self._now(), record))
                self._run_source(record.move, driver, ended)
            else:
                self._resume_target(record)

    def _resume_target(self, record: Record) -> None:
        bundle = self._parts.bundle(record.move.workload)
        manifest = manifest_or_nothing(bundle, record.move.workload)
        nothing = TransferLimits(0, 0, 0)
        driver, effects = self._target_driver(record.move, manifest, nothing)
        driver.post(AgentRestarted(self._now(), record))
        self._run_target(record.move, _Receiving(record.move, driver, effects, record.move.source, 0))

    def summary(self) -> list[dict[str, str]]:
        """Say what is under way, for `status`."""
        leaving = [
            {"workload": w, "side": "source", "phase": str(d.state.phase)} for w, d in sorted(self._leaving.items())
        ]
        arriving = [
            {"workload": r.move.workload, "side": "target", "phase": str(r.driver.state.phase)}
            for r in self._arriving.values()
        ]
        return leaving + arriving

    def _now(self) -> float:
        return self._parts.clock.monotonic()
