"""English text as streams of word numbers, for language models.

Two corpora. :func:`reference_manual` needs no download: it is the text of the Python language reference that
every CPython carries for ``help()``. :func:`penn_treebank` is the corpus of the 2020 paper, read from files.
Both come by characters too: :func:`reference_manual_characters` and :func:`penn_treebank_characters`.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gradclip.data import DataError, data_folder, read_checked

UNKNOWN = "<unk>"
END_OF_SENTENCE = "<eos>"

#: SHA-256 of the Penn Treebank files as prepared by Mikolov, in the order they are read.
PTB_SHA256 = {
    "ptb.train.txt": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
    "ptb.valid.txt": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
    "ptb.test.txt": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
}

# A word, a number, or a run of one punctuation mark: a ruler of asterisks below a heading is one token.
_TOKEN = re.compile(r"[^\W\d_]+|\d+|([^\w\s]|_)\1*")


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text in three contiguous parts.

    Args:
        name: Name of the corpus.
        train: Word numbers, int64, shape (n,).
        valid: The same for validation.
        test: The same for testing.
        vocabulary: The word of each number.
        sha256: SHA-256 of the raw text: which text this is.
    """

    name: str
    train: Tensor
    valid: Tensor
    test: Tensor
    vocabulary: tuple[str, ...]
    sha256: str


def tokenise(text: str) -> list[str]:
    """Split into lower-case words, numbers and punctuation; a run of one punctuation mark is one token.

    >>> tokenise("The __init__ method\\n*******\\nTakes 2 arguments.")
    ['the', '__', 'init', '__', 'method', '*******', 'takes', '2', 'arguments', '.']
    """
    return [match.group() for match in _TOKEN.finditer(text.lower())]


def reference_manual(*, min_count: int = 5) -> Corpus:
    """The Python language reference, from the standard library's ``pydoc_data.topics``.

    All topics, joined in the sorted order of their names. The first 80 % of the tokens are for training, the
    next 10 % for validation and the rest for testing. Another version of Python carries another edition of
    the manual, so ``sha256`` and every number measured on it depend on the version; records hold both.

    Args:
        min_count: A word seen less often than this in the training part is replaced by ``<unk>``.

    Returns:
        The corpus, about 100,000 tokens. The vocabulary is sorted by falling frequency, then alphabetically.

    Raises:
        DataError: This Python carries no ``pydoc_data.topics``, which some minimal builds leave out.
        ValueError: ``min_count`` is less than 1.
    """
    if min_count < 1:
        raise ValueError(f"min_count must be at least 1, got {min_count}")
    text = _manual()
    return _frequent("reference-manual", _split(tokenise(text)), min_count, text)


def reference_manual_characters(*, min_count: int = 5) -> Corpus:
    """The text of :func:`reference_manual` by characters, line ends and spaces among them.

    Args:
        min_count: A character seen less often than this in the training part is replaced by ``<unk>``.

    Returns:
        The corpus, some 700,000 characters, split as the one of words is, by number of characters.

    Raises:
        DataError: As for :func:`reference_manual`.
        ValueError: ``min_count`` is less than 1.
    """
    if min_count < 1:
        raise ValueError(f"min_count must be at least 1, got {min_count}")
    text = _manual()
    return _frequent("reference-manual-characters", _split(text), min_count, text)


def _manual() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            "this Python carries no pydoc_data.topics; install its full standard library"
        ) from None
    return "\n".join(topics[name] for name in sorted(topics))


def _split(tokens: Sequence[str]) -> list[Sequence[str]]:
    ends = [len(tokens) * 8 // 10, len(tokens) * 9 // 10]
    return [tokens[: ends[0]], tokens[ends[0] : ends[1]], tokens[ends[1] :]]


def _frequent(name: str, parts: Sequence[Sequence[str]], min_count: int, text: str) -> Corpus:
    """A corpus of three parts whose vocabulary is what the first one holds often enough."""
    counts = Counter(parts[0])
    words = sorted((word for word in counts if counts[word] >= min_count), key=lambda w: (-counts[w], w))
    vocabulary = (UNKNOWN, *words)
    number = {word: i for i, word in enumerate(vocabulary)}
    train, valid, test = (_encode(part, number) for part in parts)
    return Corpus(name, train, valid, test, vocabulary, hashlib.sha256(text.encode()).hexdigest())


def penn_treebank(folder: str | Path | None = None) -> Corpus:
    """The Penn Treebank as prepared by Mikolov: 10,000 words, 929,589 training tokens with ``<eos>``.

    Args:
        folder: The folder that holds ``ptb.train.txt``, ``ptb.valid.txt`` and ``ptb.test.txt``; by default
            the one of :func:`gradclip.data.data_folder`, where ``python -m gradclip fetch ptb`` puts them.

    Returns:
        The corpus. Words are numbered by first appearance in the training part; ``<eos>`` ends every line.

    Raises:
        DataError: A file is missing or has another hash than ``PTB_SHA256``; the message names the path and
            both hashes.
    """
    texts = _treebank(folder)
    parts = [
        [word for line in text.splitlines() for word in (*line.split(), END_OF_SENTENCE)] for text in texts
    ]
    number = {word: i for i, word in enumerate(dict.fromkeys(parts[0]))}
    train, valid, test = (_encode(part, number) for part in parts)
    sha256 = hashlib.sha256("".join(texts).encode()).hexdigest()
    return Corpus("penn-treebank", train, valid, test, tuple(number), sha256)


def penn_treebank_characters(folder: str | Path | None = None) -> Corpus:
    """The files of :func:`penn_treebank` by characters.

    They are the files for language models by words: the rare words are already ``<unk>``, five characters
    here, and a line begins and ends with a space. Character-level results elsewhere mostly use other files,
    and are not comparable.

    Args:
        folder: As for :func:`penn_treebank`; so is what is raised.

    Returns:
        The corpus, some five million training characters.
    """
    texts = _treebank(folder)
    return _frequent("penn-treebank-characters", texts, 1, "".join(texts))


def _treebank(folder: str | Path | None) -> list[str]:
    folder = data_folder("ptb") if folder is None else Path(folder)
    return [read_checked(folder / name, expected).decode() for name, expected in PTB_SHA256.items()]


def _encode(words: Sequence[str], number: dict[str, int]) -> Tensor:
    unknown = number[UNKNOWN]
    return torch.tensor([number.get(word, unknown) for word in words], dtype=torch.int64)


def batchify(tokens: Tensor, batch: int) -> Tensor:
    """Cut a text into ``batch`` contiguous streams of one length, side by side; the rest is dropped.

    Args:
        tokens: Word numbers, shape (n,).
        batch: Number of streams.

    Returns:
        Shape (n // batch, batch); column j is the j-th stream.

    Raises:
        ValueError: ``batch`` is less than 1, or greater than n.

    >>> batchify(torch.arange(7), 2)
    tensor([[0, 3],
            [1, 4],
            [2, 5]])
    """
    if not 1 <= batch <= len(tokens):
        raise ValueError(f"batch must be between 1 and the number of tokens, {len(tokens)}, got {batch}")
    rows = len(tokens) // batch
    return tokens[: rows * batch].view(batch, rows).t().contiguous()


def segments(streams: Tensor, bptt: int) -> list[tuple[Tensor, Tensor]]:
    """Consecutive segments of fixed length, each with its targets, the words that come next.

    A shorter segment at the end is left out, so that every training step has an objective of the same size.

    Args:
        streams: Word numbers, shape (rows, batch), from :func:`batchify`.
        bptt: Length of a segment, over which the gradient is propagated through time.

    Returns:
        Pairs of views, inputs and targets, each of shape (bptt, batch); targets are inputs one row later.

    Raises:
        ValueError: ``bptt`` is less than 1, or there is not one whole segment.

    >>> [inputs.flatten().tolist() for inputs, _ in segments(torch.arange(8).view(-1, 1), 3)]
    [[0, 1, 2], [3, 4, 5]]
    """
    if not 1 <= bptt < len(streams):
        raise ValueError(f"bptt must be between 1 and {len(streams) - 1}, the rows less one, got {bptt}")
    count = (len(streams) - 1) // bptt
    starts = range(0, count * bptt, bptt)
    return [(streams[i : i + bptt], streams[i + 1 : i + bptt + 1]) for i in starts]


def unigram_loss(corpus: Corpus) -> float:
    """Validation loss of the training text's word frequencies alone, in nats per word.

    One is added to every count, or a word that is missing from the training text would cost infinity.
    """
    counts = torch.bincount(corpus.train, minlength=len(corpus.vocabulary)).double() + 1
    return -(counts / counts.sum()).log()[corpus.valid].mean().item()
