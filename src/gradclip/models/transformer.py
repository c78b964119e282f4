"""A small decoder-only transformer for text by characters, which can be differentiated twice."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, gelu, linear
from torch.nn.utils import skip_init


class CharacterModel(nn.Module):
    """Pre-norm decoder with learned positions, causal attention and a decoder that shares the embedding.

    ::

        x_t = E[w_t] + P[t]
        x = x + A(norm(x)),   x = x + B gelu(C norm(x) + c) + b       in every layer
        logits_t = E norm(x_t) + e

    Attention A has H heads of width D = width / H, each with queries, keys and values q, k, v, linear in its
    input; the heads side by side pass through one more matrix. In each head ::

        y_t = Σ_{s ≤ t} softmax_s(q_t · k_s / √D) v_s

    It is written out, not left to torch's ``scaled_dot_product_attention``: the fused kernels have no second
    derivative, which a Hessian-vector product needs. There is no dropout, so that a measured gradient
    difference is due to the weights alone.

    E and P are normal with deviation 0.1. A matrix with n columns is normal with variance 1/n, and those that
    end in the sum, two per layer, are smaller by the factor 1/√(2 layers), as in GPT-2, so that the sum does
    not grow with the depth. Norms start at scale 1, biases at 0. Numbers are drawn on the CPU, so a seed
    gives the same start on every device.

    Args:
        vocabulary: Number of characters V.
        width: Width of the embedding and of every layer.
        heads: Attention heads H.
        layers: Number of layers.
        context: Longest text that is read at once, in characters.
        generator: CPU generator of the initial weights; torch's global one by default.

    Raises:
        ValueError: A size is less than 1, or the width is not a multiple of the heads.

    References:
        Vaswani et al., "Attention is all you need", NeurIPS 2017; Radford et al., "Language models are
        unsupervised multitask learners", 2019 (norms before the layers, the scale of the residual matrices).

    >>> model = CharacterModel(100, width=32, heads=2, layers=2, context=64)
    >>> sum(p.numel() for p in model.parameters())  # 12 width² + 13 width per layer
    30820
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        width: int = 64,
        heads: int = 4,
        layers: int = 2,
        context: int = 64,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "vocabulary": vocabulary,
            "width": width,
            "heads": heads,
            "layers": layers,
            "context": context,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if width % heads:
            raise ValueError(f"width must be a multiple of heads={heads}, got {width}")
        self.embedding = nn.Parameter(torch.empty(vocabulary, width))
        self.positions = nn.Parameter(torch.empty(context, width))
        for table in (self.embedding, self.positions):
            nn.init.normal_(table, std=0.1, generator=generator)
        self.layers = nn.ModuleList(
            _Layer(width, heads, 1 / math.sqrt(2 * layers), generator) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, characters: Tensor) -> Tensor:
        """Logits of the next character.

        Args:
            characters: Numbers of characters, shape (time, batch).

        Returns:
            Logits, shape (time, batch, vocabulary).

        Raises:
            ValueError: The text is longer than the context.
        """
        length, context = len(characters), len(self.positions)
        if length > context:
            raise ValueError(f"at most context={context} characters are read at once, got {length}")
        x = embedding(characters.t(), self.embedding) + self.positions[:length]
        for layer in self.layers:
            x = layer(x)
        return linear(self.norm(x), self.embedding, self.bias).transpose(0, 1)

    def loss(self, characters: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy per character in nats; both arguments have the shape (time, batch)."""
        return cross_entropy(self(characters).flatten(0, 1), targets.flatten())


class _Layer(nn.Module):
    def __init__(
        self, width: int, heads: int, residual_scale: float, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.queries_keys_values = _linear(width, 3 * width, 1.0, generator)
        self.heads_out = _linear(width, width, residual_scale, generator)
        self.before_hidden = nn.LayerNorm(width)
        self.hidden = _linear(width, 4 * width, 1.0, generator)
        self.out = _linear(4 * width, width, residual_scale, generator)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.heads_out(self._attend(self.before_attention(x)))
        return x + self.out(gelu(self.hidden(self.before_hidden(x))))

    def _attend(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.queries_keys_values(x).view(batch, length, 3, self.heads, width // self.heads)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        scores = queries @ keys.transpose(-1, -2) / math.sqrt(width // self.heads)
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        attention = scores.masked_fill(future, -math.inf).softmax(-1)
        return (attention @ values).transpose(1, 2).reshape(batch, length, width)


def _linear(columns: int, rows: int, scale: float, generator: torch.Generator | None) -> nn.Linear:
    # Built without initial values: nn.Linear would draw them from the global generator.
    layer = skip_init(nn.Linear, columns, rows)
    nn.init.normal_(layer.weight, std=scale / math.sqrt(columns), generator=generator)
    nn.init.zeros_(layer.bias)
    return layer
