"""Smoothness along a step, from differences of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradclip.norms import local, total_norm
from gradclip.smoothness._evaluate import undisturbed

__all__ = ["PathSmoothness", "path_smoothness"]


@dataclass(frozen=True)
class PathSmoothness:
    """What :func:`path_smoothness` measured.

    Attributes:
        value: the largest of ``values`` (unit: loss over parameter squared); NaN if any of them is.
        values: L(a), one per fraction.
        fractions: the fractions a of the step, in the order given.
        grad_norm: ‖∇f(x)‖ at the start of the step (unit: loss over parameter).
        step_norm: ‖d‖ (unit of the parameters).
        gradients: how many gradients were evaluated.
    """

    value: float
    values: tuple[float, ...]
    fractions: tuple[float, ...]
    grad_norm: float
    step_norm: float
    gradients: int


def path_smoothness(
    loss: Callable[[], Tensor],
    params: Iterable[Tensor],
    step: Iterable[Tensor],
    *,
    fractions: Sequence[float] = (1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6),
    grad: Iterable[Tensor | None] | None = None,
) -> PathSmoothness:
    """Smoothness met on the way from x to x + d:

        L(a) = ‖∇f(x + a d) − ∇f(x)‖ / (a ‖d‖),   value = max over the fractions a of L(a).

    If f has a Lipschitz gradient with constant L, no L(a) exceeds L. If f is (L0, L1)-smooth in the Hessian
    form, L(a) ≤ (L0 + L1 ‖∇f(x)‖) (e^t − 1)/t with t = L1 a ‖d‖. As a → 0, L(a) → ‖∇²f(x) d‖ / ‖d‖. For large
    a it says less about curvature: L(a) ≤ (‖∇f(x + a d)‖ + ‖∇f(x)‖) / (a ‖d‖) whatever f is.

    The parameters are moved in place, so ``loss`` needs no changes, and they hold their old bits again when
    the function returns or raises, a KeyboardInterrupt included. So do the buffers of the modules that
    ``loss`` calls (running statistics of batch norm) and the random streams of torch, Python and numpy.
    ``.grad``, ``requires_grad``, train and eval mode and autograd versions are untouched: a graph built
    before the call can still be differentiated after it.

    The memory needed, beyond the graph of one evaluation, is at most three times that of the parameters: a
    copy of them, the gradient at x (if not given), the gradient at x + a d. The work is one gradient per
    fraction, and one for x if it is not given.

    Args:
        loss: zero-argument callable returning the objective f at the current parameters as a tensor with one
            element, on the same batch at every call, and not calling ``backward``. It may be random: before
            each evaluation buffers and random streams are set back to their state at the call, so that
            dropout draws the same masks for all of them. (Only generators that it keeps for itself are beyond
            reach, and so is what modules change besides buffers; with such noise L(a) measures the noise,
            divided by a ‖d‖.) Code made by ``torch.compile`` runs eagerly, at its speed before compilation.
            A loss that was wrapped for data-parallel training must be given unwrapped.
        params: the parameters x: different leaf tensors that require a gradient. Weights tied in the usual
            way, one parameter used by two modules, are listed once, as ``model.parameters()`` does. DTensors
            are allowed; every rank must make the call.
        step: the displacement d, one tensor per parameter, of its shape, on its device; floating dtypes may
            differ.
        fractions: where to look along the step, positive and finite. Subtracting two gradients leaves a
            relative error of about u ‖∇f(x)‖ / ‖∇f(x + a d) − ∇f(x)‖ in L(a), with u the accuracy of a
            computed gradient, some 1e-6 in float32; the difference shrinks with a, the error does not.
            Together with the O(a) by which L(a) differs from its limit, a = 1e-2 is a sensible smallest
            fraction in float32 and 1e-6 in float64. Where ``loss`` computes in bfloat16 under
            ``torch.autocast``, u is some 4e-3 whatever the dtype of the parameters: L(a) has a floor at about
            4e-3 ‖∇f(x)‖ / (a ‖d‖), and only fractions at which the gradient changes by much more than a
            hundredth of itself say anything about f; evaluate a loss in float32 if that is not enough. In
            any case, halve the fraction: if L(a) changes, it is too small or too large. (Rounding x + a d to
            the dtype of the parameters adds a relative error of up to eps ‖x‖ / (a ‖d‖).)
        grad: ∇f(x), one tensor per parameter, if it is known (say, from ``.grad`` after
            ``loss().backward()``, before any clipping or unscaling); None entries stand for zero. It saves
            one gradient. It must be the gradient of the very function that is evaluated here. If ``loss`` is
            random, that means: evaluated from the state that the random streams have at this call. Draws
            made since then, or masks drawn by compiled code, make it another function's gradient, and L(a)
            their difference; leave it out then.

    Returns:
        A :class:`PathSmoothness`. Overflowing or NaN gradients give infinite or NaN values, not an exception.
        Parameters that ``loss`` does not use count with gradient zero.

    Raises:
        ValueError: if a list is empty or of the wrong length, a shape, dtype or device does not match, a
            parameter is listed twice, shares its memory with another one, is not a leaf or does not require a
            gradient, the step is zero or not finite, a fraction is not positive and finite, or ``loss`` does
            not return a differentiable scalar.
        TypeError: if ``loss`` is not callable, or ``params``, ``step`` or ``grad`` is a single tensor or
            holds something that is not a tensor.

    References:
        Zhang, He, Sra and Jadbabaie, "Why gradient clipping accelerates training", ICLR 2020: the vertical
        axis of its Figures 1 to 3; these five fractions as recalled from its appendix. Measuring along the
        step: Santurkar et al., "How does batch normalization help optimization?", NeurIPS 2018.

    Example:
        >>> import torch
        >>> w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        >>> def loss():
        ...     return (w**4).sum()
        >>> result = path_smoothness(loss, [w], [torch.tensor([0.6, 0.0])], fractions=(1e-6, 0.5, 1.0))
        >>> [round(value, 3) for value in result.values]
        [12.0, 15.96, 20.64]
        >>> result.gradients, w.tolist()
        (4, [1.0, 2.0])
    """
    check_loss(loss)
    params = listed("params", params)
    step = [d.detach() for d in listed("step", step)]
    check_params(params)
    check_match("step", step, params)
    fractions = checked_fractions(fractions)
    step_norm = total_norm(step).item()
    if not 0.0 < step_norm < math.inf:
        bad = [i for i, d in enumerate(step) if not d.isfinite().all()]
        where = f" (step[{bad[0]}] is not finite)" if bad else ""
        raise ValueError(f"the norm of step must be positive and finite, got {step_norm}{where}")

    start = None
    if grad is not None:
        start = listed("grad", grad, optional=True)
        check_match("grad", start, params)
        start = [None if g is None else g.detach() for g in start]

    with undisturbed() as rewind:
        if start is None:
            rewind()
            start = _gradient(loss, params)
        norms = [total_norm([g for g in start if g is not None])]
        saved = [p.detach().clone() for p in params]
        try:
            for a in fractions:
                _move(params, saved, step, a)
                rewind()
                moved = _gradient(loss, params)
                # The parameters have served and are overwritten next: they hold the difference, or it would
                # need memory of its own. Not in place in `moved`: autograd may return one tensor for two
                # parameters, or an expanded one.
                for p, g, g0 in zip(params, moved, start, strict=True):
                    if g0 is None:
                        p.data.copy_(g)
                    else:
                        torch.sub(g, g0, out=p.data)
                del moved, g
                norms.append(total_norm([p.data for p in params]))
        finally:
            _move(params, saved, step, 0.0)

    grad_norm, *changes = (norm.item() for norm in norms)
    values = tuple(change / (a * step_norm) for change, a in zip(changes, fractions, strict=True))
    return PathSmoothness(
        value=math.nan if any(map(math.isnan, values)) else max(values),
        values=values,
        fractions=fractions,
        grad_norm=grad_norm,
        step_norm=step_norm,
        gradients=len(fractions) + (grad is None),
    )


def check_loss(loss: Any) -> None:
    if not callable(loss):
        raise TypeError(
            f"loss must be callable without arguments, got {type(loss).__name__}; pass lambda: ..."
        )


def listed(name: str, tensors: Iterable, *, optional: bool = False) -> list:
    if isinstance(tensors, Tensor):
        raise TypeError(f"{name} must be a list of tensors, got one tensor of shape {tuple(tensors.shape)}")
    listed = list(tensors)
    for i, t in enumerate(listed):
        if not (isinstance(t, Tensor) or (t is None and optional)):
            raise TypeError(f"{name}[{i}] must be a tensor, got {type(t).__name__}")
    return listed


def check_params(params: list[Tensor]) -> None:
    if not params:
        raise ValueError("params must not be empty, got []")
    seen: dict[int, int] = {}
    where: dict[int, int] = {}
    for i, p in enumerate(params):
        if not p.is_floating_point():
            raise ValueError(f"params[{i}] must be real floating point, got {p.dtype}")
        if not (p.is_leaf and p.requires_grad):
            # `requires_grad` is False for frozen parameters alone: what is computed from others inherits it.
            advice = "" if p.requires_grad else "; list [p for p in model.parameters() if p.requires_grad]"
            raise ValueError(
                f"params[{i}] must be a leaf that requires a gradient, "
                f"got is_leaf={p.is_leaf}, requires_grad={p.requires_grad}{advice}"
            )
        # Its share of the norms would count twice, and of its two steps only the last would be taken.
        if id(p) in seen:
            raise ValueError(f"params[{seen[id(p)]}] and params[{i}] are the same tensor: list it once")
        seen[id(p)] = i
        address = local(p).data_ptr()
        if local(p).numel() and address in where:
            raise ValueError(
                f"params[{where[address]}] and params[{i}] are two tensors in the same memory, which cannot "
                "move independently: tie weights by using one parameter twice"
            )
        where[address] = i


def check_match(name: str, tensors: list[Tensor | None], params: list[Tensor]) -> None:
    if len(tensors) != len(params):
        raise ValueError(f"{name} must have one tensor per parameter, got {len(tensors)} for {len(params)}")
    for i, (t, p) in enumerate(zip(tensors, params, strict=True)):
        if t is None:
            continue
        if t.shape != p.shape:
            raise ValueError(f"{name}[{i}] has shape {tuple(t.shape)}, params[{i}] has {tuple(p.shape)}")
        if not t.is_floating_point() or t.layout != torch.strided:
            raise ValueError(
                f"{name}[{i}] must be dense and real floating point, got {t.dtype} with layout {t.layout}"
            )
        if t.device != p.device:
            raise ValueError(f"{name}[{i}] is on {t.device}, params[{i}] on {p.device}")


def checked_fractions(fractions: Sequence[float]) -> tuple[float, ...]:
    checked = tuple(float(a) for a in fractions)
    if not checked:
        raise ValueError("fractions must not be empty, got ()")
    for a in checked:
        if not 0.0 < a < math.inf:
            raise ValueError(f"fractions must be positive and finite, got {a}")
    return checked


def _gradient(loss: Callable[[], Tensor], params: list[Tensor]) -> list[Tensor]:
    with torch.enable_grad():
        value = loss()
    if not isinstance(value, Tensor):
        raise ValueError(f"loss must return a tensor, got {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(f"loss must return one element, got shape {tuple(value.shape)}")
    if not value.requires_grad:
        raise ValueError("loss must depend on params, got a tensor that does not require a gradient")
    gradient = torch.autograd.grad(value, params, materialize_grads=True)
    for i, g in enumerate(gradient):
        if g.layout != torch.strided:
            raise ValueError(f"the gradient of params[{i}] must be dense, got layout {g.layout}")
    return list(gradient)


def _move(params: list[Tensor], saved: list[Tensor], step: list[Tensor], a: float) -> None:
    """Set the parameters to saved + a step; to exactly ``saved``, signs of zeros included, if a is 0."""
    for p, x, d in zip(params, saved, step, strict=True):
        # `.data` does not bump the autograd version. That is sound because the old bits come back, and it is
        # needed so that a caller who has already computed a loss can still call backward on it.
        if a == 0.0:
            p.data.copy_(x)
        else:
            torch.add(x, d, alpha=a, out=p.data)
