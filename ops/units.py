"""Scores, maxima and thresholds are in log2 units: 2 to the power of a score is a weight before it is normalized."""

from __future__ import annotations

import math

__all__ = ["LOG2_E"]

LOG2_E = math.log2(math.e)  # of one natural unit: what q . k * scale is multiplied by
