import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from scipy import stats

from gradclip import records
from gradclip.experiments import optimizers
from gradclip.experiments.optimizers import METHODS, Config, norm_errors, run, summarise, table

SMOKE = Config.profile("smoke")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return run(SMOKE, tmp_path_factory.mktemp("records"))


def test_the_smoke_profile_gives_a_whole_record(smoke):
    assert (smoke.experiment, smoke.profile) == ("optimizers", "smoke")
    assert records.is_current(smoke)
    tuning = smoke.series["tuning"]
    assert smoke.scalars["runs"] == len(tuning) == 3 * (9 + 2)
    for name in SMOKE.methods:
        grid, chosen = ((smoke.series["method"] == name) & part for part in (tuning, ~tuning))
        assert smoke.series["seed"][grid].tolist() == [SMOKE.tuning_seed] * 9
        assert smoke.series["seed"][chosen].tolist() == list(SMOKE.seeds)
        # The cell of the grid with the least loss is the one that is evaluated, with its own two numbers.
        best = int(np.argmin(smoke.series["valid"][grid]))
        assert smoke.series["cell"][chosen].tolist() == [best] * len(SMOKE.seeds)
        assert smoke.series["first"][chosen][0] == METHODS[name].cells[best][0]
    assert np.isfinite(smoke.series["train"]).all()


def test_every_documented_key_is_there_and_every_key_is_documented(smoke):
    tables = [block for block in optimizers.__doc__.split("\n\n") if block.startswith("====")]
    names, columns, keys = (re.findall(r"^``(.+?)``", block, re.MULTILINE) for block in tables)
    assert names == list(METHODS)
    assert set(smoke.series) == set(columns)
    expected = {key.replace("METHOD", name) for key in keys for name in SMOKE.methods}
    assert {re.sub("(valid|train)_(min|max)$", r"\1", key) for key in smoke.scalars} == expected


def test_a_stopped_run_goes_on_to_the_same_record(smoke, tmp_path, monkeypatch):
    row, calls = optimizers._Runs.row, []

    def stop(self, *job):
        if len(calls) == 30:  # among the evaluation runs, which need the losses of the grid
            raise KeyboardInterrupt
        calls.append(job)
        return row(self, *job)

    monkeypatch.setattr(optimizers._Runs, "row", stop)
    with pytest.raises(KeyboardInterrupt):
        run(SMOKE, tmp_path)
    monkeypatch.setattr(optimizers._Runs, "row", lambda self, *job: calls.append(job) or row(self, *job))
    resumed = run(SMOKE, tmp_path)
    assert len(set(calls)) == len(calls) == resumed.scalars["runs"]  # none was run twice
    assert resumed.provenance["series_sha256"] == smoke.provenance["series_sha256"]
    # nan is not equal to itself: compared as text.
    assert repr(resumed.scalars) == repr(smoke.scalars)
    assert run(SMOKE, tmp_path).provenance["finished"] == resumed.provenance["finished"]  # not run again


def series_with(differences):
    """Two methods with a grid of two cells each, and given differences in validation loss."""
    n = len(differences)
    rows = [
        (name, cell, 0, True, cell + 1.0, math.nan, 9.0 + cell, 1.0)
        for name in ("hard", "x")
        for cell in (0, 1)
    ]
    rows += [("hard", 0, seed + 1, False, 1.0, math.nan, 5.0 + seed, 1.0) for seed in range(n)]
    rows += [("x", 0, s + 1, False, 1.0, math.nan, 5.0 + s + d, 1.0) for s, d in enumerate(differences)]
    keys = ("method", "cell", "seed", "tuning", "first", "second", "valid", "train")
    return {key: np.array(column) for key, column in zip(keys, zip(*rows, strict=True), strict=True)}


def test_differences_are_paired_and_their_interval_is_student_s():
    differences = [0.1, 0.2, 0.4]
    scalars = summarise(series_with(differences), untrained=9.5)
    # scipy's own paired test knows nothing of this code.
    reference = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert scalars["x.over_hard_low"] == pytest.approx(reference.low, rel=1e-9)
    assert scalars["x.over_hard_high"] == pytest.approx(reference.high, rel=1e-9)
    assert scalars["x.differs"] == (reference.low > 0) == False  # noqa: E712
    assert summarise(series_with([0.1, 0.11, 0.12]), untrained=9.5)["x.differs"] is True
    assert scalars["hard.over_hard"] == 0.0
    assert scalars["hard.differs"] is False
    assert (scalars["x.edge"], scalars["x.diverged"]) == (True, 1)


def test_a_diverged_run_leaves_a_record(tmp_path, monkeypatch):
    # SGD at an absurd learning rate: the loss is not finite, and the run ends with inf instead of an error.
    wild = dataclasses.replace(METHODS["sgd"], first=(3e38,) * 9)
    monkeypatch.setitem(METHODS, "sgd", wild)
    record = run(dataclasses.replace(SMOKE, name="wild", methods=("sgd", "hard")), tmp_path)
    assert record.scalars["sgd.valid"] == math.inf
    assert record.scalars["sgd.diverged"] == 9
    assert record.scalars["sgd.differs"] is False
    assert "inf" in table(record)


def test_each_method_trains_as_its_name_says():
    # One step from the same start, against the formula of each rule on the gradient of that start.
    gradient = torch.tensor([3.0, 4.0])
    lengths = {
        "sgd": 10.0,
        "hard": 2.0,
        "soft": 10 / 6,
        "log": 2 * math.log1p(5 / 6),
        "tensor": 2.0,
        "momentum": 2.0,
    }
    for name, expected in lengths.items():
        x = torch.zeros(2, requires_grad=True)
        x.grad = gradient.clone()
        METHODS[name].make([x], 2.0, 1.0).step()
        assert x.detach().norm().item() == pytest.approx(expected, rel=1e-6)
    for method in METHODS.values():
        assert len(method.cells) == 9


def test_the_table_has_a_row_per_method_and_marks_what_is_not_significant(smoke):
    html = table(smoke)
    for name in SMOKE.methods:
        assert f"<th>{METHODS[name].label}</th>" in html
    assert html.count("differs") + html.count("not significant") == len(SMOKE.methods) - 1


def test_norm_errors_show_what_torch_loses():
    errors = norm_errors([10, 100_000])
    # A running sum over 100,000/16 numbers or fewer is still good to four digits, rows to six.
    assert np.abs(errors["torch"]).max() < 1e-3
    assert np.abs(errors["gradclip"]).max() < 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("hard", "magic")}, "methods must be of .*, got"),
        ({"methods": ("sgd",)}, "'hard' among them"),
        ({"seeds": (0, 1)}, "without the tuning seed 0"),
        ({"seeds": (1,)}, "at least two"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMOKE, **changes)


def test_profiles():
    assert Config.profile("cpu").methods == tuple(METHODS)
    assert Config.profile("paper").corpus == "penn-treebank"
    with pytest.raises(ValueError, match="profile must be one of"):
        Config.profile("huge")
