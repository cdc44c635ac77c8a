"""Memory of the processes that are coming, kept in RAM until they run."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from criu_transfer.errors import GiveUp, ProtocolError, StoreFull
from criu_transfer.holes import punch_hole
from criu_transfer.ranges import RangeSet
from criu_transfer.wire import ADDRESS_END, PAGE


@dataclass(slots=True)
class _Memory:
    """One process: a sparse memfd whose offset is the virtual address, what it covers, and what of that takes RAM."""

    fd: int
    coverage: RangeSet = field(default_factory=RangeSet)
    data: RangeSet = field(default_factory=RangeSet)


class PageStore:
    """Pages of the processes of one migration, in one memfd each.

    A page that is covered and has no data is a zero page. `limit`: bytes of data in all processes together, as the
    source announced them; StoreFull when it would be passed. Raises ProtocolError for addresses that are none.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._memories: dict[int, _Memory] = {}
        self.held = 0  # bytes of data

    def open(self, proc: int) -> None:
        """Make an empty memory; ProtocolError when there is one."""
        if proc in self._memories:
            raise ProtocolError(f"process {proc} is announced twice")
        fd = os.memfd_create(f"spotguard-memory-{proc}", os.MFD_CLOEXEC)
        os.ftruncate(fd, ADDRESS_END)
        self._memories[proc] = _Memory(fd)

    def drop(self, proc: int) -> None:
        """Forget a process that has ended, and free its RAM."""
        memory = self._memory(proc)
        del self._memories[proc]
        self.held -= memory.data.total
        os.close(memory.fd)

    def write(self, proc: int, address: int, data: memoryview) -> None:
        """Store pages; raises StoreFull before anything is written."""
        memory = self._memory(proc)
        end = _check(address, len(data))
        more = sum(b - a for a, b in memory.data.missing(address, end))
        if self.held + more > self._limit:
            raise StoreFull(f"memory passes the announced {self._limit >> 20} MiB")
        position = address
        while data:
            count = os.pwrite(memory.fd, data, position)
            data, position = data[count:], position + count
        self.held += more
        memory.data.add(address, end)
        memory.coverage.add(address, end)

    def zero(self, proc: int, address: int, length: int) -> None:
        """Store zero pages: they are covered and take no RAM."""
        memory = self._memory(proc)
        end = _check(address, length)
        for start, stop in list(memory.data.overlap(address, end)):
            punch_hole(memory.fd, start, stop - start)
            memory.data.discard(start, stop)
            self.held -= stop - start
        memory.coverage.add(address, end)

    def read(self, proc: int, address: int, length: int) -> bytes:
        """Read back; what is not covered reads as zeros."""
        memory = self._memory(proc)
        _check(address, length)
        return os.pread(memory.fd, length, address)

    def coverage(self, proc: int) -> RangeSet:
        """Return the addresses whose content is known: the store's own set, not to be changed."""
        return self._memory(proc).coverage

    def fd(self, proc: int) -> int:
        """Return the memfd: page bytes at file offset = virtual address."""
        return self._memory(proc).fd

    @property
    def covered(self) -> int:
        """Count the bytes covered, in all processes."""
        return sum(memory.coverage.total for memory in self._memories.values())

    def __contains__(self, proc: int) -> bool:
        return proc in self._memories

    def close(self) -> None:
        """Free everything."""
        for proc in list(self._memories):
            self.drop(proc)

    def _memory(self, proc: int) -> _Memory:
        try:
            return self._memories[proc]
        except KeyError:
            raise ProtocolError(f"process {proc} was never announced") from None


def _check(address: int, length: int) -> int:
    if (address | length) % PAGE or length <= 0 or not 0 <= address <= ADDRESS_END - length:
        raise ProtocolError(f"{address:#x}+{length:#x} is no range of pages")
    return address + length


_SWAPS = Path("/proc/swaps")
_CGROUP = Path("/proc/self/cgroup")
_CGROUP_ROOT = Path("/sys/fs/cgroup")


def require_no_swap(
    directory: Path | None = None, *, swaps: Path = _SWAPS, cgroup: Path = _CGROUP, root: Path = _CGROUP_ROOT
) -> None:
    """Raise GiveUp when memory of this process, or files in the tmpfs `directory`, could reach a disk.

    A tmpfs mounted with `noswap` (Linux 6.4) keeps its files in RAM whatever the node has. memfd pages cannot be
    locked against swapping without mapping all of them, so there the node must have no swap or our cgroup (v2) must
    forbid it (memory.swap.max, Documentation/admin-guide/cgroup-v2.rst).
    """
    devices = [line.split()[0] for line in swaps.read_text().splitlines()[1:] if line.strip()]
    if not devices or _swap_forbidden(cgroup, root) or (directory is not None and _mounted_noswap(directory)):
        return
    raise GiveUp(
        f"memory images could be swapped to {', '.join(devices)}: run 'swapoff -a' on this node, or set"
        " memory.swap.max to 0 for SpotGuard's cgroup"
    )


def _mounted_noswap(directory: Path) -> bool:
    """Tell whether the directory's own mount has the option (proc_pid_mountinfo(5))."""
    device = directory.stat().st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[2] == name and "noswap" in line.split(" - ")[-1].split(",") for line in lines)


def _swap_forbidden(cgroup: Path, root: Path) -> bool:
    for line in cgroup.read_text().splitlines():
        if line.startswith("0::/"):
            limit = root / line.removeprefix("0::/") / "memory.swap.max"
            return limit.exists() and limit.read_text().strip() == "0"
    return False
