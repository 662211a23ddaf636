"""Codes of 2 to 8 bits in 32-bit words."""

from __future__ import annotations

import mlx.core as mx

WORD_BITS = 32
# In which order AWQ has the 8 codes of a word: nibble i is column AWQ_ORDER[i].
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpacked(words: mx.array, bits: int) -> mx.array:
    """uint32 codes [..., n * 32 / bits] of uint32 words [..., n], which are a stream of bits, the
    lowest first, as GPTQ and MLX have them; 32 codes take `bits` words."""
    mask = (1 << bits) - 1
    if WORD_BITS % bits == 0:
        shifts = mx.arange(0, WORD_BITS, bits, dtype=mx.uint32)
        return ((words[..., None] >> shifts) & mask).reshape(*words.shape[:-1], -1)
    starts = mx.arange(0, WORD_BITS * bits, bits, dtype=mx.uint32)
    first, shift = starts // WORD_BITS, starts % WORD_BITS
    following = mx.minimum(first + 1, bits - 1)
    rest = mx.minimum(WORD_BITS - shift, WORD_BITS - 1)
    blocks = words.reshape(*words.shape[:-1], -1, bits)
    # What does not lie across two words loses the second one's bits to the mask.
    low = mx.take(blocks, first, axis=-1) >> shift
    high = mx.where(shift + bits > WORD_BITS, mx.take(blocks, following, axis=-1) << rest, 0)
    return ((low | high) & mask).reshape(*words.shape[:-1], -1)


def awq_unpacked(words: mx.array) -> mx.array:
    """uint32 codes [..., 8 * n] of uint32 words [..., n] with AWQ's order of 4-bit codes."""
    position = [AWQ_ORDER.index(column) for column in range(len(AWQ_ORDER))]
    shifts = mx.array([4 * nibble for nibble in position], dtype=mx.uint32)
    return ((words[..., None] >> shifts) & 15).reshape(*words.shape[:-1], -1)


def unpacked_columns(words: mx.array, bits: int) -> mx.array:
    """uint32 codes [n * 32 / bits, columns] of words [n, columns], streams down each column."""
    mask, n = (1 << bits) - 1, words.shape[1]
    if WORD_BITS % bits:
        return unpacked(words.T, bits).T
    shifts = mx.arange(0, WORD_BITS, bits, dtype=mx.uint32)
    return ((words[:, None] >> shifts[:, None]) & mask).reshape(-1, n)


def awq_turned(words: mx.array) -> mx.array:
    """MLX's uint32 words [8 * n, d_in / 8] of AWQ's, [d_in, n], which have the outputs of one
    input side by side: every 8 by 8 codes change places."""
    d_in, n = words.shape
    blocks = words.reshape(d_in // 8, 8, n)
    rows = [blocks[:, row] for row in range(8)]
    # Halves of the square that face each other across its diagonal, then halves of those.
    for half, kept in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        for row in range(8):
            if row & half == 0:
                upper, lower, shift = rows[row], rows[row + half], 4 * half
                rows[row] = (upper & kept) | ((lower & kept) << shift)
                rows[row + half] = ((upper >> shift) & kept) | (lower & (kept << shift))
    outputs = [rows[AWQ_ORDER.index(column)] for column in range(8)]
    return mx.stack(outputs, axis=-1).reshape(d_in // 8, 8 * n).T
