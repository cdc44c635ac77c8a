"""Damage for drills: what a transfer that loses pages would do, to show that somebody notices."""

from criu_transfer.kernel import process_vm_readv
from criu_transfer.pages import Memory
from criu_transfer.ranges import RangeSet
from criu_transfer.wire import PAGE


def filled_pages(memory: Memory, wanted: RangeSet, count: int) -> list[int]:
    """Choose up to `count` pages with something in them, spread over what was sent and is `wanted`; ascending."""
    sent = [part for start, end in wanted for part in memory.ledger.overlap(start, end)]
    pages = [page for start, end in sent for page in range(start, end, PAGE)]
    step = max(1, len(pages) // count)
    found: list[int] = []
    for first in range(0, len(pages), step):
        page = next((page for page in pages[first : first + step] if _filled(memory.pid, page)), None)
        if page is not None and len(found) < count:
            found.append(page)
    return found


def _filled(pid: int, page: int) -> bool:
    content = bytearray(PAGE)
    return process_vm_readv(pid, content, [(page, page + PAGE)]) == PAGE and any(content)
