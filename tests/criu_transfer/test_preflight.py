"""Pre-flight on real processes that have what cannot be moved."""

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from criu_transfer import preflight
from criu_transfer.preflight import Preflight, check, dma
from criu_transfer.proctree import Process, read_process
from criu_transfer.tracker import inject

pytestmark = pytest.mark.kernel

OWN_IPC: dict[str, Any] = {"linux": {"namespaces": [{"type": "pid"}, {"type": "ipc"}]}}
POD_IPC: dict[str, Any] = {"linux": {"namespaces": [{"type": "pid"}, {"type": "ipc", "path": "/proc/1/ns/ipc"}]}}

PRELUDE = """
import ctypes, mmap, os, select, signal, socket, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def fine(result):
    if result == -1 or result is None:
        print('unavailable', os.strerror(ctypes.get_errno()), flush=True); sys.exit()
    return result
def make(*words):
    try: return socket.socket(*words)
    except OSError as error: print('unavailable', error, flush=True); sys.exit()
def private(): fine(libc.unshare(0x20000)); fine(libc.mount(b'', b'/', None, 0x44000, None))
def mount(kind, point, options=None): fine(libc.mount(b'none', point, kind, 0, options))
def ready(): print('ready', flush=True); input()
"""

Spawn = Callable[..., Process]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    children: list[subprocess.Popen[bytes]] = []

    def make(program: str, *prefix: str) -> Process:
        command = [*prefix, sys.executable, "-c", PRELUDE + program + "\nready()"]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        children.append(child)
        assert child.stdout
        assert select.select([child.stdout], [], [], 10)[0]
        line = child.stdout.readline().decode()
        if line.startswith("unavailable"):
            pytest.skip(f"this kernel cannot: {line}")
        assert line == "ready\n"
        pid = child.pid
        if "--fork" in prefix:
            pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
        process = read_process(pid)
        assert process
        return process

    yield make
    for child in children:
        child.kill()
        child.communicate()


def reasons(process: Process, config: dict[str, Any] | None = None) -> str:
    answer = check([process], config=OWN_IPC if config is None else config)
    assert answer.movable == (not answer.reasons)
    return "\n".join(answer.reasons)


def test_an_ordinary_server_is_movable(spawn: Spawn, tmp_path: Path) -> None:
    process = spawn(f"""
kept = [socket.socket(socket.AF_INET), socket.socket(socket.AF_INET6), socket.socket(socket.AF_UNIX)]
kept += [socket.socket(socket.AF_INET, socket.SOCK_DGRAM), *socket.socketpair()]
kept += [socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0), socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)]
kept[0].bind(('127.0.0.1', 0)); kept[0].listen()
client = socket.create_connection(kept[0].getsockname()); kept[0].accept()
kept += [select.epoll(), os.eventfd(0), os.timerfd_create(time.CLOCK_MONOTONIC), libc.inotify_init()]
kept += [os.pipe2(os.O_DIRECT), os.memfd_create('x'), os.openpty(), os.pidfd_open(os.getpid())]
mask = ctypes.create_string_buffer(128); kept.append(libc.signalfd(-1, mask, 0))
kept += [open(path, 'rb') for path in ('/dev/null', '/dev/zero', '/dev/urandom', '/dev/net/tun')]
kept += [open(path, 'rb') for path in ('/usr/bin/python3', '/proc/self/maps')]
file = open({str(tmp_path / "deleted")!r}, 'w+b'); os.unlink(file.name); directory = os.open('/', os.O_DIRECTORY)
file.write(b'x' * 4096); file.flush(); mapped = mmap.mmap(file.fileno(), 4096); shared = mmap.mmap(-1, 4096)
zero = open('/dev/zero', 'r+b'); zeros = mmap.mmap(zero.fileno(), 4096, flags=mmap.MAP_PRIVATE)
""")
    assert check([process], config=OWN_IPC) == Preflight(movable=True, reasons=(), deltas=True, delta_reason="")


FOUND = {
    "io_uring": ("room = ctypes.create_string_buffer(120); fine(libc.syscall(425, 4, room))", "io_uring_setup"),
    "userfaultfd": ("fine(libc.syscall(323, 1))", "userfaultfd"),
    "perf event": ("attr = bytes([1, 0, 0, 0, 128]) + bytes(123); fine(libc.syscall(298, attr, 0, -1, -1, 0))", "perf"),
    "mptcp": ("s = make(socket.AF_INET, socket.SOCK_STREAM, 262)", "multipathtcp=0"),
    "sctp": ("s = make(socket.AF_INET, socket.SOCK_STREAM, 132)", "SCTP"),
    "vsock": ("s = make(40, socket.SOCK_STREAM)", "VSOCK"),
    "alg": ("s = make(38, socket.SOCK_SEQPACKET)", "ALG"),
    "xdp": ("s = make(44, socket.SOCK_RAW)", "XDP"),
    "message queue": ("fine(libc.mq_open(b'/preflight', 0o102, 0o600, None))", "not mounted in the container"),
    "terminal from outside": (
        "p = os.openpty(); private(); mount(b'devpts', b'/dev/pts', b'newinstance')",
        "terminal /",
    ),
    "terminal, no devpts": ("p = os.openpty(); private(); mount(b'tmpfs', b'/dev')", "terminal /"),
    "unmounted": (
        "private(); mount(b'tmpfs', b'/mnt'); f = open('/mnt/f', 'w'); libc.umount2(b'/mnt', 2)",
        "not mounted",
    ),
}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of system calls")
@pytest.mark.parametrize("name", FOUND)
def test_what_cannot_be_dumped_is_named(spawn: Spawn, name: str) -> None:
    program, word = FOUND[name]
    found = reasons(spawn(program))
    assert word in found
    assert "(python" in found


def test_a_tcp_socket_with_kernel_tls(spawn: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    process = spawn("s = socket.socket()")
    assert preflight._upper_protocol(process.pid, 3) == ""
    assert preflight._upper_protocol(process.pid, 99) == ""
    assert reasons(process) == ""
    monkeypatch.setattr(preflight.kernel, "getsockopt", lambda *_: b"tls\0")  # most kernels here lack the module
    assert "kernel tls" in reasons(process)


def test_a_device_is_named(spawn: Spawn, tmp_path: Path) -> None:
    for number, (kind, major, minor) in enumerate(
        [(0o020000, 1, 1), (0o020000, 10, 237), (0o060000, 7, 0), (0o020000, 10, 229)]
    ):
        node = tmp_path / f"node{number}"
        os.mknod(node, kind | 0o600, os.makedev(major, minor))
        with contextlib.suppress(OSError), node.open("rb"):
            break
    else:
        pytest.skip("no device can be opened here")
    found = reasons(spawn(f"f = open({str(node)!r}, 'rb', 0)"))
    assert f"uses the device {node} ({major}:{minor})" in found


def test_direct_io_forbids_deltas_but_not_moving(spawn: Spawn, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(4096))
    process = spawn(f"""
try: f = os.open({str(tmp_path / "data")!r}, os.O_RDONLY | os.O_DIRECT)
except OSError as error: print('unavailable', error, flush=True); sys.exit()
""")
    answer = check([process], config=OWN_IPC)
    assert answer.movable
    assert not answer.deltas
    assert "O_DIRECT" in answer.delta_reason
    assert "data" in dma([process])


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of system calls")
def test_linux_aio_forbids_deltas(spawn: Spawn) -> None:
    process = spawn("context = ctypes.c_ulong(); fine(libc.syscall(206, 4, ctypes.byref(context)))")
    answer = check([process], config=OWN_IPC)
    assert answer.movable
    assert not answer.deltas
    assert "AIO" in answer.delta_reason


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [("CoreDumping", "1", "core"), ("HugetlbPages", "2048 kB", "hugetlb"), ("VmPin", "4 kB", "VmPin")],
)
def test_states_told_by_status(
    spawn: Spawn, monkeypatch: pytest.MonkeyPatch, field: str, value: str, word: str
) -> None:
    process = spawn("")
    real = preflight._status
    assert field in real(process.pid)
    monkeypatch.setattr(preflight, "_status", lambda pid: {**real(pid), field: value})
    answer = check([process], config=OWN_IPC)
    assert word in "\n".join((*answer.reasons, answer.delta_reason))
    assert answer.movable == (field == "VmPin")


def test_a_traced_process(spawn: Spawn) -> None:
    process = spawn("")
    found = inject.run(process.pid, time.monotonic() + 5, lambda _group: reasons(process))
    assert "detach the debugger" in found
    assert reasons(process) == ""


def test_a_process_whose_main_thread_has_exited(spawn: Spawn) -> None:
    process = spawn("""
def other():
    while open('/proc/self/stat').read().rpartition(')')[2].split()[0] != 'Z': time.sleep(0.001)
    ready()
threading.Thread(target=other).start()
libc.pthread_exit(None)
""")
    assert "main thread has exited" in reasons(process)


def test_a_user_namespace(spawn: Spawn) -> None:
    process = spawn("", "unshare", "--user", "--map-root-user")
    assert "user namespace" in reasons(process)


@pytest.mark.parametrize(("kind", "option"), [("pid", "--pid"), ("uts", "--uts"), ("ipc", "--ipc")])
def test_nested_namespaces(spawn: Spawn, kind: str, option: str) -> None:
    root = spawn("")
    nested = spawn("", "unshare", option, "--fork", "--kill-child")
    answer = check([nested, root], config=OWN_IPC)
    assert f"has a {kind} namespace of its own" in "\n".join(answer.reasons)
    assert reasons(nested) == ""  # alone, it is the container's
    assert reasons(spawn("", "unshare", "--mount", "--net")) == ""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of system calls")
def test_system_v_shared_memory_needs_an_own_namespace(spawn: Spawn) -> None:
    process = spawn("""
libc.shmat.restype = ctypes.c_void_p
number = fine(libc.shmget(0, 4096, 0o1600)); fine(libc.shmat(number, None, 0)); libc.shmctl(number, 0, None)
""")
    assert reasons(process, OWN_IPC) == ""
    assert "System V shared memory" in reasons(process, POD_IPC)
    assert "System V shared memory" in reasons(process, {})


def test_a_file_system_mounted_from_inside(spawn: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    process = spawn("""
private(); mount(b'ramfs', b'/mnt'); f = open('/mnt/file', 'w')
""")
    assert reasons(process) == ""
    monkeypatch.setattr(preflight, "_REMOTE_FILE_SYSTEMS", {"ramfs"})
    assert "type ramfs was mounted at /mnt" in reasons(process)
    assert reasons(process, {**OWN_IPC, "mounts": [{"destination": "/mnt/"}]}) == ""


def test_a_container_with_a_terminal(spawn: Spawn) -> None:
    assert "tty: true" in reasons(spawn(""), {**OWN_IPC, "process": {"terminal": True}})


def test_processes_that_have_gone_are_passed_over(spawn: Spawn) -> None:
    alive = spawn("")
    child = subprocess.Popen(["true"])
    child.wait()
    gone = Process(child.pid, child.pid, alive.starttime + 1)
    assert check([alive, gone], config=OWN_IPC).movable
    assert dma([gone]) == ""
    assert check([], config={}) == Preflight(movable=True, reasons=(), deltas=True, delta_reason="")
