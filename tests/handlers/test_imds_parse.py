"""Shapes that AWS documents, and everything else."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers import imds_parse
from handlers.imds_parse import ImdsGarbage
from handlers.notice import Notice

PARSERS = (
    imds_parse.parse_instance_action,
    imds_parse.parse_termination_time,
    imds_parse.parse_rebalance,
    imds_parse.parse_maintenance,
    imds_parse.parse_target_lifecycle_state,
    imds_parse.parse_name,
    imds_parse.parse_token,
)


def test_instance_action() -> None:
    action = imds_parse.parse_instance_action(b'{"action":"stop","time":"2020-04-24T17:11:44Z","new":[1]}\n')
    assert (action.action, action.at) == ("stop", 1587748304.0)


def test_an_unknown_action_is_terminate() -> None:
    action = imds_parse.parse_instance_action(b'{"action":"evaporate","time":"2020-04-24T17:11:44Z"}')
    assert (action.action, action.raw) == ("terminate", "evaporate")


@pytest.mark.parametrize("time", ["null", "17", '""', '"soon"', '"2020-02-30T00:00:00Z"', '"2020-04-24T17:11:44"'])
def test_an_unreadable_time_does_not_hide_the_action(time: str) -> None:
    action = imds_parse.parse_instance_action(f'{{"action":"hibernate","time":{time}}}'.encode())
    assert (action.action, action.at) == ("hibernate", None)


def test_termination_time_and_offsets() -> None:
    assert imds_parse.parse_termination_time(b"2020-04-24T17:11:44Z\n") == 1587748304.0
    assert imds_parse.parse_termination_time(b"2020-04-24T19:11:44+02:00") == 1587748304.0
    assert imds_parse.parse_termination_time(b"2020-04-24T17:11:44.500Z") == 1587748304.5


def test_rebalance() -> None:
    (notice,) = imds_parse.parse_rebalance(b'{"noticeTime":"2020-10-16T19:18:24Z"}')
    assert notice == Notice("rebalance", "advise", None, "imds", "rebalance", since=1602875904.0)


EVENT = {
    "NotBefore": "1 Jan 2020 01:03:47 GMT",
    "Code": "system-reboot",
    "Description": "The instance is scheduled for a reboot",
    "EventId": "instance-event-0d59937288b749b32",
    "NotAfter": "22 Jan 2020 01:03:47 GMT",
    "State": "active",
}


def test_maintenance() -> None:
    done = {**EVENT, "EventId": "instance-event-2", "State": "completed"}
    called_off = {**EVENT, "EventId": "instance-event-3", "State": "canceled"}
    (notice,) = imds_parse.parse_maintenance(json.dumps([done, EVENT, called_off], indent="\t").encode())
    assert notice.id == "maintenance/instance-event-0d59937288b749b32"
    assert (notice.kind, notice.action, notice.at) == ("maintenance", "reboot", 1577840627.0)
    assert imds_parse.parse_maintenance(b"[]") == ()


@pytest.mark.parametrize(
    ("code", "action"),
    [
        ("instance-reboot", "reboot"),
        ("system-maintenance", "maintenance"),
        ("instance-stop", "stop"),
        ("instance-retirement", "terminate"),
        ("instance-abduction", "terminate"),
    ],
)
def test_maintenance_codes(code: str, action: str) -> None:
    (notice,) = imds_parse.parse_maintenance(json.dumps([{**EVENT, "Code": code}]).encode())
    assert notice.action == action


def test_one_unreadable_event_spoils_the_list() -> None:
    with pytest.raises(ImdsGarbage):
        imds_parse.parse_maintenance(json.dumps([EVENT, {**EVENT, "NotBefore": "soon"}]).encode())


def test_a_description_cannot_write_to_a_terminal() -> None:
    (notice,) = imds_parse.parse_maintenance(json.dumps([{**EVENT, "Description": "\x1b[2J\n" + "x" * 999}]).encode())
    assert notice.detail.isprintable()
    assert len(notice.detail) < 300


@pytest.mark.parametrize("state", ["InService", "Standby", "Detached", "Warmed:Running"])
def test_lifecycle_states_that_go_on(state: str) -> None:
    assert imds_parse.parse_target_lifecycle_state(state.encode()) == ()


@pytest.mark.parametrize(
    ("state", "action"), [("Terminated", "terminate"), ("Warmed:Stopped", "stop"), ("Warmed:Hibernated", "hibernate")]
)
def test_lifecycle_states_that_end(state: str, action: str) -> None:
    (notice,) = imds_parse.parse_target_lifecycle_state(f"{state}\n".encode())
    assert (notice.kind, notice.action, notice.at, notice.id) == ("asg", action, None, "asg")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{}",
        b"[]]",
        b"null",
        b"17",
        b"\xff\xfe{",
        b"[" * 60000,
        b'{"a":' * 10000,
        b"9" * 5000,
        b'{"action":"","time":"2020-04-24T17:11:44Z"}',
        b'{"action":["terminate"],"noticeTime":{},"time":1}',
        b'[{"EventId":7}]',
        b'["instance-stop"]',
        b"<html>It works!</html>",
        b"0000-00-00T00:00:00Z",
        b"2020-04-24T17:11:60Z",
    ],
)
def test_garbage(body: bytes) -> None:
    for parse in PARSERS[:5]:
        with pytest.raises(ImdsGarbage):
            parse(body)


@pytest.mark.parametrize("token", [b"", b"two words", b"line\r\nbreak", "é".encode(), b"x" * 1025])
def test_a_token_must_fit_into_a_header(token: bytes) -> None:
    with pytest.raises(ImdsGarbage):
        imds_parse.parse_token(token)


leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
words = st.sampled_from(
    [
        *(
            "action",
            "time",
            "noticeTime",
            "EventId",
            "Code",
            "State",
            "NotBefore",
            "Description",
            "terminate",
            "active",
        ),
        *("2020-04-24T17:11:44Z", "9999-12-31T23:59:59+00:01", "0001-01-01T00:00:00+23:59", "1 Jan 2020 01:03:47 GMT"),
        *("31 Feb 0000 24:00:00 GMT", "instance-stop", "\ud800", "\x00"),
    ]
)
documents = st.recursive(leaf | words, lambda d: st.lists(d, max_size=3) | st.dictionaries(words, d, max_size=6))
bodies = (
    st.binary()
    | documents.map(lambda d: json.dumps(d).encode())
    | st.lists(documents, max_size=3).map(lambda d: json.dumps(d).encode())
    | (words | st.text()).map(lambda text: text.encode("utf-8", "surrogatepass"))
)


@given(bodies)
def test_nothing_but_garbage_is_raised(body: bytes) -> None:
    for parse in PARSERS:
        try:
            parse(body)
        except ImdsGarbage:
            continue
