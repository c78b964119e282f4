import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gradclip import kernels, records

SCRIPT = Path(__file__).parents[1] / "benchmarks/optim_step.py"
spec = importlib.util.spec_from_file_location("optim_step", SCRIPT)
optim_step = importlib.util.module_from_spec(spec)
spec.loader.exec_module(optim_step)


def test_parameter_lists_are_those_of_the_models():
    counts = {
        name: (len(shapes := make()), sum(map(math.prod, shapes))) for name, make in optim_step.LISTS.items()
    }
    # The 0.27 million of the ResNet paper, the count in LanguageModel, and GPT-2 small as released.
    assert counts == {"resnet20": (59, 269_722), "lstm": (10, 4_043_472), "gpt2": (148, 124_439_808)}


def test_the_best_is_the_least_median_and_ratios_are_within_rounds():
    times = {
        "gradclip": np.array([1.0, 2.0, 30.0]),
        "without numba": np.array([0.5, 0.5, 0.5]),
        "clip slow": np.array([9.0, 9.0, 9.0]),
        "clip fast": np.array([2.0, 4.0, 60.0]),  # the same disturbed round
    }
    best, quartiles = optim_step.compare(times)
    assert best == "clip fast"
    assert quartiles.tolist() == [0.5, 0.5, 0.5]


def test_the_step_without_numba_goes_by_no_kernel(monkeypatch):
    parameter = torch.ones(3, requires_grad=True)
    parameter.grad = torch.ones(3)
    steps = optim_step.methods([parameter], 0.9)

    def refuse(*args, **kwargs):
        raise AssertionError("a kernel was called")

    for name in ("sgd_", "sum_of_squares"):
        monkeypatch.setattr(kernels, name, refuse)
    steps["without numba"]()
    with pytest.raises(AssertionError, match="a kernel was called"):
        steps["gradclip"]()


@pytest.mark.filterwarnings("default")
def test_a_short_run_leaves_a_record(tmp_path):
    options = ["--lists", "resnet20", "--threads", "1", "--seconds", "0.1", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, check=True)
    record = records.load(tmp_path / "benchmark-optim-step" / "cpu-cpu")
    assert records.is_current(record)
    assert len(record.series["method"]) == 2 * 8
    assert {"gradclip", "without numba"} < set(record.series["method"])
    for kind in ("momentum", "plain"):
        key = f"resnet20.{kind}.1"
        ratio, target = record.scalars[f"{key}.ratio"], record.scalars[f"{key}.target"]
        assert min(ratio, record.scalars[f"{key}.without_numba"]) > 0
        assert record.scalars[f"{key}.met"] == (ratio <= target)
        assert f"{ratio:.3f}" in done.stdout
