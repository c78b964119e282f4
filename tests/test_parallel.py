import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from gradclip import experiments, parallel, records
from gradclip.__main__ import _module, app
from gradclip.data import text
from gradclip.experiments import image_classifier, language_model
from gradclip.experiments.image_classifier import Cell

SCRIPT = Path(__file__).with_name("shared_loss.py")
TRAINING = Path(__file__).with_name("shared_training.py")
RUNS = Path(__file__).with_name("shared_runs.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start(*arguments):
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )


def finish(*processes):
    """Outputs and errors of processes that must succeed."""
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return outputs


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one process with the whole batch finds, and two with a half each."""
    one, two = (tmp_path_factory.mktemp("shared") / f"{n}.json" for n in (1, 2))
    finish(start(SCRIPT, one), start(*TORCHRUN, SCRIPT, two))
    return [json.loads(path.read_text()) for path in (one, two)]


@pytest.mark.parametrize("model", ["lstm", "awd"])
@pytest.mark.parametrize(
    "what", ["loss", "gradient", "grad", "product", "third", "path", "directional", "hessian_norm", "after"]
)
def test_two_processes_measure_what_one_does(found, model, what):
    one, two = (np.atleast_1d(result[model][what]) for result in found)
    # The same sums over streams in two halves: less than a thousand float64 roundings of the largest element.
    np.testing.assert_allclose(two, one, rtol=0, atol=1e3 * 2**-53 * np.abs(one).max())


def test_all_processes_find_the_same_bits(found):
    assert [result["size"] for result in found] == [1, 2]
    assert found[1]["same"]


def test_shares_are_columns_and_fit_together_again(found):
    assert found[1]["own"] == [[0.0, 1.0, 2.0], [6.0, 7.0, 8.0]]
    assert found[1]["round_trip"]
    assert found[1]["from_first"] == {"rank": 0}
    assert found[1]["error"] == "a batch must be a multiple of the number of processes, 2, got 7"


def test_one_process_changes_nothing(found):
    assert found[0]["error"] is None
    x = torch.ones(3, requires_grad=True)
    assert parallel.mean(x) is x
    assert parallel.own(x, 0) is x
    assert parallel.whole(x, 0) is x
    parallel.average_gradients([x])
    assert not x._backward_hooks
    assert (parallel.rank(), parallel.size(), parallel.requested()) == (0, 1, 1)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Folders of the smoke record of two processes and of one, and what the former printed."""
    two, one = (tmp_path_factory.mktemp(name) for name in ("two", "one"))
    arguments = ("gradclip", "run", "language-model", "--profile", "smoke", "--out")
    together, _ = finish(start(*TORCHRUN, "-m", *arguments, two), start("-m", *arguments, one))
    return two, one, together


def test_a_training_on_two_processes_is_that_on_one(smoke):
    two, one, _ = smoke
    together, alone = (records.load(out / "language-model" / "smoke-cpu") for out in (two, one))
    assert together.series.keys() == alone.series.keys()
    assert np.array_equal(together.series["setting"], alone.series["setting"])
    for name in alone.series.keys() - {"setting"}:
        # Sums in float32 differ by 1e-7, training carries the difference on for twelve steps, and over a
        # hundredth of the step the gradient changes by some hundredth of itself, which it is compared with.
        # The norm of the Hessian is known to 1 %, but both stop after the same product.
        tolerance = 1e-3 if name in ("local", "fixed", "hessian_norm") else 1e-4
        np.testing.assert_allclose(
            together.series[name], alone.series[name], rtol=tolerance, atol=1e-7, err_msg=name
        )
    assert (together.provenance["processes"], alone.provenance["processes"]) == (2, 1)
    assert together.config == alone.config


def test_the_first_process_alone_speaks_and_writes(smoke):
    two, _, (out, errors) = smoke
    assert out.strip() == str(two / "language-model" / "smoke-cpu")
    assert [path.name for path in (two / "language-model").iterdir()] == ["smoke-cpu"]
    assert errors.count("language-model seed 0 awd: 100%") == 1


def test_a_stopped_training_goes_on_to_the_same_bits_on_two_processes(tmp_path):
    finish(start(*TORCHRUN, TRAINING, tmp_path))
    result = json.loads((tmp_path / "result.json").read_text())
    steps = language_model.Config.profile("smoke").steps
    assert result["stopped"]
    # One file for each run, written by the first process alone.
    assert result["files"] == ["awd-seed-0.pt", "lr30_clip-seed-0.pt"]
    assert 0 < result["resumed_from"] < steps
    assert result["same"]
    # Both halves of the streams are in it, so that one process can go on where two stopped.
    assert set(result["streams"]) == {4}
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    smoke = language_model.Config.profile("smoke")
    alone = language_model._Training(smoke, text.reference_manual(), smoke.settings[0], 0)
    expected = [alone.step(k) for k in range(4)][3]
    resumed = language_model._Training(smoke, text.reference_manual(), smoke.settings[0], 0)
    resumed.load_state_dict(state)
    # As above.
    for name in ("loss", "grad_norm", "path_max"):
        assert resumed.step(3)[name] == pytest.approx(expected[name], rel=1e-4)
        resumed.load_state_dict(state)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What two processes find that share runs, and the folder of their records."""
    folder = tmp_path_factory.mktemp("runs")
    finish(start(*TORCHRUN, RUNS, folder))
    return json.loads((folder / "result.json").read_text()), folder


def test_shared_runs_that_were_stopped_give_the_bits_of_one_process(runs, tmp_path, monkeypatch):
    found, folder = runs
    cells = [Cell("momentum", True, math.inf), Cell("clipped", False, 16.0)]
    monkeypatch.setattr(image_classifier.Config, "cells", property(lambda config: cells))
    one = image_classifier.run(image_classifier.Config.profile("smoke"), tmp_path)
    together = records.load(folder / "stopped" / "image-classifier" / "smoke-cpu")
    assert together.provenance["series_sha256"] == one.provenance["series_sha256"]
    assert repr(together.scalars) == repr(one.scalars)  # as text: nan is not equal to itself
    assert (together.provenance["processes"], one.provenance["processes"]) == (2, 1)
    assert [path.name for path in (folder / "stopped" / "image-classifier").iterdir()] == ["smoke-cpu"]
    # Each process has a training behind it, in a checkpoint of its own, and goes on in the next one.
    assert found["stopped"] == [True, True]
    trainings = [f"{cell.name}-{seed}.pt" for cell in cells for seed in (0, 1)]
    assert found["files"] == sorted([*trainings, "runs-0.pt", "runs-1.pt"])
    assert found["again"] == [[2, 3]] * 2


def test_tasks_run_as_if_alone_and_come_back_in_order(runs):
    found, _ = runs
    assert found["size"] == 2
    for way, count in (("alone", 5), ("workers", 3)):
        assert [result["task"] for result in found[way]] == list(range(count))
        assert [result["seen"] for result in found[way]] == [[1, 0, 4, 1, True, False]] * count
    first, second = found["pids"]
    assert [result["pid"] for result in found["alone"]] == [first, second, first, second, first]
    assert not {result["pid"] for result in found["workers"]} & {first, second}
    # With fewer tasks than processes all have the result, too.
    assert [results[0]["pid"] for results in found["single"]] == [first, first]


def test_a_task_that_fails_ends_all_processes(tmp_path):
    process = start(*TORCHRUN, RUNS, tmp_path, "fail")
    try:
        _, errors = process.communicate(timeout=100)  # the other process would take 200 seconds
    finally:
        process.kill()
    assert process.returncode != 0
    assert "ArithmeticError: this task fails" in errors


def test_on_the_command_line_shared_runs_give_the_record_of_one_process(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    arguments = ("gradclip", "run", "convergence", "--profile", "smoke", "--out")
    [(out, errors)] = finish(start(*TORCHRUN, "-m", *arguments, two))
    assert CliRunner().invoke(app, [*arguments[1:], str(one)]).exit_code == 0
    assert out.strip() == str(two / "convergence" / "smoke-cpu")
    assert errors.count("convergence (process 0 of 2): 100%") == 1
    assert "process 1 of 2" not in errors
    together, alone = (records.load(folder / "convergence" / "smoke-cpu") for folder in (two, one))
    assert together.provenance["series_sha256"] == alone.provenance["series_sha256"]
    assert repr(together.scalars) == repr(alone.scalars)


def test_every_experiment_says_what_processes_share():
    found = {name: experiments.shared(_module(name)) for name in experiments.names()}
    assert found == dict.fromkeys(found, "runs") | {"language-model": "batches", "worst-case": None}


def test_an_experiment_that_cannot_share_its_work_refuses(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    result = CliRunner().invoke(app, ["run", "worst-case", "--profile", "smoke", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "worst-case cannot share its work among 2 processes" in result.stderr.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_a_batch_that_does_not_divide_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "size", lambda: 3)
    arguments = ["run", "language-model", "--profile", "smoke", "--out", str(tmp_path)]
    monkeypatch.setattr(parallel, "from_first", lambda value: value)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    message = "Error: a batch must be a multiple of the number of processes, 3, got 4"
    assert result.stderr.strip().splitlines()[-1] == message


def test_a_process_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(
            parallel.ParallelError, match="process 3 of this machine needs a GPU of its own, there"
        ),
        parallel.joined("cuda"),
    ):
        pass
