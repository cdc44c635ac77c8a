"""What keeps a container from being moved, found before anything is done to it.

Not movable, because CRIU 4.2 refuses it (its sources: files.c, sockets.c, sk-inet.c, proc_parse.c, namespaces.c,
cr-dump.c) or would restore something else:
- descriptors of io_uring, userfaultfd, perf events, BPF programs and links, seccomp listeners, ... (anon_inode:[...]);
- open or mapped devices, but for null, zero, full, random, urandom, kmsg, tun and terminals made inside;
- terminals from outside the container (`tty: true`, `exec -it`);
- sockets other than Unix, TCP, UDP, UDP-Lite, raw, ICMP, packet and netlink: MPTCP, SCTP, AF_XDP, vsock, AF_ALG, ...;
- TCP sockets with an upper-layer protocol (kernel TLS): CRIU would restore them without it;
- files on a mount that the container no longer has (lazily unmounted), POSIX message queues;
- System V shared memory in an IPC namespace that is not the container's own;
- user namespaces, and namespaces nested in the container's (CRIU takes nested mount and network namespaces only);
- network or FUSE file systems mounted from inside;
- memory in hugetlb pages (restored only where the target has reserved as many);
- processes under a debugger, dumping core, or whose main thread has exited; memory with uprobes.

Movable, but without deltas: what the device writes by DMA passes the page tables by, so a tracker cannot see it:
files opened O_DIRECT, Linux AIO, pinned memory (VmPin). These are copied whole, frozen, after I/O has drained.

Left to CRIU, whose refusal undoes the migration: corked UDP sockets, connections in a listen queue, Unix sockets whose
peer is outside, pidfds of outside processes, deleted files larger than its --ghost-limit. Not to be found from
outside: Landlock domains, System V semaphores and message queues, TCP MD5 and AO keys.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from criu_transfer import kernel
from criu_transfer.maps import Vma, read_maps
from criu_transfer.proctree import Process

_ANON_SUPPORTED = {
    "eventfd", "eventpoll", "inotify", "fanotify", "signalfd", "timerfd", "pidfd", "bpf-map",
}  # fmt: skip
_ANON_REMEDIES = {
    "io_uring": "run it under a seccomp profile that forbids io_uring_setup, as containerd's RuntimeDefault does",
    "userfaultfd": "run it under a seccomp profile that forbids userfaultfd, or turn that feature of the program off",
}
_SOCKETS_SUPPORTED = {
    "UNIX", "UNIX-STREAM", "TCP", "TCPv6", "UDP", "UDPv6", "UDP-Lite", "UDPLITEv6", "RAW", "RAWv6", "PING", "PINGv6",
    "PACKET", "NETLINK",
}  # fmt: skip
_SOCKET_REMEDIES = {
    "MPTCP": "turn Multipath TCP off (Go programs: GODEBUG=multipathtcp=0)",
    "MPTCPv6": "turn Multipath TCP off (Go programs: GODEBUG=multipathtcp=0)",
}
_DEVICES_SUPPORTED = {(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (1, 11), (5, 0), (5, 2), (10, 200)}
_PTS_MAJORS = range(136, 144)
_MEMORY_FILES = ("/memfd:", "/dev/zero (deleted)", "/SYSV", "/anon_hugepage")
_REMOTE_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "virtiofs", "afs", "lustre", "fuse", "fuseblk"}
_NOT_NESTED = ("pid", "user", "ipc", "uts", "cgroup", "time")
_TCP_ULP = 31

_GONE = (FileNotFoundError, ProcessLookupError)


@dataclass(frozen=True)
class Preflight:
    """The answer. Reasons are sentences for a person: the process, what it has, and the remedy where there is one."""

    movable: bool
    reasons: tuple[str, ...]
    deltas: bool
    delta_reason: str


def check(processes: Sequence[Process], *, config: Mapping[str, Any]) -> Preflight:
    """Look for what cannot be moved in a container's processes and in its OCI configuration.

    Only reads /proc, and duplicates TCP sockets for an instant; the container runs on. What processes open later is
    seen only by looking again; those that exit meanwhile are passed over.
    """
    reasons = list(_config_reasons(config))
    mounts = _mounts_of(processes)
    reasons += _mount_reasons(mounts.values(), config)
    root = min(processes, key=lambda process: (process.starttime, process.pid), default=None)
    for process in processes:
        look = _Look(process, mounts, own_ipc=_has_own(config, "ipc"))
        for found in (look.state(), look.namespaces(root or process), look.descriptors(), look.mappings()):
            with contextlib.suppress(*_GONE):  # it has exited: the container goes on without it
                reasons += found
    delta_reason = dma(processes)
    unique = tuple(dict.fromkeys(reasons))
    return Preflight(not unique, unique, not delta_reason, delta_reason)


def dma(processes: Iterable[Process]) -> str:
    """Say why writes of these processes could escape a tracker; empty when they cannot.

    To be asked in every round: one yes means that no delta of the whole tree may be trusted.
    """
    for process in processes:
        try:
            reason = next(_dma_reasons(process), "")
        except _GONE:
            continue
        if reason:
            return f"{_name(process)} {reason}: its memory can only be copied while it is frozen"
    return ""


def _dma_reasons(process: Process) -> Iterator[str]:
    if _status(process.pid).get("VmPin", "0 kB") != "0 kB":
        yield "has memory pinned for a device (VmPin)"
    if any(vma.path.startswith("/[aio]") for vma in read_maps(process.pid)):
        yield "uses Linux AIO"
    for number, link in _links(process.pid):
        if link.startswith("/") and _is_direct(process.pid, number):
            yield f"has {link} open with O_DIRECT"


def _is_direct(pid: int, number: str) -> bool:
    """Tell a file open for direct I/O; on a pipe the same flag means packets."""
    try:
        mode = Path(f"/proc/{pid}/fd/{number}").stat().st_mode
        flags = _fdinfo(pid, number).get("flags", "0")
    except _GONE:
        return False
    return bool(int(flags, 8) & os.O_DIRECT) and (stat.S_ISREG(mode) or stat.S_ISBLK(mode))


class _Look:
    """The reasons of one process. Each method may end early with FileNotFoundError when the process exits."""

    def __init__(self, process: Process, mounts: Mapping[int, "_Mount"], *, own_ipc: bool) -> None:
        self._process = process
        self._mounts = mounts
        self._own_ipc = own_ipc
        self._pid = process.pid
        self._who = _name(process)

    def state(self) -> Iterator[str]:
        """What /proc/PID/status says."""
        status = _status(self._pid)
        if status.get("TracerPid", "0") != "0":
            yield f"{self._who} is being traced by process {status['TracerPid']}: detach the debugger"
        if status.get("CoreDumping", "0") != "0":
            yield f"{self._who} is dumping core"
        if status.get("State", "").startswith("Z"):
            yield f"{self._who} runs on after its main thread has exited, which CRIU cannot dump"
        if status.get("HugetlbPages", "0 kB") != "0 kB":
            yield f"{self._who} has {status['HugetlbPages']} of memory in hugetlb pages: use transparent huge pages"

    def namespaces(self, root: Process) -> Iterator[str]:
        """User namespaces, and namespaces other than those of the container's first process."""
        user = _namespace(self._pid, "user")
        if not user:  # gone, or its main thread is
            return
        if user != _namespace("self", "user"):
            yield f"{self._who} runs in a user namespace, where lazy restore is not known to work: use hostUsers: true"
            return
        for kind in _NOT_NESTED:
            if _namespace(self._pid, kind) != _namespace(root.pid, kind):
                yield f"{self._who} has a {kind} namespace of its own, nested in the container's: CRIU cannot dump that"

    def descriptors(self) -> Iterator[str]:
        """Every open descriptor."""
        for number, link in _links(self._pid):
            try:
                if link.startswith("anon_inode:"):
                    yield from self._anonymous(link)
                elif link.startswith("socket:"):
                    yield from self._socket(number)
                elif link.startswith("/"):
                    yield from self._file(number, link)
            except _GONE:  # closed meanwhile
                continue

    def _anonymous(self, link: str) -> Iterator[str]:
        kind = link.removeprefix("anon_inode:").strip("[]")
        if kind not in _ANON_SUPPORTED:
            remedy = _ANON_REMEDIES.get(kind, "")
            yield f"{self._who} has {kind} open, which CRIU cannot dump" + (f": {remedy}" if remedy else "")

    def _socket(self, number: str) -> Iterator[str]:
        # The name of the socket's protocol, as sockfs gives it (net/socket.c).
        name = os.getxattr(f"/proc/{self._pid}/fd/{number}", "system.sockprotoname").rstrip(b"\0").decode()
        if name not in _SOCKETS_SUPPORTED:
            remedy = _SOCKET_REMEDIES.get(name, "")
            yield f"{self._who} has a {name} socket, which CRIU cannot dump" + (f": {remedy}" if remedy else "")
        elif name.startswith("TCP") and (protocol := _upper_protocol(self._pid, int(number))):
            yield f"{self._who} has a TCP socket with kernel {protocol}, which a restore would lose: turn it off"

    def _file(self, number: str, link: str) -> Iterator[str]:
        status = Path(f"/proc/{self._pid}/fd/{number}").stat()
        if reason := self._device(status, link):
            yield reason
        elif number not in {"0", "1", "2"} and not link.startswith(_MEMORY_FILES):  # those three are runc's affair
            mount = int(_fdinfo(self._pid, number).get("mnt_id", "-1"))
            if mount not in self._mounts:
                yield f"{self._who} has {link} open on a file system that is not mounted in the container (any more)"

    def _device(self, status: os.stat_result, link: str) -> str:
        """Say why a device cannot be moved; empty when it can, or is none."""
        major, minor = os.major(status.st_rdev), os.minor(status.st_rdev)
        if stat.S_ISCHR(status.st_mode):
            if (major, minor) in _DEVICES_SUPPORTED:
                return ""
            if major in _PTS_MAJORS and status.st_dev == self._own_terminals():
                return ""
            if major in _PTS_MAJORS or major in {4, 5}:
                return f"{self._who} has the terminal {link} from outside: run it without one (tty: false, no exec -it)"
        elif not stat.S_ISBLK(status.st_mode):
            return ""
        return f"{self._who} uses the device {link} ({major}:{minor}), whose state CRIU cannot dump"

    def _own_terminals(self) -> int:
        """Return the device of the container's own devpts; 0 when it has none."""
        try:
            return Path(f"/proc/{self._pid}/root/dev/pts").stat().st_dev
        except FileNotFoundError:
            return 0

    def mappings(self) -> Iterator[str]:
        """Every mapping."""
        for vma in read_maps(self._pid):
            if vma.path.startswith("anon_inode:"):
                yield from self._anonymous(vma.path)
            elif vma.path == "[uprobes]":
                yield f"{self._who} has uprobes in its memory: stop what traces it"
            elif vma.path.startswith("/SYSV") and not self._own_ipc:
                yield (
                    f"{self._who} has System V shared memory in an IPC namespace that is not the container's own: "
                    "give the container its own, or let the program use mmap (PostgreSQL: shared_memory_type = mmap)"
                )
            elif vma.path.startswith("/dev/"):
                yield from self._mapped_device(vma)

    def _mapped_device(self, vma: Vma) -> Iterator[str]:
        try:
            status = Path(f"/proc/{self._pid}/map_files/{vma.start:x}-{vma.end:x}").stat()
            if reason := self._device(status, vma.path):
                yield reason
        except _GONE:  # unmapped meanwhile
            return


@dataclass(frozen=True)
class _Mount:
    point: str
    kind: str


def _mounts_of(processes: Iterable[Process]) -> dict[int, _Mount]:
    """Collect the mounts that the processes see, by the id that fdinfo names (proc_pid_mountinfo(5))."""
    mounts = {}
    for namespace in {_namespace(process.pid, "mnt"): process.pid for process in processes}.values():
        try:
            text = Path(f"/proc/{namespace}/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.ESRCH, errno.EINVAL}:  # it has exited, or its main thread has
                continue
            raise
        for line in filter(None, text.split("\n")):
            own, _, rest = line.partition(" - ")
            fields = own.split()
            mounts[int(fields[0])] = _Mount(fields[4], rest.split()[0])
    return mounts


def _mount_reasons(mounts: Iterable[_Mount], config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the file systems mounted from inside that CRIU cannot mount again; volumes are the runtime's affair."""
    given = {str(Path(mount["destination"])) for mount in config.get("mounts") or ()} | {"/"}
    for mount in mounts:
        if mount.point not in given and (mount.kind in _REMOTE_FILE_SYSTEMS or mount.kind.startswith("fuse.")):
            yield f"a file system of type {mount.kind} was mounted at {mount.point} from inside: make it a volume"


def _config_reasons(config: Mapping[str, Any]) -> Iterator[str]:
    if (config.get("process") or {}).get("terminal"):
        yield "the container has a terminal (tty: true), which ends outside of it: run it without one"


def _has_own(config: Mapping[str, Any], kind: str) -> bool:
    """Tell whether the container is given a new namespace rather than one that is shared."""
    namespaces = (config.get("linux") or {}).get("namespaces") or ()
    return any(namespace["type"] == kind and not namespace.get("path") for namespace in namespaces)


def _upper_protocol(pid: int, number: int) -> str:
    """Return the upper-layer protocol of a TCP socket (TCP_ULP of tcp(7)): "tls", "smc", or nothing."""
    pidfd = os.pidfd_open(pid)
    try:
        taken = kernel.pidfd_getfd(pidfd, number)
    except OSError:  # closed meanwhile
        return ""
    finally:
        os.close(pidfd)
    try:
        return kernel.getsockopt(taken, 6, _TCP_ULP, 16).rstrip(b"\0").decode()
    finally:
        os.close(taken)


def _name(process: Process) -> str:
    try:
        command = Path(f"/proc/{process.pid}/comm").read_text(errors="replace").strip()
    except _GONE:
        command = "gone"
    return f"process {process.vpid} ({command})"


def _namespace(pid: int | str, kind: str) -> str:
    """Name a namespace; empty where the kernel has no such kind, or the process is gone."""
    try:
        return str(Path(f"/proc/{pid}/ns/{kind}").readlink())
    except _GONE:
        return ""


def _links(pid: int) -> Iterator[tuple[str, str]]:
    """Yield the number and the target of every open descriptor."""
    with os.scandir(f"/proc/{pid}/fd") as entries:
        numbers = [entry.name for entry in entries]
    for number in numbers:
        try:
            yield number, str(Path(f"/proc/{pid}/fd/{number}").readlink())
        except _GONE:  # closed meanwhile
            continue


def _fields(path: str) -> dict[str, str]:
    lines = Path(path).read_text(errors="replace").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _status(pid: int) -> dict[str, str]:
    return _fields(f"/proc/{pid}/status")


def _fdinfo(pid: int, number: str) -> dict[str, str]:
    return _fields(f"/proc/{pid}/fdinfo/{number}")
