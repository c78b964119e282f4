"""One training loop for every experiment: progress, checkpoints, and resuming to the same bits.

The loop knows nothing about models. An experiment gives it an object with a ``step`` and a state; the loop
calls ``step``, shows how far it is, and saves the state so often that a killed run loses seconds, not hours.
On one device with one number of threads, a run that was killed and started again gives bitwise the same
series as one that was not, if its operations are deterministic: on the CPU they are, on CUDA some are not.
"""

import hashlib
import io
import pickle
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from gradclip import parallel
from gradclip.records import write_atomically

# What reading a file that is not a checkpoint, or not a whole one, can raise.
_UNREADABLE = (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, pickle.UnpicklingError)


class Run(Protocol):
    """What :func:`train` needs: everything that changes from step to step is inside ``state_dict``."""

    def step(self, iteration: int) -> Mapping[str, float]:
        """Do one step and return its row of the series; every step returns the same keys."""

    def state_dict(self) -> dict[str, Any]:
        """Parameters, optimizer, hidden state, generators: tensors, plain values and containers of these."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put a state back."""


@dataclass(frozen=True)
class Result:
    """What a finished run leaves.

    Args:
        series: Column name to one value per step.
        seconds: Time spent in steps, before and after an interruption together.
    """

    series: dict[str, list[float]]
    seconds: float


def train(
    run: Run,
    steps: int,
    *,
    checkpoint: str | Path,
    identity: Mapping[str, Any],
    label: str = "",
    interval: float = 15.0,
) -> Result:
    """Call ``run.step`` for iterations 0 to ``steps`` - 1, going on from a checkpoint if there is one.

    A checkpoint is written to a temporary name and renamed, so a kill at any moment leaves the last whole
    one. It is written after the last step as well, and stays until the caller has stored the result.
    The states of torch's global generators are in it.

    Of several processes (:mod:`gradclip.parallel`) the first reads and writes the file and shows the bar. All
    of them ask their run for its state, which must be the same on each: the state of the whole batch. A bar
    within that of another training vanishes at its end.

    Args:
        run: The experiment, freshly made.
        steps: Number of steps in all.
        checkpoint: File of the checkpoint.
        identity: What makes this run this run: configuration, seed, hashes of source and data. A checkpoint
            with another identity is never used.
        label: Name in the progress bar, which goes to stderr.
        interval: Least number of seconds between two checkpoints.

    Returns:
        The series and the time it took.

    Raises:
        ValueError: ``steps`` is less than 1.

    Warns:
        UserWarning: A checkpoint is ignored because it is damaged, has more steps than asked for, or belongs
            to another run; says which part of the identity differs.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    path = Path(checkpoint)
    rows: list[Mapping[str, float]] = []
    seconds = 0.0
    first = parallel.rank() == 0
    saved = parallel.from_first(_read(path, dict(identity), steps) if first else None)
    if saved is not None:
        rows, seconds = saved["rows"], saved["seconds"]
        run.load_state_dict(saved["state"])
        torch.set_rng_state(saved["rng"])
        if saved["cuda_rng"]:
            torch.cuda.set_rng_state_all(saved["cuda_rng"])

    def save() -> None:
        content = {
            "identity": dict(identity),
            "rows": rows,
            "seconds": seconds,
            "state": run.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        }
        if not first:
            return
        buffer = io.BytesIO()
        torch.save(content, buffer)
        payload = buffer.getvalue()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, hashlib.sha256(payload).digest() + payload)

    # A log file gets a line every ten seconds; a terminal gets a moving bar.
    pause = 0.2 if sys.stderr.isatty() else 10.0
    last_save = time.monotonic()
    with tqdm(
        total=steps,
        initial=len(rows),
        desc=label,
        unit="step",
        mininterval=pause,
        leave=None,  # only a bar of its own, not one within another
        disable=not parallel.shows_progress(),
    ) as bar:
        for iteration in range(len(rows), steps):
            start = time.monotonic()
            row = dict(run.step(iteration))
            seconds += time.monotonic() - start
            rows.append(row)
            if "loss" in row:
                bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
            bar.update()
            due = time.monotonic() - last_save >= interval or iteration == steps - 1
            if parallel.from_first(due):  # by one clock, because all must save at the same step
                save()
                last_save = time.monotonic()
    return Result({name: [row[name] for row in rows] for name in rows[0]}, seconds)


def _read(path: Path, identity: dict[str, Any], steps: int) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        data = path.read_bytes()
        digest, payload = data[:32], data[32:]
        # A flipped bit in a tensor would load without complaint, and the run go on to other numbers.
        if hashlib.sha256(payload).digest() != digest:
            raise ValueError("its hash does not fit")
        # weights_only: a checkpoint holds tensors and plain values, and nothing in it can run code.
        saved = torch.load(io.BytesIO(payload), weights_only=True, map_location="cpu")
        if not isinstance(saved, dict):
            raise TypeError(f"it holds a {type(saved).__name__}")
        found, rows = dict(saved["identity"]), len(saved["rows"])
    except (
        OSError,
        RuntimeError,
        EOFError,
        LookupError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:
        warnings.warn(
            f"ignoring checkpoint {path}: unreadable ({type(error).__name__}); starting over", stacklevel=3
        )
        return None
    differing = sorted(
        key for key in {*identity, *found} if identity.get(key, "absent") != found.get(key, "absent")
    )
    if differing:
        was = ", ".join(
            f"{key}={found.get(key, 'absent')!r} instead of {identity.get(key, 'absent')!r}"
            for key in differing
        )
        return _ignore(path, f"it belongs to another run, with {was}")
    if rows > steps:
        return _ignore(path, f"it has {rows} steps, more than the {steps} asked for")
    return saved


def _ignore(path: Path, reason: str) -> None:
    warnings.warn(f"ignoring checkpoint {path}: {reason}; starting over", stacklevel=4)
