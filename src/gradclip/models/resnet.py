"""The residual networks for small images of He, Zhang, Ren and Sun (2016), with and without batch norm."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu, softplus
from torch.nn.utils import skip_init


class ResNet(nn.Module):
    """Residual network of 6n + 2 layers: convolution, three stages of n blocks, average pooling, classifier.

    A block is ::

        y = relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))

    with 3x3 convolutions. The first block of the second and of the third stage halves the image and doubles
    the channels; its shortcut takes every second pixel and adds channels of zeros (option A of the paper), so
    no shortcut has parameters.

    Convolutions start from the normal distribution with variance 2 / fan-in (He et al., 2015), the classifier
    with variance 1 / fan-in, because no ReLU follows it; batch norm starts at scale 1, and all biases at 0.
    Without batch norm convolutions have biases, and the second one of each block starts smaller by the factor
    1/√(3n): variances of independent branches add up, so the signal would double at every block; with the
    factor it grows by no more than (1 + 1/(3n))^(3n) < e over all of them. Numbers are drawn on the CPU, so a
    seed gives the same start on every device.

    Args:
        classes: Number of classes.
        blocks: Blocks per stage n; 3 makes ResNet-20, 5 ResNet-32, 9 ResNet-56.
        width: Channels of the first stage; the others have 2 and 4 times as many.
        channels: Channels of the images.
        batch_norm: Whether every convolution is followed by batch norm.
        sharpness: Of the activation; see :class:`Activation`. Infinite, as in the paper, is ReLU.
        generator: CPU generator of the initial weights; torch's global one by default.

    Raises:
        ValueError: A size is less than 1.

    References:
        He, Zhang, Ren and Sun, "Deep residual learning for image recognition", CVPR 2016, section 4.2; the
        same authors, "Delving deep into rectifiers", ICCV 2015, equation 10.

    >>> model = ResNet()
    >>> sum(p.numel() for p in model.parameters())
    269722
    """

    def __init__(
        self,
        classes: int = 10,
        *,
        blocks: int = 3,
        width: int = 16,
        channels: int = 3,
        batch_norm: bool = True,
        sharpness: float = math.inf,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = {"classes": classes, "blocks": blocks, "width": width, "channels": channels}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.activation = Activation(sharpness)
        self.stem = _Convolution(channels, width, batch_norm=batch_norm, generator=generator)
        branch_scale = 1.0 if batch_norm else 1 / math.sqrt(3 * blocks)
        self.blocks = nn.Sequential()
        before = width
        for stage in range(3):
            after = width * 2**stage
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                self.blocks.append(
                    _Block(before, after, stride, batch_norm, branch_scale, self.activation, generator)
                )
                before = after
        self.classifier = skip_init(nn.Linear, before, classes)
        nn.init.normal_(self.classifier.weight, std=1 / math.sqrt(before), generator=generator)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, classes) from images of shape (batch, channels, height, width)."""
        return self.classifier(self.blocks(self.activation(self.stem(images))).mean((2, 3)))


class Activation(nn.Module):
    """ReLU, or a smooth function close to it.

    With β the sharpness, ln(1 + exp(β z)) / β, the softplus function. It is above max(0, z) by at most
    ln 2 / β, at z = 0, and its second derivative is at most β / 4. As β → ∞ it becomes max(0, z), whose first
    derivative jumps at 0. One object serves the whole network, so that a hook on it sees every unit.

    Args:
        sharpness: β. Where β z > 20 the function is z to within 1e-9 / β, and torch computes z.

    Raises:
        ValueError: ``sharpness`` is not positive.
    """

    def __init__(self, sharpness: float = math.inf) -> None:
        super().__init__()
        if not sharpness > 0:
            raise ValueError(f"sharpness must be positive, got {sharpness}")
        self.sharpness = sharpness

    def forward(self, z: Tensor) -> Tensor:
        """The function of every element."""
        return relu(z) if math.isinf(self.sharpness) else softplus(z, self.sharpness)


class _Convolution(nn.Sequential):
    """3x3 convolution that keeps the size of the image up to the stride, and batch norm if asked for."""

    def __init__(
        self,
        before: int,
        after: int,
        *,
        stride: int = 1,
        batch_norm: bool,
        scale: float = 1.0,
        generator: torch.Generator | None,
    ) -> None:
        # Built without initial values: nn.Conv2d would draw them from the global generator.
        convolution = skip_init(nn.Conv2d, before, after, 3, stride=stride, padding=1, bias=not batch_norm)
        nn.init.normal_(convolution.weight, std=scale * math.sqrt(2 / (9 * before)), generator=generator)
        if batch_norm:
            super().__init__(convolution, nn.BatchNorm2d(after))
        else:
            nn.init.zeros_(convolution.bias)
            super().__init__(convolution)


class _Block(nn.Module):
    def __init__(
        self,
        before: int,
        after: int,
        stride: int,
        batch_norm: bool,
        scale: float,
        activation: "Activation",
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.first = _Convolution(before, after, stride=stride, batch_norm=batch_norm, generator=generator)
        self.second = _Convolution(after, after, batch_norm=batch_norm, scale=scale, generator=generator)
        self.stride = stride
        self.new_channels = after - before

    def forward(self, x: Tensor) -> Tensor:
        branch = self.second(self.activation(self.first(x)))
        if self.stride > 1:
            x = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return self.activation(x + branch)
