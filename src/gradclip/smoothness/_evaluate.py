"""Evaluating a loss again and again without leaving a trace."""

from __future__ import annotations

import contextlib
import random
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

__all__ = ["undisturbed"]


@contextlib.contextmanager
def undisturbed() -> Iterator[Callable[[], None]]:
    """Run modules inside, and find buffers and random streams outside as they were, bit for bit.

    ::

        with undisturbed() as rewind:
            for _ in range(3):
                rewind()
                value = loss()  # the same dropout masks every time

    * The buffers of every module that is called inside, and of its submodules, are put back: their bits, and
      which tensors they are if a module replaces them. They are copied when the module is called for the
      first time, so that nothing is copied if no module has buffers. A module is seen when it is *called*:
      one whose methods are used instead (``model.loss(x)``) is seen only if one that contains it is.
      Attributes that are not buffers are not put back.
    * So are the random streams of torch on the CPU and on all CUDA devices, of Python's ``random``, and of
      numpy's functions in ``np.random``. Generators that the caller made are the caller's.
    * What ``torch.compile`` has made runs eagerly: compiled code calls no hook that could see its modules,
      and has no second derivative. Nothing is compiled again afterwards.
    * Half-precision copies that ``torch.autocast`` keeps of parameters are dropped, or a loss evaluated in an
      outer autocast region would not notice that its parameters have moved.

    All this happens on the way out whatever the way out is: a KeyboardInterrupt too. Contexts may be nested.
    Modules that other threads call meanwhile are let alone.

    Yields:
        A function without arguments that puts buffers and random streams back at once. Call it before every
        evaluation, and the evaluations are one function of the parameters.
    """
    saved = _Saved()
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and loading it takes a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(_without_warning("Using `torch.compile(module)` when there are global hooks"))
        stack.callback(saved.restore)
        stack.callback(register_module_forward_pre_hook(saved.before_forward).remove)
        stack.callback(register_module_forward_hook(saved.after_forward, always_call=True).remove)
        yield saved.restore


class _Saved:
    """Random streams at the time of its making, and buffers at the time of their module's first call."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.contents: dict[int, tuple[Tensor, Tensor]] = {}  # by id: tensors compare by their elements
        self.bindings: dict[Module, dict[str, Tensor | None]] = {}  # of modules whose forward is running,
        self.parts: dict[Module, list[Module]] = {}  # as noted when this one was called
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self.python = random.getstate()
        self.numpy = np.random.get_state(legacy=False)  # noqa: NPY002  a stream of the caller's

    def before_forward(self, module: Module, inputs: object) -> None:
        if threading.get_ident() != self.thread or module in self.bindings:
            return
        # The whole tree at once: a module may use what is inside another one without calling it.
        self.parts[module] = [part for part in module.modules() if part not in self.bindings]
        for part in self.parts[module]:
            buffers = self.bindings[part] = dict(part._buffers.items())
            for buffer in buffers.values():
                if buffer is None or id(buffer) in self.contents:
                    continue
                # What a torch.func transform wraps exists only inside it.
                if not torch._C._functorch.is_functorch_wrapped_tensor(buffer):
                    self.contents[id(buffer)] = buffer, buffer.detach().clone()

    def after_forward(self, module: Module, inputs: object, output: object) -> None:
        if threading.get_ident() != self.thread:
            return
        # At the end of the call, not of the context: torch.func.functional_call lends a module other buffers
        # for one call, and they must not come back after it.
        for part in self.parts.pop(module, ()):
            _bind(part, self.bindings.pop(part))

    def restore(self) -> None:
        for part, buffers in self.bindings.items():  # of a call that did not end: torch skips hooks on Ctrl-C
            _bind(part, buffers)
        self.bindings.clear()
        self.parts.clear()
        for buffer, content in self.contents.values():
            # `.data` does not bump the autograd version: a graph from before, which needs the old bits, finds
            # them.
            buffer.data.copy_(content)
        torch.clear_autocast_cache()
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002


def _bind(module: Module, buffers: dict[str, Tensor | None]) -> None:
    now = dict(module._buffers.items())
    if list(now) != list(buffers) or any(now[name] is not buffer for name, buffer in buffers.items()):
        module._buffers.clear()
        module._buffers.update(buffers)


@contextlib.contextmanager
def _without_warning(start: str) -> Iterator[None]:
    """Ignore UserWarnings that start so.

    Not with ``warnings.catch_warnings``: it makes Python forget which warnings it has shown, and those that
    training raises at every step would appear again after each measurement.
    """
    entry = ("ignore", re.compile(re.escape(start)), UserWarning, None, 0)
    filters = warnings.filters
    filters.insert(0, entry)
    try:
        yield
    finally:
        filters[:] = [other for other in filters if other is not entry]
