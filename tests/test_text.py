import hashlib
import sys
from collections import Counter

import pooch
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradclip.data import DataError, text


def test_tokens_are_words_numbers_and_runs_of_one_mark():
    assert text.tokenise("If x==10:\n   Return 'Ünï' + __dict__ ... #--") == (
        ["if", "x", "==", "10", ":", "return", "'", "ünï", "'", "+", "__", "dict", "__", "...", "#", "--"]
    )
    assert text.tokenise(" \n\t") == []


@pytest.fixture(scope="module")
def manual():
    return text.reference_manual()


def test_the_manual_is_the_text_that_python_carries(manual):
    from pydoc_data.topics import topics

    raw = "\n".join(topics[name] for name in sorted(topics))
    assert manual.sha256 == hashlib.sha256(raw.encode()).hexdigest()
    tokens = text.tokenise(raw)
    parts = [manual.train, manual.valid, manual.test]
    assert len(tokens) == sum(map(len, parts)) > 50_000
    # Contiguous and in order: put together, the parts are the text, but for the rare words.
    decoded = [manual.vocabulary[i] for part in parts for i in part.tolist()]
    known = set(manual.vocabulary)
    assert decoded == [token if token in known else "<unk>" for token in tokens]
    assert len(manual.train) == len(tokens) * 8 // 10
    assert len(manual.train) + len(manual.valid) == len(tokens) * 9 // 10


def test_the_vocabulary_knows_the_training_part_only(manual):
    from pydoc_data.topics import topics

    train = text.tokenise("\n".join(topics[name] for name in sorted(topics)))[: len(manual.train)]
    counts = Counter(train)
    assert set(manual.vocabulary) == {"<unk>"} | {word for word in counts if counts[word] >= 5}
    assert len(manual.vocabulary) == len(set(manual.vocabulary))
    # Rare words are a small part of the text, or the model would learn nothing but <unk>.
    assert 0 < (manual.train == 0).float().mean() < 0.1
    frequencies = [counts[word] for word in manual.vocabulary[1:]]
    assert frequencies == sorted(frequencies, reverse=True)


def test_the_manual_is_the_same_every_time(manual):
    again = text.reference_manual()
    assert again.vocabulary == manual.vocabulary
    assert all(
        torch.equal(getattr(again, part), getattr(manual, part)) for part in ("train", "valid", "test")
    )


def test_min_count_limits_the_vocabulary(manual):
    everything = text.reference_manual(min_count=1)
    assert not (everything.train == 0).any()
    assert len(everything.vocabulary) > len(manual.vocabulary)
    with pytest.raises(ValueError, match="min_count must be at least 1, got 0"):
        text.reference_manual(min_count=0)


def test_a_python_without_the_manual_is_told_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)  # what makes an import fail
    with pytest.raises(DataError, match=r"carries no pydoc_data\.topics"):
        text.reference_manual()


def test_the_manual_by_characters_is_the_text_that_python_carries(manual):
    from pydoc_data.topics import topics

    corpus = text.reference_manual_characters()
    raw = "\n".join(topics[name] for name in sorted(topics))
    assert corpus.sha256 == manual.sha256
    parts = [corpus.train, corpus.valid, corpus.test]
    known = set(corpus.vocabulary)
    decoded = [corpus.vocabulary[i] for part in parts for i in part.tolist()]
    assert decoded == [character if character in known else "<unk>" for character in raw]
    assert [len(corpus.train), len(corpus.valid)] == [
        len(raw) * 8 // 10,
        len(raw) * 9 // 10 - len(raw) * 8 // 10,
    ]
    counts = Counter(raw[: len(corpus.train)])
    assert known == {"<unk>"} | {character for character in counts if counts[character] >= 5}
    assert {" ", "\n"} <= known
    with pytest.raises(ValueError, match="min_count must be at least 1, got 0"):
        text.reference_manual_characters(min_count=0)


PTB = {
    "ptb.train.txt": " the <unk> sat \n on the mat N \n",
    "ptb.valid.txt": " the mat \n",
    "ptb.test.txt": " mat sat \n",
}


@pytest.fixture
def ptb(tmp_path, monkeypatch):
    folder = tmp_path / "ptb"
    folder.mkdir()
    for name, content in PTB.items():
        (folder / name).write_bytes(content.encode())
    hashes = {name: hashlib.sha256(content.encode()).hexdigest() for name, content in PTB.items()}
    monkeypatch.setattr(text, "PTB_SHA256", hashes)
    monkeypatch.setenv("GRADCLIP_DATA_DIR", str(tmp_path))
    return folder


def test_penn_treebank_ends_lines_and_numbers_words_by_first_appearance(ptb):
    corpus = text.penn_treebank()
    assert corpus.vocabulary == ("the", "<unk>", "sat", "<eos>", "on", "mat", "N")
    assert corpus.train.tolist() == [0, 1, 2, 3, 4, 0, 5, 6, 3]
    assert corpus.valid.tolist() == [0, 5, 3]
    assert corpus.test.tolist() == [5, 2, 3]
    assert corpus.sha256 == hashlib.sha256("".join(PTB.values()).encode()).hexdigest()
    assert text.penn_treebank(ptb).sha256 == corpus.sha256


def test_penn_treebank_by_characters_is_the_text_of_the_files(ptb):
    corpus = text.penn_treebank_characters()
    assert corpus.vocabulary[0] == "<unk>"
    assert set(corpus.vocabulary[1:]) == set(PTB["ptb.train.txt"])
    for part, content in zip((corpus.train, corpus.valid, corpus.test), PTB.values(), strict=True):
        assert "".join(corpus.vocabulary[i] for i in part.tolist()) == content
    assert corpus.sha256 == text.penn_treebank(ptb).sha256


@pytest.mark.parametrize("name", sorted(PTB))
def test_a_missing_or_damaged_treebank_file_is_named_and_nothing_replaces_it(ptb, name):
    path = ptb / name
    expected = text.PTB_SHA256[name]
    path.write_bytes(path.read_bytes() + b" \n")
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(DataError, match=f"sha256 is {actual}, expected {expected}") as error:
        text.penn_treebank()
    assert str(path) in str(error.value)
    path.unlink()
    with pytest.raises(DataError, match=f"no such file; it should have sha256 {expected}") as error:
        text.penn_treebank()
    assert str(path) in str(error.value)


@pytest.mark.parametrize("value", [None, ""])
def test_without_the_variable_the_cache_is_read(ptb, tmp_path, monkeypatch, value):
    monkeypatch.delenv("GRADCLIP_DATA_DIR")
    if value is not None:
        monkeypatch.setenv("GRADCLIP_DATA_DIR", value)
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    with pytest.raises(DataError, match=r"fetch` downloads .* GRADCLIP_DATA_DIR names") as error:
        text.penn_treebank()
    cache = tmp_path / "cache" / "gradclip"
    assert str(cache / "ptb" / "ptb.train.txt") in str(error.value)
    cache.mkdir(parents=True)
    ptb.rename(cache / "ptb")
    assert len(text.penn_treebank().train) == 9


@settings(derandomize=True, deadline=None, max_examples=60)
@given(n=st.integers(1, 200), batch=st.integers(1, 20), bptt=st.integers(1, 30))
def test_streams_and_segments_keep_the_order_of_the_text(n, batch, bptt):
    tokens = torch.arange(n)
    if batch > n:
        with pytest.raises(ValueError, match=f"batch must be between 1 and .* {n}, got {batch}"):
            text.batchify(tokens, batch)
        return
    streams = text.batchify(tokens, batch)
    rows = n // batch
    assert streams.shape == (rows, batch)
    # With a text that counts, position (i, j) must hold token j * rows + i.
    assert torch.equal(streams, torch.arange(rows).view(-1, 1) + rows * torch.arange(batch))
    if bptt >= rows:
        with pytest.raises(ValueError, match=f"bptt must be between 1 and {rows - 1}, .* got {bptt}"):
            text.segments(streams, bptt)
        return
    pairs = text.segments(streams, bptt)
    assert all(inputs.shape == targets.shape == (bptt, batch) for inputs, targets in pairs)
    assert all(torch.equal(targets, inputs + 1) for inputs, targets in pairs)
    read = torch.cat([inputs for inputs, _ in pairs])
    assert torch.equal(read, streams[: len(read)])
    # Nothing but a piece shorter than a segment is left out.
    assert 0 <= rows - 1 - len(read) < bptt


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_are_checked(size):
    with pytest.raises(ValueError, match=f"batch must be .* got {size}"):
        text.batchify(torch.arange(4), size)
    with pytest.raises(ValueError, match=f"bptt must be .* got {size}"):
        text.segments(torch.arange(4).view(-1, 1), size)
