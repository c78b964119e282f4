"""Records: the result of a run together with everything needed to say where it came from.

A record is a folder ``out/<experiment>/<profile>-<device>/`` with two text files. ``series.csv`` has one row
per logged step. ``record.json`` has the configuration, the scalars that prose and claims quote, and the
provenance. ``record.json`` is written last and holds the SHA-256 of ``series.csv`` and of its own content, so
a write that was killed half-way, a file edited by hand or a mixture of two runs is refused by :func:`load`,
and never quoted.

Numbers round-trip exactly: floats are written as their shortest ``repr``. JSON has no NaN or infinities, so
in ``record.json`` these three are the strings ``"nan"``, ``"inf"`` and ``"-inf"``, which :func:`load` turns
back into floats; a string with one of these values is refused by :func:`save`.
"""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradclip import norms, parallel

FORMAT = 1
_PACKAGE = Path(__file__).resolve().parent
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


# A temporary file this old, in seconds, was left behind by a writer that was killed.
_STALE = 24 * 3600


class RecordError(Exception):
    """A record is missing, damaged, or is not what its hashes say it is."""


@dataclass(frozen=True, eq=False)
class Record:
    """One finished run.

    Args:
        experiment: Name of the experiment, lower case with hyphens, such as ``"language-model"``.
        profile: ``"smoke"``, ``"cpu"`` or ``"paper"``.
        config: The complete configuration: strings, numbers, booleans, None, and lists and dicts of these.
        scalars: Dotted key to number, string, boolean or None; what prose and claims quote.
        series: Column name to a one-dimensional column; all columns have the same length. Columns become
            numpy arrays of dtype bool, int64, float64 or str (without line breaks).
        provenance: See :func:`provenance`. ``provenance["device"]`` is a part of the folder's name.

    Raises:
        ValueError: A name, a scalar or a column is not of the kind described above.
    """

    experiment: str
    profile: str
    config: dict[str, Any]
    scalars: dict[str, float | int | str | bool | None]
    series: dict[str, np.ndarray]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, name in (("experiment", self.experiment), ("profile", self.profile)):
            if not _SLUG.fullmatch(name):
                raise ValueError(f"{what} must be lower-case words joined by hyphens, got {name!r}")
        for key, value in self.scalars.items():
            if not isinstance(value, float | int | str | bool | None):
                raise ValueError(f"scalar {key!r} must be a number, string, bool or None, got {type(value)}")
        columns = {name: _column(name, values) for name, values in self.series.items()}
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns must have one length, got {lengths}")
        object.__setattr__(self, "series", columns)


def _column(name: str, values: Any) -> np.ndarray:
    if not isinstance(name, str) or "\n" in name or "\r" in name:
        raise ValueError(f"a column's name must be a string without line breaks, got {name!r}")
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"column {name!r} must have one dimension, got shape {array.shape}")
    kinds = {"b": np.bool_, "i": np.int64, "u": np.int64, "f": np.float64, "U": np.str_}
    if array.dtype.kind not in kinds:
        raise ValueError(f"column {name!r} must hold booleans, numbers or strings, got dtype {array.dtype}")
    if array.dtype.kind == "U" and any("\n" in text or "\r" in text for text in array.tolist()):
        raise ValueError(f"column {name!r} must not hold line breaks, which text files cannot keep apart")
    column = array.astype(kinds[array.dtype.kind])
    # numpy turns mixed lists into strings, wide integers into floats or wraps them, and drops trailing NULs.
    for kept, given in zip(column.tolist(), list(values), strict=True):
        same_kind = isinstance(kept, bool) == isinstance(given, bool | np.bool_)
        if not (same_kind and (kept == given or (kept != kept and given != given))):
            raise ValueError(f"column {name!r} cannot hold {given!r} unchanged, it would become {kept!r}")
    return column


def source_hash() -> str:
    """SHA-256 of the source of the library: every ``.py`` file of the package, sorted by path.

    Path names are a part of it, and line ends are normalised, so a checkout on Windows has the same hash.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    paths = {path.relative_to(_PACKAGE).as_posix(): path for path in _PACKAGE.rglob("*.py")}
    for name in sorted(paths):
        source = _normalise(paths[name].read_bytes())
        # Lengths, so that no text can move from one file to the next without changing the hash.
        digest.update(f"{name}\n{len(source)}\n".encode())
        digest.update(source)
    return digest.hexdigest()


def is_current(record: Record) -> bool:
    """Whether the record was made by the library's source as it is today."""
    return record.provenance.get("source_sha256") == source_hash()


def device_slug(device: torch.device | str) -> str:
    """Short name of a device for folder names: ``"cpu"``, or the GPU's model such as ``"h200"``.

    >>> device_slug("cpu")
    'cpu'
    """
    device = torch.device(device)
    if device.type != "cuda":
        return device.type
    return _gpu_slug(torch.cuda.get_device_name(device))


def _gpu_slug(name: str) -> str:
    # "NVIDIA H100 80GB HBM3" and "NVIDIA H100 PCIe" are told apart by provenance["device_name"].
    name = re.sub(r"nvidia|tesla|\d+ ?gb.*|pcie.*", "", name.lower())
    return "-".join(re.findall(r"[a-z0-9]+", name)) or "cuda"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        models = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        models = []
    return models[0] if models else platform.processor() or platform.machine()


def _git() -> tuple[str | None, bool | None]:
    """Commit of the checkout that the library runs from and whether its tracked files are unchanged."""

    def git(*arguments: str) -> str:
        # A git hook exports GIT_DIR and GIT_INDEX_FILE, which would point at the hook's repository.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
        command = ["git", "-C", str(_PACKAGE), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return done.stdout.strip()

    try:
        # An installed copy may lie inside somebody else's repository, which does not track it.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        # As in `git describe --dirty`, untracked files do not count; source_sha256 covers untracked source.
        return git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no") == ""
    except (OSError, subprocess.CalledProcessError):
        return None, None


def provenance(device: torch.device | str, *, data_sha256: str | None, wall_time: float) -> dict[str, Any]:
    """Where a result comes from.

    Source may be edited while a long run goes on: what a run was made by is what this says at its beginning.

    Args:
        device: The device that the run computed on.
        data_sha256: SHA-256 of the data that the run read, None if it read none.
        wall_time: Duration of the run in seconds, over all its parts when it was interrupted.

    Returns:
        A dict with the keys ``python``, ``torch``, ``numpy``, ``numba``, ``cuda`` (versions; the last two are
        None where the library does without), ``device`` (see :func:`device_slug`), ``device_name``,
        ``threads``, ``processes``, ``git_commit``, ``git_clean`` (both None outside a checkout),
        ``source_sha256``, ``data_sha256``, ``wall_time_s`` and ``finished`` (UTC, ISO 8601). :func:`save`
        adds ``series_sha256``.
    """
    device = torch.device(device)
    commit, clean = _git()
    kernels = norms.compiled()
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a subclass of str, which a checkpoint could not hold
        "numpy": np.__version__,
        "numba": kernels.numba.__version__ if kernels else None,
        "cuda": torch.version.cuda,
        "device": device_slug(device),
        "device_name": _device_name(device),
        "threads": torch.get_num_threads(),
        "processes": parallel.size(),
        "git_commit": commit,
        "git_clean": clean,
        "source_sha256": source_hash(),
        "data_sha256": data_sha256,
        "wall_time_s": wall_time,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def folder(out: str | Path, experiment: str, profile: str, device: str) -> Path:
    """Folder of a record; ``device`` is a slug.

    >>> folder("results", "language-model", "cpu", "cpu").as_posix()
    'results/language-model/cpu-cpu'
    """
    return Path(out) / experiment / f"{profile}-{device}"


def save(record: Record, out: str | Path) -> Path:
    """Write a record below ``out``, replacing an older one of the same experiment, profile and device.

    Args:
        record: The record.
        out: Folder of all records, such as ``results``.

    Returns:
        The record's folder, ``out/<experiment>/<profile>-<device>``.

    Raises:
        ValueError: The provenance names no device, or a value cannot be stored and read back unchanged.
    """
    device = record.provenance.get("device")
    if not isinstance(device, str) or not _SLUG.fullmatch(device):
        raise ValueError(f"provenance['device'] must be a slug such as 'cpu', got {device!r}")
    series = _to_csv(record.series)
    content = {
        "format": FORMAT,
        "experiment": record.experiment,
        "profile": record.profile,
        "config": record.config,
        "scalars": record.scalars,
        "columns": {name: values.dtype.kind for name, values in record.series.items()},
        "provenance": {**record.provenance, "series_sha256": _sha256(series)},
    }
    content = _encode(content, "record")
    content["sha256"] = _content_sha256(content)
    target = folder(out, record.experiment, record.profile, device)
    target.mkdir(parents=True, exist_ok=True)
    # The series goes first: between the two renames an old record.json meets a new series and is refused.
    write_atomically(target / "series.csv", series)
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(target / "record.json", text.encode())
    return target


def load(path: str | Path) -> Record:
    """Read a record and check it against its hashes.

    Args:
        path: The record's folder, or its ``record.json``.

    Returns:
        The record, equal to the one that was saved.

    Raises:
        RecordError: A file is missing or unreadable, or a hash is not the recorded one; the message names the
            file and both hashes.
    """
    path = Path(path)
    if path.name == "record.json":
        path = path.parent
    json_path, csv_path = path / "record.json", path / "series.csv"
    try:
        content = json.loads(json_path.read_bytes(), parse_constant=_refuse_constant)
        series = _normalise(csv_path.read_bytes())
    except FileNotFoundError as error:
        raise RecordError(f"{error.filename}: no such file; the record is missing or incomplete") from None
    except OSError as error:
        raise RecordError(f"{error.filename}: {error.strerror}; the record cannot be read") from None
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{json_path}: not valid JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise RecordError(f"{json_path}: format must be {FORMAT}, got {found!r}")
    claimed = content.pop("sha256", None)
    actual = _content_sha256(content)
    if claimed != actual:
        raise RecordError(f"{json_path}: content has sha256 {actual}, but the file says {claimed}")
    content = _decode(content)
    try:
        claimed, actual = content["provenance"]["series_sha256"], _sha256(series)
        if claimed != actual:
            raise RecordError(f"{csv_path}: sha256 is {actual}, but record.json says {claimed}")
        return Record(
            experiment=content["experiment"],
            profile=content["profile"],
            config=content["config"],
            scalars=content["scalars"],
            series=_from_csv(series, content["columns"]),
            provenance=content["provenance"],
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RecordError(f"{json_path}: not a whole record: {type(error).__name__}: {error}") from None


def found(out: str | Path, experiment: str) -> dict[str, Record]:
    """All records of an experiment in a folder.

    Args:
        out: Folder of all records, as ``results``.
        experiment: Name of the experiment.

    Returns:
        ``PROFILE-DEVICE``, as the records' folders are named, to the record, in alphabetical order.

    Raises:
        RecordError: One of them is damaged.
    """
    files = sorted((Path(out) / experiment).glob("*/record.json"))
    return {file.parent.name: load(file.parent) for file in files}


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a name of its own and rename: ``path`` is never seen half-written, not with many writers."""
    for left in path.parent.glob(f".{path.name}.*.partial"):
        with contextlib.suppress(OSError):  # another writer may have been faster
            if time.time() - left.stat().st_mtime > _STALE:
                left.unlink()
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", suffix=".partial", delete=False
    ) as file:
        temporary = Path(file.name)
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            # Temporary files are private; a record is as readable as any file that this process makes.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _normalise(data: bytes) -> bytes:
    return data.replace(b"\r\n", b"\n")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _content_sha256(content: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())


def _encode(value: Any, where: str) -> Any:
    if isinstance(value, bool | int | None):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, str):
        if value in _NON_FINITE:
            raise ValueError(f"{where} is the string {value!r}, which stands for a float in a record")
        return str(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}; keys must be strings")
        return {key: _encode(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise ValueError(f"{where} has type {type(value).__name__}, which a record cannot hold")


def _decode(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return value


def _to_csv(series: Mapping[str, np.ndarray]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(series)
    # tolist() gives Python floats, which csv writes as their shortest repr that reads back to the same bits.
    writer.writerows(zip(*(values.tolist() for values in series.values()), strict=True))
    return text.getvalue().encode()


def _from_csv(data: bytes, kinds: Mapping[str, str]) -> dict[str, np.ndarray]:
    rows = list(csv.reader(io.StringIO(data.decode(), newline="")))
    columns = list(zip(*rows[1:], strict=True)) or [()] * len(kinds)
    read = {
        "b": lambda values: np.array([value == "True" for value in values], dtype=np.bool_),
        "i": lambda values: np.array([int(value) for value in values], dtype=np.int64),
        "f": lambda values: np.array([float(value) for value in values], dtype=np.float64),
        "U": lambda values: np.array(values, dtype=np.str_),
    }
    return {name: read[kinds[name]](values) for name, values in zip(rows[0], columns, strict=True)}
