"""What the receiver's copy of a file contains, as one digest for each block of 64 KiB."""

from collections.abc import Iterator
from hashlib import blake2b

BLOCK = 64 << 10
_SIZE = 16
_ZERO = bytes(_SIZE)  # stands for a block of zeros, which no digest equals
_SEGMENT = 1024  # blocks whose digests are kept together: holes of sparse files cost nothing
_ZERO_BLOCK = bytes(BLOCK)


class Unknown:
    """In the place of digests, for files that are sent once: nothing is known of the receiver's copy.

    A digest of each block costs as much as sending it, and pays only when the file is looked at again.
    """

    def update(self, _block: int, _content: memoryview) -> tuple[bool, bool]:
        """See Digests: everything counts as changed, and nothing is looked at."""
        return True, False

    def clear(self, first: int, last: int) -> Iterator[int]:
        """See Digests."""
        yield from range(first, last)

    def cut(self, blocks: int) -> None:
        """See Digests."""


class Digests:
    """Digests by number of block. A new file is all zeros, as the file that the receiver has just made is."""

    def __init__(self) -> None:
        self._segments: dict[int, bytearray] = {}

    def update(self, block: int, content: memoryview) -> tuple[bool, bool]:
        """Note the content of a block (the last one of a file may be short); tell (did it change, is it zeros)."""
        zeros = not content[0] and bytes(content) == _ZERO_BLOCK[: len(content)]
        digest = _ZERO if zeros else blake2b(content, digest_size=_SIZE).digest()
        return self._set(block, digest), zeros

    def clear(self, first: int, last: int) -> Iterator[int]:
        """Note that blocks first..last-1 are zeros; yield those that were not."""
        for number in sorted(self._segments):
            start = number * _SEGMENT
            for block in range(max(first, start), min(last, start + _SEGMENT)):
                if self._set(block, _ZERO):
                    yield block

    def cut(self, blocks: int) -> None:
        """Forget all from this block on: the file is shorter now."""
        for number in [n for n in self._segments if (n + 1) * _SEGMENT > blocks]:
            kept = max(0, blocks - number * _SEGMENT) * _SIZE
            if kept:
                self._segments[number][kept:] = bytes(_SEGMENT * _SIZE - kept)
            else:
                del self._segments[number]

    def _set(self, block: int, digest: bytes) -> bool:
        number, position = divmod(block, _SEGMENT)
        segment = self._segments.get(number)
        if segment is None:
            if digest == _ZERO:
                return False
            segment = self._segments[number] = bytearray(_SEGMENT * _SIZE)
        position *= _SIZE
        changed = segment[position : position + _SIZE] != digest
        segment[position : position + _SIZE] = digest
        return changed
