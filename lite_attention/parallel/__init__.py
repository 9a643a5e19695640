"""Attention that several processes share.

`shard` says which part of it is here; `context_parallel` makes diffusers' ring gather keys.
"""
