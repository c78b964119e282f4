"""The command line: ``python -m gradclip list``, ``run NAME --profile P --out DIR``, ``fetch NAME ...``."""

import dataclasses
import importlib
from pathlib import Path
from typing import Annotated

import torch
import typer

from gradclip import experiments, parallel, records
from gradclip.data import DataError, fetch

PROFILES = ("smoke", "cpu", "short", "paper")

app = typer.Typer(
    help="Run the experiments of the book.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command("list")
def list_experiments() -> None:
    """List the experiments."""
    for name in experiments.names():
        summary = (_module(name).__doc__ or "").strip().splitlines()[0]
        typer.echo(f"{name:20} {summary}")


@app.command()
def run(
    name: Annotated[str, typer.Argument(help="The experiment; see `list`.")],
    profile: Annotated[str, typer.Option(help=f"One of {', '.join(PROFILES)}.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of the records.")] = Path("results"),
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default the profile decides.")] = None,
) -> None:
    """Run an experiment and save its record.

    A run that was stopped goes on where it was; one that is finished and current is not run again. Behind
    `torchrun --nproc-per-node N -m`, several processes share the runs of an experiment, or every batch of
    language-model; an experiment with nothing to share refuses.
    """
    if name not in experiments.names():
        raise typer.BadParameter(f"no experiment {name!r}; choose from: {', '.join(experiments.names())}")
    if profile not in PROFILES:
        raise typer.BadParameter(f"no profile {profile!r}; choose from: {', '.join(PROFILES)}")
    module = _module(name)
    try:
        config = module.Config.profile(profile)
    except ValueError as error:  # not every experiment has data for a short run at the paper's setting
        raise typer.BadParameter(str(error)) from None
    if device is not None:
        if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
            here = "cpu, cuda" if torch.cuda.is_available() else "cpu"
            raise typer.BadParameter(f"no device {device!r}; choose from: {here}")
        config = dataclasses.replace(config, device=device)
    if parallel.requested() > 1 and experiments.shared(module) is None:
        raise typer.BadParameter(
            f"{name} cannot share its work among {parallel.requested()} processes; run it without torchrun"
        )
    try:
        with parallel.joined(config.device):
            record = module.run(config, out)
    except (DataError, parallel.ParallelError) as error:
        typer.echo(f"Error: {error}", err=True)  # every process: it may be one's own
        raise typer.Exit(1) from None
    if parallel.requested_rank() == 0:
        typer.echo(records.folder(out, record.experiment, record.profile, record.provenance["device"]))


@app.command("fetch")
def fetch_data(
    names: Annotated[list[str], typer.Argument(help=f"Data sets: {', '.join(fetch.NAMES)}.")],
) -> None:
    """Download public data sets and check them.

    They go to the folder that GRADCLIP_DATA_DIR names, or else to the user's cache folder. What is there and
    right is not downloaded again; a download that was stopped goes on where it was.
    """
    for name in names:
        if name not in fetch.NAMES:
            raise typer.BadParameter(f"no data set {name!r}; choose from: {', '.join(fetch.NAMES)}")
    for name in names:
        try:
            folder = fetch.fetch(name)
        except DataError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from None
        typer.echo(folder)


def _module(name: str):
    return importlib.import_module(f"{experiments.__name__}.{name.replace('-', '_')}")


if __name__ == "__main__":
    app(prog_name="python -m gradclip")
