"""Training that is measured on the way: the columns that the experiments on networks share."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from gradclip import parallel
from gradclip.experiments._tasks import Task, losses
from gradclip.norms import total_norm
from gradclip.optim import ClippedSGD
from gradclip.smoothness import directional_smoothness, hessian_norm, path_smoothness
from gradclip.smoothness._evaluate import undisturbed

FRACTIONS = (1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6)
LOCAL = 0.01
PATHS = tuple(
    f"path_{f.numerator}_{f.denominator}" for f in (Fraction(f).limit_denominator(9) for f in FRACTIONS)
)
#: Columns of a probe, NaN where a step was not probed; the experiments' docstrings say what they hold.
PROBES = (*PATHS, "path_max", "path_1", "end_grad_norm", "local", "other_batch", "bound")
PRODUCTS = ("along", "random", "fixed_grad_norm", "fixed")
RARE = ("hessian_norm",)

Row = dict[str, float]
#: Called at x_k with the network, k and the update; returns columns of an experiment's own.
Extra = Callable[[nn.Module, int, list[Tensor]], Row]


@dataclass(frozen=True)
class Plan:
    """How often to measure.

    Args:
        probe_every: Steps between two probes along the path, ``PROBES``.
        product_every: The same for ``PRODUCTS``; 0 for never.
        hessian_every: The same for the norm of the Hessian; 0 for never.

    Raises:
        ValueError: A distance is out of range, or what is rarer would fall between two probes.
    """

    probe_every: int
    product_every: int = 0
    hessian_every: int = 0

    def __post_init__(self) -> None:
        if self.probe_every < 1:
            raise ValueError(f"probe_every must be at least 1, got {self.probe_every}")
        for name in ("product_every", "hessian_every"):
            distance = getattr(self, name)
            if distance < 0 or distance % self.probe_every:
                raise ValueError(
                    f"{name} must be a multiple of probe_every={self.probe_every}, or 0, got {distance}"
                )


class Probed:
    """One training run, measured, as :func:`gradclip.train.train` wants it.

    At x_k, with d = x_{k+1} - x_k, f the loss of batch k and everything that is random about it held fixed::

        path_a           L̂_a = ‖∇f(x_k + a d) - ∇f(x_k)‖ / (a ‖d‖)          [loss / parameter²]
        path_max         the largest over a = 1/6, 1/3, 1/2, 2/3, 5/6
        path_1           a = 1
        end_grad_norm    ‖∇f(x_k + d)‖, so that path_1 ≤ (grad_norm + end_grad_norm) / update_length
        local            a = 0.01
        other_batch      as a = 1/2, with the loss of batch k + 1 at the midpoint
        bound            ‖∇f(x_k)‖ / (‖d‖/2)
        along            ‖∇²f(x_k) d‖ / ‖d‖
        random           ‖∇²f(x_k) r‖ / ‖r‖, r normal
        fixed_grad_norm  gradient norm on the fixed batch
        fixed            a = 0.01, on the fixed batch along the same d
        hessian_norm     ‖∇²f(x_k)‖ to 1 %, by residuals

    A run whose loss passes ten times that of guessing, or is not finite, is given up: the rest of its rows
    are NaN, but for ``iteration`` and ``diverged``, which is 1 there and 0 before.

    Args:
        task: What is trained.
        seed: Seed of the initial weights and of the random directions.
        optimizer: Makes the optimizer from the parameters.
        plan: How often to measure.
        extra: Measures more at every probe.
        extra_columns: The columns that it returns.
    """

    def __init__(
        self,
        task: Task,
        seed: int,
        optimizer: Callable[[list[Tensor]], ClippedSGD],
        plan: Plan,
        *,
        extra: Extra | None = None,
        extra_columns: tuple[str, ...] = (),
    ) -> None:
        self.task, self.seed, self.plan = task, seed, plan
        self.extra, self.extra_columns = extra, extra_columns
        self.model = task.model(seed)
        self.params = list(self.model.parameters())
        parallel.average_gradients(self.params)
        self.optimizer = optimizer(self.params)
        self.state = task.start()
        self.diverged = False

    def step(self, iteration: int) -> Row:
        """Train on one batch, and measure if it is time."""
        row = {
            "iteration": iteration,
            **dict.fromkeys(("loss", "grad_norm", "clip_factor", "lr", "update_length"), math.nan),
            **dict.fromkeys((*PROBES, *PRODUCTS, *RARE, *self.extra_columns), math.nan),
        }
        value, after = (math.nan, None) if self.diverged else self._loss(iteration)
        if self.diverged:
            return {**row, "diverged": 1.0}
        self.optimizer.zero_grad()
        value.backward()
        gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        probing = iteration % self.plan.probe_every == 0
        here = copies(self.params)
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        update = [p.detach() - x for p, x in zip(self.params, here, strict=True)]
        row |= {
            "loss": value.item(),
            "grad_norm": self.optimizer.last_norm.item(),
            "clip_factor": self.optimizer.last_factor.item(),
            "lr": float(lr),
            "update_length": total_norm(update).item(),
        }
        if probing and row["update_length"] > 0:
            ahead = copies(self.params)
            assign(self.params, here)
            row |= self._probe(iteration, after, gradient, update)
            assign(self.params, ahead)
        self.state = after
        return {**row, "diverged": 0.0}

    def _loss(self, k: int) -> tuple[Tensor, Any]:
        value, after = self.task.loss(self.model, k, self.state)
        self.diverged = not value.item() <= 10 * self.task.guess
        return value, after

    def _probe(self, k: int, after: Any, gradient: list[Tensor], update: list[Tensor]) -> Row:
        batch = losses(self.task, self.model, k, self.state)
        path = path_smoothness(batch, self.params, update, fractions=(*FRACTIONS, LOCAL), grad=gradient)
        # With the gradient of this batch as the start, the two ends of the difference see different batches.
        following = losses(self.task, self.model, k + 1, after)
        other = path_smoothness(following, self.params, update, fractions=(1 / 2,), grad=gradient)
        end = self._gradient_at_end(batch, update)
        change = [b - a for a, b in zip(gradient, end, strict=True)]
        *values, local = path.values
        row = {
            **dict(zip(PATHS, values, strict=True)),
            "path_max": max(values),
            "path_1": (total_norm(change) / path.step_norm).item(),
            "end_grad_norm": total_norm(end).item(),
            "local": local,
            "other_batch": other.value,
            "bound": path.grad_norm / (path.step_norm / 2),
        }
        if _due(k, self.plan.product_every):
            # Drawn on the CPU, so that a seed gives the same directions on every device.
            generator = torch.Generator().manual_seed(1_000_003 * (self.seed + 1) + k)
            draws = [torch.randn(p.shape, generator=generator).to(p) for p in self.params]
            fixed = path_smoothness(
                lambda: self.task.fixed(self.model), self.params, update, fractions=(LOCAL,)
            )
            row |= {
                "along": directional_smoothness(batch, self.params, update),
                "random": directional_smoothness(batch, self.params, draws),
                "fixed_grad_norm": fixed.grad_norm,
                "fixed": fixed.value,
            }
        if _due(k, self.plan.hessian_every):
            row["hessian_norm"] = hessian_norm(batch, self.params).value
        if self.extra is not None:
            row |= self.extra(self.model, k, update)
        return row

    def _gradient_at_end(self, batch: Callable[[], Tensor], update: list[Tensor]) -> list[Tensor]:
        here = copies(self.params)
        with torch.no_grad():
            for p, d in zip(self.params, update, strict=True):
                p.add_(d)
        with undisturbed():
            found = torch.autograd.grad(batch(), self.params)
        assign(self.params, here)
        return list(found)

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes from step to step, for the whole batch whatever the number of processes."""
        carried = self.state
        if carried is not None:
            carried = [(parallel.whole(h, 1), parallel.whole(c, 1)) for h, c in carried]
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "carried": carried,
            "diverged": self.diverged,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put a state back."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        device = self.params[0].device
        carried = state["carried"]
        if carried is not None:
            carried = [(parallel.own(h, 1).to(device), parallel.own(c, 1).to(device)) for h, c in carried]
        self.state = carried
        self.diverged = state["diverged"]


def _due(k: int, every: int) -> bool:
    return every > 0 and k % every == 0


def copies(tensors: list[Tensor]) -> list[Tensor]:
    """Copies that no graph holds."""
    return [t.detach().clone() for t in tensors]


@torch.no_grad()
def assign(params: list[Tensor], values: list[Tensor]) -> None:
    """Overwrite parameters."""
    for p, value in zip(params, values, strict=True):
        p.copy_(value)
