"""What the target's effects know of their own: whose pod it is, whether its memory is whole, what frames wait."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from criu_transfer.receiver import FILLED
from handlers.bundle import Bundle, PodManifest, remains
from handlers.cgroup import Cgroup
from handlers.errors import GiveUp
from spotguard import target_effects as module
from spotguard.clock import FakeClock
from spotguard.core import commands as c
from spotguard.core.events import Event, PagerDied
from spotguard.core.state import Move
from spotguard.events_log import EventLog
from spotguard.parts import Parts, TransferLimits
from spotguard.target_effects import TargetEffects

MIGRATION = "753bd747-1f03-4186-9e2b-9172874d6bda"


class Target:
    """One migration's effects on a node without a kernel below it."""

    def __init__(self, top: Path, migration: str = MIGRATION) -> None:
        async def delete(*_: object) -> None:
            pass

        parts = SimpleNamespace(
            clock=FakeClock(),
            log=EventLog(FakeClock()),
            store=None,
            runc=SimpleNamespace(delete=delete),
            bundle=lambda name: Bundle(top / "pods" / name),
            pod_cgroup=lambda name: Cgroup(top / "cgroup" / name),
            receiver_cgroup=lambda one: (top / "receivers" / one, None),
            worker_cgroup=lambda one, side: top / "workers" / f"{one}-{side}",
            work_dir=lambda one, side: top / side / one,
        )
        move = Move(migration=migration, workload="redis", source="a", target="b")
        manifest = PodManifest(name="redis", address="10.77.1.10", command=("redis",))
        self.pod = top / "pods" / "redis"
        self.images = top / "target" / migration / "images"
        self.posted: list[Event] = []
        self.effects: Any = TargetEffects(
            cast(Parts, parts), move, manifest, TransferLimits(1, 1, 1), self.posted.append
        )


@pytest.fixture(autouse=True)
def no_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.sandbox, "find", lambda _: None)
    monkeypatch.setattr(module.sandbox, "destroy", lambda _: None)


class TestWhoseItIs:
    async def test_a_claim_is_made_at_once_and_is_its_own_migration_s(self, tmp_path: Path) -> None:
        target = Target(tmp_path)
        assert not target.effects._is_ours()
        target.effects._claim()
        assert target.effects._is_ours()
        assert not Target(tmp_path, "another").effects._is_ours()
        assert list(target.pod.parent.iterdir()) == [target.pod]

    async def test_a_pod_that_is_here_is_neither_claimed_nor_destroyed(self, tmp_path: Path) -> None:
        target = Target(tmp_path)
        (target.pod / "upper").mkdir(parents=True)
        with pytest.raises(GiveUp, match="is on this node already"):
            target.effects._claim()
        await target.effects.perform(c.DestroyRestored(1e9))
        assert (target.pod / "upper").exists()

    async def test_what_a_crash_left_of_a_claim_or_of_a_destroyed_pod_is_in_nobody_s_way(self, tmp_path: Path) -> None:
        target = Target(tmp_path)
        (remains(target.pod) / "upper").mkdir(parents=True)
        await target.effects.perform(c.DestroyRestored(1e9))
        assert not remains(target.pod).exists()
        (remains(target.pod) / "upper").mkdir(parents=True)
        target.effects._claim()
        assert [path.name for path in target.pod.iterdir()] == ["migration"]

    async def test_a_destroyed_pod_can_be_claimed_again(self, tmp_path: Path) -> None:
        target = Target(tmp_path)
        target.effects._claim()
        await target.effects.perform(c.DestroyRestored(1e9))
        assert not target.pod.exists()
        Target(tmp_path, "another").effects._claim()


class TestMemory:
    async def test_it_is_whole_when_marked_and_after_the_clean_up(self, tmp_path: Path) -> None:
        target = Target(tmp_path)
        target.images.mkdir(parents=True)
        assert not target.effects._memory_is_whole()
        (target.images / FILLED).touch()
        assert target.effects._memory_is_whole()
        (target.images / FILLED).unlink()
        target.effects._remove_work_dir()
        target.effects._remove_work_dir()
        assert list(tmp_path.glob("target/*")) == []
        assert target.effects._memory_is_whole(), "an agent that restarts must not take it for a lost pager"

    async def test_an_end_with_pages_missing_kills_the_container_and_one_with_all_there_is_the_fill(
        self, tmp_path: Path
    ) -> None:
        target = Target(tmp_path)
        target.images.mkdir(parents=True)
        (tmp_path / "cgroup" / "redis").mkdir(parents=True)
        target.effects._on_receiver({"event": "ended", "code": -9})
        assert (tmp_path / "cgroup" / "redis" / "cgroup.kill").read_text() == "1"
        assert isinstance(target.posted.pop(), PagerDied)
        (target.images / FILLED).touch()
        target.effects._on_receiver({"event": "ended", "code": 0})
        assert target.effects._filled
        assert not target.posted

    async def test_an_earlier_agent_s_pager_that_ends_too_early_kills_the_container(self, tmp_path: Path) -> None:
        target = Target(tmp_path)
        target.images.mkdir(parents=True)
        (tmp_path / "cgroup" / "redis").mkdir(parents=True)
        with pytest.raises(GiveUp, match="before all memory was there"):
            await target.effects.perform(c.AwaitFill(1e9))
        assert (tmp_path / "cgroup" / "redis" / "cgroup.kill").read_text() == "1"
        assert isinstance(target.posted.pop(), PagerDied)
