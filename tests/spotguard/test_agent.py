"""What the agent makes of its settings, and how it follows moved pods."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from handlers.errors import GiveUp
from handlers.imds_client import DEFAULT_ENDPOINTS
from handlers.network import routes
from handlers.owner import OwnerRecord
from spotguard import agent
from spotguard.clock import FakeClock
from spotguard.events_log import EventLog
from spotguard.parts import Parts
from spotguard.settings import (
    AgentSettings,
    ControlSettings,
    ImdsSettings,
    NodeSettings,
    OwnerClientSettings,
    TlsSettings,
)

ENDPOINT = "AWS_EC2_METADATA_SERVICE_ENDPOINT"


def settings(**changes: Any) -> AgentSettings:
    made: dict[str, Any] = {
        "node": NodeSettings(name="a", address="10.77.0.11"),
        "tls": TlsSettings(cert=Path("/c"), key=Path("/k"), ca=Path("/a")),
        "owner_store": OwnerClientSettings(url="https://store:9713"),
    }
    return AgentSettings(**{**made, **changes})


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("10.77.0.12", ("10.77.0.12", 9711)),
        ("10.77.0.12:9800", ("10.77.0.12", 9800)),
        ("fd00::12", ("fd00::12", 9711)),
        ("[fd00::12]:9800", ("fd00::12", 9800)),
        ("[fd00::12]", ("fd00::12", 9711)),
    ],
)
def test_where_a_peer_is(address: str, found: tuple[str, int]) -> None:
    assert agent.addresses(settings(peers={"b": address})) == {"b": found}


def test_a_peer_without_a_port_has_this_node_s_own() -> None:
    made = settings(peers={"b": "10.77.0.12", "c": "10.77.0.13:1"}, control=ControlSettings(port=9999))
    assert agent.addresses(made) == {"b": ("10.77.0.12", 9999), "c": ("10.77.0.13", 1)}


def test_the_metadata_service_is_where_the_settings_or_aws_own_variable_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENDPOINT, raising=False)
    assert agent.imds_endpoints(settings()) == DEFAULT_ENDPOINTS
    monkeypatch.setenv(ENDPOINT, "http://10.0.0.1:1/")
    assert agent.imds_endpoints(settings()) == ("http://10.0.0.1:1",)
    assert agent.imds_endpoints(settings(imds=ImdsSettings(interval_s=0.5))) == ("http://10.0.0.1:1",)
    told = settings(imds=ImdsSettings(endpoint="http://10.0.0.2:2"))
    assert agent.imds_endpoints(told) == ("http://10.0.0.2:2",)


def record(target: str, owner: str = "target", address: str = "10.77.1.10") -> OwnerRecord:
    return OwnerRecord("m-1", "redis", "c", target, cast(Any, owner), address, "7")


class Roads:
    """What the node's routes become; `here` are the pods that have their network on this node."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pointed: list[routes.Route] = []
        self.broken = self.torn = False
        self.here: dict[str, str] = {}
        self.log = EventLog(FakeClock())
        monkeypatch.setattr(agent.routes, "point", self._point)
        monkeypatch.setattr(agent.sandbox, "find", self._find)
        self._monkeypatch = monkeypatch

    def _find(self, name: str) -> object:
        if self.torn:
            raise FileNotFoundError(f"/run/netns/pod-{name}")
        return SimpleNamespace(address=self.here[name]) if name in self.here else None

    def _point(self, route: routes.Route) -> None:
        if self.broken:
            raise GiveUp("no such device")
        self.pointed.append(route)

    async def follow(self, *records: OwnerRecord) -> None:
        async def follow(_: object, apply: Callable[[OwnerRecord], Awaitable[None]], __: object) -> None:
            for one in records:
                await apply(one)

        self._monkeypatch.setattr(agent, "follow", follow)
        made = settings(peers={"b": "10.77.0.12:9800"})
        await agent.follow_routes(cast(Parts, SimpleNamespace(settings=made, store=None, log=self.log)), agent.Health())


@pytest.fixture
def roads(monkeypatch: pytest.MonkeyPatch) -> Roads:
    return Roads(monkeypatch)


async def test_routes_follow_the_owner_to_another_node(roads: Roads) -> None:
    await roads.follow(record("b"))
    assert roads.pointed == [routes.Route("10.77.1.10", via="10.77.0.12")]


async def test_what_is_not_decided_or_came_here_or_is_unknown_moves_no_route(roads: Roads) -> None:
    await roads.follow(record("b", "source"), record("b", "reclaimed"), record("a"), record("nobody"))
    assert roads.pointed == []


async def test_an_old_record_does_not_move_the_route_of_a_pod_that_is_here(roads: Roads) -> None:
    roads.here = {"redis": "10.77.1.10"}
    await roads.follow(record("b"))
    assert roads.pointed == []


async def test_a_network_that_goes_away_while_it_is_looked_at_ends_nothing(roads: Roads) -> None:
    roads.torn = True
    await roads.follow(record("b"))
    roads.torn = False
    await roads.follow(record("b"))
    assert len(roads.pointed) == 1
    assert "the network of redis" in roads.log.kept()[0]["text"]


async def test_a_route_that_cannot_be_set_is_told_and_the_next_is_tried(roads: Roads) -> None:
    roads.broken = True
    await roads.follow(record("b"), record("b", address="10.77.1.11"))
    notes = [entry["text"] for entry in roads.log.kept()]
    assert notes == ["route to 10.77.1.10: no such device", "route to 10.77.1.11: no such device"]
