"""Thresholds of a model by name, or shares to keep: in a file, and from a file into a model.

content.py  values by site, and what they were found on
file.py     the TOML of it, that a person can read
fit.py      how it differs from a model
table.py    `ThresholdTable`: read, written, set in a model
"""

from lite_attention.threshold_table.fit import check_method
from lite_attention.threshold_table.table import ThresholdTable, loaded, of_sites

__all__ = ["ThresholdTable", "check_method", "loaded", "of_sites"]
