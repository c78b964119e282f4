import dataclasses
import math
import re

import numpy as np
import pytest
import torch

from gradclip import records
from gradclip.data import text
from gradclip.experiments import language_model
from gradclip.experiments._probing import PATHS
from gradclip.experiments.language_model import (
    Config,
    Regularised,
    Setting,
    compare,
    of_setting,
    run,
    summarise,
)
from gradclip.models.lstm import LanguageModel

SMOKE = Config.profile("smoke")
CORPUS = text.reference_manual()
FIRST, *OTHERS = SMOKE.settings
AWD = OTHERS[-1]
# A plain setting and one with masks and averaging, for what has to run again and again.
TWO = dataclasses.replace(SMOKE, settings=(FIRST, AWD))
ESTIMATES = (*PATHS, "path_max", "local", "other_batch")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return run(SMOKE, tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="module")
def first(smoke):
    return of_setting(smoke.series, FIRST.name)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run(TWO, tmp_path_factory.mktemp("two"))


def test_the_smoke_profile_gives_a_whole_record(smoke):
    assert (smoke.experiment, smoke.profile) == ("language-model", "smoke")
    assert records.is_current(smoke)
    assert smoke.config["seeds"] == [0, 1]
    assert [setting["name"] for setting in smoke.config["settings"]] == [
        "lr30_clip",
        "lr2",
        "lr2_clip",
        "awd",
    ]
    assert [setting["task"] for setting in smoke.config["settings"]] == ["language"] * 3 + ["regularised"]
    assert smoke.series["iteration"].tolist() == list(range(SMOKE.steps)) * 8
    for setting in SMOKE.settings:
        seeds = of_setting(smoke.series, setting.name)["seed"]
        assert seeds.tolist() == [0] * SMOKE.steps + [1] * SMOKE.steps
    assert smoke.scalars["probe.count"] == 2 * SMOKE.steps
    assert smoke.scalars["data.sha256"] == smoke.provenance["data_sha256"] == text.reference_manual().sha256
    assert smoke.provenance["wall_time_s"] > 0


def test_every_documented_key_is_there_and_every_key_is_documented(smoke):
    subset = "(late|short|unclipped|clipped)"
    lines = language_model.__doc__.split("\n\n")
    tables = [block for block in lines if block.startswith("====")]
    columns, keys, third = (
        [
            name
            for row in table.splitlines()[3:-1]
            for name in re.findall(r"``(.+?)``", row[: table.index(" ")])
        ]
        for table in tables
    )
    assert set(smoke.series) == {*columns, "path_1_3", "path_1_2", "path_2_3", "path_5_6"}
    keys += third

    patterns = []
    for key in keys:
        if key.startswith("..."):
            key = "train.grad_norm" + key[3:]
        pattern = re.escape(key).replace("EST", "(path|largest|local|other)")
        pattern = pattern.replace("ANY", "(path|largest|local|other|along|fixed|released)")
        pattern = pattern.replace("SETTING", "(lr30_clip|lr2|lr2_clip|awd)")
        patterns.append(pattern.replace("SUBSET", subset))
    for name in ("slope", "saturation", "l1_ols", "l1_ols_over_mechanical"):
        patterns.append(f"{subset}.{name}_(path|largest|local|other)")
    for pattern in patterns:
        assert any(re.fullmatch(pattern, key) for key in smoke.scalars), pattern
    whole = re.compile(rf"({'|'.join(patterns)})(_min|_max|_low|_high|_least|_most|\.seed[01])?")
    assert [key for key in smoke.scalars if not whole.fullmatch(key)] == []


def test_each_column_is_measured_when_its_time_comes(smoke):
    k = smoke.series["iteration"]
    rarely = {
        **dict.fromkeys(("along", "random", "fixed", "fixed_grad_norm"), SMOKE.product_every),
        **dict.fromkeys(language_model.RELEASED, SMOKE.released_every),
        "hessian_norm": SMOKE.hessian_every,
    }
    for name, column in smoke.series.items():
        if name in ("setting", "valid_average"):
            continue
        expected = k % rarely.get(name, 1) == 0
        if name == "valid":  # in between only where an average waits for it
            awd = smoke.series["setting"] == "awd"
            expected = (k == SMOKE.steps - 1) | (awd & ((k + 1) % SMOKE.valid_every == 0))
        assert np.array_equal(np.isfinite(column), expected), name
    assert not smoke.series["diverged"].any()
    # Only the AWD-LSTM has an average, and not before a second validation.
    assert not np.isfinite(smoke.series["valid_average"][smoke.series["setting"] != "awd"]).any()


def test_the_scalars_that_were_fixed_before_the_run_are_there(smoke, first):
    # Minimum and maximum over seeds, recomputed from the series by numpy alone.
    def per_seed(statistic):
        rows = [first["seed"] == seed for seed in (0, 1)]
        return [statistic({name: column[row] for name, column in first.items()}) for row in rows]

    for key, column in (("path", "path_1_2"), ("local", "local")):
        pearson = per_seed(lambda s, c=column: np.corrcoef(np.log(s["grad_norm"]), np.log(s[c]))[0, 1])
        slope = per_seed(lambda s, c=column: np.polyfit(np.log(s["grad_norm"]), np.log(s[c]), 1)[0])
        # float64 least squares of 12 well-spread points, by two algorithms.
        assert smoke.scalars[f"probe.pearson_{key}_min"] == pytest.approx(min(pearson), rel=1e-9)
        assert smoke.scalars[f"probe.slope_{key}_min"] == pytest.approx(min(slope), rel=1e-9)
        assert smoke.scalars[f"probe.slope_{key}_max"] == pytest.approx(max(slope), rel=1e-9)
    saturation = np.median(first["path_1_2"] / first["bound"])
    assert smoke.scalars["probe.saturation_median"] == pytest.approx(saturation, rel=1e-12)
    low, high = (smoke.scalars[f"probe.l1_ols_over_mechanical_{end}"] for end in ("min", "max"))
    assert 0 <= low <= high
    # Curvature times the gradient's factor is the relative change of the gradient per step: over a hundredth
    # of the step it changes by a hundredth of that. The lengths of updates are rounded to float32.
    factor = smoke.scalars["probe.step_curvature"]
    assert factor == pytest.approx(100 * smoke.scalars["probe.saturation_local"], rel=1e-5)


def direct_gradient(model, pair, state):
    logits, _ = model(pair[0], state)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), pair[1].flatten())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double()


def test_the_first_probe_is_what_its_formula_says(first):
    # Independent of path_smoothness and ClippedSGD: two models, and the parameters set by hand.
    corpus = text.reference_manual()
    pairs = text.segments(text.batchify(corpus.train, FIRST.batch), FIRST.bptt)

    def model():
        sizes = {"embedding": FIRST.embedding, "hidden": FIRST.hidden, "layers": FIRST.layers}
        generator = torch.Generator().manual_seed(0)
        return LanguageModel(len(corpus.vocabulary), **sizes, generator=generator)

    here, there = model(), model()
    zeros = here.initial_state(FIRST.batch)
    g = direct_gradient(here, pairs[0], zeros)
    factor = min(1.0, FIRST.max_norm / g.norm().item())
    d = -FIRST.lr * factor * g
    _, after = here(pairs[0][0], zeros)

    def gradient_at(fraction, pair, state):
        x = torch.nn.utils.parameters_to_vector(here.parameters()).double() + fraction * d
        torch.nn.utils.vector_to_parameters(x.float(), there.parameters())
        return direct_gradient(there, pair, state)

    expected = {
        f"path_{name}": ((gradient_at(a, pairs[0], zeros) - g).norm() / (a * d.norm())).item()
        for name, a in (("1_6", 1 / 6), ("1_3", 1 / 3), ("1_2", 1 / 2), ("2_3", 2 / 3), ("5_6", 5 / 6))
    }
    expected["path_max"] = max(expected.values())
    expected["local"] = ((gradient_at(0.01, pairs[0], zeros) - g).norm() / (0.01 * d.norm())).item()
    other = gradient_at(0.5, pairs[1], [(h.detach(), c.detach()) for h, c in after])
    expected["other_batch"] = ((other - g).norm() / (0.5 * d.norm())).item()
    expected["bound"] = (g.norm() / (d.norm() / 2)).item()
    expected |= {"grad_norm": g.norm().item(), "clip_factor": factor, "update_length": d.norm().item()}
    for name, value in expected.items():
        # float32 gradients are right to some 1e-6, and at a hundredth of the step they change by some
        # 1e-2 of their norm: 1e-4 in `local`.
        assert first[name][0] == pytest.approx(value, rel=1e-3 if name == "local" else 2e-5), name


def test_training_is_clipped_sgd_on_consecutive_segments(first):
    # The same losses from torch's own clipping and SGD, without a probe in between.
    corpus = text.reference_manual()
    pairs = text.segments(text.batchify(corpus.train, FIRST.batch), FIRST.bptt)
    model = LanguageModel(
        len(corpus.vocabulary),
        embedding=FIRST.embedding,
        hidden=FIRST.hidden,
        layers=FIRST.layers,
        generator=torch.Generator().manual_seed(1),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=FIRST.lr)
    state = model.initial_state(FIRST.batch)
    losses = []
    for words, targets in pairs[: SMOKE.steps]:
        loss, state = model.loss(words, targets, state)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), FIRST.max_norm)
        optimizer.step()
        losses.append(loss.item())
    recorded = first["loss"][first["seed"] == 1]
    # float32, and the 1e-6 that torch adds to the norm, over twelve steps that amplify differences a little.
    np.testing.assert_allclose(recorded, losses, rtol=1e-4)


def test_the_table_shows_the_numbers_of_the_record(smoke):
    rows = re.findall(r"<tr>(.*?)</tr>", language_model.table(smoke))
    assert len(rows) == 7
    scalars = smoke.scalars
    local = [scalars[f"probe.slope_local{end}"] for end in ("", "_min", "_max")]
    assert f"<td>{local[0]:.2f} ({local[1]:.2f} to {local[2]:.2f})</td>" in rows[2]


def test_the_refits_show_the_numbers_of_the_record(smoke):
    rows = re.findall(r"<tr>(.*?)</tr>", language_model.refit_table(smoke))
    assert len(rows) == 5
    scalars = smoke.scalars
    local = [scalars[f"short.l1_ols_over_mechanical_local{end}"] for end in ("", "_min", "_max")]
    cells = [str(scalars["short.count"]), f"{local[0]:.2f} ({local[1]:.2f} to {local[2]:.2f})"]
    assert re.findall(r"<td>(.*?)</td>", rows[2])[::2] == cells


def test_relative_change_is_the_estimate_over_its_own_level(smoke, first):
    fractions, change = language_model.relative_change(first)
    assert fractions.tolist() == [0.01, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6]
    assert change.shape == (2 * SMOKE.steps, 6)
    # The same quotient, put together from other columns whose norms are rounded to float32.
    np.testing.assert_allclose(change[:, 3], first["path_1_2"] / first["bound"], rtol=1e-5)
    assert np.median(change[:, 0]) == pytest.approx(smoke.scalars["probe.saturation_local"], rel=1e-5)


def equal_but_for_time(a, b):
    assert a.series.keys() == b.series.keys()
    for name in a.series:
        assert a.series[name].tobytes() == b.series[name].tobytes(), name
    assert {key: repr(value) for key, value in a.scalars.items()} == {
        key: repr(value) for key, value in b.scalars.items()
    }
    assert a.config == b.config
    moving = {"finished", "wall_time_s", "git_commit", "git_clean"}
    assert {k: v for k, v in a.provenance.items() if k not in moving} == {
        k: v for k, v in b.provenance.items() if k not in moving
    }


@pytest.mark.parametrize("stop_after", [3, SMOKE.steps, 2 * SMOKE.steps + 7])
def test_a_stopped_run_goes_on_to_the_same_record(tmp_path, monkeypatch, two, stop_after):
    # In the first run, between two runs, and in one with masks, after a validation.
    steps = []
    step = language_model._Training.step
    original_train = language_model.train

    def counted(self, iteration):
        if len(steps) == stop_after:
            raise KeyboardInterrupt
        steps.append(iteration)
        return step(self, iteration)

    monkeypatch.setattr(language_model, "train", lambda *a, **kw: original_train(*a, **kw, interval=0.0))
    with monkeypatch.context() as patch:
        patch.setattr(language_model._Training, "step", counted)
        with pytest.raises(KeyboardInterrupt):
            run(TWO, tmp_path)
    with pytest.raises(records.RecordError):
        records.load(tmp_path / "language-model" / "smoke-cpu")
    equal_but_for_time(run(TWO, tmp_path), two)
    # The checkpoints are gone, and only the record is left.
    assert [path.name for path in (tmp_path / "language-model").iterdir()] == ["smoke-cpu"]


def test_a_finished_record_is_read_and_not_made_again(tmp_path, monkeypatch):
    short = dataclasses.replace(SMOKE, settings=(FIRST,))
    made = run(short, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(language_model, "train", None)
        equal_but_for_time(run(short, tmp_path), made)
    # Another configuration, or other source, is another run.
    calls = []
    original_train = language_model.train
    monkeypatch.setattr(language_model, "train", lambda *a, **kw: calls.append(1) or original_train(*a, **kw))
    other = dataclasses.replace(SMOKE, settings=(dataclasses.replace(FIRST, lr=10.0),))
    assert run(other, tmp_path).config["settings"][0]["lr"] == 10.0
    assert len(calls) == 2
    monkeypatch.setattr(records, "source_hash", lambda: "0" * 64)
    assert run(other, tmp_path).provenance["source_sha256"] == "0" * 64
    assert len(calls) == 4


def test_the_source_is_the_one_that_the_run_started_with(tmp_path, monkeypatch):
    original_train = language_model.train

    def edited_meanwhile(*args, **kw):
        monkeypatch.setattr(records, "source_hash", lambda: "0" * 64)
        return original_train(*args, **kw)

    now = records.source_hash()
    monkeypatch.setattr(language_model, "train", edited_meanwhile)
    short = dataclasses.replace(SMOKE, settings=(FIRST,), seeds=(0,))
    assert run(short, tmp_path).provenance["source_sha256"] == now


def denormals_are_flushed():
    return (torch.tensor(2.0**-100) * torch.tensor(2.0**-40)).item() == 0.0


@pytest.mark.parametrize("flushed", [False, True])
def test_global_settings_and_generators_are_left_alone(tmp_path, flushed):
    threads = torch.get_num_threads()
    torch.set_flush_denormal(flushed)
    torch.set_num_threads(2)
    torch.manual_seed(4)
    generator = torch.get_rng_state()
    try:
        run(dataclasses.replace(TWO, seeds=(0,)), tmp_path)
        assert denormals_are_flushed() == flushed
        assert torch.get_num_threads() == 2
        assert torch.backends.cudnn.allow_tf32
        assert torch.equal(torch.get_rng_state(), generator)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def made_up_series(estimate, lr=2.0, max_norm=0.5, seeds=(0, 1), steps=40):
    """Gradient norms on both sides of the threshold, and every estimate given by ``estimate(g, bound)``."""
    g = np.tile(np.geomspace(0.05, 5.0, steps), len(seeds))
    factor = np.minimum(1.0, max_norm / g)
    bound = g / (lr * factor * g / 2)
    probes = dict.fromkeys(ESTIMATES, estimate(g, bound))
    iteration = np.tile(np.arange(steps), len(seeds))
    return {
        "seed": np.repeat(seeds, steps),
        "iteration": iteration,
        "loss": 7.0 - 0.1 * iteration,
        "grad_norm": g,
        "clip_factor": factor,
        "update_length": lr * factor * g,
        "bound": bound,
        **probes,
    }


def test_an_estimate_on_its_bound_has_the_mechanical_slope_and_no_other():
    scalars = summarise(made_up_series(lambda g, bound: bound), lr=2.0, max_norm=0.5)
    assert scalars["mechanical.l1"] == 2.0
    assert scalars["mechanical.flat"] == 1.0
    assert scalars["probe.saturation_median"] == 1.0
    # Clipped: the bound is (2/(lr c)) g, a line through 0; ratio and exponent are 1 up to rounding.
    assert scalars["clipped.l1_ols_over_mechanical_path"] == pytest.approx(1.0, rel=1e-12)
    assert scalars["clipped.slope_path"] == pytest.approx(1.0, rel=1e-12)
    assert scalars["clipped.pearson_path"] == pytest.approx(1.0, rel=1e-12)
    # With g - mean for each point by hand; made-up estimates are all equal, so the first is the largest.
    g = np.geomspace(0.05, 5.0, 40)
    weight = (g - g.mean()) ** 2
    assert scalars["probe.leverage_clipped"] == pytest.approx(weight[g > 0.5].sum() / weight.sum(), rel=1e-12)
    assert scalars["probe.largest_at_first"] == 1.0
    # At a sixth of the step the bound is three times as high as at the midpoint.
    assert scalars["probe.saturation_largest"] == pytest.approx(1 / 3, rel=1e-12)
    # 0.05 · 100^(i/39) is at least 2c = 1 from i = 26 on.
    assert scalars["long.count"] == 28
    assert scalars["long.saturation_path_least"] == scalars["long.saturation_path_most"] == 1.0
    assert scalars["probe.leverage_long"] == pytest.approx(weight[26:].sum() / weight.sum(), rel=1e-12)
    assert scalars["mechanical.step"] == 1.0
    # Unclipped: flat, so the slope is 0.
    assert scalars["unclipped.l1_ols_path"] == pytest.approx(0.0, abs=1e-12)
    assert scalars["clipped.count"] + scalars["unclipped.count"] == scalars["probe.count"] == 80


def test_a_line_is_found_with_its_constants():
    scalars = summarise(made_up_series(lambda g, bound: 0.3 + 0.7 * g), lr=2.0, max_norm=0.5)
    for method in ("ols", "envelope"):
        # The data are a line; the linear programme is solved to 1e-10.
        assert scalars[f"probe.l0_{method}_local"] == pytest.approx(0.3, rel=1e-8)
        assert scalars[f"probe.l1_{method}_local"] == pytest.approx(0.7, rel=1e-8)
        assert scalars[f"probe.l1_{method}_local_low"] == pytest.approx(0.7, rel=1e-8)
    assert scalars["probe.l1_ols_over_mechanical_min"] == pytest.approx(0.35, rel=1e-9)
    assert scalars["probe.radius_local_max"] == pytest.approx(1 / 0.7, rel=1e-9)
    # With lr = 2 the step is min(2 g, 1), and curvature times its factor 0.6 + 1.4 g below g = 0.5, and above
    # it 0.7 + 0.3/g, which is at most 1.3.
    g = np.geomspace(0.05, 5.0, 40)
    curvature = np.where(g < 0.5, 0.6 + 1.4 * g, 0.7 + 0.3 / g)
    assert scalars["probe.step_curvature"] == pytest.approx(np.median(curvature), rel=1e-12)
    assert scalars["probe.step_curvature_above_2"] == 0.0
    assert scalars["probe.step_length"] == pytest.approx(np.median(np.minimum(2 * g, 1.0)), rel=1e-12)
    # Four times as curved: 2.4 + 5.6 g, or 2.8 + 1.2/g, above 2 everywhere.
    steep = summarise(made_up_series(lambda g, bound: 1.2 + 2.8 * g), lr=2.0, max_norm=0.5)
    assert steep["probe.step_curvature_above_2"] == 1.0
    # A falling cloud has no slope left, and nothing limits how far the constant speaks.
    falling = summarise(made_up_series(lambda g, bound: 1 / g), lr=2.0, max_norm=0.5)
    assert falling["probe.radius_local"] == math.inf
    # At the local fraction the bound is 50 times as high as at the midpoint.
    series = made_up_series(lambda g, bound: bound)
    assert summarise(series, lr=2.0, max_norm=0.5)["probe.saturation_local"] == pytest.approx(0.02, rel=1e-12)


def test_spread_is_over_seeds_and_unprobed_steps_are_left_out():
    series = made_up_series(lambda g, bound: np.repeat([1.0, 3.0], 40) * g)
    series["loss"] = series["loss"] + series["seed"]
    odd = series["iteration"] % 2 == 1
    for name in ("bound", *ESTIMATES):
        series[name] = np.where(odd, math.nan, series[name])
    scalars = summarise(series, lr=2.0, max_norm=0.5)
    assert scalars["probe.count"] == 40
    assert (
        scalars["late.count"] == 38
    )  # without the first twentieth, two steps of which one is probed per seed
    for suffix, value in (("_min", 1.0), ("_max", 3.0), (".seed0", 1.0), (".seed1", 3.0)):
        assert scalars[f"probe.l1_ols_path{suffix}"] == pytest.approx(value, rel=1e-9)
    # A clipped step has the bound 2 g.
    assert scalars["clipped.saturation_path_least"] == pytest.approx(0.5, rel=1e-12)
    assert scalars["clipped.saturation_path_most"] == pytest.approx(1.5, rel=1e-12)
    assert scalars["train.loss_initial_min"] == 7.0
    assert scalars["train.loss_initial_max"] == 8.0
    # Mean of 7 - 0.1 k + seed over the last four steps k = 36 ... 39.
    assert scalars["train.loss_final"] == pytest.approx(7.0 - 3.75 + 0.5, rel=1e-12)


def test_too_few_points_say_nothing():
    scalars = summarise(made_up_series(lambda g, bound: g, max_norm=4.0), lr=2.0, max_norm=4.0)
    # Only the last two of the forty gradient norms of each seed are above 4.
    assert scalars["clipped.count"] == 4
    assert math.isnan(scalars["clipped.slope_path"])
    # None reaches twice the threshold.
    assert (scalars["long.count"], scalars["probe.leverage_long"]) == (0, 0.0)
    assert math.isnan(scalars["long.saturation_path_least"])


def made_up_settings():
    """Two settings whose estimates are powers of the gradient norm, and one without a relation."""
    falling = made_up_series(lambda g, bound: 1 / g)
    rows = {
        "first": made_up_series(lambda g, bound: g),
        "steep": made_up_series(lambda g, bound: g**2, max_norm=math.inf),
        "noise": made_up_series(lambda g, bound: g * np.tile([1.0, 10.0, 0.1, 1.0], 20)),
    }
    series = {"setting": np.repeat(list(rows), 80)}
    for name in falling:
        series[name] = np.concatenate([part[name] for part in rows.values()])
    g = series["grad_norm"]
    odd = series["iteration"] % 2 == 1
    series |= {
        "along": np.where(odd, math.nan, 2 * series["local"]),
        "fixed": np.where(odd, math.nan, g**3),
        "fixed_grad_norm": np.where(odd, math.nan, g),
        "released": np.full_like(g, math.nan),
        "released_grad_norm": np.full_like(g, math.nan),
        # Ends as long as it began, and has changed by a half or, in the other seed, by a whole of its length.
        "end_grad_norm": g,
        "path_1": np.where(series["seed"] == 0, 0.25, 0.5) * series["bound"],
        "lr": np.full_like(g, 2.0),
        "hessian_norm": np.where(series["iteration"] % 20 == 10, 4 * series["local"], math.nan),
        "valid": np.where(series["iteration"] == 39, 5.0 + series["seed"], math.nan),
        "valid_average": np.where((series["iteration"] == 39) & (series["seed"] == 1), 4.0, math.nan),
        "diverged": np.zeros_like(g),
    }
    sizes = {"embedding": 4, "hidden": 6, "layers": 2, "batch": 4, "bptt": 6}
    return series, [
        Setting("first", 2.0, 0.5, **sizes),
        Setting("steep", 2.0, math.inf, **sizes),
        Setting("noise", 2.0, 0.5, **sizes),
    ]


def test_each_setting_has_its_correlations_and_they_are_compared_with_the_first():
    series, settings = made_up_settings()
    scalars = compare(series, settings)
    # ln s is a line in ln g: correlation 1, slope the exponent, whatever the seed, up to rounding.
    for name, slope in (("first", 1.0), ("steep", 2.0)):
        for end in ("", "_min", "_max", "_low", "_high"):
            assert scalars[f"{name}.pearson_local{end}"] == pytest.approx(1.0, rel=1e-9)
        assert scalars[f"{name}.slope_largest_max"] == pytest.approx(slope, rel=1e-9)
        assert scalars[f"{name}.late_pearson_path"] == pytest.approx(1.0, rel=1e-9)
        assert scalars[f"{name}.slope_fixed"] == pytest.approx(3.0, rel=1e-9)
        assert scalars[f"{name}.along_over_local"] == 2.0
        assert (scalars[f"{name}.count_local"], scalars[f"{name}.count_along"]) == (80, 40)
        strict = [scalars[f"{name}.saturation_strict{end}"] for end in ("_min", "", "_max")]
        assert strict == pytest.approx([0.25, 0.375, 0.5], rel=1e-9)
    # The first setting's L1 is 1, its mechanical value 2/(2 · 0.5); without clipping there is none.
    assert scalars["first.l1_over_mechanical_local"] == pytest.approx(0.5, rel=1e-9)
    assert math.isnan(scalars["steep.l1_over_mechanical_local"])
    assert scalars["steep.contrast_local"] == pytest.approx(1.0, rel=1e-9)
    # By numpy alone; both seeds have the same numbers.
    rows = of_setting(series, "noise")
    expected = np.corrcoef(np.log(rows["grad_norm"][:40]), np.log(rows["local"][:40]))[0, 1]
    assert scalars["noise.contrast_local"] == pytest.approx(expected, rel=1e-9)
    # Nothing of the released estimate was measured.
    assert scalars["noise.count_released"] == 0
    assert math.isnan(scalars["noise.pearson_released"])
    assert math.isnan(scalars["noise.pearson_released_low"])
    # Norms of the Hessian at i = 10 and 30 of both seeds: four times the local estimate, which is g.
    assert scalars["first.hessian_count"] == 4
    ends = [scalars[f"first.hessian_norm{end}"] for end in ("_least", "", "_most")]
    low, high = 4 * rows["grad_norm"][10], 4 * rows["grad_norm"][30]
    assert ends == pytest.approx([low, (low + high) / 2, high], rel=1e-12)
    assert scalars["first.local_over_hessian"] == 0.25
    # η = 2; at i = 30 the step is clipped at γ = 0.5: 2 · 4 g γ/g.
    assert scalars["first.step_hessian_least"] == pytest.approx(2 * low, rel=1e-12)
    assert scalars["first.step_hessian_most"] == pytest.approx(4.0, rel=1e-12)
    # 0.05 · 100^(i/39) is above the threshold 0.5 from i = 20 on, and never above infinity.
    assert (scalars["first.clipped_share"], scalars["steep.clipped_share"]) == (0.5, 0.0)
    assert scalars["first.valid"] == 5.5
    assert (scalars["first.valid_average"], scalars["first.averaged"]) == (4.0, 0.5)
    assert scalars["first.diverged"] == 0


def test_settings_differ_as_they_say(smoke):
    lr2, lr2_clip, awd = (of_setting(smoke.series, setting.name) for setting in OTHERS)
    first = of_setting(smoke.series, FIRST.name)
    starts = smoke.series["iteration"] == 0
    # The same network, batch and seed: the plain settings begin with the same loss, and part.
    for rows in (lr2, lr2_clip):
        assert np.array_equal(rows["loss"][:1], first["loss"][:1])
        assert rows["loss"][-1] != first["loss"][-1]
        assert set(rows["lr"]) == {2.0}
    assert (lr2["clip_factor"] == 1.0).all()
    assert (lr2_clip["clip_factor"] < 1.0).any()
    # ‖d‖ = η min(‖g‖, γ), in float32.
    np.testing.assert_allclose(lr2["update_length"], 2 * lr2["grad_norm"], rtol=1e-5)
    np.testing.assert_allclose(
        lr2_clip["update_length"], 2 * np.minimum(lr2_clip["grad_norm"], 0.25), rtol=1e-5
    )
    # Dropout and penalties: another objective from the first step on, one for each seed.
    assert len(set(awd["loss"][awd["iteration"] == 0])) == 2
    assert smoke.scalars["awd.parameters"] > smoke.scalars["lr2.parameters"]
    assert starts.sum() == 8


def test_masks_belong_to_the_seed_and_the_batch():
    task = AWD.task("reference-manual", "cpu", seed=3)
    assert isinstance(task, Regularised)
    model = task.model(0)

    def loss(task, k):
        return task.loss(model, k, None)[0].item()

    values = [loss(task, 0), loss(task, 1)]
    assert [loss(task, 1), loss(task, 0)] == values[::-1]
    again = AWD.task("reference-manual", "cpu", seed=3)
    assert [loss(again, k) for k in (0, 1)] == values
    assert loss(AWD.task("reference-manual", "cpu", seed=4), 0) != values[0]
    # Nothing is dropped from the fixed batch: another seed's task gives the same.
    assert task.fixed(model).item() == AWD.task("reference-manual", "cpu", seed=4).fixed(model).item()


def test_the_released_estimate_is_taken_with_the_segments_of_its_own_stream():
    # Independent: gradients of the summed loss by hand, at x_k and half a step on.
    training = language_model._Training(SMOKE, CORPUS, FIRST, 1)
    model, params = training.probed.model, training.probed.params
    generator = torch.Generator().manual_seed(0)
    update = [0.01 * torch.randn(p.shape, generator=generator) for p in params]
    row = training._released(model, 6, update)
    assert training._released(model, 7, update) == {}

    stream = np.random.RandomState(1_000_003 * 2 + 6)
    streams = text.batchify(text.reference_manual().train[:1200], FIRST.batch)
    ends = [language_model.segment_lengths(stream, len(streams) // 10, FIRST.bptt) for _ in range(2)]

    def gradient(lengths):
        total, state, start = 0.0, model.initial_state(FIRST.batch), 0
        for length in lengths:
            h, state = model.outputs(streams[start : start + length], state)
            logits = h @ model.embedding.T + model.bias
            targets = streams[start + 1 : start + 1 + length]
            entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            total = total + entropy + 2 * (h**2).mean() + (h[1:] - h[:-1]).pow(2).mean()
            state = [(a.detach(), b.detach()) for a, b in state]
            start += length
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, params)]).double()

    here = gradient(ends[0])
    with torch.no_grad():
        for p, d in zip(params, update, strict=True):
            p.add_(d, alpha=0.5)
    there = gradient(ends[1])
    length = torch.cat([d.flatten() for d in update]).double().norm()
    # Differences of float32 gradients that change by a few per cent.
    assert row["released"] == pytest.approx(((there - here).norm() / (length / 2)).item(), rel=1e-3)
    assert row["released_grad_norm"] == pytest.approx((here.norm() / len(ends[0])).item(), rel=1e-5)
    assert row["released_segments"] == len(ends[0])


def test_the_iterates_of_the_awd_lstm_are_averaged():
    # After a loss of -1 any is too large: averaging starts with the first validation.
    config = dataclasses.replace(SMOKE, valid_every=2, released_every=0, product_every=0, hessian_every=0)
    training = language_model._Training(config, CORPUS, AWD, 0)
    training.average.losses = [-1.0, 9.0]
    iterates = []
    for k in range(6):
        row = training.step(k)
        iterates.append([p.detach().clone() for p in training.probed.params])
    # Validated after step 2, from where on the four iterates 3 to 6 are averaged.
    assert training.average.steps == 4
    expected = [torch.stack(several).mean(0) for several in zip(*iterates[2:], strict=True)]
    model = training.task.model(0)
    with torch.no_grad():
        for p, value in zip(model.parameters(), expected, strict=True):
            p.copy_(value)
    # The mean in float32 in another order.
    assert row["valid_average"] == pytest.approx(training.task.evaluate(model)["valid"], rel=1e-6)
    assert row["valid"] == training.task.evaluate(training.probed.model)["valid"]


def test_a_run_that_is_given_up_leaves_a_record_that_can_be_summarised(monkeypatch):
    training = language_model._Training(SMOKE, CORPUS, FIRST, 0)
    training.probed.diverged = True
    row = training.step(5)
    assert row["diverged"] == 1.0
    assert math.isnan(row["valid"])


def test_the_profiles():
    cpu, short, paper = (Config.profile(name) for name in ("cpu", "short", "paper"))
    assert (cpu.device, cpu.corpus) == ("cpu", "reference-manual")
    # n of Merity et al.; validations are closer together, so that there are more than n before the end.
    for config in (cpu, short, paper):
        assert (config.patience, config.steps // config.valid_every > 6) == (5, True)
    assert (short.device, short.corpus, paper.corpus) == ("cpu", "penn-treebank", "penn-treebank")
    for config in (cpu, short, paper):
        assert len(config.seeds) == 3
        # The paper's Figure 2, then the network that it names.
        assert [(s.name, s.lr, s.max_norm, s.awd) for s in config.settings] == [
            ("lr30_clip", 30.0, 0.25, False),
            ("lr2", 2.0, math.inf, False),
            ("lr2_clip", 2.0, 0.25, False),
            ("awd", 30.0, 0.25, True),
        ]
    # The released defaults of the paper's code, and the sizes of Merity et al.
    sizes = [(s.embedding, s.hidden, s.layers, s.batch, s.bptt) for s in paper.settings]
    assert sizes == [(200, 512, 2, 256, 70)] * 3 + [(400, 1150, 3, 80, 70)]
    assert paper.device == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(
        ValueError, match="needs 8 probed steps per seed, got 7 from steps=35 and probe_every=5"
    ):
        dataclasses.replace(cpu, steps=35)
    with pytest.raises(ValueError, match="released_every must be a multiple of probe_every=5, or 0, got 3"):
        dataclasses.replace(cpu, released_every=3)
    with pytest.raises(ValueError, match=r"settings must have different names, got \['awd', 'awd'\]"):
        dataclasses.replace(cpu, settings=(AWD, AWD))
    with pytest.raises(ValueError, match=r"profile must be one of \('smoke', 'cpu', 'short', 'paper'\), got"):
        Config.profile("huge")
