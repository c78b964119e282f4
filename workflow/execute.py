"""Execute one notebook with papermill, so that a later step can trust whatever it finds.

    python workflow/execute.py notebooks/NN_name.ipynb _build/notebooks/NN_name.ipynb -p profile=cpu

The committed notebook is never written to. The executed copy appears under its final name only when every
cell has run; a notebook that failed is kept, with its traceback, in ``_build/failed/``, beside a text that
`make` repeats at its end.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

import nbformat
import papermill
import yaml
from papermill.exceptions import PapermillExecutionError

# IPython colours its tracebacks for a terminal.
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class UnknownParameter(ValueError):
    """A parameter was passed that the notebook's ``parameters`` cell does not set."""


def check_parameters(notebook: Path, parameters: dict) -> None:
    """Papermill only warns about an unknown parameter, and runs with the default: reject it first."""
    known = papermill.inspect_notebook(str(notebook))
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise UnknownParameter(
            f"{notebook}: unknown parameter {', '.join(unknown)}; it has {', '.join(known) or 'none'}"
        )


class ProgressLines:
    """A file for tqdm that writes one line per update: parallel bars would overwrite each other."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()


def is_unfinished(cell: nbformat.NotebookNode) -> bool:
    """Whether a cell failed, or was running when its kernel died: papermill calls the latter completed."""
    run = cell.metadata.get("papermill", {})
    # A kernel can die before it has said that it is busy, so what counts is that it never became idle again.
    idle = "iopub.status.idle" in cell.metadata.get("execution", {})
    return run.get("status") in ("failed", "running") or (
        cell.cell_type == "code" and run.get("start_time") is not None and not idle
    )


def failure_message(notebook: Path, kept: Path, error: Exception) -> str:
    """Which notebook, which cell (counted as in the committed file) and which error, on the last line."""
    ids = [cell.id for cell in nbformat.read(notebook, as_version=4).cells]
    # papermill adds a cell with the parameters; the committed cells keep their ids.
    cells = nbformat.read(kept, as_version=4).cells if kept.is_file() else []
    unfinished = [ids.index(cell.id) + 1 for cell in cells if cell.id in ids and is_unfinished(cell)]
    where = f"cell {unfinished[0]} of {len(ids)}" if unfinished else "outside its cells"
    if isinstance(error, PapermillExecutionError):
        told = f"{error.ename}: {ANSI.sub('', error.evalue)}"
    else:  # the kernel was killed or could not start
        told = f"{type(error).__name__}: {error}"
    return f"executed copy: {kept}\n{notebook}, {where}: {' '.join(told.split())}"


def clean(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Drop what differs between two runs of the same notebook, and hide the cell that papermill adds."""
    nb.metadata.pop("papermill", None)
    for cell in nb.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        tags = cell.metadata.get("tags", [])
        if "injected-parameters" in tags:
            cell.metadata["tags"] = [*tags, "remove-cell"]
            cell["id"] = "injected-parameters"
    return nb


def execute(notebook: Path, output: Path, parameters: dict) -> None:
    """Run ``notebook`` in its own folder and put the executed copy at ``output``."""
    check_parameters(notebook, parameters)
    build = output.parent.parent
    running = build / "running" / notebook.name
    failed = build / "failed" / notebook.name
    told = failed.with_suffix(".txt")
    for path in (running, failed, output):
        path.parent.mkdir(parents=True, exist_ok=True)
    for path in (running, failed, told):
        path.unlink(missing_ok=True)  # of an earlier run
    try:
        papermill.execute_notebook(
            str(notebook),
            str(running),
            parameters=parameters,
            kernel_name="python3",
            cwd=str(notebook.parent),
            # The kernel's own remarks on its transport and its shutdown would drown the progress.
            extra_arguments=["--log-level=CRITICAL"],
            progress_bar={
                "desc": notebook.stem,
                "file": ProgressLines(),
                "bar_format": "{desc}: cell {n_fmt} of {total_fmt}, {elapsed}",
                "mininterval": 1,
                "leave": True,
            },
        )
    except Exception as error:
        if running.is_file():
            os.replace(running, failed)
        message = failure_message(notebook, failed, error)
        told.write_text(message + "\n", encoding="utf-8")
        sys.exit(message)
    nbformat.write(clean(nbformat.read(running, as_version=4)), running)
    os.replace(running, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE")
    arguments = parser.parse_args()
    parameters = {}
    for pair in arguments.parameter:
        name, equals, value = pair.partition("=")
        if not equals:
            parser.error(f"a parameter is NAME=VALUE, got {pair!r}")
        parameters[name] = yaml.safe_load(value)
    try:
        execute(arguments.notebook, arguments.output, parameters)
    except UnknownParameter as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
