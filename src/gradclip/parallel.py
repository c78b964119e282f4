"""Several processes under ``torchrun``: data parallelism in which every derivative is the global one.

With R processes, each holding an equal share of a batch, the loss of the batch is f = (1/R) Σ_r f_r, f_r the
mean over the share of process r. Two operations are enough to make everything that is computed from f on any
process the same as on one process with the whole batch:

* *mean*: x_r ↦ (1/R) Σ_r x_r. Its derivative hands a cotangent through, which is the same on all processes.
* *replicate*: x ↦ x, the same on all processes. Its derivative is the mean.

Each is the other's derivative, so that they can be differentiated as often as one likes. :func:`mean` is the
first, for loss values. :func:`average_gradients` puts the second in front of parameters: whoever asks for a
gradient, be it ``backward``, :func:`torch.autograd.grad` or a Hessian-vector product, gets
(1/R) Σ_r ∇f_r, and differentiating that again gives (1/R) Σ_r ∇²f_r v. No other code changes.

``torch.nn.parallel.DistributedDataParallel`` would not do: it averages ``.grad`` in ``backward``, and not
what :func:`torch.autograd.grad` returns, so a measured gradient or a Hessian-vector product would be that of
one process's share.

Where an experiment consists of many independent runs, the processes share the runs instead: within
:func:`alone` a process computes as if there were no other, and :func:`gathered` puts together what they have
found.

All processes must do the same in the same order, or they wait for each other for ever. They do, because what
they decide by, norms and losses and random numbers from seeds, is the same on all of them: a sum over
processes has the same bits everywhere. A process that fails ends with an error, whereupon ``torchrun`` ends
the others.

Without ``torchrun`` there is one process, and every function here does nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "ParallelError",
    "alone",
    "average_gradients",
    "from_first",
    "gathered",
    "joined",
    "mean",
    "own",
    "rank",
    "requested",
    "requested_rank",
    "shows_progress",
    "size",
    "whole",
]

# How long processes wait for one another. Those that share runs wait at the end for the one that has the
# longest, which may take hours; that a process has died is for torchrun to see.
_PATIENCE = datetime.timedelta(days=7)

_is_alone = False


class ParallelError(ValueError):
    """The processes cannot share the work."""


def requested() -> int:
    """How many processes ``torchrun`` has started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def requested_rank() -> int:
    """The number that ``torchrun`` has given this process, before it has joined as after it has parted."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """How many processes have joined: R, or 1."""
    return dist.get_world_size() if dist.is_initialized() and not _is_alone else 1


def rank() -> int:
    """The number of this process, from 0; process 0 writes files."""
    return dist.get_rank() if dist.is_initialized() and not _is_alone else 0


def shows_progress() -> bool:
    """Whether this is the first process, and not a worker of it."""
    return requested_rank() == 0 and multiprocessing.parent_process() is None


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """In this context a process is the only one, for all functions here but ``requested``.

    Nothing is shared, and nobody is waited for: the processes may do different things. What is made for one
    process, such as a model or its share of a batch, must not be used outside, nor the other way round.
    """
    global _is_alone
    before, _is_alone = _is_alone, True
    try:
        yield
    finally:
        _is_alone = before


@contextlib.contextmanager
def joined(device: torch.device | str) -> Iterator[None]:
    """Join the processes that ``torchrun`` has started, and part from them at the end.

    On ``"cuda"`` each process takes the GPU of its local rank, which ``"cuda"`` means from then on, and NCCL
    carries the sums; on the CPU Gloo does.

    Args:
        device: What the processes compute on.

    Raises:
        ParallelError: There are fewer GPUs than processes on this machine.
    """
    if requested() == 1:
        yield
        return
    backend = "gloo"
    if torch.device(device).type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise ParallelError(f"process {local} of this machine needs a GPU of its own, there are {there}")
        torch.cuda.set_device(local)
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def mean(x: Tensor) -> Tensor:
    """(1/R) Σ_r x_r on every process, differentiable as often as x is."""
    return x if size() == 1 else _Mean.apply(x)


def average_gradients(params: Iterable[Tensor]) -> None:
    """From now on, have every gradient with respect to these parameters averaged over the processes.

    The parameters must be the same on all processes. The mean is taken by a hook of the parameter, before the
    gradient reaches ``.grad`` or the caller of :func:`torch.autograd.grad`; with ``create_graph=True`` it is
    part of the graph. Copies of a parameter do not have it.

    Args:
        params: Leaf tensors that require a gradient.
    """
    if size() == 1:
        return
    for p in params:
        p.register_hook(_Mean.apply)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.div_(size())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _Replicate.apply(g)


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _Mean.apply(g)


def own(tensor: Tensor, dim: int) -> Tensor:
    """This process's share: the r-th of R equal parts along a dimension, a view.

    Raises:
        ParallelError: R does not divide the tensor's size in that dimension.
    """
    if size() == 1:
        return tensor
    length = tensor.shape[dim]
    if length % size():
        raise ParallelError(f"a batch must be a multiple of the number of processes, {size()}, got {length}")
    return tensor.narrow(dim, rank() * (length // size()), length // size())


def whole(tensor: Tensor, dim: int) -> Tensor:
    """The inverse of :func:`own`: the shares of all processes, side by side, on each of them; no gradient."""
    if size() == 1:
        return tensor
    mine = tensor.detach().contiguous()
    parts = [torch.empty_like(mine) for _ in range(size())]
    dist.all_gather(parts, mine)
    return torch.cat(parts, dim)


def from_first(value: Any) -> Any:
    """The value of process 0, on every process; it must be picklable. What the others pass is ignored."""
    if size() == 1:
        return value
    box = [value if rank() == 0 else None]
    dist.broadcast_object_list(box)
    return box[0]


def gathered(value: Any) -> list[Any]:
    """The values of all processes in the order of their numbers, on every process; they must be picklable."""
    if size() == 1:
        return [value]
    values = [None] * size()
    dist.all_gather_object(values, value)
    return values
