"""Real data, checked against recorded hashes before it is used."""

import hashlib
import os
from pathlib import Path


class DataError(Exception):
    """A data file is missing, or is not the file it should be."""


def data_folder(name: str) -> Path:
    """The folder of one data set: ``name`` below ``GRADCLIP_DATA_DIR``, or below the user's cache folder.

    Nothing is searched: where the variable is set, the cache is not looked at.

    Args:
        name: ``"ptb"`` or ``"cifar10"``.

    Returns:
        The path, whether it exists or not. The cache is ``pooch.os_cache("gradclip")``, which on Linux is
        ``~/.cache/gradclip``.

    Raises:
        DataError: The variable is not set, and pooch, which knows the cache folder, is not installed.
    """
    root = os.environ.get("GRADCLIP_DATA_DIR")
    if not root:
        try:
            import pooch
        except ImportError:
            raise DataError(
                f"set GRADCLIP_DATA_DIR to the folder that holds {name}/, or install pooch"
            ) from None
        root = pooch.os_cache("gradclip")
    return Path(root) / name


def read_checked(path: Path, sha256: str) -> bytes:
    """The content of a file, if it is the right one.

    Args:
        path: The file.
        sha256: SHA-256 that the content must have, in hexadecimal.

    Returns:
        The whole content.

    Raises:
        DataError: The file cannot be read or has another hash; the message names the path and the hashes.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; it should have sha256 {sha256}; `python -m gradclip fetch` downloads the "
            "public data sets, and GRADCLIP_DATA_DIR names the folder of local copies"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; it should have sha256 {sha256}") from None
    actual = hashlib.sha256(content).hexdigest()
    if actual != sha256:
        raise DataError(f"{path}: sha256 is {actual}, expected {sha256}; it has {len(content)} bytes")
    return content
