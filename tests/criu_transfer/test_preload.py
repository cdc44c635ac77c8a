"""The library that is preloaded into CRIU, seen by a program that asks the kernel what CRIU asks it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from criu_transfer import checkpoint
from criu_transfer.errors import DumpFailed

pytestmark = pytest.mark.kernel

# Two mappings of 4 pages: one tracked, then one that nobody tracks. After the scan that protects, page 1 of the tracked
# one is written. `dirty` and `asked` list, for each page, what two different questions are answered with.
SCAN = """
import ctypes, json, mmap, os
from criu_transfer import kernel, uffd
PAGE = 4096
def make():
    area = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.write(b"x" * 4 * PAGE)
    return area, ctypes.addressof(ctypes.c_char.from_buffer(area))
tracked, start = make()
untracked, other = make()
fd = uffd.create()
uffd.api(fd, uffd.FEATURE_WP_ASYNC | uffd.FEATURE_WP_UNPOPULATED)
uffd.register(fd, start, 4 * PAGE, uffd.MODE_WP)
pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
def scan(at, return_mask, flags=0):
    vector = kernel.region_vector(8)
    found, _ = kernel.pagemap_scan(
        pagemap, at, at + 4 * PAGE, vector, anyof=kernel.PAGE_IS_PRESENT, return_mask=return_mask, flags=flags)
    pages = {}
    for i in range(found):
        first, last, categories = vector[3 * i : 3 * i + 3]
        pages |= {(page - at) // PAGE: categories for page in range(first, last, PAGE)}
    return [pages.get(n) for n in range(4)]
scan(start, 0, kernel.PM_SCAN_WP_MATCHING | kernel.PM_SCAN_CHECK_WPASYNC)
tracked[PAGE] = 7
both = kernel.PAGE_IS_PRESENT | kernel.PAGE_IS_SOFT_DIRTY
wide = kernel.PAGE_IS_PRESENT | kernel.PAGE_IS_WRITTEN | kernel.PAGE_IS_WPALLOWED
print(json.dumps({"dirty": [scan(start, both), scan(other, both)], "asked": [scan(start, wide), scan(other, wide)]}))
"""
READ = """
import json, os, struct
here = id(os) // 4096 * 8
def entry(count):
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    os.lseek(fd, here, os.SEEK_SET)
    return struct.unpack("=Q", os.read(fd, count)[:8])[0] >> 55 & 1
fd = os.open("/tmp", os.O_TMPFILE | os.O_RDWR)
os.write(fd, bytes(8))
os.lseek(fd, 0, os.SEEK_SET)
print(json.dumps({"pagemap": entry(8), "file": sum(os.read(fd, 8))}))
"""
# Asks about the limits of a process of root's, as nobody; a limit of its own tells the answer from a guess.
LIMITS = """
import ctypes, json, os, resource
libc = ctypes.CDLL(None, use_errno=True)
resource.setrlimit(resource.RLIMIT_CORE, (0, 4096))
resource.setrlimit(resource.RLIMIT_NOFILE, (77, 99))
ended, end = os.pipe()
child = os.fork()
if not child:  # ends with its parent, which may not kill it
    os.close(end)
    os.read(ended, 1)
    os._exit(0)
os.setuid(65534)
def ask(pid, which, new=None):
    limit = (ctypes.c_ulong * 2)()
    result = libc.syscall(SYS_PRLIMIT, pid, which, new, limit)
    return list(limit) if result == 0 else [result, ctypes.get_errno()]
print(json.dumps({
    "core": ask(CHILD, 4), "files": ask(CHILD, 7), "stack": ask(CHILD, 3), "none": ask(CHILD, 99),
    "set": ask(CHILD, 7, (ctypes.c_ulong * 2)(7, 7)), "gone": ask(2**22 - 1, 7), "own": ask(0, 7),
}))
"""
PRLIMIT = {"x86_64": 302, "aarch64": 261}[os.uname().machine]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.build_library(tmp_path_factory.mktemp("preload"))


def ask(program: str, library: Path | None) -> dict[str, Any]:
    """Run a program with or without the library, and give what it found."""
    environment = {**os.environ, **({"LD_PRELOAD": str(library)} if library else {})}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=20
    )
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


WPALLOWED, WRITTEN, PRESENT, SOFT_DIRTY = 1, 2, 8, 128


def test_dirty_is_what_was_written_and_what_nobody_tracks(library: Path) -> None:
    tracked, untracked = ask(SCAN, library)["dirty"]
    assert tracked == [PRESENT, PRESENT | SOFT_DIRTY, PRESENT, PRESENT]
    assert untracked == [PRESENT | SOFT_DIRTY] * 4


def test_questions_of_other_kinds_are_answered_by_the_kernel_alone(library: Path) -> None:
    with_library = ask(SCAN, library)["asked"]
    assert with_library == ask(SCAN, None)["asked"]
    assert with_library[0] == [
        PRESENT | WPALLOWED, PRESENT | WPALLOWED | WRITTEN, PRESENT | WPALLOWED, PRESENT | WPALLOWED
    ]  # fmt: skip


def test_the_start_up_test_of_soft_dirty_passes_and_other_reads_are_left_alone(library: Path) -> None:
    assert ask(READ, library) == {"pagemap": 1, "file": 0}


def limits(library: Path | None) -> dict[str, Any]:
    return ask(LIMITS.replace("SYS_PRLIMIT", str(PRLIMIT)).replace("CHILD", "child"), library)


def test_limits_of_another_users_process_are_answered(library: Path) -> None:
    found = limits(library)
    assert found["core"] == [0, 4096]
    assert found["files"] == [77, 99]
    assert found["stack"][0] > 0
    assert found["none"][0] == -1
    assert found["set"] == [-1, 1]  # EPERM: never pretended
    assert found["gone"] == [-1, 3]
    assert found["own"] == [77, 99]
    assert limits(None)["files"] == [-1, 1]


def test_the_library_is_compiled_once_and_again_when_its_source_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = checkpoint.build_library(tmp_path)
    before = built.stat()
    assert checkpoint.build_library(tmp_path).stat() == before
    source = tmp_path / "changed/native/criu_preload.c"
    source.parent.mkdir(parents=True)
    source.write_text("int changed;\n")
    monkeypatch.setattr(checkpoint, "__file__", str(source.parent.parent / "checkpoint.py"))
    assert checkpoint.build_library(tmp_path).read_bytes() != built.read_bytes()
    prebuilt = checkpoint.build_library(source.parent)
    assert checkpoint.build_library(tmp_path / "not there") == prebuilt
    source.write_text("int main(\n")
    with pytest.raises(DumpFailed, match=r"cannot compile criu_preload\.c: .*error"):
        checkpoint.build_library(tmp_path)
