"""Thresholds of a model by name: in a file, and from a file into a model.

threshold_file.py   `ThresholdTable`, the TOML file that a person can read
threshold_fit.py    how a table and a model differ
registry.py         `LiteAttentionRegistry`
"""

from lite_attention.registry.registry import LiteAttentionRegistry
from lite_attention.registry.threshold_file import ThresholdTable

__all__ = ["LiteAttentionRegistry", "ThresholdTable"]
