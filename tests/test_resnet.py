"""`models.resnet.ResNet`: the paper's layers, shortcuts without parameters, a start that keeps the scale."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, batch_norm, conv2d

from gradclip.models.resnet import Activation, ResNet


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make(seed=0, **changes):
    return ResNet(generator=generator(seed), **changes)


def images(batch=4, channels=3, size=32, seed=1):
    return torch.randn(batch, channels, size, size, generator=generator(seed))


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_resnet20_has_the_parameters_counted_by_hand():
    # Convolutions without bias, and scale and shift of batch norm after each.
    stem = 3 * 16 * 9 + 2 * 16
    first = 6 * (16 * 16 * 9 + 2 * 16)
    second = 16 * 32 * 9 + 2 * 32 + 5 * (32 * 32 * 9 + 2 * 32)
    third = 32 * 64 * 9 + 2 * 64 + 5 * (64 * 64 * 9 + 2 * 64)
    assert count(make()) == stem + first + second + third + 64 * 10 + 10 == 269_722


# The paper's table 6 gives 0.27, 0.46, 0.66 and 0.85 million for these depths.
@pytest.mark.parametrize(("blocks", "millions"), [(3, 0.27), (5, 0.46), (7, 0.66), (9, 0.85)])
def test_depth_and_size_are_those_of_the_paper(blocks, millions):
    model = make(blocks=blocks)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 6 * blocks + 2
    assert round(count(model) / 1e6, 2) == millions


def test_without_batch_norm_a_bias_takes_the_place_of_scale_and_shift():
    plain, normal = make(batch_norm=False), make()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    channels = 16 + 6 * (16 + 32 + 64)
    assert count(plain) == count(normal) - channels
    assert not list(plain.buffers())


def test_logits_are_those_of_the_paper_written_out():
    # Independent: functional operations, shortcuts by average pooling of size 1 and concatenation.
    model = make(blocks=2, width=4, channels=1, classes=5).double()
    x = images(channels=1, size=16).double()
    values = list(model.parameters())

    def layer(x, stride=1):
        weight, scale, shift = values.pop(0), values.pop(0), values.pop(0)
        return batch_norm(
            conv2d(x, weight, stride=stride, padding=1), None, None, scale, shift, training=True
        )

    y = layer(x).relu()
    for stage in range(3):
        for block in range(2):
            stride = 2 if stage and not block else 1
            branch = layer(layer(y, stride).relu())
            shortcut = avg_pool2d(y, 1, stride)
            zeros = torch.zeros_like(branch[:, shortcut.shape[1] :])
            y = (torch.cat([shortcut, zeros], 1) + branch).relu()
    weight, bias = values
    expected = y.flatten(2).mean(2) @ weight.T + bias
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)  # sums of some hundred terms of size 1


def test_stages_halve_the_image_and_double_the_channels():
    shapes = []
    model = make(blocks=1, width=8, channels=1, classes=7)
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    assert model(images(channels=1, size=28)).shape == (4, 7)
    assert shapes == [(8, 28, 28), (16, 14, 14), (32, 7, 7)]


@pytest.mark.parametrize("norm", [True, False])
def test_the_start_has_the_documented_variances(norm):
    blocks = 3
    model = make(blocks=blocks, batch_norm=norm)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for index, convolution in enumerate(convolutions):
        weight = convolution.weight
        variance = 2 / weight[0].numel()
        if not norm and index > 0 and index % 2 == 0:  # the second of its block
            variance /= 3 * blocks
        # The empirical variance of n normal numbers is off by a factor 1 ± √(2/n): five of these.
        assert weight.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / weight.numel()))
        assert (convolution.bias is None) == norm
        assert norm or not convolution.bias.any()
    assert model.classifier.weight.var().item() == pytest.approx(1 / 64, rel=5 * math.sqrt(2 / 640))
    assert not model.classifier.bias.any()


@pytest.mark.parametrize("blocks", [1, 3, 9])
def test_without_batch_norm_the_signal_neither_dies_nor_grows_with_depth(blocks):
    model = make(blocks=blocks, batch_norm=False)
    squares = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: squares.append(output.square().sum()))
    x = images(batch=2)
    start = model.stem(x).relu().square().sum()
    model(x)
    # Per pixel at most e times the start, and over a whole stage a factor of 4 fewer pixels; unscaled, the
    # squares would double at every block, up to 2^27.
    assert max(squares) < 2 * math.e * start
    assert min(squares) > start / 64


def test_the_start_depends_on_the_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make(seed=5, blocks=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, third = make(seed=5, blocks=1), make(seed=6, blocks=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.classifier.weight, third.classifier.weight)


@pytest.mark.parametrize("norm", [True, False])
def test_every_parameter_gets_a_gradient(norm):
    model = make(blocks=1, width=4, batch_norm=norm)
    nn.functional.cross_entropy(model(images(size=16)), torch.arange(4)).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", ["classes", "blocks", "width", "channels"])
def test_sizes_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        ResNet(**{name: 0})


@pytest.mark.parametrize("sharpness", [0.5, 4.0, 64.0])
def test_the_smooth_activation_is_softplus_and_keeps_its_distance_from_relu(sharpness):
    z = torch.linspace(-3, 3, 601, dtype=torch.float64, requires_grad=True)
    value = Activation(sharpness)(z)
    # Independent: logaddexp. Beyond β z = 20 torch takes z itself, which is off by e⁻²⁰/β < 2.1e-9/β.
    expected = torch.logaddexp(torch.zeros_like(z), sharpness * z) / sharpness
    torch.testing.assert_close(value, expected, rtol=0, atol=2.1e-9 / sharpness)
    gap = value - z.relu()
    assert gap.min() >= -1e-15
    assert gap.max().item() == pytest.approx(math.log(2) / sharpness, rel=1e-12)
    assert gap.argmax() == 300  # at z = 0
    (slope,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), z)
    assert curvature.max().item() == pytest.approx(sharpness / 4, rel=1e-9)


def test_an_infinitely_sharp_activation_is_relu_and_a_sharp_one_is_close():
    x = images(batch=2, size=8)
    exact = make(blocks=1, width=4)(x)
    gaps = [(make(blocks=1, width=4, sharpness=b)(x) - exact).abs().max().item() for b in (10, 100, 1000)]
    # Each unit is off by ln 2 / β at most, and by far less once 1/β is below its distance from zero.
    assert gaps[0] > 10 * gaps[1] > 100 * gaps[2] > 0
    assert torch.equal(make(blocks=1, width=4, sharpness=math.inf)(x), exact)


def test_one_activation_serves_the_whole_network():
    model, seen = make(blocks=2, width=4), []
    model.activation.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model(images(size=8))
    assert len(seen) == 1 + 2 * 6  # after the stem, and twice in each of six blocks
    model.activation.sharpness = 8.0
    assert torch.equal(model(images(size=8)), make(blocks=2, width=4, sharpness=8.0)(images(size=8)))


@pytest.mark.parametrize("sharpness", [0.0, -1.0, math.nan])
def test_sharpness_is_checked(sharpness):
    with pytest.raises(ValueError, match=f"sharpness must be positive, got {sharpness}"):
        ResNet(sharpness=sharpness)
