"""What a source announces of a workload."""

from spotguard.parts import GROWTH_BYTES, announced

GIB = 1 << 30
MIB = 1 << 20


def test_room_to_grow_is_announced_and_images_as_large_as_memory() -> None:
    limits = announced(GIB, 4 * GIB, 256 * MIB)
    assert limits.max_memory == GIB * 3 // 2 + GROWTH_BYTES
    assert limits.max_images == limits.max_memory + 256 * MIB


def test_no_more_than_a_target_takes_is_announced_while_the_workload_fits() -> None:
    limits = announced(3 * GIB, 4 * GIB, 256 * MIB)
    assert (limits.max_memory, limits.max_images) == (4 * GIB, 4 * GIB)


def test_a_workload_that_cannot_fit_says_so_at_the_offer() -> None:
    limits = announced(5 * GIB, 4 * GIB, 256 * MIB)
    assert limits.max_memory == limits.max_images == 5 * GIB, "a target that takes 4 GiB refuses it at once"
