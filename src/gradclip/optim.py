"""Optimizers with clipping built in."""

import functools
import math
import operator
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from gradclip.norms import (
    NONFINITE,
    any_dtensor,
    are_alike,
    check_threshold,
    compiled,
    dense_gradients,
    local,
    local_parts,
    norm_of_dense,
    on_host,
    require_finite,
    scoped_norms,
    threshold,
)
from gradclip.rules import RULES, check_choice, check_number, clip_factor, factor_of_number
from gradclip.smoothness.fit import recommend

__all__ = ["ClippedSGD", "MixedClippedSGD", "ParameterAgnosticLR", "PolyakClippedSGD"]

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]

_LARGEST = torch.finfo(torch.float32).max

# From this factor on, the fused kernel's 1 - (1 - factor) is the factor to a relative 2**-33.
_FUSED_FROM = 2.0**-20


class _Clipping(torch.optim.Optimizer):
    """What the optimizers have in common: checks, measurements, skipped steps, and states with all of these.

    A subclass lists its options in ``_numbers`` (finite and at least 0), ``_shared`` (the same in all groups)
    and ``_others``, checks the shared ones in ``_check_shared(group)``, has its momenta in
    ``_buffers(group, params)``, and takes a step in ``_update(sets, norm, loss)``, which returns what
    multiplied the gradient, unless ``_step_at_once()`` has taken it. ``sets`` has for each group its
    parameters that have a gradient, these gradients, and whether all of them are alike (``are_alike``).
    """

    def __init__(self, params: Params, defaults: dict[str, Any]):
        self._checked, self._places, self._view = None, [], None
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
        """What multiplied the last step's gradient, 0-dim and on the device; 0 if the step was skipped.

        With a scope other than ``"global"`` it is the norm of the clipped gradient over ``last_norm``.
        """
        return self._last[1].clone()

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps ``nonfinite="skip"`` has skipped, 0-dim; saved and loaded with the state."""
        return self._skipped.clone()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; see :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: If the value of an option is out of range or unknown, or differs from a shared one.
                Keys that are not options are kept and not looked at, as in torch.
            TypeError: If an option that has to be a number is something else.
        """
        self._check([*self.param_groups, {**self.defaults, **param_group}])
        super().add_param_group(param_group)

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
        options = [tuple(group[name] for name in self._shared) for group in self.param_groups]
        if options != self._checked:
            self._check_agreement(self.param_groups)
            self._checked = options
        if not self._step_at_once():
            self._step_by_step(loss)
        return loss

    @torch.no_grad()
    def _step_by_step(self, loss: Any) -> None:
        """Take the step with torch's operations, for any tensors."""
        sets, gradients, alike = self._with_gradients()
        norm = norm_of_dense(gradients, alike) if gradients else self._last.new_zeros(())
        nonfinite = self.param_groups[0]["nonfinite"]
        if nonfinite == "raise":
            require_finite(norm, [p for group in self.param_groups for p in group["params"]], self._label)

        skipped = None
        if nonfinite != "skip":
            factor = self._update(sets, norm, loss)
        elif on_host(norm):
            skipped = ~self._is_finite(norm, loss)
            factor = 0.0 if skipped else self._update(sets, norm, loss)
        else:
            skipped = ~self._is_finite(norm, loss)
            tensors = [t for group, own, *_ in sets for t in (*own, *self._buffers(group, own))]
            tensors = local_parts(tensors)
            before = [t.clone() for t in tensors]
            factor = torch.where(skipped, 0.0, self._update(sets, norm, loss))
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(torch.where(skipped.to(tensor.device), old, tensor))
        self._record(norm, factor, skipped)

    def state_dict(self) -> dict[str, Any]:
        """State and options as for :class:`torch.optim.Optimizer`.

        ``skipped_steps`` is an entry of the first parameter group: the tools of torch for distributed
        checkpoints keep what is in ``state`` and ``param_groups``, and nothing else. In place of a threshold
        policy there is its state.
        """
        state_dict = super().state_dict()
        state_dict["param_groups"][0]["skipped_steps"] = self.skipped_steps
        for group in state_dict["param_groups"]:
            if callable(group.get("max_norm")):
                group["max_norm"] = group["max_norm"].state_dict()
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned. A state without ``skipped_steps`` sets it to 0.

        The state of a threshold policy is loaded into the policy that this optimizer has.

        Raises:
            ValueError: If the state is that of another optimizer or does not fit the parameters, or an option
                in it is out of range or unknown. The optimizer then stays as it is.
            TypeError: If an option that has to be a number is something else.
            KeyError: If the state of a threshold policy is that of another policy.
        """
        policies = [group.get("max_norm") for group in self.param_groups]

        def check(_, state: dict[str, Any]) -> None:
            groups = [dict(group) for group in state["param_groups"]]
            for policy, group in zip(policies, groups, strict=False):
                if isinstance(group.get("max_norm"), dict):
                    if not callable(policy):
                        raise ValueError(f"the state has a threshold policy, but max_norm is {policy} here")
                    group["max_norm"] = policy
            self._check(groups)

        # The last of the hooks sees what will be loaded, and before anything is replaced.
        hook = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for policy, group in zip(policies, self.param_groups, strict=True):
            if isinstance(group.get("max_norm"), dict):
                policy.load_state_dict(group["max_norm"])
                group["max_norm"] = policy
        counts = [group.pop("skipped_steps") for group in self.param_groups if "skipped_steps" in group]
        self._skipped = torch.as_tensor(sum(counts), dtype=torch.int64, device=self._skipped.device)

    def __getstate__(self) -> dict[str, Any]:
        # The base class copies and pickles its own three attributes only.
        own = {"_last": self._last, "_skipped": self._skipped}
        return {**super().__getstate__(), **own, "_checked": None, "_places": [], "_view": None}

    @staticmethod
    def profile_hook_step(step: Callable) -> Callable:
        """What torch wraps around a step, to call hooks and tell profilers, but only if there are some.

        torch's own wrapper takes 60 µs even if there are none, a sixth of a step of a ResNet-20.
        """
        whole = torch.optim.Optimizer.profile_hook_step(step)

        @functools.wraps(step)
        def wrapper(*args, **kwargs):
            # A closure may add a hook, and so may what runs after a graph is traced, which no guard notices.
            if (
                len(args) != 1
                or kwargs
                or torch.compiler.is_compiling()
                or args[0]._optimizer_step_pre_hooks
                or args[0]._optimizer_step_post_hooks
                or _global_optimizer_pre_hooks
                or _global_optimizer_post_hooks
                or torch.autograd._profiler_enabled()
                or torch.autograd.profiler._is_profiler_enabled
            ):
                return whole(*args, **kwargs)
            return step(*args, **kwargs)

        return wrapper

    def _check(self, groups: list[dict[str, Any]]) -> None:
        """Raise :class:`ValueError` or :class:`TypeError` unless these can be parameter groups together."""
        for index, group in enumerate(groups):
            wanted = (*self._numbers, *self._shared, *self._others)
            missing = [name for name in wanted if name not in group]
            if missing:
                kind = type(self).__name__
                raise ValueError(
                    f"this is no state of {kind}: its parameter group {index} lacks {', '.join(missing)}"
                )
            for name in self._numbers:
                value = group[name]
                if not isinstance(value, Tensor):
                    check_number(name, value)
                elif name != "lr" or value.ndim or value.is_complex():
                    kind = "a number or a 0-dim tensor" if name == "lr" else "a number"
                    raise TypeError(f"{name} must be {kind}, got {value}")
                if not 0 <= value < math.inf:
                    raise ValueError(f"{name} must be finite and at least 0, got {value}")
            policy = group.get("max_norm")
            lacking = [name for name in ("state_dict", "load_state_dict") if not hasattr(policy, name)]
            if callable(policy) and not isinstance(policy, type) and lacking:
                raise TypeError(f"max_norm, as a policy, needs {' and '.join(lacking)}; {policy} has none")
            if group.get("nesterov") and not group["momentum"]:
                raise ValueError(f"nesterov needs a positive momentum, got momentum={group['momentum']}")
            if group.get("nesterov") and group["dampening"]:
                raise ValueError(f"nesterov needs dampening=0, got dampening={group['dampening']}")
        self._check_agreement(groups)

    def _check_agreement(self, groups: list[dict[str, Any]]) -> None:
        """Raise unless the shared options are valid and the same in all groups."""
        for group in groups:
            self._check_shared(group)
        for name in self._shared:
            if name == "max_norm" and groups[0].get("scope", "global") != "global":
                continue  # each tensor has its own norm, so each group may have its own threshold
            values = list(dict.fromkeys(group[name] for group in groups))
            if len(values) > 1:
                raise ValueError(
                    f"{name} must be the same in all parameter groups, because one norm is taken over all of "
                    f"them, got {values}"
                )

    def _step_at_once(self) -> bool:
        """Take the step with compiled kernels, if there are any for it and for all parameters."""
        return False

    def _with_gradients(self) -> tuple[list[tuple], list[Tensor], bool]:
        """The ``sets`` of ``_update``, all gradients, and whether all parameters and gradients are alike."""
        pairs = []
        for group in self.param_groups:
            params = group["params"]
            grads = [p.grad for p in params]
            if type(None) in set(map(type, grads)):
                params = [p for p in params if p.grad is not None]
                grads = [p.grad for p in params]
            pairs.append((group, params, grads))
        if len(pairs) == 1:
            _, parameters, gradients = pairs[0]
        else:
            gradients = [gradient for _, _, grads in pairs for gradient in grads]
            parameters = [parameter for _, params, _ in pairs for parameter in params]
        alike = bool(gradients) and not torch.compiler.is_compiling() and are_alike(parameters, gradients)
        if not alike:
            dense_gradients([p for group in self.param_groups for p in group["params"]], self._label)
        return [(*pair, alike) for pair in pairs], gradients, alike

    def _is_finite(self, norm: Tensor, loss: Any) -> Tensor:
        """Whether ``nonfinite="skip"`` lets the step happen."""
        return norm.isfinite()

    def _record(self, norm: Tensor, factor: float | Tensor, skipped: Tensor | None) -> None:
        if not isinstance(factor, Tensor):  # but a number, where reading the norm as one costs nothing
            self._record_numbers(norm.item(), factor, norm.dtype)
            if skipped is not None:
                self._skipped = self._skipped.to(norm.device) + skipped
            return
        last = torch.stack((norm, factor.to(norm.dtype)))
        count = self._skipped if skipped is None else self._skipped.to(norm.device) + skipped
        if torch.compiler.is_compiling():
            # torch.compile loses assignments to attributes of optimizers, but not what is written to tensors.
            self._last.copy_(last)
            self._skipped.copy_(count)
        else:
            self._last, self._skipped, self._view = last, count, None

    def _record_numbers(self, norm: float, factor: float, dtype: torch.dtype) -> None:
        if self._view is None or self._last.dtype != dtype:
            self._last = torch.empty(2, dtype=dtype, device="cpu")
            self._view = self._last.numpy()
        self._view[0], self._view[1] = norm, factor  # much quicker than making a tensor of them

    def _label(self, index: int) -> str:
        """How error messages call the parameter of this index, counted over all groups."""
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        return f"parameter {index} ({names[index]})" if names else f"parameter {index}"

    def _buffers(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        """The momenta that a step of this group changes."""
        return self._momenta(params) if group.get("momentum") else []

    def _momenta(self, params: list[Tensor]) -> list[Tensor]:
        """Momentum of each parameter, zero at first."""
        state = self.state
        # States mostly stand in the order of the parameters, and need no look-up with a hash for each.
        in_order = len(state) == len(params) and all(map(operator.is_, state, params))
        states = state.values() if in_order else [state[parameter] for parameter in params]
        momenta = [of_one.get("momentum_buffer") for of_one in states]
        if type(None) not in set(map(type, momenta)):
            return momenta
        for parameter in params:
            if state[parameter].get("momentum_buffer") is None:
                state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return [state[parameter]["momentum_buffer"] for parameter in params]


class ClippedSGD(_Clipping):
    r"""SGD with momentum, weight decay and a clipped gradient.

    With g the gradient of all parameters together, the step is

    ::

        d = clip_factor(‖g‖, max_norm, rule) · g + weight_decay · x    (-g for g with maximize)
        m = momentum · m + (1 - dampening) · d                         (m = d in the first step)
        x = x - lr · m                                                 (nesterov: x - lr · (d + momentum · m))

    which for ``rule="hard"`` is :func:`torch.nn.utils.clip_grad_norm_` followed by :class:`torch.optim.SGD`,
    up to the 1e-6 that torch adds to the norm. Without momentum and weight decay, a step of the rules
    ``hard``, ``soft`` and ``log`` is at most ``lr * max_norm`` long, and one of ``normalize`` just so long,
    unless the norm is so small that ``max_norm`` over it exceeds the range of its dtype.

    ``.grad`` is left as it is: the factor goes into the update. With ``scope="global"`` on a CPU, the plain
    and the momentum step make no copy of the gradient, but for the small buffer of
    :func:`~gradclip.norms.total_norm`; with another scope a step has a temporary one. A step
    does not wait for the device, except with ``nonfinite="raise"``, and can be compiled as a whole by
    :func:`torch.compile`.

    Float32 parameters on a CPU take the step by compiled kernels in two passes over memory, if numba is
    installed (``pip install gradclip[fast]``), the scope is ``"global"``, tensors have no gaps and a momentum
    has no dampening. Where the factor is 1, that is the step of :class:`torch.optim.SGD` (with ``fused`` at
    its default) bit for bit, on processors that multiply and add with one rounding. The first one in a
    process takes a second to load the kernels, and some more if they have to be compiled.

    ``lr``, ``momentum``, ``dampening``, ``nesterov``, ``weight_decay``, ``decoupled_weight_decay`` and
    ``maximize`` may differ between parameter groups. ``rule``, ``scope``, ``nonfinite`` and, with
    ``scope="global"``, ``max_norm`` may not, because one norm is taken over all groups; to change one during
    training, change it in every group. With :class:`torch.amp.GradScaler`, ``scaler.step(optimizer)``
    unscales the gradients first, so that ``max_norm`` is in the units of the true gradient.

    Args:
        params: Parameters, named parameters, or dicts of parameter groups. Those without a gradient are left
            alone.
        lr: Learning rate, at least 0. A 0-dim tensor spares a compiled step from compiling again at each
            change.
        max_norm: The threshold, positive, in the units of the gradient; with ``scope="unit"`` a ratio without
            units. ``inf`` never clips. With ``scope="global"`` it can be a policy of
            :mod:`gradclip.thresholds`; every group then holds the same object.
        rule: ``"hard"``, ``"soft"``, ``"normalize"`` or ``"log"``, see :func:`~gradclip.rules.clip_factor`.
        scope: What has a norm of its own: ``"global"`` all parameters together, ``"tensor"`` each parameter,
            ``"unit"`` each output unit relative to its weight (AGC); see :func:`~gradclip.norms.clip_grad_`.
        momentum: At least 0.
        dampening: At least 0. As in torch, it does not apply to the first step.
        nesterov: Nesterov's momentum; needs ``momentum > 0`` and, as in torch, ``dampening == 0``.
        weight_decay: At least 0. It is added after clipping, and is not clipped.
        decoupled_weight_decay: Apply ``x = (1 - lr · weight_decay) · x`` before the step, as
            :class:`torch.optim.AdamW` does, instead of adding ``weight_decay · x`` to d; then the decay is
            not in the momentum. (:class:`torch.optim.SGD` has no such option.)
        maximize: Ascend instead of descending.
        nonfinite: What to do when the norm is inf or nan.

            - ``"propagate"``: step all the same, as torch does.
            - ``"skip"``: leave parameters and momentum as they are, bit for bit, and count the step in
              ``skipped_steps``. On an accelerator every step then costs a temporary copy of parameters and
              momentum, because the outcome is chosen on the device, and a momentum whose first step was
              skipped counts as begun. A threshold policy does not remember the norm either.
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

    _numbers = ("lr", "momentum", "dampening", "weight_decay")
    _shared = ("max_norm", "rule", "scope", "nonfinite")
    _others = ("nesterov", "decoupled_weight_decay", "maximize")

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        *,
        max_norm: float | Callable[[Tensor], Tensor],
        rule: str = "hard",
        scope: str = "global",
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        nonfinite: str = "propagate",
    ):
        defaults = {
            "lr": lr,
            "max_norm": max_norm,
            "rule": rule,
            "scope": scope,
            "momentum": momentum,
            "dampening": dampening,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "nonfinite": nonfinite,
        }
        super().__init__(params, defaults)

    @classmethod
    def from_smoothness(
        cls,
        params: Params,
        L0: float,
        L1: float,
        *,
        rule: str = "soft",
        **kw: Any,
    ) -> "ClippedSGD":
        r"""The optimizer for an (L0, L1)-smooth function: lr = 1/L0 and max_norm = L0/L1.

        The step is then g/(L0 + L1 ‖g‖) with ``rule="soft"``, and with ``rule="log"`` the one that minimises
        the sharp descent bound. The two numbers are those of ``gradclip.recommend``. In the limit L0 = 0 all
        rules are the normalised step, of length 1/L1, or (ln 2)/L1 with "log".

        Args:
            params: As for the class.
            L0: Curvature where the gradient vanishes, non-negative and finite, in units of gradient over
                length. 0 gives lr = 1/L1, max_norm = 1 and the rule "normalize".
            L1: Growth of the curvature with the gradient norm, non-negative and finite, in units of 1 over
                length. 0 gives plain gradient descent: lr = 1/L0 and max_norm = inf.
            rule: As for the class.
            **kw: Other keyword arguments of the class.

        Raises:
            ValueError: If L0 or L1 is out of range, or both are 0.
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
        check_choice("rule", rule, RULES)
        advice = recommend(L0, L1)
        lr = advice.lr
        if advice.rule == "normalize":
            # (c/g) ln(1 + g/(c + g)) tends to (c/g) ln 2 for c → 0; the other rules tend to c/g.
            lr, rule = lr * (math.log(2) if rule == "log" else 1.0), advice.rule
        return cls(params, lr=lr, max_norm=advice.max_norm, rule=rule, **kw)

    def _check_shared(self, group: dict[str, Any]) -> None:
        check_threshold(group["max_norm"], group["rule"], group["scope"])
        check_choice("nonfinite", group["nonfinite"], NONFINITE)

    def _update(self, sets: list[tuple], norm: Tensor, loss: Any) -> float | Tensor:
        options = self.param_groups[0]
        if options["scope"] == "global":
            factor = scale = _factor(norm, threshold(options["max_norm"], norm), options["rule"])
        else:
            sets, factor = _clip_parts(sets, norm, options)
            scale = 1.0
        for group, params, grads, alike in sets:
            self._move(group, params, grads, scale, alike)
        return factor

    def _move(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        scale: float | Tensor,
        alike: bool,
    ) -> None:
        """Take the step of a group along its gradient, which ``scale`` multiplies."""
        if not (group["momentum"] and group["dampening"]):
            _each_kind(_sgd, params, grads, self._buffers(group, params), scale, group, alike)
            return
        # torch does not dampen what a momentum begins with, and begins each one when it is needed.
        begun = [self.state[p].get("momentum_buffer") is not None for p in params]
        for state, options in ((True, group), (False, {**group, "dampening": 0.0})):
            chosen = [i for i, has in enumerate(begun) if has == state]
            own, theirs = ([tensors[i] for i in chosen] for tensors in (params, grads))
            _each_kind(_sgd, own, theirs, self._momenta(own), scale, options, alike)

    def _step_at_once(self) -> bool:
        options = self.param_groups[0]
        if torch.compiler.is_compiling() or options["scope"] != "global" or not self._last.is_cpu:
            return False
        kernels = compiled()
        if kernels is None:
            return False
        while len(self._places) < len(self.param_groups):
            self._places.append([kernels.Place(lasting=lasting) for lasting in (True, False, True)])
        work, squares = [], 0.0
        for group, places in zip(self.param_groups, self._places, strict=False):
            params = group["params"]
            grads = [p.grad for p in params]
            if type(None) in set(map(type, grads)):
                params = [p for p in params if p.grad is not None]
                grads = [p.grad for p in params]
            own, theirs = memory = _memory(params, grads, places)
            if not own or (group["momentum"] and group["dampening"]):
                return False
            squares += kernels.sum_of_squares(theirs)
            work.append((group, params, grads, memory))
        norm = math.sqrt(squares)
        if norm > _LARGEST:
            norm = math.inf
        if options["nonfinite"] != "propagate" and not math.isfinite(norm):
            return False
        if not any(params for _, params, *_ in work):
            return False

        max_norm, policy = options["max_norm"], callable(options["max_norm"])
        if policy:
            max_norm = max_norm(torch.scalar_tensor(norm, dtype=torch.float32, device="cpu"))
        factor = _factor_of(norm, max_norm, options["rule"], torch.float32)
        for (group, params, grads, memory), places in zip(work, self._places, strict=False):
            # A policy may have replaced tensors or their memory: it can load an earlier state, for example.
            own, theirs = _memory(params, grads, places) if policy else memory
            momenta = self._buffers(group, params)
            moving = places[-1](momenta) if momenta else None
            if not own or (momenta and not (moving and moving.shapes == own.shapes)):
                with torch.no_grad():
                    self._move(group, params, grads, factor, alike=False)
                continue
            lr, decay = float(group["lr"]), group["weight_decay"]
            apart = decay and group["decoupled_weight_decay"]
            kernels.sgd_(
                own,
                theirs,
                moving,
                scale=-factor if group["maximize"] else factor,
                lr=lr,
                momentum=group["momentum"],
                nesterov=group["nesterov"],
                weight_decay=0.0 if apart else decay,
                keep=1 - lr * decay if apart else 1.0,
            )
            # Otherwise autograd would take what it has saved of the parameters for what it was.
            torch.autograd.graph.increment_version(params)
        self._record_numbers(norm, factor, torch.float32)
        return True


class MixedClippedSGD(_Clipping):
    r"""SGD that clips momentum and gradient apart, and steps along a mixture of the two.

    With g the gradient and m the momentum of all parameters together, and f the clip factor of ``rule``,

    ::

        m = momentum · m + (1 - momentum) · g                          (from m = 0; -g for g with maximize)
        x = x - lr · (mix · f(‖m‖) · m + (1 - mix) · f(‖g‖) · g + weight_decay · x)

    ``mix=1`` clips the momentum, ``mix=0`` the gradient. With ``rule="normalize"``, ``mix=1`` and
    ``max_norm=1`` the step has the length ``lr``: this is normalised SGD with momentum (NSGD-M), which needs
    no tuning under :class:`ParameterAgnosticLR`. In the notation of Zhang B. et al., η is ``lr``, γ is
    ``lr * max_norm``, β is ``momentum`` and ν is ``mix``; their code has ``rule="soft"``.

    ``last_norm`` and ``last_factor`` are those of the gradient, ``last_momentum_norm`` is ‖m‖. The rest is as
    for :class:`ClippedSGD`; ``lr``, ``momentum``, ``mix``, ``weight_decay`` and ``maximize`` may differ
    between parameter groups.

    Args:
        params: As for :class:`ClippedSGD`.
        lr: Learning rate, at least 0.
        max_norm: The threshold for both, or a policy of :mod:`gradclip.thresholds`, which is given ‖g‖.
        momentum: Share of the past in m, at least 0 and below 1.
        mix: Share of the momentum in the step, from 0 to 1.
        rule: As for :class:`ClippedSGD`.
        weight_decay: At least 0. Neither clipped nor in the momentum.
        maximize: As for :class:`ClippedSGD`.
        nonfinite: As for :class:`ClippedSGD`; the norm of the gradient decides.

    Raises:
        ValueError: If an option is out of range or unknown, or if groups disagree about a shared one.
        TypeError: As for :class:`ClippedSGD`.
        RuntimeError: As for :class:`ClippedSGD`.

    References:
        Zhang B., Jin, Fang and Wang, *Improved analysis of clipping algorithms for non-convex optimization*
        (NeurIPS 2020), Algorithm 1. Hübler, Yang, Li and He, *Parameter-agnostic optimization under relaxed
        smoothness* (AISTATS 2024), for NSGD-M.

    Example:
        >>> import torch
        >>> from gradclip.optim import MixedClippedSGD
        >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> optimizer = MixedClippedSGD([x], lr=0.5, max_norm=1.0, momentum=0.9, mix=1.0, rule="normalize")
        >>> x.square().sum().backward()
        >>> optimizer.step()
        >>> x.detach(), optimizer.last_norm, optimizer.last_momentum_norm
        (tensor([2.7000, 3.6000]), tensor(10.), tensor(1.))
    """

    _numbers = ("lr", "momentum", "mix", "weight_decay")
    _shared = ("max_norm", "rule", "nonfinite")
    _others = ("maximize",)

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        *,
        max_norm: float | Callable[[Tensor], Tensor],
        momentum: float,
        mix: float,
        rule: str = "hard",
        weight_decay: float = 0.0,
        maximize: bool = False,
        nonfinite: str = "propagate",
    ):
        defaults = {
            "lr": lr,
            "max_norm": max_norm,
            "rule": rule,
            "momentum": momentum,
            "mix": mix,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "nonfinite": nonfinite,
        }
        super().__init__(params, defaults)
        self._last_momentum = torch.full_like(self._last[0], math.nan)

    @property
    def last_momentum_norm(self) -> Tensor:
        """Norm of the momentum that the last step used, 0-dim and on the device; nan at the start."""
        return self._last_momentum.clone()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_last_momentum": self._last_momentum}

    def _check_shared(self, group: dict[str, Any]) -> None:
        check_threshold(group["max_norm"], group["rule"], "global")
        check_choice("nonfinite", group["nonfinite"], NONFINITE)
        if not group["momentum"] < 1:
            raise ValueError(f"momentum must be below 1, got {group['momentum']}")
        if not group["mix"] <= 1:
            raise ValueError(f"mix must be at most 1, got {group['mix']}")

    def _buffers(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        return self._momenta(params)

    def _update(self, sets: list[tuple], norm: Tensor, loss: Any) -> float | Tensor:
        options = self.param_groups[0]
        moved = []
        for group, params, grads, alike in sets:
            momenta = self._momenta(params)
            _each_kind(_average, params, grads, momenta, 1.0, group, alike)
            moved.extend(momenta)
        c = threshold(options["max_norm"], norm)
        momentum_norm = norm_of_dense(moved) if moved else norm
        factors = [_factor(n, c, options["rule"]) for n in (momentum_norm, norm)]
        for group, params, grads, alike in sets:
            _each_kind(_mixed_step, params, grads, self._momenta(params), factors, group, alike)
        if torch.compiler.is_compiling():
            self._last_momentum.copy_(momentum_norm)
        else:
            self._last_momentum = momentum_norm
        return factors[1]


class ParameterAgnosticLR(LRScheduler):
    r"""The schedule of NSGD-M that needs no constants of the problem.

    In step t = 1, 2, ..., with lr the rate that the optimizer was made with,

    ::

        learning rate = lr · t^(-3/4),    momentum = 1 - t^(-1/2)

    Use it with ``MixedClippedSGD(params, lr=1/7, max_norm=1.0, momentum=0.0, mix=1.0, rule="normalize")``,
    and call ``scheduler.step()`` after each ``optimizer.step()``. With (L0, L1) unknown, the mean gradient
    norm over T steps then falls as T^(-1/4) up to logarithms, with a constant that grows exponentially in L1;
    with lr = 1/(12 L1) it does not.

    Args:
        optimizer: An optimizer with the options ``lr`` and ``momentum``.
        last_epoch: The number of the last step, to resume; -1 to begin.

    References:
        Hübler, Yang, Li and He, *Parameter-agnostic optimization under relaxed smoothness* (AISTATS 2024).
        Rates and constants are as recalled; the schedule's exponents are those of the authors.

    Example:
        >>> import torch
        >>> from gradclip.optim import MixedClippedSGD, ParameterAgnosticLR
        >>> options = {"max_norm": 1.0, "momentum": 0.0, "mix": 1.0, "rule": "normalize"}
        >>> optimizer = MixedClippedSGD([torch.zeros(2)], lr=1 / 7, **options)
        >>> scheduler = ParameterAgnosticLR(optimizer)
        >>> for t in range(15):
        ...     optimizer.step()
        ...     scheduler.step()
        >>> [optimizer.param_groups[0][name] for name in ("lr", "momentum")]  # 1/(7 · 8) and 1 - 1/4
        [0.017857142857142856, 0.75]
    """

    def get_lr(self) -> list[float | Tensor]:
        """Learning rates of the next step; sets the momentum as well."""
        t = self.last_epoch + 1
        for group in self.optimizer.param_groups:
            group["momentum"] = 1 - t**-0.5
        return [lr * t**-0.75 for lr in self.base_lrs]


class PolyakClippedSGD(_Clipping):
    r"""Gradient descent with Polyak's step size, which clips by itself.

    With f the loss and g its gradient over all parameters,

    ::

        x = x - min(max_lr, (f - f_star) / ‖g‖²) · g

    On an (L0, L1)-smooth function this size is at least min(1/(4 L0), 1/(4 L1 ‖g‖)): a constant where the
    gradient is small and 1/‖g‖ where it is large, without knowing L0 or L1 (Takezawa et al.). A gradient of
    zero gives no step, and neither does a loss below ``f_star``.

    There is no learning rate to schedule. ``last_factor`` is the size of the step.

    Args:
        params: As for :class:`ClippedSGD`.
        f_star: The least value of the loss, or a lower bound of it, in the units of the loss.
        max_lr: The greatest size of a step, positive, in units of parameter² over loss; None is no limit.
            With noisy losses a limit is needed: a batch whose gradient happens to be small would leap.
        nonfinite: As for :class:`ClippedSGD`; ``"skip"`` skips a loss that is not finite as well.

    Raises:
        ValueError: If an option is out of range or unknown, or if groups disagree; from :meth:`step` without
            a closure.
        TypeError: As for :class:`ClippedSGD`.
        RuntimeError: As for :class:`ClippedSGD`.

    References:
        Takezawa, Bao, Sato, Niwa and Yamada, *Parameter-free clipped gradient descent meets Polyak* (NeurIPS
        2024).

    Example:
        >>> import torch
        >>> from gradclip.optim import PolyakClippedSGD
        >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> optimizer = PolyakClippedSGD([x])
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = x.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)  # f = 25, g = 2x: half the way to 0
        >>> x.detach(), optimizer.last_factor
        (tensor([1.5000, 2.0000]), tensor(0.2500))
    """

    _numbers = ()
    _shared = ("f_star", "max_lr", "nonfinite")
    _others = ()

    def __init__(
        self,
        params: Params,
        *,
        f_star: float = 0.0,
        max_lr: float | None = None,
        nonfinite: str = "propagate",
    ):
        super().__init__(params, {"f_star": f_star, "max_lr": max_lr, "nonfinite": nonfinite})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Needed. Clears the gradients, evaluates the loss, calls ``backward`` and returns the
                loss, a number or a tensor with one element.

        Returns:
            What the closure returns.
        """
        if closure is None:
            raise ValueError("PolyakClippedSGD.step needs a closure that returns the loss, got None")
        return super().step(closure)

    def _check_shared(self, group: dict[str, Any]) -> None:
        check_number("f_star", group["f_star"])
        if not math.isfinite(group["f_star"]):
            raise ValueError(f"f_star must be finite, got {group['f_star']}")
        if group["max_lr"] is not None:
            check_number("max_lr", group["max_lr"])
            if not group["max_lr"] > 0:
                raise ValueError(f"max_lr must be positive, got {group['max_lr']}")
        check_choice("nonfinite", group["nonfinite"], NONFINITE)

    def _is_finite(self, norm: Tensor, loss: Any) -> Tensor:
        if loss is None:
            raise ValueError("the closure of PolyakClippedSGD.step must return the loss, got None")
        return norm.isfinite() & torch.as_tensor(loss, device=norm.device).isfinite().reshape(())

    def _update(self, sets: list[tuple], norm: Tensor, loss: Any) -> float | Tensor:
        options = self.param_groups[0]
        wide = norm.double() if norm.device.type != "mps" else norm
        value = torch.as_tensor(loss, device=norm.device).detach().reshape(()).to(wide.dtype)
        # Divided twice: the square of a small norm is zero.
        size = (value - options["f_star"]).clamp(min=0.0) / wide / wide
        size = size.clamp(max=math.inf if options["max_lr"] is None else options["max_lr"])
        size = torch.where(wide == 0, 0.0, size)
        for _, params, grads, alike in sets:
            _each_kind(_polyak_step, params, grads, [], size, {}, alike)
        return size


def _memory(params: list[Tensor], grads: list[Tensor], places: list) -> tuple:
    """Where parameters and gradients lie; None twice if the kernels cannot take them."""
    of_params, of_grads, _ = places
    # Parameters first: if they are no nested tensors, the gradients are none.
    own = of_params(params)
    theirs = own and of_grads(grads)
    return (own, theirs) if theirs and own.shapes == theirs.shapes else (None, None)


def _factor(norm: Tensor, max_norm: float | Tensor, rule: str) -> float | Tensor:
    """The clip factor as a number where reading one costs nothing, and as a tensor elsewhere."""
    if not on_host(norm):
        return clip_factor(norm, max_norm, rule)
    return _factor_of(norm.item(), max_norm, rule, norm.dtype)


def _factor_of(norm: float, max_norm: float | Tensor, rule: str, dtype: torch.dtype) -> float:
    """The clip factor of a norm that is a number, of gradients of this dtype."""
    c = max(float(max_norm), sys.float_info.min)  # as in clip_factor for tensors
    if rule == "normalize":
        return factor_of_number(norm, c, rule, torch.finfo(dtype).max)
    return factor_of_number(norm, c, rule)


def _clip_parts(sets: list[tuple], norm: Tensor, options: dict[str, Any]) -> tuple[list[tuple], Tensor]:
    """Clipped copies in place of the gradients, and the norm of all copies over that of the gradients."""
    weights = [p for _, params, *_ in sets for p in params]
    max_norms = [group["max_norm"] for group, params, *_ in sets for _ in params]
    gradients = _aligned(weights, [g for _, _, grads, _ in sets for g in grads])
    pairs = scoped_norms(weights, gradients, options["scope"], max_norms)
    clipped = []
    for gradient, (g, c) in zip(gradients, pairs, strict=True):
        part = local(gradient)
        copy = (part * clip_factor(g, c, options["rule"])).to(part.dtype)
        clipped.append(_like(gradient, copy) if any_dtensor([gradient]) else copy)
    total = norm_of_dense(clipped) if clipped else norm
    factor = torch.where(norm == 0, float(options["rule"] != "normalize"), total.to(norm.dtype) / norm)
    copies = iter(clipped)
    return [(group, own, [next(copies) for _ in own], alike) for group, own, _, alike in sets], factor


def _like(dtensor: Tensor, part: Tensor) -> Tensor:
    """A DTensor of the mesh, placements and shape of another, with this rank's part replaced."""
    return dtensor.from_local(
        part,
        dtensor.device_mesh,
        dtensor.placements,
        run_check=False,
        shape=dtensor.shape,
        stride=dtensor.stride(),
    )


def _aligned(params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Each gradient, laid out over the mesh as its parameter."""
    return [
        gradient.redistribute(placements=parameter.placements)
        if any_dtensor([gradient]) and gradient.placements != parameter.placements
        else gradient
        for parameter, gradient in zip(params, grads, strict=True)
    ]


def _each_kind(
    step: Callable,
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    scale: Any,
    group: dict[str, Any],
    alike: bool,
) -> None:
    """Call ``step`` once for each device and dtype, with this rank's parts of the tensors."""
    if alike:
        if params:
            step(params, grads, momenta, scale, group)
        return
    if any_dtensor(params) or any_dtensor(grads):
        grads = local_parts(_aligned(params, grads))
        params, momenta = local_parts(params), local_parts(momenta)
    for kind in {(p.device, p.dtype): None for p in params}:
        chosen = [i for i, p in enumerate(params) if (p.device, p.dtype) == kind]
        own = [params[i] for i in chosen]
        # A gradient has the dtype of its parameter unless the parameter's grad_dtype says otherwise.
        theirs = [grads[i].to(kind[1]) for i in chosen]
        step(own, theirs, [momenta[i] for i in chosen] if momenta else [], scale, group)


def _at_hand(value: float | Tensor, target: Tensor) -> float | Tensor:
    """A factor as an operation on ``target`` takes it best: a number on a CPU, else a tensor on its device.

    Reading a number on a CPU costs nothing, and torch adds multiples of tensors by a number in one pass
    without a temporary.
    """
    if not isinstance(value, Tensor):
        return float(value)
    return value.item() if on_host(target) else value.to(target.device)


def _sgd(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    scale: float | Tensor,
    group: dict[str, Any],
) -> None:
    """The update of :class:`ClippedSGD` for gradients times ``scale``, of one device and dtype."""
    momentum, decay = group["momentum"], group["weight_decay"]
    scale, lr = _at_hand(scale, params[0]), _at_hand(group["lr"], params[0])
    if decay and group["decoupled_weight_decay"]:
        torch._foreach_mul_(params, 1 - lr * decay)
        decay = 0.0
    if on_host(params[0]) and _fused_sgd(params, grads, momenta, scale, lr, decay, group):
        return
    scale = -scale if group["maximize"] else scale
    if not momentum and not decay:
        _add_scaled_(params, grads, -lr * scale)
        return

    if momentum:
        share = 1 - group["dampening"]
        torch._foreach_mul_(momenta, momentum)
        _add_direction_(momenta, params, grads, share * scale, share * decay)
        step = momenta
        if group["nesterov"]:
            step = torch._foreach_mul(momenta, momentum)
            _add_direction_(step, params, grads, scale, decay)
    else:
        # Not params * (1 - lr * decay): in float32 that loses every decay with lr * decay below 3e-8.
        step = torch._foreach_mul(params, decay)
        _add_scaled_(step, grads, scale)
    _add_scaled_(params, step, -lr)


def _fused_sgd(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    scale: float,
    lr: float,
    decay: float,
    group: dict[str, Any],
) -> bool:
    """Take the step with torch's fused kernel, in one pass over memory, if that gives this very step.

    The kernel knows no factor that leaves the gradient alone, but ``m = momentum · m + (1 - dampening) · g``
    is one in disguise. Weight decay is added to g before it is multiplied, so it is divided first.
    """
    dtype, momentum = params[0].dtype, group["momentum"]
    # In half precision the kernel of torch 2.13 takes other steps than torch's own SGD without it.
    if dtype not in (torch.float32, torch.float64) or scale < _FUSED_FROM:
        return False
    share = (1 - group["dampening"]) * scale
    if momentum and dtype == torch.float64 and 1 - (1 - share) != share:
        return False
    # Nesterov's step has the factor in two places.
    apart = group["nesterov"] and scale != 1
    if apart and decay:
        return False
    tensors = (*params, *grads, *momenta)
    if not all(map(Tensor.is_contiguous, tensors)) or any(map(Tensor.is_neg, tensors)):
        return False
    # The kernel wants one dtype, looks at no shape, and would go beyond the end of what is too small.
    if any(
        len({(tensor.shape, tensor.dtype) for tensor in own}) > 1
        for own in zip(*filter(None, (params, grads, momenta)), strict=True)
    ):
        return False
    torch._fused_sgd_(
        params,
        grads,
        momenta,
        weight_decay=decay / scale,
        momentum=momentum,
        lr=lr * (momentum if apart else 1.0 if momentum else scale),
        dampening=1 - share if momentum else 0.0,
        nesterov=group["nesterov"] and not apart,
        maximize=group["maximize"],
        is_first_step=False,
    )
    if apart:
        _add_scaled_(params, grads, lr * scale if group["maximize"] else -lr * scale)
    return True


def _average(
    params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], scale: float, group: dict[str, Any]
) -> None:
    """The momentum of :class:`MixedClippedSGD`."""
    if not group["maximize"]:
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        return
    torch._foreach_mul_(momenta, group["momentum"])
    _add_scaled_(momenta, grads, group["momentum"] - 1)


def _mixed_step(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    factors: list[float | Tensor],
    group: dict[str, Any],
) -> None:
    """The step of :class:`MixedClippedSGD`, given the factors of momentum and gradient."""
    lr, mix, decay = _at_hand(group["lr"], params[0]), group["mix"], group["weight_decay"]
    first, second = (_at_hand(factor, params[0]) for factor in factors)
    parts = [(momenta, mix * first), (grads, (mix - 1 if group["maximize"] else 1 - mix) * second)]
    # A part with weight 0 stays out, or 0 · inf would be nan.
    parts = [part for part, weight in zip(parts, (mix, 1 - mix), strict=True) if weight]
    if not decay:
        for tensors, factor in parts:
            _add_scaled_(params, tensors, -lr * factor)
        return
    step = torch._foreach_mul(params, decay)
    for tensors, factor in parts:
        _add_scaled_(step, tensors, factor)
    _add_scaled_(params, step, -lr)


def _polyak_step(
    params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], size: Tensor, group: dict[str, Any]
) -> None:
    _add_scaled_(params, grads, -_at_hand(size, params[0]))


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
