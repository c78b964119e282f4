"""Optimizers with clipping built in."""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from gradclip.norms import (
    NONFINITE,
    SCOPES,
    dense_gradients,
    local,
    on_host,
    require_finite,
    total_norm,
)
from gradclip.rules import check_choice, check_rule, clip_factor


class ClippedSGD(torch.optim.Optimizer):
    r"""SGD with momentum, weight decay and a clipped gradient.

    With g the gradient of all parameters together, the step is

    ::

        d = clip_factor(‖g‖, max_norm, rule) · g + weight_decay · x    (-g for g with maximize)
        m = momentum · m + d                                           (from m = 0)
        x = x - lr · m                                                 (nesterov: x - lr · (d + momentum · m))

    which for ``rule="hard"`` is :func:`torch.nn.utils.clip_grad_norm_` followed by :class:`torch.optim.SGD`,
    up to the 1e-6 that torch adds to the norm. Without momentum and weight decay, a step of the rules
    ``hard``, ``soft`` and ``log`` is at most ``lr * max_norm`` long, one of ``normalize`` exactly.

    ``.grad`` is left as it is: the factor goes into the update, and on a CPU the plain and the momentum step
    make no copy of the gradient. A step does not wait for the device, except with ``nonfinite="raise"``, and
    can be compiled as a whole by :func:`torch.compile`.

    ``lr``, ``momentum``, ``nesterov``, ``weight_decay`` and ``maximize`` may differ between parameter groups.
    ``max_norm``, ``rule``, ``scope`` and ``nonfinite`` may not, because one norm is taken over all groups; to
    change one during training, change it in every group. With :class:`torch.amp.GradScaler`,
    ``scaler.step(optimizer)`` unscales the gradients first, so that ``max_norm`` is in the units of the true
    gradient.

    Args:
        params: Parameters, named parameters, or dicts of parameter groups. Those without a gradient are left
            alone.
        lr: Learning rate, at least 0. A 0-dim tensor spares a compiled step from compiling again at each
            change.
        max_norm: The threshold, positive, in the units of the gradient. ``inf`` never clips.
        rule: ``"hard"``, ``"soft"``, ``"normalize"`` or ``"log"``, see :func:`~gradclip.rules.clip_factor`.
        scope: ``"global"``: one norm over all parameters.
        momentum: At least 0.
        nesterov: Nesterov's momentum; needs ``momentum > 0``.
        weight_decay: At least 0. It is added after clipping, and is not clipped.
        maximize: Ascend instead of descending.
        nonfinite: What to do when the norm is inf or nan.

            - ``"propagate"``: step all the same, as torch does.
            - ``"skip"``: leave parameters and momentum as they are, bit for bit, and count the step in
              ``skipped_steps``. On an accelerator every step then costs a temporary copy of parameters and
              momentum, because the outcome is chosen on the device.
            - ``"raise"``: raise and change nothing. This waits for the device.

    Raises:
        ValueError: If an option is out of range or unknown, or if groups disagree about a shared one.
        TypeError: From :meth:`step`, if a gradient is sparse or complex, naming the parameter.
        RuntimeError: From :meth:`step` with ``nonfinite="raise"``, naming the parameter.

    Example:
        >>> import torch
        >>> from gradclip.optim import ClippedSGD
        >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> optimizer = ClippedSGD([x], lr=0.5, max_norm=1.0)
        >>> x.square().sum().backward()
        >>> optimizer.step()
        >>> x.detach(), optimizer.last_norm, optimizer.last_factor
        (tensor([2.7000, 3.6000]), tensor(10.), tensor(0.1000))
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float | Tensor,
        *,
        max_norm: float,
        rule: str = "hard",
        scope: str = "global",
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        maximize: bool = False,
        nonfinite: str = "propagate",
    ):
        defaults = {
            "lr": lr,
            "max_norm": max_norm,
            "rule": rule,
            "scope": scope,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "nonfinite": nonfinite,
        }
        super().__init__(params, defaults)
        parameters = [p for group in self.param_groups for p in group["params"]]
        device = parameters[0].device if parameters else None
        dtype = functools.reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
        self._last = torch.full((2,), math.nan, dtype=dtype, device=device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def last_norm(self) -> Tensor:
        """Norm of the last step's gradient before clipping, 0-dim and on the device; nan at the start."""
        return self._last[0].clone()

    @property
    def last_factor(self) -> Tensor:
        """What multiplied the last step's gradient, 0-dim and on the device; 0 if the step was skipped."""
        return self._last[1].clone()

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps ``nonfinite="skip"`` has skipped, 0-dim; kept in :meth:`state_dict`."""
        return self._skipped.clone()

    @classmethod
    def from_smoothness(
        cls,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        L0: float,
        L1: float,
        *,
        rule: str = "soft",
        **kw: Any,
    ) -> "ClippedSGD":
        r"""The optimizer for an (L0, L1)-smooth function: lr = 1/L0 and max_norm = L0/L1.

        The step is then g/(L0 + L1 ‖g‖) with ``rule="soft"``, and with ``rule="log"`` the one that minimises
        the sharp descent bound.

        Args:
            params: As for the class.
            L0: Curvature where the gradient vanishes, positive and finite, in units of gradient over length.
            L1: Growth of the curvature with the gradient norm, positive and finite, in units of 1 over
                length.
            rule: As for the class.
            **kw: Other keyword arguments of the class.

        Raises:
            ValueError: If L0 or L1 is not positive and finite. The limits exist but are other methods: for
                L1 = 0 plain gradient descent, for L0 = 0 normalised descent with steps of length 1/L1.

        References:
            Zhang, He, Sra and Jadbabaie, *Why gradient clipping accelerates training* (ICLR 2020),
            Definition 1, for the constants.

        Example:
            >>> import torch
            >>> from gradclip.optim import ClippedSGD
            >>> optimizer = ClippedSGD.from_smoothness([torch.zeros(2)], L0=4.0, L1=2.0)
            >>> [optimizer.defaults[key] for key in ("lr", "max_norm", "rule")]
            [0.25, 2.0, 'soft']
        """
        if not 0 < L0 < math.inf:
            raise ValueError(
                f"L0 must be positive and finite, got {L0}. In the limit L0 = 0 the step is g/(L1 ‖g‖): "
                "use rule='normalize' with lr * max_norm = 1/L1"
            )
        if not 0 < L1 < math.inf:
            raise ValueError(
                f"L1 must be positive and finite, got {L1}. In the limit L1 = 0 the gradient is L0-Lipschitz "
                "and needs no clipping: use lr = 1/L0 with max_norm = inf"
            )
        return cls(params, lr=1 / L0, max_norm=L0 / L1, rule=rule, **kw)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; see :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: If an option is out of range or unknown, or differs from a shared one.
        """
        options = {**self.defaults, **param_group}
        _shared_options([*self.param_groups, options])
        for name in ("lr", "momentum", "weight_decay"):
            if not 0 <= options[name] < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, got {options[name]}")
        if options["nesterov"] and not options["momentum"]:
            raise ValueError(f"nesterov needs a positive momentum, got momentum={options['momentum']}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Clears the gradients, evaluates the loss, calls ``backward`` and returns the loss.

        Returns:
            What the closure returns, or None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        max_norm, rule, nonfinite = _shared_options(self.param_groups)
        parameters = [p for group in self.param_groups for p in group["params"]]
        gradients = dense_gradients(parameters, self._label)
        norm = total_norm(gradients) if gradients else self._last.new_zeros(())
        if nonfinite == "raise":
            require_finite(norm, parameters, self._label)

        factor = clip_factor(norm, max_norm, rule)
        skipped = None
        if nonfinite != "skip":
            self._update(factor)
        else:
            finite = norm.isfinite()
            factor = torch.where(finite, factor, 0.0)
            skipped = ~finite
            if not on_host(norm):
                self._update(factor, only_if=finite)
            elif finite:
                self._update(factor)
        self._record(norm, factor, skipped)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """State and options as for :class:`torch.optim.Optimizer`, and ``skipped_steps``."""
        return {**super().state_dict(), "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state_dict)
        self._skipped = state_dict["skipped_steps"].clone().to(self._skipped.device)

    def __getstate__(self) -> dict[str, Any]:
        # The base class copies and pickles its own three attributes only.
        return {**super().__getstate__(), "_last": self._last, "_skipped": self._skipped}

    def _record(self, norm: Tensor, factor: Tensor, skipped: Tensor | None) -> None:
        last = torch.stack([norm, factor])
        count = self._skipped if skipped is None else self._skipped.to(norm.device) + skipped
        if torch.compiler.is_compiling():
            # torch.compile loses assignments to attributes of optimizers, but not what is written to tensors.
            self._last.copy_(last)
            self._skipped.copy_(count)
        else:
            self._last, self._skipped = last, count

    def _label(self, index: int) -> str:
        """How error messages call the parameter of this index, counted over all groups."""
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        return f"parameter {index} ({names[index]})" if names else f"parameter {index}"

    def _update(self, factor: Tensor, only_if: Tensor | None = None) -> None:
        """Step with gradients times ``factor``; undone on the device if the 0-dim ``only_if`` is false."""
        for group in self.param_groups:
            # Tensors of one device and dtype go through one kernel launch together.
            alike = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.device, parameter.dtype].append(parameter)
            for (device, _), parameters in alike.items():
                gradients = [_local_gradient(p) for p in parameters]
                momenta = [local(self._momentum(p)) for p in parameters] if group["momentum"] else []
                targets = [local(p) for p in parameters]
                if only_if is None:
                    _sgd(targets, gradients, momenta, factor.to(device), group)
                    continue
                before = [t.clone() for t in targets + momenta]
                _sgd(targets, gradients, momenta, factor.to(device), group)
                for target, old in zip(targets + momenta, before, strict=True):
                    target.copy_(torch.where(only_if.to(device), target, old))

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def _sgd(
    params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], factor: Tensor, group: dict[str, Any]
) -> None:
    """The update of :class:`ClippedSGD`, for tensors of one device and dtype and a 0-dim ``factor``."""
    lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
    scale = -factor if group["maximize"] else factor
    if not momentum and not decay:
        _add_scaled_(params, grads, -lr * scale)
        return

    if momentum:
        torch._foreach_mul_(momenta, momentum)
        _add_direction_(momenta, params, grads, scale, decay)
        step = momenta
        if group["nesterov"]:
            step = torch._foreach_mul(momenta, momentum)
            _add_direction_(step, params, grads, scale, decay)
    else:
        # Not params * (1 - lr * decay): in float32 that loses every decay with lr * decay below 3e-8.
        step = torch._foreach_mul(params, decay)
        _add_scaled_(step, grads, scale)

    if isinstance(lr, Tensor):  # alpha has to be a number, and reading one would wait for the device
        _add_scaled_(params, step, -lr)
    else:
        torch._foreach_add_(params, step, alpha=-lr)


def _add_direction_(
    targets: list[Tensor], params: list[Tensor], grads: list[Tensor], scale: Tensor, decay: float
) -> None:
    _add_scaled_(targets, grads, scale)
    if decay:
        torch._foreach_add_(targets, params, alpha=decay)


def _add_scaled_(targets: list[Tensor], sources: list[Tensor], scale: Tensor) -> None:
    """targets += scale * sources, for tensors of one device and dtype and a 0-dim ``scale``."""
    first = targets[0]
    if first.device.type == "cpu" and first.dtype in (torch.float32, torch.float64):
        # One pass without a temporary. Elsewhere it is one kernel launch per tensor instead of one for all,
        # and in half precision it rounds the scale to three digits.
        torch._foreach_addcmul_(targets, sources, [scale] * len(targets))
    else:
        torch._foreach_add_(targets, torch._foreach_mul(sources, scale))


def _shared_options(groups: list[dict[str, Any]]) -> tuple[float, str, str]:
    """``max_norm``, ``rule`` and ``nonfinite``, checked to be valid and the same in all groups."""
    for name in ("max_norm", "rule", "scope", "nonfinite"):
        values = list(dict.fromkeys(group[name] for group in groups))
        if len(values) > 1:
            raise ValueError(
                f"{name} must be the same in all parameter groups, because one norm is taken over all of "
                f"them, got {values}"
            )
    options = groups[0]
    check_rule(options["max_norm"], options["rule"])
    check_choice("scope", options["scope"], SCOPES)
    check_choice("nonfinite", options["nonfinite"], NONFINITE)
    return options["max_norm"], options["rule"], options["nonfinite"]


def _local_gradient(parameter: Tensor) -> Tensor:
    """This rank's part of the gradient, laid out as this rank's part of the parameter."""
    gradient = parameter.grad
    if local(gradient) is not gradient and gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)
    return local(gradient)
