"""The kinds of values that settings have: how each is read, refused and shown."""

import ipaddress
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

from spotguard.config import Kind
from spotguard.pki import valid_name

_SUFFIXES = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZE = re.compile(r"(\d{1,18})\s*(KiB|MiB|GiB|TiB|)\Z")
_PORTS = re.compile(r"(\d{1,5})-(\d{1,5})\Z")
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class PortRange:
    """Ports from `first` to `last`, both included."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"

    def __len__(self) -> int:
        """Count the ports."""
        return self.last - self.first + 1

    def __contains__(self, port: int) -> bool:
        return self.first <= port <= self.last


def _text(raw: object) -> str:
    if not isinstance(raw, str):
        raise TypeError(f"this is of type {type(raw).__name__}")
    return raw.strip()


def _within[N: (int, float)](value: N, low: N, high: N | None) -> N:
    if not math.isfinite(value) or value < low or (high is not None and value > high):
        raise ValueError("out of range")
    return value


def integer(low: int, high: int | None = None) -> Kind[int]:
    """Read a whole number from `low` to `high`."""

    def convert(raw: object) -> int:
        if isinstance(raw, bool) or not isinstance(raw, int | str):
            raise TypeError(f"this is of type {type(raw).__name__}")
        return _within(int(raw), low, high)

    return Kind(
        f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}", convert
    )


def number(low: float, high: float | None = None) -> Kind[float]:
    """Read a number from `low` to `high`."""

    def convert(raw: object) -> float:
        if isinstance(raw, bool) or not isinstance(raw, int | float | str):
            raise TypeError(f"this is of type {type(raw).__name__}")
        return _within(float(raw), low, high)

    return Kind(f"a number of at least {low:g}" if high is None else f"a number from {low:g} to {high:g}", convert)


def _boolean(raw: object) -> bool:
    if isinstance(raw, bool):
        return raw
    word = _text(raw).lower()
    if word not in _TRUTH:
        raise ValueError
    return _TRUTH[word]


def choice(*words: str) -> Kind[str]:
    """Read one of some words."""

    def convert(raw: object) -> str:
        if _text(raw) not in words:
            raise ValueError
        return _text(raw)

    return Kind("one of " + ", ".join(words), convert)


def _size(raw: object) -> int:
    if isinstance(raw, int) and not isinstance(raw, bool):
        return _within(raw, 0, None)
    match = _SIZE.match(_text(raw))
    if not match:
        raise ValueError("units are powers of two")
    return int(match[1]) * _SUFFIXES[match[2]]


def show_size(value: int) -> str:
    """Write a number of bytes with the largest unit that divides it."""
    suffix = max((s for s, factor in _SUFFIXES.items() if value % factor == 0), key=_SUFFIXES.__getitem__)
    return f"{value // _SUFFIXES[suffix]}{suffix}" if value else "0"


def _path(raw: object) -> Path:
    path = Path(_text(raw))
    if not path.is_absolute() or ".." in path.parts:
        raise ValueError
    return path


def _ip(raw: object) -> str:
    return str(ipaddress.ip_address(_text(raw)))


def _name(raw: object) -> str:
    if not valid_name(_text(raw)):
        raise ValueError
    return _text(raw)


def url(*schemes: str) -> Kind[str]:
    """Read a URL with one of these schemes, a host, and neither a password nor a query."""

    def convert(raw: object) -> str:
        parts = urlsplit(_text(raw))
        _ = parts.port  # raises ValueError when it is none
        if parts.scheme not in schemes or not parts.hostname or parts.username or parts.query or parts.fragment:
            raise ValueError
        return _text(raw).rstrip("/")

    return Kind(f"a URL like {schemes[0]}://HOST:PORT", convert)


def _port_range(raw: object) -> PortRange:
    match = _PORTS.match(_text(raw))
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= 65535:
        raise ValueError
    return PortRange(int(match[1]), int(match[2]))


def _peers(raw: object) -> Mapping[str, str]:
    """Read node names with their addresses: a table, or text like a=10.0.0.1,b=10.0.0.2:9711."""
    if isinstance(raw, str):
        pairs = [item.split("=", 1) for item in raw.split(",") if item.strip()]
        raw = {pair[0].strip(): pair[-1] for pair in pairs}
        if len(raw) != len(pairs):
            raise ValueError("a name is there twice")
    if not isinstance(raw, Mapping):
        raise TypeError(f"this is of type {type(raw).__name__}")
    return MappingProxyType({_name(name): _address(address) for name, address in raw.items()})


def _address(raw: object) -> str:
    """Read IP or IP:PORT ([IP]:PORT for IPv6)."""
    text = _text(raw)
    host, colon, port = text.rpartition(":")
    if colon and (host.startswith("[") or ":" not in host):
        ipaddress.ip_address(host.strip("[]"))
        _within(int(port), 1, 65535)
    else:
        ipaddress.ip_address(text)
    return text


BOOLEAN = Kind("true or false", _boolean, lambda value: str(value).lower())
SIZE = Kind("bytes, or a number with KiB, MiB, GiB, TiB", _size, show_size)
PATH = Kind("an absolute path", _path)
IP = Kind("an IP address", _ip)
NAME = Kind("a DNS name in lower case", _name)
PORT = integer(1, 65535)
PORT_RANGE = Kind("FIRST-LAST, ports from 1 to 65535", _port_range)
PEERS = Kind(
    "names with addresses: a table, or NAME=IP[:PORT],NAME=IP[:PORT]",
    _peers,
    lambda peers: ",".join(f"{name}={address}" for name, address in peers.items()),
)
