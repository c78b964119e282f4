"""The AWD-LSTM of Merity, Keskar and Socher: an LSTM language model with every weight and word at risk."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, linear
from torch.optim.swa_utils import AveragedModel

from gradclip.models.lstm import LanguageModel, State


@dataclass(frozen=True)
class Masks:
    """One draw of everything that is dropped; kept elements are 1/(1 - p), dropped ones 0.

    Args:
        words: Shape (vocabulary, 1): whole words, for the embedding. The decoder keeps them.
        inputs: Shape (1, batch, embedding), the same for all times.
        between: Shape (1, batch, hidden), one behind each layer but the last.
        outputs: Shape (1, batch, embedding), behind the last layer.
        recurrent: One of the shape of each layer's hidden-to-hidden weights, the same for all times.
    """

    words: Tensor
    inputs: Tensor
    between: tuple[Tensor, ...]
    outputs: Tensor
    recurrent: tuple[Tensor, ...]

    def streams(self, first: int, count: int) -> "Masks":
        """The masks of some of the streams alone, with all words and weights."""
        inputs, outputs, *between = (
            mask.narrow(1, first, count) for mask in (self.inputs, self.outputs, *self.between)
        )
        return Masks(self.words, inputs, tuple(between), outputs, self.recurrent)


class AWDLSTM(LanguageModel):
    """:class:`.LanguageModel` with the regularisation of Merity et al.

    With masks m (p the probability of dropping)::

        x = m_in · (m_word · E)[w_t]                     word dropout, then locked dropout
        h¹ = LSTM_1(x),  hⁿ = LSTM_n(m_n · hⁿ⁻¹)         with m · W_hh in the place of W_hh: weight drop
        y = m_out · h
        loss = cross entropy(E y + b) + α mean(y²) + β mean((h_t - h_{t-1})²)

    α is called AR and β TAR. A locked mask is the same at all times. Masks are arguments: the same masks give
    the same objective, as often as it is evaluated, and ``loss`` is the objective without any.

    Second derivatives: cuDNN's LSTM has none. ``gradclip.smoothness`` runs recurrent layers without cuDNN
    and oneDNN where it needs them; elsewhere, do the same by ``torch.backends.cudnn.flags(enabled=False)``.
    The recurrent weights are new tensors at every call, which cuDNN copies into one piece first.

    Args:
        vocabulary: Number of words V.
        embedding: Width of the embedding and of the last layer.
        hidden: Units of the other layers.
        layers: Number of LSTM layers.
        word_dropout: p of words.
        input_dropout: p of the embedding's outputs.
        hidden_dropout: p between layers.
        output_dropout: p behind the last layer.
        weight_dropout: p of hidden-to-hidden weights.
        activation: α.
        slowness: β.
        generator: CPU generator of the initial weights; torch's global one by default.

    Raises:
        ValueError: A size is less than 1, a probability is not in [0, 1), or α or β is negative.

    References:
        Merity, Keskar and Socher, "Regularizing and optimizing LSTM language models", ICLR 2018. Sizes,
        dropouts, α and β are its settings for the Penn Treebank, as recalled.

    >>> model = AWDLSTM(10_000)
    >>> sum(p.numel() for p in model.parameters())
    24221600
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        embedding: int = 400,
        hidden: int = 1150,
        layers: int = 3,
        word_dropout: float = 0.1,
        input_dropout: float = 0.4,
        hidden_dropout: float = 0.3,
        output_dropout: float = 0.4,
        weight_dropout: float = 0.5,
        activation: float = 2.0,
        slowness: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(vocabulary, embedding=embedding, hidden=hidden, layers=layers, generator=generator)
        self.dropouts = {
            "word_dropout": word_dropout,
            "input_dropout": input_dropout,
            "hidden_dropout": hidden_dropout,
            "output_dropout": output_dropout,
            "weight_dropout": weight_dropout,
        }
        for name, p in self.dropouts.items():
            if not 0.0 <= p < 1.0:
                raise ValueError(f"{name} must be at least 0 and below 1, got {p}")
        for name, weight in (("activation", activation), ("slowness", slowness)):
            if not weight >= 0.0:
                raise ValueError(f"{name} must not be negative, got {weight}")
        self.activation, self.slowness = activation, slowness

    def masks(self, batch: int, generator: torch.Generator) -> Masks:
        """Draw masks for ``batch`` streams.

        Args:
            batch: Number of streams.
            generator: Where the numbers come from. They are drawn on its device: a CPU generator gives the
                same masks on every device, one of the model's device is faster for a large model.
        """

        def draw(name: str, *shape: int) -> Tensor:
            kept = 1.0 - self.dropouts[name]
            mask = torch.empty(shape, dtype=self.bias.dtype, device=generator.device)
            return (mask.bernoulli_(kept, generator=generator) / kept).to(self.bias.device)

        vocabulary, width = self.embedding.shape
        return Masks(
            words=draw("word_dropout", vocabulary, 1),
            inputs=draw("input_dropout", 1, batch, width),
            between=tuple(draw("hidden_dropout", 1, batch, layer.hidden_size) for layer in self.layers[:-1]),
            outputs=draw("output_dropout", 1, batch, width),
            recurrent=tuple(draw("weight_dropout", *layer.weight_hh_l0.shape) for layer in self.layers),
        )

    def training_loss(
        self,
        words: Tensor,
        targets: Tensor,
        state: Sequence[tuple[Tensor, Tensor]],
        masks: Masks,
    ) -> tuple[Tensor, State]:
        """The regularised loss, in nats per word, and the state after the last word, cut from the graph.

        Args:
            words: Word numbers, shape (time, batch).
            targets: The words that come next, of the same shape.
            state: State before the first word.
            masks: From :meth:`masks`, for as many streams.

        Raises:
            ValueError: The masks are for another number of streams.
        """
        if masks.inputs.shape[1] != words.shape[1]:
            raise ValueError(f"masks are for {masks.inputs.shape[1]} streams, got {words.shape[1]}")
        x = embedding(words, self.embedding * masks.words) * masks.inputs
        after: State = []
        for n, (layer, before) in enumerate(zip(self.layers, state, strict=True)):
            if n:
                x = x * masks.between[n - 1]
            weights = [
                layer.weight_ih_l0,
                layer.weight_hh_l0 * masks.recurrent[n],
                layer.bias_ih_l0,
                layer.bias_hh_l0,
            ]
            # The function behind nn.LSTM, which keeps its weights to itself: with biases, one layer, no
            # dropout of its own, one direction, time first.
            x, h, c = torch.lstm(x, before, weights, True, 1, 0.0, True, False, False)
            after.append((h.detach(), c.detach()))
        y = x * masks.outputs
        logits = linear(y, self.embedding, self.bias)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten()) + self.activation * y.square().mean()
        if len(x) > 1:
            loss = loss + self.slowness * x.diff(dim=0).square().mean()
        return loss, after


class NonMonotoneAverage:
    """When to start averaging the iterates of SGD, and their average: NT-ASGD.

    A validation loss v is handed in now and then. With ℓ the ones before it, averaging starts as soon as

        v > min(ℓ without its last n)

    and goes on from there: the average after m further steps is (1/m) Σ x_k, in ``average``.

    Args:
        model: What is trained; copied.
        patience: n.

    Raises:
        ValueError: ``patience`` is less than 1.

    References:
        Merity, Keskar and Socher, "Regularizing and optimizing LSTM language models", ICLR 2018, Algorithm 1.
    """

    def __init__(self, model: nn.Module, *, patience: int = 5) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        self.patience = patience
        self.losses: list[float] = []
        self.averaging = False
        self.average = AveragedModel(model)

    def after_step(self, model: nn.Module) -> None:
        """Add the iterate to the average, once averaging has started."""
        if self.averaging:
            self.average.update_parameters(model)

    def after_validation(self, loss: float) -> bool:
        """Take note of a validation loss; says whether averaging has started by now."""
        earlier = self.losses[: -self.patience]
        self.averaging = self.averaging or (bool(earlier) and loss > min(earlier))
        self.losses.append(loss)
        return self.averaging

    @property
    def steps(self) -> int:
        """How many iterates the average has."""
        return int(self.average.n_averaged)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Lend the average to ``model``, which gets its own parameters back; nothing without an average."""
        if not self.steps:
            yield
            return
        params, averages = list(model.parameters()), list(self.average.module.parameters())
        saved = [p.detach().clone() for p in params]
        try:
            _copy(averages, params)
            yield
        finally:
            _copy(saved, params)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        state = {"losses": list(self.losses), "averaging": self.averaging, "steps": self.steps}
        return state | {"average": self.average.module.state_dict() if self.steps else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put a state back."""
        self.losses, self.averaging = list(state["losses"]), state["averaging"]
        self.average.n_averaged.fill_(state["steps"])
        if state["average"] is not None:
            self.average.module.load_state_dict(state["average"])


@torch.no_grad()
def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
