"""Random functions with known constants, for the inequalities of the derivation and of the iteration counts.

The class is not closed under sums, but it is closed under *orthogonal* sums: if f(x) = Σ fᵢ(Vᵢᵀx) and the
columns of all Vᵢ together are orthonormal, the Hessian is block diagonal in that basis, so
‖∇²f‖ = maxᵢ ‖∇²fᵢ‖ ≤ maxᵢ (L0ᵢ + L1ᵢ‖∇fᵢ‖) ≤ maxᵢ L0ᵢ + (maxᵢ L1ᵢ) ‖∇f‖.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from gradclip import problems


@dataclass(frozen=True)
class Instance:
    """A function on R^dim that is (L0, L1)-smooth in the Hessian form, with a point to start from."""

    name: str
    f: Callable[[Tensor], Tensor]
    x: Tensor
    L0: float
    L1: float
    f_star: float  # the infimum, -inf if there is none

    def gradient(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.f(x).sum(), x)[0]

    def slack(self, *values: Tensor) -> float:
        """Rounding of a difference of such values: 2⁻⁵² times 1000 operations times the largest magnitude."""
        return 1000 * 2.0**-52 * max(1.0, *(float(v.abs().max()) for v in values))


# name: (number of variables, f(z, b), L0(b), L1(b), infimum), with b in (1/4, 3/2).
_PIECES = {
    "concave quadratic": (1, lambda z, b: -b * z[..., 0] ** 2 / 2, lambda b: b, lambda b: 0.0, -math.inf),
    "convex quadratic": (1, lambda z, b: b * z[..., 0] ** 2 / 2, lambda b: b, lambda b: 0.0, 0.0),
    "sine": (1, lambda z, b: torch.sin(b * z[..., 0]), lambda b: b**2, lambda b: 0.0, -1.0),
    "exp": (1, lambda z, b: torch.exp(b * z[..., 0]), lambda b: 0.0, lambda b: b, 0.0),
    "negative exp": (1, lambda z, b: -torch.exp(b * z[..., 0]), lambda b: 0.0, lambda b: b, -math.inf),
    "cosh": (1, lambda z, b: torch.cosh(b * z[..., 0]), lambda b: b**2, lambda b: b, 1.0),
    # 12 z² ≤ L0 + 4 L1 |z|³ with L1 = 2b: the maximum over z of the difference is 16/L1².
    "quartic": (1, lambda z, b: z[..., 0] ** 4, lambda b: 4 / b**2, lambda b: 2 * b, 0.0),
    # f' = -b q and f'' = b² q (1 - q) with 0 < q < 1.
    "logistic": (
        1,
        lambda z, b: -torch.nn.functional.logsigmoid(b * z[..., 0]),
        lambda b: 0.0,
        lambda b: b,
        0.0,
    ),
    # Re exp(b(z₁ + i z₂)): ‖∇f‖ = b exp(b z₁), Hessian eigenvalues ± b² exp(b z₁). Its gradient rotates.
    "harmonic": (
        2,
        lambda z, b: torch.exp(b * z[..., 0]) * torch.cos(b * z[..., 1]),
        lambda b: 0.0,
        lambda b: b,
        -math.inf,
    ),
}


def _random_instance(rng: np.random.Generator) -> Instance:
    names = [str(name) for name in rng.choice(list(_PIECES), size=rng.integers(1, 4))]
    scales = rng.uniform(0.25, 1.5, size=len(names))
    sizes = [_PIECES[name][0] for name in names]
    dim = sum(sizes)
    basis = torch.from_numpy(np.linalg.qr(rng.normal(size=(dim, dim)))[0])

    def f(x: Tensor) -> Tensor:
        blocks = torch.split(x @ basis, sizes, dim=-1)
        return sum(_PIECES[name][1](z, b) for name, z, b in zip(names, blocks, scales, strict=True))

    L0 = max(_PIECES[name][2](b) for name, b in zip(names, scales, strict=True))
    L1 = max(_PIECES[name][3](b) for name, b in zip(names, scales, strict=True))
    f_star = sum(_PIECES[name][4] for name in names)
    x = torch.from_numpy(rng.normal(size=dim))
    return Instance(" + ".join(names), f, x, float(L0), float(L1), f_star)


@pytest.fixture(scope="session")
def instances() -> list[Instance]:
    """Two hundred random functions in one to six variables, and every (L0, L1)-smooth problem of the
    library.
    """
    rng = np.random.default_rng(0)
    found = [_random_instance(rng) for _ in range(200)]
    family = (*problems.ALL, problems.extremal(L0=0.5, L1=2.0, dim=3), problems.power(4, dim=2))
    for problem in family:
        for L1 in (0.5, 1.0, 2.0):
            L0 = problem.L0(L1)
            if math.isfinite(L0):
                for shrink in (0.1, 0.5, 1.0):
                    x = shrink * problem.x0
                    found.append(Instance(problem.name, problem.f, x, L0, L1, problem.f_star))
    return found


@pytest.fixture(scope="session")
def bounded(instances) -> list[Instance]:
    """Those of them that are bounded below, so that f(x) - f* means something."""
    return [case for case in instances if math.isfinite(case.f_star)]
