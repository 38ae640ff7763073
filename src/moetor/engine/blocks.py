"""Blocks of the paged cache: who holds which, and which hold the beginning of a prompt.

Block 0 is never handed out: padded rows of a captured graph write there.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence

NULL_BLOCK = 0


class BlockManager:
    """Hands out blocks by number, counts references, and finds blocks by their content.

    A block that is full may be filed under the hash of all tokens up to its end. When its last
    holder lets go of it, it keeps its content until the space is needed; the one that was used the
    longest time ago goes first.

    Args:
        num_blocks: with the null block.
        block_size: tokens of a block.
        prefix_caching: whether blocks are filed and found.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool) -> None:
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.total = num_blocks - 1
        self._free: deque[int] = deque(range(1, num_blocks))
        self._unused: OrderedDict[int, None] = OrderedDict()
        self._references = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Blocks that can be handed out now."""
        return len(self._free) + len(self._unused)

    @property
    def used(self) -> int:
        """Blocks that someone holds."""
        return self.total - self.available

    def needed(self, tokens: int) -> int:
        """Blocks for this many tokens."""
        return -(-tokens // self.block_size)

    def grow(self, blocks: list[int], tokens: int) -> bool:
        """Makes `blocks` hold `tokens` tokens; False, and no change, where too few are free."""
        missing = self.needed(tokens) - len(blocks)
        if missing > self.available:
            return False
        for _ in range(missing):
            blocks.append(self._take())
        return True

    def release(self, blocks: list[int]) -> None:
        """Lets go of all `blocks` and empties the list."""
        # The end of a sequence is less likely to be asked for again than its beginning.
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._hash_of:
                    self._unused[block] = None
                else:
                    self._free.append(block)
        blocks.clear()

    def find(self, token_ids: Sequence[int], limit: int) -> tuple[list[int], list[bytes]]:
        """Takes hold of the filed blocks with which `token_ids` begins.

        Args:
            token_ids: of the sequence.
            limit: tokens to find at most.

        Returns:
            The blocks, and their hashes.
        """
        found: list[int] = []
        hashes: list[bytes] = []
        if not self.prefix_caching:
            return found, hashes
        previous = b""
        for start in range(0, limit - self.block_size + 1, self.block_size):
            previous = block_hash(previous, token_ids[start : start + self.block_size])
            block = self._block_of.get(previous)
            if block is None:
                break
            self._references[block] += 1
            self._unused.pop(block, None)
            found.append(block)
            hashes.append(previous)
        return found, hashes

    def file(
        self, blocks: list[int], hashes: list[bytes], token_ids: Sequence[int], computed: int
    ) -> None:
        """Files the blocks of a sequence that `computed` tokens fill, and extends `hashes`."""
        if not self.prefix_caching:
            return
        full = min(computed // self.block_size, len(blocks))
        for index in range(len(hashes), full):
            start = index * self.block_size
            previous = hashes[-1] if hashes else b""
            own = block_hash(previous, token_ids[start : start + self.block_size])
            hashes.append(own)
            block = blocks[index]
            if own not in self._block_of and block not in self._hash_of:
                self._block_of[own] = block
                self._hash_of[block] = own

    def _take(self) -> int:
        if self._free:
            block = self._free.popleft()
        else:
            block, _ = self._unused.popitem(last=False)
            self._block_of.pop(self._hash_of.pop(block))
        self._references[block] = 1
        return block


def block_hash(previous: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of a block's tokens and of all before them."""
    data = previous + array("q", token_ids).tobytes()
    return hashlib.blake2b(data, digest_size=16).digest()
