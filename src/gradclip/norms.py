"""The norm of a list of tensors, and clipping gradients in place."""

import functools
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from gradclip.rules import check_choice, check_rule, clip_factor, widest_dtype

SCOPES = ("global",)
NONFINITE = ("propagate", "skip", "raise")

# On a CPU squares are summed in rows this long. torch adds a row in at least 8 lanes, so that no square
# passes through more than 128/8 + 8 + 1 roundings: an error of 25 * 2**-24 / 2 < 1e-6 of the norm of a row.
_ROW = 128
# Half-precision tensors are widened a piece at a time: the copy stays in the cache.
_PIECE = 2**19


@torch.no_grad()
def total_norm(tensors: Tensor | Iterable[Tensor]) -> Tensor:
    r"""Euclidean norm of all elements of all tensors together, √(Σ x²).

    Accurate to a relative error of 1e-6 for any number of elements and any magnitude that the dtype can hold:
    float32 elements of 1e-25 or 1e25, whose squares it cannot hold, are as safe as elements of 1. (A sum of
    squares that runs through a whole float32 tensor, as in ``torch.linalg.vector_norm`` on a CPU, is wrong in
    the second digit at 1e8 normal numbers, overflows for elements of 1e20 and vanishes at 1e-23.)

    How, and what it costs:

    - On a CPU, squares are summed in rows of 128 elements (in float32, for float64 tensors in float64), and
      the norms of the rows in float64: one pass, no copy. Only when the result shows that squares have over-
      or underflowed does a second pass work on temporary copies, divided by the largest element.
    - On an accelerator, and inside ``torch.compile``, the squares of float32 and half-precision elements are
      summed in float64, whose range they cannot leave: one pass, no wait for the device.
    - float64 tensors there are always divided by their largest element first: two passes and a temporary
      copy, one tensor at a time, and again no wait. So are float32 tensors on Apple GPUs, which have no
      float64.

    A :class:`~torch.distributed.tensor.DTensor` counts with all its shards, once each. Every rank of its mesh
    must call this function; one number per rank travels for each mesh and way of sharding.

    Args:
        tensors: One tensor or an iterable of floating-point tensors of any shapes, dtypes and devices. Empty
            tensors and an empty iterable have norm 0.

    Returns:
        A 0-dim tensor on the device of the first tensor, in the common dtype of all tensors but at least
        float32. It is nan if an element is nan, otherwise inf if an element is infinite. It carries no
        autograd history.

    Raises:
        TypeError: If a tensor is sparse, complex or of integers; the message gives its index.

    Example:
        >>> import torch
        >>> from gradclip.norms import total_norm
        >>> total_norm([torch.tensor([3.0, 0.0]), torch.tensor(4.0)])
        tensor(5.)
        >>> total_norm(torch.full((10_000,), 1e-30)).item()  # the squares are zero in float32
        1.0000000031710769e-28
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if not tensors:
        return torch.zeros(())
    groups = defaultdict(list)
    for index, tensor in enumerate(tensors):
        _check_dense(tensor, "tensor {}".format, index)
        mesh, sharded = None, ()
        if _is_dtensor(tensor):
            tensor = _reduced(tensor)
            mesh, sharded = tensor.device_mesh, tuple(place.is_shard() for place in tensor.placements)
        sum_dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        groups[mesh, sharded, tensor.device, sum_dtype].append(local(tensor))

    device = tensors[0].device
    norms = []
    for (mesh, sharded, _, sum_dtype), members in groups.items():
        norm = _norm(members, sum_dtype)
        if mesh is not None:
            norm = _norm_over_mesh(norm, mesh, sharded)
        norms.append(norm.to(device))
    norm = norms[0] if len(norms) == 1 else _scaled_norm([torch.stack(norms)], norms[0].dtype)
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    return norm.to(dtype)


@torch.no_grad()
def clip_grad_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    *,
    rule: str = "hard",
    scope: str = "global",
    nonfinite: str = "propagate",
) -> Tensor:
    r"""Clip the gradients of ``parameters`` in place; a drop-in for :func:`torch.nn.utils.clip_grad_norm_`.

    Every ``.grad`` is multiplied by :func:`~gradclip.rules.clip_factor` of the norm of all gradients
    together. Two differences from torch: the norm is accurate for any size (see :func:`total_norm`), and the
    factor is c/g where torch has c/(g + 1e-6).

    Args:
        parameters: One tensor or an iterable of tensors. Those without a gradient are ignored.
        max_norm: The threshold, positive, in the units of the gradient. ``inf`` measures without clipping.
        rule: ``"hard"``, ``"soft"``, ``"normalize"`` or ``"log"``, see :func:`~gradclip.rules.clip_factor`.
        scope: ``"global"``: one norm over all gradients.
        nonfinite: What to do when the norm is inf or nan.

            - ``"propagate"``: multiply all the same, as torch does. A norm of inf turns finite elements into
              0 and infinite ones into nan; a norm of nan turns everything into nan.
            - ``"skip"``: set all gradients to zero, without waiting for the device. The optimizer step that
              follows then uses no gradient, but momentum, running averages and weight decay still act;
              :class:`~gradclip.optim.ClippedSGD` leaves those untouched too.
            - ``"raise"``: raise and change nothing. This waits for the device.

    Returns:
        The norm of the gradients before clipping, as :func:`total_norm` gives it; 0 if no parameter has a
        gradient.

    Raises:
        ValueError: If ``parameters`` is empty, ``max_norm`` is not positive, or an option is unknown.
        TypeError: If a gradient is sparse or complex; the message gives the index of the parameter.
        RuntimeError: With ``nonfinite="raise"``, naming the first parameter with a non-finite gradient.

    Example:
        >>> import torch
        >>> from gradclip.norms import clip_grad_
        >>> w = torch.zeros(2, requires_grad=True)
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> clip_grad_([w], max_norm=1.0)
        tensor(5.)
        >>> w.grad
        tensor([0.6000, 0.8000])
    """
    check_rule(max_norm, rule)
    check_choice("scope", scope, SCOPES)
    check_choice("nonfinite", nonfinite, NONFINITE)
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not parameters:
        raise ValueError("no parameters: got an empty iterable (a generator can be used only once)")

    gradients = dense_gradients(parameters, "parameter {}".format)
    norm = total_norm(gradients) if gradients else torch.zeros((), device=parameters[0].device)
    if nonfinite == "raise":
        require_finite(norm, parameters, "parameter {}".format)
    factor = clip_factor(norm, max_norm, rule)
    locals_by_device = defaultdict(list)
    for gradient in map(local, gradients):
        locals_by_device[gradient.device].append(gradient)
    for device, members in locals_by_device.items():
        torch._foreach_mul_(members, factor.to(device))
        if nonfinite == "skip":
            # A mask, because 0 * inf and 0 * nan are nan.
            skipped = ~norm.isfinite().to(device)
            for gradient in members:
                gradient.masked_fill_(skipped, 0.0)
    return norm


def dense_gradients(parameters: Sequence[Tensor], label: Callable[[int], str]) -> list[Tensor]:
    """The gradients that exist, once it is clear that they can be clipped; ``label`` names a parameter."""
    gradients = []
    for index, parameter in enumerate(parameters):
        if parameter.grad is not None:
            _check_dense(parameter.grad, lambda i: f"the gradient of {label(i)}", index)
            gradients.append(parameter.grad)
    return gradients


def require_finite(norm: Tensor, parameters: Sequence[Tensor], label: Callable[[int], str]) -> None:
    """Raise :class:`RuntimeError` naming the first non-finite gradient element unless ``norm`` is finite."""
    if norm.isfinite():
        return
    for number, parameter in enumerate(parameters):
        if parameter.grad is None:
            continue
        gradient = local(parameter.grad)
        bad = (~gradient.isfinite()).nonzero()
        if len(bad):
            index = tuple(bad[0].tolist())
            raise RuntimeError(
                f"the gradient of {label(number)} is {gradient[index].item()} at index {index}"
            )
    raise RuntimeError(
        f"the gradient norm is {norm.item()}, although every gradient here is finite: "
        f"either it exceeds the range of {norm.dtype}, or another rank has a non-finite gradient"
    )


def on_host(tensor: Tensor) -> bool:
    """Whether Python may branch on the tensor's value at no cost: it needs no device and breaks no graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor itself."""
    return tensor.to_local() if _is_dtensor(tensor) else tensor


def _is_dtensor(tensor: Tensor) -> bool:
    # A DTensor exists only once its module is loaded, and loading it costs half as much as torch itself.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _reduced(dtensor: Tensor) -> Tensor:
    """The DTensor with pending sums carried out: the norm of a sum is not a function of its terms' norms."""
    from torch.distributed.tensor import Replicate

    return dtensor.redistribute(placements=[Replicate() if p.is_partial() else p for p in dtensor.placements])


def _norm_over_mesh(norm: Tensor, mesh, sharded: tuple[bool, ...]) -> Tensor:
    """Combine the local norms of all shards: gathered rather than summed, so that squares cannot overflow."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [Shard(dim) if split else Replicate() for dim, split in enumerate(sharded)]
    norms = DTensor.from_local(norm.reshape((1,) * mesh.ndim), mesh, placements, run_check=False)
    return _scaled_norm([norms.full_tensor()], norm.dtype)


def _check_dense(tensor: Tensor, label: Callable[[int], str], index: int) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(f"{label(index)} must be dense, got layout {tensor.layout}")
    if not tensor.is_floating_point():
        raise TypeError(f"{label(index)} must be real and floating-point, got dtype {tensor.dtype}")


def _norm(tensors: list[Tensor], sum_dtype: torch.dtype) -> Tensor:
    """Norm of tensors on one device, in the device's widest dtype, whatever the magnitude of the elements."""
    if on_host(tensors[0]):
        norm = _unscaled_norm(tensors, sum_dtype)
        # A square below the smallest normal number may be lost. Above this floor, all of them together change
        # the sum of squares by less than one unit in its last place.
        numbers = torch.finfo(sum_dtype)
        floor = math.sqrt(sum(t.numel() for t in tensors) * (numbers.tiny / numbers.eps))
        return norm if floor < norm.item() < math.inf else _scaled_norm(tensors, sum_dtype)
    if sum_dtype == torch.float32 and widest_dtype(tensors[0].device) == torch.float64:
        return _unscaled_norm(tensors, torch.float64)
    return _scaled_norm(tensors, sum_dtype)


def _scaled_norm(tensors: list[Tensor], sum_dtype: torch.dtype) -> Tensor:
    tensors = [t for t in tensors if t.numel()] or [tensors[0].new_zeros(1)]
    largest = torch.stack([t.to(sum_dtype) for t in torch._foreach_norm(tensors, math.inf)]).max()
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    norms = [_unscaled_norm([t.to(sum_dtype) / scale], sum_dtype) for t in tensors]
    return torch.linalg.vector_norm(torch.stack(norms)) * scale


def _unscaled_norm(tensors: list[Tensor], sum_dtype: torch.dtype) -> Tensor:
    wide = widest_dtype(tensors[0].device)
    if on_host(tensors[0]):
        short = [t for t in tensors if t.numel() <= _ROW]
        norms = list(torch._foreach_norm(short, 2, dtype=sum_dtype)) if short else []
        for tensor in tensors:
            if tensor.numel() > _ROW:
                norms += _row_norms(tensor, sum_dtype)
    else:
        norms = torch._foreach_norm(tensors, 2, dtype=wide)
    return torch.linalg.vector_norm(torch.cat([n.reshape(-1) for n in norms]), dtype=wide)


def _row_norms(tensor: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Norms of the rows of length 128 that a tensor can be cut into, and of what is left."""
    if not tensor.is_contiguous():
        # Elements may come in any order, so that transposed or channels-last tensors are flat without a copy.
        tensor = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
    flat = tensor.reshape(-1)
    norms = []
    for piece in [flat] if flat.dtype == dtype else flat.split(_PIECE):
        rest = len(piece) % _ROW
        if rest:
            norms.append(torch.linalg.vector_norm(piece[-rest:], dtype=dtype))
            piece = piece[:-rest]
        norms.append(torch.linalg.vector_norm(piece.to(dtype).view(-1, _ROW), dim=1))
    return norms
