"""Parsing of /proc/PID/maps."""

import mmap
import os
import subprocess

import pytest

from criu_transfer.maps import Vma, disjoint, parse_maps, read_maps

SAMPLE = """\
55d0c1000000-55d0c1002000 r--p 00001000 fe:01 1234                       /usr/bin/two words (deleted)
55d0c2000000-55d0c2021000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000021000 rw-p 00000000 00:00 0\x20
7f0000100000-7f0000121000 rw-p 00000000 00:00 0                          [anon:arena 1]
7f0000200000-7f0000221000 rw-s 00000000 00:01 77                         /dev/zero (deleted)
7f0000300000-7f0000321000 rw-p 00000000 00:01 78                         /SYSV\x0b\u2028odd
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                          [stack]
7ffc00100000-7ffc00104000 r--p 00000000 00:00 0                          [vvar]
7ffc00104000-7ffc00106000 r-xp 00000000 00:00 0                          [vdso]
7ffc00107000-7ffc00108000 --xp 00000000 00:00 0                          [uprobes]
"""


def test_fields() -> None:
    assert parse_maps(SAMPLE)[0] == Vma(
        0x55D0C1000000, 0x55D0C1002000, "r--p", 0x1000, "fe:01", 1234, "/usr/bin/two words (deleted)"
    )
    assert parse_maps(SAMPLE)[5].path == "/SYSV\x0b\u2028odd"


def test_what_counts_as_anonymous() -> None:
    assert [vma.path for vma in parse_maps(SAMPLE) if vma.anonymous] == ["[heap]", "", "[anon:arena 1]", "[stack]"]
    assert [vma.path for vma in parse_maps(SAMPLE) if not vma.private] == ["/dev/zero (deleted)"]


def test_garbage_is_refused() -> None:
    with pytest.raises(ValueError, match="unpack"):
        parse_maps("no maps\n")


def test_of_a_real_process() -> None:
    area = mmap.mmap(-1, 40960, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    vmas = read_maps(os.getpid())
    assert any(vma.path == "[stack]" and vma.anonymous for vma in vmas)
    assert vmas == sorted(vmas)
    area.close()


def test_of_a_process_that_is_gone() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    with pytest.raises(FileNotFoundError):
        read_maps(child.pid)


def test_a_mapping_that_grew_between_two_looks_is_there_once() -> None:
    """As the kernel lists a process that maps memory while the file is read."""
    text = (
        "1000-3000 rw-p 00000000 00:00 0 \n"
        "1000-5000 rw-p 00000000 00:00 0 \n"
        "4000-5000 rw-p 00000000 00:00 0 \n"
        "5000-6000 r--p 00000000 00:00 0 \n"
    )
    assert [(vma.start, vma.end, vma.perms) for vma in disjoint(parse_maps(text))] == [
        (0x1000, 0x3000, "rw-p"),
        (0x3000, 0x5000, "rw-p"),
        (0x5000, 0x6000, "r--p"),
    ]
