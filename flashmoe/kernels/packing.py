"""Codes of affine quantization as MLX packs them."""

from __future__ import annotations

import mlx.core as mx

WORD_BITS = 32


def pack_codes(codes: mx.array, bits: int) -> mx.array:
    """Codes [..., width] below 2**bits, width a multiple of 32, as uint32
    [..., width * bits / 32]: a little-endian stream of bits per row."""
    # 32 codes fill `bits` words exactly, whatever the bits.
    runs = codes.astype(mx.uint32).reshape(*codes.shape[:-1], -1, WORD_BITS)
    words = [mx.zeros(runs.shape[:-1], mx.uint32) for _ in range(bits)]
    for place in range(WORD_BITS):
        code = runs[..., place]
        word, shift = divmod(place * bits, WORD_BITS)
        words[word] = words[word] | (code << shift)
        if shift + bits > WORD_BITS:
            words[word + 1] = words[word + 1] | (code >> (WORD_BITS - shift))
    return mx.stack(words, axis=-1).reshape(*codes.shape[:-1], -1)
