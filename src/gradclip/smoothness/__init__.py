"""Measured smoothness: estimates along a step, and the (L0, L1) line that they suggest."""

from gradclip.smoothness.fit import Fit, Interval, Recommendation, fit, recommend
from gradclip.smoothness.hessian import (
    Eigenvalues,
    HessianNorm,
    directional_smoothness,
    hessian_norm,
    top_eigenvalues,
)
from gradclip.smoothness.path import PathSmoothness, path_smoothness
from gradclip.smoothness.probe import Probe
from gradclip.smoothness.warmup import WarmUp, warm_up

__all__ = [
    "Eigenvalues",
    "Fit",
    "HessianNorm",
    "Interval",
    "PathSmoothness",
    "Probe",
    "Recommendation",
    "WarmUp",
    "directional_smoothness",
    "fit",
    "hessian_norm",
    "path_smoothness",
    "recommend",
    "top_eigenvalues",
    "warm_up",
]
