"""Directory trees on the target: applies what the source sends, strictly beneath each tree's root.

The peer is not trusted with paths: every component is opened by itself, relative to the one before, and symbolic
links are never followed, so that nothing outside the roots can be reached whatever the frames say.
"""

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from criu_transfer.errors import ProtocolError, StoreFull
from criu_transfer.holes import punch_hole
from criu_transfer.messages import LOCAL_XATTRS, XATTR_SPACES, FileDelete, FileKind, FileMeta

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# What the kernel says when a path is not what the source thinks it is.
_LIES = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.EEXIST, errno.EXDEV, errno.ENXIO})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FORMATS = {
    FileKind.FIFO: stat.S_IFIFO,
    FileKind.SOCKET: stat.S_IFSOCK,
    FileKind.CHARACTER: stat.S_IFCHR,
    FileKind.BLOCK: stat.S_IFBLK,
}


@dataclass(slots=True)
class Budget:
    """What trees may take together. A file counts with the bytes written to it, at most with its size."""

    max_bytes: int
    max_entries: int
    bytes: int = 0
    entries: int = 0

    def add(self, count: int) -> None:
        """Count bytes; raises StoreFull when they are too many."""
        self.bytes += count
        if self.bytes > self.max_bytes:
            raise StoreFull(f"files pass the announced {self.max_bytes >> 20} MiB")

    def add_entry(self) -> None:
        """Count an entry; raises StoreFull when there are too many."""
        self.entries += 1
        if self.entries > self.max_entries:
            raise StoreFull(f"there are more than {self.max_entries} files")


@dataclass(slots=True)
class _Open:
    """The regular file that data comes for; its attributes are set when it is done, for writing changes them."""

    number: int
    fd: int
    meta: FileMeta
    inode: int


class TargetTree:
    """One tree. Raises ProtocolError for what the tree cannot be, StoreFull, and OSError."""

    def __init__(self, root: Path, budget: Budget) -> None:
        self._root = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._budget = budget
        self._written: dict[int, int] = {}  # bytes by inode
        self._open: _Open | None = None

    def put(self, number: int, meta: FileMeta) -> None:
        """Create an entry, or open one to be changed; data for it comes with the same `number`."""
        self.finish()
        with _refusing(meta.path):
            if not meta.path:
                self._root_attributes(meta)
                return
            with self._parent(meta.path) as (parent, name):
                self._put(parent, name, number, meta)

    def data(self, number: int, offset: int, content: memoryview) -> None:
        """Write into the open file."""
        opened = self._opened(number, offset + len(content))
        self._count(opened, len(content))
        with _refusing(opened.meta.path):
            while content:
                count = os.pwrite(opened.fd, content, offset)
                content, offset = content[count:], offset + count

    def hole(self, number: int, offset: int, length: int) -> None:
        """Make a part of the open file read as zeros."""
        opened = self._opened(number, offset + length)
        with _refusing(opened.meta.path):
            punch_hole(opened.fd, offset, length)

    def delete(self, path: str) -> None:
        """Remove an entry and all beneath it; one that is not there is an error, for the source knows what we have."""
        self.finish()
        with _refusing(path), self._parent(path) as (parent, name):
            self._remove(parent, name)

    def finish(self) -> None:
        """Give the open file its attributes and close it."""
        if self._open is None:
            return
        opened, self._open = self._open, None
        try:
            with _refusing(opened.meta.path):
                _set_attributes(opened.fd, opened.meta)
        finally:
            os.close(opened.fd)

    def close(self) -> None:
        """Close everything, whatever state it is in."""
        if self._open is not None:
            os.close(self._open.fd)
            self._open = None
        os.close(self._root)

    def _root_attributes(self, meta: FileMeta) -> None:
        if meta.kind is not FileKind.DIRECTORY or meta.fresh or meta.link:
            raise ProtocolError("the root of a tree is a directory that exists")
        _set_attributes(self._root, meta)

    def _put(self, parent: int, name: str, number: int, meta: FileMeta) -> None:
        if meta.fresh:
            self._remove(parent, name, must_exist=False)
            self._budget.add_entry()
        if meta.link:
            self._link(parent, name, meta)
        elif meta.kind is FileKind.FILE:
            self._open_file(parent, name, number, meta)
        elif meta.kind is FileKind.DIRECTORY:
            _put_directory(parent, name, meta)
        else:
            _put_special(parent, name, meta)

    def _link(self, parent: int, name: str, meta: FileMeta) -> None:
        if not meta.fresh:
            raise ProtocolError(f"{meta.path!a}: a link is always new")
        with self._parent(meta.link) as (other, other_name):
            os.link(other_name, name, src_dir_fd=other, dst_dir_fd=parent, follow_symlinks=False)

    def _open_file(self, parent: int, name: str, number: int, meta: FileMeta) -> None:
        flags = _FILE | (os.O_CREAT | os.O_EXCL if meta.fresh else 0)
        fd = os.open(name, flags, 0o600, dir_fd=parent)
        info = os.fstat(fd)
        self._open = _Open(number, fd, meta, info.st_ino)
        if not stat.S_ISREG(info.st_mode):
            raise ProtocolError(f"{meta.path!a} is no regular file here")
        written = self._written.get(info.st_ino, 0)
        if written > meta.size:
            self._budget.bytes -= written - meta.size
            self._written[info.st_ino] = meta.size
        if info.st_size != meta.size:
            os.ftruncate(fd, meta.size)

    def _opened(self, number: int, end: int) -> _Open:
        if self._open is None or self._open.number != number:
            raise ProtocolError(f"data for file {number}, which is not open")
        if end > self._open.meta.size:
            raise ProtocolError(f"data beyond the end of {self._open.meta.path!a}")
        return self._open

    def _count(self, opened: _Open, count: int) -> None:
        before = self._written.get(opened.inode, 0)
        now = min(opened.meta.size, before + count)
        self._budget.add(now - before)
        self._written[opened.inode] = now

    @contextmanager
    def _parent(self, path: str) -> Iterator[tuple[int, str]]:
        """Open the directory that holds `path`, component by component."""
        *parts, name = path.split("/")
        fd = os.dup(self._root)
        try:
            for part in parts:
                below = os.open(part, _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = below
            yield fd, name
        finally:
            os.close(fd)

    def _remove(self, parent: int, name: str, *, must_exist: bool = True) -> None:
        try:
            info = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            if must_exist:
                raise
            return
        if stat.S_ISDIR(info.st_mode):
            fd = os.open(name, _DIRECTORY, dir_fd=parent)
            try:
                with os.scandir(fd) as entries:
                    inner = [entry.name for entry in entries]
                for below in inner:
                    self._remove(fd, below)
            finally:
                os.close(fd)
            os.rmdir(name, dir_fd=parent)
        else:
            os.unlink(name, dir_fd=parent)
            if info.st_nlink == 1:
                self._budget.bytes -= self._written.pop(info.st_ino, 0)
        self._budget.entries -= 1


class TargetTrees:
    """All trees of one migration; frames name them."""

    def __init__(self, roots: Mapping[str, Path], budgets: Mapping[str, Budget]) -> None:
        self._trees = {name: TargetTree(root, budgets[name]) for name, root in roots.items()}
        self._current: TargetTree | None = None

    def put(self, number: int, meta: FileMeta) -> None:
        """See TargetTree."""
        self._switch(meta.tree).put(number, meta)

    def data(self, number: int, offset: int, content: memoryview) -> None:
        """See TargetTree."""
        self._opened(number).data(number, offset, content)

    def hole(self, number: int, offset: int, length: int) -> None:
        """See TargetTree."""
        self._opened(number).hole(number, offset, length)

    def delete(self, delete: FileDelete) -> None:
        """See TargetTree."""
        self._switch(delete.tree).delete(delete.path)

    def finish(self) -> None:
        """Complete the open file, if there is one: everything received so far is in place then."""
        if self._current is not None:
            self._current.finish()

    def close(self) -> None:
        """Close everything."""
        for tree in self._trees.values():
            tree.close()

    def _switch(self, name: str) -> TargetTree:
        tree = self._trees.get(name)
        if tree is None:
            raise ProtocolError(f"there is no tree {name!a}")
        if tree is not self._current:
            self.finish()
            self._current = tree
        return tree

    def _opened(self, number: int) -> TargetTree:
        if self._current is None:
            raise ProtocolError(f"data for file {number}, which is not open")
        return self._current


@contextmanager
def _refusing(path: str) -> Iterator[None]:
    """Turn what the kernel says of a lying or an excessive peer into our own errors."""
    try:
        yield
    except OSError as error:
        if error.errno in _LIES:
            raise ProtocolError(f"{path!a} is not as the source says: {error.strerror}") from error
        if error.errno in _FULL:
            raise StoreFull(f"no room for {path!a}: {error.strerror}") from error
        raise


def _put_directory(parent: int, name: str, meta: FileMeta) -> None:
    if meta.fresh:
        os.mkdir(name, 0o700, dir_fd=parent)
    fd = os.open(name, _DIRECTORY, dir_fd=parent)
    try:
        _set_attributes(fd, meta)
    finally:
        os.close(fd)


def _put_special(parent: int, name: str, meta: FileMeta) -> None:
    """Make a symbolic link, fifo, socket or device node, or change its attributes."""
    if meta.fresh and meta.kind is FileKind.SYMLINK:
        os.symlink(meta.target, name, dir_fd=parent)
    elif meta.fresh:
        os.mknod(name, _FORMATS[meta.kind] | 0o600, os.makedev(*meta.device), dir_fd=parent)
    else:
        mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
        if stat.S_IFMT(mode) != (_FORMATS.get(meta.kind) or stat.S_IFLNK):
            raise ProtocolError(f"{meta.path!a} is no {meta.kind} here")
    os.chown(name, meta.uid, meta.gid, dir_fd=parent, follow_symlinks=False)
    if meta.kind is not FileKind.SYMLINK:  # nobody else is in these trees: it is what we have just looked at
        os.chmod(name, meta.mode, dir_fd=parent)
    _set_xattrs(f"/proc/self/fd/{parent}/{name}", meta)
    os.utime(name, ns=(meta.mtime_ns, meta.mtime_ns), dir_fd=parent, follow_symlinks=False)


def _set_attributes(fd: int, meta: FileMeta) -> None:
    """Owner first, for it clears capabilities and set-uid bits; the time last."""
    os.fchown(fd, meta.uid, meta.gid)
    os.fchmod(fd, meta.mode)
    _set_xattrs(fd, meta)
    os.utime(fd, ns=(meta.mtime_ns, meta.mtime_ns))


def _set_xattrs(place: int | str, meta: FileMeta) -> None:
    follow = isinstance(place, int)
    try:
        present = os.listxattr(place, follow_symlinks=follow)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        present = []
    for name in present:
        if name not in meta.xattrs and name not in LOCAL_XATTRS and name.startswith(XATTR_SPACES):
            os.removexattr(place, name, follow_symlinks=follow)
    for name, value in meta.xattrs.items():
        os.setxattr(place, name, value, follow_symlinks=follow)
