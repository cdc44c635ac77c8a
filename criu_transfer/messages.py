"""JSON bodies of the transfer's frames: one frozen dataclass each, checked field by field (docs/protocol.md)."""

import base64
import enum
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Self

from criu_transfer import wire
from criu_transfer.errors import ProtocolError

_NAME = 253  # longest name of a node, a migration or a tree
_PATH = 4095  # PATH_MAX without its end
_COUNT = (1 << 63) - 1
IMAGES = "images"  # the tree that CRIU's images travel as
MAX_DEPTH = 256  # of directories in a tree
XATTR_SPACES = ("user.", "trusted.", "security.", "system.posix_acl_")
# Attributes that stay behind, for they mean something on one node only: the label of a container, and overlayfs's
# references to inodes of the lower layer.
LOCAL_XATTRS = frozenset(
    {"security.selinux", "trusted.overlay.origin", "user.overlay.origin", "trusted.overlay.uuid", "user.overlay.uuid"}
)


class Fields:
    """The fields of one JSON object, each taken once; what is missing, wrong or left over is a ProtocolError."""

    def __init__(self, fields: dict[str, object]) -> None:
        self._fields = fields

    @classmethod
    def of(cls, payload: bytes | bytearray | memoryview) -> Self:
        """Decode a payload."""
        return cls(wire.decode_json(payload))

    def take(self, name: str) -> object:
        """Take a field of any type."""
        if name not in self._fields:
            raise ProtocolError(f"field '{name}' is missing")
        return self._fields.pop(name)

    def integer(self, name: str, high: int = _COUNT, low: int = 0) -> int:
        """Take an integer in low..high."""
        value = self.take(name)
        if type(value) is not int or not low <= value <= high:
            raise ProtocolError(f"field '{name}' is no integer in {low}..{high}")
        return value

    def text(self, name: str, limit: int) -> str:
        """Take a string of at most `limit` bytes as the file system counts them."""
        value = self.take(name)
        if not isinstance(value, str) or len(_encoded(value)) > limit:
            raise ProtocolError(f"field '{name}' is no text of up to {limit} bytes")
        return value

    def flag(self, name: str) -> bool:
        """Take a boolean."""
        value = self.take(name)
        if not isinstance(value, bool):
            raise ProtocolError(f"field '{name}' is neither true nor false")
        return value

    def mapping(self, name: str) -> dict[str, object]:
        """Take an object."""
        value = self.take(name)
        if not isinstance(value, dict):
            raise ProtocolError(f"field '{name}' is no object")
        return value

    def names(self) -> list[str]:
        """List the fields not taken yet."""
        return list(self._fields)

    def end(self) -> None:
        """Refuse what was not taken: within one version both sides know all fields."""
        if self._fields:
            raise ProtocolError(f"unknown fields: {', '.join(sorted(self._fields))[:200]!a}")


def _encoded(text: str) -> bytes:
    try:
        return os.fsencode(text)
    except UnicodeEncodeError as error:
        raise ProtocolError(f"text that no file name can hold: {text[:80]!a}") from error


@dataclass(frozen=True, slots=True)
class Message:
    """Base of the bodies: packed field by field."""

    def encode(self) -> bytes:
        """Pack it."""
        return wire.encode_json(asdict(self))


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """First frame of the source. The limits, in bytes, bind the source for the whole migration."""

    migration: str
    source: str
    target: str
    max_memory: int
    max_images: int
    max_files: int
    versions: tuple[int, ...] = wire.VERSIONS

    @classmethod
    def decode(cls, payload: bytes | memoryview) -> "Hello | tuple[int, ...]":
        """Unpack it; of a source that shares no version with us only its versions are read and returned."""
        fields = Fields.of(payload)
        versions = _versions(fields.take("versions"))
        if choose_version(versions) is None:
            return versions
        hello = cls(
            migration=fields.text("migration", _NAME),
            source=fields.text("source", _NAME),
            target=fields.text("target", _NAME),
            max_memory=fields.integer("max_memory"),
            max_images=fields.integer("max_images"),
            max_files=fields.integer("max_files"),
            versions=versions,
        )
        fields.end()
        return hello


def _versions(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= 16 or any(type(v) is not int for v in value):
        raise ProtocolError("'versions' is no list of 1 to 16 integers")
    return tuple(value)


def choose_version(offered: Iterable[int]) -> int | None:
    """Choose the highest version that both sides speak; None when there is none."""
    return max(set(offered) & set(wire.VERSIONS), default=None)


@dataclass(frozen=True, slots=True)
class Accept(Message):
    """The receiver takes the migration, in this version."""

    version: int

    @classmethod
    def decode(cls, payload: bytes | memoryview) -> Self:
        """Unpack it."""
        fields = Fields.of(payload)
        accept = cls(fields.integer("version", 255, 1))
        fields.end()
        return accept


@dataclass(frozen=True, slots=True)
class Refuse(Message):
    """The receiver does not take it, and closes."""

    reason: str
    versions: tuple[int, ...] = wire.VERSIONS

    @classmethod
    def decode(cls, payload: bytes | memoryview) -> Self:
        """Unpack it; unknown fields are let pass, for it must be readable across versions."""
        fields = Fields.of(payload)
        return cls(fields.text("reason", 4096), _versions(fields.take("versions")))


@dataclass(frozen=True, slots=True)
class ProcessInfo(Message):
    """A process whose memory comes: its pid inside the container, and its start time in clock ticks after boot."""

    vpid: int
    starttime: int

    @classmethod
    def decode(cls, payload: bytes | memoryview) -> Self:
        """Unpack it."""
        fields = Fields.of(payload)
        info = cls(fields.integer("vpid", 1 << 22, 1), fields.integer("starttime"))
        fields.end()
        return info


@dataclass(frozen=True, slots=True)
class Totals:
    """What the source has sent since HELLO, as both sides count it: bytes of pages, zero pages and files; frames."""

    data: int = 0
    zero: int = 0
    files: int = 0
    frames: int = 0

    @classmethod
    def take(cls, fields: Fields) -> Self:
        """Take the field `totals`."""
        inner = Fields(fields.mapping("totals"))
        totals = cls(*(inner.integer(name) for name in ("data", "zero", "files", "frames")))
        inner.end()
        return totals


@dataclass(frozen=True, slots=True)
class Mark(Message):
    """End of a round; the receiver answers with Ack once everything before it is stored."""

    sequence: int
    totals: Totals

    @classmethod
    def decode(cls, payload: bytes | memoryview) -> Self:
        """Unpack it."""
        fields = Fields.of(payload)
        mark = cls(fields.integer("sequence"), Totals.take(fields))
        fields.end()
        return mark


@dataclass(frozen=True, slots=True)
class Ack(Message):
    """The receiver holds everything up to this MARK or END: bytes of memory in RAM, bytes covered, entries of trees."""

    sequence: int
    held: int
    covered: int
    entries: int

    @classmethod
    def decode(cls, payload: bytes | memoryview) -> Self:
        """Unpack it."""
        fields = Fields.of(payload)
        ack = cls(*(fields.integer(name) for name in ("sequence", "held", "covered", "entries")))
        fields.end()
        return ack


class Mode(enum.StrEnum):
    """How the memory travels: by page frames, or whole inside CRIU's images."""

    LIVE = "live"
    STOP_AND_COPY = "stop-and-copy"


@dataclass(frozen=True, slots=True)
class End(Message):
    """The source has sent everything. `processes`: pid inside the container -> number of its living incarnation."""

    sequence: int
    mode: Mode
    processes: dict[int, int]
    images: int  # entries of the image directory, itself not counted
    totals: Totals

    @classmethod
    def decode(cls, payload: bytes | memoryview) -> Self:
        """Unpack it; two pids never share one number."""
        fields = Fields.of(payload)
        sequence = fields.integer("sequence")
        mode = fields.text("mode", 32)
        if mode not in list(Mode):
            raise ProtocolError(f"unknown mode {mode!a}")
        inner = Fields(fields.mapping("processes"))
        names = inner.names()
        if not all(name.isascii() and name.isdigit() and len(name) <= 7 and name == str(int(name)) for name in names):
            raise ProtocolError("a key of 'processes' is no pid")
        processes = {int(name): inner.integer(name, wire.MAX_NUMBER) for name in names}
        if len(set(processes.values())) != len(processes):
            raise ProtocolError("two pids share one number")
        end = cls(sequence, Mode(mode), processes, fields.integer("images"), Totals.take(fields))
        fields.end()
        return end


class ErrorKind(enum.StrEnum):
    """Why the receiver stops; each is one class of criu_transfer.errors on the source."""

    PROTOCOL = "protocol"
    STORE_FULL = "store-full"
    STATE_MISSING = "state-missing"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class ErrorMessage(Message):
    """The receiver could not do it. After a fatal one it closes; else the source may pay and send END again."""

    kind: ErrorKind
    reason: str
    fatal: bool

    def encode(self) -> bytes:
        """Pack it; a long reason is cut."""
        reason = self.reason.encode("utf-8", "replace")[:4000].decode("utf-8", "ignore")
        return wire.encode_json({"kind": self.kind, "reason": reason, "fatal": self.fatal})

    @classmethod
    def decode(cls, payload: bytes | memoryview) -> Self:
        """Unpack it."""
        fields = Fields.of(payload)
        kind = fields.text("kind", 32)
        if kind not in list(ErrorKind):
            raise ProtocolError(f"unknown kind of error {kind!a}")
        message = cls(ErrorKind(kind), fields.text("reason", 4096), fields.flag("fatal"))
        fields.end()
        return message


class FileKind(enum.StrEnum):
    """Kinds of entries of a tree."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symlink"
    FIFO = "fifo"
    SOCKET = "socket"
    CHARACTER = "character"
    BLOCK = "block"


@dataclass(frozen=True, slots=True)
class FileMeta(Message):
    """One entry of a tree.

    `path`: relative, "" is the tree's root. `link`: path of an entry of this tree that this one is a hard link to,
    or "". `fresh`: whatever is at `path` goes and a new entry takes its place; else the entry is changed in place.
    `device`: (major, minor) of a device node. Times in ns, sizes in bytes.
    """

    tree: str
    path: str
    kind: FileKind
    fresh: bool
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int = 0
    device: tuple[int, int] = (0, 0)
    target: str = ""  # of a symbolic link
    link: str = ""
    xattrs: dict[str, bytes] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Pack it."""
        fields = asdict(self)
        fields["xattrs"] = {name: base64.b64encode(value).decode() for name, value in self.xattrs.items()}
        return wire.encode_json(fields)

    @classmethod
    def decode(cls, payload: bytes | memoryview) -> Self:
        """Unpack it; paths are checked by `check_path`."""
        fields = Fields.of(payload)
        kind = fields.text("kind", 32)
        if kind not in list(FileKind):
            raise ProtocolError(f"unknown kind of file {kind!a}")
        meta = cls(
            tree=fields.text("tree", _NAME),
            path=check_path(fields.text("path", _PATH)),
            kind=FileKind(kind),
            fresh=fields.flag("fresh"),
            mode=fields.integer("mode", 0o7777),
            uid=fields.integer("uid", (1 << 32) - 2),
            gid=fields.integer("gid", (1 << 32) - 2),
            mtime_ns=fields.integer("mtime_ns", low=-_COUNT),
            size=fields.integer("size", wire.MAX_OFFSET),
            device=_device(fields.take("device")),
            target=fields.text("target", _PATH),
            link=check_path(fields.text("link", _PATH)),
            xattrs=_xattrs(fields.mapping("xattrs")),
        )
        fields.end()
        if (kind == FileKind.SYMLINK) != bool(meta.target) or "\0" in meta.target:
            raise ProtocolError("a symbolic link has a target, and nothing else has")
        return meta


@dataclass(frozen=True, slots=True)
class FileDelete(Message):
    """An entry of a tree that is gone, with everything beneath it."""

    tree: str
    path: str

    @classmethod
    def decode(cls, payload: bytes | memoryview) -> Self:
        """Unpack it; the root of a tree cannot be deleted."""
        fields = Fields.of(payload)
        delete = cls(fields.text("tree", _NAME), check_path(fields.text("path", _PATH)))
        fields.end()
        if not delete.path:
            raise ProtocolError("the root of a tree cannot be deleted")
        return delete


def check_path(path: str) -> str:
    """Return a path that stays beneath its root by its letters alone; else raise ProtocolError."""
    parts = path.split("/") if path else []
    if (
        "\0" in path
        or len(parts) > MAX_DEPTH
        or any(part in {"", ".", ".."} or len(_encoded(part)) > 255 for part in parts)
    ):
        raise ProtocolError(f"path {path[:200]!a} is not relative and plain")
    return path


def _device(value: object) -> tuple[int, int]:
    match value:
        case [int(major), int(minor)] if 0 <= major < 1 << 12 and 0 <= minor < 1 << 20:
            return major, minor
    raise ProtocolError("'device' is no pair of a major and a minor number")


def _xattrs(fields: dict[str, object]) -> dict[str, bytes]:
    result = {}
    for name, text in fields.items():
        if not name.startswith(XATTR_SPACES) or len(_encoded(name)) > 255 or "\0" in name or not isinstance(text, str):
            raise ProtocolError(f"extended attribute {name[:80]!a} is not allowed")
        try:
            result[name] = base64.b64decode(text, validate=True)
        except ValueError as error:
            raise ProtocolError(f"extended attribute {name[:80]!a} is not base64") from error
    return result
