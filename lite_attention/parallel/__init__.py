"""Attention that several processes share.

`shard` says which part of it is here; `context_parallel` makes diffusers' ring gather keys. The library's own exchange,
for attention by hand: `ulysses_attention`, and `LiteAttention(process_group=)`, whose part it is `head_exchange.py`.
"""

from __future__ import annotations

from lite_attention.parallel.ulysses import ulysses_attention

__all__ = ["ulysses_attention"]
