"""Intervals of shares and means. No torch, no files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev

# Two-sided 95 % quantiles of Student's t for 1..30 degrees of freedom.
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def wilson(k: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of k right out of n, as shares (95 % for z = 1.96), with k / n in it. n = 0: (0, 1)."""
    if n == 0:
        return 0.0, 1.0
    p, zz = k / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    low, high = (p + zz / 2 - half) / (1 + zz), (p + zz / 2 + half) / (1 + zz)
    return max(0.0, min(p, low)), min(1.0, max(p, high))  # for k = 0 and k = n the bound is p, and rounding may miss it


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % t-interval of the mean of two or more values in [0, 1], clipped to [0, 1]."""
    n, m = len(values), mean(values)
    half = (T95[n - 2] if n - 2 < len(T95) else 1.96) * stdev(values) / math.sqrt(n)
    return max(0.0, m - half), min(1.0, m + half)
