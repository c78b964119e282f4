"""Thresholds that follow the gradient norms seen so far, in place of a fixed ``max_norm``.

A policy is a callable that is given the norm of this step's gradient, as a 0-dim tensor, remembers it, and
returns the threshold for this same gradient, as a 0-dim tensor on the same device. Pass one as ``max_norm``
to :func:`~gradclip.norms.clip_grad_`, :class:`~gradclip.optim.ClippedSGD` or
:class:`~gradclip.optim.MixedClippedSGD`, with one norm over all parameters (``scope="global"``). No policy
waits for the device. Norms that are not finite are never remembered.

A policy of your own needs ``__call__(norm)``, ``state_dict()`` and ``load_state_dict(state)``; an optimizer
saves and loads the state of its policy with its own.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradclip.rules import check_count, check_number, widest_dtype


class Percentile:
    r"""AutoClip: the threshold is a percentile of the norms seen, the current one among them.

    With percentile 10, about nine steps in ten are clipped, at a norm that one step in ten stays below; with
    50 the threshold is the running median. Between two norms of the history the percentile is interpolated
    linearly, as in ``numpy.percentile``. The first gradient is its own percentile, and is not clipped.

    Args:
        percentile: Between 0 and 100.
        window: How many of the latest norms count. The authors' code keeps all of them; a window bounds the
            cost of a step and forgets how training began.

    Raises:
        ValueError: If ``percentile`` is not between 0 and 100, or ``window`` no whole number of at least 1.
        TypeError: If one of them is not a number.

    References:
        Seetharaman, Wichern, Pardo and Le Roux, *AutoClip: adaptive gradient clipping for source separation
        networks* (MLSP 2020), and the authors' code, pseeth/autoclip.

    Example:
        >>> import torch
        >>> from gradclip.thresholds import Percentile
        >>> median = Percentile(50.0)
        >>> [median(torch.tensor(norm)).item() for norm in (1.0, 3.0, 100.0)]
        [1.0, 2.0, 3.0]
    """

    def __init__(self, percentile: float = 10.0, *, window: int = 1000):
        check_number("percentile", percentile)
        check_count("window", window)
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentile must be between 0 and 100, got {percentile}")
        self.percentile, self.window = float(percentile), int(window)
        self._history = torch.full((self.window,), math.nan, dtype=torch.float64)
        self._count = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def __call__(self, norm: Tensor) -> Tensor:
        """Remember the norm of this step's gradient and return the threshold for it, both 0-dim."""
        if self._history.device != norm.device:
            self._history = self._history.to(norm.device, widest_dtype(norm.device))
            self._count = self._count.to(norm.device)
        finite = norm.isfinite()
        place = (self._count % self.window).reshape(1)
        value = torch.where(finite, norm.to(self._history.dtype), self._history[place])
        self._history = self._history.index_copy(0, place, value)
        self._count = self._count + finite
        threshold = torch.nanquantile(self._history, self.percentile / 100)
        # While nothing has been remembered there is nothing to compare with.
        return torch.where(threshold.isnan(), math.inf, threshold).to(norm.dtype)

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved: numbers and tensors."""
        return {
            "percentile": self.percentile,
            "window": self.window,
            "history": self._history.clone(),
            "count": self._count.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            KeyError: If ``state`` is that of another policy. Nothing has changed then.
        """
        percentile, window, history, count = (
            state[key] for key in ("percentile", "window", "history", "count")
        )
        self.percentile, self.window = percentile, window
        self._history, self._count = history.clone(), count.clone()


class ZScore:
    r"""ZClip: clip only norms that stand out, and the more the further they do.

    From running mean μ and deviation σ of the norms, z = (g - μ)/(σ + eps). For z > ``z`` the threshold is
    μ + ``z``² σ/z: it falls from μ + ``z`` σ towards the mean as z grows. Otherwise nothing is clipped. Then
    the statistics take in s = min(g, threshold):

    ::

        μ = alpha · μ + (1 - alpha) · s,    σ² = alpha · σ² + (1 - alpha) · (s - μ)²     (with the new μ)

    The first ``warmup`` steps are not clipped; their mean and variance are where this starts. The authors'
    class also applies a fixed threshold of 1 by default, which this one does not.

    Args:
        z: From how many deviations above the mean a norm is clipped, positive.
        alpha: Memory of the averages, from 0 to below 1.
        warmup: Steps before the first clipping, at least 1.
        eps: Keeps a deviation of 0 out of the denominator; positive, in the units of the gradient.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If one is not a number.

    References:
        Kumar, Owen, Roy Chowdhury and Güra, *ZClip: adaptive spike mitigation for LLM pre-training*
        (arXiv:2504.02507), and the authors' code, bluorion-com/ZClip, option ``adaptive_scaling``.

    Example:
        >>> import torch
        >>> from gradclip.thresholds import ZScore
        >>> threshold = ZScore(warmup=2)
        >>> [round(threshold(torch.tensor(norm)).item(), 3) for norm in (1.0, 3.0, 4.0, 12.0)]
        [inf, inf, inf, 2.741]
    """

    def __init__(self, z: float = 2.5, *, alpha: float = 0.97, warmup: int = 25, eps: float = 1e-6):
        for name, value in (("z", z), ("alpha", alpha), ("eps", eps)):
            check_number(name, value)
        check_count("warmup", warmup)
        for name, value in (("z", z), ("eps", eps)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha must be at least 0 and below 1, got {alpha}")
        self.z, self.alpha, self.warmup, self.eps = float(z), float(alpha), int(warmup), float(eps)
        # Count, mean, variance.
        self._statistics = torch.zeros(3, dtype=torch.float64)

    @torch.no_grad()
    def __call__(self, norm: Tensor) -> Tensor:
        """Remember the norm of this step's gradient and return the threshold for it, both 0-dim."""
        if self._statistics.device != norm.device:
            self._statistics = self._statistics.to(norm.device, widest_dtype(norm.device))
        count, mean, variance = self._statistics.unbind()
        g = norm.to(mean.dtype)
        warming = count < self.warmup
        deviation = variance.sqrt()
        z = (g - mean) / (deviation + self.eps)
        threshold = torch.where(warming | ~(z > self.z), math.inf, mean + self.z**2 * deviation / z)

        seen = torch.minimum(g, threshold)
        share = torch.where(warming, 1 / (count + 1), 1 - self.alpha)
        new_mean = mean + share * (seen - mean)
        # Over the warm-up the product adds up to the variance about the mean of all its steps; the average
        # of the authors takes the square about the new mean.
        square = torch.where(warming, (seen - mean) * (seen - new_mean), (seen - new_mean) ** 2)
        new = torch.stack([count + 1, new_mean, variance + share * (square - variance)])
        self._statistics = torch.where(g.isfinite(), new, self._statistics)
        return threshold.to(norm.dtype)

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved: numbers and a tensor."""
        return {
            "z": self.z,
            "alpha": self.alpha,
            "warmup": self.warmup,
            "eps": self.eps,
            "statistics": self._statistics.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            KeyError: If ``state`` is that of another policy. Nothing has changed then.
        """
        z, alpha, warmup, eps, statistics = (
            state[key] for key in ("z", "alpha", "warmup", "eps", "statistics")
        )
        self.z, self.alpha, self.warmup, self.eps = z, alpha, warmup, eps
        self._statistics = statistics.clone()
