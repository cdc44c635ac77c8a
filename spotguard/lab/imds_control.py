"""The control interface of the simulated metadata service: JSON over HTTP, described in docs/imds-sim.md."""

import json
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Self, cast

from aiohttp import web

from spotguard.lab.imds_faults import Fault
from spotguard.lab.imds_world import Interruption, ScheduledEvent

if TYPE_CHECKING:
    from spotguard.lab.imds_sim import ImdsSimulator

# What datetime can write; a time beyond it is a typing error.
_EARLIEST, _LATEST = 0.0, 253402300799.0


class _Fields:
    """The JSON object of a request; each read checks the type, `end` refuses what nobody asked for."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = dict(values)

    @classmethod
    def read(cls, body: str) -> Self:
        given = json.loads(body) if body.strip() else {}
        if not isinstance(given, dict):
            raise ValueError("the body must be a JSON object")  # noqa: TRY004 - one kind of error for the caller
        return cls(cast("dict[str, object]", given))

    def text(self, name: str, default: str | None = None) -> str | None:
        value = self._values.pop(name, default)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name} must be text")
        return value

    def number(self, name: str) -> float | None:
        value = self._values.pop(name, None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{name} must be a number")
        return value

    def count(self, name: str) -> int | None:
        value = self._values.pop(name, None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{name} must be a whole number")
        return value

    def moment(self, now: float, *, prefix: str = "", default: float | None = None) -> float | None:
        """Read `in` (seconds from now) or `at` (epoch seconds or RFC 3339): epoch seconds."""
        after, at = self.number(f"{prefix}in"), self._values.pop(f"{prefix}at", None)
        if after is not None and at is not None:
            raise ValueError(f"give {prefix}in or {prefix}at, not both")
        if isinstance(at, str):
            when: float | None = datetime.fromisoformat(at).timestamp()
        elif isinstance(at, int | float) and not isinstance(at, bool):
            when = float(at)
        elif at is not None:
            raise ValueError(f"{prefix}at must be epoch seconds or an RFC 3339 time")
        else:
            after = default if after is None else after
            when = None if after is None else now + after
        if when is not None and not _EARLIEST <= when <= _LATEST:
            raise ValueError(f"the time of {prefix}in or {prefix}at is out of range")
        return when

    def end(self) -> None:
        if self._values:
            raise ValueError(f"unknown: {', '.join(sorted(self._values))}")


def control_app(imds: "ImdsSimulator") -> web.Application:
    """Build the control interface of a simulator."""
    app = web.Application()

    def add(method: str, path: str, action: Callable[[_Fields, web.Request], None]) -> None:
        app.router.add_route(method, path, _handler(imds, action))

    def clear_events(_: _Fields, request: web.Request) -> None:
        wanted = request.match_info.get("id")
        if wanted is None:
            imds.world.events.clear()
        elif imds.world.events.pop(wanted, None) is None:
            raise web.HTTPNotFound(text=json.dumps({"error": f"no event {wanted}"}), content_type="application/json")

    def clear_rebalance(_: _Fields, __: web.Request) -> None:
        imds.world.rebalance = None

    def clear_asg(_: _Fields, __: web.Request) -> None:
        imds.world.lifecycle_state = None

    add("GET", "/v1/state", lambda _, __: None)
    add("POST", "/v1/notice", lambda fields, _: _notice(imds, fields))
    add("DELETE", "/v1/notice", lambda _, __: imds.withdraw())
    add("POST", "/v1/rebalance", lambda fields, _: _rebalance(imds, fields))
    add("DELETE", "/v1/rebalance", clear_rebalance)
    add("POST", "/v1/maintenance", lambda fields, _: _maintenance(imds, fields))
    add("DELETE", "/v1/maintenance", clear_events)
    add("DELETE", "/v1/maintenance/{id}", clear_events)
    add("PUT", "/v1/asg", lambda fields, _: _asg(imds, fields))
    add("DELETE", "/v1/asg", clear_asg)
    add("PUT", "/v1/values", lambda fields, _: _values(imds, fields))
    add("POST", "/v1/faults", lambda fields, _: _fault(imds, fields))
    add("DELETE", "/v1/faults", lambda _, __: imds.faults.clear())
    add("POST", "/v1/tokens/expire", lambda _, __: imds.expire_tokens())
    return app


def _handler(
    imds: "ImdsSimulator", action: Callable[[_Fields, web.Request], None]
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            action(_Fields.read(await request.text()), request)
        except (ValueError, OverflowError) as error:
            return web.json_response({"error": str(error)}, status=400)
        return web.json_response(_state(imds))

    return handle


def _state(imds: "ImdsSimulator") -> dict[str, object]:
    faults = [
        {
            "fault": str(fault.status) if fault.kind == "status" else fault.kind,
            "left": left,
            "path": fault.path,
            "seconds": fault.seconds,
        }
        for fault, left in imds.faults
    ]
    requests = [
        {"method": method, "path": path, "result": result, "count": count}
        for (method, path, result), count in sorted(imds.requests.items())
    ]
    return {**imds.world.describe(), "faults": faults, "requests": requests}


def _notice(imds: "ImdsSimulator", fields: _Fields) -> None:
    action = fields.text("action", "terminate")
    when = fields.moment(imds.world.now(), default=120.0)
    fields.end()
    assert action is not None
    assert when is not None
    imds.world.interruption = Interruption(action, when)


def _rebalance(imds: "ImdsSimulator", fields: _Fields) -> None:
    when = fields.moment(imds.world.now(), default=0.0)
    fields.end()
    imds.world.rebalance = when


def _maintenance(imds: "ImdsSimulator", fields: _Fields) -> None:
    now = imds.world.now()
    state = fields.text("state", "active") or ""
    if state not in {"active", "completed", "canceled"}:
        raise ValueError("state must be active, completed or canceled")
    when = fields.moment(now, default=3600.0)
    assert when is not None
    event = ScheduledEvent(
        event_id=fields.text("event_id", "instance-event-0d59937288b749b32") or "",
        code=fields.text("code", "instance-stop") or "",
        not_before=when,
        state=state,
        description=fields.text("description", "scheduled maintenance") or "",
        not_after=fields.moment(now, prefix="not_after_"),
        deadline=fields.moment(now, prefix="deadline_"),
    )
    fields.end()
    imds.schedule(event)


def _asg(imds: "ImdsSimulator", fields: _Fields) -> None:
    state = fields.text("state")
    fields.end()
    if not state:
        raise ValueError("state is missing, for example Terminated")
    imds.world.lifecycle_state = state


def _values(imds: "ImdsSimulator", fields: _Fields) -> None:
    path, value = fields.text("path"), fields.text("value")
    fields.end()
    if not path:
        raise ValueError("path is missing, for example instance-type")
    if value is None:
        imds.world.values.pop(path, None)
    else:
        imds.world.values[path] = value


def _fault(imds: "ImdsSimulator", fields: _Fields) -> None:
    name = fields.text("fault") or ""
    kind, status = ("status", int(name)) if name.isascii() and name.isdigit() else (name, 500)
    fault = Fault(
        kind=kind,
        count=fields.count("count"),
        path=fields.text("path"),
        status=status,
        body=fields.text("body"),
        seconds=fields.number("seconds"),
    )
    fields.end()
    imds.faults.add(fault)
