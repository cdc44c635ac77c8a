"""System calls injected into real processes: what the application must not notice."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from criu_transfer import kernel
from criu_transfer.errors import TrackerUnavailable
from criu_transfer.tracker import inject

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of system calls"),
]

GETPID = 39
RESTART_SYSCALL = 219
PRELUDE = """
import ctypes, os, signal, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(number, *arguments):
    result = libc.syscall(ctypes.c_long(number), *arguments)
    return -ctypes.get_errno() if result < 0 else result
def say(*words):
    print(*words, flush=True)
class Spec(ctypes.Structure):
    _fields_ = [("sec", ctypes.c_long), ("nsec", ctypes.c_long)]
"""


class Child:
    """A Python program that prints lines; the first says that it is ready."""

    def __init__(self, program: str) -> None:
        command = [sys.executable, "-c", PRELUDE + program]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self.pid: int = self.process.pid
        assert self.read() == "ready"

    def read(self, seconds: float = 10) -> str:
        assert self.process.stdout
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        assert ready, "the child says nothing"
        return str(self.process.stdout.readline().decode().rstrip("\n"))

    def write(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line.encode() + b"\n")

    def status(self, field: str) -> str:
        text = Path(f"/proc/{self.pid}/status").read_text()
        return next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(field + ":"))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


Spawn = Callable[[str], Child]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    children: list[Child] = []

    def make(program: str) -> Child:
        children.append(Child(program))
        return children[-1]

    yield make
    for child in children:
        child.close()


def getpid_in(child: Child) -> None:
    assert inject.run(child.pid, time.monotonic() + 5, lambda group: group.call(GETPID)) == child.pid


def wait_for_call(child: Child, number: int) -> None:
    """Wait until the child's main thread is blocked in a system call."""
    limit = time.monotonic() + 5
    while Path(f"/proc/{child.pid}/syscall").read_text().split()[0] != str(number):
        assert time.monotonic() < limit


BLOCKING = {
    "nanosleep": (35, "spec = Spec(0, 300_000_000)", "call(35, ctypes.byref(spec), None)", "0"),
    "epoll_wait": (
        232,
        "ep = call(291, 0); events = ctypes.create_string_buffer(64)",
        "call(232, ep, events, 4, 300)",
        "0",
    ),
    "futex": (
        202,
        "word = ctypes.c_int(5); spec = Spec(0, 300_000_000)",
        "call(202, ctypes.byref(word), 0, 5, ctypes.byref(spec), None, 0)",
        "-110",
    ),
    "poll": (7, "", "call(7, None, 0, 300)", "0"),
    "ppoll": (
        271,
        "spec = Spec(0, 300_000_000); empty = ctypes.c_uint64(0)",
        "call(271, None, 0, ctypes.byref(spec), ctypes.byref(empty), 8)",
        "0",
    ),
    "sigtimedwait": (
        128,
        "spec = Spec(0, 300_000_000); waited = ctypes.c_uint64(1 << 33)",
        "call(128, ctypes.byref(waited), None, ctypes.byref(spec), 8)",
        "-11",
    ),
}


@pytest.mark.parametrize("name", BLOCKING)
def test_a_blocked_call_goes_on(spawn: Spawn, name: str) -> None:
    number, setup, call, result = BLOCKING[name]
    child = spawn(f"{setup}\nsay('ready')\nt = time.monotonic()\nr = {call}\nsay(r, time.monotonic() - t)")
    restarts = name in {"nanosleep", "futex", "poll"}  # with the rest of the time, by restart_syscall
    for turn in range(3):
        wait_for_call(child, RESTART_SYSCALL if restarts and turn else number)
        getpid_in(child)
    answer, elapsed = child.read().split()
    assert answer == result
    assert float(elapsed) >= 0.3


def test_a_blocked_read_gets_what_comes(spawn: Spawn) -> None:
    child = spawn("say('ready')\nb = ctypes.create_string_buffer(6)\nsay(call(0, 0, b, 6), b.value)")
    for _ in range(3):
        wait_for_call(child, 0)
        getpid_in(child)
    child.write("hello")
    assert child.read() == "6 b'hello\\n'"


def test_blocked_signals_stay_pending_with_their_sender(spawn: Spawn) -> None:
    child = spawn("""
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGTRAP])
say('ready'); input()
mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
say(signal.sigpending() == {signal.SIGUSR1}, mask == {signal.SIGUSR1, signal.SIGTRAP})
say(signal.sigwaitinfo([signal.SIGUSR1]).si_pid)
""")
    os.kill(child.pid, signal.SIGUSR1)
    getpid_in(child)
    child.write("")
    assert child.read() == "True True"
    assert child.read() == str(os.getpid())


@pytest.mark.parametrize("action", ["signal.SIG_IGN", "lambda *_: say('trap')"])
def test_the_handler_of_sigtrap_is_kept(spawn: Spawn, action: str) -> None:
    child = spawn(f"""
signal.signal(signal.SIGTRAP, {action})
say('ready'); input(); os.kill(os.getpid(), signal.SIGTRAP); say('alive')
""")
    getpid_in(child)
    child.write("")
    assert child.read() in {"trap", "alive"}
    assert action == "signal.SIG_IGN" or child.read() == "alive"


def test_no_signal_is_lost_or_doubled(spawn: Spawn) -> None:
    """Real-time signals queue; the interpreter's handler writes one byte for each that is delivered."""
    child = spawn("""
reader, writer = os.pipe()
os.set_blocking(writer, False)
signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
signal.signal(signal.SIGRTMIN, lambda *_: None)
going = True
def work():
    while going: sum(range(1000))
threading.Thread(target=work).start()
say('ready'); input(); going = False
say(len(os.read(reader, 10000)))
""")

    def send() -> None:
        for _ in range(500):
            os.kill(child.pid, signal.SIGRTMIN)
            time.sleep(0)

    sender = threading.Thread(target=send)
    sender.start()
    rounds = 0
    while sender.is_alive() or rounds < 10:
        getpid_in(child)
        rounds += 1
    sender.join()
    child.write("")
    assert child.read() == "500"


def test_a_signal_on_its_way_in_is_passed_on(spawn: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    child = spawn("signal.signal(signal.SIGUSR1, lambda *_: say('handled')); say('ready'); input()")
    ptrace = kernel.ptrace

    def seize_and_signal(request: int, tid: int, address: int = 0, data: int = 0) -> int:
        result = ptrace(request, tid, address, data)
        if request == kernel.PTRACE_SEIZE:
            os.kill(child.pid, signal.SIGUSR1)
            limit = time.monotonic() + 5
            while not child.status("State").startswith("t"):
                assert time.monotonic() < limit
        return result

    monkeypatch.setattr(kernel, "ptrace", seize_and_signal)
    getpid_in(child)
    assert child.read() == "handled"


def test_signals_that_come_between_calls_wait(spawn: Spawn) -> None:
    child = spawn("signal.signal(signal.SIGUSR1, lambda *_: say('handled')); say('ready'); input()")

    def signal_and_call(group: inject.StoppedGroup) -> list[int]:
        group.call(GETPID)
        os.kill(child.pid, signal.SIGUSR1)
        group.call(GETPID)
        return group._kept_signals  # sent again, it would lose who sent it and why

    assert inject.run(child.pid, time.monotonic() + 5, signal_and_call) == []
    assert child.read() == "handled"


def test_a_stop_signal_between_calls_is_kept(spawn: Spawn) -> None:
    child = spawn("say('ready'); input(); say('on')")

    def stop_and_call(group: inject.StoppedGroup) -> int:
        group.call(GETPID)
        os.kill(child.pid, signal.SIGSTOP)
        return group.call(GETPID)

    assert inject.run(child.pid, time.monotonic() + 5, stop_and_call) == child.pid
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    os.kill(child.pid, signal.SIGCONT)
    child.write("")
    assert child.read() == "on"


def test_a_stopped_job_stays_stopped(spawn: Spawn) -> None:
    child = spawn("threading.Thread(target=input).start()\nsay('ready')\nt = 0\ntime.sleep(0.01); say('on')")
    os.kill(child.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    for _ in range(3):
        getpid_in(child)
        # Let go by the tracer, a thread runs in the kernel for an instant, to its stop.
        deadline = time.monotonic() + 5
        while not child.status("State").startswith("T (stopped)"):
            assert time.monotonic() < deadline, "the job runs"
            os.sched_yield()
    os.kill(child.pid, signal.SIGCONT)
    assert child.read() == "on"
    child.write("")
    assert child.process.wait(5) == 0


def test_threads_that_come_and_go(spawn: Spawn) -> None:
    child = spawn("""
go = True
def churn():
    while go:
        thread = threading.Thread(target=lambda: None)
        thread.start(); thread.join()
threads = [threading.Thread(target=churn) for _ in range(4)]
[t.start() for t in threads]
say('ready'); input(); go = False
[t.join() for t in threads]
say('done')
""")
    for _ in range(30):
        getpid_in(child)
    child.write("")
    assert child.read() == "done"
    assert child.process.wait(5) == 0


def test_a_thread_in_uninterruptible_wait(spawn: Spawn, tmp_path: Path) -> None:
    """A parent of vfork cannot be stopped until its child execs; here the child waits for a fifo's writer first."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    child = spawn(f"""
threading.Thread(target=input, daemon=True).start()
say('ready')
os.posix_spawn('/bin/true', ['true'], {{}}, file_actions=[(os.POSIX_SPAWN_OPEN, 9, {str(fifo)!r}, os.O_RDONLY, 0)])
os._exit(7)
""")
    limit = time.monotonic() + 5
    while not Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text():
        assert time.monotonic() < limit
    begun = time.monotonic()
    with pytest.raises(TrackerUnavailable, match="does not stop"):
        inject.run(child.pid, begun + 30, lambda group: group.call(GETPID))
    assert time.monotonic() - begun < 2
    tasks = list(Path(f"/proc/{child.pid}/task").iterdir())
    assert len(tasks) == 2
    while any("TracerPid:\t0" not in (task / "status").read_text() for task in tasks):
        assert time.monotonic() < limit
    with fifo.open("wb"):
        assert child.process.wait(10) == 7


def test_an_error_inside_leaves_the_process_as_it_was(spawn: Spawn) -> None:
    child = spawn("say('ready'); say(call(0, 0, ctypes.create_string_buffer(6), 6))")
    wait_for_call(child, 0)

    def fail(group: inject.StoppedGroup) -> None:
        group.call(GETPID)
        raise RuntimeError("after injection")

    with pytest.raises(RuntimeError, match="after injection"):
        inject.run(child.pid, time.monotonic() + 5, fail)
    with pytest.raises(TrackerUnavailable, match="Bad file descriptor"):
        inject.run(child.pid, time.monotonic() + 5, lambda group: group.call(3, 999))
    child.write("hello")
    assert child.read() == "6"


def test_a_process_that_cannot_be_traced(spawn: Spawn) -> None:
    child = spawn("say('ready'); input()")
    done = threading.Event()
    held = threading.Event()

    def hold(_group: inject.StoppedGroup) -> None:
        held.set()
        done.wait(10)

    debugger = threading.Thread(target=inject.run, args=(child.pid, time.monotonic() + 5, hold))
    debugger.start()
    held.wait(5)
    with pytest.raises(TrackerUnavailable, match="cannot be traced"):
        getpid_in(child)
    done.set()
    debugger.join()
    child.process.kill()
    child.process.wait()
    with pytest.raises(TrackerUnavailable, match="gone"):
        getpid_in(child)


def test_it_does_not_wait_for_a_processor(spawn: Spawn) -> None:
    child = spawn("say('ready'); input()")
    assert inject.run(child.pid, time.monotonic() + 5, lambda _group: os.sched_getscheduler(0)) == os.SCHED_RR
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_killed_in_between(spawn: Spawn) -> None:
    child = spawn("threading.Thread(target=input).start(); say('ready')")

    def kill(group: inject.StoppedGroup) -> None:
        group.call(GETPID)
        os.kill(child.pid, signal.SIGKILL)
        group.call(GETPID)

    with pytest.raises(TrackerUnavailable):
        inject.run(child.pid, time.monotonic() + 5, kill)
    assert child.process.wait(5) in {0, -signal.SIGKILL}


# Machine code that loops inside a restartable sequence; its abort handler counts, arms the sequence again, and loops.
RSEQ = """
import mmap
offset = ctypes.c_ssize_t.in_dll(libc, '__rseq_offset').value
area = mmap.mmap(-1, 4096, prot=7)
base = ctypes.addressof(ctypes.c_char.from_buffer(area))
count, section, code = base, base + 64, base + 256
q = lambda n: n.to_bytes(8, 'little')
arm = bytes.fromhex('48b8') + q(section) + bytes.fromhex('6448a3') + q((offset + 8) % 2**64)  # mov %rax, %fs:offset+8
body = arm + bytes.fromhex('ebfe')  # jmp to itself
abort = code + 128
area[256:256 + len(body)] = body
handler = bytes.fromhex('53300553') + bytes.fromhex('48b8') + q(count) + bytes.fromhex('48ff00') + bytes.fromhex('e9')
handler += ((code - (abort + len(handler) - 4 + 4)) % 2**32).to_bytes(4, 'little')
area[256 + 124:256 + 124 + len(handler)] = handler
start = code + len(arm)
area[64:96] = bytes(8) + q(start) + q(2) + q(abort)
def tell():
    while True:
        time.sleep(0.02); say(ctypes.c_uint64.from_address(count).value)
threading.Thread(target=tell, daemon=True).start()
say('ready')
ctypes.CFUNCTYPE(None)(code)()
"""


def test_a_restartable_sequence_is_aborted(spawn: Spawn) -> None:
    child = spawn(RSEQ)
    assert int(child.read()) >= 0
    for _ in range(10):
        getpid_in(child)
        before = int(child.read())
        limit = time.monotonic() + 5
        while int(child.read()) == before:  # a sequence forgotten by the kernel is never aborted again
            assert time.monotonic() < limit
