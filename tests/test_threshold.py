"""The experiment ``threshold``: every run of the plan, recipes against their definitions, scalars by hand."""

import dataclasses
import functools
import itertools
import math
import re

import numpy as np
import pytest
import torch

from gradclip import records
from gradclip.experiments import threshold
from gradclip.experiments._shell import numerical_settings
from gradclip.experiments.threshold import (
    CANDIDATES,
    FEWEST,
    FREE,
    GUESSED,
    GUESSES,
    LABELS,
    MULTIPLES,
    OWN,
    RECIPES,
    TASKS,
    USUAL,
    Config,
    advised,
    grid,
    lengths,
    line,
    points,
    run,
    table,
)
from gradclip.smoothness import WarmUp, fit, warm_up

SMOKE = Config.profile("smoke")
TIMED = tuple(f"{task}.{name}.cost" for task in TASKS for name in OWN)  # what a clock decides, and no seed


def untimed(record):
    return {key: value for key, value in record.scalars.items() if key not in TIMED}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return run(SMOKE, tmp_path_factory.mktemp("records"))


def column(record, wanted, /, **where):
    rows = np.ones(len(record.series["task"]), dtype=bool)
    for key, value in where.items():
        rows &= record.series[key] == value
    return record.series[wanted][rows]


def test_the_record_has_every_run_of_the_plan(smoke):
    assert records.is_current(smoke)
    for task in TASKS:
        lrs = SMOKE.setting(task).lrs
        tuning = {"task": task, "stage": "tuning"}
        rates, norms = (column(smoke, key, name="grid", **tuning) for key in ("lr", "max_norm"))
        cells = list(zip(rates, norms, strict=True))
        assert cells == list(itertools.product(lrs, SMOKE.norms))
        assert column(smoke, "lr", name="autoclip", **tuning).tolist() == list(lrs)
        assert np.isnan(column(smoke, "max_norm", name="autoclip", **tuning)).all()
        losses = column(smoke, "final", name="grid", **tuning)
        assert grid(smoke, task).ravel().tolist() == losses.tolist()
        for name in LABELS:
            seeds = column(smoke, "seed", task=task, stage="evaluation", name=name)
            assert seeds.tolist() == list(SMOKE.seeds)
        assert set(column(smoke, "max_norm", task=task, stage="evaluation", name="none")) == {math.inf}
        # One cell is kept, so the best with the first seed is taken, of all or of a threshold's own.
        for way in ("best", *USUAL):
            own = [i for i, (_, norm) in enumerate(cells) if way == "best" or norm == USUAL[way]]
            tried = column(smoke, "final", name="autoclip", **tuning) if way == "autoclip" else losses[own]
            rates = lrs if way == "autoclip" else [cells[i][0] for i in own]
            taken = column(smoke, "lr", task=task, stage="evaluation", name=way)
            assert set(taken) == {rates[int(np.argmin(tried))]}
        for source, seed in itertools.product((*GUESSES, *OWN), SMOKE.seeds):
            steps = column(smoke, "step", task=task, stage="warm-up", name=source, seed=seed)
            assert steps.tolist() == list(range(len(steps)))
            assert len(steps) <= SMOKE.setting(task).warm_up
    stages = smoke.series["stage"]
    assert smoke.scalars["runs"] == (stages != "warm-up").sum()
    assert (stages == "evaluation").sum() == len(TASKS) * len(LABELS) * len(SMOKE.seeds)
    # The seeds of the tuning decide nothing that is reported.
    used = {stage: set(column(smoke, "seed", stage=stage)) for stage in set(stages)}
    assert used["tuning"] == {0}
    assert used["confirmation"] == {100}
    assert used["evaluation"] == used["warm-up"] == set(SMOKE.seeds)


def test_every_documented_key_is_there_and_every_key_is_documented(smoke):
    tables = [block for block in threshold.__doc__.split("\n\n") if block.startswith("====")]
    assert len(tables) == 3
    names, columns, keys = (re.findall(r"^``(.+?)``", block, re.MULTILINE) for block in tables)
    assert names == list(RECIPES)
    assert set(smoke.series) == {*columns}
    parts = {"NAME": LABELS, "ADVICE": CANDIDATES, "RECIPE": GUESSED, "END": OWN}
    expected = set()
    for key in keys:
        word = next((word for word in parts if f".{word}." in key), None)
        filled = [key.replace(word, name) for name in parts[word]] if word else [key]
        expected |= {part.replace("TASK", task) for part in filled for task in TASKS}
    found = {re.sub(r"(\.(train|valid|accuracy))_(min|max)$", r"\1", key) for key in smoke.scalars}
    found = {re.sub(r"(\.(gap|gain|gain_\w+|doubling\.\w+))_(low|high)$", r"\1", key) for key in found}
    assert found == expected


def test_a_record_belongs_to_its_recipes(smoke):
    assert smoke.config["recipes"]["edge"]["multiple"] == 2.0
    assert set(smoke.config["recipes"]) == set(RECIPES)
    assert smoke.config["multiples"] == {"own": 1.0, "edge": 2.0}


def test_a_stopped_run_goes_on_to_the_same_record(smoke, tmp_path, monkeypatch):
    train, calls = threshold._train, []

    def stop(config, *job):
        if job[1] == "evaluation" and len(calls) > 60:  # behind tuning and warm-up, which it must remember
            raise KeyboardInterrupt
        calls.append(job)
        return train(config, *job)

    monkeypatch.setattr(threshold, "_train", stop)
    with pytest.raises(KeyboardInterrupt):
        run(SMOKE, tmp_path)
    done = list(calls)
    monkeypatch.setattr(threshold, "_train", lambda config, *job: calls.append(job) or train(config, *job))
    resumed = run(SMOKE, tmp_path)
    assert repr(calls[: len(done)]) == repr(done)
    assert len(set(map(repr, calls))) == len(calls)  # none was run twice
    assert resumed.provenance["series_sha256"] == smoke.provenance["series_sha256"]
    assert repr(untimed(resumed)) == repr(untimed(smoke))  # nan is not equal to itself: compared as text
    assert run(SMOKE, tmp_path).provenance["finished"] == resumed.provenance["finished"]  # not run again


def test_a_run_is_the_plain_loop_written_out(smoke):
    # Clipping by torch's own function; none of the experiment's code but the task.
    for task in TASKS:
        setting = SMOKE.setting(task)
        where = {"task": task, "stage": "evaluation", "name": "norm-0.25", "seed": 1}
        [lr] = column(smoke, "lr", **where)
        with numerical_settings(SMOKE.threads):
            model = setting.task.model(1)
            params = list(model.parameters())
            optimizer = torch.optim.SGD(params, lr)
            losses, state = [], setting.task.start()
            for k in range(setting.steps):
                optimizer.zero_grad()
                loss, state = setting.task.loss(model, k, state)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(params, 0.25)
                optimizer.step()
                losses.append(loss.item())
        # torch adds 1e-6 to the norm it divides by: 1e-5 of a clipped step, over ten steps that may amplify.
        assert column(smoke, "final", **where) == pytest.approx([losses[-1]], rel=1e-3)
        valid = setting.task.evaluate(model)["valid"]
        assert column(smoke, "valid", **where) == pytest.approx([valid], rel=1e-3)


def test_training_alone_may_use_tf32(monkeypatch):
    seen = []
    monkeypatch.setattr(
        type(SMOKE.images.task),
        "loss",
        lambda self, model, *_: (
            seen.append(torch.get_float32_matmul_precision())
            or sum(p.square().sum() for p in model.parameters()),
            None,
        ),
    )
    config = dataclasses.replace(SMOKE, tf32=True)
    with numerical_settings(1):
        threshold._train(config, "images", "tuning", "grid", 0, 0.1, 1.0, "hard")
        assert set(seen) == {"high"}
        seen.clear()
        threshold._guessed(config, "images", "short", 1, 0.1)
        threshold._own(config, "images", "own", 1)
        assert set(seen) == {"highest"}


@pytest.mark.parametrize("task", TASKS)
def test_a_guessed_warm_up_is_clipped_training_measured_on_the_way(smoke, task):
    setting = SMOKE.setting(task)
    lr = setting.guesses[1]
    found = {
        key: column(smoke, key, task=task, stage="warm-up", name="middle", seed=1)
        for key in ("loss", "grad_norm", "path", "local", "update_length")
    }
    with numerical_settings(SMOKE.threads):
        model = setting.task.model(1).double()  # whose LSTM has a second derivative, as oneDNN's has not
        params = list(model.parameters())
        x = torch.nn.utils.parameters_to_vector(params).detach()
        state = setting.task.start()
        for k in range(3):

            def gradient(at, k=k, state=state):
                torch.nn.utils.vector_to_parameters(at, params)
                value, after = setting.task.loss(model, k, state)
                g = torch.autograd.grad(value, params, create_graph=True)
                return value, torch.cat([part.flatten() for part in g]), after

            value, g, after = gradient(x)
            product = torch.autograd.grad(g, params, g.detach())
            product = torch.cat([part.flatten() for part in product])
            g = g.detach()
            d = -lr * min(1.0, 1.0 / g.norm().item()) * g
            quotients = [(gradient(x + a * d)[1] - g).norm() / (a * d.norm()) for a in np.arange(1, 6) / 6]
            expected = {
                "loss": value,
                "grad_norm": g.norm(),
                "path": max(quotients),
                "local": product.norm() / g.norm(),
                "update_length": d.norm(),
            }
            for key, wanted in expected.items():
                # float32: a difference of two gradients keeps about three digits.
                assert found[key][k] == pytest.approx(float(wanted.detach()), rel=5e-3), (key, k)
            x, state = x + d, after


def test_own_steps_are_those_of_the_library(smoke):
    setting = SMOKE.characters
    with numerical_settings(SMOKE.threads):
        model = setting.task.model(2)
        batches = [lambda k=k: setting.task.loss(model, k, None)[0] for k in range(setting.warm_up)]
        expected = warm_up(batches, model.parameters(), multiple=2.0)
    where = {"task": "characters", "stage": "warm-up", "name": "edge", "seed": 2}
    # float32, whose last bits depend on where tensors lie in memory, and eight steps that may amplify them.
    assert column(smoke, "grad_norm", **where) == pytest.approx(expected.grad_norms, rel=1e-3)
    assert column(smoke, "local", **where) == pytest.approx(expected.smoothness, rel=1e-3)
    step = expected.recommend()
    where |= {"stage": "evaluation"}
    assert column(smoke, "lr", **where) == pytest.approx([step.lr], rel=1e-2)
    assert column(smoke, "max_norm", **where) == pytest.approx([step.max_norm], rel=1e-2)


def test_a_hidden_state_comes_from_behind_the_step():
    # The second batch of an LSTM's warm-up begins with the state that the first leaves after its step.
    setting = SMOKE.language
    with numerical_settings(SMOKE.threads):
        found = threshold._own(SMOKE, "language", "own", 1)
        model = setting.task.model(1)
        params = list(model.parameters())
        value, _ = setting.task.loss(model, 0, None)
        g = torch.autograd.grad(value, params)
        with torch.no_grad():
            for p, part in zip(params, g, strict=True):
                p -= part / found[0]["local"]
            _, state = setting.task.loss(model, 0, None)
            second = setting.task.loss(model, 1, state)[0].item()
    assert found[0]["loss"] == pytest.approx(value.item(), rel=1e-5)
    assert found[1]["loss"] == pytest.approx(second, rel=1e-5)


def made_up(n=FEWEST):
    norms = np.linspace(1.0, 4.0, n)
    return [
        {"grad_norm": g, "path": 3.0 + 2.0 * g - (i % 2), "local": 1.0 + 0.5 * g + 10.0 * (i == 3)}
        for i, g in enumerate(norms)
    ]


def test_lines_of_the_recipes():
    def found(recipe):
        rows = made_up(9)
        return line(
            recipe, *([row[key] for row in rows] for key in ("grad_norm", RECIPES[recipe].smoothness))
        )

    def check(recipe, *expected):
        drawn = found(recipe)
        coefficients = [drawn.L0, drawn.L1]
        assert coefficients == pytest.approx(expected, rel=1e-6)

    # The envelope of points on and below a line is that line. An outlier raises it, and the median not.
    check("plain", 3.0, 2.0)
    assert found("local").predict(made_up(9)[3]["grad_norm"]) == pytest.approx(made_up(9)[3]["local"])
    for recipe in ("median", *FREE):
        check(recipe, 1.0, 0.5)


def test_advice_follows_from_the_points_of_its_own_seed(smoke):
    for task, name in itertools.product(TASKS, CANDIDATES):
        recipe, source = CANDIDATES[name]
        found = advised(smoke, task, name)
        for i, seed in enumerate(SMOKE.seeds):
            some = points(smoke, task, source)
            here = some["seed"] == seed
            if here.sum() < FEWEST:
                assert found["final"][i] == math.inf
                continue
            norms, smoothness = some["grad_norm"][here], some["path" if recipe == "plain" else "local"][here]
            method = {} if recipe in ("plain", "local") else {"method": "quantile", "quantile": 0.5}
            drawn = fit(norms, smoothness, **method)
            # Below a thousandth of the rest of the line everywhere, an intercept is none.
            negligible = drawn.L0 / (drawn.L1 * norms.min()) < 1e-3 if drawn.L1 else False
            intercept = 0.0 if negligible else drawn.L0
            expected = (intercept, drawn.L1, np.median(norms))
            assert tuple(found[key][i] for key in ("L0", "L1", "norm")) == expected
            multiple = 2.0 if name in ("edge", "own-2") else 1.0
            lr, max_norm = found["lr"][i], found["max_norm"][i]
            if intercept == 0:
                assert (lr, max_norm) == (pytest.approx(multiple / drawn.L1), 1.0)
            else:
                assert lr == pytest.approx(multiple / intercept)
                assert max_norm == (pytest.approx(intercept / drawn.L1) if drawn.L1 else math.inf)
            expected = multiple * expected[2] / (intercept + drawn.L1 * expected[2])
            assert found["length"][i] == pytest.approx(expected)


def test_two_recipes_are_what_a_reader_of_the_library_gets(smoke):
    for task, name, seed in itertools.product(TASKS, OWN, SMOKE.seeds):
        some = points(smoke, task, name)
        rows = some["seed"] == seed
        columns = (some[key][rows] for key in ("grad_norm", "local", "loss", "update_length"))
        found = WarmUp(*map(tuple, columns), multiple=MULTIPLES[name])
        # The step of the warm-up that was measured is the warm-up's own multiple of 1/h.
        expected = found.multiple / np.array(found.smoothness) * found.grad_norms
        assert found.update_lengths == pytest.approx(expected)
        step = found.recommend()
        where = {"task": task, "stage": "evaluation", "name": name, "seed": seed}
        assert column(smoke, "lr", **where).tolist() == [step.lr]
        assert column(smoke, "max_norm", **where).tolist() == [step.max_norm]


def test_the_mixed_recipes_double_one_thing_each(smoke):
    for task, (mixed, source) in itertools.product(TASKS, (("own-2", "own"), ("edge-1", "edge"))):
        plain, other = advised(smoke, task, source), advised(smoke, task, mixed)
        assert other["L1"].tolist() == plain["L1"].tolist()  # one warm-up, one line
        factor = other["length"] / plain["length"]
        assert factor.tolist() == [2.0 if mixed == "own-2" else 0.5] * len(SMOKE.seeds)


def test_octaves_compare_two_steps_at_one_gradient_norm(smoke):
    for task, name in itertools.product(TASKS, CANDIDATES):
        found, best = advised(smoke, task, name), advised(smoke, task, "best")
        own = points(smoke, task, "own")
        multiple = 2.0 if name in ("edge", "own-2") else 1.0
        octaves = []
        for i, seed in enumerate(SMOKE.seeds):
            g = np.median(own["grad_norm"][own["seed"] == seed])
            # A step g/(L0 + L1 g) against the best cell's, which is clipped hard.
            length = multiple * g / (found["L0"][i] + found["L1"][i] * g)
            of_best = best["lr"][0] * min(g, best["max_norm"][0])
            assert lengths(smoke, task, name)[i] == pytest.approx(length, nan_ok=True)
            assert lengths(smoke, task, "best")[i] == pytest.approx(of_best)
            octaves.append(math.log2(length / of_best))
        expected = np.median([value for value in octaves if not math.isnan(value)])
        assert smoke.scalars[f"{task}.{name}.octaves"] == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize(
    ("lines", "median"),
    [
        # (L0, L1, length): medians of L0 and of L1 alone would be 2 and 6, which no seed has.
        ([(1.0, 9.0, 20.0), (2.0, 4.0, 40.0), (3.0, 6.0, 10.0)], 0),
        ([(1.0, 9.0, 20.0), (2.0, 4.0, 40.0), (3.0, 6.0, 10.0), (4.0, 1.0, 30.0)], 0),
        ([(1.0, 9.0, 50.0), (0.0, 4.0, 20.0), (3.0, 6.0, 10.0), (4.0, 1.0, 30.0)], 1),
    ],
    ids=["odd", "even", "normalised"],
)
def test_the_line_that_is_shown_is_that_of_one_seed(lines, median):
    rows = []
    for seed, (intercept, slope, length) in enumerate(lines):
        row = functools.partial(threshold._row, "images", "evaluation", seed=seed)
        rows += [row("own", norm=1.0), row("best", lr=1.0, max_norm=math.inf)]
        rows += [row("edge", L0=intercept, L1=slope, length=length)]
        rows += [threshold._row("images", "warm-up", "edge", seed, grad_norm=1.0)]
    found = threshold._advice({key: np.array([row[key] for row in rows]) for key in rows[0]}, "edge")
    intercept, slope, _ = lines[median]
    assert (found["edge.L0"], found["edge.L1"]) == (intercept, slope)
    assert found["edge.lr"] == (2.0 / intercept if intercept else math.inf)
    assert found["edge.max_norm"] == intercept / slope


def test_gaps_are_paired_and_their_interval_is_student_s(smoke):
    from scipy import stats

    for task, name in itertools.product(TASKS, ("norm-1", "edge")):
        losses, best = (column(smoke, "final", task=task, stage="evaluation", name=n) for n in (name, "best"))
        key = f"{task}.{name}"
        assert smoke.scalars[f"{key}.gap"] == pytest.approx((losses - best).mean(), abs=1e-12)
        cells = grid(smoke, task)
        assert smoke.scalars[f"{key}.beaten_by"] == (cells < losses.mean()).sum() / cells.size
        if not np.allclose(losses, best):
            # scipy's own paired test knows nothing of this code.
            ends = stats.ttest_rel(losses, best).confidence_interval(0.95)
            assert smoke.scalars[f"{key}.gap_low"] == pytest.approx(ends.low, rel=1e-6)
            assert smoke.scalars[f"{key}.gap_high"] == pytest.approx(ends.high, rel=1e-6)


def test_gains_are_against_every_guess_and_split_into_two_doublings(smoke):
    from scipy import stats

    def final(task, name):
        return column(smoke, "final", task=task, stage="evaluation", name=name)

    keys = {"plain-short": "_short", "plain-middle": "", "plain-long": "_long", "own": "_own"}
    for task in TASKS:
        for other, end in keys.items():
            expected = (final(task, other) - final(task, "edge")).mean()
            assert smoke.scalars[f"{task}.edge.gain{end}"] == pytest.approx(expected, abs=1e-12)
        # Rows: steps of the warm-up, columns: the advised step, single and double each. Its main effects.
        mean = np.array(
            [[final(task, n).mean() for n in row] for row in (("own", "own-2"), ("edge-1", "edge"))]
        )
        effects = (mean[:, 0] - mean[:, 1]).mean(), (mean[0] - mean[1]).mean()
        parts = [smoke.scalars[f"{task}.doubling.{part}"] for part in ("advice", "steps")]
        assert parts == pytest.approx(effects, abs=1e-12)
        assert sum(parts) == pytest.approx(smoke.scalars[f"{task}.edge.gain_own"], abs=1e-12)
        # scipy's own paired test knows nothing of this code.
        ends = stats.ttest_rel(final(task, "edge-1"), final(task, "own-2")).confidence_interval(0.95)
        key = f"{task}.doubling.difference"
        assert smoke.scalars[key] == pytest.approx(parts[0] - parts[1], abs=1e-12)
        assert [smoke.scalars[f"{key}_{end}"] for end in ("low", "high")] == pytest.approx(ends, rel=1e-6)


def test_what_is_read_off_the_grid(smoke):
    for task in TASKS:
        cells = grid(smoke, task)
        best = cells.min(axis=0)  # over learning rates, one for each of 0.25, 1 and inf
        assert smoke.scalars[f"{task}.grid.spread"] == abs(best[0] - best[1])
        assert smoke.scalars[f"{task}.grid.unclipped"] == best[2] - cells.min()
        assert smoke.scalars[f"{task}.grid.cost"] == cells.size * SMOKE.setting(task).steps
        assert smoke.scalars[f"{task}.best.edge"] is True  # two learning rates are both ends


def test_a_warm_up_that_is_given_up_leaves_a_record_without_advice(tmp_path):
    wild = dataclasses.replace(SMOKE.language, guesses=(0.5, 4.0, 1e30))
    record = run(dataclasses.replace(SMOKE, name="wild", language=wild), tmp_path)
    assert len(points(record, "language", "long")["step"]) < FEWEST * len(SMOKE.seeds)
    for recipe in GUESSED:
        key = f"language.{recipe}-long"
        assert record.scalars[f"{key}.train"] == math.inf
        assert record.scalars[f"{key}.lost"] == len(SMOKE.seeds)
        assert math.isnan(record.scalars[f"{key}.octaves"])
        assert record.scalars[f"language.{recipe}.spread"] == math.inf
        assert record.scalars[f"language.{recipe}-short.train"] < math.inf
    assert "no advice" in table(record, "language")


class Nearly:
    """A task whose loss is finite, and its gradient or its curvature is not, or vanishes."""

    guess = 10.0

    def __init__(self, loss):
        self.loss_of = loss

    def model(self, seed):
        module = torch.nn.Module()
        module.w = torch.nn.Parameter(torch.zeros(3))
        return module

    def start(self):
        return None

    def loss(self, model, k, state):
        return self.loss_of(model.w), None


@pytest.mark.parametrize(
    "loss",
    [lambda w: (w * 0).sum(), lambda w: w.sum(), lambda w: w.abs().sqrt().sum(), lambda w: (w**2).sum()],
    ids=["no gradient", "no curvature", "infinite gradient", "at a minimum"],
)
def test_a_guessed_warm_up_ends_where_nothing_can_be_measured(loss, monkeypatch):
    monkeypatch.setattr(threshold, "_task", lambda config, task: Nearly(loss))
    assert threshold._guessed(SMOKE, "language", "long", 1, 1.0) == []


def test_the_table_has_a_row_for_everything_that_was_evaluated(smoke):
    for task in TASKS:
        html = table(smoke, task)
        for label in LABELS.values():
            assert f"<th>{label}</th>" in html
        assert html.count("<tr>") == 1 + len(LABELS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norms": (1.0, math.inf)}, "norms must have 1, 0.25 and inf among them, got"),
        ({"norms": (0.25, 1.0)}, "norms must have 1, 0.25 and inf among them, got"),
        ({"seeds": (1,)}, "seeds must be two or more"),
        ({"seeds": (1, 100)}, "none of the tuning's"),
        (
            {"images": dataclasses.replace(SMOKE.images, steps=15)},
            "steps must be a multiple of 10, got 15 for images",
        ),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMOKE, **changes)


def test_profiles():
    short, paper = Config.profile("short"), Config.profile("paper")
    for config in (short, paper):
        assert config.language.task.corpus == config.characters.task.corpus == "penn-treebank"
        assert config.images.task.images == "cifar10"
    assert (paper.language.task.embedding, paper.language.task.hidden) == (200, 512)
    assert paper.images.task.blocks == 3
    with pytest.raises(ValueError, match="profile must be one of"):
        Config.profile("huge")
