"""Curvature from Hessian-vector products: the norm of the Hessian, its largest eigenvalues, one direction."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import erfinv
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import batch_norm
from torch.overrides import TorchFunctionMode

from gradclip.norms import total_norm
from gradclip.rules import check_number, widest_dtype
from gradclip.smoothness._evaluate import undisturbed
from gradclip.smoothness.path import check_loss, check_match, check_params, listed

__all__ = ["Eigenvalues", "HessianNorm", "directional_smoothness", "hessian_norm", "top_eigenvalues"]

# Products per eigenvalue before any estimate is believed. A start close to a wrong eigenvector has a small
# residual at once; the Krylov space needs some products to blow up the little that it has of the right one.
_FEWEST = 4
# By how many of its residuals a Ritz value may still move. On 124 Hessians of networks in training, to 1 %, 2
# took 6.5 products in the mean and was wrong five times; 1 took 6.1 and was wrong seven times, 3 took 7.4 and
# was wrong three times. The bound that `confidence` asks for took 12.4 and was never wrong.
_DOUBT = 2.0
# Probability of `upper` if none was asked for.
_CONFIDENCE = 0.95
# Vectors of the basis are widened to float64 in pieces of this many elements, which stay in the cache.
_PIECE = 2**16


@dataclass(frozen=True)
class HessianNorm:
    """What :func:`hessian_norm` found.

    Attributes:
        value: ``|θ|``, the estimate of ‖∇²f‖ (unit: loss over parameter squared). Except for rounding it is
            not above the norm.
        residual: ``‖H v − θ v‖ / |θ|`` for the unit vector v that belongs to θ. Some eigenvalue of H is
            within ``residual * value`` of θ, always. 0 if ``value`` is 0.
        converged: whether the stopping rule held after at most ``max_iter`` products.
        hvps: number of Hessian-vector products.
        upper: the norm is at most this, except for rounding, with the probability ``confidence`` or 0.95 over
            the random start (unit as ``value``).
    """

    value: float
    residual: float
    converged: bool
    hvps: int
    upper: float


@dataclass(frozen=True)
class Eigenvalues:
    """What :func:`top_eigenvalues` found.

    Attributes:
        values: eigenvalues θ with their signs, the largest ``|θ|`` first (unit: loss over parameter squared).
        residuals: ``‖H v − θ v‖ / |θ|`` of each, 0 where θ is 0.
        converged: whether the stopping rule held for all of them after at most ``max_iter`` products.
        hvps: number of Hessian-vector products.
    """

    values: tuple[float, ...]
    residuals: tuple[float, ...]
    converged: bool
    hvps: int


def hessian_norm(
    loss: Callable[[], Tensor],
    params: Iterable[Tensor],
    *,
    tol: float = 1e-2,
    max_iter: int = 100,
    generator: torch.Generator | None = None,
    confidence: float | None = None,
) -> HessianNorm:
    """Spectral norm of the Hessian, ``‖∇²f(x)‖ = max |λ|`` over its eigenvalues λ of either sign.

    Lanczos with full reorthogonalisation: after m products with H = ∇²f(x) the estimate is the Ritz value θ
    of largest magnitude, the extreme value of vᵀH v over unit vectors v in the Krylov space span{b, H b, ...,
    H^(m−1) b}. The start b is the sum of the normalised gradient, which in a network lies close to the
    leading eigenvectors and saves several products, and of a normal random vector of length about 1, so that
    no eigenvector is left out.

    ``loss`` is evaluated **once**, its gradient too, and every product differentiates the graph of that
    gradient again, which takes twice the arithmetic of a gradient.

    **When it stops.** With the residual r = ‖H v − θ v‖ an eigenvalue lies within r of θ, and if θ belongs to
    a single eigenvalue at distance gap from all others, θ is within r²/gap of it (Kato and Temple). Every
    other Ritz value ρ with residual s may still move, and counts as ``|ρ| + 2 s``. The iteration stops after
    at least four products if none of these exceeds ``(1 + tol) |θ|`` and, with the gap from θ to the nearest
    ``ρ + 2 s``, either ``r ≤ tol |θ|`` or ``r² ≤ tol |θ| gap``.

    **What that does not prove.** An eigenvector that b hardly contains shows late, and a larger eigenvalue
    can hide behind a small residual; in clusters of eigenvalues that happens. The value is then too small,
    never too large. ``upper`` tells how much can be hidden: an eigenvalue λ outside the Ritz values would
    leave its mark on the recurrence unless the share of its eigenvector in b is below
    1/√(Σ_j p_j(λ)²), with the orthonormal polynomials p_0, p_1, ..., p_m that the Lanczos vectors p_j(H) b
    stand for; and b is random, so that a share so small has a known probability. With ``confidence=0.95``
    the iteration goes on until ``upper`` is at most (1 + tol) ``value``, about twice as many products: do
    that where the number will be quoted.

    Products are rounded to the dtype of the parameters and of what ``loss`` computes in. Rounding makes them
    asymmetric, which is measured, counts in ``residual``, and must be below ``tol`` too: in float32
    a ``tol`` of 1e-5 is about the smallest that can be met, in bfloat16 one of 1e-2.

    Nothing that outlives the call changes: not parameters, ``.grad``, buffers (running statistics of batch
    norm) or random streams. The graph is freed at the end. The memory needed beyond it is one vector of the
    size of the parameters (at least float32) per product and three more in float64.

    Recurrent layers inside ``loss`` run without cuDNN and oneDNN, and attention by the plain formula, because
    the fused kernels have no second derivative: expect them to be slower than in training. Batch norm in
    training mode has a second derivative of its own here, faster than torch's. Code made by
    ``torch.compile`` runs eagerly.

    Args:
        loss: zero-argument callable returning the objective f at the current parameters as a tensor with one
            element. It may be random (dropout): the masks of its one evaluation are part of f.
        params: the parameters x: different leaf tensors that require a gradient. The Hessian is that with
            respect to all of them together; those that ``loss`` does not use have zero rows.
        tol: relative tolerance, positive.
        max_iter: most products to take; fewer than four can establish convergence only for fewer than four
            parameters.
        generator: of the random part of the start; by default one of its own with a fixed seed, so that the
            same call gives the same result.
        confidence: stop only when the norm is known to 1 + ``tol`` with this probability, in (0, 1).

    Returns:
        A :class:`HessianNorm`. An objective linear in the parameters has the norm 0, found without a product.

    Raises:
        ValueError: if an argument is out of range, ``params`` is empty or holds a tensor that is listed
            twice, is not a leaf or does not require a gradient, or ``loss`` does not return a differentiable
            scalar.
        TypeError: if ``loss`` is not callable, or ``tol`` or ``confidence`` not a number.
        RuntimeError: if the loss, its gradient or a product is not finite, or if torch has no second
            derivative for an operation; of attention that is so only where ``loss`` itself asks for a fused
            kernel, and the message says what to do.

    References:
        The bound: van Dorsselaer, Hochstenbach and van der Vorst, "Computing probabilistic bounds for extreme
        eigenvalues of symmetric matrices with the Lanczos method", 2001; with a start that is not normal
        about 0 but about the gradient, which by Anderson's inequality makes a small share no more likely.
        Lanczos, "An iteration method for the solution of the eigenvalue problem of linear differential and
        integral operators", 1950; Parlett, "The symmetric eigenvalue problem", 1998, chapters 4 and 13.
        Products: Pearlmutter, "Fast exact multiplication by the Hessian", 1994. The gradient lies in the
        leading eigenspace: Gur-Ari, Roberts and Dyer, "Gradient descent happens in a tiny subspace", 2018.

    Example:
        >>> import torch
        >>> w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        >>> result = hessian_norm(lambda: w[0] * w[1] - 2 * w[2] ** 2, [w])
        >>> round(result.value, 4), result.converged, result.hvps
        (4.0, True, 3)
    """
    if confidence is not None:
        check_number("confidence", confidence)
    if confidence is not None and not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    with _prepared(loss, params, 1, tol, max_iter) as hessian:
        top, upper = _lanczos(hessian, 1, tol, max_iter, generator, confidence)
    return HessianNorm(abs(top.values[0]), top.residuals[0], top.converged, top.hvps, upper)


def top_eigenvalues(
    loss: Callable[[], Tensor],
    params: Iterable[Tensor],
    k: int,
    *,
    tol: float = 1e-2,
    max_iter: int = 100,
    generator: torch.Generator | None = None,
) -> Eigenvalues:
    """The k eigenvalues of the Hessian that are largest in magnitude, with their signs.

    As :func:`hessian_norm`, whose explanations hold here, but with k start vectors, the first as there and
    the others random. A Krylov space of one vector sees a multiple eigenvalue once; this one sees up to k
    copies. The stopping rule must hold for each of the k, with "product" read as "k products" and "other" as
    "beyond the k". What may be hidden is not bounded.

    Args:
        loss: as for :func:`hessian_norm`.
        params: as for :func:`hessian_norm`.
        k: how many eigenvalues, from 1 to the number of parameters.
        tol: tolerance relative to each eigenvalue, positive.
        max_iter: most products to take, at least k.
        generator: as for :func:`hessian_norm`.

    Returns:
        An :class:`Eigenvalues`.

    Raises:
        ValueError: as for :func:`hessian_norm`.
        RuntimeError: as for :func:`hessian_norm`.

    References:
        Ruhe, "Implementation aspects of band Lanczos algorithms", 1979.

    Example:
        >>> import torch
        >>> w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        >>> result = top_eigenvalues(lambda: w[0] ** 2 + w[1] ** 2 - 2 * w[2] ** 2, [w], 3)
        >>> [round(value, 4) for value in result.values]
        [-4.0, 2.0, 2.0]
    """
    with _prepared(loss, params, k, tol, max_iter) as hessian:
        return _lanczos(hessian, k, tol, max_iter, generator, None)[0]


def directional_smoothness(
    loss: Callable[[], Tensor], params: Iterable[Tensor], direction: Iterable[Tensor]
) -> float:
    """Curvature seen by the gradient along a direction d: ‖∇²f(x) d‖ / ‖d‖.

    It is the limit of :func:`.path_smoothness` for short steps, without differences, and at most ‖∇²f(x)‖.
    The cost is one evaluation of the gradient and one Hessian-vector product; what :func:`hessian_norm` says
    about fused kernels, and about what is left unchanged, holds here.

    Args:
        loss: as for :func:`hessian_norm`.
        params: as for :func:`hessian_norm`.
        direction: d, such as the update, one tensor per parameter, of its shape, on its device.

    Returns:
        The quotient (unit: loss over parameter squared).

    Raises:
        ValueError: as for :func:`hessian_norm`, and if ``direction`` does not match ``params`` or its norm is
            not positive and finite.
        RuntimeError: as for :func:`hessian_norm`.

    Example:
        >>> import torch
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> directional_smoothness(lambda: (w**4).sum(), [w], [torch.tensor([0.5, 0.0])])
        12.0
    """
    check_loss(loss)
    params = listed("params", params)
    direction = [d.detach() for d in listed("direction", direction)]
    check_params(params)
    check_match("direction", direction, params)
    with hessian_at(loss, params) as hessian:
        flat = hessian.flat(direction)
        norm = total_norm(flat).item()
        if not 0.0 < norm < math.inf:
            raise ValueError(f"the norm of direction must be positive and finite, got {norm}")
        return total_norm(hessian(flat / norm)).item()


class NotFiniteError(RuntimeError):
    """A loss, a gradient or a product is infinite or NaN."""


class _Hessian:
    """v ↦ ∇²f v on flat vectors; all products share the graph of one gradient."""

    def __init__(self, value: Tensor, params: list[Tensor]) -> None:
        self.params = params
        self.value = value.item()
        self.size = sum(p.numel() for p in params)
        self.device = params[0].device
        self.dtype = functools.reduce(torch.promote_types, (p.dtype for p in params), torch.float32)
        self.wide = widest_dtype(self.device)
        found = torch.autograd.grad(value, params, create_graph=True, allow_unused=True)
        self.gradient = [torch.zeros_like(p) if g is None else g for g, p in zip(found, params, strict=True)]
        for i, g in enumerate(self.gradient):
            if g.layout != torch.strided:
                raise ValueError(f"the gradient of params[{i}] must be dense, got layout {g.layout}")
        self.direction = self._flat("the gradient", self.gradient)
        # The gradient with respect to parameters that are not used, or only linearly, has no graph.
        self.curved = [i for i, g in enumerate(self.gradient) if g.requires_grad]

    def flat(self, tensors: Iterable[Tensor]) -> Tensor:
        """All elements one after the other, in the widest dtype of the device."""
        return torch.cat([t.detach().reshape(-1).to(self.device, self.wide) for t in tensors])

    def __call__(self, vector: Tensor) -> Tensor:
        if not self.curved:
            return vector.new_zeros(self.size, dtype=self.wide)
        pieces = vector.split([p.numel() for p in self.params])
        products = torch.autograd.grad(
            [self.gradient[i] for i in self.curved],
            self.params,
            [pieces[i].view(self.params[i].shape).to(self.gradient[i]) for i in self.curved],
            retain_graph=True,
            materialize_grads=True,
        )
        return self._flat("the product of the Hessian with a unit vector", products)

    def _flat(self, name: str, tensors: Sequence[Tensor]) -> Tensor:
        flat = self.flat(tensors)
        if not flat.sum().isfinite():  # one pass; in the rare case look closer
            for i, t in enumerate(tensors):
                wrong = t.detach()[~t.isfinite()]
                if wrong.numel():
                    raise NotFiniteError(f"{name} has the element {wrong[0].item()} for params[{i}]")
        return flat


@contextlib.contextmanager
def _prepared(
    loss: Callable[[], Tensor], params: Iterable[Tensor], k: int, tol: float, max_iter: int
) -> Iterator[_Hessian]:
    check_loss(loss)
    params = listed("params", params)
    check_params(params)
    size = sum(p.numel() for p in params)
    check_number("tol", tol)
    if not 1 <= k <= size:
        raise ValueError(f"k must be between 1 and {size}, the number of parameters, got {k}")
    if not 0.0 < tol < math.inf:
        raise ValueError(f"tol must be positive and finite, got {tol}")
    if max_iter < k:
        raise ValueError(f"max_iter must be at least {k}, one product per eigenvalue, got {max_iter}")
    with hessian_at(loss, params) as hessian:
        yield hessian


@contextlib.contextmanager
def hessian_at(loss: Callable[[], Tensor], params: list[Tensor]) -> Iterator[_Hessian]:
    """The Hessian where the parameters are, good for products as long as the context is open."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_told_what_to_do())
        rewind = stack.enter_context(undisturbed())
        stack.enter_context(torch.enable_grad())
        # Until the last product, because a checkpointed part of the loss runs again inside every one.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_TwiceDifferentiable())
        rewind()
        value = loss()
        if not isinstance(value, Tensor):
            raise ValueError(f"loss must return a tensor, got {type(value).__name__}")
        if value.numel() != 1:
            raise ValueError(f"loss must return one element, got shape {tuple(value.shape)}")
        if not value.requires_grad:
            raise ValueError("loss must depend on params, got a tensor that does not require a gradient")
        if not value.isfinite():
            raise NotFiniteError(f"the loss is {value.item()}")
        for device in {p.device.type for p in params}:
            # Derivatives have the dtypes of the forward pass; a caller's autocast would cast them again.
            stack.enter_context(torch.autocast(device, enabled=False))
        yield _Hessian(value, params)


@contextlib.contextmanager
def _told_what_to_do() -> Iterator[None]:
    """Adds to torch's message, where an operation has no second derivative, how to do without it."""
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"derivative for '?([\w:]+)'? is not implemented", str(error))
        if not found:
            raise
        name, remedy = found[1], "write it out by operations that have one"
        if "attention" in name:
            remedy = (
                "call attention inside the loss by the plain formula, "
                "`with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):`"
            )
        raise RuntimeError(
            f"the loss has no second derivative: that of {name} is not implemented; {remedy}"
        ) from error


_RECURRENT = frozenset((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu))


class _TwiceDifferentiable(TorchFunctionMode):
    """Has layers run in a way that can be differentiated twice, and fast."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _RECURRENT:
            return _without_fused_kernels(func, *args, **kwargs)
        if func is batch_norm:
            return _batch_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _without_fused_kernels(func: Callable, *args, **kwargs):
    """Call ``func`` with cuDNN and oneDNN off.

    Only while a recurrent layer runs: convolutions have second derivatives with them, and need their speed.
    """
    backends = (torch.backends.cudnn, torch.backends.mkldnn)
    before = [backend.enabled for backend in backends]
    try:
        # Not by their context manager `flags`: it sets TF32 as well, which some builds warn about.
        for backend in backends:
            backend.enabled = False
        return func(*args, **kwargs)
    finally:
        for backend, enabled in zip(backends, before, strict=True):
            backend.enabled = enabled


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if (
        training
        and weight is not None
        and bias is not None
        and x.dtype == weight.dtype == bias.dtype
        and x.dtype in (torch.float32, torch.float64)
        and x.device.type in ("cpu", "cuda")
        and x.numel() > x.shape[1]  # else an error, which torch words
    ):
        return _BatchNorm.apply(x, weight, bias, running_mean, running_var, momentum, eps)
    return batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)


class _BatchNorm(torch.autograd.Function):
    """Batch norm in training mode with a faster second derivative.

    torch composes it of dozens of operations on whole activations, which were 40 % of the time of a product
    of a ResNet-20 on a CPU. One fused kernel, one sum and six more operations are enough.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps):
        y, mean, scale = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, True, momentum, eps
        )
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx, g):
        return *_BatchNormGradient.apply(g, *ctx.saved_tensors, ctx.eps), None, None, None, None


class _BatchNormGradient(torch.autograd.Function):
    """gx = w s (g − mean g − h mean(g h)), gw = Σ g h and gb = Σ g, per channel.

    Here h = s (x − mean x) is the normalised x, and s = 1/√(var x + eps).
    """

    @staticmethod
    def forward(ctx, g, x, weight, mean, scale, eps):
        gradients = _batch_norm_backward(g, x, weight, mean, scale, eps)
        ctx.save_for_backward(g, x, weight, mean, scale, *gradients[1:])
        ctx.eps = eps
        return gradients

    @staticmethod
    @once_differentiable
    def backward(ctx, u, v, z):
        # L = Σ u gx + v gw + z gb = w s a + v Σ g h + z Σ g, with a as below.
        g, x, w, mean, s, gh, g1 = ctx.saved_tensors
        n = x.numel() // x.shape[1]
        shape = (-1,) + (1,) * (x.ndim - 2)
        channels = [d for d in range(x.ndim) if d != 1]
        to_g, uh, u1 = _batch_norm_backward(u, x, w, mean, s, ctx.eps)
        a = (u * g).sum(channels) - (u1 * g1 + uh * gh) / n
        centred = x - mean.view(shape)
        to_g.addcmul_(centred, (s * v).view(shape)).add_(z.view(shape))
        # dL/dh = cu u + cg g; then through h to x, and dL/ds = w a through s.
        cu, cg = -w * s * gh / n, v - w * s * uh / n
        ch = -(cu * uh + cg * gh) / n - w * s * a / n
        constant = -s * (cu * u1 + cg * g1) / n
        to_x = torch.addcmul(constant.view(shape), u, (s * cu).view(shape))
        to_x.addcmul_(g, (s * cg).view(shape)).addcmul_(centred, (s * s * ch).view(shape))
        return to_g, to_x, s * a, None, None, None


def _batch_norm_backward(g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, eps: float):
    return torch.ops.aten.native_batch_norm_backward(
        g, x, weight, None, None, mean, scale, True, eps, [True, True, True]
    )


def _lanczos(
    hessian: _Hessian,
    k: int,
    tol: float,
    max_iter: int,
    generator: torch.Generator | None,
    confidence: float | None,
) -> tuple[Eigenvalues, float]:
    """Rayleigh-Ritz on the Krylov space of k start vectors, one product at a time (band Lanczos).

    The second result is the bound that :func:`hessian_norm` reports; it means something for k = 1 only.
    """
    if not hessian.curved:
        return Eigenvalues((0.0,) * k, (0.0,) * k, True, 0), 0.0
    basis = _Basis(hessian)
    lengths = [basis.append_rest(start, 0.0)[-1] for start in _starts(hessian, k, generator)]
    # A share of an eigenvector below 1/√excess in the normalised first start is too improbable to count: of
    # size normal numbers over √size, as which the random part begins, one has a square below this quantile.
    excess = hessian.size * lengths[0] ** 2 / (2 * erfinv(1 - (confidence or _CONFIDENCE)) ** 2)

    columns: list[NDArray[np.float64]] = []
    unit, settled, exhausted = 0.0, False, False
    epsilon = 10 * torch.finfo(hessian.dtype).eps
    while not (settled or exhausted) and len(columns) < max_iter:
        product = hessian(basis.vectors[len(columns)])
        unit = max(unit, total_norm(product).item())
        columns.append(basis.append_rest(product, epsilon * unit))

        # H V_m = V T, with V_m the m vectors that products were taken with and V the whole basis.
        m = len(columns)
        table = np.zeros((len(basis.vectors), m))
        for j, column in enumerate(columns):
            table[: len(column), j] = column
        table /= unit or 1.0  # squares of very small or large entries would leave the range of numbers
        ritz, vectors = np.linalg.eigh((table[:m] + table[:m].T) / 2)
        order = np.argsort(-np.abs(ritz), kind="stable")
        ritz, vectors = ritz[order], vectors[:, order]
        # H v − θ v has two parts: what leaves the span of V_m, and what a symmetric H would not have.
        outside = np.linalg.norm(table[m:] @ vectors, axis=0)
        asymmetric = np.linalg.norm((table[:m] - table[:m].T) / 2 @ vectors, axis=0)

        # What is nothing but rounding stands for the eigenvalue 0, to which no tolerance can be relative.
        zero = np.abs(ritz) + outside + asymmetric <= epsilon
        allowed = np.where(zero, math.inf, tol * np.abs(ritz)) - asymmetric
        exhausted = m == len(basis.vectors)
        accurate = m >= k and bool((outside[:k] <= allowed[:k]).all())
        settled = m >= _FEWEST * k and _settled(ritz, outside, allowed, k, tol)
        if settled and confidence is not None:
            settled = _hidden_below(table, (1 + tol) * abs(ritz[0]), excess, epsilon)
    values = ritz[:k]
    residuals = np.divide(
        np.hypot(outside, asymmetric)[:k], np.abs(values), out=np.zeros(k), where=values != 0
    )
    converged = settled or (exhausted and accurate)
    found = Eigenvalues(tuple((unit * values).tolist()), tuple(residuals.tolist()), converged, m)
    return found, unit * float(_upper(table, abs(ritz[0]), excess, epsilon))


def _settled(
    ritz: NDArray[np.float64], residual: NDArray[np.float64], allowed: NDArray[np.float64], k: int, tol: float
) -> bool:
    """The stopping rule that :func:`hessian_norm` states, for the first k of the sorted Ritz values."""
    reach = _DOUBT * residual
    if (np.abs(ritz[k:]) + reach[k:] > (1 + tol) * abs(ritz[k - 1])).any():
        return False
    for i in range(k):
        if residual[i] > allowed[i]:
            gap = (np.abs(np.delete(ritz, i) - ritz[i]) - np.delete(reach, i)).min()
            if residual[i] ** 2 > allowed[i] * gap:
                return False
    return True


def _hidden_below(table: NDArray[np.float64], bound: float, excess: float, leftover: float) -> bool:
    """Whether an eigenvalue λ with |λ| > bound, which no Ritz value exceeds, is too improbable to count.

    Its eigenvector u has the coefficients w = Vᵀu with wᵀT = λ wᵀ (first m entries), because H V_m = V T.
    So w_j = p_j(λ) w_0, and Σ w_j² ≤ 1. Outside the Ritz values p_j² rises with |λ|.
    """
    n, m = table.shape
    if n == m:  # what was left was not appended: its length is below this
        table = np.vstack((table, np.append(np.zeros(m - 1), leftover)))
    for value in (bound, -bound):
        p, total = np.zeros(m + 1), 1.0
        p[0] = 1.0
        for j in range(m):
            p[j + 1] = (value * p[j] - p[: j + 1] @ table[: j + 1, j]) / table[j + 1, j]
            total += p[j + 1] ** 2
            if total >= excess:  # and may overflow from here
                break
        else:
            return False
    return True


def _upper(table: NDArray[np.float64], value: float, excess: float, leftover: float) -> float:
    """The least bound for which :func:`_hidden_below` holds, to 1e-4 and rounded upwards."""
    if value == 0.0 or _hidden_below(table, value, excess, leftover):
        return value
    low, high = value, 2 * value
    while not _hidden_below(table, high, excess, leftover):
        low, high = high, 2 * high
    while high > (1 + 1e-4) * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if _hidden_below(table, middle, excess, leftover) else (middle, high)
    return high


def _starts(hessian: _Hessian, k: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    for i in range(k):
        start = torch.randn(hessian.size, generator=generator, device=generator.device)
        start = start.to(hessian.device, hessian.wide).div_(math.sqrt(hessian.size))
        if i == 0:
            norm = total_norm(hessian.direction)
            if norm > 0:
                start += hessian.direction / norm
        yield start


class _Basis:
    """Orthonormal vectors in the dtype of the products; inner products and sums in the widest dtype."""

    def __init__(self, hessian: _Hessian) -> None:
        self.size, self.dtype = hessian.size, hessian.dtype
        self.vectors: list[Tensor] = []

    def append_rest(self, vector: Tensor, negligible: float) -> NDArray[np.float64]:
        """Take the basis out of ``vector``, append what is left, and return all coefficients.

        The vector is overwritten. Nothing is appended if not more than ``negligible`` is left.
        """
        coefficients = np.zeros(len(self.vectors))
        before, after = math.inf, total_norm(vector).item()
        # Again where digits have cancelled: what is left must be orthogonal to the basis, too.
        while self.vectors and negligible < after < 0.1 * before:
            coefficients += self._take_out(vector)
            before, after = after, total_norm(vector).item()
        if after <= negligible or len(self.vectors) == self.size:
            return coefficients
        self.vectors.append((vector / after).to(self.dtype))
        return np.append(coefficients, after)

    def _take_out(self, vector: Tensor) -> NDArray[np.float64]:
        found = vector.new_zeros(len(self.vectors))
        for part, lot in self._lots(vector):
            found += lot @ part
        for part, lot in self._lots(vector):
            part -= found @ lot
        return found.cpu().double().numpy()

    def _lots(self, vector: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pieces of the vector, each with the same piece of all basis vectors as the rows of a matrix."""
        for parts in zip(*(v.split(_PIECE) for v in (vector, *self.vectors)), strict=True):
            yield parts[0], torch.stack(parts[1:]).to(vector.dtype)
