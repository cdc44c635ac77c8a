"""The simulated metadata service: what it answers, how it is controlled."""

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from spotguard.lab import imds_sim
from spotguard.lab.imds_faults import Fault
from spotguard.lab.imds_sim import TOKEN_HEADER, TTL_HEADER, ImdsSimulator, Listen

NOW = 1_577_840_627.5


class Client:
    """Ask the simulator, with a token unless told otherwise."""

    def __init__(self, imds: ImdsSimulator, http: aiohttp.ClientSession) -> None:
        self.imds = imds
        self.ticks = [0.0]
        self.http = http
        self.token = ""

    async def new_token(self, ttl: str = "60") -> None:
        status, self.token = await self.ask("PUT", "/latest/api/token", **{TTL_HEADER: ttl})
        assert status == 200

    async def ask(self, method: str, path: str, **headers: str) -> tuple[int, str]:
        async with self.http.request(method, self.imds.endpoint + path, headers=headers) as response:
            return response.status, await response.text()

    async def get(self, path: str) -> tuple[int, str]:
        return await self.ask("GET", f"/latest/meta-data/{path}", **{TOKEN_HEADER: self.token})

    async def control(self, method: str, path: str, /, **fields: object) -> tuple[int, Any]:
        async with self.http.request(method, self.imds.control + path, json=fields or None) as response:
            return response.status, await response.json()


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    ticks = [0.0]
    async with (
        ImdsSimulator(now=lambda: NOW, monotonic=lambda: ticks[0]) as imds,
        aiohttp.ClientSession() as http,
    ):
        client = Client(imds, http)
        client.ticks = ticks
        await client.new_token()
        yield client


@pytest.mark.parametrize("ttl", ["1", "21600"])
async def test_token(client: Client, ttl: str) -> None:
    url = f"{client.imds.endpoint}/latest/api/token"
    async with client.http.put(url, headers={TTL_HEADER: ttl}) as response:
        assert (response.status, response.content_type) == (200, "text/plain")
        assert response.headers[TTL_HEADER] == ttl
        assert len(await response.text()) > 40


@pytest.mark.parametrize("ttl", ["0", "21601", "-1", "soon", "", "٣", "9" * 5000])
async def test_wrong_ttl_is_400(client: Client, ttl: str) -> None:
    url = f"{client.imds.endpoint}/latest/api/token"
    async with client.http.put(url, headers={TTL_HEADER: ttl} if ttl.isascii() else {}) as response:
        assert response.status == 400


async def test_token_rules(client: Client) -> None:
    assert (await client.ask("GET", "/latest/api/token"))[0] == 405
    proxied = {TTL_HEADER: "60", "X-Forwarded-For": "10.0.0.1"}
    assert (await client.ask("PUT", "/latest/api/token", **proxied))[0] == 403
    assert (await client.ask("POST", "/latest/meta-data/instance-id"))[0] == 405


async def test_missing_unknown_and_expired_tokens_are_401(client: Client) -> None:
    assert (await client.get("instance-id"))[0] == 200
    assert (await client.ask("GET", "/latest/meta-data/instance-id"))[0] == 401
    assert (await client.ask("GET", "/latest/meta-data/instance-id", **{TOKEN_HEADER: "forged"}))[0] == 401
    client.ticks[0] = 59.9
    assert (await client.get("instance-id"))[0] == 200
    client.ticks[0] = 60.0
    assert (await client.get("instance-id"))[0] == 401
    await client.new_token()
    await client.control("POST", "/v1/tokens/expire")
    assert (await client.get("instance-id"))[0] == 401


async def test_nothing_to_tell_is_404(client: Client) -> None:
    for path in ("spot/instance-action", "spot/termination-time", "events/recommendations/rebalance", "no/such"):
        status, body = await client.get(path)
        assert (status, "404 - Not Found" in body) == (404, True)
    assert await client.get("events/maintenance/scheduled") == (200, "[]")
    assert await client.get("autoscaling/target-lifecycle-state") == (200, "InService")
    assert (await client.ask("GET", "/", **{TOKEN_HEADER: client.token}))[0] == 404


async def test_notice(client: Client) -> None:
    await client.control("POST", "/v1/notice", **{"action": "terminate", "in": 120})
    status, body = await client.get("spot/instance-action")
    assert (status, json.loads(body)) == (200, {"action": "terminate", "time": "2020-01-01T01:05:47Z"})
    assert await client.get("spot/termination-time") == (200, "2020-01-01T01:05:47Z")
    await client.control("POST", "/v1/notice", action="stop", at="2019-12-31T00:00:00Z")
    assert json.loads((await client.get("spot/instance-action"))[1])["time"] == "2019-12-31T00:00:00Z"
    assert (await client.get("spot/termination-time"))[0] == 404
    await client.control("POST", "/v1/notice", at=-0.0)
    assert json.loads((await client.get("spot/instance-action"))[1])["time"] == "1970-01-01T00:00:00Z"
    await client.control("DELETE", "/v1/notice")
    assert (await client.get("spot/instance-action"))[0] == 404


async def test_rebalance_maintenance_group_and_values(client: Client) -> None:
    await client.control("POST", "/v1/rebalance")
    assert json.loads((await client.get("events/recommendations/rebalance"))[1]) == {
        "noticeTime": "2020-01-01T01:03:47Z"
    }
    fields = {"event_id": "instance-event-1", "code": "system-reboot", "in": 0, "not_after_in": 86400}
    await client.control("POST", "/v1/maintenance", **fields)
    (event,) = json.loads((await client.get("events/maintenance/scheduled"))[1])
    assert event == {
        "NotBefore": "1 Jan 2020 01:03:47 GMT",
        "NotAfter": "2 Jan 2020 01:03:47 GMT",
        "Code": "system-reboot",
        "Description": "scheduled maintenance",
        "EventId": "instance-event-1",
        "State": "active",
    }
    await client.control("POST", "/v1/maintenance", event_id="instance-event-1", state="canceled")
    (event,) = json.loads((await client.get("events/maintenance/scheduled"))[1])
    assert (event["State"], event["Description"]) == ("canceled", "[Canceled] scheduled maintenance")
    assert (await client.control("DELETE", "/v1/maintenance/instance-event-1"))[0] == 200
    assert (await client.control("DELETE", "/v1/maintenance/instance-event-1"))[0] == 404
    await client.control("PUT", "/v1/asg", state="Terminated")
    assert await client.get("autoscaling/target-lifecycle-state") == (200, "Terminated")
    await client.control("DELETE", "/v1/asg")
    assert (await client.get("autoscaling/target-lifecycle-state"))[0] == 404
    await client.control("PUT", "/v1/values", path="instance-type", value="c7g.large")
    assert await client.get("instance-type") == (200, "c7g.large")


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
async def test_status_for_the_next_requests(client: Client, status: int) -> None:
    await client.control("POST", "/v1/faults", fault=str(status), count=2)
    assert [(await client.get("instance-id"))[0] for _ in range(3)] == [status, status, 200]


async def test_faults_by_path_and_clearing(client: Client) -> None:
    await client.control("POST", "/v1/faults", fault="503", path="spot/")
    await client.control("POST", "/v1/faults", fault="403", path="token")
    assert (await client.get("spot/instance-action"))[0] == 503
    assert (await client.get("instance-id"))[0] == 200
    assert (await client.ask("PUT", "/latest/api/token", **{TTL_HEADER: "60"}))[0] == 403
    _, state = await client.control("GET", "/v1/state")
    assert [(fault["fault"], fault["left"]) for fault in state["faults"]] == [("503", None), ("403", None)]
    await client.control("DELETE", "/v1/faults")
    assert (await client.get("spot/instance-action"))[0] == 404


async def test_401_for_all_leaves_the_token_alone(client: Client) -> None:
    client.imds.faults.add(Fault("status", status=401))
    await client.new_token()
    assert (await client.get("instance-id"))[0] == 401


async def test_answers_gone_wrong(client: Client) -> None:
    client.imds.faults.add(Fault("garbage", count=1))
    assert "<html>" in (await client.get("instance-id"))[1]
    client.imds.faults.add(Fault("garbage", count=1, body="{"))
    assert await client.get("instance-id") == (200, "{")
    client.imds.faults.add(Fault("huge", count=1))
    assert len((await client.get("instance-id"))[1]) == 64 << 20
    client.imds.faults.add(Fault("content-type", count=1))
    url, headers = f"{client.imds.endpoint}/latest/meta-data/instance-id", {TOKEN_HEADER: client.token}
    async with client.http.get(url, headers=headers) as response:
        assert response.content_type == "application/octet-stream"
    client.imds.faults.add(Fault("redirect", count=1))
    async with client.http.get(url, headers=headers, allow_redirects=False) as response:
        assert response.status == 302


@pytest.mark.parametrize("kind", ["drop", "truncated"])
async def test_connection_cut(client: Client, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    client.imds.faults.add(Fault(kind))
    with pytest.raises(aiohttp.ClientError):
        await client.get("instance-id")
    client.imds.faults.clear()
    assert (await client.get("instance-id"))[0] == 200
    assert not caplog.records


@pytest.mark.parametrize("kind", ["stall", "huge", "drip"])
async def test_a_client_that_goes_away_is_no_trouble(
    client: Client, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    client.imds.faults.add(Fault(kind, seconds=None if kind == "stall" else 0.01))
    async with aiohttp.ClientSession() as other:
        impatient = Client(client.imds, other)
        impatient.token = client.token
        asked = asyncio.create_task(impatient.get("instance-id"))
        async with asyncio.timeout(5):
            while client.imds.requests["GET", "instance-id", kind] == 0:
                await client.control("GET", "/v1/state")
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
    client.imds.faults.clear()
    assert (await client.get("instance-id"))[0] == 200
    assert not caplog.records


async def test_drip_gives_byte_by_byte(client: Client) -> None:
    client.imds.faults.add(Fault("drip", seconds=0.0))
    assert await client.get("instance-id") == (200, "i-0123456789abcdef0")
    client.imds.faults.clear()
    client.imds.faults.add(Fault("drip", seconds=60))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await client.get("instance-id")


async def test_stall_ends_when_cleared_or_after_its_time(client: Client) -> None:
    client.imds.faults.add(Fault("stall", count=1, seconds=0.01))
    assert (await client.get("instance-id"))[0] == 200
    client.imds.faults.add(Fault("stall"))
    stalled = asyncio.create_task(client.get("instance-id"))
    async with asyncio.timeout(5):
        while client.imds.requests["GET", "instance-id", "stall"] != 2:
            await client.control("GET", "/v1/state")
    assert not stalled.done()
    await client.control("DELETE", "/v1/faults")
    async with asyncio.timeout(5):
        assert (await stalled)[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "fields"),
    [
        ("POST", "/v1/notice", {"in": "soon"}),
        ("POST", "/v1/notice", {"in": 1, "at": 2}),
        ("POST", "/v1/notice", {"at": "yesterday"}),
        ("POST", "/v1/notice", {"at": 1e30}),
        ("POST", "/v1/notice", {"in": True}),
        ("POST", "/v1/notice", {"acton": "stop"}),
        ("POST", "/v1/faults", {"fault": "gremlin"}),
        ("POST", "/v1/faults", {"fault": "200"}),
        ("POST", "/v1/faults", {"fault": "500", "count": 0}),
        ("POST", "/v1/faults", {"fault": "500", "count": 1.5}),
        ("POST", "/v1/faults", {"fault": "stall", "seconds": -1}),
        ("POST", "/v1/maintenance", {"state": "odd"}),
        ("PUT", "/v1/asg", {}),
        ("PUT", "/v1/values", {}),
    ],
)
async def test_control_refuses_mistakes(client: Client, method: str, path: str, fields: dict[str, object]) -> None:
    before = client.imds.world.describe()
    status, answer = await client.control(method, path, **fields)
    assert (status, list(answer)) == (400, ["error"])
    assert client.imds.world.describe() == before
    assert not list(client.imds.faults)


async def test_control_refuses_what_is_no_object(client: Client) -> None:
    for body in ("[]", "{", "17"):
        async with client.http.post(f"{client.imds.control}/v1/notice", data=body) as response:
            assert response.status == 400


async def test_control_over_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "control"
    async with ImdsSimulator(now=lambda: NOW, listen=Listen(control_socket=path)) as imds:
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as http,
            http.post("http://control/v1/notice", json={"action": "hibernate"}) as response,
        ):
            assert response.status == 200
        assert imds.world.interruption is not None
    assert not path.exists()


async def test_without_v2_no_token_is_needed() -> None:
    async with ImdsSimulator(now=lambda: NOW, require_token=False) as imds, aiohttp.ClientSession() as http:
        assert await Client(imds, http).ask("GET", "/latest/meta-data/instance-type") == (200, "m6i.large")


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    imds_sim.add_arguments(parser)
    return parser.parse_args(words)


def test_help_is_complete() -> None:
    parser = argparse.ArgumentParser()
    imds_sim.add_arguments(parser)
    assert all(action.help for action in parser._actions)
    assert "%(" not in parser.format_help()


async def test_command_line_serves_until_told_to_stop() -> None:
    program = (
        "import argparse, sys\nfrom spotguard.lab import imds_sim\nparser = argparse.ArgumentParser()\n"
        "imds_sim.add_arguments(parser)\nsys.exit(imds_sim.main(parser.parse_args()))"
    )
    words = ("--port", "0", "--control-port", "0", "--notice-in", "90", "--action", "stop", "--zone", "us-east-1d")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, *words, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    async with asyncio.timeout(20):
        addresses = json.loads(await process.stdout.readline())
        async with (
            aiohttp.ClientSession() as http,
            http.get(f"{addresses['control']}/v1/state") as response,
        ):
            state = await response.json()
        assert state["notice"]["action"] == "stop"
        assert state["values"]["placement/region"] == "us-east-1"
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


def test_a_taken_port_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert imds_sim.main(parse("--host", "192.0.2.1", "--port", "0")) == 1
    assert "cannot listen" in capsys.readouterr().err
