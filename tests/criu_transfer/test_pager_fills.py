"""What is missing where: the range bookkeeping against a model of single pages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criu_transfer.fills import LazyMap, Piece

PAGE = 4096
SPAN = 40

pages = st.integers(0, SPAN - 1)
lengths = st.integers(1, 12)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("drop"), pages, lengths, st.just(0)),
        st.tuples(st.just("move"), pages, lengths, st.integers(0, 2 * SPAN)),
        st.tuples(st.just("fill"), lengths, st.just(0), st.just(0)),
    ),
    max_size=25,
)
type Model = dict[int, int]
"""Page where the memory is missing, to page where its bytes lie."""


def model_of(made: LazyMap) -> Model:
    return {start // PAGE + n: offset // PAGE + n for start, end, offset in made for n in range((end - start) // PAGE)}


def ranges_of(missing: set[int]) -> list[tuple[int, int]]:
    return [(page * PAGE, (page + 1) * PAGE) for page in sorted(missing)]


def assert_sound(made: LazyMap) -> None:
    last = 0
    for start, end, _ in made:
        assert last <= start < end
        last = end
    assert made.total == len(model_of(made)) * PAGE
    assert bool(made) == bool(made.total)


@given(st.sets(pages), steps)
def test_any_order_of_events_leaves_missing_what_a_model_says(
    missing: set[int], steps: list[tuple[str, int, int, int]]
) -> None:
    made = LazyMap(ranges_of(missing))
    model: Model = {page: page for page in missing}
    for kind, at, length, to in steps:
        if kind == "fill":
            if made:
                start, end, offset = made.last()
                low = max(start, end - at * PAGE)
                assert model[low // PAGE] == (offset + low - start) // PAGE
                made.discard(low, end)
                for page in range(low // PAGE, end // PAGE):
                    del model[page]
            continue
        gone = {page: model.pop(page) for page in range(at, at + length) if page in model}
        if kind == "drop":
            taken = made.discard(at * PAGE, (at + length) * PAGE)
            assert sum(piece.end - piece.start for piece in taken) == len(gone) * PAGE
        elif kind == "move":
            for page in range(to, to + length):
                model.pop(page, None)
            model |= {page - at + to: offset for page, offset in gone.items()}
            made.move(at * PAGE, to * PAGE, length * PAGE)
        assert_sound(made)
        assert model_of(made) == model
    for page in range(3 * SPAN):
        found = made.find(page * PAGE + 5)
        assert (found is not None) == (page in model)
        if found:
            assert (found.offset + page * PAGE - found.start) // PAGE == model[page]


@given(st.sets(pages), steps)
def test_a_fork_copies_and_a_copy_lives_on_its_own(missing: set[int], steps: list[tuple[str, int, int, int]]) -> None:
    made = LazyMap(ranges_of(missing))
    child = made.copy()
    for kind, at, length, to in steps:
        if kind == "move":
            child.move(at * PAGE, to * PAGE, length * PAGE)
        else:
            child.discard(at * PAGE, (at + length) * PAGE)
    assert model_of(made) == {page: page for page in missing}


@given(st.sets(pages), pages, lengths, st.integers(0, 2 * SPAN))
def test_packing_loses_nothing(missing: set[int], at: int, length: int, to: int) -> None:
    made = LazyMap(ranges_of(missing))
    made.move(at * PAGE, to * PAGE, length * PAGE)
    again = LazyMap.unpack(made.pack())
    assert list(again) == list(made)
    assert sorted(again.offsets()) == sorted((offset, offset + end - start) for start, end, offset in made)


def test_a_packed_map_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="4 numbers"):
        LazyMap.unpack(bytes(32))


def test_a_piece_that_moved_still_names_its_first_place() -> None:
    made = LazyMap([(0x1000, 0x9000)])
    made.move(0x3000, 0x20000, 0x2000)
    assert list(made) == [Piece(0x1000, 0x3000, 0x1000), Piece(0x5000, 0x9000, 0x5000), Piece(0x20000, 0x22000, 0x3000)]
    assert made.find(0x21000) == Piece(0x20000, 0x22000, 0x3000)
    assert made.find(0x3000) is None
