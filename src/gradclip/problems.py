"""Analytic objectives that carry their exact constants.

A :class:`Problem` knows its value, gradient and Hessian norm in closed form, its infimum, and the smallest L0
for which the Hessian form of (L0, L1)-smoothness,

    ‖∇²f(x)‖ ≤ L0 + L1 ‖∇f(x)‖   for all x,

holds with a given L1 (Zhang, He, Sra and Jadbabaie, ICLR 2020, Assumption 3). They are test functions with
known answers: an optimiser, an estimator or an inequality is checked against them, not against another
program.

The smallest constant is L0(L1) = sup over x of ‖∇²f(x)‖ − L1 ‖∇f(x)‖. It is a non-increasing convex function
of L1, never negative for the functions below, and infinite when no finite L0 exists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = [
    "ALL",
    "Problem",
    "cosh",
    "exp",
    "extremal",
    "logistic",
    "power",
    "product",
    "quadratic",
    "quartic",
    "ramp",
]

_Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """An objective f: R^dim → R with closed-form derivatives and exact smoothness constants.

    Made by the functions of this module; ``ALL`` holds one instance of each. The functions compute in the
    dtype and on the device of their argument and broadcast over leading dimensions; ``f`` is twice
    differentiable by autograd.

    Attributes:
        name: identifier, unique within ``ALL``.
        formula: f in LaTeX, without dollar signs.
        L0_formula: the smallest L0 for a given L1 in LaTeX, without dollar signs.
        summary: what the problem is good for, in one line.
        f_star: infimum of f; it need not be attained (:func:`exp`, :func:`logistic`).
        smooth: smallest Lipschitz constant of the gradient, ``math.inf`` if there is none.

    Example:
        >>> import torch
        >>> problem = quartic()
        >>> x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
        >>> problem.f(x).tolist(), problem.hessian_norm(x).tolist()
        ([1.0, 16.0], [12.0, 48.0])
        >>> problem.L0(2.0), problem.smooth
        (4.0, inf)
    """

    name: str
    formula: str
    L0_formula: str
    summary: str
    f_star: float
    smooth: float
    # Points are kept as tuples and handed out as new tensors: the instances in ALL are shared, and an
    # optimiser that updated `problem.x0` in place would change the problem for everybody else.
    _x0: tuple[float, ...] = field(repr=False)
    _minimiser: tuple[float, ...] | None = field(repr=False)
    _f: _Map = field(repr=False)
    _gradient: _Map = field(repr=False)
    _hessian_norm: _Map = field(repr=False)
    _L0: Callable[[float], float] = field(repr=False)

    @property
    def dim(self) -> int:
        """Number of variables."""
        return len(self._x0)

    @property
    def x0(self) -> Tensor:
        """The usual starting point, a new float64 tensor of shape (dim,)."""
        return torch.tensor(self._x0, dtype=torch.float64)

    @property
    def minimiser(self) -> Tensor | None:
        """A global minimiser, a new float64 tensor of shape (dim,); None if the infimum is not attained."""
        return None if self._minimiser is None else torch.tensor(self._minimiser, dtype=torch.float64)

    def f(self, x: Tensor) -> Tensor:
        """Value of the objective.

        Args:
            x: points, shape (..., dim), real floating point.

        Returns:
            Tensor of shape (...).

        Raises:
            ValueError: if the last dimension of ``x`` is not ``dim`` or its dtype is not real floating point.
        """
        return self._f(self._checked(x))

    def gradient(self, x: Tensor) -> Tensor:
        """Gradient ∇f(x) in closed form; ``x`` as in :meth:`f`, result of shape (..., dim)."""
        return self._gradient(self._checked(x))

    def hessian_norm(self, x: Tensor) -> Tensor:
        """Spectral norm ‖∇²f(x)‖ of the Hessian in closed form; ``x`` and the shape as in :meth:`f`."""
        return self._hessian_norm(self._checked(x))

    def L0(self, L1: float) -> float:
        """Smallest L0 such that ‖∇²f(x)‖ ≤ L0 + L1 ‖∇f(x)‖ for all x.

        Args:
            L1: non-negative and finite; its unit is one over the unit of x.

        Returns:
            The exact constant (unit: f over x squared), ``math.inf`` if no finite L0 exists. ``L0(0) ==
            smooth``.

        Raises:
            ValueError: if ``L1`` is negative or not finite.
        """
        if not 0.0 <= L1 < math.inf:
            raise ValueError(f"L1 must be non-negative and finite, got {L1}")
        return self._L0(L1)

    def _checked(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise ValueError(f"x must be real floating point, got {x.dtype}")
        if x.ndim == 0 or x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape (..., {self.dim}) for {self.name}, got {tuple(x.shape)}")
        return x


def quadratic(eigenvalues: Sequence[float] = (1.0, 10.0), *, seed: int | None = None) -> Problem:
    """Convex quadratic f(x) = ½ xᵀ A x.

    The Hessian is A everywhere and the gradient vanishes at 0, so L0(L1) = ‖A‖ = max eigenvalue for every L1.

    Args:
        eigenvalues: eigenvalues of A, non-negative and finite, one per dimension.
        seed: None for A = diag(eigenvalues). An integer draws an orthogonal Q (uniform up to signs, from a
            generator of its own) and sets A = Q diag(eigenvalues) Qᵀ.

    Raises:
        ValueError: if there is no eigenvalue, or one is negative or not finite.

    Example:
        >>> problem = quadratic((1.0, 4.0))
        >>> problem.f(problem.x0).item(), problem.gradient(problem.x0).tolist(), problem.L0(3.0)
        (2.5, [1.0, 4.0], 4.0)
    """
    spectrum = tuple(float(value) for value in eigenvalues)
    if not spectrum:
        raise ValueError("eigenvalues must not be empty, got ()")
    for value in spectrum:
        if not 0.0 <= value < math.inf:
            raise ValueError(f"eigenvalues must be non-negative and finite, got {value}")
    dim, largest = len(spectrum), max(spectrum)
    basis = torch.eye(dim, dtype=torch.float64)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
    matrix = (basis * torch.tensor(spectrum, dtype=torch.float64)) @ basis.T
    matrix = (matrix + matrix.T) / 2  # exactly symmetric, so that A x is the gradient to the last bit

    def gradient(x: Tensor) -> Tensor:
        return x @ matrix.to(x)

    return Problem(
        name="quadratic",
        formula=r"\tfrac12 x^\top A x",
        L0_formula=r"\lambda_{\max}(A)",
        summary="Constant curvature: L1 = 0 suffices and no larger L1 lowers L0.",
        f_star=0.0,
        smooth=largest,
        _x0=tuple(basis.sum(dim=1).tolist()),  # all coordinates 1 in the eigenbasis, whatever the rotation
        _minimiser=(0.0,) * dim,
        _f=lambda x: (x * gradient(x)).sum(-1) / 2,
        _gradient=gradient,
        _hessian_norm=lambda x: torch.full_like(x[..., 0], largest),
        _L0=lambda L1: largest,
    )


def quartic() -> Problem:
    """f(x) = x⁴ on the line.

    ``12 x² − 4 L1 |x|³`` is largest at ``|x| = 2/L1``, where it equals L0(L1) = 16/L1².

    Example:
        >>> quartic().L0(1.0), quartic().L0(0.0)
        (16.0, inf)
    """
    return Problem(
        name="quartic",
        formula="x^4",
        L0_formula="16/L_1^2",
        summary="The simplest polynomial whose gradient is not Lipschitz.",
        f_star=0.0,
        smooth=math.inf,
        _x0=(2.0,),
        _minimiser=(0.0,),
        _f=lambda x: x[..., 0] ** 4,
        _gradient=lambda x: 4 * x**3,
        _hessian_norm=lambda x: 12 * x[..., 0] ** 2,
        _L0=lambda L1: 16.0 / L1**2 if L1 > 0 else math.inf,
    )


def power(p: float, dim: int = 1) -> Problem:
    """f(x) = ‖x‖^p / p, with p ≥ 2.

    With r = ‖x‖ the gradient has norm r^(p−1) and the Hessian the eigenvalues (p−1) r^(p−2) along x and
    r^(p−2) across it; the first is the larger one. (p−1) r^(p−2) − L1 r^(p−1) is largest at r = (p−2)/L1,
    where it equals L0(L1) = ((p−2)/L1)^(p−2). For p = 2 this is 1.

    Args:
        p: exponent, at least 2 (below 2 the Hessian is unbounded at 0) and finite.
        dim: number of variables.

    Raises:
        ValueError: if ``p`` or ``dim`` is out of range.

    Example:
        >>> power(4).L0(1.0), power(3).L0(2.0), power(2).L0(0.0)
        (4.0, 0.5, 1.0)
    """
    if not 2.0 <= p < math.inf:
        raise ValueError(f"p must be at least 2 and finite, got {p}")
    _check_dim(dim)

    def f(x: Tensor) -> Tensor:
        square = (x * x).sum(-1)
        if p == 2:
            return square / 2
        # Autograd's second derivative of square^(p/2) at 0 is inf * 0 when p < 4. Taking the origin out of
        # the power gives the true value there, 0, which is right for every p > 2.
        origin = square == 0
        return torch.where(origin, 0.0, torch.where(origin, 1.0, square) ** (p / 2)) / p

    def minimal_L0(L1: float) -> float:
        if p == 2:
            return 1.0
        return ((p - 2) / L1) ** (p - 2) if L1 > 0 else math.inf

    return Problem(
        name=f"power-{p:g}",
        formula=rf"\tfrac{{1}}{{{p:g}}}\lVert x\rVert^{{{p:g}}}",
        L0_formula="1" if p == 2 else rf"({p - 2:g}/L_1)^{{{p - 2:g}}}",
        summary="How the constant grows with the degree of a polynomial.",
        f_star=0.0,
        smooth=1.0 if p == 2 else math.inf,
        _x0=(2.0,) * dim,
        _minimiser=(0.0,) * dim,
        _f=f,
        _gradient=lambda x: _radius(x).unsqueeze(-1) ** (p - 2) * x,
        _hessian_norm=lambda x: (p - 1) * _radius(x) ** (p - 2),
        _L0=minimal_L0,
    )


def exp() -> Problem:
    """f(x) = eˣ on the line: f = f' = f'', and the infimum 0 is not attained.

    eˣ (1 − L1) is bounded above on the line only if L1 ≥ 1, and then its supremum is L0(L1) = 0.

    Example:
        >>> exp().L0(1.0), exp().L0(0.99)
        (0.0, inf)
    """
    return Problem(
        name="exp",
        formula="e^x",
        L0_formula=r"0\ (L_1\ge1),\ \infty\ (L_1<1)",
        summary="Curvature exactly proportional to the gradient; no minimiser.",
        f_star=0.0,
        smooth=math.inf,
        _x0=(3.0,),
        _minimiser=None,
        _f=lambda x: torch.exp(x[..., 0]),
        _gradient=torch.exp,
        _hessian_norm=lambda x: torch.exp(x[..., 0]),
        _L0=lambda L1: 0.0 if L1 >= 1 else math.inf,
    )


def cosh() -> Problem:
    """f(x) = cosh x on the line.

    ``cosh x − L1 |sinh x|`` decreases in ``|x|`` for L1 ≥ 1, so its supremum is L0(L1) = 1, at 0. For L1 < 1
    it grows like ``(1 − L1) e^|x| / 2``, and there is no finite L0.

    Example:
        >>> cosh().L0(1.0), cosh().L0(0.99)
        (1.0, inf)
    """
    return Problem(
        name="cosh",
        formula=r"\cosh x",
        L0_formula=r"1\ (L_1\ge1),\ \infty\ (L_1<1)",
        summary="Exponential walls on both sides of a minimum.",
        f_star=1.0,
        smooth=math.inf,
        _x0=(3.0,),
        _minimiser=(0.0,),
        _f=lambda x: torch.cosh(x[..., 0]),
        _gradient=torch.sinh,
        _hessian_norm=lambda x: torch.cosh(x[..., 0]),
        _L0=lambda L1: 1.0 if L1 >= 1 else math.inf,
    )


def logistic() -> Problem:
    """Logistic loss f(z) = log(1 + e⁻ᶻ) of the margin z; the infimum 0 is not attained.

    With q = 1/(1 + eᶻ) in (0, 1): ``|f'| = q`` and ``f'' = q (1 − q)``. Then q (1 − q) − L1 q is largest at q
    = (1 − L1)/2 if L1 < 1, which gives L0(L1) = ((1 − L1)/2)²; for L1 ≥ 1 its supremum is 0, approached as q
    → 0.

    Example:
        >>> logistic().L0(0.0), logistic().L0(0.5), logistic().L0(1.0)
        (0.25, 0.0625, 0.0)
    """
    return Problem(
        name="logistic",
        formula=r"\log(1+e^{-z})",
        L0_formula=r"\bigl(\tfrac{1-L_1}{2}\bigr)^2\ (L_1<1),\ 0\ (L_1\ge1)",
        summary="Smooth in the classical sense, and far smoother where the loss is small.",
        f_star=0.0,
        smooth=0.25,
        _x0=(-3.0,),
        _minimiser=None,
        # Not softplus, which torch replaces by its asymptote beyond 20: an error of e⁻²⁰ relative to the
        # value e⁻ᶻ.
        _f=lambda x: -torch.nn.functional.logsigmoid(x[..., 0]),
        _gradient=lambda x: -torch.sigmoid(-x),
        _hessian_norm=lambda x: torch.sigmoid(x[..., 0]) * torch.sigmoid(-x[..., 0]),
        _L0=lambda L1: ((1.0 - L1) / 2.0) ** 2 if L1 < 1 else 0.0,
    )


def extremal(L0: float = 1.0, L1: float = 1.0, dim: int = 1) -> Problem:
    """The function that meets its own bound everywhere: f(x) = (L0/L1²)(e^(L1 r) − L1 r − 1), with r = ‖x‖.

    Along a ray f'(r) = (L0/L1)(e^(L1 r) − 1) and f''(r) = L0 e^(L1 r) = L0 + L1 f'(r). Across it the Hessian
    has the eigenvalue f'(r)/r, which is the mean of f'' over [0, r] and therefore no larger. Hence
    ‖∇²f(x)‖ = L0 + L1 ‖∇f(x)‖ at every x, in every dimension. The smallest constant that goes with another
    coefficient is L0 for any coefficient ≥ L1 (attained at 0) and infinite below.

    Args:
        L0: curvature at the minimum, positive and finite (unit: f over x squared).
        L1: growth rate of the curvature, positive and finite (unit: one over x).
        dim: number of variables.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> problem = extremal(L0=2.0, L1=0.5)
        >>> x = problem.x0
        >>> round(problem.hessian_norm(x).item() - 2.0 - 0.5 * problem.gradient(x).norm().item(), 12)
        0.0
    """
    for name, value in (("L0", L0), ("L1", L1)):
        if not 0.0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    _check_dim(dim)

    def f(x: Tensor) -> Tensor:
        square = (x * x).sum(-1)
        # r is not differentiable at 0, so the quadratic part, which carries the curvature there, is written
        # in r². What remains is O(r³): value, gradient and Hessian 0 at the origin.
        origin = square == 0
        t = L1 * torch.where(origin, 1.0, square).sqrt()
        return L0 * square / 2 + L0 / L1**2 * torch.where(origin, 0.0, _cubic_tail(t))

    def gradient(x: Tensor) -> Tensor:
        t = L1 * _radius(x).unsqueeze(-1)
        origin = t == 0
        return L0 * x * torch.where(origin, 1.0, torch.expm1(t) / torch.where(origin, 1.0, t))

    return Problem(
        name="extremal",
        formula=r"\tfrac{L_0}{L_1^2}\bigl(e^{L_1\lVert x\rVert}-L_1\lVert x\rVert-1\bigr)",
        L0_formula=r"L_0\ \text{at its own}\ L_1",
        summary="Equality in the definition at every point: the worst case of the descent bounds.",
        f_star=0.0,
        smooth=math.inf,
        _x0=(3.0 / (L1 * math.sqrt(dim)),) * dim,
        _minimiser=(0.0,) * dim,
        _f=f,
        _gradient=gradient,
        _hessian_norm=lambda x: L0 * torch.exp(L1 * _radius(x)),
        _L0=lambda coefficient: L0 if coefficient >= L1 else math.inf,
    )


def ramp(slope: float = 1.0, L0: float = 1.0) -> Problem:
    """Two long straight slopes: f'(x) = σ s(x/a), with s(z) = (3z − z³)/2 for ``|z| ≤ 1`` and ±1 beyond.

    Beyond ``|x| = a`` the slope is ±σ, and a = 3σ/(2 L0) makes the largest curvature, 3σ/(2a) at 0, equal to
    L0. There f' = 0, so no L1 lowers it: L0(L1) = L0. f is twice continuously differentiable, and f(x) =
    σ (``|x|`` − a) + (5/8) σ a beyond a. The slow function of the lower bounds: a step h moves x by h σ.

    Args:
        slope: σ, positive and finite (unit: f over x).
        L0: largest curvature, positive and finite (unit: f over x squared).

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> problem = ramp(slope=2.0, L0=3.0)  # a = 1
        >>> problem.f(problem.minimiser).item(), problem.f(problem.minimiser + 1).item()
        (0.0, 1.25)
    """
    for name, value in (("slope", slope), ("L0", L0)):
        if not 0.0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    a = 3 * slope / (2 * L0)

    def f(x: Tensor) -> Tensor:
        z = x[..., 0] / a
        inside = torch.clamp(z, -1.0, 1.0)
        return slope * a * (torch.relu(z.abs() - 1) + inside**2 * (6 - inside**2) / 8)

    def gradient(x: Tensor) -> Tensor:
        z = torch.clamp(x / a, -1.0, 1.0)
        return slope * z * (3 - z**2) / 2

    return Problem(
        name="ramp",
        formula=r"f'(x)=\tfrac\sigma2(3z-z^3),\ z=\max\{-1,\min\{1,x/a\}\}",
        L0_formula=r"L_0",
        summary="Slopes barely above the accuracy that is asked for: where every safe rule is slow.",
        f_star=0.0,
        smooth=L0,
        _x0=(3 * a,),
        _minimiser=(0.0,),
        _f=f,
        _gradient=gradient,
        _hessian_norm=lambda x: L0 * torch.clamp(1 - (x[..., 0] / a) ** 2, min=0.0),
        _L0=lambda L1: L0,
    )


def product() -> Problem:
    """f(w₁, w₂) = (w₁ w₂ − 1)²/2, a two-layer linear network with one sample.

    It is not (L0, L1)-smooth for any constants: on the curve w₁ w₂ = 1 the gradient is 0 while the Hessian
    has norm w₁² + w₂², which is unbounded. So L0(L1) is infinite for every L1.

    Example:
        >>> import torch
        >>> x = torch.tensor([100.0, 0.01], dtype=torch.float64)
        >>> round(product().gradient(x).norm().item(), 9), round(product().hessian_norm(x).item(), 4)
        (0.0, 10000.0001)
    """

    def gradient(x: Tensor) -> Tensor:
        return (x[..., :1] * x[..., 1:] - 1) * x.flip(-1)

    def hessian_norm(x: Tensor) -> Tensor:
        # [[w2², b], [b, w1²]] with b = 2 w1 w2 − 1 has trace ≥ 0, so its larger eigenvalue is the norm.
        w1, w2 = x.unbind(-1)
        return (w1**2 + w2**2) / 2 + torch.hypot((w1 - w2) * (w1 + w2) / 2, 2 * w1 * w2 - 1)

    return Problem(
        name="product",
        formula=r"\tfrac12(w_1w_2-1)^2",
        L0_formula=r"\infty",
        summary="Two weights multiplied: zero gradient at arbitrarily high curvature.",
        f_star=0.0,
        smooth=math.inf,
        _x0=(3.0, 0.0),
        _minimiser=(1.0, 1.0),
        _f=lambda x: (x[..., 0] * x[..., 1] - 1) ** 2 / 2,
        _gradient=gradient,
        _hessian_norm=hessian_norm,
        _L0=lambda L1: math.inf,
    )


def _check_dim(dim: int) -> None:
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")


def _radius(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1)


def _cubic_tail(t: Tensor) -> Tensor:
    """e^t − 1 − t − t²/2 for t ≥ 0, without the cancellation that leaves no digit of it below t = 1e-5."""
    small = torch.where(t < 0.5, t, 0.0)
    # t³/6 (1 + t/4 (1 + t/5 (...))): at t = 0.5 the first omitted term is 0.5¹² 3!/15! = 1e-15 of the sum.
    series = torch.ones_like(t)
    for n in range(14, 3, -1):
        series = 1 + small * series / n
    return torch.where(t < 0.5, small**3 * series / 6, torch.expm1(t) - t - t**2 / 2)


ALL: tuple[Problem, ...] = (quadratic(), quartic(), exp(), cosh(), logistic(), extremal(), product())
"""One instance of every problem, with the default parameters.

:meta hide-value:
"""
