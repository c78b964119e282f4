"""Steps that find their own length, and the learning rate and threshold that they suggest."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from gradclip.norms import total_norm
from gradclip.smoothness.fit import Fit, Recommendation, check_multiple, fit
from gradclip.smoothness.hessian import NotFiniteError, hessian_at
from gradclip.smoothness.path import check_loss, check_params, listed

__all__ = ["WarmUp", "warm_up"]


@dataclass(frozen=True)
class WarmUp:
    """What :func:`warm_up` has measured, one value per step.

    Attributes:
        grad_norms: ‖∇f_k(x_k)‖ (loss/parameter).
        smoothness: h_k = ‖∇²f_k(x_k) ∇f_k(x_k)‖ / ‖∇f_k(x_k)‖ (loss/parameter²).
        losses: f_k(x_k).
        update_lengths: ‖x_{k+1} - x_k‖ (parameter).
        multiple: of the step 1/h_k.
        stopped: why it ended before the losses did, or empty.
    """

    grad_norms: tuple[float, ...]
    smoothness: tuple[float, ...]
    losses: tuple[float, ...]
    update_lengths: tuple[float, ...]
    multiple: float
    stopped: str = ""

    def fit(self) -> Fit:
        """The median line h = L0 + L1 g through the points, see :func:`.fit`.

        Raises:
            ValueError: There are fewer than eight points; the message says why the warm-up ended, if it did.
        """
        try:
            return median_line(self.grad_norms, self.smoothness)
        except ValueError as error:
            if not self.stopped:
                raise
            raise ValueError(f"{error}; the warm-up ended early: {self.stopped}") from None

    def recommend(self, multiple: float | None = None) -> Recommendation:
        """Learning rate and threshold of the step multiple/(L0 + L1 g), by :meth:`.Fit.recommend`.

        The advice is for steps without momentum. With momentum m, the update adds up to 1/(1 - m) gradients:
        multiply the learning rate by 1 - m. From batch to batch the product of the two numbers, the length of
        a clipped step, is steadier than either.

        Args:
            multiple: Length of the advised step in units of 1/(L0 + L1 g); by default that of the warm-up's
                steps in units of 1/h_k.

        Raises:
            TypeError: ``multiple`` is not a number.
            ValueError: As for :meth:`fit`, or ``multiple`` is not positive and finite.
        """
        return self.fit().recommend(self.multiple if multiple is None else multiple)


def median_line(grad_norms: Iterable[float], smoothness: Iterable[float]) -> Fit:
    """The line of :meth:`WarmUp.fit`, half of the points on or below it and half on or above."""
    return fit(grad_norms, smoothness, method="quantile", quantile=0.5)


def warm_up(
    losses: Iterable[Callable[[], Tensor]], params: Iterable[Tensor], *, multiple: float = 2.0
) -> WarmUp:
    """Descend by steps as long as the curvature at hand allows, and put the parameters back.

    At x_k, with the loss f_k of a batch::

        h_k = ‖∇²f_k(x_k) ∇f_k(x_k)‖ / ‖∇f_k(x_k)‖,      x_{k+1} = x_k - (multiple/h_k) ∇f_k(x_k)

    Nothing has to be chosen beforehand that the answer would depend on: curvature that is measured along
    steps of a given length depends on that length. For a quadratic f whose gradient is an eigenvector,
    ``multiple=1`` goes to the minimum, and above 2 the loss rises: 2 walks on the edge, where gradient
    descent with a fixed step is seen to settle. :meth:`WarmUp.recommend` is the clipped step that is as long
    in the middle of the points.

    A step costs a gradient and a Hessian-vector product, the time of four to ten training steps. The warm-up
    ends early where no next step exists, and says so in ``stopped``: at a loss, a gradient or a product that
    is not finite, a gradient of zero, or no curvature along it.

    Args:
        losses: One loss per step, as :func:`.hessian_norm` wants it: a callable without arguments, of one
            batch, eight or more. An iterator may make the next one from the parameters as they are then.
        params: All parameters that are to be trained, and none that is frozen: of a network in part frozen,
            ``[p for p in model.parameters() if p.requires_grad]``. They are put back at the end, also behind
            an error.
        multiple: Length of a step in units of 1/h_k, positive.

    Returns:
        A :class:`WarmUp`.

    Raises:
        ValueError: ``multiple`` is not positive and finite, or as raised by :func:`.hessian_norm`.
        TypeError: An argument is of a wrong kind.
        RuntimeError: The loss has no second derivative, as by :func:`.hessian_norm`.

    References:
        Cohen, Kaur, Li, Kolter and Talwalkar, "Gradient descent on neural networks typically occurs at the
        edge of stability", ICLR 2021, for the edge. The recipe is this project's; its test is the experiment
        ``threshold``.

    Example:
        >>> import torch
        >>> w = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
        >>> found = warm_up([lambda: torch.cosh(w).sum()] * 12, [w], multiple=0.5)
        >>> advice = found.recommend()
        >>> advice.rule, round(advice.lr, 1), round(advice.max_norm, 1), w.tolist()
        ('soft', 0.6, 1.0, [3.0, 1.0])
    """
    check_multiple(multiple)
    params = listed("params", params)
    check_params(params)
    saved = [p.detach().clone() for p in params]
    rows: list[tuple[float, float, float, float]] = []
    stopped = ""
    try:
        for loss in losses:
            check_loss(loss)
            try:
                with hessian_at(loss, params) as hessian:
                    norm = total_norm(hessian.direction).item()
                    if norm == 0.0:
                        stopped = "the gradient is zero"
                        break
                    h = total_norm(hessian(hessian.direction / norm)).item()
                    value, gradient = hessian.value, hessian.gradient
            except NotFiniteError as error:
                stopped = str(error)
                break
            if h == 0.0:
                stopped = "there is no curvature along the gradient"
                break
            for p, g in zip(params, gradient, strict=True):
                # `.data`: as if the parameters had never been away.
                p.data.add_(g.detach(), alpha=-multiple / h)
            rows.append((norm, h, value, multiple / h * norm))
    finally:
        for p, x in zip(params, saved, strict=True):
            p.data.copy_(x)
    columns = tuple(zip(*rows, strict=True)) or ((), (), (), ())
    return WarmUp(*columns, multiple=float(multiple), stopped=stopped)
