"""Attention that several processes share.

`shard` says which part of it is here; `context_parallel` makes diffusers' ring gather keys. The library's own exchange
is for attention by hand: `ulysses` calls the op between two of `exchange`, among the ranks of a `group`.
"""

from __future__ import annotations

from lite_attention.parallel.ulysses import ulysses_attention

__all__ = ["ulysses_attention"]
