"""RangeSet against a plain set of integers."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criu_transfer.ranges import RangeSet

ranges = st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda t: (t[0], t[0] + t[1]))


@given(st.lists(st.tuples(st.booleans(), ranges)), ranges)
def test_behaves_like_a_set_of_integers(steps: list[tuple[bool, tuple[int, int]]], probe: tuple[int, int]) -> None:
    model: set[int] = set()
    subject = RangeSet()
    for add, (start, end) in steps:
        if add:
            subject.add(start, end)
            model.update(range(start, end))
        else:
            subject.discard(start, end)
            model.difference_update(range(start, end))
    spans = list(subject)
    assert [i for a, b in spans for i in range(a, b)] == sorted(model)
    assert all(b < c for (_, b), (c, _) in itertools.pairwise(spans)), "adjacent ranges are joined"
    assert subject.total == len(model)
    inside = [i for a, b in subject.overlap(*probe) for i in range(a, b)]
    outside = [i for a, b in subject.missing(*probe) for i in range(a, b)]
    assert inside == sorted(model & set(range(*probe)))
    assert outside == sorted(set(range(*probe)) - model)
    assert subject.covers(*probe) == (not outside)
    assert all((i in subject) == (i in model) for i in range(90))


def test_refuses_an_empty_range() -> None:
    with pytest.raises(ValueError, match="empty range"):
        RangeSet().add(5, 5)


def test_a_copy_is_independent() -> None:
    first = RangeSet([(0, 10)])
    second = first.copy()
    second.discard(2, 4)
    assert list(first) == [(0, 10)]
    assert list(second) == [(0, 2), (4, 10)]
