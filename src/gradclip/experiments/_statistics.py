"""Statistics of points along training that several experiments use."""

import math

import numpy as np


def line(pairs: np.ndarray) -> tuple[float, float]:
    """Slope of the least-squares line of the second column on the first, and their correlation."""
    if len(pairs) < 3:
        return math.nan, math.nan
    x, y = (pairs[:, :2] - pairs[:, :2].mean(axis=0)).T
    xx, xy, yy = x @ x, x @ y, y @ y
    if xx == 0 or yy == 0:
        return math.nan, math.nan
    return float(xy / xx), float(xy / math.sqrt(xx * yy))


def partial_correlation(table: np.ndarray) -> float:
    """Correlation of the first two columns' residuals from least squares on the others and a constant."""
    if len(table) <= table.shape[1] + 1:
        return math.nan
    controls = np.concatenate([np.ones((len(table), 1)), table[:, 2:]], axis=1)
    coefficients = np.linalg.lstsq(controls, table[:, :2], rcond=None)[0]
    return line(table[:, :2] - controls @ coefficients)[1]
