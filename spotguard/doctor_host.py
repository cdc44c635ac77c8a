"""The machine as `spotguard doctor` asks it: thin probes, nothing decided here."""

import ctypes
import importlib.util
import mmap
import os
import platform
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

# push rbx; mov eax, 0xd; xor ecx, ecx; cpuid; mov eax, ebx; pop rbx; ret
_XSAVE_SIZE = bytes.fromhex("53 b8 0d 00 00 00 31 c9 0f a2 89 d8 5b c3")


@dataclass(frozen=True, slots=True)
class Ran:
    """How a program ended, and what it wrote (both streams)."""

    code: int
    output: str


class Host(Protocol):
    """What the checks may ask."""

    def euid(self) -> int:
        """Give the effective user id."""

    def release(self) -> str:
        """Give the kernel's release, as uname -r."""

    def machine(self) -> str:
        """Give the architecture, as uname -m."""

    def read(self, path: str) -> str | None:
        """Give a file's text, None when it cannot be read."""

    def run(self, *command: str) -> Ran | None:
        """Run a program for 20 s at most, None when there is no such program. Code 124: it did not end."""

    def has_module(self, name: str) -> bool:
        """Tell whether a Python module can be imported."""

    def xsave_size(self) -> int | None:
        """Give the bytes of the processor's extended state (CPUID leaf 13), None when it cannot be asked."""

    def freezer(self, mount: str) -> str:
        """Make a control group below `mount` and look for its freezer; an empty text is success, else why not."""

    def write_tracking(self) -> tuple[bool, str]:
        """Try write tracking on this kernel: whether it is sound, and what was found."""


class ThisHost:
    """The machine that this process runs on."""

    def euid(self) -> int:
        """Give the effective user id."""
        return os.geteuid()

    def release(self) -> str:
        """Give the kernel's release."""
        return os.uname().release

    def machine(self) -> str:
        """Give the architecture."""
        return platform.machine()

    def read(self, path: str) -> str | None:
        """Give a file's text, None when it cannot be read."""
        try:
            return Path(path).read_text(errors="replace")
        except OSError:
            return None

    def run(self, *command: str) -> Ran | None:
        """Run a program for 20 s at most."""
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=20,
                check=False,
            )
        except (FileNotFoundError, PermissionError):
            return None
        except subprocess.TimeoutExpired:
            return Ran(124, "did not end within 20 s")
        return Ran(done.returncode, done.stdout)

    def has_module(self, name: str) -> bool:
        """Tell whether a Python module can be imported, without importing it."""
        return importlib.util.find_spec(name) is not None

    def xsave_size(self) -> int | None:
        """Execute CPUID; None on other processors, and where executable memory is not allowed (SELinux)."""
        if platform.machine() not in {"x86_64", "AMD64"}:
            return None
        try:
            code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        except OSError:
            return None
        with ExitStack() as cleanup:
            cleanup.callback(code.close)
            code.write(_XSAVE_SIZE)
            place = ctypes.c_char.from_buffer(code)
            size = int(ctypes.CFUNCTYPE(ctypes.c_uint32)(ctypes.addressof(place))())
            del place  # the mapping cannot be closed while it is looked at
            return size

    def freezer(self, mount: str) -> str:
        """Make a control group, look, and remove it."""
        group = Path(mount) / f"spotguard-doctor-{os.getpid()}"
        try:
            group.mkdir()
        except OSError as error:
            return f"cannot make a control group: {error.strerror}"
        try:
            return "" if (group / "cgroup.freeze").exists() else "control groups have no cgroup.freeze"
        finally:
            group.rmdir()

    def write_tracking(self) -> tuple[bool, str]:
        """Run the tracker's self-test."""
        from criu_transfer.tracker.selftest import selftest

        result = selftest()
        if result.ok:
            return True, f"the self-test passed ({len(result.cases)} cases)"
        return False, result.reason
