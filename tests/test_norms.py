import math
import tempfile

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

from gradclip.norms import NONFINITE, clip_grad_, total_norm
from gradclip.rules import RULES, clip_factor

pytestmark = pytest.mark.usefixtures("all_both_ways")

EPS = 2.0**-52
ACCURACY = 1e-6  # what total_norm promises for sums in float32


def oracle(*tensors):
    """Norm through math.fsum, which adds without rounding errors, of elements scaled to avoid overflow."""
    elements = [abs(x) for t in tensors for x in t.double().flatten().tolist()]
    largest = max(elements, default=0.0)
    return largest * math.sqrt(math.fsum((x / largest) ** 2 for x in elements)) if largest else 0.0


def parameters_with(*gradients):
    parameters = [torch.zeros_like(g, requires_grad=True) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return parameters


@pytest.fixture(params=["eager", "compiled"])
def norm_function(request):
    """total_norm as Python runs it, and as torch.compile traces it: that is the path of accelerators, too."""
    if request.param == "eager":
        return total_norm
    torch._dynamo.reset()
    return torch.compile(total_norm, backend="eager", fullgraph=True)


def test_as_many_float32_normals_as_gpt_2_small_has():
    x = torch.randn(124_439_808, generator=torch.Generator().manual_seed(0))
    # numpy in float64 and chunks: pairwise sums, so an error of a few units of 2e-16.
    chunks = np.array_split(x.numpy(), 100)
    expected = math.sqrt(sum(float(np.square(c, dtype=np.float64).sum()) for c in chunks))
    # The result itself is rounded to float32, half a unit of 1.2e-7; the rest of 1e-6 is for the sums.
    assert total_norm([x]).item() == pytest.approx(expected, rel=ACCURACY)


def test_equal_elements_do_not_add_up_their_rounding_errors():
    # With equal elements the rounding errors of a running sum have one sign; the norm is known exactly.
    for value in torch.rand(20, generator=torch.Generator().manual_seed(1)):
        x = torch.full((10**6,), value.item())
        assert total_norm(x).item() == pytest.approx(value.item() * 1000, rel=ACCURACY)
        small = x.split(9999)  # 101 tensors, which the library collects in buffers
        assert total_norm(small).item() == pytest.approx(value.item() * 1000, rel=ACCURACY)


shapes = st.lists(
    st.sampled_from([(), (0,), (1,), (3, 0), (5,), (127,), (128,), (129,), (40, 30)]), min_size=1, max_size=5
)
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(shapes=shapes, data=st.data(), seed=st.integers(0, 2**32))
def test_any_shapes_and_dtypes(shapes, data, seed):
    generator = torch.Generator().manual_seed(seed)
    kinds = [data.draw(dtypes) for _ in shapes]
    tensors = [torch.randn(s, generator=generator).to(k) for s, k in zip(shapes, kinds, strict=True)]
    norm = total_norm(tensors)
    assert norm.shape == ()
    assert norm.dtype == (torch.float64 if torch.float64 in kinds else torch.float32)
    assert norm.item() == pytest.approx(oracle(*tensors), rel=ACCURACY)


def test_float64_is_accurate_to_float64():
    x = torch.randn(1000, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    # Sums of 128 squares in at least 4 lanes and of 547 rows in sequence: at most (128/4 + 547) roundings.
    assert total_norm(x).item() == pytest.approx(oracle(x), rel=600 * EPS)


@pytest.mark.parametrize(
    ("dtype", "scales"),
    [
        (torch.float32, [1e-44, 1e-30, 1e-25, 1e-20, 1.0, 1e15, 1e25, 1e30, 1e36]),
        (torch.bfloat16, [1e-30, 1e30]),
        (torch.float16, [6e-8, 6e4]),
        (torch.float64, [1e-320, 1e-200, 1e-160, 1.0, 1e160, 1e200, 1e300]),
    ],
)
def test_squares_neither_overflow_nor_underflow(norm_function, dtype, scales):
    for scale in scales:
        tensors = [torch.full((300,), scale, dtype=dtype), torch.tensor([scale, -scale, 0.0], dtype=dtype)]
        expected = oracle(*tensors)
        # Subnormal results are multiples of the smallest number: half of it is the rounding error.
        info = torch.finfo(torch.promote_types(dtype, torch.float32))
        rounding = info.smallest_normal * info.eps / 2
        assert norm_function(tensors).item() == pytest.approx(expected, rel=ACCURACY, abs=rounding)


def test_wide_range_of_magnitudes_in_one_list(norm_function):
    tensors = [torch.tensor([1e-25]), torch.tensor([3e25, 4e25]), torch.zeros(200)]
    assert norm_function(tensors).item() == pytest.approx(5e25, rel=ACCURACY)
    tensors = [torch.tensor([3e-25]), torch.tensor([4e-25]).double(), torch.zeros(2)]
    assert norm_function(tensors).item() == pytest.approx(5e-25, rel=ACCURACY)
    tensors = [torch.tensor([3e-38]), torch.tensor([1e200], dtype=torch.float64)]
    assert norm_function(tensors).item() == pytest.approx(1e200, rel=ACCURACY)


def test_infinite_and_nan_elements(norm_function):
    assert norm_function([torch.ones(200), torch.tensor([1.0, -math.inf])]).item() == math.inf
    assert math.isnan(norm_function([torch.tensor([math.inf, math.nan]), torch.ones(2)]).item())
    assert norm_function([torch.tensor([math.inf], dtype=torch.float64)]).item() == math.inf


def test_nothing_and_zeros(norm_function):
    assert total_norm([]).item() == 0.0
    for tensors in ([torch.empty(0)], [torch.zeros(300), torch.zeros(())], [torch.empty(0, 3).double()]):
        assert norm_function(tensors).item() == 0.0


def test_layouts_agree():
    x = torch.randn(6, 8, 10, 12, generator=torch.Generator().manual_seed(3))
    expected = pytest.approx(oracle(x), rel=ACCURACY)
    for view in (x.transpose(0, 2), x.to(memory_format=torch.channels_last)):
        assert not view.is_contiguous()
        assert total_norm(view).item() == expected
    strided = x[:, ::2]
    assert total_norm(strided).item() == pytest.approx(oracle(strided), rel=ACCURACY)
    expanded = torch.tensor([2.0]).expand(400)
    assert total_norm(expanded).item() == pytest.approx(40.0, rel=ACCURACY)


def test_large_half_precision_tensors_are_widened_in_pieces():
    x = torch.full((2**20 + 77,), 0.5, dtype=torch.bfloat16)
    assert total_norm(x).item() == pytest.approx(0.5 * math.sqrt(2**20 + 77), rel=ACCURACY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_many_small_tensors_among_large_ones(dtype):
    # More than one buffer of small tensors, some of them strided, and large tensors between them.
    sizes = [0, 1, 127, 9000, 20_000, 16_384, 3] * 25
    generator = torch.Generator().manual_seed(4)
    tensors = [torch.randn(n, 2, generator=generator).to(dtype)[:, n % 2] for n in sizes]
    tensors += [torch.randn(140, 150, generator=generator).to(dtype).t()]
    accuracy = ACCURACY if dtype != torch.float64 else 10_000 * EPS  # 9 million squares in rows of 128
    assert total_norm(tensors).item() == pytest.approx(oracle(*tensors), rel=accuracy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("many", [1, 3, 50])
def test_no_end_of_a_tensor_is_left_out(dtype, many):
    # Sizes around those at which tensors are copied together or read in place, and around whole rows of them.
    # All that is not zero stands at an end, and each end has another square: leaving one out shows.
    sizes = [1, 63, 64, 65, 191, 192, 193, 2**14 - 1, 2**14, 2**14 + 1, 20 * 192, 2**15 + 1] * many
    tensors = [torch.zeros(size, dtype=dtype) for size in sizes]
    for index, tensor in enumerate(tensors, start=1):
        tensor[0] = tensor[-1] = index
    ends = [1 if size == 1 else 2 for size in sizes]
    expected = sum(n * tensor[-1].item() ** 2 for n, tensor in zip(ends, tensors, strict=True))
    assert total_norm(tensors).item() == pytest.approx(math.sqrt(expected), rel=ACCURACY)
    for tensor in tensors:
        square = tensor[-1].item() ** 2 * (1 if len(tensor) == 1 else 2)
        assert total_norm(tensor).item() == pytest.approx(math.sqrt(square), rel=ACCURACY)


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_zeros_and_nonfinite_elements_need_no_scaled_copy(value, without_kernels):
    class Divisions(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += "div" in str(function)
            return function(*args, **(kwargs or {}))

    tensors = [torch.full((50_000,), value), torch.full((3,), value)]
    with Divisions() as divisions:
        norm = total_norm(tensors)
    np.testing.assert_array_equal(norm.numpy(), np.float32(value))
    assert divisions.count == 0
    with Divisions() as divisions:
        total_norm(torch.full((50_000,), 1e-30))
    assert divisions.count > 0  # so that the count of 0 says something


def test_generator_and_single_tensor_and_no_autograd_history():
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    assert total_norm(t for t in [x, 12 * torch.ones(1)]).item() == 13.0
    assert not total_norm(x).requires_grad


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            torch.zeros(2, dtype=torch.complex64),
            r"tensor 1 must be real and floating-point, got dtype torch\.complex64",
        ),
        (
            torch.zeros(2, dtype=torch.int64),
            r"tensor 1 must be real and floating-point, got dtype torch\.int64",
        ),
        (torch.eye(2).to_sparse(), r"tensor 1 must be dense, got layout torch\.sparse_coo"),
    ],
)
def test_unsuitable_tensors(tensor, message):
    with pytest.raises(TypeError, match=message):
        total_norm([torch.zeros(1), tensor])


@pytest.mark.parametrize("thing", [None, 1.0, "a"])
def test_what_is_no_tensor_is_named(thing):
    with pytest.raises(TypeError, match=f"tensor 1 must be a tensor, got {thing!r}"):
        total_norm([torch.zeros(1), thing])
    with pytest.raises(TypeError, match=f"parameter 1 must be a tensor, got {thing!r}"):
        clip_grad_([torch.zeros(1), thing], 1.0)


@pytest.fixture
def mesh():
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
        dist.destroy_process_group()


# Older torch warns about random numbers, of which there are none here.
@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")
def test_distributed_tensors(mesh):
    x = torch.arange(6.0).reshape(3, 2)
    for placements in (
        [Replicate(), Shard(0)],
        [Replicate(), Shard(1)],
        [Shard(0), Shard(1)],
        [Replicate()] * 2,
    ):
        norm = total_norm([distribute_tensor(x, mesh, placements), torch.tensor([3.0])])
        assert type(norm) is torch.Tensor
        assert norm.item() == pytest.approx(8.0, rel=ACCURACY)  # 0 + 1 + 4 + 9 + 16 + 25 + 9 = 64
    pending = DTensor.from_local(x, mesh, [Partial(), Shard(0)], run_check=False)
    assert total_norm(pending).item() == pytest.approx(math.sqrt(55), rel=ACCURACY)

    weight = nn.Parameter(distribute_tensor(x, mesh, [Replicate(), Shard(0)]))
    weight.grad = distribute_tensor(x, mesh, [Replicate(), Shard(0)])
    assert clip_grad_(weight, 1.0).item() == pytest.approx(math.sqrt(55), rel=ACCURACY)
    assert total_norm(weight.grad.full_tensor()).item() == pytest.approx(1.0, rel=2 * ACCURACY)


# Gradients of one to four parameters, with norms from far below to far above the threshold of 1.
gradients = st.builds(
    lambda sizes, scale, seed: [
        scale * torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + i))
        for i, size in enumerate(sizes)
    ],
    st.lists(st.integers(1, 300), min_size=1, max_size=4),
    st.sampled_from([1e-30, 1e-3, 0.3, 1.0, 10.0, 1e30]),
    st.integers(0, 2**31),
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(gradients=gradients, rule=st.sampled_from(RULES))
def test_clip_multiplies_by_the_factor_and_returns_the_norm(gradients, rule):
    parameters = parameters_with(*gradients)
    norm = clip_grad_(parameters, 1.0, rule=rule)
    # Sums of at most 1200 squares: 300 roundings at the very most.
    assert norm.item() == pytest.approx(oracle(*gradients), rel=300 * EPS)
    factor = clip_factor(norm.item(), 1.0, rule)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert torch.equal(parameter.grad, gradient * factor)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(gradients=gradients)
def test_hard_clipping_reaches_the_threshold_and_no_more(gradients):
    parameters = parameters_with(*gradients)
    before = clip_grad_(parameters, 1.0)
    once = [p.grad.clone() for p in parameters]
    if before <= 1:  # below the threshold nothing changes, bit for bit
        assert all(torch.equal(o, g) for o, g in zip(once, gradients, strict=True))
        return
    # Norm (300 roundings), factor and product of each element: 310 units cover them, 620 clipping twice.
    assert oracle(*once) == pytest.approx(1.0, rel=310 * EPS)
    clip_grad_(parameters, 1.0)
    for parameter, gradient in zip(parameters, once, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=620 * EPS, atol=0.0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(gradients=gradients, rule=st.sampled_from(RULES), power=st.integers(-10, 10))
def test_scaling_gradient_and_threshold_scales_the_result(gradients, rule, power):
    scale = 2.0**power  # exact in floats
    small, large = parameters_with(*gradients), parameters_with(*(scale * g for g in gradients))
    clip_grad_(small, 1.0, rule=rule)
    clip_grad_(large, scale, rule=rule)
    for a, b in zip(small, large, strict=True):
        torch.testing.assert_close(b.grad, scale * a.grad, rtol=10 * EPS, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hard_rule_agrees_with_torch(dtype):
    for scale in (0.01, 1.0, 100.0):
        gradients = [
            scale * torch.randn(n, dtype=dtype, generator=torch.Generator().manual_seed(n)) for n in (3, 90)
        ]
        ours, theirs = parameters_with(*gradients), parameters_with(*gradients)
        norm = clip_grad_(ours, 1.0)
        expected = nn.utils.clip_grad_norm_(theirs, 1.0)
        # Sums of 93 squares, and then c/g instead of c/(g + 1e-6), which is smaller by less than 1e-6/g.
        assert norm.item() == pytest.approx(expected.item(), rel=100 * torch.finfo(dtype).eps)
        for a, b in zip(ours, theirs, strict=True):
            tolerance = 100 * torch.finfo(dtype).eps + (1e-6 / norm.item() if norm > 1 else 2e-6)
            torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=0.0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_extreme_gradients_stay_finite(rule, scale):
    parameters = parameters_with(torch.full((4,), scale), torch.full((200,), -scale))
    norm = clip_grad_(parameters, 0.5, rule=rule)
    assert norm.item() == pytest.approx(scale * math.sqrt(204), rel=2 * ACCURACY)
    clipped = oracle(*(p.grad for p in parameters))
    # The step length g * factor(g), with the norm's accuracy and a rounding of float32 for each product.
    assert clipped == pytest.approx(norm.item() * clip_factor(norm.item(), 0.5, rule), rel=3 * ACCURACY)


def test_gradients_are_changed_in_place_and_missing_ones_ignored():
    used, unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    used.grad = gradient = torch.tensor([3.0, 4.0])
    assert clip_grad_((p for p in [unused, used]), 1.0).item() == 5.0
    assert unused.grad is None
    assert used.grad is gradient
    torch.testing.assert_close(gradient, torch.tensor([0.6, 0.8]))
    assert clip_grad_(unused, 1.0).item() == 0.0


def test_mixed_precision_gradients():
    parameters = parameters_with(torch.tensor([3.0]).bfloat16(), torch.tensor([4.0], dtype=torch.float64))
    assert clip_grad_(parameters, 1.0).item() == 5.0
    assert parameters[0].grad.dtype == torch.bfloat16
    assert parameters[0].grad.item() == pytest.approx(0.6, rel=2**-8)  # half a unit of bfloat16
    assert parameters[1].grad.item() == pytest.approx(0.8, rel=4 * EPS)


def test_infinite_threshold_only_measures():
    parameters = parameters_with(torch.tensor([3.0, 4.0]))
    assert clip_grad_(parameters, math.inf).item() == 5.0
    assert parameters[0].grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_propagate_does_as_torch_does(bad):
    gradients = [torch.tensor([1.0, bad]), torch.tensor([2.0])]
    ours, theirs = parameters_with(*gradients), parameters_with(*gradients)
    norm = clip_grad_(ours, 1.0)
    expected = nn.utils.clip_grad_norm_(theirs, 1.0)
    np.testing.assert_array_equal(norm.numpy(), expected.numpy())
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a.grad.numpy(), b.grad.numpy())


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("rule", RULES)
def test_skip_zeroes_every_gradient(bad, rule):
    parameters = parameters_with(torch.tensor([1.0, bad]), torch.tensor([2.0]))
    assert not math.isfinite(clip_grad_(parameters, 1.0, rule=rule, nonfinite="skip").item())
    assert [p.grad.tolist() for p in parameters] == [[0.0, 0.0], [0.0]]
    parameters[0].grad[1] = bad
    if rule != "normalize":  # no threshold, so that the factor of an infinite norm is 1
        clip_grad_(parameters, math.inf, rule=rule, nonfinite="skip")
        assert parameters[0].grad.tolist() == [0.0, 0.0]


def test_raise_names_the_first_bad_gradient_and_changes_nothing():
    gradients = [
        torch.tensor([1.0]),
        torch.tensor([[1.0, 2.0], [math.nan, math.inf]]),
        torch.tensor([math.inf]),
    ]
    parameters = parameters_with(*gradients)
    with pytest.raises(RuntimeError, match=r"the gradient of parameter 1 is nan at index \(1, 0\)"):
        clip_grad_(parameters, 1.0, nonfinite="raise")
    for parameter, gradient in zip(parameters, gradients, strict=True):
        np.testing.assert_array_equal(parameter.grad.numpy(), gradient.numpy())


def test_raise_tells_overflow_of_the_norm_from_bad_elements():
    largest = torch.finfo(torch.float32).max
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(4))]
    parameters[1].grad = torch.full((4,), largest)
    with pytest.raises(
        RuntimeError, match=r"the gradient norm is inf, although every gradient here is finite"
    ):
        clip_grad_(parameters, 1.0, nonfinite="raise")


@pytest.mark.parametrize("nonfinite", NONFINITE)
def test_finite_gradients_are_clipped_under_every_policy(nonfinite):
    parameters = parameters_with(torch.tensor([3.0, 4.0], dtype=torch.float64))
    clip_grad_(parameters, 1.0, nonfinite=nonfinite)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.6, 0.8], dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": -1.0}, r"max_norm must be positive, got -1\.0"),
        ({"rule": "firm"}, "rule must be one of 'hard', 'soft', 'normalize', 'log', got 'firm'"),
        ({"scope": "layer"}, "scope must be one of 'global', 'tensor', 'unit', got 'layer'"),
        ({"nonfinite": "ignore"}, "nonfinite must be one of 'propagate', 'skip', 'raise', got 'ignore'"),
    ],
)
def test_bad_options(options, message):
    parameters = parameters_with(torch.tensor([3.0, 4.0]))
    with pytest.raises(ValueError, match=message):
        clip_grad_(parameters, **{"max_norm": 1.0, **options})
    assert parameters[0].grad.tolist() == [3.0, 4.0]
    with pytest.raises(TypeError, match="max_norm must be a number, got None of type NoneType"):
        clip_grad_(parameters, None)


def test_what_torch_does_not_refuse():
    # The differences that the documentation of clip_grad_ names, torch's side first.
    parameters = parameters_with(torch.tensor([3.0, 4.0]))
    assert nn.utils.clip_grad_norm_([], 1.0).item() == 0.0
    with pytest.raises(ValueError, match="no parameters"):
        clip_grad_(iter([]), 1.0)
    nn.utils.clip_grad_norm_(parameters, 0.0)
    assert parameters[0].grad.tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"max_norm must be positive, got 0\.0"):
        clip_grad_(parameters, 0.0)


def test_sparse_and_complex_gradients_are_refused_by_index():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(
        TypeError, match=r"the gradient of parameter 1 must be dense, got layout torch\.sparse_coo"
    ):
        clip_grad_([torch.zeros(1), embedding.weight], 1.0)
    phase = torch.zeros(2, dtype=torch.complex64, requires_grad=True)
    phase.abs().sum().backward()
    with pytest.raises(
        TypeError, match=r"parameter 0 must be real and floating-point, got dtype torch\.complex64"
    ):
        clip_grad_(phase, 1.0)


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_clip_compiles_without_graph_breaks(nonfinite):
    torch._dynamo.reset()
    compiled = torch.compile(clip_grad_, backend="eager", fullgraph=True)
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor(4.0)]
    parameters = parameters_with(*gradients)
    assert compiled(parameters, 1.0, nonfinite=nonfinite).item() == 5.0
    assert oracle(*(p.grad for p in parameters)) == pytest.approx(1.0, rel=ACCURACY)


def brock(weight, gradient, ratio):
    """Equation 3 of Brock et al. in numpy: one unit is one row, and a vector is one unit."""
    w, g = (x.detach().double().numpy().reshape(len(x) if x.ndim > 1 else 1, -1) for x in (weight, gradient))
    size = np.maximum(np.sqrt((w**2).sum(1, keepdims=True)), 1e-3)
    norm = np.sqrt((g**2).sum(1, keepdims=True))
    with np.errstate(divide="ignore"):
        clipped = np.where(norm / size > ratio, ratio * size / norm * g, g)
    return torch.from_numpy(clipped.reshape(gradient.shape))


units = st.lists(
    st.sampled_from([(), (1,), (7,), (3, 5), (2, 3, 2, 2), (130, 2), (2, 300)]), min_size=1, max_size=4
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shapes=units,
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-30, 0.02, 1.0, 1e30]),
    ratio=st.sampled_from([0.01, 1.0]),
)
def test_unit_scope_is_adaptive_gradient_clipping(shapes, seed, scale, ratio):
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]
    with torch.no_grad():
        parameters[0].mul_(1e-6)  # below the 1e-3 that every unit is taken to have
    for p in parameters:
        p.grad = scale * torch.randn(p.shape, dtype=torch.float64, generator=generator)
    expected = [brock(p, p.grad, ratio) for p in parameters]
    assert clip_grad_(parameters, ratio, scope="unit").item() >= 0
    for p, e in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, e, rtol=320 * EPS, atol=0.0)  # sums of at most 300 squares
    once = [p.grad.clone() for p in parameters]
    clip_grad_(parameters, ratio, scope="unit")
    for p, o in zip(parameters, once, strict=True):  # idempotent
        torch.testing.assert_close(p.grad, o, rtol=320 * EPS, atol=0.0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(gradients=gradients, rule=st.sampled_from(RULES))
def test_tensor_scope_clips_each_as_if_alone(gradients, rule):
    together, alone = parameters_with(*gradients), parameters_with(*gradients)
    norm = clip_grad_(together, 1.0, rule=rule, scope="tensor")
    assert norm.item() == pytest.approx(oracle(*gradients), rel=300 * EPS)
    for p in alone:
        clip_grad_(p, 1.0, rule=rule)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=2 * EPS, atol=0.0)
        if rule != "normalize":
            assert oracle(a.grad) <= 1 + 310 * EPS


@pytest.mark.parametrize("scope", ["tensor", "unit"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_scopes_keep_dtype_and_hold_the_threshold(scope, dtype):
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(40, 50, generator=generator).to(dtype).requires_grad_() for _ in range(2)]
    for p in parameters:
        p.grad = torch.randn(40, 50, generator=generator).to(dtype)
    clip_grad_(parameters, 0.5, scope=scope)
    for p in parameters:
        assert p.grad.dtype == dtype
        lengths = p.grad.double().norm(dim=1) if scope == "unit" else p.grad.double().norm()
        limits = 0.5 * (p.detach().double().norm(dim=1) if scope == "unit" else 1.0)
        # The norm within 1e-6 and the rounding of each element by half a unit of its dtype.
        torch.testing.assert_close(
            lengths / limits, torch.ones_like(lengths), rtol=1e-6 + torch.finfo(dtype).eps / 2, atol=0.0
        )


@pytest.mark.parametrize("scope", ["tensor", "unit"])
def test_other_scopes_survive_extreme_float32(scope):
    for scale in (1e-30, 1e-25, 1e25, 1e30):
        p = torch.ones(3, 200, requires_grad=True)
        p.grad = torch.full((3, 200), scale)
        clip_grad_(p, 0.5, scope=scope)
        limit = 0.5 * math.sqrt(200) if scope == "unit" else 0.5
        size = math.sqrt(200) if scope == "unit" else math.sqrt(600)
        expected = min(scale, limit / size)
        torch.testing.assert_close(p.grad, torch.full_like(p.grad, expected), rtol=ACCURACY, atol=0.0)


def test_a_policy_gives_the_threshold_and_sees_the_norm():
    seen = []

    def half(norm):
        seen.append(norm.item())
        return norm / 2

    parameters = parameters_with(torch.tensor([3.0, 4.0], dtype=torch.float64))
    assert clip_grad_(parameters, half).item() == 5.0
    assert seen == [5.0]
    assert parameters[0].grad.tolist() == [1.5, 2.0]
    with pytest.raises(ValueError, match="scope='unit' needs a number"):
        clip_grad_(parameters, half, scope="unit")
