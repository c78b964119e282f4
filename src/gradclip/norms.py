"""The norm of a list of tensors, and clipping gradients in place."""

import functools
import importlib
import math
import reprlib
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gradclip.rules import RULES, check_choice, check_rule, clip_factor, widest_dtype

SCOPES = ("global", "tensor", "unit")
NONFINITE = ("propagate", "skip", "raise")

# Below this norm a unit counts as having it, so that a weight that starts at zero can move (Brock et al.).
UNIT_EPS = 1e-3

# On a CPU squares are summed in rows this long. torch adds a row in as many lanes as a vector register holds,
# so that no square passes through more than ROW/lanes + lanes roundings; two more are those of the row's root
# and of the result. With 16, 8 and 4 lanes: (28/2 + 2), (24/2 + 2), (20/2 + 2) times 2**-24, below 1e-6.
_ROW = {"AVX512": 192, "AVX2": 128}.get(torch.backends.cpu.get_cpu_capability(), 64)
# Least square that a dtype holds with all its digits.
_FLOOR = {dtype: torch.finfo(dtype).tiny / torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}
# Half-precision tensors are widened a piece at a time: the copy stays in the cache.
_PIECE = 2**19
# Up to some 20,000 elements it is quicker to copy a tensor than to make another call for it. Copies are
# collected in buffers of about _PIECE elements. A list of no more than that is copied whole, if its tensors
# are this small on average.
_SMALL = 2**14


@torch.no_grad()
def total_norm(tensors: Tensor | Iterable[Tensor]) -> Tensor:
    r"""Euclidean norm of all elements of all tensors together, √(Σ x²).

    Accurate to a relative error of 1e-6 for any number of elements and any magnitude that the dtype can hold:
    float32 elements of 1e-25 or 1e25, whose squares it cannot hold, are as safe as elements of 1. (A sum of
    squares that runs through a whole float32 tensor, as in ``torch.linalg.vector_norm`` on a CPU, is wrong in
    the second digit at 1e8 normal numbers, overflows for elements of 1e20 and vanishes at 1e-23.)

    How, and what it costs:

    - On a CPU, the squares of float32 elements are summed in float64 by a compiled kernel, in one pass
      without a copy, if numba is installed and the tensors have no gaps.
    - Otherwise, on a CPU, squares are summed in short rows (in float32, for float64 tensors in float64), and
      the norms of the rows in float64. This takes one pass without a copy; only tensors of up to 16,384
      elements, and lists of such tensors on average with up to 524,288 elements, are copied together first,
      because hundreds of calls for little work would take longer. Only when the result shows that squares
      have over- or underflowed does a second pass look for the largest element and, unless it is 0 or inf, a
      third one work on temporary copies divided by it.
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
    max_norm: float | Callable[[Tensor], Tensor],
    *,
    rule: str = "hard",
    scope: str = "global",
    nonfinite: str = "propagate",
) -> Tensor:
    r"""Clip the gradients of ``parameters`` in place, as :func:`torch.nn.utils.clip_grad_norm_` does.

    Every ``.grad`` is multiplied by :func:`~gradclip.rules.clip_factor` of the norm of all gradients
    together, or of another norm, see ``scope``. What differs from torch:

    - The norm is accurate for any size and magnitude (see :func:`total_norm`).
    - The factor is c/g, where torch has c/(g + 1e-6).
    - An empty ``parameters`` and ``max_norm=0`` are refused; torch returns 0 for the one and sets all
      gradients to 0 for the other.
    - There is no ``norm_type`` (the norm is Euclidean) and no ``foreach``; ``nonfinite="raise"`` stands for
      ``error_if_nonfinite=True``.

    Args:
        parameters: One tensor or an iterable of tensors. Those without a gradient are ignored.
        max_norm: The threshold, positive, in the units of the gradient; with ``scope="unit"`` a ratio without
            units. ``inf`` measures without clipping. With ``scope="global"`` it can be a policy of
            :mod:`gradclip.thresholds`, or another function from the norm to the threshold, both 0-dim
            tensors.
        rule: ``"hard"``, ``"soft"``, ``"normalize"`` or ``"log"``, see :func:`~gradclip.rules.clip_factor`.
        scope: What has a norm of its own.

            - ``"global"``: all gradients together.
            - ``"tensor"``: each gradient.
            - ``"unit"``: each output unit, which is adaptive gradient clipping: a row of the gradient, with
              index i along its first dimension, is clipped at ``max_norm · max(‖W_i‖, 1e-3)`` for the
              same row W_i of the weight. A vector or number is one unit. (The first dimension is the output
              in torch's linear, convolution and embedding layers, not in transposed convolutions.)
        nonfinite: What to do when the norm of all gradients is inf or nan.

            - ``"propagate"``: multiply all the same, as torch does. A norm of inf turns finite elements into
              0 and infinite ones into nan; a norm of nan turns everything into nan.
            - ``"skip"``: set all gradients to zero, without waiting for the device. The optimizer step that
              follows then uses no gradient, but momentum, running averages and weight decay still act;
              :class:`~gradclip.optim.ClippedSGD` leaves those untouched too.
            - ``"raise"``: raise and change nothing. This waits for the device.

    Returns:
        The norm of all gradients before clipping, whatever the scope, as :func:`total_norm` gives it; 0 if no
        parameter has a gradient.

    Raises:
        ValueError: If ``parameters`` is empty, ``max_norm`` is not positive, an option is unknown, or with
            ``scope="unit"`` a DTensor is sharded along another dimension than its first.
        TypeError: If ``max_norm`` is not a number, an element of ``parameters`` is not a tensor, or a
            gradient is sparse or complex; the message gives the index of the parameter.
        RuntimeError: With ``nonfinite="raise"``, naming the first parameter with a non-finite gradient.

    References:
        Brock, De, Smith and Simonyan, *High-performance large-scale image recognition without normalization*
        (ICML 2021), equation 3, for ``scope="unit"``; they leave the last linear layer unclipped.

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
    check_threshold(max_norm, rule, scope)
    check_choice("nonfinite", nonfinite, NONFINITE)
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not parameters:
        raise ValueError("no parameters: got an empty iterable (a generator can be used only once)")

    gradients = dense_gradients(parameters, "parameter {}".format)
    if not gradients:
        return torch.zeros((), device=parameters[0].device)
    if scope == "global":
        pairs = None
    else:
        weights = [parameter for parameter in parameters if parameter.grad is not None]
        pairs = scoped_norms(weights, gradients, scope, [max_norm] * len(weights))
    norm = norm_of_dense(gradients)
    if nonfinite == "raise":
        require_finite(norm, parameters, "parameter {}".format)
    if pairs is None:
        factor = clip_factor(norm, threshold(max_norm, norm), rule)
        if on_host(factor) and factor == 1 and norm.isfinite():
            return norm
        for (device, _), members in by_device_and_dtype(local_parts(gradients)).items():
            torch._foreach_mul_(members, factor.to(device))
    else:
        for gradient, (g, c) in zip(local_parts(gradients), pairs, strict=True):
            gradient.mul_(clip_factor(g, c, rule))
    if nonfinite == "skip":
        # A mask, because 0 * inf and 0 * nan are nan.
        for gradient in local_parts(gradients):
            gradient.masked_fill_(~norm.isfinite().to(gradient.device), 0.0)
    return norm


def check_threshold(max_norm: Any, rule: str, scope: str) -> None:
    """Raise :class:`ValueError` or :class:`TypeError` unless these three can go together."""
    check_choice("scope", scope, SCOPES)
    if not callable(max_norm):
        check_rule(max_norm, rule)
        return
    if isinstance(max_norm, type):
        raise TypeError(
            f"max_norm must be a number or a policy, got the class; make one: {max_norm.__name__}()"
        )
    check_choice("rule", rule, RULES)
    if scope != "global":
        raise ValueError(f"a threshold policy sees the norm of all gradients: scope={scope!r} needs a number")


def threshold(max_norm: float | Callable[[Tensor], Tensor], norm: Tensor) -> float | Tensor:
    """The threshold for a gradient of this norm."""
    return max_norm(norm) if callable(max_norm) else max_norm


def scoped_norms(
    weights: list[Tensor], gradients: list[Tensor], scope: str, max_norms: list[float]
) -> list[tuple[Tensor, Tensor]]:
    """Norms and thresholds of each gradient under a scope other than global, in the device's widest dtype.

    Both are 0-dim, or hold one element for each unit of this rank's part, in a shape that broadcasts with it.
    """
    if scope == "tensor":
        return [(g, torch.full_like(g, c)) for g, c in zip(_each_norm(gradients), max_norms, strict=True)]
    norms, sizes = _norms_of_units(gradients), _norms_of_units(weights)
    return [(g, w.clamp(min=UNIT_EPS) * c) for g, w, c in zip(norms, sizes, max_norms, strict=True)]


def dense_gradients(parameters: Sequence[Tensor], label: Callable[[int], str]) -> list[Tensor]:
    """The gradients that exist, once it is clear that they can be clipped; ``label`` names a parameter."""
    for index, parameter in enumerate(parameters):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{label(index)} must be a tensor, got {reprlib.repr(parameter)}")
    gradients = [parameter.grad for parameter in parameters]
    _check_dense(gradients, lambda index: f"the gradient of {label(index)}", optional=True)
    return [gradient for gradient in gradients if gradient is not None]


def norm_of_dense(tensors: list[Tensor], alike: bool = False) -> Tensor:
    """:func:`total_norm` of at least one tensor, without its checks; ``alike`` is :func:`are_alike`."""
    if alike:
        dtype = torch.promote_types(tensors[0].dtype, torch.float32)
        return _norm(tensors, dtype).to(dtype)
    if any_dtensor(tensors):
        layouts = defaultdict(list)
        for layout, part in map(_layout, tensors):
            layouts[layout].append(part)
    else:
        layouts = {None: tensors}

    norms, dtypes = [], []
    for layout, members in layouts.items():
        for (_, dtype), alike in by_device_and_dtype(members).items():
            norm = _norm(alike, torch.promote_types(dtype, torch.float32))
            norms.append(norm if layout is None else _norm_over_mesh(norm.reshape(1), *layout)[0])
            dtypes.append(dtype)
    device = tensors[0].device
    norm = norms[0].to(device)
    if len(norms) > 1:
        norm = _norm([torch.stack([n.to(device) for n in norms])], norm.dtype)
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


@functools.cache
def compiled() -> ModuleType | None:
    """The module ``gradclip.kernels``; None without numba, or where it fails, of which a warning tells."""
    try:
        return importlib.import_module("gradclip.kernels")
    except ImportError:
        return None
    except Exception as error:
        warnings.warn(f"numba fails here, and steps on the CPU take longer: {error!r}", stacklevel=2)
        return None


def are_alike(parameters: list[Tensor], gradients: list[Tensor]) -> bool:
    """Whether these are plain dense tensors of one device and dtype, so that no list needs sorting."""
    return (
        len({p.device for p in parameters}) == 1  # a gradient is where its parameter is
        and len({t.dtype for t in (*parameters, *gradients)}) == 1
        and set(map(type, (*parameters, *gradients))) <= {Tensor, torch.nn.Parameter}
        and {g.layout for g in gradients} == {torch.strided}
        and gradients[0].is_floating_point()
    )


def by_device_and_dtype(
    tensors: list[Tensor],
) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    """The tensors in groups of one device and dtype, in which a foreach function takes one launch."""
    kinds = {(tensor.device, tensor.dtype): None for tensor in tensors}
    if len(kinds) == 1:
        return dict.fromkeys(kinds, tensors)
    return {kind: [t for t in tensors if (t.device, t.dtype) == kind] for kind in kinds}


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
    return module is not None and any(issubclass(kind, module.DTensor) for kind in set(map(type, tensors)))


def _reduced(dtensor: Tensor) -> Tensor:
    """The DTensor with pending sums carried out: the norm of a sum is not a function of its terms' norms."""
    from torch.distributed.tensor import Replicate

    return dtensor.redistribute(placements=[Replicate() if p.is_partial() else p for p in dtensor.placements])


def _layout(tensor: Tensor) -> tuple[tuple[Any, tuple[bool, ...]] | None, Tensor]:
    """The mesh of a DTensor and along which of its dimensions it is split, and this rank's part of it."""
    if not any_dtensor([tensor]):
        return None, tensor
    tensor = _reduced(tensor)
    return (tensor.device_mesh, tuple(place.is_shard() for place in tensor.placements)), local(tensor)


def _norm_over_mesh(norms: Tensor, mesh, sharded: tuple[bool, ...]) -> Tensor:
    """Combine the local norms of all shards: gathered rather than summed, so that squares cannot overflow."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [Shard(dim) if split else Replicate() for dim, split in enumerate(sharded)]
    own = norms.reshape(*[1] * mesh.ndim, len(norms))
    parts = DTensor.from_local(own, mesh, placements, run_check=False).full_tensor().reshape(-1, len(norms))
    largest = parts.amax(0)
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    return torch.linalg.vector_norm(parts / scale, dim=0) * scale


def _each_norm(tensors: list[Tensor]) -> list[Tensor]:
    """Norm of each tensor, 0-dim and in its device's widest dtype."""
    groups = defaultdict(list)
    for index, (layout, part) in enumerate(map(_layout, tensors)):
        groups[layout, part.device, part.dtype].append((index, part))
    norms = {}
    for (layout, device, dtype), members in groups.items():
        indices, parts = zip(*members, strict=True)
        sum_dtype = torch.promote_types(dtype, torch.float32)
        if on_host(parts[0]) or sum_dtype == widest_dtype(device):
            found = [_norm([part], sum_dtype) for part in parts]
        else:
            found = torch._foreach_norm(parts, 2, dtype=torch.float64)
        if layout is not None:
            found = _norm_over_mesh(torch.stack(found), *layout).unbind()
        norms |= zip(indices, found, strict=True)
    return [norms[index] for index in range(len(tensors))]


def _norms_of_units(tensors: list[Tensor]) -> list[Tensor]:
    """Norm of each unit: a row along the first dimension, or the whole of a vector or number."""
    whole = iter(_each_norm([tensor for tensor in tensors if tensor.ndim < 2]))
    return [next(whole) if tensor.ndim < 2 else _row_units(tensor) for tensor in tensors]


def _row_units(tensor: Tensor) -> Tensor:
    """Norm of each row of this rank's part, of shape (rows, 1, ..., 1) and in the device's widest dtype."""
    if any_dtensor([tensor]):
        tensor = _reduced(tensor)
        if any(place.is_shard() and place.dim != 0 for place in tensor.placements):
            raise ValueError(
                "scope='unit' needs whole rows on every rank, as fully_shard makes them by default, "
                f"got placements {tensor.placements}"
            )
        tensor = local(tensor)
    wide = widest_dtype(tensor.device)
    dims, row = tuple(range(1, tensor.ndim)), math.prod(tensor.shape[1:])
    if not tensor.numel():
        return tensor.new_zeros((len(tensor), *[1] * len(dims)), dtype=wide)
    if tensor.dtype == wide:
        largest = tensor.abs().amax(dims, keepdim=True)
        scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
        return torch.linalg.vector_norm(tensor / scale, dim=dims, keepdim=True) * scale
    # On a CPU the wide copy of a piece stays in the cache; elsewhere there is no copy.
    pieces = tensor.split(max(1, _PIECE // row)) if on_host(tensor) else [tensor]
    return torch.cat([torch.linalg.vector_norm(t, dim=dims, keepdim=True, dtype=wide) for t in pieces])


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
        kernels = compiled() if tensors[0].dtype == torch.float32 else None
        memory = kernels and kernels.memory(tensors)
        if memory:
            squares = kernels.sum_of_squares(memory)
            return torch.tensor(math.sqrt(squares), dtype=torch.float64, device="cpu")
        blocks = _blocks(tensors)
        norm = _unscaled_norm(blocks, sum_dtype)
        # A square below the smallest normal number may be lost. Above this floor, all of them together change
        # the sum of squares by less than one unit in its last place.
        floor = math.sqrt(sum(map(len, blocks)) * _FLOOR[sum_dtype])
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
    """Norm of tensors of one device; on a CPU they must be blocks, as of :func:`_blocks`."""
    wide = widest_dtype(tensors[0].device)
    if on_host(tensors[0]):
        norms = [norms for tensor in tensors for norms in _row_norms(tensor, sum_dtype)]
        return torch.linalg.vector_norm(torch.cat(norms) if len(norms) > 1 else norms[0], dtype=wide)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2, dtype=wide)))


def _blocks(tensors: list[Tensor]) -> list[Tensor]:
    """The elements of tensors of one device and dtype, in any order, with zeros up to whole rows.

    They come in few tensors of one dimension.
    """
    sizes = list(map(Tensor.numel, tensors))
    total = sum(sizes)
    if total <= min(_PIECE, len(tensors) * _SMALL):
        return [_joined(tensors, total)]
    blocks, small = [], []
    for tensor, size in zip(tensors, sizes, strict=True):
        if size <= _SMALL:
            small.append(tensor)
            continue
        rest = size % _ROW
        if rest:
            rows, tensor = _flat(tensor).split((size - rest, rest))
            blocks.append(rows)
            small.append(tensor)
        else:
            blocks.append(_flat(tensor))
    # So many at a time that a buffer has at most _PIECE elements.
    group = _PIECE // _SMALL
    for start in range(0, len(small), group):
        some = small[start : start + group]
        blocks.append(_joined(some, sum(map(Tensor.numel, some))))
    return blocks


def _joined(tensors: list[Tensor], total: int) -> Tensor:
    """The elements of tensors, ``total`` in all, in one dimension, with zeros up to a whole row."""
    missing = -total % _ROW
    if missing:
        tensors = [*tensors, tensors[0].new_zeros(missing)]
    return torch._utils._flatten_dense_tensors(tensors)


def _flat(tensor: Tensor) -> Tensor:
    """The elements in one dimension, in any order, without a copy if they have no gaps."""
    if not tensor.is_contiguous():
        # Transposed or channels-last tensors become contiguous, and then flat, without a copy.
        tensor = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
    return tensor.reshape(-1)


def _row_norms(flat: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Norms of the short rows that a tensor of one dimension consists of."""
    if flat.dtype != dtype:
        pieces = flat.split(_PIECE // _ROW * _ROW)
        return [norm for piece in pieces for norm in _row_norms(piece.to(dtype), dtype)]
    return [torch.linalg.vector_norm(flat.view(len(flat) // _ROW, _ROW), dim=1)]
