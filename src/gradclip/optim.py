"""Optimizers with clipping built in."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from gradclip.norms import (
    NONFINITE,
    SCOPES,
    any_dtensor,
    by_device_and_dtype,
    dense_gradients,
    local_parts,
    norm_of_dense,
    on_host,
    require_finite,
)
from gradclip.rules import check_choice, check_number, check_rule, clip_factor
from gradclip.smoothness.fit import recommend

_SHARED = ("max_norm", "rule", "scope", "nonfinite")
_OPTIONS = ("lr", *_SHARED, "momentum", "nesterov", "weight_decay", "maximize")


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
        TypeError: If an option that has to be a number is something else, and from :meth:`step`, if a
            gradient is sparse or complex, naming the parameter.
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
        """How many steps ``nonfinite="skip"`` has skipped, 0-dim; saved and loaded with the state."""
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
        the sharp descent bound. The two numbers are those of ``gradclip.recommend``.

        Args:
            params: As for the class.
            L0: Curvature where the gradient vanishes, positive and finite, in units of gradient over length.
            L1: Growth of the curvature with the gradient norm, non-negative and finite, in units of 1 over
                length. 0 gives plain gradient descent: lr = 1/L0 and max_norm = inf.
            rule: As for the class.
            **kw: Other keyword arguments of the class.

        Raises:
            ValueError: If L0 or L1 is out of range. The limit L0 = 0 is another method: normalised descent
                with steps of length 1/L1.
            TypeError: If L0 or L1 is not a number.

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
        check_number("L0", L0)
        check_number("L1", L1)
        advice = recommend(L0, L1)
        return cls(params, lr=advice.lr, max_norm=advice.max_norm, rule=rule, **kw)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; see :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: If an option is out of range or unknown, or differs from a shared one.
            TypeError: If an option that has to be a number is something else.
        """
        _check_groups([*self.param_groups, {**self.defaults, **param_group}])
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
        norm = norm_of_dense(gradients) if gradients else self._last.new_zeros(())
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
        """State and options as for :class:`torch.optim.Optimizer`.

        ``skipped_steps`` is an entry of the first parameter group: the tools of torch for distributed
        checkpoints keep what is in ``state`` and ``param_groups``, and nothing else.
        """
        state_dict = super().state_dict()
        state_dict["param_groups"][0]["skipped_steps"] = self.skipped_steps
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned. A state without ``skipped_steps`` sets it to 0.

        Raises:
            ValueError: If the state is that of another optimizer or does not fit the parameters, or an option
                in it is out of range or unknown. The optimizer then stays as it is.
            TypeError: If an option that has to be a number is something else.
        """
        # The last of the hooks sees what will be loaded, and before anything is replaced.
        check = self.register_load_state_dict_pre_hook(lambda _, state: _check_groups(state["param_groups"]))
        try:
            super().load_state_dict(state_dict)
        finally:
            check.remove()
        counts = [group.pop("skipped_steps") for group in self.param_groups if "skipped_steps" in group]
        self._skipped = torch.as_tensor(sum(counts), dtype=torch.int64, device=self._skipped.device)

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
            with_gradient = [p for p in group["params"] if p.grad is not None]
            for (device, _), parameters in by_device_and_dtype(with_gradient).items():
                momenta = [self._momentum(p) for p in parameters] if group["momentum"] else []
                targets, momenta = local_parts(parameters), local_parts(momenta)
                gradients = _local_gradients(parameters)
                scale, lr = -factor if group["maximize"] else factor, group["lr"]
                scale = scale.to(device)
                if on_host(targets[0]):
                    # Reading a number on a CPU costs nothing, and torch adds multiples of tensors by a number
                    # in one pass without a temporary.
                    scale, lr = scale.item(), float(lr)
                if only_if is None:
                    _sgd(targets, gradients, momenta, scale, lr, group)
                    continue
                before = [t.clone() for t in targets + momenta]
                _sgd(targets, gradients, momenta, scale, lr, group)
                for target, old in zip(targets + momenta, before, strict=True):
                    target.copy_(torch.where(only_if.to(device), target, old))

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def _sgd(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    scale: float | Tensor,
    lr: float | Tensor,
    group: dict[str, Any],
) -> None:
    """The update of :class:`ClippedSGD` for gradients times ``scale``, of one device and dtype."""
    momentum, decay = group["momentum"], group["weight_decay"]
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
    targets: list[Tensor], params: list[Tensor], grads: list[Tensor], scale: float | Tensor, decay: float
) -> None:
    _add_scaled_(targets, grads, scale)
    if decay:
        torch._foreach_add_(targets, params, alpha=decay)


def _add_scaled_(targets: list[Tensor], sources: list[Tensor], scale: float | Tensor) -> None:
    """targets += scale * sources, for tensors of one device and dtype and a number or 0-dim tensor."""
    if isinstance(scale, Tensor) or targets[0].dtype not in (torch.float32, torch.float64):
        # In half precision, too: there torch rounds alpha to three digits.
        torch._foreach_add_(targets, torch._foreach_mul(sources, scale))
    else:
        torch._foreach_add_(targets, sources, alpha=scale)


def _check_groups(groups: list[dict[str, Any]]) -> None:
    """Raise :class:`ValueError` or :class:`TypeError` unless these can be parameter groups together."""
    for index, group in enumerate(groups):
        missing = [name for name in _OPTIONS if name not in group]
        if missing:
            raise ValueError(
                f"this is no state of ClippedSGD: its parameter group {index} lacks {', '.join(missing)}"
            )
        lr = group["lr"]
        if not isinstance(lr, Tensor):
            check_number("lr", lr)
        elif lr.ndim or lr.is_complex():
            raise TypeError(f"lr must be a number or a 0-dim tensor, got {lr}")
        for name in ("momentum", "weight_decay"):
            check_number(name, group[name])
        for name in ("lr", "momentum", "weight_decay"):
            if not 0 <= group[name] < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, got {group[name]}")
        if group["nesterov"] and not group["momentum"]:
            raise ValueError(f"nesterov needs a positive momentum, got momentum={group['momentum']}")
    _shared_options(groups)


def _shared_options(groups: list[dict[str, Any]]) -> tuple[float, str, str]:
    """``max_norm``, ``rule`` and ``nonfinite``, checked to be valid and the same in all groups."""
    for group in groups:
        check_rule(group["max_norm"], group["rule"])
        check_choice("scope", group["scope"], SCOPES)
        check_choice("nonfinite", group["nonfinite"], NONFINITE)
    for name in _SHARED:
        values = list(dict.fromkeys(group[name] for group in groups))
        if len(values) > 1:
            raise ValueError(
                f"{name} must be the same in all parameter groups, because one norm is taken over all of "
                f"them, got {values}"
            )
    options = groups[0]
    return options["max_norm"], options["rule"], options["nonfinite"]


def _local_gradients(parameters: list[Tensor]) -> list[Tensor]:
    """This rank's part of each gradient, laid out as this rank's part of the parameter."""
    gradients = [parameter.grad for parameter in parameters]
    if not any_dtensor(gradients):
        return gradients
    for index, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        if any_dtensor([gradient]) and gradient.placements != parameter.placements:
            gradients[index] = gradient.redistribute(placements=parameter.placements)
    return local_parts(gradients)
