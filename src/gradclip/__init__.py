"""Gradient clipping and (L0, L1)-smoothness, after Zhang, He, Sra and Jadbabaie (ICLR 2020).

>>> import gradclip, torch
>>> gradclip.clip_factor(torch.tensor([0.5, 2.0]), 1.0)
tensor([1.0000, 0.5000])
"""

from importlib.metadata import PackageNotFoundError, version

from gradclip import claims, optim, problems, records, smoothness, theory, thresholds
from gradclip.norms import clip_grad_, total_norm
from gradclip.rules import clip_factor
from gradclip.smoothness import recommend

try:
    __version__ = version("gradclip")
except PackageNotFoundError:  # run from a source tree with PYTHONPATH=src
    __version__ = "0+source"

__all__ = [
    "claims",
    "clip_factor",
    "clip_grad_",
    "optim",
    "problems",
    "recommend",
    "records",
    "smoothness",
    "theory",
    "thresholds",
    "total_norm",
]
