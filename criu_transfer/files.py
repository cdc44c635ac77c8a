"""Directory trees on the source: finds what the receiver does not have yet.

Serves the container's upper layer, volumes and image directories. Entries are reached through descriptors of their
directories and symbolic links are never followed, for the container may rename things while they are read.
"""

import errno
import os
import stat
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from criu_transfer.digests import BLOCK, Digests, Unknown
from criu_transfer.errors import GiveUp
from criu_transfer.maps import Vma
from criu_transfer.messages import LOCAL_XATTRS, MAX_DEPTH, XATTR_SPACES, FileKind, FileMeta

# Two writes within one tick of the kernel's file clock leave the same times (a tick is 10 ms at HZ=100).
_TICK_NS = 50_000_000
_PATH_MAX = 4095
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOATIME | os.O_CLOEXEC
# What opening says when the entry is not what it was a moment ago.
_REPLACED = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO})

KINDS = {
    stat.S_IFREG: FileKind.FILE,
    stat.S_IFDIR: FileKind.DIRECTORY,
    stat.S_IFLNK: FileKind.SYMLINK,
    stat.S_IFIFO: FileKind.FIFO,
    stat.S_IFSOCK: FileKind.SOCKET,
    stat.S_IFCHR: FileKind.CHARACTER,
    stat.S_IFBLK: FileKind.BLOCK,
}


@dataclass(frozen=True, slots=True)
class Put:
    """Create the entry, or change it in place; data and holes that follow belong to it."""

    meta: FileMeta


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes of the last entry put; the view is valid until the next change is asked for."""

    offset: int
    view: memoryview


@dataclass(frozen=True, slots=True)
class Hole:
    """A part of the last entry put that reads as zeros."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Delete:
    """An entry that is gone, with everything beneath it."""

    path: str


type Change = Put | Data | Hole | Delete
type Changes = Generator[Change]


@dataclass(frozen=True, slots=True)
class Mapped:
    """Files mapped shared: their pages are written without any call, so their times tell nothing (mmap(2)).

    By inode number and by last name, for either may be all that the container's view of a file and ours have in
    common; taking a file too many only costs reading it.
    """

    inodes: frozenset[int] = frozenset()
    names: frozenset[str] = frozenset()

    def has(self, inode: int, path: str) -> bool:
        """Tell whether this may be such a file."""
        return inode in self.inodes or path.rpartition("/")[2] in self.names


def mapped_files(mappings: Iterable[Vma]) -> Mapped:
    """Pick the files out of the mappings of a container's processes."""
    shared = [vma for vma in mappings if not vma.private and vma.inode]
    names = (vma.path.removesuffix(" (deleted)").rpartition("/")[2] for vma in shared)
    return Mapped(frozenset(vma.inode for vma in shared), frozenset(names))


def never() -> bool:
    """Do not stop."""
    return False


type _Key = tuple[int, FileKind, int, str]  # inode, kind, device number, target of a symbolic link


@dataclass(slots=True)
class _Node:
    """An inode as the receiver has it. A directory goes by its path alone and has no key."""

    key: _Key | None = None
    paths: set[str] = field(default_factory=set)
    meta: FileMeta | None = None  # as last put; its path does not count
    times: tuple[int, int, int] | None = None  # size, mtime, ctime before it was read; None: look at it again
    looked_at: int = 0  # number of the pass
    digests: Digests | Unknown = field(default_factory=Digests)


class _Model:
    """The receiver's tree as it will be once it has applied all changes so far."""

    def __init__(self) -> None:
        self.nodes = {"": _Node()}
        self.inodes: dict[_Key, _Node] = {}

    def add(self, path: str, node: _Node) -> _Node:
        self.nodes[path] = node
        node.paths.add(path)
        if node.key is not None:
            self.inodes[node.key] = node
        return node

    def forget(self, path: str) -> None:
        """Nothing is at this path any more, nor beneath it."""
        node = self.nodes.get(path)
        if node is None:
            return
        self._drop(path)
        if node.key is None:
            for below in [other for other in self.nodes if other.startswith(path + "/")]:
                self._drop(below)

    def _drop(self, path: str) -> None:
        node = self.nodes.pop(path)
        node.paths.discard(path)
        if node.key is not None and not node.paths:
            del self.inodes[node.key]


class SourceTree:
    """One tree, compared in passes with what earlier passes sent.

    Every change must reach the receiver, in order. A pass while the container runs may see files half written; one
    while nothing runs makes the receiver's tree equal, provided `mapped` names the files that are mapped shared.
    """

    def __init__(self, name: str, root: Path, *, once: bool = False) -> None:
        """`once`: it is hardly ever looked at again, so that comparing contents is not worth it."""
        self.name = name
        self.root = root
        self.once = once
        self._model = _Model()
        self._passes = 0

    @property
    def entries(self) -> int:
        """Count what the receiver has, the root left out."""
        return len(self._model.nodes) - 1

    def changes(self, buffer: memoryview, mapped: Mapped, stop: Callable[[], bool] = never) -> Changes:
        """Yield what differs from the receiver's tree.

        `buffer`: to read into, a multiple of 64 KiB. When `stop` tells so the pass ends early, and the next one
        finds the rest. Raises GiveUp for what cannot be moved (another file system inside the tree, too deep or too
        long names), and OSError.
        """
        self._passes += 1
        return _Pass(self, self._model, number=self._passes, buffer=buffer, mapped=mapped, stop=stop).run()


class _Pass:
    """One walk over a tree."""

    def __init__(
        self,
        tree: SourceTree,
        model: _Model,
        *,
        number: int,
        buffer: memoryview,
        mapped: Mapped,
        stop: Callable[[], bool],
    ) -> None:
        self._tree = tree
        self._model = model
        self._number = number
        self._buffer = buffer
        self._mapped = mapped
        self._stop = stop
        self._settled = _file_clock() - _TICK_NS
        self._device = -1
        self._seen = {""}
        self._touched: set[str] = set()  # directories in which the receiver has made or removed something
        self._directories: list[tuple[_Node, FileMeta, tuple[int, int, int] | None]] = []

    def run(self) -> Changes:
        root = os.open(self._tree.root, _DIRECTORY)
        try:
            self._device = os.fstat(root).st_dev
            yield from self._directory(root, "")
        finally:
            os.close(root)
        if self._stop():
            return  # what was not seen is not gone
        for path in sorted(self._model.nodes.keys() - self._seen):
            if path in self._model.nodes:  # else it went with its directory
                self._clear(path)
                yield Delete(path)
        # Children first: making and removing them has changed the times of their parents.
        for node, meta, times in reversed(self._directories):
            if self._model.nodes.get(meta.path) is not node:
                continue  # it went while we looked at it
            if meta.path in self._touched or not _same(node.meta, meta):
                node.meta = meta
                yield Put(meta)
            node.times = times

    def _directory(self, fd: int, path: str) -> Iterator[Change]:
        info = os.fstat(fd)
        node = self._model.nodes.get(path)
        if node is None or node.key is not None:
            self._clear(path)
            node = self._model.add(path, _Node())
            yield Put(self._meta(path, info, fd, fresh=True))
        if node.meta is None or self._may_differ(node, info, path):
            self._directories.append((node, self._meta(path, info, fd), self._times(info)))
        else:
            self._directories.append((node, node.meta, node.times))
        with os.scandir(fd) as entries:
            for entry in entries:
                if self._stop():
                    return
                yield from self._entry(fd, entry.name, f"{path}/{entry.name}" if path else entry.name)

    def _entry(self, parent: int, name: str, path: str) -> Iterator[Change]:
        if path.count("/") >= MAX_DEPTH or len(os.fsencode(path)) > _PATH_MAX:
            raise GiveUp(f"tree '{self._tree.name}': {path[:80]!a}... is too deep or too long a name to be moved")
        try:
            info = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if info.st_dev != self._device:
                raise GiveUp(f"tree '{self._tree.name}': another file system is mounted at {path!a}; unmount it")
            yield from self._known_kind(parent, name, path, info)
        except OSError as error:
            if error.errno not in _REPLACED:
                raise
            return  # renamed or removed under our eyes; the next pass sees what became of it
        self._seen.add(path)

    def _known_kind(self, parent: int, name: str, path: str, info: os.stat_result) -> Iterator[Change]:
        kind = KINDS[stat.S_IFMT(info.st_mode)]
        if kind is FileKind.DIRECTORY:
            fd = os.open(name, _DIRECTORY, dir_fd=parent)
            try:
                yield from self._directory(fd, path)
            finally:
                os.close(fd)
            return
        target = os.readlink(name, dir_fd=parent) if kind is FileKind.SYMLINK else ""
        node = self._model.inodes.get((info.st_ino, kind, info.st_rdev, target))
        if node is not None and path in node.paths and not self._may_differ(node, info, path):
            return
        if kind is FileKind.FILE:
            fd = os.open(name, _FILE, dir_fd=parent)
            try:
                yield from self._file(fd, path)
            finally:
                os.close(fd)
        else:
            yield from self._special(f"/proc/self/fd/{parent}/{name}", path, info, target)

    def _special(self, place: str, path: str, info: os.stat_result, target: str) -> Iterator[Change]:
        meta = self._meta(path, info, place, target=target)
        node = yield from self._place(path, (info.st_ino, meta.kind, info.st_rdev, target), meta)
        if not _same(node.meta, meta):
            node.meta = meta
            yield Put(meta)
        node.times = self._times(info)

    def _file(self, fd: int, path: str) -> Iterator[Change]:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            return  # replaced; the next pass sees it
        meta = self._meta(path, info, fd)
        node = yield from self._place(path, (info.st_ino, FileKind.FILE, 0, ""), meta)
        if node.looked_at == self._number:
            return  # under another of its names
        node.looked_at, node.times = self._number, None
        opened = node.meta is meta
        for change in self._content(fd, node, info.st_size):
            if not opened:
                yield Put(meta)
                node.meta, opened = meta, True
            yield change
        if not opened and not _same(node.meta, meta):
            node.meta = meta
            yield Put(meta)
        if not self._stop():
            node.times = self._times(info)

    def _place(self, path: str, key: _Key, meta: FileMeta) -> Generator[Change, None, _Node]:
        """Make sure that this inode is at this path of the receiver's tree: anew, as a further link, or already."""
        node = self._model.inodes.get(key)
        if node is not None and path in node.paths:
            return node
        self._clear(path)
        node = self._model.inodes.get(key)
        if node is not None:
            other = min(node.paths)
            self._model.add(path, node)
            yield Put(replace(meta, fresh=True, link=other))
            return node
        digests = Unknown() if self._tree.once else Digests()
        node = self._model.add(path, _Node(key, meta=meta, digests=digests))
        yield Put(replace(meta, fresh=True))
        return node

    def _clear(self, path: str) -> None:
        """The receiver is about to remove what it has at this path."""
        self._model.forget(path)
        self._touched.add(path.rpartition("/")[0])

    def _may_differ(self, node: _Node, info: os.stat_result, path: str) -> bool:
        times = (info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        return node.times != times or self._mapped.has(info.st_ino, path)

    def _times(self, info: os.stat_result) -> tuple[int, int, int] | None:
        """Return the times to know it by; None when it could still change within the same tick of the clock."""
        if max(info.st_ctime_ns, info.st_mtime_ns) >= self._settled:
            return None
        return info.st_size, info.st_mtime_ns, info.st_ctime_ns

    def _meta(
        self, path: str, info: os.stat_result, place: int | str, *, fresh: bool = False, target: str = ""
    ) -> FileMeta:
        kind = KINDS[stat.S_IFMT(info.st_mode)]
        device = kind in {FileKind.CHARACTER, FileKind.BLOCK}
        return FileMeta(
            tree=self._tree.name,
            path=path,
            kind=kind,
            fresh=fresh,
            mode=stat.S_IMODE(info.st_mode),
            uid=info.st_uid,
            gid=info.st_gid,
            mtime_ns=info.st_mtime_ns,
            size=info.st_size if kind is FileKind.FILE else 0,
            device=(os.major(info.st_rdev), os.minor(info.st_rdev)) if device else (0, 0),
            target=target,
            xattrs=_xattrs(place),
        )

    def _content(self, fd: int, node: _Node, size: int) -> Iterator[Data | Hole]:
        """Yield what differs from the receiver's copy; what it has beyond `size` is cut off by the Put before."""
        blocks = -(-size // BLOCK)
        node.digests.cut(blocks)
        position = 0
        while position < size:
            start = _next_data(fd, position, size) // BLOCK * BLOCK
            if start > position:
                yield from _holes(node.digests.clear(position // BLOCK, -(-start // BLOCK)), size)
                position = start
                continue
            if self._stop():
                return
            view = self._buffer[: min(len(self._buffer), size - position)]
            _read(fd, view, position)
            yield from _compare(node.digests, view, position)
            position += len(view)


def _same(old: FileMeta | None, new: FileMeta) -> bool:
    return old is not None and replace(old, path="", fresh=False, link="") == replace(new, path="", fresh=False)


def _compare(digests: Digests | Unknown, view: memoryview, position: int) -> Iterator[Data | Hole]:
    """Yield the blocks of a view that changed, neighbours together."""
    data = hole = 0  # bytes of either kind right before the block
    for at in range(0, len(view), BLOCK):
        block = view[at : at + BLOCK]
        changed, zeros = digests.update((position + at) // BLOCK, block)
        if data and not (changed and not zeros):
            yield Data(position + at - data, view[at - data : at])
            data = 0
        if hole and not (changed and zeros):
            yield Hole(position + at - hole, hole)
            hole = 0
        if changed and zeros:
            hole += len(block)
        elif changed:
            data += len(block)
    end = len(view)
    if data:
        yield Data(position + end - data, view[end - data :])
    if hole:
        yield Hole(position + end - hole, hole)


def _holes(blocks: Iterable[int], size: int) -> Iterator[Hole]:
    for block in blocks:
        yield Hole(block * BLOCK, min(BLOCK, size - block * BLOCK))


def _next_data(fd: int, position: int, size: int) -> int:
    try:
        return min(size, os.lseek(fd, position, os.SEEK_DATA))
    except OSError as error:
        if error.errno == errno.ENXIO:  # a hole up to the end
            return -(-size // BLOCK) * BLOCK
        raise


def _read(fd: int, view: memoryview, position: int) -> None:
    """Fill a view; what has been cut off meanwhile reads as zeros."""
    while view:
        count = os.preadv(fd, [view], position)
        if not count:
            view[:] = bytes(len(view))
            return
        view, position = view[count:], position + count


def _xattrs(place: int | str) -> dict[str, bytes]:
    follow = isinstance(place, int)
    result = {}
    try:
        for name in os.listxattr(place, follow_symlinks=follow):
            if name.startswith(XATTR_SPACES) and name not in LOCAL_XATTRS:
                result[name] = os.getxattr(place, name, follow_symlinks=follow)
    except OSError as error:
        if error.errno not in {errno.ENOTSUP, errno.ENODATA}:  # no such thing here; removed while we looked
            raise
    return result


def _file_clock() -> int:
    """Read the clock that stamps files, in ns: off a new file, which is exact where the wall clock is not."""
    fd = os.memfd_create("clock", os.MFD_CLOEXEC)
    try:
        return os.fstat(fd).st_ctime_ns
    finally:
        os.close(fd)
