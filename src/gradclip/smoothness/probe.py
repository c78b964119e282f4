"""Smoothness along a training run, measured without changing the run."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradclip import records
from gradclip.norms import total_norm
from gradclip.smoothness.hessian import directional_smoothness, hessian_norm
from gradclip.smoothness.path import check_loss, check_params, checked_fractions, listed, path_smoothness

if TYPE_CHECKING:
    import pandas

__all__ = ["Probe"]


class Probe:
    """Measures smoothness at every k-th step of a training loop, on a fixed batch and on the training batch.

    ::

        probe = Probe(lambda: model_loss(fixed_batch), model.parameters(), every=10)
        for batch in batches:
            optimizer.zero_grad()
            model_loss(batch).backward()
            with probe.step(lambda: model_loss(batch), optimizer):
                optimizer.step()
        probe.frame()

    All is measured at x_k, where the step starts, along the step d = x_{k+1} − x_k that the optimizer then
    really takes. The fixed batch is the same function at every step; the training batch is the one that
    the step was computed from, and a step is special for its own batch. Both ends of every difference see one
    batch and the same dropout masks.

    **Training is the same, bit for bit, with and without the probe**: parameters, ``.grad``, buffers, the
    optimizer's state, train and eval mode, random streams and global settings are what they would be without
    it (see :func:`.path_smoothness` for what this asks of a loss).

    On a step that is due, each batch costs 1 + len(fractions) gradients, with ``directional`` one more and a
    Hessian-vector product, and with ``hessian`` what :func:`.hessian_norm` needs. The memory for it is twice
    that of the parameters, beside what these functions need one after the other. Other steps cost nothing.

    Args:
        loss: the loss on the fixed batch, as :func:`.path_smoothness` wants it: a callable without arguments.
        params: all parameters that the optimizer changes. Those left out are at x_{k+1} while x_k is
            measured.
        every: measure the first step and every ``every``-th after it.
        fractions: where to look along the step, see :func:`.path_smoothness`.
        directional: whether to measure ‖∇²f(x_k) d‖/‖d‖. It needs second derivatives.
        hessian: whether to measure ‖∇²f(x_k)‖.
        tol: relative tolerance of :func:`.hessian_norm`.
        confidence: of :func:`.hessian_norm`; None is about twice as fast, and now and then wrong.

    Raises:
        ValueError: if ``params`` or ``fractions`` are not what :func:`.path_smoothness` accepts, or ``every``
            is less than 1.

    Example:
        >>> import torch
        >>> from gradclip.optim import ClippedSGD
        >>> w = torch.tensor([3.0, 0.0], requires_grad=True)
        >>> def loss():
        ...     return (torch.tensor([1.0, 2.0]) * w**2).sum()
        >>> optimizer = ClippedSGD([w], lr=0.1, max_norm=1.0)
        >>> probe = Probe(loss, [w], every=2)
        >>> for _ in range(4):
        ...     optimizer.zero_grad()
        ...     loss().backward()
        ...     with probe.step(optimizer=optimizer):
        ...         optimizer.step()
        >>> [(row["step"], round(row["path_smoothness"], 2)) for row in probe.rows]
        [(0, 2.0), (2, 2.0)]
    """

    def __init__(
        self,
        loss: Callable[[], Tensor],
        params: Iterable[Tensor],
        *,
        every: int = 10,
        fractions: Sequence[float] = (1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6),
        directional: bool = True,
        hessian: bool = False,
        tol: float = 1e-2,
        confidence: float | None = 0.95,
    ) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a whole number of at least 1, got {every!r}")
        check_loss(loss)
        self.loss = loss
        self.params = listed("params", params)
        check_params(self.params)
        self.every = every
        self.fractions = checked_fractions(fractions)
        if len({_column(a) for a in self.fractions}) < len(self.fractions):
            raise ValueError(f"fractions must differ in four digits, got {self.fractions}")
        self.directional = directional
        self.hessian = hessian
        self.tol = tol
        self.confidence = confidence
        #: One dict per measured step and batch, with the keys that :meth:`frame` describes.
        self.rows: list[dict[str, Any]] = []
        self._steps = 0
        self._seconds = 0.0
        self._start = time.monotonic()

    @contextlib.contextmanager
    def step(
        self,
        loss: Callable[[], Tensor] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        grad: Iterable[Tensor | None] | None = None,
    ) -> Iterator[None]:
        """Stand around ``optimizer.step()``: ``with probe.step(loss, optimizer): optimizer.step()``.

        Measures when the block ends, if this step is due. If the block raises, nothing is measured.

        What training can survive is no error: a step without length (the optimizer or a gradient scaler has
        skipped it) or of infinite or NaN length, a gradient that is not finite, second derivatives that do
        not exist or are not finite. The row says what it was under ``problem``, and the rest is NaN.

        Args:
            loss: the loss on the training batch, or None to leave it out. If several batches are accumulated,
                the loss whose gradient is the accumulated one, such as the sum of theirs.
            optimizer: where ``clip_factor`` and ``clipped_from`` are read from, as ``last_factor`` and
                ``last_norm``, if it has them. It is never changed.
            grad: the gradient of ``loss`` at x_k, if it is at hand; saves one gradient. It is not copied, and
                must be there until the block ends. Conditions as for :func:`.path_smoothness`:
                ``[p.grad for p in params]`` is *not* it if the loss has dropout (training has drawn other
                masks), or if ``.grad`` has been clipped or is scaled.

        Raises:
            ValueError: if ``optimizer`` has none of the parameters or lacks one, or ``grad`` comes without
                ``loss``, or as raised by :func:`.path_smoothness`.
        """
        if loss is not None:
            check_loss(loss)
        number = self._steps
        self._steps += 1
        if number % self.every:
            yield
            return
        if optimizer is not None:
            self._check_optimizer(optimizer)
        if grad is not None and loss is None:
            raise ValueError("grad is the gradient of the training batch's loss, and loss is None")
        grad = None if grad is None else list(grad)
        before = [p.detach().clone() for p in self.params]
        yield

        start = time.monotonic()
        common = {
            "step": number,
            "clip_factor": _number(getattr(optimizer, "last_factor", None)),
            "clipped_from": _number(getattr(optimizer, "last_norm", None)),
        }
        after = [p.detach().clone() for p in self.params]
        try:
            for p, x in zip(self.params, before, strict=True):
                # `.data`: no autograd version may tell that the parameters were away.
                p.data.copy_(x)
            for x, y in zip(before, after, strict=True):
                x.neg_().add_(y)  # y - x in the memory of x, which the parameters hold now
            common["update_length"] = total_norm(before).item()
            rows = [self._measure("probe", self.loss, before, common, None)]
            if loss is not None:
                rows.append(self._measure("train", loss, before, common, grad))
        finally:
            for p, y in zip(self.params, after, strict=True):
                p.data.copy_(y)
        self.rows += rows
        self._seconds += time.monotonic() - start

    def frame(self) -> pandas.DataFrame:
        """One row per measured step and batch, as a pandas data frame.

        ==========================  ==========================================================================
        column                      meaning
        ==========================  ==========================================================================
        ``step``                    k, counted from 0
        ``batch``                   "probe" for the fixed batch, "train" for the training batch
        ``grad_norm``               ‖∇f(x_k)‖ on this batch (loss/parameter)
        ``path_smoothness``         largest L(a) over the fractions (loss/parameter²)
        ``path[0.5]``, ...          L(a) for each fraction a, named by four digits
        ``directional_smoothness``  ‖∇²f(x_k) d‖/‖d‖, the limit of L(a) for a → 0 (loss/parameter²)
        ``hessian_norm``            ‖∇²f(x_k)‖ (loss/parameter²)
        ``hessian_residual``        its relative residual
        ``hessian_upper``           what it does not exceed, with the probability ``confidence``
        ``update_length``           ‖d‖ (parameter)
        ``clip_factor``             the optimizer's ``last_factor``
        ``clipped_from``            the optimizer's ``last_norm``: of the gradient that made the step
        ``problem``                 why something is NaN, or empty
        ==========================  ==========================================================================

        What is not measured is NaN.

        Raises:
            ImportError: if pandas is not installed; :attr:`rows` and :meth:`record` do without it.
        """
        try:
            import pandas
        except ImportError:
            raise ImportError("Probe.frame() needs pandas; Probe.rows and Probe.record() do not") from None
        return pandas.DataFrame(self.rows, columns=self._columns())

    def record(
        self,
        experiment: str,
        profile: str,
        *,
        config: Mapping[str, Any] | None = None,
        scalars: Mapping[str, float | int | str | bool | None] | None = None,
        data_sha256: str | None = None,
    ) -> records.Record:
        """The same as a record, for :func:`gradclip.records.save`.

        Args:
            experiment: name of the experiment, lower case with hyphens.
            profile: name of the set of options, such as ``"smoke"``.
            config: options of the training; those of the probe are added under ``"probe"``.
            scalars: the numbers that are to be quoted; ``probe.steps``, ``probe.measured``, ``probe.skipped``
                (steps, measured ones, and those of them that could not be measured) and ``probe.seconds``
                are added.
            data_sha256: hash of the data that the training read.

        Returns:
            A record with the columns of :meth:`frame` as its series. Its wall time runs from the making of
            the probe until now.
        """
        measured = {row["step"] for row in self.rows}
        skipped = {row["step"] for row in self.rows if row["problem"] and math.isnan(row["path_smoothness"])}
        probe = {
            "every": self.every,
            "fractions": list(self.fractions),
            "directional": self.directional,
            "hessian": self.hessian,
            "tol": self.tol,
            "confidence": self.confidence,
        }
        counts = {
            "probe.steps": self._steps,
            "probe.measured": len(measured),
            "probe.skipped": len(skipped),
            "probe.seconds": self._seconds,
        }
        return records.Record(
            experiment,
            profile,
            {**(config or {}), "probe": probe},
            {**(scalars or {}), **counts},
            {name: [row[name] for row in self.rows] for name in self._columns()},
            records.provenance(
                self.params[0].device,
                data_sha256=data_sha256,
                wall_time=time.monotonic() - self._start,
            ),
        )

    def _columns(self) -> list[str]:
        return [
            *("step", "batch", "grad_norm", "path_smoothness", *map(_column, self.fractions)),
            *("directional_smoothness", "hessian_norm", "hessian_residual", "hessian_upper"),
            *("update_length", "clip_factor", "clipped_from", "problem"),
        ]

    def _check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for i, p in enumerate(self.params):
            if id(p) not in known:
                raise ValueError(
                    f"params[{i}] of shape {tuple(p.shape)} is not among the parameters of the optimizer, "
                    f"{len(known)} tensors: are they of another model, or of a copy?"
                )

    def _measure(
        self,
        batch: str,
        loss: Callable[[], Tensor],
        update: list[Tensor],
        common: dict[str, Any],
        grad: list[Tensor | None] | None,
    ) -> dict[str, Any]:
        row = {**dict.fromkeys(self._columns(), math.nan), **common, "batch": batch, "problem": ""}
        if not 0.0 < common["update_length"] < math.inf:
            length = common["update_length"]
            row["problem"] = "the update is zero" if length == 0.0 else f"the update has length {length}"
            return row
        path = path_smoothness(loss, self.params, update, fractions=self.fractions, grad=grad)
        row["grad_norm"], row["path_smoothness"] = path.grad_norm, path.value
        row |= zip(map(_column, self.fractions), path.values, strict=True)
        if not math.isfinite(path.grad_norm):
            row["problem"] = f"the gradient has norm {path.grad_norm}"
            return row
        try:
            if self.directional:
                row["directional_smoothness"] = directional_smoothness(loss, self.params, update)
            if self.hessian:
                # Of its own, so that neither the run nor the number of measurements before matters.
                generator = torch.Generator(self.params[0].device).manual_seed(0)
                norm = hessian_norm(
                    loss, self.params, tol=self.tol, generator=generator, confidence=self.confidence
                )
                row |= {
                    "hessian_norm": norm.value,
                    "hessian_residual": norm.residual,
                    "hessian_upper": norm.upper,
                }
                if not norm.converged:
                    row["problem"] = f"the Hessian norm has not converged in {norm.hvps} products"
        except RuntimeError as error:
            # A loss that can be trained may lack second derivatives, here or everywhere, or memory for them.
            row["problem"] = " ".join(str(error).split())
        return row


def _column(fraction: float) -> str:
    return f"path[{fraction:.4g}]"


def _number(value: Tensor | float | None) -> float:
    return math.nan if value is None else float(value)
