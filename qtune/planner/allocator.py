"""The CUDA caching allocator of PyTorch, replayed on a list of births and releases: what it takes from the device.

A request is rounded up to 512 bytes; up to 1 MiB it is served by the small pool, else by the large one. The smallest
free block of the pool that holds it is used, of equal ones the one at the lowest address, and its rest split off; if
there is none, a segment is taken from the device: of 2 MiB (small), 20 MiB (below 10 MiB) or the size rounded up to
2 MiB. A released block merges with its free neighbours in its segment. When the device is full, all whole free
segments go back and the request is tried once more. `expandable` has one segment a pool instead, which grows by pages
of 2 MiB (small) or 20 MiB (large) where the request does not fit.

Source: PyTorch's c10/cuda/CUDACachingAllocator.cpp (native backend) and the constants of torch 2.13's
c10/core/AllocatorConfig.h. Left out: everything that is off by default (max_split_size_mb, roundup_power2_divisions,
garbage_collection_threshold, a memory fraction), private pools of CUDA graphs, several streams. Taken for granted:
the device gives falling addresses, as recorded runs mostly show (they decide between equal blocks only), and any free
memory below the limit serves it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

MIB = 1 << 20
GRAIN = 512  # kMinBlockSize
SMALL = MIB  # kSmallSize: the largest request of the small pool
SMALL_SEGMENT = 2 * MIB  # kSmallBuffer
LARGE_SEGMENT = 20 * MIB  # large_segment_size()
OWN_SEGMENT = 10 * MIB  # kMinLargeAlloc: from here on a request has a segment of its own size
ROUND_LARGE = 2 * MIB  # kRoundLarge
SHIFT = 64  # a free block sorts by (size, address): size << SHIFT | address
LOW = (1 << SHIFT) - 1
ROOM = LARGE_SEGMENT << 30  # addresses of an expandable segment, never used up; PyTorch has 9/8 of the device's memory


@dataclass(frozen=True)
class Reserved:
    """What a list of events took. All sizes in bytes, of PyTorch's own memory: neither the context nor libraries.

    `allocated` is counted as by torch.cuda.max_memory_allocated, by blocks: without `expandable` a large block keeps
    a rest of up to 1 MiB, so it can be above `peak_allocated`. If it does not fit, the figures are of what came
    before event `at`.
    """

    allocated: int  # peak of the blocks in use (torch.cuda.max_memory_allocated)
    reserved: int  # peak of all segments (torch.cuda.max_memory_reserved)
    reserved_at_end: int
    retries: int  # times all cached segments were given back for a request (num_alloc_retries)
    fits: bool  # False: out of memory under the limit
    at: int | None  # the event that ran out


class Pool:
    """The free blocks of one pool, and the unmapped ranges (`holes`) of its expandable segment."""

    def __init__(self, page: int, rest: int, base: int) -> None:
        self.page = page  # bytes by which an expandable segment grows
        self.rest = rest  # the smallest rest that is split off
        self.order: list[int] = []  # size << SHIFT | start, rising
        self.free: dict[int, int] = {}  # start -> size
        self.ends: dict[int, int] = {}  # end -> start
        self.hole_starts = [base]  # rising
        self.holes = {base: base + ROOM}  # start -> end

    def put(self, start: int, size: int) -> None:
        insort(self.order, size << SHIFT | start)
        self.free[start] = size
        self.ends[start + size] = start

    def rank(self, start: int) -> int:
        """The place of the free block at `start` in `order`."""
        return bisect_left(self.order, self.free[start] << SHIFT | start)

    def take(self, rank: int) -> tuple[int, int]:
        """Removes the free block at place `rank`; gives its start and size."""
        key = self.order.pop(rank)
        start, size = key & LOW, key >> SHIFT
        del self.free[start]
        del self.ends[start + size]
        return start, size

    def merge(self, start: int, size: int) -> None:
        """Puts a block together with its free neighbours (try_merge_blocks)."""
        right = start + size
        if right in self.free:
            size += self.take(self.rank(right))[1]
        left = self.ends.get(start)
        if left is not None:
            size += self.take(self.rank(left))[1]
            start = left
        self.put(start, size)


class Allocator:
    """The allocator with segments of fixed size. `limit`: bytes that all segments may take together."""

    split_large = SMALL + GRAIN  # should_split: a rest of more than 1 MiB in the large pool

    def __init__(self, limit: int | None = None) -> None:
        self.limit = float("inf") if limit is None else limit
        self.small = Pool(SMALL_SEGMENT, GRAIN, 0)
        self.large = Pool(LARGE_SEGMENT, self.split_large, ROOM)
        self.used: dict[int, int] = {}  # start -> size
        self.segments: dict[int, int] = {}  # start -> size; empty if expandable
        self.bottom = ROOM  # segments lie above
        self.allocated = self.reserved = self.most_allocated = self.most_reserved = self.retries = 0

    def malloc(self, size: int) -> int | None:
        """The address of a new block for `size` > 0 bytes; None: out of memory."""
        size = -(-size // GRAIN) * GRAIN
        pool = self.small if size <= SMALL else self.large
        rank = self.search(pool, size)
        if rank == len(pool.order):
            grown = self.grow(pool, size)
            if grown is None:
                self.release()
                self.retries += 1
                grown = self.grow(pool, size)
                if grown is None:
                    return None
            rank = pool.rank(grown)
        start, have = pool.take(rank)
        if have - size >= pool.rest:
            pool.put(start + size, have - size)
            have = size
        self.used[start] = have
        self.allocated += have
        if self.allocated > self.most_allocated:
            self.most_allocated = self.allocated
        return start

    def free(self, start: int) -> None:
        size = self.used.pop(start)
        self.allocated -= size
        # Blocks in use of the small pool are at most 1 MiB (its rests are always split off), of the large one more.
        (self.small if size <= SMALL else self.large).merge(start, size)

    def search(self, pool: Pool, size: int) -> int:
        """The place of the smallest free block of at least `size`, of equal ones the lowest (get_free_block).

        The length of `order` if there is none.
        """
        return bisect_left(pool.order, size << SHIFT)

    def grow(self, pool: Pool, size: int) -> int | None:
        """A new free block that holds `size` (alloc_block); None: the device is full."""
        if size < OWN_SEGMENT:  # get_allocation_size
            size = pool.page
        else:
            size = -(-size // ROUND_LARGE) * ROUND_LARGE
        if not self.reserve(size):
            return None
        start = self.bottom = self.bottom - size - ROUND_LARGE  # a gap: blocks merge inside their segment only
        self.segments[start] = size
        pool.put(start, size)
        return start

    def reserve(self, size: int) -> bool:
        if self.reserved + size > self.limit:
            return False
        self.reserved += size
        if self.reserved > self.most_reserved:
            self.most_reserved = self.reserved
        return True

    def release(self) -> None:
        """Gives back all segments that are one free block (release_cached_blocks); also torch.cuda.empty_cache."""
        for pool in (self.large, self.small):
            for start, size in list(pool.free.items()):
                if self.segments.get(start) == size:
                    pool.take(pool.rank(start))
                    del self.segments[start]
                    self.reserved -= size


class Expandable(Allocator):
    """The allocator under `expandable_segments:True`."""

    split_large = GRAIN  # should_split: as in the small pool

    def search(self, pool: Pool, size: int) -> int:
        """As before, but a block before a hole counts with the hole, so that it is kept for what needs it."""
        order, holes = pool.order, pool.holes

        def room(key: int) -> int:
            end = (key & LOW) + (key >> SHIFT)
            return holes.get(end, end) - (key & LOW)

        rank = bisect_left(order, size << SHIFT)
        while rank + 1 < len(order) and room(order[rank + 1]) < room(order[rank]):
            rank += 1
        return rank

    def grow(self, pool: Pool, size: int) -> int | None:
        """Maps what the first range of free addresses lacks for `size` (try_allocate_expandable_block)."""
        start = self.first_range(pool, size)
        free, holes = pool.free, pool.holes
        if start in holes and not self.map(pool, start, min(size, holes[start] - start)):
            return None
        while free[start] < size:
            hole = start + free[start]
            if not self.map(pool, hole, min(size - free[start], holes[hole] - hole)):
                return None
        return start

    def first_range(self, pool: Pool, size: int) -> int:
        """The lowest run of holes and free blocks, at a hole or the free block before one, that holds `size`."""
        for hole in pool.hole_starts:
            start = end = pool.ends.get(hole, hole)
            while end - start < size:
                after = pool.holes.get(end) or end + pool.free.get(end, 0)
                if after == end:
                    break
                end = after
            else:
                return start
        raise AssertionError("the last hole is endless")

    def map(self, pool: Pool, start: int, size: int) -> bool:
        """Backs the first pages of the hole at `start` with memory, whole pages for `size` bytes."""
        size = -(-size // pool.page) * pool.page
        if not self.reserve(size):
            return False
        end = pool.holes.pop(start)
        at = bisect_left(pool.hole_starts, start)
        if start + size < end:
            pool.holes[start + size] = end
            pool.hole_starts[at] = start + size
        else:
            del pool.hole_starts[at]
        pool.merge(start, size)
        return True

    def release(self) -> None:
        """Gives back every page that lies whole in a free block (unmap_block)."""
        for pool in (self.large, self.small):
            for start, size in list(pool.free.items()):
                end, page = start + size, pool.page
                first, last = -(-start // page) * page, end // page * page
                if first < last:
                    pool.take(pool.rank(start))
                    if start < first:
                        pool.put(start, first - start)
                    if last < end:
                        pool.put(last, end - last)
                    self.unmap(pool, first, last)

    def unmap(self, pool: Pool, start: int, end: int) -> None:
        self.reserved -= end - start
        starts, holes = pool.hole_starts, pool.holes
        at = bisect_left(starts, start)
        if end in holes:  # then it is the next one
            end = holes.pop(end)
            del starts[at]
        if at and holes[starts[at - 1]] == start:
            start = starts[at - 1]
        else:
            starts.insert(at, start)
        holes[start] = end


def replay(
    sizes: Sequence[int], events: Sequence[int], *, expandable: bool = False, limit: int | None = None
) -> Reserved:
    """Runs births and releases through the allocator, on one stream and from an empty cache.

    `sizes[i]`: bytes of block i (0: takes nothing). `events` in order of time: i >= 0 the birth of block i, ~i its
    release; a released block may be born again. `limit`: bytes that the segments may take in all, that is the
    device's memory less contexts, libraries and other processes. ValueError: a birth of a live block, a release of
    one that is not.
    """
    allocator = Expandable(limit) if expandable else Allocator(limit)
    live: dict[int, int] = {}  # block -> address
    ran_out = None
    malloc, free = allocator.malloc, allocator.free
    for at, event in enumerate(events):
        block = event if event >= 0 else ~event
        if (event < 0) != (block in live):
            raise ValueError(f"event {at}: block {block} is {'not alive' if event < 0 else 'alive already'}")
        if event < 0:
            start = live.pop(block)
            if start >= 0:
                free(start)
            continue
        size = sizes[block]
        new = malloc(size) if size else -1
        if new is None:
            ran_out = at
            break
        live[block] = new
    return Reserved(
        allocated=allocator.most_allocated,
        reserved=allocator.most_reserved,
        reserved_at_end=allocator.reserved,
        retries=allocator.retries,
        fits=ran_out is None,
        at=ran_out,
    )


def peak_allocated(sizes: Sequence[int], events: Sequence[int], granularity: int = GRAIN) -> tuple[int, int]:
    """The peak of the bytes alive, each block rounded up to `granularity`, and the first event that reaches it.

    Exact for expandable segments; a lower bound of `Reserved.allocated` without them. (0, -1): nothing was born.
    """
    rounded = [-(-size // granularity) * granularity for size in sizes]
    now = peak = 0
    when = -1
    for at, event in enumerate(events):
        if event < 0:
            now -= rounded[~event]
        else:
            now += rounded[event]
            if now > peak:
                peak, when = now, at
    return peak, when
