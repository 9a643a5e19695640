"""Bool tensors packed into int32 words, 32 tiles a word, lowest bit first."""

from __future__ import annotations

import torch

from lite_attention.ops.tiles import ceil_div

__all__ = ["WORD_BITS", "count_bits", "pack_bits", "unpack_bits"]

WORD_BITS = 32


def pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """Pack a bool tensor [..., n] into int32 words [..., ceil(n / 32)]; bits past n are 0."""
    words = ceil_div(bits.shape[-1], WORD_BITS)
    padded = torch.nn.functional.pad(bits, (0, words * WORD_BITS - bits.shape[-1]))
    powers = 1 << torch.arange(WORD_BITS, dtype=torch.int32, device=bits.device)  # the last one is negative
    in_words: torch.Tensor = padded.unflatten(-1, (words, WORD_BITS))
    return (in_words * powers).sum(-1, dtype=torch.int32)


def unpack_bits(words: torch.Tensor, n: int) -> torch.Tensor:
    """Unpack int32 words [..., w] into a bool tensor [..., n], n <= 32 w."""
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=words.device)
    bits = (words.unsqueeze(-1) >> shifts).bitwise_and_(1).bool()
    return bits.flatten(-2)[..., :n]


def count_bits(words: torch.Tensor) -> torch.Tensor:
    """Return how many bits of each int32 word are 1, in sums of pairs, then of 4, 8, 16 and 32."""
    counts = words - ((words >> 1) & 0x55555555)
    counts = (counts & 0x33333333) + ((counts >> 2) & 0x33333333)
    counts = (counts + (counts >> 4)) & 0x0F0F0F0F
    counts = counts + (counts >> 8)
    return (counts + (counts >> 16)) & 0x3F
