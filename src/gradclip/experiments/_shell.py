"""What every experiment does around its measurement: settings, resuming, and the record."""

import contextlib
import dataclasses
import math
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from gradclip import parallel, records
from gradclip.records import Record
from gradclip.train import train

Measured = tuple[Mapping[str, np.ndarray], Mapping[str, Any], float]

# Parts of the provenance that decide the numbers, so that a record or a checkpoint with others is not reused.
_DECISIVE = (
    "python",
    "torch",
    "numpy",
    "numba",
    "cuda",
    "device_name",
    "threads",
    "processes",
    "source_sha256",
    "data_sha256",
)


def recorded(
    name: str,
    config: Any,
    out: str | Path,
    measure: Callable[[Path, Mapping[str, Any]], Measured],
    data_sha256: str | None,
    **settings: Any,
) -> Record:
    """Measure and save the record, unless a finished one is there that was made under the same conditions.

    Args:
        name: Name of the experiment.
        config: Its dataclass, with the fields ``name`` (of the profile), ``device`` and ``threads``.
        out: Folder of all records.
        measure: ``measure(partial, identity)`` returns series, scalars and seconds. It may keep checkpoints
            in the folder ``partial``, marked with ``identity``; the folder goes when the record is saved.
        data_sha256: Hash of the data that the run reads.
        **settings: What else belongs into the record's configuration.

    Returns:
        The record as read back from ``out``.

    Of several processes all measure, and the first decides whether to, saves and reads.
    """
    first = parallel.rank() == 0
    plain = _lists(dataclasses.asdict(config))
    settings = plain | settings
    with numerical_settings(config.threads):
        here = records.provenance(config.device, data_sha256=data_sha256, wall_time=0.0)
        target = records.folder(out, name, config.name, here["device"])
        partial = target.with_name(f"{target.name}.partial")
        if not parallel.from_first(_is_finished(target, settings, here) if first else None):
            # As text where nan may be inside, which is not equal to itself.
            identity = {key: value if key in plain else repr(value) for key, value in settings.items()}
            identity |= {key: here[key] for key in _DECISIVE}
            series, scalars, seconds = measure(partial, identity)
            made = records.provenance(config.device, data_sha256=data_sha256, wall_time=seconds)
            made |= {key: here[key] for key in ("source_sha256", "git_commit", "git_clean")}
            if first:
                records.save(Record(name, config.name, settings, dict(scalars), dict(series), made), out)
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        return parallel.from_first(records.load(target) if first else None)


def _lists(value: Any) -> Any:
    """The value as a record gives it back: with lists in place of tuples."""
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


def _is_finished(target: Path, settings: dict[str, Any], here: Mapping[str, Any]) -> bool:
    try:
        record = records.load(target)
    except records.RecordError:
        return False
    same = repr(record.config) == repr(settings)  # as text, because of nan
    return same and all(record.provenance.get(key) == here[key] for key in _DECISIVE)


def chosen(name: str, *configs: Any) -> Any:
    """The configuration of this name; raises ValueError naming the choices if there is none."""
    profiles = {config.name: config for config in configs}
    if name not in profiles:
        raise ValueError(f"profile must be one of {tuple(profiles)}, got {name!r}")
    return profiles[name]


@contextlib.contextmanager
def numerical_settings(threads: int) -> Iterator[None]:
    """Numerical settings of a run, put back at the end.

    A fixed number of threads; flushed denormals, which slow an LSTM down on a CPU; and on a GPU full float32,
    because the 1e-3 by which TF32 rounds would drown the gradient's change over a hundredth of a step.
    """
    before = torch.get_num_threads()
    # There is no getter: 2⁻¹⁴⁰ is denormal in float32, and comes out as zero where denormals are flushed.
    flushed = (torch.tensor(2.0**-100) * torch.tensor(2.0**-40)).item() == 0.0
    precision = torch.get_float32_matmul_precision()
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_flush_denormal(flushed)
        torch.set_num_threads(before)


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """TF32 in the matrix products of a GPU, within :func:`numerical_settings`, and put back at the end.

    For training of which losses are recorded and no smoothness: it is several times as fast, and rounds to
    1e-3 what the noise of a batch changes by far more.

    Args:
        allowed: Without it nothing changes.
    """
    if not allowed:
        yield
        return
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=True):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def run_tasks(
    tasks: Sequence[Callable[[], Any]],
    *,
    checkpoint: Path,
    identity: Mapping[str, Any],
    label: str,
    workers: int = 1,
    threads: int = 1,
) -> tuple[list[Any], float]:
    """Call the tasks, going on behind the last finished one after an interruption.

    Of R processes (:mod:`gradclip.parallel`), process r takes tasks r, r + R, ..., each of which runs as if
    there were no other process: the numbers are those of one. Every process keeps a checkpoint of its own.
    At the end all have all results; one that is ready earlier waits for the last.

    Args:
        tasks: Callables without arguments, the same on all processes; what they return must be tensors,
            plain values and containers of these. Each must make its own generators, so that it does not
            matter which ran before. With more than one worker they must be picklable.
        checkpoint: As for :func:`gradclip.train.train`; so are ``identity`` and ``label``. Of several
            processes each adds its number to the name.
        workers: Tasks at a time. With one, they run here, one after the other; with more, each worker is a
            process with the numerical settings of the experiments, on the same GPU as this one.
        threads: CPU threads of a worker.

    Returns:
        What the tasks returned, in order, and the seconds they took; of several processes, the longest time.
    """
    rank, size = parallel.rank(), parallel.size()
    if size > 1:
        checkpoint = checkpoint.with_stem(f"{checkpoint.stem}-{rank}")
        label = f"{label} (process {rank} of {size})"
    own = tasks[rank::size]
    with parallel.alone(), _pool(workers, threads) as pool:
        work = _Tasks(own, pool)
        seconds = 0.0
        if own or size == 1:
            result = train(
                work, len(own), checkpoint=checkpoint, identity=identity, label=label, interval=0.0
            )
            seconds = result.seconds
    parts = parallel.gathered((work.done, seconds))
    results = [parts[i % size][0][i // size] for i in range(len(tasks))]
    return results, max(seconds for _, seconds in parts)


@contextlib.contextmanager
def _pool(workers: int, threads: int) -> Iterator[ProcessPoolExecutor | None]:
    if workers == 1:
        yield None
        return
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    # A forked process cannot use the GPU that its parent has used.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_settle, initargs=(threads, gpu))
    others = set(multiprocessing.active_children())
    try:
        yield pool
    except BaseException:
        # What the other workers are at would be lost, and may take hours.
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_settled = contextlib.ExitStack()


def _settle(threads: int, gpu: int | None) -> None:
    """Enter the numerical settings for the rest of a worker's life."""
    if gpu is not None:
        torch.cuda.set_device(gpu)
    _settled.enter_context(numerical_settings(threads))


class _Tasks:
    """A run, as :func:`gradclip.train.train` wants it, whose steps are the tasks."""

    def __init__(self, tasks: Sequence[Callable[[], Any]], pool: ProcessPoolExecutor | None = None) -> None:
        self.tasks, self.pool = tasks, pool
        self.done: list[Any] = []
        self.ahead: dict[int, Future] = {}

    def step(self, iteration: int) -> dict[str, float]:
        if self.pool is None:
            result = self.tasks[iteration]()
        else:
            if not self.ahead:  # at the start, which may be behind a checkpoint
                waiting = range(iteration, len(self.tasks))
                self.ahead = {i: self.pool.submit(self.tasks[i]) for i in waiting}
            result = self.ahead.pop(iteration).result()
        self.done.append(result)
        return {"task": iteration}

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.done = list(state["done"])


def paired(differences: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of differences between two methods seed by seed, and Student's interval around it.

    Args:
        differences: One per seed, two or more.
        level: Confidence.

    Returns:
        Mean, lower end, upper end; an interval of nan if a difference is not finite.

    >>> [round(value, 3) for value in paired(np.array([0.1, 0.2, 0.4]))]
    [0.233, -0.146, 0.613]
    """
    n = len(differences)
    with np.errstate(invalid="ignore"):
        mean = float(np.mean(differences))
        spread = float(np.std(differences, ddof=1) / math.sqrt(n))
    span = float(stats.t.ppf((1 + level) / 2, n - 1)) * spread
    return mean, mean - span, mean + span


def with_range(scalars: Mapping[str, Any], key: str, form: str) -> str:
    """A scalar as a cell of a table, with its range over seeds in brackets."""
    value, low, high = (scalars[f"{key}{end}"] for end in ("", "_min", "_max"))
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def html_table(head: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A table for a notebook: titles of the columns, and the cells of each row behind its label."""
    titles = "".join(f"<th>{title}</th>" for title in head)
    body = "\n".join(
        f"<tr><th>{label}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for label, cells in rows.items()
    )
    return f"<table class='dataframe'>\n<thead><tr>{titles}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
