import itertools
import mmap
import os
import random
import socket
import stat
import subprocess
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criu_transfer.digests import BLOCK, Digests
from criu_transfer.errors import GiveUp
from criu_transfer.files import Data, Delete, Hole, Mapped, Put, SourceTree, mapped_files
from criu_transfer.filesink import Budget, TargetTree
from criu_transfer.maps import read_maps
from criu_transfer.messages import FileMeta

SPARSE = 80 << 20
NOTHING_MAPPED = Mapped()


class Pair:
    """A tree, its copy, and what travels between them."""

    def __init__(self, folder: Path) -> None:
        self.source, self.target = folder / "source", folder / "target"
        self.source.mkdir()
        self.target.mkdir()
        self.tree = SourceTree("t", self.source)
        self.budget = Budget(1 << 30, 10_000)
        self.sink = TargetTree(self.target, self.budget)
        self.numbers = itertools.count(1)

    def sync(self, mapped: Mapped = NOTHING_MAPPED, stop=lambda: False, between=lambda: None) -> list:
        """Run one pass; returns its changes, data as (offset, length)."""
        log, number = [], 0
        with closing(self.tree.changes(memoryview(bytearray(4 * BLOCK)), mapped, stop)) as changes:
            for change in changes:
                between()
                match change:
                    case Put(meta):
                        number = next(self.numbers)
                        self.sink.put(number, FileMeta.decode(meta.encode()))
                        log.append(("put", meta.path, meta.link) if meta.fresh else ("set", meta.path))
                    case Data(offset, view):
                        self.sink.data(number, offset, view)
                        log.append((offset, len(view)))
                    case Hole(offset, length):
                        self.sink.hole(number, offset, length)
                        log.append(("hole", offset, length))
                    case Delete(path):
                        self.sink.delete(path)
                        log.append(("delete", path))
        self.sink.finish()
        return log


@pytest.fixture
def pair(tmp_path):
    pair = Pair(tmp_path)
    yield pair
    pair.sink.close()


@pytest.fixture
def calm(monkeypatch):
    """Take every file's times for settled, as they are 50 ms after the last write."""
    monkeypatch.setattr("criu_transfer.files._TICK_NS", -(1 << 60))


def picture(root: Path) -> dict[str, tuple]:
    """Describe a tree completely; hard links by the first path of their inode."""
    found, inodes = {}, {}
    for path in [root, *sorted(root.rglob("*"))]:
        info, name = path.lstat(), str(path.relative_to(root))
        content = None
        if stat.S_ISREG(info.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(info.st_mode):
            content = str(path.readlink())
        xattrs = {n: os.getxattr(path, n, follow_symlinks=False) for n in os.listxattr(path, follow_symlinks=False)}
        first = inodes.setdefault(info.st_ino, name)
        owner = (info.st_mode, info.st_uid, info.st_gid, info.st_mtime_ns, info.st_rdev)
        found[name] = (first, owner, content, xattrs)
    return found


def assert_equal(pair: Pair) -> None:
    assert picture(pair.target) == picture(pair.source)


def rich(root: Path) -> None:
    """Make one of everything."""
    (root / "etc/deep").mkdir(parents=True)
    (root / "etc/deep/file").write_bytes(b"content")
    (root / "etc/empty").touch(mode=0o640)
    (root / "big").write_bytes(random.Random(1).randbytes(3 * BLOCK + 5))
    os.link(root / "big", root / "etc/big-too")
    (root / "link").symlink_to("../../outside")
    os.mkfifo(root / "fifo", 0o622)
    os.mknod(root / "whiteout", stat.S_IFCHR | 0o600, os.makedev(0, 0))
    os.link(root / "whiteout", root / "etc/whiteout-too")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(root / "socket"))
    (root / os.fsdecode(b"caf\xe9 \n")).write_text("odd name")
    os.setxattr(root / "etc", "trusted.overlay.opaque", b"y")
    os.setxattr(root / "big", "user.color", b"\0\xff")
    os.chown(root / "etc/empty", 1000, 1001)
    os.chown(root / "link", 12, 13, follow_symlinks=False)
    (root / "etc/suid").write_text("x")
    os.chown(root / "etc/suid", 5, 5)
    (root / "etc/suid").chmod(0o6755)
    (root / "etc/deep").chmod(0o2500)
    with (root / "sparse").open("wb") as file:
        file.truncate(SPARSE)
        file.seek(SPARSE - 9 * BLOCK)
        file.write(b"in the middle")


def test_everything_arrives_in_one_pass(pair) -> None:
    rich(pair.source)
    pair.sync()
    assert_equal(pair)
    assert (pair.target / "sparse").stat().st_blocks < 1000
    assert pair.tree.entries == pair.budget.entries == len(list(pair.source.rglob("*")))


def test_nothing_travels_twice(pair, calm) -> None:
    rich(pair.source)
    pair.sync()
    assert pair.sync() == []


def test_attributes_that_mean_something_on_one_node_only_stay_there(pair) -> None:
    os.setxattr(pair.source, "trusted.overlay.origin", b"handle of a lower inode")
    os.setxattr(pair.source, "trusted.overlay.opaque", b"y")
    os.setxattr(pair.target, "trusted.overlay.origin", b"mine")
    pair.sync()
    assert {name: os.getxattr(pair.target, name) for name in os.listxattr(pair.target)} == {
        "trusted.overlay.opaque": b"y",
        "trusted.overlay.origin": b"mine",
    }


def test_only_changed_blocks_travel(pair, calm) -> None:
    path = pair.source / "file"
    path.write_bytes(random.Random(2).randbytes(20 * BLOCK))
    pair.sync()
    with path.open("r+b") as file:
        file.seek(5 * BLOCK + 7)
        file.write(b"x")
        file.seek(6 * BLOCK)
        file.write(b"y")
        file.seek(11 * BLOCK)
        file.write(bytes(BLOCK))
    assert pair.sync() == [("set", "file"), (5 * BLOCK, 2 * BLOCK), ("hole", 11 * BLOCK, BLOCK)]
    assert_equal(pair)


def change_mode(root: Path) -> None:
    (root / "etc/empty").chmod(0o700)


def change_kind(root: Path) -> None:
    (root / "fifo").unlink()
    (root / "fifo").write_text("a file now")


def file_to_directory(root: Path) -> None:
    (root / "big").unlink()
    (root / "big").mkdir()
    (root / "big/inner").write_text("x")


def directory_to_file(root: Path) -> None:
    subprocess.run(["rm", "-r", root / "etc"], check=True)
    (root / "etc").write_text("x")


def swap(root: Path) -> None:
    (root / "etc/empty").rename(root / "tmp")
    (root / "big").rename(root / "etc/empty")
    (root / "tmp").rename(root / "big")


def relink(root: Path) -> None:
    (root / "link").unlink()
    (root / "link").symlink_to("elsewhere")


def clear_attribute(root: Path) -> None:
    os.removexattr(root / "etc", "trusted.overlay.opaque")


def break_link(root: Path) -> None:
    (root / "etc/big-too").unlink()
    (root / "etc/big-too").write_text("on my own")


def truncate(root: Path) -> None:
    os.truncate(root / "big", BLOCK + 3)


def truncate_and_grow(root: Path) -> None:
    os.truncate(root / "big", 10)
    os.truncate(root / "big", 4 * BLOCK)


def punch(root: Path) -> None:
    os.truncate(root / "sparse", 0)
    os.truncate(root / "sparse", SPARSE)


def delete_all(root: Path) -> None:
    for path in root.iterdir():
        subprocess.run(["rm", "-rf", path], check=True)


def rename_directory(root: Path) -> None:
    (root / "etc").rename(root / "usr")


def replace_directory(root: Path) -> None:
    (root / "etc").rename(root / "old")
    (root / "etc").mkdir()
    (root / "old/deep").rename(root / "etc/deep")


def device(root: Path) -> None:
    (root / "whiteout").unlink()
    os.mknod(root / "whiteout", stat.S_IFCHR | 0o644, os.makedev(1, 3))


def inner_file_replaces_directory(root: Path) -> None:
    (root / "etc/suid").rename(root / "tmp")
    subprocess.run(["rm", "-r", root / "etc"], check=True)
    (root / "tmp").rename(root / "etc")


def new_file_under_an_old_time(root: Path) -> None:
    times = (root / "etc").stat().st_mtime_ns
    (root / "etc/new").touch()
    os.utime(root / "etc", ns=(times, times))


CHANGES = [
    inner_file_replaces_directory,
    new_file_under_an_old_time,
    change_mode,
    change_kind,
    file_to_directory,
    directory_to_file,
    swap,
    relink,
    clear_attribute,
    break_link,
    truncate,
    truncate_and_grow,
    punch,
    delete_all,
    rename_directory,
    replace_directory,
    device,
]


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_arrives_with_the_next_pass(pair, calm, change) -> None:
    rich(pair.source)
    pair.sync()
    change(pair.source)
    pair.sync()
    assert_equal(pair)
    assert pair.tree.entries == pair.budget.entries
    assert pair.sync() == []


@pytest.mark.parametrize("change", CHANGES)
def test_a_tree_that_is_sent_without_digests_is_equal_too(pair, change) -> None:
    pair.tree = SourceTree("t", pair.source, once=True)
    rich(pair.source)
    pair.sync()
    change(pair.source)
    pair.sync()
    assert_equal(pair)


def test_what_was_cut_off_travels_again_when_it_comes_back(pair, calm) -> None:
    path, content = pair.source / "file", random.Random(5).randbytes(3 * BLOCK)
    for step in (content, content[:BLOCK], content):
        path.write_bytes(step)
        pair.sync()
        assert_equal(pair)


def test_a_name_listed_twice_as_two_different_things(pair, monkeypatch) -> None:
    """A directory is read while its entries come and go: the kernel may list a name that was replaced once more."""
    (pair.source / "name").mkdir()
    listed = os.scandir

    @contextmanager
    def twice(fd):
        with listed(fd) as entries:
            found = list(entries)
        yield replaced_between(found)

    def replaced_between(found):
        yield from found
        for entry in found:
            (pair.source / entry.name).rmdir()
            (pair.source / entry.name).write_text("a file now")
            yield entry

    monkeypatch.setattr("criu_transfer.files.os.scandir", twice)
    pair.sync()
    monkeypatch.undo()
    pair.sync()
    assert_equal(pair)


def test_renamed_and_linked_files_do_not_travel_again(pair) -> None:
    rich(pair.source)
    pair.sync()
    rename_directory(pair.source)
    os.link(pair.source / "big", pair.source / "more")
    assert not [entry for entry in pair.sync() if isinstance(entry[0], int)]
    assert_equal(pair)


@given(st.lists(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 7), st.integers(0, 7)), max_size=6), max_size=4))
def test_any_history_ends_in_equal_trees(tmp_path_factory, rounds) -> None:
    pair = Pair(tmp_path_factory.mktemp("history"))
    names = ["a", "b", "d/a", "d/b", "d/e/a", "c", "d", "d/e"]
    for number, actions in enumerate(rounds):
        for action, first, second in actions:
            act(pair.source, action, names[first], names[second], number)
        pair.sync()
        assert_equal(pair)
        assert pair.tree.entries == pair.budget.entries
    pair.sink.close()


def act(root: Path, action: int, name: str, other: str, number: int) -> None:
    path, second = root / name, root / other
    try:
        match action:
            case 0 | 1:
                with path.open("r+b" if path.exists() else "wb") as file:
                    file.seek(number * BLOCK)
                    file.write(f"{name} {number}".encode())
            case 2:
                subprocess.run(["rm", "-rf", path], check=True)
            case 3:
                path.mkdir()
            case 4:
                path.rename(second)
            case 5:
                os.link(path, second)
            case 6:
                os.truncate(path, number * 1000)
    except OSError:
        pass  # what the file system refuses is no history


def test_writes_within_one_tick_of_the_clock_are_seen(pair) -> None:
    path = pair.source / "file"
    path.write_bytes(b"one")
    info = path.stat()
    pair.sync()
    path.write_bytes(b"two")
    os.utime(path, ns=(info.st_mtime_ns, info.st_mtime_ns))
    pair.tree._model.nodes["file"].times = None if pair.tree._model.nodes["file"].times is None else (1, 1, 1)
    assert pair.tree._model.nodes["file"].times is None  # just written: its times are not trusted
    pair.sync()
    assert_equal(pair)


def test_files_mapped_shared_are_read_although_their_times_stand_still(pair, calm) -> None:
    path = pair.source / "db"
    path.write_bytes(b"a" * BLOCK)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[0] = ord("x")
        pair.sync()
        before = path.stat()
        memory[1] = ord("y")
        assert path.stat().st_mtime_ns == before.st_mtime_ns
        assert pair.sync() == []  # this is why `mapped` must be told
        mapped = mapped_files(read_maps(os.getpid()))
        assert mapped.has(path.stat().st_ino, "other") or mapped.has(0, "some/where/db")
        assert pair.sync(mapped) == [("set", "db"), (0, BLOCK)]
    assert_equal(pair)


def test_a_stopped_pass_deletes_nothing_and_the_next_one_finds_the_rest(pair, calm) -> None:
    rich(pair.source)
    pair.sync()
    (pair.source / "big").write_bytes(random.Random(3).randbytes(9 * BLOCK))
    (pair.source / "fifo").unlink()
    assert pair.sync(stop=lambda: True) == []
    asked = itertools.count()
    assert not [entry for entry in pair.sync(stop=lambda: next(asked) > 5) if entry[0] == "delete"]
    pair.sync()
    assert_equal(pair)


def test_a_tree_that_changes_under_our_eyes_is_right_after_a_pass_in_peace(pair) -> None:
    rich(pair.source)
    disturbances = iter(
        [
            (pair.source / "etc/deep/file").unlink,
            lambda: os.truncate(pair.source / "big", 10),
            lambda: (pair.source / "etc/deep").rename(pair.source / "moved"),
            lambda: (pair.source / "late").write_text("late"),
            (pair.source / "fifo").unlink,
            lambda: (pair.source / "etc").rename(pair.source / "usr"),
        ]
    )

    def disturb() -> None:
        for disturbance in itertools.islice(disturbances, 1):
            disturbance()

    pair.sync(between=disturb)
    pair.sync()
    assert_equal(pair)


def test_a_symbolic_link_swapped_in_is_not_followed(pair, tmp_path, monkeypatch) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (pair.source / "dir").mkdir()
    (pair.source / "file").write_text("x")

    look = os.stat

    def look_and_swap(name, **options):
        """Let the container swap the entry right after it was looked at."""
        info = look(name, **options)
        if name in {"dir", "file"} and not stat.S_ISLNK(info.st_mode):
            (pair.source / name).rename(pair.source / f"was-{name}")
            (pair.source / name).symlink_to(outside if name == "dir" else outside / "secret")
        return info

    monkeypatch.setattr("criu_transfer.files.os.stat", look_and_swap)
    pair.sync()
    monkeypatch.undo()
    assert not any(b"secret" in p.read_bytes() for p in pair.target.rglob("*") if p.is_file() and not p.is_symlink())
    pair.sync()
    assert_equal(pair)


def test_what_cannot_be_moved_is_said(pair) -> None:
    deep = pair.source.joinpath(*["d"] * 258)
    deep.mkdir(parents=True)
    with pytest.raises(GiveUp, match="too deep"):
        pair.sync()


@pytest.mark.kernel
def test_another_file_system_in_the_tree_is_said(pair) -> None:
    (pair.source / "mnt").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", pair.source / "mnt"], check=True)
    try:
        with pytest.raises(GiveUp, match="another file system is mounted at 'mnt'"):
            pair.sync()
    finally:
        subprocess.run(["umount", pair.source / "mnt"], check=True)


@given(st.lists(st.tuples(st.integers(0, 3000), st.sampled_from([b"", b"a", b"b"])), max_size=30))
def test_digests_equal_a_plain_model(steps) -> None:
    digests, model = Digests(), {}
    for block, letter in steps:
        content = memoryview(letter * 100 or bytes(100))
        assert digests.update(block, content) == (model.get(block, b"") != letter, not letter)
        model[block] = letter
    digests.cut(1500)
    assert list(digests.clear(0, 4000)) == sorted(block for block, letter in model.items() if letter and block < 1500)
    assert list(digests.clear(0, 4000)) == []
