"""System calls made inside another process, by ptrace.

What the application sees: all its threads stop for about a millisecond. Nothing else: its signals stay pending, its
interrupted system calls go on (nanosleep and futex with the rest of their time-outs), a job-control stop stays. The
calls are made by one of its own threads, at a `syscall` instruction of its vdso, under PTRACE_SYSCALL rather than
single steps: those would make the kernel force a SIGTRAP, and reset that signal's handler, where the application
blocks or ignores it.

Everything happens on a thread made for it. When that thread ends, the kernel detaches whatever is still seized: a
thread of the application that could not be stopped (D state) cannot be detached in any other way. The same holds when
this process dies between; only in the some 0.1 ms while a call is being made would the application's thread then run
on at the wrong place, and crash.

arm64: written from the kernel's source (arch/arm64/kernel/signal.c), never run. There the kernel has already set an
interrupted call up to restart when we look, so a relative sleep starts anew, and epoll_wait fails with EINTR.
"""

import contextlib
import errno
import os
import platform
import signal
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from criu_transfer import kernel
from criu_transfer.errors import TrackerUnavailable
from criu_transfer.maps import read_maps

# No application is kept stopped for longer than this by a thread of its own that does not stop (D state, vfork).
STOP_LIMIT_SECONDS = 0.25
# Once registers were changed, waiting is better than leaving them so.
RESTORE_LIMIT_SECONDS = 5.0

_SYSCALL_STOP = signal.SIGTRAP | 0x80
_UNBLOCKABLE = (1 << (signal.SIGKILL - 1)) | (1 << (signal.SIGSTOP - 1))
_ALL_SIGNALS = (1 << 64) - 1
_ERESTARTNOHAND = -514  # kernel-internal: make the call again, or EINTR when a signal handler runs first


@dataclass(frozen=True)
class Layout:
    """Where a machine keeps what a system call needs: indices of 64-bit words in the NT_PRSTATUS registers."""

    words: int
    number: int
    arguments: tuple[int, ...]
    result: int
    pc: int
    restart: int | None  # the interrupted call's number; at -1 the kernel does not restart it
    instruction: bytes
    alignment: int
    userfaultfd: int
    close: int
    repeatable: frozenset[int] = frozenset()


# read accept recvfrom recvmsg semop rt_sigtimedwait semtimedop epoll_wait epoll_pwait accept4 epoll_pwait2
_X86_REPEATABLE = frozenset({0, 43, 45, 47, 65, 128, 220, 232, 281, 288, 441})

LAYOUTS = {
    # r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss fs gs ds es fs gs
    "x86_64": Layout(27, 10, (14, 13, 12, 7, 9, 8), 10, 16, 15, b"\x0f\x05", 1, 323, 3, _X86_REPEATABLE),
    # x0 .. x30 sp pc pstate
    "aarch64": Layout(34, 8, (0, 1, 2, 3, 4, 5), 0, 32, None, b"\x01\x00\x00\xd4", 4, 282, 57),
}


def run[T](pid: int, deadline: float, action: "Callable[[StoppedGroup], T]") -> T:
    """Stop all threads of a process, run `action` with them stopped, let them go on; returns what `action` did.

    Raises TrackerUnavailable when the process cannot be stopped in time or at all, or when anything the kernel was
    asked for failed; the process then runs as before. `action` is called on another thread.
    """
    outcome: Future[T] = Future()

    def work() -> None:
        # On a busy machine we must not wait for a processor while the application is stopped: the median stop was
        # seen to go from 8 ms to under 1 ms. A raised nice value does not help.
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        group = StoppedGroup(pid, min(deadline, time.monotonic() + STOP_LIMIT_SECONDS))
        try:
            try:
                group.stop()
                result = action(group)
            finally:
                group.release()
        except BaseException as error:  # noqa: BLE001 - handed over to the caller, not handled here
            outcome.set_exception(error)
        else:
            outcome.set_result(result)

    worker = threading.Thread(target=work, name=f"inject-{pid}")
    worker.start()
    worker.join()
    try:
        return outcome.result()
    except OSError as error:
        raise TrackerUnavailable(f"process {pid}: {error}") from error


class StoppedGroup:
    """All threads of one process, stopped. Made by `run`, used from the thread that made it."""

    def __init__(self, pid: int, limit: float) -> None:
        self.pid = pid
        self._limit = limit
        self.layout = LAYOUTS[platform.machine()]
        self._threads: dict[int, bool] = {}  # seized threads -> whether they rest in a stop
        self._caller = 0
        self._instruction = 0
        self._saved_registers = b""
        self._saved_mask = 0
        self._kept_signals: list[int] = []

    # --- stopping

    def stop(self) -> None:
        """Seize and stop every thread; again until there are no new ones, for those not stopped yet may make more."""
        while new := self._thread_ids() - self._threads.keys():
            for tid in new:
                self._seize(tid)
            for tid in [tid for tid, rests in self._threads.items() if not rests]:
                self._await_stop(tid)
        if not self._threads:
            raise TrackerUnavailable(f"process {self.pid} has no live thread")

    def _thread_ids(self) -> set[int]:
        try:
            with os.scandir(f"/proc/{self.pid}/task") as entries:
                tids = {int(entry.name) for entry in entries}
        except FileNotFoundError as error:
            raise TrackerUnavailable(f"process {self.pid} is gone") from error
        return {tid for tid in tids if tid in self._threads or not self._is_dead(tid)}

    def _is_dead(self, tid: int) -> bool:
        try:
            stat = Path(f"/proc/{self.pid}/task/{tid}/stat").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            return True
        return stat.rpartition(")")[2].split()[0] in "ZXx"

    def _seize(self, tid: int) -> None:
        try:
            kernel.ptrace(kernel.PTRACE_SEIZE, tid, 0, kernel.PTRACE_O_TRACESYSGOOD)
        except OSError as error:
            if self._is_dead(tid):
                return
            raise TrackerUnavailable(f"thread {tid} of process {self.pid} cannot be traced: {error}") from error
        self._threads[tid] = False
        with contextlib.suppress(ProcessLookupError):  # it is exiting: the wait will say so
            kernel.ptrace(kernel.PTRACE_INTERRUPT, tid)

    def _await_stop(self, tid: int) -> None:
        """Wait until a seized thread rests in the stop we asked for; a signal on its way in is passed on."""
        while (status := self._wait(tid)) is not None:
            if _is_event_stop(status):
                self._make_restartable(tid)
                return
            # A signal was about to be delivered: let that happen, and stop right behind it.
            kernel.ptrace(kernel.PTRACE_INTERRUPT, tid)
            self._resume(kernel.PTRACE_CONT, tid, os.WSTOPSIG(status))

    def _make_restartable(self, tid: int) -> None:
        """Let a call that our stop would fail with EINTR, such as epoll_wait, be made again instead.

        Only those which have had no effect when they fail so; a signal with a handler still gives them EINTR. A
        relative time-out starts anew.
        """
        layout = self.layout
        registers = kernel.get_registers(tid)
        if layout.restart is None or len(registers) != 8 * layout.words:
            return
        words = list(struct.unpack(f"={layout.words}q", registers))
        if words[layout.result] == -errno.EINTR and words[layout.restart] in layout.repeatable:
            words[layout.result] = _ERESTARTNOHAND
            kernel.set_registers(tid, struct.pack(f"={layout.words}q", *words))

    def _resume(self, request: int, tid: int, number: int = 0) -> None:
        kernel.ptrace(request, tid, 0, number)
        self._threads[tid] = False

    def _wait(self, tid: int) -> int | None:
        """Return the next stop's status; None when the thread has exited. Raises TrackerUnavailable at the limit."""
        pause = 0.0
        while (status := self._poll(tid)) is None:
            if time.monotonic() > self._limit:
                raise TrackerUnavailable(f"thread {tid} of process {self.pid} does not stop (blocked in the kernel)")
            time.sleep(pause)
            pause = min(pause + 20e-6, 1e-3)
        if os.WIFSTOPPED(status):
            self._threads[tid] = True
            return status
        self._threads.pop(tid, None)
        return None

    def _poll(self, tid: int) -> int | None:
        try:
            return kernel.wait_nohang(tid)
        except ChildProcessError:  # another thread called exec: this one has gone, with no word
            return 0

    # --- calling

    def call(self, number: int, *arguments: int) -> int:
        """Make one system call inside the process; returns its result. Raises OSError with its error."""
        if not self._caller:
            self._prepare()
        layout = self.layout
        words = list(struct.unpack(f"={layout.words}Q", self._saved_registers))
        words[layout.pc] = self._instruction
        for index, argument in zip(layout.arguments, arguments, strict=False):
            words[index] = argument
        words[layout.number] = number
        if layout.restart is not None:
            words[layout.restart] = _ALL_SIGNALS  # -1
        kernel.set_registers(self._caller, struct.pack(f"={layout.words}Q", *words))
        self._run_to_syscall_stop()  # entry
        self._run_to_syscall_stop()  # exit
        after = kernel.get_registers(self._caller)
        result = int(struct.unpack_from("=q", after, 8 * layout.result)[0])
        if -4096 < result < 0:
            raise OSError(-result, f"system call {number} in process {self.pid}: {os.strerror(-result)}")
        return result

    def _prepare(self) -> None:
        """Choose the thread that makes the calls, and save what will be restored."""
        tid = self.pid if self.pid in self._threads else min(self._threads)
        registers = kernel.get_registers(tid)
        if len(registers) != 8 * self.layout.words:
            raise TrackerUnavailable(f"process {self.pid} runs in 32-bit mode")
        self._instruction = self._find_instruction()
        registers = self._leave_critical_section(tid, registers)
        mask = kernel.get_signal_mask(tid)
        options = kernel.PTRACE_O_TRACESYSGOOD | kernel.PTRACE_O_SUSPEND_SECCOMP
        try:
            # Set on this thread only, and only now that it rests: no call of the application's own escapes its filter.
            kernel.ptrace(kernel.PTRACE_SETOPTIONS, tid, 0, options)
        except OSError as error:
            raise TrackerUnavailable(f"seccomp of process {self.pid} cannot be suspended: {error}") from error
        self._caller, self._saved_registers, self._saved_mask = tid, registers, mask
        kernel.set_signal_mask(tid, _ALL_SIGNALS & ~_UNBLOCKABLE)

    def _find_instruction(self) -> int:
        vdso = next((vma for vma in read_maps(self.pid) if vma.path == "[vdso]"), None)
        if vdso is None:
            raise TrackerUnavailable(f"process {self.pid} has no vdso")
        code = bytearray(vdso.end - vdso.start)
        kernel.process_vm_readv(self.pid, code, [(vdso.start, vdso.end)])
        at = code.find(self.layout.instruction)
        while at % self.layout.alignment and at >= 0:
            at = code.find(self.layout.instruction, at + 1)
        if at < 0:
            raise TrackerUnavailable(f"the vdso of process {self.pid} has no system call instruction")
        return vdso.start + at

    def _leave_critical_section(self, tid: int, registers: bytes) -> bytes:
        """Return registers that stand outside any restartable sequence (rseq(2)).

        The kernel forgets the sequence as soon as the thread runs elsewhere, which it is about to do; the thread would
        then go on in the middle of it, unprotected. So do as the kernel does at a preemption: enter its abort handler.
        """
        area = kernel.rseq_area(tid)
        if not area:
            return registers
        pointer = bytearray(8)
        kernel.process_vm_readv(self.pid, pointer, [(area + 8, area + 16)])
        descriptor = int.from_bytes(pointer, "little")
        if not descriptor:
            return registers
        section = bytearray(32)
        kernel.process_vm_readv(self.pid, section, [(descriptor, descriptor + 32)])
        start, length, abort = struct.unpack_from("=3Q", section, 8)  # after u32 version, u32 flags
        words = list(struct.unpack(f"={self.layout.words}Q", registers))
        if not start <= words[self.layout.pc] < start + length:
            return registers
        words[self.layout.pc] = abort
        return struct.pack(f"={self.layout.words}Q", *words)

    def _run_to_syscall_stop(self) -> None:
        self._resume(kernel.PTRACE_SYSCALL, self._caller)
        while (status := self._wait(self._caller)) is not None:
            if os.WSTOPSIG(status) == _SYSCALL_STOP:
                return
            self._keep(status)
            self._resume(kernel.PTRACE_SYSCALL, self._caller)
        raise TrackerUnavailable(f"process {self.pid} was killed")

    def _keep(self, status: int) -> None:
        """Remember a signal that cannot be blocked (SIGSTOP) and came in between; it is sent again afterwards."""
        if status >> 16 == 0 and os.WSTOPSIG(status) != _SYSCALL_STOP:
            self._kept_signals.append(os.WSTOPSIG(status))

    # --- letting go

    def release(self) -> None:
        """Put everything back and let all threads run; those that never stopped follow when this thread ends."""
        try:
            if self._caller in self._threads:
                self._restore()
        finally:
            for tid, rests in self._threads.items():
                if rests:
                    with contextlib.suppress(ProcessLookupError):  # killed meanwhile
                        kernel.ptrace(kernel.PTRACE_DETACH, tid)
            for number in self._kept_signals:
                with contextlib.suppress(ProcessLookupError):
                    kernel.tgkill(self.pid, self._caller, number)

    def _restore(self) -> None:
        """Bring the caller back to where it was interrupted, from whatever stop it is in, or from none.

        That is done in a stop like the first one, inside the kernel's signal handling, from where an interrupted
        system call restarts; at the entry of a system call, registers would be taken for that call's.
        """
        self._limit = time.monotonic() + RESTORE_LIMIT_SECONDS
        with contextlib.suppress(ProcessLookupError):  # killed meanwhile
            while True:
                kernel.ptrace(kernel.PTRACE_INTERRUPT, self._caller)
                if self._threads[self._caller]:
                    self._resume(kernel.PTRACE_CONT, self._caller)
                status = self._wait(self._caller)
                if status is None:
                    return
                if _is_event_stop(status):
                    break
                self._keep(status)
            kernel.set_registers(self._caller, self._saved_registers)
            kernel.set_signal_mask(self._caller, self._saved_mask)


def _is_event_stop(status: int) -> bool:
    """Tell a stop that we asked for, or a job-control stop, from a signal about to be delivered."""
    return status >> 16 == kernel.PTRACE_EVENT_STOP
