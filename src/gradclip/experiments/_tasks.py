"""What the experiments train: a network, its batches in a fixed order, and how well it does.

All runs of a task read the same batches in the same order, whatever their seed: the seed decides the initial
weights alone, so that methods can be compared seed by seed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradclip import parallel
from gradclip.data import images, text
from gradclip.models.lstm import LanguageModel
from gradclip.models.resnet import ResNet
from gradclip.models.transformer import CharacterModel

CORPORA = {"reference-manual": text.reference_manual, "penn-treebank": text.penn_treebank}
CHARACTER_CORPORA = {
    "reference-manual": text.reference_manual_characters,
    "penn-treebank": text.penn_treebank_characters,
}
IMAGE_SETS = {"digits": images.digits, "cifar10": images.cifar10}
EVALUATION_BATCH = 10  # streams of validation text
_EVALUATION_BPTT = 35
_EVALUATION_IMAGES = 500  # at a time
_EVALUATION_CHARACTERS = 20_000  # a standard error of 1 % of the loss
_EVALUATION_STREAMS = 20  # of characters

State = Any  # what a batch leaves for the next one: the LSTM's hidden state, or None


class Task(Protocol):
    """What can be trained.

    Attributes:
        guess: Loss of guessing uniformly, in nats.
        sha256: Hash of the data.
    """

    guess: float
    sha256: str

    def model(self, seed: int) -> nn.Module:
        """The network with the initial weights of a seed, on the task's device, in training mode."""

    def start(self) -> State:
        """The state before the first batch."""

    def loss(self, model: nn.Module, k: int, state: State) -> tuple[Tensor, State]:
        """Loss of batch k, in nats, and the state after it, cut from the graph.

        A function of the parameters, k and the state alone: the same batch and the same augmentation at every
        call. Batch norm's running statistics change, as in any call of a network in training mode.
        """

    def fixed(self, model: nn.Module) -> Tensor:
        """Loss of one fixed batch that is not trained on."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``valid``, the validation loss in nats, and what else the task has, as ``accuracy``."""


@dataclass(frozen=True)
class Language:
    """The word-level LSTM on a text, with truncated backpropagation through time.

    Of several processes (:mod:`gradclip.parallel`) each reads its share of the streams, and losses are means
    over all.

    Args:
        corpus: A key of ``CORPORA``.
        embedding: Width of the embedding and of the last LSTM layer.
        hidden: Units of the other LSTM layers.
        layers: LSTM layers.
        batch: Streams of text side by side.
        bptt: Words per stream and step.
        device: ``"cpu"`` or ``"cuda"``.
    """

    corpus: str
    embedding: int
    hidden: int
    layers: int
    batch: int
    bptt: int
    device: str = "cpu"

    @functools.cached_property
    def text(self) -> text.Corpus:
        """The corpus, read when it is first needed."""
        return CORPORA[self.corpus]()

    @property
    def sha256(self) -> str:
        """Hash of the text."""
        return self.text.sha256

    @property
    def guess(self) -> float:
        """ln V."""
        return math.log(len(self.text.vocabulary))

    @functools.cached_property
    def segments(self) -> list[tuple[Tensor, Tensor]]:
        """The batches of training text, words and the words that follow."""
        return self._segments(self.text.train)

    @functools.cached_property
    def _fixed(self) -> tuple[Tensor, Tensor]:
        return self._segments(self.text.valid)[0]

    def _segments(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        streams = text.batchify(tokens.to(self.device), self.batch)
        return text.segments(parallel.own(streams, 1), self.bptt)

    _network = LanguageModel

    def model(self, seed: int) -> LanguageModel:
        """See :class:`Task`."""
        return self._network(
            len(self.text.vocabulary),
            embedding=self.embedding,
            hidden=self.hidden,
            layers=self.layers,
            generator=torch.Generator().manual_seed(seed),
        ).to(self.device)

    def start(self) -> State:
        """None: a model makes its own zeros."""
        return None

    def loss(self, model: LanguageModel, k: int, state: State) -> tuple[Tensor, State]:
        """See :class:`Task`; the state is reset where the text begins anew."""
        position = k % len(self.segments)
        words, targets = self.segments[position]
        if state is None or position == 0:
            state = model.initial_state(words.shape[1])
        value, after = self._value(model, k, words, targets, state)
        return parallel.mean(value), after

    def _value(
        self, model: LanguageModel, k: int, words: Tensor, targets: Tensor, state: State
    ) -> tuple[Tensor, State]:
        return model.loss(words, targets, state)

    def fixed(self, model: LanguageModel) -> Tensor:
        """The first segment of the validation text."""
        words, targets = self._fixed
        return parallel.mean(model.loss(words, targets, model.initial_state(words.shape[1]))[0])

    @torch.no_grad()
    def evaluate(self, model: LanguageModel) -> dict[str, float]:
        """Mean loss over the validation text, hidden state carried from segment to segment."""
        streams = text.batchify(self.text.valid.to(self.device), EVALUATION_BATCH)
        state, losses = model.initial_state(EVALUATION_BATCH), []
        for words, targets in text.segments(streams, _EVALUATION_BPTT):
            loss, state = model.loss(words, targets, state)
            losses.append(loss.item())
        return {"valid": sum(losses) / len(losses)}


@dataclass(frozen=True)
class Characters:
    """The transformer on a text by characters.

    Args:
        corpus: A key of ``CHARACTER_CORPORA``.
        width: Width of the network.
        heads: Attention heads.
        layers: Layers.
        context: Characters per stream and step.
        batch: Streams of text side by side.
        device: ``"cpu"`` or ``"cuda"``.
    """

    corpus: str
    width: int
    heads: int
    layers: int
    context: int
    batch: int
    device: str = "cpu"

    @functools.cached_property
    def text(self) -> text.Corpus:
        """The corpus, read when it is first needed."""
        return CHARACTER_CORPORA[self.corpus]()

    @property
    def sha256(self) -> str:
        """Hash of the text."""
        return self.text.sha256

    @property
    def guess(self) -> float:
        """ln V."""
        return math.log(len(self.text.vocabulary))

    @functools.cached_property
    def segments(self) -> list[tuple[Tensor, Tensor]]:
        """The batches of training text, characters and the characters that follow."""
        return text.segments(text.batchify(self.text.train.to(self.device), self.batch), self.context)

    @functools.cached_property
    def _fixed(self) -> tuple[Tensor, Tensor]:
        return self._valid(self.batch)[0]

    def _valid(self, streams: int) -> list[tuple[Tensor, Tensor]]:
        some = self.text.valid[:_EVALUATION_CHARACTERS].to(self.device)
        return text.segments(text.batchify(some, streams), self.context)

    def model(self, seed: int) -> CharacterModel:
        """See :class:`Task`."""
        return CharacterModel(
            len(self.text.vocabulary),
            width=self.width,
            heads=self.heads,
            layers=self.layers,
            context=self.context,
            generator=torch.Generator().manual_seed(seed),
        ).to(self.device)

    def start(self) -> State:
        """None: each batch is read by itself."""
        return None

    def loss(self, model: CharacterModel, k: int, state: State) -> tuple[Tensor, State]:
        """See :class:`Task`; behind the last segment the text begins anew."""
        return model.loss(*self.segments[k % len(self.segments)]), None

    def fixed(self, model: CharacterModel) -> Tensor:
        """The first segment of the validation text."""
        return model.loss(*self._fixed)

    @torch.no_grad()
    def evaluate(self, model: CharacterModel) -> dict[str, float]:
        """Mean loss over the first 20,000 characters of the validation text, segment by segment."""
        losses = [model.loss(*segment).item() for segment in self._valid(_EVALUATION_STREAMS)]
        return {"valid": sum(losses) / len(losses)}


@dataclass(frozen=True)
class Pictures:
    """A residual network on labelled images.

    Args:
        images: A key of ``IMAGE_SETS``.
        blocks: Blocks per stage; 3 makes ResNet-20.
        width: Channels of the first stage.
        batch: Images per step.
        batch_norm: Whether the network has batch norm.
        held_out: Training images that are not trained on and make the validation loss.
        augment: Whether images are shifted and mirrored, as is usual for CIFAR-10. Digits lose their meaning.
        device: ``"cpu"`` or ``"cuda"``.
        sharpness: Of the activation; infinite is ReLU.
    """

    images: str
    blocks: int
    width: int
    batch: int
    batch_norm: bool
    held_out: int
    augment: bool
    device: str = "cpu"
    sharpness: float = math.inf

    @functools.cached_property
    def data(self) -> images.Images:
        """The images, read when they are first needed."""
        return IMAGE_SETS[self.images]()

    @property
    def sha256(self) -> str:
        """Hash of the images."""
        return self.data.sha256

    @property
    def guess(self) -> float:
        """ln of the number of classes."""
        return math.log(self.classes)

    @functools.cached_property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.data.train_labels.max()) + 1

    @functools.cached_property
    def _split(self) -> tuple[Tensor, Tensor]:
        return images.hold_out(len(self.data.train_labels), self.held_out)

    @functools.cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        return images.channel_statistics(self.data.train[self._split[0]])

    @functools.cached_property
    def _on_device(self) -> tuple[Tensor, Tensor]:
        return self.data.train.to(self.device), self.data.train_labels.to(self.device)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of the training images; what is left over waits for the next epoch's order."""
        return len(self._split[0]) // self.batch

    def model(self, seed: int) -> ResNet:
        """See :class:`Task`."""
        return ResNet(
            self.classes,
            blocks=self.blocks,
            width=self.width,
            channels=self.data.train.shape[-1],
            batch_norm=self.batch_norm,
            sharpness=self.sharpness,
            generator=torch.Generator().manual_seed(seed),
        ).to(self.device)

    def start(self) -> State:
        """None: batches of images leave nothing."""
        return None

    def loss(self, model: ResNet, k: int, state: State) -> tuple[Tensor, State]:
        """See :class:`Task`; every epoch has an order of its own."""
        epoch, position = divmod(k, self.steps_per_epoch)
        train = self._split[0]
        # The generators are made from k: a run that goes on from a checkpoint sees the same batches.
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch))
        rows = train[order[position * self.batch : (position + 1) * self.batch]]
        pixels, labels = (part[rows.to(self.device)] for part in self._on_device)
        if self.augment:
            pixels = images.augment(pixels, torch.Generator().manual_seed(k))
        return self._loss(model, pixels, labels), None

    def fixed(self, model: ResNet) -> Tensor:
        """The first images that are held out."""
        rows = self._split[1][: self.batch].to(self.device)
        return self._loss(model, *(part[rows] for part in self._on_device))

    def leading(self, model: ResNet, start: int, stop: int) -> Tensor:
        """Loss of training images ``start`` to ``stop`` - 1 in the order of the set, not augmented."""
        rows = self._split[0][start:stop].to(self.device)
        return self._loss(model, *(part[rows] for part in self._on_device))

    def _loss(self, model: ResNet, pixels: Tensor, labels: Tensor) -> Tensor:
        dtype = model.classifier.weight.dtype
        return cross_entropy(model(images.normalise(pixels, *self._statistics, dtype=dtype)), labels)

    def evaluate(self, model: ResNet) -> dict[str, float]:
        """Validation loss, and ``accuracy``, the share of held-out images with the right class."""
        rows = self._split[1].to(self.device)
        valid, accuracy = self._score(model, *(part[rows] for part in self._on_device))
        return {"valid": valid, "accuracy": accuracy}

    def test_accuracy(self, model: ResNet) -> float:
        """Share of the lossless test images with the right class."""
        kept = self.data.lossless
        pixels, labels = (part[kept].to(self.device) for part in (self.data.test, self.data.test_labels))
        return self._score(model, pixels, labels)[1]

    @torch.no_grad()
    def _score(self, model: ResNet, pixels: Tensor, labels: Tensor) -> tuple[float, float]:
        """Mean loss and accuracy with batch norm's running statistics."""
        training = model.training
        model.eval()
        loss, right = 0.0, 0
        for some, classes in zip(
            pixels.split(_EVALUATION_IMAGES), labels.split(_EVALUATION_IMAGES), strict=True
        ):
            logits = model(images.normalise(some, *self._statistics))
            loss += cross_entropy(logits, classes, reduction="sum").item()
            right += int((logits.argmax(1) == classes).sum())
        model.train(training)
        return loss / len(labels), right / len(labels)


def losses(task: Task, model: nn.Module, k: int, state: State) -> Callable[[], Tensor]:
    """The loss of batch k as the callable that the estimators of :mod:`gradclip.smoothness` take."""
    return lambda: task.loss(model, k, state)[0]


def described(task: Task) -> dict[str, Any]:
    """The fields of a task, for a record's configuration."""
    return {"task": type(task).__name__.lower(), **dataclasses.asdict(task)}
