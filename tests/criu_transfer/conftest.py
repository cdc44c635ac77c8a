import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from criu_transfer.stream import Credentials, Listener, Stream, connect
from criu_transfer.wire import PAGE


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


class Authority:
    """A throw-away certificate authority made by the openssl command."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.ca, self._key = folder, folder / "ca.pem", folder / "ca.key"
        _openssl("req", "-x509", *_new_key(self._key), "-out", str(self.ca), "-days", "2", "-subj", "/CN=authority")

    def issue(self, node: str, *, names: str | None = None) -> Credentials:
        """Issue a certificate for a node; `names` replaces its subjectAltName."""
        cert, key = self.folder / f"{node}.pem", self.folder / f"{node}.key"
        san = names if names is not None else f"URI:spiffe://spotguard/node/{node}"
        signer = ("-CA", str(self.ca), "-CAkey", str(self._key), "-days", "2", "-subj", f"/CN={node}")
        extra = ("-addext", f"subjectAltName={san}") if san else ()
        _openssl("req", "-x509", *_new_key(key), "-out", str(cert), *signer, *extra)
        return Credentials(cert, key, self.ca)


def _new_key(path: Path) -> tuple[str, ...]:
    return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(path))


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Authority]:
    """Return authorities by name, each made once."""
    folder, made = tmp_path_factory.mktemp("pki"), {}

    def get(name: str) -> Authority:
        if name not in made:
            made[name] = Authority(folder / name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def nodes(authority: Callable[[str], Authority]) -> tuple[Credentials, Credentials]:
    """Return the credentials of the nodes "source" and "target"."""
    return authority("main").issue("source"), authority("main").issue("target")


@pytest.fixture
def streams(nodes: tuple[Credentials, Credentials]) -> Iterator[tuple[Stream, Stream]]:
    """Return both ends of a connection, the source's first."""
    listener = Listener("127.0.0.1", range(1), nodes[1])
    deadline = time.monotonic() + 5
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(listener.accept, "source", deadline, None, lambda _: None)
        with connect("127.0.0.1", listener.port, nodes[0], "target", deadline) as source, accepted.result() as target:
            listener.close()
            yield source, target


# Maps N pages, fills them as told ("-" zeros, "x" not readable but filled, "u" unmapped, any other letter its bytes),
# prints the address, and then changes what the lines on its standard input say: PAGE LETTER.
CHILD = """
import ctypes, mmap, sys
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
plan = sys.argv[1]
base = libc.mmap(None, len(plan) * 4096, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
def put(number, letter):
    at = base + number * 4096
    if letter == "u":
        libc.munmap(at, 4096)
        return
    libc.mprotect(at, 4096, 3)
    ctypes.memset(at, 0 if letter == "-" else ord(letter), 4096)
    if letter == "x":
        libc.mprotect(at, 4096, 0)
for number, letter in enumerate(plan):
    put(number, letter)
print(base, flush=True)
for line in sys.stdin:
    number, letter = line.split()
    put(int(number), letter)
    print("done", flush=True)
"""


class Child:
    def __init__(self, plan: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", CHILD, plan], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid
        self.base = int(self.process.stdout.readline())
        self.plan = plan

    def put(self, number: int, letter: str) -> None:
        self.process.stdin.write(f"{number} {letter}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def range(self, first: int, last: int) -> tuple[int, int]:
        return self.base + first * PAGE, self.base + last * PAGE


@pytest.fixture
def child():
    children = []

    def start(plan: str) -> Child:
        children.append(Child(plan))
        return children[-1]

    yield start
    for each in children:
        each.process.kill()
        each.process.communicate()
