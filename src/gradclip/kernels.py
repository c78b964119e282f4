"""Compiled kernels for lists of float32 tensors on a CPU: the sum of squares, and the step of SGD.

This module needs numba, which the rest of the library does without; :func:`gradclip.norms.compiled` gives it,
or None. One kernel takes a whole list in one call and one pass over memory. The same with torch's operations
takes several of both, and where tensors are small, as most of the 59 of a ResNet-20, looking them up and
starting threads costs more than the arithmetic.
"""

import ctypes
import math
import operator
import os
from array import array
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

if numba.config.DISABLE_JIT:
    raise ImportError("numba is told not to compile, by NUMBA_DISABLE_JIT")

# The threads of a team take turns in chunks of so many elements, half a megabyte. Sums are per chunk, which
# makes them the same for any team.
_CHUNK = 2**17
# Shorter lists are not worth waking a second thread for.
_ALONE = 2**16
_KIND = {(torch.device("cpu"), torch.float32)}
_group = torch._C._group_tensors_by_device_and_dtype


class Memory(NamedTuple):
    """Where tensors lie that the kernels can take: number of elements, address and shape of each."""

    sizes: array
    addresses: array
    shapes: list[torch.Size]
    total: int


def memory(tensors: list[Tensor]) -> Memory | None:
    """Where these tensors lie; None unless all are plain float32 tensors on the CPU, without gaps.

    A kernel reads and writes memory from a tensor's first element on, so all that torch's operations would
    look at on the way is looked at here. (``is_neg`` is for views whose numbers still wait to be negated.)
    """
    if not tensors:
        return Memory(array("q"), array("q"), [], 0)
    try:
        if not (
            set(map(type, tensors)) <= {Tensor, torch.nn.Parameter}
            # One call for all tensors; to ask each for its dtype and its device takes three times as long.
            and _group([tensors], False).keys() == _KIND
            and all(map(Tensor.is_contiguous, tensors))
            and not any(map(Tensor.is_neg, tensors))
            and not any(tensor.is_nested for tensor in tensors)
        ):
            return None
        addresses = list(map(Tensor.data_ptr, tensors))
    except RuntimeError:  # a tensor of another layout than strided has no address, or cannot be contiguous
        return None
    if _is_lost(tensors, addresses):
        return None
    sizes = list(map(Tensor.numel, tensors))
    return Memory(array("q", sizes), array("q", addresses), [t.shape for t in tensors], sum(sizes))


class Place:
    """:func:`memory` of a list of tensors that are mostly like those of the call before, as in an optimizer.

    Whether they are (in type, dtype, device, sizes and strides, and no tensor twice) one call of torch tells,
    by which ``torch.compile`` guards its graphs; then only the addresses are left to look at. That call ends
    the process if it meets a nested tensor. Gradients are none, because torch gives a parameter no nested
    gradient unless it is nested itself.

    Args:
        lasting: For parameters and momenta, which are the same objects in each step, and are kept alive here.
            Others are looked at anew, and none that share memory are taken, because their updates would have
            to be made one after the other.
    """

    def __init__(self, *, lasting: bool) -> None:
        self._lasting, self._tensors, self._memory, self._addresses = lasting, [], None, []
        self._are_like_before = _never

    def __call__(self, tensors: list[Tensor]) -> Memory | None:
        """Where these tensors lie."""
        before, self._memory = self._memory, None
        if (
            before
            and len(self._addresses) == len(tensors)
            and (not self._lasting or all(map(operator.is_, tensors, self._tensors)))
            and self._are_like_before(*tensors)
        ):
            addresses = list(map(Tensor.data_ptr, tensors))
            if addresses == self._addresses:
                self._memory = before
                return before
            if _is_lost(tensors, addresses):
                return None
            self._addresses, found = addresses, before._replace(addresses=array("q", addresses))
        else:
            found = memory(tensors)
            if found:
                self._are_like_before, self._addresses = _guard(tensors), found.addresses.tolist()
                self._tensors = list(tensors) if self._lasting else []
        if found and not (self._lasting and _overlap(found)):
            self._memory = found
        return self._memory


def _guard(tensors: list[Tensor]) -> Callable[..., bool]:
    """A function that tells whether tensors, as many as these, are like them."""
    try:
        from torch._C._dynamo.guards import TensorGuards

        return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    except (ImportError, TypeError):  # it is not public
        return _never


def _never(*tensors: Tensor) -> bool:
    return False


def _is_lost(tensors: list[Tensor], addresses: list[int]) -> bool:
    """Whether memory was given back, as sharding does between steps: it then begins at address 0."""
    # Only what lies so low is asked where in its memory it begins.
    return min(addresses) < 2**40 and any(
        tensor.numel() and address == tensor.element_size() * tensor.storage_offset()
        for tensor, address in zip(tensors, addresses, strict=True)
    )


def _overlap(tensors: Memory) -> bool:
    """Whether two of the tensors share memory."""
    parts = sorted((start, start + 4 * size) for size, start in zip(*tensors[:2], strict=True) if size)
    return any(end > start for (_, end), (start, _) in pairwise(parts))


def sum_of_squares(tensors: Memory) -> float:
    """Σ x² over all elements of all tensors, in float64.

    No square of a float32 number leaves the range of float64, and each is exact there. The sum of a chunk of
    n ≤ 131,072 elements takes n - 1 additions in some order, and that of the chunks is exact, so that the
    relative error is at most n · 2⁻⁵³ < 2e-11.
    """
    # Every chunk but the last of a tensor is full, so there are not more than this.
    sums = array("d", bytes(8 * (tensors.total // _CHUNK + len(tensors.sizes))))
    _run(sums, tensors)
    return math.fsum(sums)


def sgd_(
    params: Memory,
    grads: Memory,
    momenta: Memory | None,
    *,
    scale: float,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    keep: float,
) -> None:
    """One step of SGD in place, for lists of the same sizes, with d = scale · g + weight_decay · x:

    ::

        m = momentum · m + d
        x = keep · x - lr · m                       (nesterov: keep · x - lr · (d + momentum · m))

    Without ``momenta`` m is d. A ``weight_decay`` of 0 leaves x out of d, so that an infinite x stays one.
    Autograd has to be told that the tensors have changed, with ``torch.autograd.graph.increment_version``.
    """
    options = array("d", (scale, weight_decay, keep, lr, momentum, nesterov))
    _run(options, *(lists for lists in (params, grads, momenta) if lists is not None))


def _run(numbers: array, *lists: Memory) -> None:
    """Call the kernel for lists of the same sizes, on as many threads as torch would use."""
    sizes = lists[0].sizes
    job = array("q", (0, len(lists), len(sizes), numbers.buffer_info()[0])) + sizes
    for each in lists:
        job += each.addresses
    address = job.buffer_info()[0]
    if _PARALLEL is not None and lists[0].total > _ALONE and torch.get_num_threads() > 1:
        _PARALLEL(_chunks.address, address, 0, 0)
    else:
        _chunks.ctypes(address)


def _team() -> "ctypes._CFuncPtr | None":
    """The function of GNU OpenMP that runs a function on all threads of a team, if torch uses it.

    The threads must be torch's own. Threads of another pool would share the cores with them, since threads of
    OpenMP spin for a while when they have done their part, waiting for the next one. Where torch brings
    another OpenMP (on macOS and Windows) the kernels run on one thread.
    """
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, TypeError, OSError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function


def _run_alone() -> None:
    global _PARALLEL
    _PARALLEL = None


_PARALLEL = _team()
# A forked process has none of the threads of its parent, and GNU OpenMP would wait for them.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_run_alone)


def _pointer(element: types.Type):
    """A function that makes an address a pointer to elements of this type."""

    @intrinsic
    def pointer(typing, address):
        def code(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), code

    return pointer


_floats, _doubles, _integers = map(_pointer, (types.float32, types.float64, types.int64))


@intrinsic
def _take(typing, address):
    """The integer at an address, which becomes one more: no two threads are given the same."""

    def code(context, builder, signature, arguments):
        kind = ir.IntType(64)
        where = builder.inttoptr(arguments[0], kind.as_pointer())
        return builder.atomic_rmw("add", where, ir.Constant(kind, 1), "monotonic")

    return types.int64(types.int64), code


@intrinsic
def _add_scaled(typing, start, factor, number):
    """start + factor · number with one rounding, or two where the processor has no such instruction."""

    def code(context, builder, signature, arguments):
        kind = ir.FloatType()
        function = builder.module.declare_intrinsic(
            "llvm.fmuladd", (kind,), ir.FunctionType(kind, (kind, kind, kind))
        )
        return builder.call(function, (arguments[1], arguments[2], arguments[0]))

    return types.float32(types.float32, types.float32, types.float32), code


_helper = numba.njit(nogil=True)


def _kernel(function):
    """The function compiled, and kept on disk for the next process where there is a place to keep it."""
    signature = types.void(types.int64)
    try:
        return numba.cfunc(signature, cache=True)(function)
    except Exception:  # no folder to write to, a full disk, a damaged file: whatever it is, it can do without
        return numba.cfunc(signature)(function)


# What the kernel is given is the address of the job, 64-bit integers: the number of the next chunk, how many
# lists there are, how many tensors in each, the address of sums or options, the size of each tensor, then
# addresses, list by list.
_HEAD = 4


@_helper
def _seek(job, count, chunk, tensor, first):
    """The tensor in which a chunk lies, and the number of its first chunk, starting from an earlier one."""
    while tensor < count:
        chunks = (job[_HEAD + tensor] + _CHUNK - 1) // _CHUNK
        if chunk < first + chunks:
            break
        first += chunks
        tensor += 1
    return tensor, first


@_helper
def _part(job, count, which, tensor, start):
    """A chunk of a tensor of one of the lists."""
    address = job[_HEAD + (1 + which) * count + tensor] + 4 * start
    return numba.carray(_floats(address), min(_CHUNK, job[_HEAD + tensor] - start))


@numba.njit(nogil=True, fastmath={"reassoc", "contract"})  # so that it runs in the lanes of a vector register
def _square(x):
    # At four places at once: a processor fetches ahead at each, and memory delivers a third more.
    a, b, c, d, n = 0.0, 0.0, 0.0, 0.0, len(x) // 4
    for i in range(n):
        a += np.float64(x[i]) * np.float64(x[i])
        b += np.float64(x[n + i]) * np.float64(x[n + i])
        c += np.float64(x[2 * n + i]) * np.float64(x[2 * n + i])
        d += np.float64(x[3 * n + i]) * np.float64(x[3 * n + i])
    for i in range(4 * n, len(x)):
        a += np.float64(x[i]) * np.float64(x[i])
    return a + b + c + d


# Operation by operation as torch.optim.SGD does it, and rounded as there. A chunk is gone through at two
# places at once, for the same reason as above; at four it takes longer.


@_helper
def _plain_at(x, g, i, scale, decay, keep, lr):
    start = keep * x[i]
    d = scale * g[i]
    if decay:
        d = _add_scaled(d, decay, x[i])
    x[i] = _add_scaled(start, -lr, d)


@_helper
def _plain(x, g, scale, decay, keep, lr):
    n = len(x) // 2
    for i in range(n):
        _plain_at(x, g, i, scale, decay, keep, lr)
        _plain_at(x, g, n + i, scale, decay, keep, lr)
    for i in range(2 * n, len(x)):
        _plain_at(x, g, i, scale, decay, keep, lr)


@_helper
def _momentum_at(x, g, m, i, scale, decay, keep, lr, momentum, nesterov):
    start = keep * x[i]
    d = scale * g[i]
    if decay:
        d = _add_scaled(d, decay, x[i])
    moved = momentum * m[i] + d
    m[i] = moved
    if nesterov:
        moved = _add_scaled(d, momentum, moved)
    x[i] = _add_scaled(start, -lr, moved)


@_helper
def _momentum(x, g, m, scale, decay, keep, lr, momentum, nesterov):
    n = len(x) // 2
    for i in range(n):
        _momentum_at(x, g, m, i, scale, decay, keep, lr, momentum, nesterov)
        _momentum_at(x, g, m, n + i, scale, decay, keep, lr, momentum, nesterov)
    for i in range(2 * n, len(x)):
        _momentum_at(x, g, m, i, scale, decay, keep, lr, momentum, nesterov)


@_kernel
def _chunks(address):
    """Take chunk after chunk: of one list for the sum of squares, of two or three for a step."""
    _, lists, count, numbers = numba.carray(_integers(address), _HEAD)
    job = numba.carray(_integers(address), _HEAD + (1 + lists) * count)
    options = numba.carray(_doubles(numbers), 6 if lists > 1 else 0).astype(np.float32)
    tensor, first = 0, 0
    while True:
        chunk = _take(address)
        tensor, first = _seek(job, count, chunk, tensor, first)
        if tensor == count:
            break
        start = (chunk - first) * _CHUNK
        x = _part(job, count, 0, tensor, start)
        if lists == 1:
            sums = numba.carray(_doubles(numbers), chunk + 1)
            sums[chunk] = _square(x)
        elif lists == 2:
            g = _part(job, count, 1, tensor, start)
            _plain(x, g, options[0], options[1], options[2], options[3])
        else:
            g, m = _part(job, count, 1, tensor, start), _part(job, count, 2, tensor, start)
            _momentum(x, g, m, options[0], options[1], options[2], options[3], options[4], options[5] != 0)
