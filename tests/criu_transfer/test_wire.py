import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criu_transfer import messages, wire
from criu_transfer.errors import ProtocolError
from criu_transfer.wire import ADDRESS_END, HEADER, MAGIC, MAX_DATA, PAGE, RUN, Header, Type

pages = st.integers(1, 64).map(lambda n: n * PAGE)


@st.composite
def run_tables(draw: st.DrawFn) -> list[tuple[int, int]]:
    runs, position = [], draw(st.integers(0, 1 << 20)) * PAGE
    for gap, length in draw(st.lists(st.tuples(st.integers(0, 9), pages), min_size=1, max_size=20)):
        runs.append((position + gap * PAGE, length))
        position = sum(runs[-1])
    return runs


@given(run_tables())
def test_runs_round_trip(runs: list[tuple[int, int]]) -> None:
    table = wire.encode_runs(runs)
    data = sum(length for _, length in runs)
    pages_header = wire.decode_header(wire.encode_header(Header(Type.PAGES, 7, len(runs), len(table) + data)))
    zero_header = wire.decode_header(wire.encode_header(Header(Type.ZERO, 7, len(runs), len(table))))
    assert pages_header.payload == len(table) + data
    assert wire.decode_runs(pages_header, table) == wire.decode_runs(zero_header, table) == runs


@pytest.mark.parametrize(
    "runs",
    [
        [(1, PAGE)],
        [(0, 1)],
        [(0, 0)],
        [(PAGE, PAGE), (0, PAGE)],
        [(0, 2 * PAGE), (PAGE, PAGE)],
        [(ADDRESS_END, PAGE)],
        [(ADDRESS_END - PAGE, 2 * PAGE)],
        [((1 << 64) - PAGE, PAGE)],
    ],
)
def test_runs_that_are_no_pages_are_refused(runs: list[tuple[int, int]]) -> None:
    table = wire.encode_runs(runs)
    with pytest.raises(ProtocolError):
        wire.decode_runs(Header(Type.ZERO, 0, len(runs), len(table)), table)


def test_pages_must_bring_the_bytes_they_name() -> None:
    table = wire.encode_runs([(0, 2 * PAGE)])
    for data in (PAGE, 3 * PAGE):
        with pytest.raises(ProtocolError, match="are named and"):
            wire.decode_runs(Header(Type.PAGES, 0, 1, len(table) + data), table)
    with pytest.raises(ProtocolError, match="do not fit"):
        wire.decode_runs(Header(Type.PAGES, 0, 2, RUN.size + PAGE), table)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (HEADER.pack(99, 0, 0, 0, 0, 1), "unknown frame type 99"),
        (HEADER.pack(Type.MARK, 1, 0, 0, 0, 1), "flags 0x1"),
        (HEADER.pack(Type.MARK, 0, 1, 0, 0, 1), "reserved 0x1"),
        (HEADER.pack(Type.MARK, 0, 0, 1, 0, 1), "number 1"),
        (HEADER.pack(Type.MARK, 0, 0, 0, 1, 1), "offset 1"),
        (HEADER.pack(Type.MARK, 0, 0, 0, 0, (64 << 10) + 1), "length"),
        (HEADER.pack(Type.MARK, 0, 0, 0, 0, 0), "length 0"),
        (HEADER.pack(Type.HELLO, 0, 0, 0, MAGIC + 1, 2), "offset"),
        (HEADER.pack(Type.PAGES, 0, 0, 0, 1, wire.MAX_PAYLOAD + 1), "length"),
        (HEADER.pack(Type.PAGES, 0, 0, 1 << 20, 1, PAGE + 16), "number"),
        (HEADER.pack(Type.PAGES, 0, 0, 0, 1025, 1 << 20), "offset 1025"),
        (HEADER.pack(Type.FILE_DATA, 0, 0, 0, 0, MAX_DATA + 1), "length"),
        (HEADER.pack(Type.FILE_DATA, 0, 0, 0, wire.MAX_OFFSET, 1), "beyond the largest file"),
        (b"\0" * 23, "24 bytes, not 23"),
    ],
)
def test_bad_headers_are_named(raw: bytes, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        wire.decode_header(raw)


def test_a_hole_has_no_payload() -> None:
    header = wire.decode_header(wire.encode_header(Header(Type.FILE_HOLE, 3, 1 << 40, 1 << 41)))
    assert header.payload == 0
    assert header.length == 1 << 41


def test_the_sender_cannot_pack_what_the_receiver_refuses() -> None:
    with pytest.raises(ProtocolError):
        wire.frame(Type.MARK, b"x" * (65 << 10))


@given(st.binary(min_size=24, max_size=24))
def test_any_header_bytes_give_a_header_or_protocol_error(raw: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        header = wire.decode_header(raw)
        assert wire.encode_header(header) == raw
        assert header.payload <= max(wire.MAX_PAYLOAD, 1 << 20)


@given(st.binary(max_size=200).map(lambda raw: raw[: len(raw) // 16 * 16]), st.sampled_from([Type.PAGES, Type.ZERO]))
def test_any_table_bytes_give_runs_or_protocol_error(raw: bytes, kind: Type) -> None:
    with contextlib.suppress(ProtocolError):
        for address, length in wire.decode_runs(Header(kind, 0, len(raw) // 16, len(raw)), raw):
            assert 0 <= address < address + length <= ADDRESS_END


names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=40)
totals = st.builds(messages.Totals, *[st.integers(0, 1 << 60)] * 4)
paths = st.lists(names.filter(lambda n: n not in {".", ".."}), max_size=4).map("/".join)
plain_kinds = st.sampled_from([k for k in messages.FileKind if k is not messages.FileKind.SYMLINK])
bodies = st.one_of(
    st.builds(messages.Hello, names, names, names, *[st.integers(0, 1 << 60)] * 3),
    st.builds(messages.Accept, st.integers(1, 255)),
    st.builds(messages.Refuse, names),
    st.builds(messages.ProcessInfo, st.integers(1, 1 << 22), st.integers(0, 1 << 60)),
    st.builds(messages.Mark, st.integers(0, 1 << 60), totals),
    st.builds(messages.Ack, *[st.integers(0, 1 << 60)] * 4),
    st.builds(
        messages.End,
        st.integers(0, 99),
        st.sampled_from(messages.Mode),
        st.sets(st.integers(1, 1 << 22), max_size=9).map(lambda pids: {pid: i for i, pid in enumerate(pids)}),
        st.integers(0, 99),
        totals,
    ),
    st.builds(messages.ErrorMessage, st.sampled_from(messages.ErrorKind), names, st.booleans()),
    st.builds(messages.FileDelete, names, paths.filter(bool)),
    st.builds(
        messages.FileMeta,
        names,
        paths,
        plain_kinds,
        st.booleans(),
        st.integers(0, 0o7777),
        *[st.integers(0, 1 << 31)] * 2,
        st.integers(-(1 << 60), 1 << 60),
        size=st.integers(0, 1 << 60),
        device=st.tuples(st.integers(0, 4095), st.integers(0, (1 << 20) - 1)),
        link=paths,
        xattrs=st.dictionaries(names.map("user.{}".format), st.binary(max_size=99), max_size=3),
    ),
)
classes = (
    messages.Hello,
    messages.Accept,
    messages.Refuse,
    messages.ProcessInfo,
    messages.Mark,
    messages.Ack,
    messages.End,
    messages.ErrorMessage,
    messages.FileMeta,
    messages.FileDelete,
)


@given(bodies)
def test_bodies_round_trip(body: messages.Message) -> None:
    assert type(body).decode(body.encode()) == body


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)


@given(bodies, st.data())
def test_damaged_bodies_give_a_body_or_protocol_error(body: messages.Message, data: st.DataObject) -> None:
    fields = json.loads(body.encode())
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(json_values)
    with contextlib.suppress(ProtocolError):
        type(body).decode(json.dumps(fields).encode())


@given(st.sampled_from(classes), st.binary(max_size=64) | json_values.map(lambda v: json.dumps(v).encode()))
def test_any_bytes_give_a_body_or_protocol_error(kind: type[messages.Hello], raw: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        kind.decode(raw)


@pytest.mark.parametrize(
    "raw", [b"[" * 60000, b'{"version":1,"version":1}', b'{"version":' + b"9" * 5000 + b"}", b'"\xff"', b"[]", b"{}"]
)
def test_hostile_json_is_a_protocol_error(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        messages.Accept.decode(raw)


def test_unknown_fields_are_refused_except_where_versions_meet() -> None:
    with pytest.raises(ProtocolError, match="unknown fields: 'surprise'"):
        messages.Accept.decode(b'{"version":1,"surprise":2}')
    assert messages.Refuse.decode(b'{"reason":"no","versions":[2],"surprise":2}').versions == (2,)


def test_version_negotiation() -> None:
    assert messages.choose_version((1, 2, 3)) == 1
    assert messages.choose_version((2, 3)) is None
    # Of a HELLO of the future nothing but its versions is understood, and that is enough to refuse it politely.
    assert messages.Hello.decode(b'{"versions":[2,3],"what":{}}') == (2, 3)


ESCAPES = ["/etc/passwd", "a/../b", "..", "a//b", "a/", ".", "./a", "a\0b", "x" * 256, "\ud800", "d/" * 256 + "d"]


@pytest.mark.parametrize("path", ESCAPES)
def test_paths_that_could_leave_the_tree_are_refused(path: str) -> None:
    with pytest.raises(ProtocolError):
        messages.check_path(path)


def test_file_names_that_are_not_utf8_survive() -> None:
    delete = messages.FileDelete("upper", "caf\udce9")
    assert messages.FileDelete.decode(delete.encode()) == delete


def test_end_refuses_two_pids_with_one_memory() -> None:
    good = messages.End(1, messages.Mode.LIVE, {1: 0, 7: 1}, 9, messages.Totals()).encode()
    with pytest.raises(ProtocolError, match="share one number"):
        messages.End.decode(good.replace(b'"7":1', b'"7":0'))
    with pytest.raises(ProtocolError, match="no pid"):
        messages.End.decode(good.replace(b'"7":1', b'"07":1'))
