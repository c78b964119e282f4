"""Measured smoothness: estimates along a step, and the (L0, L1) line that they suggest."""

from gradclip.smoothness.fit import Fit, Interval, Recommendation, fit, recommend
from gradclip.smoothness.path import PathSmoothness, path_smoothness

__all__ = ["Fit", "Interval", "PathSmoothness", "Recommendation", "fit", "path_smoothness", "recommend"]
