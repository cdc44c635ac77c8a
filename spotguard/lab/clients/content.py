"""Values that can be checked: each is derived from its index and its version, and from nothing else."""

import random

BLOB_BYTES = 4 << 20
HEADER = "{index:010d}:{version:010d}:"
HEADER_BYTES = len(HEADER.format(index=0, version=0))


class Content:
    """Makes and recognises values of one size.

    A value is a header with its index and version, then a slice of a pseudo-random blob whose place depends on both.
    So a page that holds another value's, or an older version's, bytes is seen, and making a value is one memcpy.
    """

    def __init__(self, seed: int, size: int) -> None:
        self.size = size
        self._body = size - HEADER_BYTES
        self._blob = random.Random(seed).randbytes(BLOB_BYTES + size)  # noqa: S311 - reproducible, not secret

    def value(self, index: int, version: int) -> bytes:
        """Return the value number `index` in its `version`."""
        offset = (index * 2654435761 + version * 40503 * 64 + version) % BLOB_BYTES
        header = HEADER.format(index=index, version=version).encode()
        return header + self._blob[offset : offset + self._body]

    def version(self, index: int, data: bytes) -> int | None:
        """Return which version of value `index` these bytes are; None if they are none."""
        digits = data[11:21]
        if len(data) != self.size or not digits.isdigit():
            return None
        version = int(digits)
        return version if data == self.value(index, version) else None
