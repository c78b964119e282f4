import dataclasses
import functools
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from gradclip import records
from gradclip.experiments import acceleration
from gradclip.experiments._shell import numerical_settings, run_tasks
from gradclip.experiments.acceleration import (
    GRIDS,
    METHODS,
    TASKS,
    Config,
    cells,
    comparisons,
    curve,
    grid,
    reach,
    run,
    summarise,
    sweep,
    table,
    width,
)

SMOKE = Config.profile("smoke")
# What a clock decides, and no seed.
TIMED = re.compile(r"\.(cost|cost_low|cost_high|reach_cost|seconds|speedup_time)$")


def untimed(record):
    return {key: value for key, value in record.scalars.items() if not TIMED.search(key)}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return run(SMOKE, tmp_path_factory.mktemp("records"))


def column(record, name, **where):
    rows = np.ones(len(record.series["task"]), dtype=bool)
    for key, value in where.items():
        rows &= record.series[key] == value
    return record.series[name][rows]


def test_the_record_has_every_run_of_the_plan(smoke):
    assert records.is_current(smoke)
    for task in TASKS:
        for name in SMOKE.methods:
            where = {"task": task, "method": name}
            tried = column(smoke, "final", stage="tuning", **where)
            confirmed = column(smoke, "cell", stage="confirmation", **where)
            taken = column(smoke, "cell", stage="evaluation", **where)
            assert len(tried) == 9
            assert sorted(confirmed) == sorted(np.argsort(tried, kind="stable")[: SMOKE.kept])
            twice = column(smoke, "final", stage="confirmation", **where) + tried[confirmed]
            assert set(taken) == {confirmed[np.argmin(twice)]}
            assert len(taken) == SMOKE.blocks * len(SMOKE.seeds)
            assert grid(smoke, task, name).ravel().tolist() == tried.tolist()
            swept = column(smoke, "final", stage="sweep", **where)
            assert len(swept) == (9 * len(SMOKE.seeds) if name in ("sgd", "hard") else 0)
    assert smoke.scalars["runs"] == 2 * (4 * (9 + SMOKE.kept + len(SMOKE.seeds)) + 2 * 9 * len(SMOKE.seeds))
    # The seeds of the tuning decide nothing that is reported.
    used = {stage: set(column(smoke, "seed", stage=stage)) for stage in set(smoke.series["stage"])}
    assert used["tuning"] == {0}
    assert used["confirmation"] == {100}
    assert used["evaluation"] == used["sweep"] == set(SMOKE.seeds)


def test_every_documented_key_is_there_and_every_key_is_documented(smoke):
    tables = [block for block in acceleration.__doc__.split("\n\n") if block.startswith("====")]
    names, columns, keys = (re.findall(r"^``(.+?)``", block, re.MULTILINE) for block in tables)
    assert names == list(METHODS)
    assert set(smoke.series) == set(columns)
    expected = set()
    for key in keys:
        swept = ".width" in key
        pairs = SMOKE.sweeps if swept else SMOKE.pairs
        for task in TASKS:
            part = key.replace("TASK", task)
            expected |= {part.replace("METHOD", name) for name in SMOKE.methods if "METHOD" in key}
            expected |= {part.replace("A_vs_B", f"{a}_vs_{b}") for a, b in pairs if "A_vs_B" in key}
            expected |= {part} if "METHOD" not in key and "A_vs_B" not in key else set()
    ends = (
        r"(_vs_.*\.(train|valid|accuracy|speedup|width|width_common))_(low|high)$",
        r"(\.(train|valid|accuracy))_(min|max)$",
    )
    found = set(smoke.scalars)
    for end in ends:
        found = {re.sub(end, r"\1", key) for key in found}
    assert found == expected


def test_a_stopped_run_goes_on_to_the_same_record(smoke, tmp_path, monkeypatch):
    train, calls = acceleration._train, []

    def stop(config, *job):
        if job[2] == "evaluation" and len(calls) > 100:  # behind the tuning, which it must remember
            raise KeyboardInterrupt
        calls.append(job)
        return train(config, *job)

    monkeypatch.setattr(acceleration, "_train", stop)
    with pytest.raises(KeyboardInterrupt):
        run(SMOKE, tmp_path)
    done = list(calls)
    monkeypatch.setattr(acceleration, "_train", lambda config, *job: calls.append(job) or train(config, *job))
    resumed = run(SMOKE, tmp_path)
    assert len(calls) == resumed.scalars["runs"]  # none was run twice
    assert calls[: len(done)] == done
    assert resumed.provenance["series_sha256"] == smoke.provenance["series_sha256"]
    assert repr(untimed(resumed)) == repr(untimed(smoke))  # nan is not equal to itself: compared as text
    assert run(SMOKE, tmp_path).provenance["finished"] == resumed.provenance["finished"]  # not run again


def test_two_processes_give_the_numbers_of_one(tmp_path):
    with numerical_settings(1):
        jobs = [
            functools.partial(acceleration._train, SMOKE, task, "hard", "evaluation", 0, seed, 1.0, 0.5)
            for task in TASKS
            for seed in SMOKE.seeds
        ]
        alone, shared = (
            run_tasks(jobs, checkpoint=tmp_path / str(n), identity={}, label="", workers=n)[0] for n in (1, 2)
        )
    assert repr(shared) == repr(alone)  # floats as text: the same bits, and nan is nan


def test_a_run_is_the_plain_loop_written_out(smoke):
    # Clipping by torch's own function and its own optimizers; none of the experiment's code but the task.
    for task, name in (("language", "hard"), ("images", "adam-hard"), ("language", "sgd")):
        setting = SMOKE.setting(task)
        cell = column(smoke, "cell", task=task, method=name, stage="evaluation")[0]
        lr, max_norm = cells(setting.data, name)[cell]
        model = setting.task.model(1)
        params = list(model.parameters())
        make = torch.optim.Adam if name.startswith("adam") else torch.optim.SGD
        optimizer = make(params, lr)
        losses, clipped, state = [], [], setting.task.start()
        threads = torch.get_num_threads()
        torch.set_num_threads(SMOKE.threads)
        for k in range(setting.steps):
            optimizer.zero_grad()
            loss, state = setting.task.loss(model, k, state)
            loss.backward()
            if not math.isnan(max_norm):
                clipped.append(float(torch.nn.utils.clip_grad_norm_(params, max_norm)) > max_norm)
            optimizer.step()
            losses.append(loss.item())
        torch.set_num_threads(threads)
        where = {"task": task, "method": name, "stage": "evaluation", "seed": 1}
        length = setting.steps // SMOKE.blocks
        # torch adds 1e-6 to the norm it divides by: 1e-5 of a clipped step, and float32 over four steps.
        expected = np.reshape(losses, (-1, length)).mean(1)
        assert column(smoke, "train", **where) == pytest.approx(expected, rel=1e-4)
        if clipped:
            assert (
                column(smoke, "clipped", **where).tolist()
                == np.reshape(clipped, (-1, length)).mean(1).tolist()
            )
        else:
            assert np.isnan(column(smoke, "clipped", **where)).all()
        valid = column(smoke, "valid", **where)
        assert np.isnan(valid[:-1]).all()
        assert valid[-1] == pytest.approx(setting.task.evaluate(model)["valid"], rel=1e-4)


def test_measuring_on_the_way_does_not_change_the_training(smoke):
    # Runs of the tuning are not probed, evaluation runs are: with one seed and cell they are the same run.
    for task in TASKS:
        cell = 3
        lr, max_norm = cells(SMOKE.setting(task).data, "hard")[cell]
        quiet, probed = (
            acceleration._train(SMOKE, task, "hard", stage, cell, 7, lr, max_norm)
            for stage in ("tuning", "evaluation")
        )
        assert quiet[0]["final"] == probed[0]["final"]
        assert quiet[1][0]["train"] == probed[1][-1]["train"]
        assert math.isnan(quiet[0]["reach"])


@pytest.mark.parametrize("allowed", [False, True])
def test_training_alone_may_use_tf32(monkeypatch, allowed):
    seen = set()

    def look(*arguments):
        seen.add((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return original(*arguments)

    original = acceleration._step
    monkeypatch.setattr(acceleration, "_step", look)
    config = dataclasses.replace(SMOKE, tf32=allowed)
    with numerical_settings(1):
        acceleration._train(config, "images", "hard", "tuning", 0, 7, 0.1, 1.0)
        acceleration._cost(config, "images")
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
    assert seen == {("high", True) if allowed else ("highest", False)}


def test_a_diverged_run_leaves_a_record(tmp_path, monkeypatch):
    wild = {**GRIDS["digits"], "sgd": ((3e38,) * 9, (math.nan,))}
    monkeypatch.setitem(GRIDS, "digits", wild)
    record = run(dataclasses.replace(SMOKE, name="wild", sweeps=()), tmp_path)
    assert record.scalars["images.sgd.train"] == math.inf
    assert record.scalars["images.sgd.diverged"] == 9
    assert record.scalars["images.sgd.lost"] == len(SMOKE.seeds)
    assert record.scalars["images.sgd.reached"] == 0
    assert record.scalars["images.sgd.reach_cost"] == math.inf
    assert record.scalars["images.hard_vs_sgd.train_differs"] is False
    assert record.scalars["language.sgd.train"] < math.inf
    assert "never" in table(record, "images")
    assert "not significant" in comparisons(record, "images")


def series_with(finals, reaches, sweeps=((1.0,) * 9, (1.0,) * 9)):
    """Made-up series of ``sgd`` and ``hard``: losses and reaches of the seeds, and sweeps over nine lrs."""
    rows = []
    n = len(finals[0])
    for task in TASKS:
        for m, name in enumerate(("sgd", "hard")):
            norm = math.nan if name == "sgd" else 0.5
            rows += [(task, name, "tuning", c, 0, 1.0, norm, 9.0 + c, math.nan, 4) for c in range(9)]
            rows += [(task, name, "confirmation", 0, 100, 1.0, norm, 7.0, math.nan, 4)]
            for s in range(n):
                rows += [(task, name, "evaluation", 0, s + 1, 1.0, norm, finals[m][s], reaches[m][s], 4)]
            for c, loss in enumerate(sweeps[m]):
                for s in range(n):
                    rows += [(task, name, "sweep", c, s + 1, 2.0**c, norm, loss, math.nan, 4)]
    keys = ("task", "method", "stage", "cell", "seed", "lr", "max_norm", "final", "reach", "step")
    series = {key: np.array(values) for key, values in zip(keys, zip(*rows, strict=True), strict=True)}
    return series | dict.fromkeys(("train", "clipped", "probe", "valid", "accuracy"), series["final"])


def summary(seeds, *parts, costs=(1.0, 2.0)):
    config = dataclasses.replace(SMOKE, methods=("sgd", "hard"), seeds=seeds)
    series = series_with(*parts)
    timed = {task: {"sgd": [costs[0]] * 3, "hard": [costs[1]] * 3} for task in TASKS}
    return summarise(series, config, timed)


def test_differences_are_paired_and_their_interval_is_student_s():
    from scipy import stats

    sgd, differences = [5.0, 6.0, 7.0], [-0.3, -0.2, -0.25]
    hard = [a + d for a, d in zip(sgd, differences, strict=True)]
    found = summary((1, 2, 3), (sgd, hard), ((4.0, 4.0, 4.0), (2.0, 2.0, 2.0)))
    # scipy's own paired test knows nothing of this code. The seeds differ by 1, the differences by 0.05.
    expected = stats.ttest_rel(hard, sgd).confidence_interval(0.95)
    for end in ("low", "high"):
        value = found[f"language.hard_vs_sgd.train_{end}"]
        assert value == pytest.approx(getattr(expected, end), rel=1e-9)
    assert found["language.hard_vs_sgd.train_differs"] is True
    same = summary((1, 2, 3), (sgd, [5.1, 5.9, 7.0]), ((4.0,) * 3, (2.0,) * 3))
    assert same["language.hard_vs_sgd.train_differs"] is False
    assert found["language.hard.tuned"] == (9.0 + 7.0) / 2
    assert found["language.optimism"] == pytest.approx(np.mean([*sgd, *hard]) - 8.0)
    # Losses of 9 to 17 with a vocabulary whose uniform guess costs 7.1 nats, and 2.3 for digits.
    assert found["language.hard.diverged"] == found["images.hard.diverged"] == 9
    assert (found["language.hard.lost"], found["images.hard.lost"]) == (0, 3)


def test_speedups_count_runs_that_never_arrive_as_late_ones():
    # A step of hard clipping costs twice a step of sgd. Four steps in all.
    found = summary((1, 2), ((1.0, 1.0), (1.0, 1.0)), ((2.0, math.inf), (1.0, 2.0)))
    assert found["images.hard_vs_sgd.speedup"] == pytest.approx(2.0)  # 2/1 and 4/2
    assert found["images.hard_vs_sgd.speedup_time"] == pytest.approx(1.0)
    assert (found["images.sgd.reached"], found["images.hard.reached"]) == (1, 2)
    assert (found["images.hard.reach"], found["images.hard.reach_cost"]) == (2.0, 4.0)
    assert found["images.sgd.reach"] == math.inf
    assert (found["images.sgd.cost"], found["images.hard.cost"]) == (1.0, 2.0)


def test_widths_of_a_sweep_are_those_of_its_curve():
    # A valley with slopes of 1 nat per octave is 0.2 octaves wide to each side at a tolerance of 0.2 nats.
    valley = tuple(abs(c - 4.0) for c in range(9))
    flat = tuple(max(0.0, abs(c - 4.0) - 1.0) for c in range(9))
    found = summary((1, 2), ((1.0, 1.0), (1.0, 1.0)), ((1.0, 1.0), (1.0, 1.0)), (valley, flat))
    for task in TASKS:
        key = f"{task}.hard_vs_sgd.width"
        assert found[f"{key}_B"] == pytest.approx(0.4)
        assert found[f"{key}_A"] == pytest.approx(2.4)
        assert found[key] == found[f"{key}_low"] == found[f"{key}_high"] == pytest.approx(2.0)
        assert found[f"{key}_cut"] == 0
    # Raised by a nat, the valley is nowhere as good as the other's best.
    raised = tuple(loss + 1.0 for loss in valley)
    found = summary((1, 2), ((1.0, 1.0), (1.0, 1.0)), ((1.0, 1.0), (1.0, 1.0)), (raised, flat))
    assert found["language.hard_vs_sgd.width_B"] == pytest.approx(0.4)
    assert found["language.hard_vs_sgd.width_common_B"] == 0.0
    assert found["language.hard_vs_sgd.width_common"] == pytest.approx(2.4)
    # A method that fails everywhere but at the end is cut there; a lost run counts as one that guesses.
    cut = (*(math.inf,) * 8, 0.0)
    found = summary((1, 2), ((1.0, 1.0), (1.0, 1.0)), ((1.0, 1.0), (1.0, 1.0)), (valley, cut))
    assert found["images.hard_vs_sgd.width_cut"] == 2
    assert found["images.hard_vs_sgd.width_A"] == pytest.approx(0.2 / math.log(10))


# Quarters are exact: losses that lie on the level do so in both computations.
quarters = st.integers(0, 20).map(lambda n: n / 4)


@given(st.lists(quarters, min_size=2, max_size=9), quarters)
@example([0.0, 1.0, 1.0], 1.0)  # a piece that lies on the level is good
def test_width_is_the_measure_of_the_sublevel_set(losses, tolerance):
    lrs = 2.0 ** np.arange(len(losses))
    # Riemann sum over 20,000 points of the same polygon: each of its at most 16 crossings may cost one point.
    x = np.linspace(0, len(losses) - 1, 20_001)
    inside = np.interp(x, np.arange(len(losses)), losses) <= min(losses) + tolerance
    found, cut = width(lrs, np.array(losses), min(losses) + tolerance)
    assert found == pytest.approx(inside.mean() * (len(losses) - 1), abs=17 * (len(losses) - 1) / 20_000)
    assert cut == (inside[0] or inside[-1])


@given(st.lists(st.floats(0, 5), min_size=2, max_size=12), st.floats(0, 5))
def test_reach_is_where_the_line_first_crosses(losses, level):
    steps = [5 * i for i in range(len(losses))]
    found = reach(steps, losses, level)
    if min(losses) > level:
        assert found == math.inf
        return
    # On the polygon through the losses, and above the level before. 1e-9: rounding of slopes up to 1.
    assert np.interp(found, steps, losses) == pytest.approx(min(level, losses[0]), abs=1e-9)
    before = [value for step, value in zip(steps, losses, strict=True) if step < found - 1e-9]
    assert all(value > level for value in before)


def test_each_method_steps_as_its_name_says():
    # One step from the same start, against the formula of each method on the gradient (3, 4).
    lengths = {
        "sgd": 10.0,
        "momentum": 10.0,
        "hard": 2.0,
        "soft": 10 / 6,
        "hard-momentum": 2.0,
        "normalize": 2.0,
    }
    # Adam's first step is the learning rate in every coordinate, whatever the gradient's length.
    lengths |= dict.fromkeys(("adam", "adamw", "adam-hard", "adamw-hard"), 2 * math.sqrt(2))
    assert set(lengths) == set(METHODS)
    for name, expected in lengths.items():
        x = torch.zeros(2, requires_grad=True)
        x.grad = torch.tensor([3.0, 4.0])
        optimizer = METHODS[name].make([x], 2.0, 1.0)
        optimizer.step()
        assert x.detach().norm().item() == pytest.approx(expected, rel=1e-6)
        assert optimizer.param_groups[0].get("momentum", 0.0) == (0.9 if "momentum" in name else 0.0)
    assert METHODS["adamw"].make([torch.zeros(1)], 1.0, 1.0).param_groups[0]["weight_decay"] == 0.01


def test_every_method_has_nine_cells():
    for data in GRIDS:
        assert set(GRIDS[data]) == set(METHODS)
        for name, method in METHODS.items():
            assert len(cells(data, name)) == len(set(map(str, cells(data, name)))) == 9
            assert method.clips == (not any(math.isnan(norm) for _, norm in cells(data, name)))
            lrs = GRIDS[data][name][0]
            assert list(lrs) == sorted(lrs)


def test_curves_and_sweeps_are_read_back(smoke):
    steps, losses = curve(smoke, "language", "hard", "train")
    assert steps.tolist() == [2, 4]
    where = {"task": "language", "method": "hard", "stage": "evaluation"}
    for seed, line in zip(SMOKE.seeds, losses, strict=True):
        assert line.tolist() == column(smoke, "train", seed=seed, **where).tolist()
    assert curve(smoke, "images", "sgd", "accuracy")[0].tolist() == [4]
    lrs, losses = sweep(smoke, "images", "sgd")
    assert lrs.tolist() == list(GRIDS["digits"]["sgd"][0])
    for i, lr in enumerate(lrs):
        assert (
            losses[i].tolist()
            == column(smoke, "final", task="images", method="sgd", stage="sweep", lr=lr).tolist()
        )


def test_the_tables_have_a_row_per_method_and_per_pair(smoke):
    for task in TASKS:
        html = table(smoke, task)
        for name in SMOKE.methods:
            assert f"<th>{METHODS[name].label}</th>" in html
        html = comparisons(smoke, task)
        assert html.count("<tr>") == 1 + len(SMOKE.pairs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("sgd", "magic")}, "methods must be of .*, got"),
        ({"methods": ("hard", "adam")}, "'sgd' among them"),
        ({"seeds": (1,)}, "seeds must be two or more"),
        ({"seeds": (1, 100)}, "none of the tuning's"),
        ({"seeds": (1, 1)}, "seeds must be two or more"),
        ({"blocks": 3}, "steps must be a multiple of blocks=3, got 4 for language"),
        ({"blocks": 4, "validations": 3}, "blocks must be a multiple of validations=3, got 4"),
        ({"sweeps": (("hard", "adam"),)}, "sweeps must be of PAIRS"),
        ({"sweeps": (("soft", "sgd"),)}, "and of the methods"),
        (
            {"methods": ("sgd", "momentum"), "sweeps": (("momentum", "sgd"),)},
            "a clipped method with one without",
        ),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMOKE, **changes)


def test_profiles():
    assert Config.profile("cpu").methods == tuple(METHODS)
    short, paper = Config.profile("short"), Config.profile("paper")
    assert {short.language.task.corpus, paper.language.task.corpus} == {"penn-treebank"}
    assert {short.images.task.images, paper.images.task.images} == {"cifar10"}
    assert (paper.language.task.embedding, paper.language.task.hidden) == (200, 512)
    assert paper.images.task.blocks == 3
    with pytest.raises(ValueError, match="profile must be one of"):
        Config.profile("huge")
