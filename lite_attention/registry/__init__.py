"""Thresholds of a model by name: in a file, and from a file into a model.

threshold_table.py  `ThresholdTable`: thresholds by site, and what they were found on
threshold_file.py   its TOML file, that a person can read
threshold_fit.py    how a table and a model differ
registry.py         `LiteAttentionRegistry`
"""

from lite_attention.registry.registry import LiteAttentionRegistry
from lite_attention.registry.threshold_table import ThresholdTable, loaded, threshold_from

__all__ = ["LiteAttentionRegistry", "ThresholdTable", "loaded", "threshold_from"]
