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


def failure_message(notebook: Path, kept: Path, error: PapermillExecutionError) -> str:
    """Which notebook, which cell (counted as in the committed file) and which error, the last line last."""
    ids = [cell.id for cell in nbformat.read(notebook, as_version=4).cells]
    failed = next(
        (
            cell.id
            for cell in nbformat.read(kept, as_version=4).cells
            if any(output.output_type == "error" for output in cell.get("outputs", ()))
        ),
        None,
    )
    # papermill adds a cell with the parameters, so its own count is one too high below that cell.
    where = (
        f"cell {ids.index(failed) + 1} of {len(ids)}" if failed in ids else f"cell In [{error.exec_count}]"
    )
    error_text = ANSI.sub("", error.evalue)
    return f"executed copy with the traceback: {kept}\n{notebook}, {where}: {error.ename}: {error_text}"


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
    try:
        papermill.execute_notebook(
            str(notebook),
            str(running),
            parameters=parameters,
            kernel_name="python3",
            cwd=str(notebook.parent),
            request_save_on_cell_execute=False,
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
    except PapermillExecutionError as error:
        os.replace(running, failed)
        message = failure_message(notebook, failed, error)
        told.write_text(message + "\n", encoding="utf-8")
        sys.exit(message)
    nbformat.write(clean(nbformat.read(running, as_version=4)), running)
    os.replace(running, output)
    failed.unlink(missing_ok=True)
    told.unlink(missing_ok=True)


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
