"""`data.images`: files checked, formats decoded, the split, the augmentation and the normalisation."""

import hashlib
import io
import os
import sys
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gradclip.data import DataError, images


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_images(count, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), rng.integers(
        0, 10, count, dtype=np.uint8
    )


def binary_file(pixels, labels):
    """The format as its page describes it, written byte by byte: class, then red, green and blue planes."""
    out = bytearray()
    for image, label in zip(pixels, labels, strict=True):
        out.append(label)
        for channel in range(3):
            for row in range(32):
                out += bytes(image[row, :, channel].tolist())
    return bytes(out)


@pytest.fixture
def binary(tmp_path, monkeypatch):
    """A folder with six small files in CIFAR-10's format, and the pixels and labels that they hold."""
    folder = tmp_path / "cifar10"
    folder.mkdir()
    parts, hashes = [], {}
    for seed, name in enumerate(images.CIFAR10_SHA256):
        pixels, labels = some_images(3, seed)
        (folder / name).write_bytes(binary_file(pixels, labels))
        hashes[name] = sha256((folder / name).read_bytes())
        parts.append((pixels, labels))
    train, train_labels = (np.concatenate(part) for part in zip(*parts[:-1], strict=True))
    monkeypatch.setattr(images, "CIFAR10_SHA256", hashes)
    monkeypatch.setattr(images, "CIFAR10_TRAIN_SHA256", sha256(train.tobytes()))
    monkeypatch.setenv("GRADCLIP_DATA_DIR", str(tmp_path))
    return folder, train, train_labels, *parts[-1]


def test_the_binary_version_is_decoded(binary):
    folder, train, train_labels, test, test_labels = binary
    data = images.cifar10()
    assert data.name == "cifar10"
    assert data.train.dtype == data.test.dtype == torch.uint8
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64
    assert data.train.is_contiguous()
    for found, made in [
        (data.train, train),
        (data.train_labels, train_labels),
        (data.test, test),
        (data.test_labels, test_labels),
    ]:
        assert np.array_equal(found.numpy(), made)
    assert data.lossless.tolist() == [True] * 3
    raw = b"".join(part.tobytes() for part in (train, train_labels, test, test_labels))
    assert data.sha256 == sha256(raw)
    assert images.cifar10(folder).sha256 == data.sha256


@pytest.mark.parametrize("name", list(images.CIFAR10_SHA256))
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "a folder"])
def test_a_damaged_file_is_named_with_its_hashes(binary, name, damage):
    folder = binary[0]
    path, expected = folder / name, images.CIFAR10_SHA256[name]
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[:-1])
        message = f"sha256 is {sha256(content[:-1])}, expected {expected}; it has {len(content) - 1} bytes"
    elif damage == "changed":
        content[1234] ^= 1
        path.write_bytes(content)
        message = f"sha256 is {sha256(content)}, expected {expected}"
    elif damage == "missing":
        message = f"no such file; it should have sha256 {expected}"
    else:
        path.mkdir()
        message = f"it should have sha256 {expected}"
    with pytest.raises(DataError) as error:
        images.cifar10()
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_other_training_pixels_than_the_recorded_ones_are_refused(binary, monkeypatch):
    actual = images.CIFAR10_TRAIN_SHA256
    monkeypatch.setattr(images, "CIFAR10_TRAIN_SHA256", "0" * 64)
    with pytest.raises(DataError, match=f"training pixels is {actual}, expected {'0' * 64}") as error:
        images.cifar10()
    assert str(binary[0]) in str(error.value)


def test_without_the_variable_the_cache_is_read_and_with_it_the_cache_is_not(binary, monkeypatch, tmp_path):
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path if project == "gradclip" else None)
    for unset in (
        lambda: monkeypatch.delenv("GRADCLIP_DATA_DIR"),
        lambda: monkeypatch.setenv("GRADCLIP_DATA_DIR", ""),
    ):
        unset()
        assert len(images.cifar10().train) == 15
    monkeypatch.setenv("GRADCLIP_DATA_DIR", str(tmp_path / "elsewhere"))
    with pytest.raises(DataError, match="no such file") as error:
        images.cifar10()
    assert str(tmp_path / "elsewhere" / "cifar10" / "data_batch_1.bin") in str(error.value)


def encoded(pixels, form, **options):
    """One picture, the images one above the other."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.reshape(-1, 32, 3)).save(buffer, form, **options)
    return buffer.getvalue()


def joined(pieces):
    ends = np.cumsum([0, *map(len, pieces)])
    return np.frombuffer(b"".join(pieces), dtype=np.uint8), ends


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """The packed copy in small: lossless training images, and a test file whose last images are JPEG."""
    folder = tmp_path / "cifar10"
    folder.mkdir()
    parts, hashes = [], {}
    for seed, name in enumerate(images.CIFAR10_PACKED_SHA256):
        pixels, labels = some_images(4, seed)
        lossless = 2 if "test" in name else 4
        pictures = [encoded(pixels[i : i + 2], "webp", lossless=True) for i in range(0, lossless, 2)]
        arrays = dict(zip(("webp", "off"), joined(pictures), strict=True), labels=labels)
        if lossless < 4:
            pictures = [encoded(image, "jpeg", quality=75) for image in pixels[lossless:]]
            head = pictures[0].index(b"\xff\xda")  # where the compressed data begins
            assert len({picture[:head] for picture in pictures}) == 1
            arrays["jpeg"], arrays["joff"] = joined([picture[head:] for picture in pictures])
            arrays["jhead"] = np.frombuffer(pictures[0][:head], dtype=np.uint8)
        np.savez(folder / name, **arrays)
        hashes[name] = sha256((folder / name).read_bytes())
        parts.append((pixels, labels))
    train = np.concatenate([pixels for pixels, _ in parts[:-1]])
    monkeypatch.setattr(images, "CIFAR10_PACKED_SHA256", hashes)
    monkeypatch.setattr(images, "CIFAR10_TRAIN_SHA256", sha256(train.tobytes()))
    monkeypatch.setenv("GRADCLIP_DATA_DIR", str(tmp_path))
    return folder, train, parts


def test_the_packed_copy_says_which_test_images_are_the_original_ones(packed):
    _, train, parts = packed
    data = images.cifar10()
    assert data.name == "cifar10-packed"
    assert np.array_equal(data.train.numpy(), train)
    assert data.train_labels.tolist() == [*parts[0][1], *parts[1][1]]
    test, test_labels = parts[2]
    assert data.lossless.tolist() == [True, True, False, False]
    assert np.array_equal(data.test[data.lossless].numpy(), test[:2])
    assert data.test_labels.tolist() == test_labels.tolist()
    # JPEG changes noise much, but less than another image: the rows are in their order.
    lossy = data.test[~data.lossless].double()
    original = torch.from_numpy(test[2:]).double()
    distance = (lossy[:, None] - original[None]).abs().mean((2, 3, 4))
    assert distance.diagonal().min() > 0
    assert distance.argmin(1).tolist() == [0, 1]


@pytest.mark.parametrize("name", list(images.CIFAR10_PACKED_SHA256))
def test_a_damaged_packed_file_is_named(packed, name):
    path, expected = packed[0] / name, images.CIFAR10_PACKED_SHA256[name]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"expected {expected}") as error:
        images.cifar10()
    assert str(path) in str(error.value)


def test_one_file_of_the_binary_version_rules_the_packed_copy_out(packed):
    """Half an unpacked archive must not give images of another origin without a word."""
    folder = packed[0]
    (folder / "test_batch.bin").write_bytes(b"")
    with pytest.raises(DataError, match="no such file") as error:
        images.cifar10()
    assert str(folder / "data_batch_1.bin") in str(error.value)


@pytest.mark.parametrize(
    ("module", "load", "message"),
    [
        ("PIL", lambda: images.cifar10(), "needs Pillow"),
        ("sklearn.datasets", lambda: images.digits(), "come with scikit-learn"),
    ],
)
def test_a_package_that_is_not_there_is_named(packed, monkeypatch, module, load, message):
    monkeypatch.setitem(sys.modules, module, None)  # what makes an import fail
    with pytest.raises(DataError, match=message):
        load()


def test_the_cache_folder_needs_pooch_and_the_variable_does_not(binary, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    images.cifar10()
    monkeypatch.delenv("GRADCLIP_DATA_DIR")
    with pytest.raises(DataError, match=r"set GRADCLIP_DATA_DIR .* cifar10/, or install pooch"):
        images.cifar10()


def test_the_digits_are_those_of_scikit_learn_in_two_parts():
    from sklearn.datasets import load_digits

    loaded = load_digits()
    data = images.digits()
    assert data.train.shape == (1437, 8, 8, 1)
    assert data.test.shape == (360, 8, 8, 1)
    assert data.train.dtype == torch.uint8
    assert data.lossless.all()
    # Together the two parts are the whole set, each image with its label.
    whole = {
        (image.astype(np.uint8).tobytes(), label)
        for image, label in zip(loaded.images, loaded.target, strict=True)
    }
    assert len(whole) == 1797  # no image twice, so the parts cannot overlap when their sizes add up
    found = set()
    for pixels, labels in ((data.train, data.train_labels), (data.test, data.test_labels)):
        found |= {(image.numpy().tobytes(), int(label)) for image, label in zip(pixels, labels, strict=True)}
    assert found == whole
    # Every class is in both parts: 360 draws of 1,797 with about 180 images each.
    assert data.test_labels.bincount().min() > 18
    assert images.digits().sha256 == data.sha256


def test_other_digits_are_refused(monkeypatch):
    actual = images.DIGITS_SHA256
    monkeypatch.setattr(images, "DIGITS_SHA256", "0" * 64)
    with pytest.raises(DataError, match=f"digits: sha256 is {actual}, expected {'0' * 64}"):
        images.digits()


@given(st.integers(2, 200), st.data())
@settings(derandomize=True, max_examples=50, deadline=None)
def test_the_split_leaves_nothing_out_and_uses_nothing_twice(count, data):
    held_out = data.draw(st.integers(1, count - 1))
    train, held = images.hold_out(count, held_out)
    assert (len(train), len(held)) == (count - held_out, held_out)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(count))
    again = images.hold_out(count, held_out)
    assert torch.equal(train, again[0])
    assert torch.equal(held, again[1])


def test_the_split_depends_on_its_seed_and_on_nothing_else():
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    train, held = images.hold_out(50_000, 5_000)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (len(train), len(held)) == (45_000, 5_000)
    assert not torch.equal(held, images.hold_out(50_000, 5_000, seed=1)[1])
    # Spread over the whole set: the mean of 5,000 of n = 50,000 numbers drawn without putting back has the
    # standard deviation n sqrt((1/5000 - 1/n) / 12) = 194; four of them.
    assert abs(held.double().mean() - 24_999.5) < 4 * 194


@pytest.mark.parametrize("held_out", [0, 6, -1])
def test_a_split_without_one_part_is_refused(held_out):
    with pytest.raises(ValueError, match=f"held_out must be between 1 and 5, got {held_out}"):
        images.hold_out(6, held_out)


def windows(image, pad):
    """Every result that augmentation may have, cut out one by one with numpy."""
    height, width, _ = image.shape
    padded = np.zeros((height + 2 * pad, width + 2 * pad, image.shape[2]), image.dtype)
    padded[pad : pad + height, pad : pad + width] = image
    for y in range(2 * pad + 1):
        for x in range(2 * pad + 1):
            window = padded[y : y + height, x : x + width]
            yield (y, x, False), window
            yield (y, x, True), window[:, ::-1]


@given(
    st.integers(1, 5),
    st.integers(2, 5),
    st.integers(2, 5),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(0, 2**31),
)
@settings(derandomize=True, max_examples=50, deadline=None)
def test_every_augmented_image_is_a_window_of_its_own_image(n, height, width, channels, pad, seed):
    # The pixels of an image are all different and none is 0, so a window tells where it was cut.
    size = height * width * channels
    batch = torch.stack([torch.randperm(size, generator=generator(i)) + 1 for i in range(n)])
    batch = batch.to(torch.uint8).view(n, height, width, channels)
    before = batch.clone()
    out = images.augment(batch, generator(seed), pad=pad)
    assert out.shape == batch.shape
    assert out.dtype == batch.dtype
    assert torch.equal(batch, before)
    for image, result in zip(batch.numpy(), out.numpy(), strict=True):
        assert any(np.array_equal(result, window) for _, window in windows(image, pad))


def test_every_shift_and_mirror_is_equally_likely_and_drawn_for_each_image():
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 3, 3, 1)
    n = 1800
    out = images.augment(image.expand(n, -1, -1, -1), generator(3), pad=1).numpy()
    possible = [(which, window.tobytes()) for which, window in windows(image[0].numpy(), 1)]
    names = {content: which for which, content in possible}
    assert len(names) == 18
    counts = dict.fromkeys(names.values(), 0)
    for result in out:
        counts[names[result.tobytes()]] += 1
    # Pearson's statistic of 18 cells has 17 degrees of freedom; it exceeds 40.8 once in 1,000 seeds.
    expected = n / 18
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 40.8


def test_augmentation_takes_its_draws_from_the_given_generator_only():
    batch = torch.from_numpy(some_images(8, 0)[0])
    state = torch.random.get_rng_state()
    source = generator(5)
    first, second = images.augment(batch, source), images.augment(batch, source)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, images.augment(batch, generator(5)))
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match="pad must not be negative, got -1"):
        images.augment(batch, source, pad=-1)


def test_statistics_are_those_of_numpy_and_normalise_to_zero_and_one():
    pixels, _ = some_images(7, 1)
    pixels[..., 1] //= 3
    mean, std = images.channel_statistics(torch.from_numpy(pixels))
    flat = pixels.reshape(-1, 3).astype(np.float64)
    # Sums of at most 7,168 numbers in float64: relative errors below 7168 * 2^-53 < 1e-12.
    np.testing.assert_allclose(mean.numpy(), flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std.numpy(), flat.std(0), rtol=1e-12)
    out = images.normalise(torch.from_numpy(pixels), mean, std, dtype=torch.float64)
    assert out.shape == (7, 3, 32, 32)
    assert out.is_contiguous()
    for c in range(3):
        by_hand = (pixels[..., c].astype(np.float64) - flat[:, c].mean()) / flat[:, c].std()
        np.testing.assert_allclose(out[:, c].numpy(), by_hand, rtol=1e-11, atol=1e-11)
    assert images.normalise(torch.from_numpy(pixels), mean, std).dtype == torch.float32


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(2, 4, 4, 3), "must be uint8 and not empty, got torch.float32 of shape \\(2, 4, 4, 3\\)"),
        (torch.zeros(0, 4, 4, 3, dtype=torch.uint8), "must be uint8 and not empty"),
        (torch.full((2, 4, 4, 1), 7, dtype=torch.uint8), "a channel is constant: the means are \\[7.0\\]"),
    ],
)
def test_statistics_that_cannot_normalise_are_refused(pixels, message):
    with pytest.raises(ValueError, match=message):
        images.channel_statistics(pixels)


if os.environ.get("GRADCLIP_DATA_DIR"):  # the data set is not part of the repository

    def test_the_real_set_has_its_known_means_and_ten_equal_classes():
        data = images.cifar10()
        assert Path(os.environ["GRADCLIP_DATA_DIR"], "cifar10").is_dir()
        assert data.train.shape == (50_000, 32, 32, 3)
        assert data.test.shape == (10_000, 32, 32, 3)
        assert data.train_labels.bincount().tolist() == [5_000] * 10
        assert data.test_labels.bincount().tolist() == [1_000] * 10
        assert int(data.lossless.sum()) == {"cifar10": 10_000, "cifar10-packed": 1_000}[data.name]
        # Known to four decimals.
        mean, _ = images.channel_statistics(data.train)
        assert torch.allclose(mean, torch.tensor([125.3069, 122.9504, 113.8654]).double(), rtol=0, atol=5e-5)
        # The training files of the binary version, rebuilt, have their published hashes: so labels and order
        # are right too.
        recorded = list(images.CIFAR10_SHA256.values())
        for i in range(5):
            rows = slice(10_000 * i, 10_000 * (i + 1))
            planes = data.train[rows].permute(0, 3, 1, 2).reshape(10_000, -1)
            records = torch.cat([data.train_labels[rows, None].to(torch.uint8), planes], 1)
            assert sha256(records.numpy()) == recorded[i]
