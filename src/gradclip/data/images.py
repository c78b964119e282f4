"""Labelled images, their split, the usual augmentation and the normalisation.

Two sets. :func:`digits` needs no download: scikit-learn carries it. :func:`cifar10` is the set of the 2020
paper, read from files.
"""

import hashlib
import io
import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_with_zeros

from gradclip.data import DataError, data_folder, read_checked

#: SHA-256 of the six files of CIFAR-10's binary version, in the order they are read, from the source of
#: torchvision-ruby's loader. The five training files, rebuilt from pixels and labels, have these hashes.
CIFAR10_SHA256 = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}

#: SHA-256 of the three files of the packed copy.
CIFAR10_PACKED_SHA256 = {
    "cifar10_train_a.npz": "933d5d3ae4191c6020a79da847040390e2b0a73ad2721e572611d193232f2ecb",
    "cifar10_train_b.npz": "5a08dc115000604f47d5f999e5316a995e0e6e10ff239f5ead2383cbdec485f6",
    "cifar10_test.npz": "5ed5edcadf55bcd7b9d72a1f5d40139524175e2cb9017fd0b0ba0d969c95adad",
}

#: SHA-256 of CIFAR-10's training pixels as bytes, in the order image, row, column, channel.
CIFAR10_TRAIN_SHA256 = "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a"

#: SHA-256 of the pixels of scikit-learn's digits followed by their labels, one byte each.
DIGITS_SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"

_DIGITS_TEST = 360  # a fifth of 1,797


@dataclass(frozen=True, eq=False)
class Images:
    """A set of labelled images, split into training and test images.

    Args:
        name: Name of the set.
        train: Pixels, uint8, shape (n, height, width, channels).
        train_labels: Classes, int64, shape (n,).
        test: The same for testing.
        test_labels: The same for testing.
        lossless: bool, shape (test images,): which test images are the original pixels. Where any is not, an
            accuracy on all test images is not one on the set of that name.
        sha256: SHA-256 of training pixels, training labels, test pixels and test labels, a byte each: which
            data this is.
    """

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    lossless: Tensor
    sha256: str


def cifar10(folder: str | Path | None = None) -> Images:
    """CIFAR-10: 50,000 training and 10,000 test images, 32 x 32 pixels, three channels, ten classes.

    Two forms are read. The six files of the binary version, which ``python -m gradclip fetch cifar10``
    unpacks, are the original. A packed copy, half as large, has the training images without loss, and of the
    test images the first 1,000; the other 9,000 are JPEG of quality 75 and sorted by class. Where any file of
    the binary version is in the folder, all six are needed and the packed copy is not looked at. The training
    images of both forms are the same.

    Args:
        folder: The folder that holds the files; by default the one of :func:`gradclip.data.data_folder`.

    Returns:
        The images, named ``cifar10`` or, from the packed copy, ``cifar10-packed``. The ``sha256`` of the
        latter depends on how this version of Pillow rounds JPEG.

    Raises:
        DataError: A file is missing or has another hash than recorded, the training pixels have another hash
            than ``CIFAR10_TRAIN_SHA256``, or Pillow is missing and the copy is packed.

    References:
        Krizhevsky, Learning multiple layers of features from tiny images, 2009, chapter 3.
    """
    folder = data_folder("cifar10") if folder is None else Path(folder)
    binary = any((folder / name).exists() for name in CIFAR10_SHA256)
    packed = any((folder / name).exists() for name in CIFAR10_PACKED_SHA256)
    if packed and not binary:
        name, hashes, decode = "cifar10-packed", CIFAR10_PACKED_SHA256, _decode_packed
    else:
        name, hashes, decode = "cifar10", CIFAR10_SHA256, _decode_binary
    parts = [decode(read_checked(folder / file, sha256)) for file, sha256 in hashes.items()]
    train, train_labels, _ = (torch.cat(part) for part in zip(*parts[:-1], strict=True))
    actual = hashlib.sha256(train.numpy()).hexdigest()
    if actual != CIFAR10_TRAIN_SHA256:
        raise DataError(
            f"{folder}: sha256 of the training pixels is {actual}, expected {CIFAR10_TRAIN_SHA256}"
        )
    return _images(name, train, train_labels, *parts[-1])


def _decode_binary(content: bytes) -> tuple[Tensor, Tensor, Tensor]:
    # A record is the class, then 32 x 32 red values row by row, then green, then blue.
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, 1 + 3 * 32 * 32)
    pixels = records[:, 1:].view(-1, 3, 32, 32).permute(0, 2, 3, 1).contiguous()
    return pixels, records[:, 0].long(), torch.ones(len(records), dtype=torch.bool)


def _decode_packed(content: bytes) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, labels, and which rows are lossless.

    ``webp`` holds lossless pictures one after the other, each a column of images one above the other; picture
    i is bytes ``off[i]`` to ``off[i + 1]``. ``jpeg`` and ``joff`` are the same for JPEG, whose common head is
    ``jhead``.
    """
    import numpy as np

    try:
        from PIL import Image
    except ImportError:
        raise DataError("the packed copy of CIFAR-10 needs Pillow: pip install pillow") from None

    def pictures(data: np.ndarray, ends: np.ndarray, head: bytes = b"") -> list[np.ndarray]:
        pieces = [head + data[a:b].tobytes() for a, b in itertools.pairwise(ends)]
        decoded = [np.asarray(Image.open(io.BytesIO(piece)).convert("RGB")) for piece in pieces]
        return [pixels.reshape(-1, 32, 32, 3) for pixels in decoded]

    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        pixels = np.concatenate(pictures(arrays["webp"], arrays["off"]))
        lossless = len(pixels)
        if "jpeg" in arrays:
            lossy = pictures(arrays["jpeg"], arrays["joff"], arrays["jhead"].tobytes())
            pixels = np.concatenate([pixels, *lossy])
        labels = torch.from_numpy(arrays["labels"]).long()
    return torch.from_numpy(pixels), labels, torch.arange(len(pixels)) < lossless


def digits() -> Images:
    """Handwritten digits, 1,797 images of 8 x 8 pixels, one channel, 17 grey levels, ten classes.

    They come with scikit-learn: the test part of the UCI set of 1998, digits of 13 writers. That part has no
    split of its own. Here, 360 images drawn once with a fixed seed are for testing; the same writers wrote
    both parts, so the test accuracy says nothing about other writers.

    Returns:
        The images, pixels from 0 to 16.

    Raises:
        DataError: scikit-learn is missing, or carries other digits than those of ``DIGITS_SHA256``.

    References:
        Alpaydin and Kaynak, Optical recognition of handwritten digits, UCI machine learning repository, 1998.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("the digits come with scikit-learn: pip install scikit-learn") from None
    loaded = load_digits()
    pixels = torch.from_numpy(loaded.images).to(torch.uint8).unsqueeze(-1)
    labels = torch.from_numpy(loaded.target).long()
    actual = _sha256(pixels, labels)
    if actual != DIGITS_SHA256:
        raise DataError(f"scikit-learn's digits: sha256 is {actual}, expected {DIGITS_SHA256}")
    train, test = hold_out(len(labels), _DIGITS_TEST)
    lossless = torch.ones(len(test), dtype=torch.bool)
    return _images("digits", pixels[train], labels[train], pixels[test], labels[test], lossless)


def _images(name, train, train_labels, test, test_labels, lossless) -> Images:
    sha256 = _sha256(train, train_labels, test, test_labels)
    return Images(name, train, train_labels, test, test_labels, lossless, sha256)


def _sha256(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.to(torch.uint8).contiguous().numpy())
    return digest.hexdigest()


def hold_out(count: int, held_out: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Split the training images once more, to choose settings without the test images.

    For CIFAR-10: ``hold_out(50_000, 5_000)``, so 45,000 to train on, as He et al. do for CIFAR-10 (section
    4.2).

    Args:
        count: Number of training images.
        held_out: How many of them are held out.
        seed: Another seed gives another split; every run that is compared takes the same.

    Returns:
        Row numbers to train on and row numbers held out, each in rising order, without a common one.

    Raises:
        ValueError: ``held_out`` is not between 1 and ``count - 1``.

    >>> [rows.tolist() for rows in hold_out(6, 2)]
    [[0, 1, 3, 4], [2, 5]]
    """
    if not 1 <= held_out < count:
        raise ValueError(f"held_out must be between 1 and {count - 1}, got {held_out}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[held_out:].sort().values, order[:held_out].sort().values


def augment(images: Tensor, generator: torch.Generator, *, pad: int = 4) -> Tensor:
    """Shift each image at random and mirror half of them.

    The image is surrounded by ``pad`` black pixels, a window of its own size is cut out at a place drawn
    uniformly, and the window is mirrored left to right with probability 1/2. Every image has draws of its
    own.

    Args:
        images: Pixels, shape (n, height, width, channels), any dtype and device.
        generator: Source of the draws, on the CPU whatever the images' device, so that a GPU sees the same
            images.
        pad: Largest shift, in pixels. 0 only mirrors.

    Returns:
        New pixels of the same shape, dtype and device.

    Raises:
        ValueError: ``pad`` is negative.

    References:
        He et al., Deep residual learning for image recognition, 2016, section 4.2.
    """
    if pad < 0:
        raise ValueError(f"pad must not be negative, got {pad}")
    n, height, width, _ = images.shape
    shift = torch.randint(2 * pad + 1, (2, n, 1), generator=generator)
    mirror = torch.randint(2, (n, 1), generator=generator).bool()
    rows = shift[0] + torch.arange(height)
    columns = shift[1] + torch.arange(width)
    columns = torch.where(mirror, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    padded = pad_with_zeros(images, (0, 0, pad, pad, pad, pad))
    index = torch.arange(n, device=images.device)
    return padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over all images and pixels.

    Computed from the counts of the grey levels, so exact up to the last rounding, whatever the number of
    images. The deviation divides by the number of pixels, not by one less.

    Args:
        images: Pixels, uint8, shape (n, height, width, channels).

    Returns:
        Mean and standard deviation, float64, shape (channels,), in grey levels.

    Raises:
        ValueError: There is no image, the dtype is not uint8, or a channel is constant and cannot be
            normalised.

    >>> channel_statistics(torch.tensor([0, 2, 4, 2], dtype=torch.uint8).view(1, 2, 2, 1))
    (tensor([2.], dtype=torch.float64), tensor([1.4142], dtype=torch.float64))
    """
    if images.dtype != torch.uint8 or images.numel() == 0:
        raise ValueError(
            f"images must be uint8 and not empty, got {images.dtype} of shape {tuple(images.shape)}"
        )
    channels = images.flatten(0, -2).unbind(-1)
    counts = torch.stack([torch.bincount(channel, minlength=256) for channel in channels]).double()
    levels = torch.arange(256, dtype=torch.float64, device=images.device)
    pixels = counts.sum(1, keepdim=True)
    mean = (counts @ levels).unsqueeze(1) / pixels
    variance = (counts * (levels - mean) ** 2).sum(1, keepdim=True) / pixels
    if not (variance > 0).all():
        raise ValueError(f"a channel is constant: the means are {mean.squeeze(1).tolist()}")
    return mean.squeeze(1), variance.sqrt().squeeze(1)


def normalise(images: Tensor, mean: Tensor, std: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Subtract each channel's mean, divide by its standard deviation, and put the channels first.

    Args:
        images: Pixels, uint8, shape (n, height, width, channels).
        mean: In grey levels, shape (channels,), of the images that are trained on.
        std: The same for the standard deviation.
        dtype: Of the result.

    Returns:
        Shape (n, channels, height, width), as convolutions want it.
    """
    mean, std = (value.to(images.device, dtype) for value in (mean, std))
    return ((images.to(dtype) - mean) / std).movedim(-1, 1).contiguous()
