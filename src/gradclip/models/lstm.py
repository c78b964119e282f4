"""The word-level language model of the 2020 paper's released code: an LSTM with a tied decoder."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

State = list[tuple[Tensor, Tensor]]


class LanguageModel(nn.Module):
    """Embedding, LSTM layers, and a decoder that shares the embedding's weights.

    ::

        x_t = E[w_t],   h_t = LSTM_n(... LSTM_1(x_t)),   logits_t = E h_t + b

    Tying needs h_t to have as many units as the embedding, so the last layer has ``embedding`` units and the
    others have ``hidden``. There is no dropout: the released code sets every dropout to zero, and a measured
    gradient difference is then due to the weights alone.

    The embedding is uniform on ±0.1 and the decoder's bias is zero, as usual in language models; the weights
    and biases of a layer with H units are uniform on ±1/√H, torch's default. Numbers are drawn on the CPU, so
    a seed gives the same start on every device.

    Args:
        vocabulary: Number of words V.
        embedding: Width of the embedding and of the last layer.
        hidden: Units of the other layers.
        layers: Number of LSTM layers.
        generator: CPU generator of the initial weights; torch's global one by default.

    Raises:
        ValueError: A size is less than 1.

    References:
        Zhang, He, Sra and Jadbabaie (ICLR 2020), released code. With its defaults (V = 10,000, embedding 200,
        hidden 512, 2 layers) the model has 4,043,472 parameters.

    >>> model = LanguageModel(10_000)
    >>> sum(p.numel() for p in model.parameters())
    4043472
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        embedding: int = 200,
        hidden: int = 512,
        layers: int = 2,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = {"vocabulary": vocabulary, "embedding": embedding, "hidden": hidden, "layers": layers}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        widths = [embedding, *[hidden] * (layers - 1), embedding]
        self.embedding = nn.Parameter(torch.empty(vocabulary, embedding))
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        nn.init.uniform_(self.embedding, -0.1, 0.1, generator=generator)
        self.layers = nn.ModuleList()
        for width, units in pairwise(widths):
            # Built without storage first: nn.LSTM would fill its weights from the global generator.
            layer = nn.LSTM(width, units, device="meta").to_empty(device="cpu")
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -1 / math.sqrt(units), 1 / math.sqrt(units), generator=generator)
            self.layers.append(layer)

    def initial_state(self, batch: int) -> State:
        """Zeros: one pair of hidden and cell state per layer, each of shape (1, batch, units)."""
        return [
            (
                self.bias.new_zeros(1, batch, layer.hidden_size),
                self.bias.new_zeros(1, batch, layer.hidden_size),
            )
            for layer in self.layers
        ]

    def forward(self, words: Tensor, state: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, State]:
        """Logits of the next word.

        Args:
            words: Word numbers, shape (time, batch).
            state: State before the first word.

        Returns:
            Logits, shape (time, batch, vocabulary), and the state after the last word, still in the graph.
        """
        outputs, after = self.outputs(words, state)
        return linear(outputs, self.embedding, self.bias), after

    def outputs(self, words: Tensor, state: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, State]:
        """Outputs of the last layer, shape (time, batch, embedding), and the state as :meth:`forward`."""
        x = nn.functional.embedding(words, self.embedding)
        after: State = []
        for layer, before in zip(self.layers, state, strict=True):
            x, last = layer(x, before)
            after.append(last)
        return x, after

    def loss(
        self, words: Tensor, targets: Tensor, state: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, State]:
        """Mean cross entropy per word in nats, and the state after the last word, cut from the graph."""
        logits, after = self(words, state)
        value = cross_entropy(logits.flatten(0, 1), targets.flatten())
        return value, [(h.detach(), c.detach()) for h, c in after]
