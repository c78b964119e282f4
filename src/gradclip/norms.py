"""The norm of a list of tensors, and clipping gradients in place."""

import functools
import math
import reprlib
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
# Up to some 20,000 elements it is quicker to copy a tensor than to make another call for it. Copies are
# collected in buffers of about _PIECE elements.
_SMALL = 2**14


@torch.no_grad()
def total_norm(tensors: Tensor | Iterable[Tensor]) -> Tensor:
    r"""Euclidean norm of all elements of all tensors together, √(Σ x²).

    Accurate to a relative error of 1e-6 for any number of elements and any magnitude that the dtype can hold:
    float32 elements of 1e-25 or 1e25, whose squares it cannot hold, are as safe as elements of 1. (A sum of
    squares that runs through a whole float32 tensor, as in ``torch.linalg.vector_norm`` on a CPU, is wrong in
    the second digit at 1e8 normal numbers, overflows for elements of 1e20 and vanishes at 1e-23.)

    How, and what it costs:

    - On a CPU, squares are summed in rows of 128 elements (in float32, for float64 tensors in float64), and
      the norms of the rows in float64. This takes one pass without a copy; only tensors of up to 16,384
      elements are copied together first, because hundreds of calls for little work would take longer. Only
      when the result shows that squares have over- or underflowed does a second pass look for the largest
      element and, unless it is 0 or inf, a third one work on temporary copies divided by it.
    - On an accelerator, and inside ``torch.compile``, the squares of float32 and half-precision elements are
      summed in float64, whose range they cannot leave: one pass, no wait for the device.
    - float64 tensors there are always divided by their largest element first: two passes and a temporary
      copy, one tensor at a time, and again no wait. So are float32 tensors on Apple GPUs, which have no
      float64.

    A :class:`~torch.distributed.tensor.DTensor` counts with all its shards, once each. Every rank of its mesh
    must call this function; one number per rank travels for each mesh, way of sharding and dtype.

    Args:
        tensors: One tensor or an iterable of floating-point tensors of any shapes, dtypes and devices. Empty
            tensors and an empty iterable have norm 0.

    Returns:
        A 0-dim tensor on the device of the first tensor, in the common dtype of all tensors but at least
        float32. It is nan if an element is nan, otherwise inf if an element is infinite. It carries no
        autograd history.

    Raises:
        TypeError: If an element of ``tensors`` is no tensor, or sparse, complex or of integers; the message
            gives its index.

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
    _check_dense(tensors, "tensor {}".format)
    return norm_of_dense(tensors)


@torch.no_grad()
def clip_grad_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    *,
    rule: str = "hard",
    scope: str = "global",
    nonfinite: str = "propagate",
) -> Tensor:
    r"""Clip the gradients of ``parameters`` in place, as :func:`torch.nn.utils.clip_grad_norm_` does.

    Every ``.grad`` is multiplied by :func:`~gradclip.rules.clip_factor` of the norm of all gradients
    together. What differs from torch:

    - The norm is accurate for any size and magnitude (see :func:`total_norm`).
    - The factor is c/g, where torch has c/(g + 1e-6).
    - An empty ``parameters`` and ``max_norm=0`` are refused; torch returns 0 for the one and sets all
      gradients to 0 for the other.
    - There is no ``norm_type`` (the norm is Euclidean) and no ``foreach``; ``nonfinite="raise"`` stands for
      ``error_if_nonfinite=True``.

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
        TypeError: If ``max_norm`` is not a number, an element of ``parameters`` is not a tensor, or a
            gradient is sparse or complex; the message gives the index of the parameter.
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
    norm = norm_of_dense(gradients) if gradients else torch.zeros((), device=parameters[0].device)
    if nonfinite == "raise":
        require_finite(norm, parameters, "parameter {}".format)
    factor = clip_factor(norm, max_norm, rule)
    if on_host(factor) and factor == 1 and norm.isfinite():
        return norm
    for (device, _), members in by_device_and_dtype(local_parts(gradients)).items():
        torch._foreach_mul_(members, factor.to(device))
        if nonfinite == "skip":
            # A mask, because 0 * inf and 0 * nan are nan.
            skipped = ~norm.isfinite().to(device)
            for gradient in members:
                gradient.masked_fill_(skipped, 0.0)
    return norm


def dense_gradients(parameters: Sequence[Tensor], label: Callable[[int], str]) -> list[Tensor]:
    """The gradients that exist, once it is clear that they can be clipped; ``label`` names a parameter."""
    for index, parameter in enumerate(parameters):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{label(index)} must be a tensor, got {reprlib.repr(parameter)}")
    gradients = [parameter.grad for parameter in parameters]
    _check_dense(gradients, lambda index: f"the gradient of {label(index)}", optional=True)
    return [gradient for gradient in gradients if gradient is not None]


def norm_of_dense(tensors: list[Tensor]) -> Tensor:
    """:func:`total_norm` of at least one tensor, without its checks."""
    if any_dtensor(tensors):
        layouts = defaultdict(list)
        for tensor in tensors:
            layout = None
            if any_dtensor([tensor]):
                tensor = _reduced(tensor)
                layout = tensor.device_mesh, tuple(place.is_shard() for place in tensor.placements)
            layouts[layout].append(local(tensor))
    else:
        layouts = {None: tensors}

    norms, dtypes = [], []
    for layout, members in layouts.items():
        for (_, dtype), alike in by_device_and_dtype(members).items():
            norm = _norm(alike, torch.promote_types(dtype, torch.float32))
            norms.append(norm if layout is None else _norm_over_mesh(norm, *layout))
            dtypes.append(dtype)
    device = tensors[0].device
    norm = norms[0].to(device)
    if len(norms) > 1:
        norm = _scaled_norm([torch.stack([n.to(device) for n in norms])], norm.dtype)
    return norm.to(functools.reduce(torch.promote_types, dtypes, torch.float32))


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


def by_device_and_dtype(
    tensors: list[Tensor],
) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    """The tensors in groups of one device and dtype, in which a foreach function takes one launch."""
    kinds = [(tensor.device, tensor.dtype) for tensor in tensors]
    groups = {kind: [] for kind in kinds}
    if len(groups) == 1:
        return {kinds[0]: tensors}
    for kind, tensor in zip(kinds, tensors, strict=True):
        groups[kind].append(tensor)
    return groups


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor itself."""
    return tensor.to_local() if any_dtensor([tensor]) else tensor


def local_parts(tensors: list[Tensor]) -> list[Tensor]:
    """:func:`local` of each tensor."""
    return [local(tensor) for tensor in tensors] if any_dtensor(tensors) else tensors


def any_dtensor(tensors: list[Tensor]) -> bool:
    """Whether there is a DTensor among the tensors."""
    # A DTensor exists only once its module is loaded, and loading it costs half as much as torch itself.
    module = sys.modules.get("torch.distributed.tensor")
    # Types first: there are one or two of them in a list of hundreds of tensors.
    return module is not None and any(issubclass(kind, module.DTensor) for kind in {type(t) for t in tensors})


def _reduced(dtensor: Tensor) -> Tensor:
    """The DTensor with pending sums carried out: the norm of a sum is not a function of its terms' norms."""
    from torch.distributed.tensor import Replicate

    return dtensor.redistribute(placements=[Replicate() if p.is_partial() else p for p in dtensor.placements])


def _norm_over_mesh(norm: Tensor, mesh, sharded: tuple[bool, ...]) -> Tensor:
    """Combine the local norms of all shards: gathered rather than summed, so that squares cannot overflow."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [Shard(dim) if split else Replicate() for dim, split in enumerate(sharded)]
    norms = DTensor.from_local(norm.reshape((1,) * mesh.ndim), mesh, placements, run_check=False)
    return _scaled_norm([norms.full_tensor().reshape(-1)], norm.dtype)


def _check_dense(
    tensors: Sequence[Tensor | None], label: Callable[[int], str], *, optional: bool = False
) -> None:
    """Raise :class:`TypeError` for the first tensor that has no norm here; None passes if ``optional``."""
    for index, tensor in enumerate(tensors):
        if tensor is None and optional:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{label(index)} must be a tensor, got {reprlib.repr(tensor)}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{label(index)} must be dense, got layout {tensor.layout}")
        if not tensor.is_floating_point():
            raise TypeError(f"{label(index)} must be real and floating-point, got dtype {tensor.dtype}")


def _norm(tensors: list[Tensor], sum_dtype: torch.dtype) -> Tensor:
    """Norm of tensors of one device and dtype, in the device's widest dtype, whatever their magnitude."""
    if on_host(tensors[0]):
        blocks = _blocks(tensors)
        norm = _unscaled_norm(blocks, sum_dtype)
        # A square below the smallest normal number may be lost. Above this floor, all of them together change
        # the sum of squares by less than one unit in its last place.
        numbers = torch.finfo(sum_dtype)
        floor = math.sqrt(sum(block.numel() for block in blocks) * (numbers.tiny / numbers.eps))
        value = norm.item()
        # Squares, which are not negative, add up to nan only if one of them is nan.
        exact = floor < value < math.inf or math.isnan(value)
        return norm if exact else _scaled_norm(blocks, sum_dtype)
    if sum_dtype == torch.float32 and widest_dtype(tensors[0].device) == torch.float64:
        return _unscaled_norm(tensors, torch.float64)
    return _scaled_norm(tensors, sum_dtype)


def _scaled_norm(tensors: list[Tensor], sum_dtype: torch.dtype) -> Tensor:
    """As :func:`_unscaled_norm`, of tensors divided by the largest element."""
    wide = widest_dtype(tensors[0].device)
    tensors = [t for t in tensors if t.numel()] or [tensors[0].new_zeros(1)]
    if on_host(tensors[0]):  # 15 times faster on a CPU than the norm
        extremes = [extreme for t in tensors for extreme in torch.aminmax(t)]
    else:
        extremes = torch._foreach_norm(tensors, math.inf)
    largest = torch.stack([extreme.to(sum_dtype) for extreme in extremes]).abs().max()
    if on_host(largest) and (largest == 0 or largest == math.inf):
        return largest.to(wide)
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    norms = [_unscaled_norm([t.to(sum_dtype) / scale], sum_dtype) for t in tensors]
    return torch.linalg.vector_norm(torch.stack(norms)) * scale


def _unscaled_norm(tensors: list[Tensor], sum_dtype: torch.dtype) -> Tensor:
    """Norm of tensors of one device; on a CPU they must have one dimension."""
    wide = widest_dtype(tensors[0].device)
    if on_host(tensors[0]):
        norms = [norm for tensor in tensors for norm in _row_norms(tensor, sum_dtype)]
    else:
        norms = torch._foreach_norm(tensors, 2, dtype=wide)
    return torch.linalg.vector_norm(torch.cat([n.reshape(-1) for n in norms]), dtype=wide)


def _blocks(tensors: list[Tensor]) -> list[Tensor]:
    """The elements of tensors of one device and dtype, in any order, in few tensors of one dimension."""
    blocks, small, size = [], [], 0
    for tensor in tensors:
        count = tensor.numel()
        if count > _SMALL:
            if not tensor.is_contiguous():
                # Transposed or channels-last tensors become contiguous, and then flat, without a copy.
                tensor = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
            blocks.append(tensor.reshape(-1))
            continue
        small.append(tensor)
        size += count
        if size > _PIECE:
            blocks.append(torch._utils._flatten_dense_tensors(small))
            small, size = [], 0
    if small:
        blocks.append(torch._utils._flatten_dense_tensors(small))
    return blocks


def _row_norms(flat: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Norms of the rows of length 128 that a tensor of one dimension can be cut into, and of what is left."""
    norms = []
    for piece in [flat] if flat.dtype == dtype else flat.split(_PIECE):
        rest = piece.numel() % _ROW
        if rest:
            norms.append(torch.linalg.vector_norm(piece[-rest:], dtype=dtype))
            piece = piece[:-rest]
        norms.append(torch.linalg.vector_norm(piece.to(dtype).view(-1, _ROW), dim=1))
    return norms
