"""Thresholds of a model by name: in a file, and from a file into a model.

table.py  `ThresholdTable`: thresholds by site, and what they were found on
file.py   its TOML file, that a person can read
fit.py    how a table and a model differ
"""

from lite_attention.threshold_table.table import ThresholdTable, loaded, threshold_from

__all__ = ["ThresholdTable", "loaded", "threshold_from"]
