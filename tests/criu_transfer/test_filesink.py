from pathlib import Path

import pytest

from criu_transfer.digests import BLOCK
from criu_transfer.errors import ProtocolError, StoreFull
from criu_transfer.filesink import Budget, TargetTree, TargetTrees
from criu_transfer.messages import FileDelete, FileKind, FileMeta


@pytest.fixture
def budget() -> Budget:
    return Budget(1 << 30, 10_000)


@pytest.fixture
def sink(tmp_path, budget):
    (tmp_path / "target").mkdir()
    sink = TargetTree(tmp_path / "target", budget)
    yield sink
    sink.close()


def picture(folder: Path) -> dict[str, tuple]:
    """Describe what lies beside the tree, the folder itself included."""
    paths = [folder, *(path for path in folder.iterdir() if path.name != "target")]
    return {str(path): (path.lstat().st_mode, path.lstat().st_ctime_ns) for path in paths}


def meta(path: str, kind: FileKind = FileKind.FILE, *, fresh: bool = True, **fields) -> FileMeta:
    values = {"mode": 0o600, "uid": 0, "gid": 0, "mtime_ns": 0} | fields
    return FileMeta("t", path, kind, fresh, **values)


@pytest.fixture
def outside(sink, tmp_path) -> Path:
    (tmp_path / "victim").write_text("untouched")
    sink.put(1, meta("up", FileKind.SYMLINK, target=".."))
    sink.put(2, meta("victim", FileKind.SYMLINK, target="../victim"))
    return tmp_path


@pytest.mark.parametrize(
    "lie",
    [
        lambda sink: sink.put(3, meta("up/new", size=3)),
        lambda sink: sink.put(3, meta("up/victim", fresh=False, size=3)),
        lambda sink: sink.put(3, meta("up/new", FileKind.DIRECTORY)),
        lambda sink: sink.put(3, meta("up", FileKind.DIRECTORY, fresh=False, mode=0o777)),
        lambda sink: sink.put(3, meta("victim", fresh=False, size=3)),
        lambda sink: sink.put(3, meta("here", link="up/victim")),
        lambda sink: sink.delete("up/victim"),
        lambda sink: sink.put(3, meta("up/dev", FileKind.CHARACTER, device=(1, 3))),
        lambda sink: sink.put(3, meta("missing/new", size=3)),
        lambda sink: sink.put(3, meta("missing", fresh=False, size=3)),
        lambda sink: sink.delete("missing"),
        lambda sink: sink.put(3, meta("", FileKind.DIRECTORY)),
        lambda sink: sink.put(3, meta("", fresh=False)),
        lambda sink: sink.put(3, meta("here", fresh=False, link="victim")),
        lambda sink: sink.put(3, meta("victim", FileKind.FIFO, fresh=False)),
        lambda sink: sink.data(2, 0, memoryview(b"x")),
    ],
)
def test_nothing_outside_the_tree_can_be_reached(sink, outside, lie) -> None:
    before = picture(outside)
    with pytest.raises(ProtocolError):
        lie(sink)
    assert picture(outside) == before


@pytest.mark.parametrize("path", ["../new", "/new", "a/../../new", "a//b"])
def test_paths_that_climb_do_not_even_decode(path) -> None:
    with pytest.raises(ProtocolError):
        FileMeta.decode(meta(path).encode())
    with pytest.raises(ProtocolError):
        FileMeta.decode(meta("fine", link=path).encode())
    with pytest.raises(ProtocolError):
        FileDelete.decode(FileDelete("t", path).encode())


def test_data_must_fit_the_open_file(sink, budget) -> None:
    sink.put(7, meta("file", size=10))
    sink.data(7, 0, memoryview(b"x" * 10))
    for call in (
        lambda: sink.data(8, 0, memoryview(b"x")),
        lambda: sink.data(7, 1, memoryview(b"x" * 10)),
        lambda: sink.hole(7, 0, 11),
    ):
        with pytest.raises(ProtocolError):
            call()


def test_bytes_and_entries_are_limited(sink, budget) -> None:
    budget.max_bytes, budget.max_entries = 3 * BLOCK, 3
    sink.put(1, meta("sparse", size=1 << 40))
    for _ in range(3):
        sink.data(1, 0, memoryview(bytes(BLOCK)))
    with pytest.raises(StoreFull):
        sink.data(1, 0, memoryview(b"x"))
    sink.delete("sparse")
    budget.bytes = 0
    sink.put(2, meta("small", size=2 * BLOCK))
    for _ in range(9):
        sink.data(2, 0, memoryview(bytes(2 * BLOCK)))  # the same bytes again take no more room
    sink.put(3, meta("b"))
    sink.put(4, meta("c"))
    sink.put(4, meta("c"))
    with pytest.raises(StoreFull, match="more than 3"):
        sink.put(5, meta("d"))


def test_frames_name_the_tree(tmp_path) -> None:
    trees = TargetTrees({"t": tmp_path}, {"t": Budget(1 << 20, 10)})
    with pytest.raises(ProtocolError, match="no tree 'other'"):
        trees.delete(FileDelete("other", "x"))
    with pytest.raises(ProtocolError, match="not open"):
        trees.data(1, 0, memoryview(b"x"))
    trees.put(1, meta("file", size=1))
    trees.data(1, 0, memoryview(b"x"))
    trees.finish()
    assert (tmp_path / "file").read_bytes() == b"x"
    trees.close()
