from lite_attention.module import LiteAttention
from lite_attention.ops import SkipState, skip_attention

__all__ = ["LiteAttention", "SkipState", "skip_attention"]
