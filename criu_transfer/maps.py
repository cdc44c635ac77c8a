"""The mappings of a process: /proc/PID/maps, proc_pid_maps(5)."""

from pathlib import Path
from typing import NamedTuple


class Vma(NamedTuple):
    """One mapping. `device` is "major:minor" in hex; `path` may be a name in brackets, or empty."""

    start: int
    end: int
    perms: str
    offset: int
    device: str
    inode: int
    path: str

    @property
    def private(self) -> bool:
        """Whether writes stay with the process (MAP_PRIVATE)."""
        return self.perms[3] == "p"

    @property
    def anonymous(self) -> bool:
        """Whether it is private memory with no file behind: what trackers watch.

        The kernel's own mappings ([vdso], [vvar], [uprobes], ...) have no inode either, and are left out.
        """
        if self.inode or self.perms[3] != "p":
            return False
        return not self.path or self.path in {"[heap]", "[stack]"} or self.path.startswith(("[anon:", "[stack:"))


def parse_maps(text: str) -> list[Vma]:
    """Parse the content of a maps file; raises ValueError when it is no such thing."""
    vmas = []
    for line in filter(None, text.split("\n")):  # not splitlines: names may hold characters it splits at
        span, perms, offset, device, inode, *path = line.split(maxsplit=5)
        start, _, end = span.partition("-")
        vmas.append(
            Vma(int(start, 16), int(end, 16), perms, int(offset, 16), device, int(inode), path[0] if path else "")
        )
    return vmas


def read_maps(pid: int) -> list[Vma]:
    """Read the mappings of a process in order of address.

    Raises ProcessLookupError or FileNotFoundError when it is gone; a zombie has none. Of a running process the answer
    is a few snapshots of a page each, pieced together by the kernel; the mappings are disjoint all the same.
    """
    # Names of files may have any bytes in them.
    vmas = parse_maps(Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="surrogateescape"))
    return disjoint(vmas)


def disjoint(vmas: list[Vma]) -> list[Vma]:
    """Cut off what a mapping shares with the one before it.

    The kernel pieces the file together from several looks: a mapping that grows between two of them is in it twice,
    the second time with its new end.
    """
    found: list[Vma] = []
    reached = 0
    for vma in vmas:
        start = max(vma.start, reached)
        if start < vma.end:
            found.append(vma if start == vma.start else vma._replace(start=start))
            reached = vma.end
    return found
