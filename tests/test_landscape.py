"""The experiment `landscape`: its record, its scalars, and its statistics on made-up series."""

import dataclasses
import hashlib
import math
import re

import numpy as np
import pytest
import torch

from gradclip import records
from gradclip.data import images, text
from gradclip.experiments import landscape
from gradclip.experiments.landscape import ESTIMATORS, FRACTIONS, NETWORKS, Config, run, summarise
from gradclip.models.lstm import LanguageModel
from gradclip.models.resnet import ResNet

SMOKE = Config.profile("smoke")
LANGUAGE = SMOKE.language
TEXT = LANGUAGE.task


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return run(SMOKE, tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="module")
def language(smoke):
    """The rows of the language model."""
    rows = smoke.series["network"] == "language"
    return {name: column[rows] for name, column in smoke.series.items()}


def test_the_smoke_profile_gives_a_whole_record(smoke):
    assert (smoke.experiment, smoke.profile) == ("landscape", "smoke")
    assert records.is_current(smoke)
    manual, digits = text.reference_manual().sha256, images.digits().sha256
    assert smoke.scalars["data.sha256"] == manual
    assert smoke.scalars["images.data.sha256"] == smoke.scalars["bare.data.sha256"] == digits
    whole = hashlib.sha256((manual + digits + digits).encode()).hexdigest()
    assert smoke.provenance["data_sha256"] == whole
    assert smoke.scalars["images.data.images"] == len(images.digits().train) - 237


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_is_measured_as_often_as_its_setting_says(smoke, network):
    setting = SMOKE.setting(network)
    series = {name: column[smoke.series["network"] == network] for name, column in smoke.series.items()}
    full = series["full"] == 1
    probes = {"language": 10, "images": 8, "bare": 8}[network]
    assert (~full).sum() == (len(setting.cells) - 1) * 2 * probes  # cells, seeds, probes
    iterations = [0, 4, 8, 12, 16] if network == "language" else [0, 4]
    assert series["iteration"][full].tolist() == 2 * iterations
    for name in ("path_0.01", "path_0.5", "swapped", "along", "hessian_norm"):
        assert (series[name][full] > 0).all()
    assert np.isnan(series["random"][full]).all()
    # Measured at every probe, at every second one, and at one.
    for names, every in (
        (("path_0.01", "path_0.5", "swapped", "grad_norm", "update_length"), slice(None)),
        (("along", "random", "fixed", "fixed_grad_norm", "path_0.003"), setting.product_every),
        (("hessian_norm",), setting.hessian_every),
    ):
        k = series["iteration"][~full]
        due = np.ones(len(k), dtype=bool)
        if every != slice(None):
            due = k % every == (every // 2 if names == ("hessian_norm",) else 0)
        for name in names:
            np.testing.assert_array_equal(np.isfinite(series[name][~full]), due, err_msg=name)
            assert (series[name][~full][due] > 0).all()


def test_every_documented_key_is_there_and_every_key_is_documented(smoke):
    tables = [block for block in landscape.__doc__.split("\n\n") if block.startswith("====")]
    columns, keys = (
        [name for row in table.splitlines()[3:-1] for name in re.findall(r"``(.+?)``", row[:38])]
        for table in tables
    )
    assert set(smoke.series) == set(columns) | {f"path_{a:g}" for a in FRACTIONS}
    subset = r"((late_)?plain_[\d.]+|grid|clipped|unclipped|late|full)"
    patterns = []
    for key in keys:
        pattern = re.escape(key).replace("EST", f"({'|'.join(ESTIMATORS)})").replace("SUBSET", subset)
        pattern = pattern.replace(
            "KIND", "(clipped|unclipped|late_clipped|full_(clipped|unclipped|settled))"
        ).replace("_A", r"_[\d.]+")
        patterns.append(pattern.replace("plain_LR", r"(late_)?plain_[\d.]+"))
    patterns += [r"fit_unclipped\.(ratio|zero)_\w+", r"fraction_clipped\.(agree_[\d.]+|largest)"]
    for pattern in patterns:
        for network, before in NETWORKS.items():
            of_one = {r"data\.images": network != "language"}
            of_one |= dict.fromkeys((r"data\.tokens", r"data\.vocabulary"), network == "language")
            found = any(re.fullmatch(re.escape(before) + pattern, key) for key in smoke.scalars)
            assert found == of_one.get(pattern, True), (network, pattern)
    whole = re.compile(rf"(images\.|bare\.)?({'|'.join(patterns)})(_min|_max|_low|_high)?")
    assert [key for key in smoke.scalars if not whole.fullmatch(key)] == []


def same_scalars(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert repr(a[key]) == repr(b[key]), key


def test_the_scalars_follow_from_the_series(smoke):
    for network, before in NETWORKS.items():
        rows = smoke.series["network"] == network
        again = summarise({name: column[rows] for name, column in smoke.series.items()})
        same_scalars({key: smoke.scalars[before + key] for key in again}, again)


def test_statistics_within_runs_and_over_runs_are_those_of_numpy_alone(smoke, language):
    # Regression with one indicator per run instead of subtracted means, and `polyfit` for the lines.
    s = language
    keys = np.stack([s["lr"], s["max_norm"], s["seed"]], axis=1)
    grid = np.isfinite(s["max_norm"]) & (s["full"] == 0)
    _, run_of = np.unique(keys[grid], axis=0, return_inverse=True)
    g, local, d, k = (
        np.log(s[name][grid]) if name != "iteration" else s[name][grid]
        for name in ("grad_norm", "path_0.01", "update_length", "iteration")
    )
    indicators = np.eye(run_of.max() + 1)[run_of]
    slope = np.linalg.lstsq(np.column_stack([g, indicators]), local, rcond=None)[0][0]
    assert smoke.scalars["grid.slope_local"] == pytest.approx(slope, rel=1e-9)

    # A partial correlation by the inverse of the covariance matrix.
    for key, remove in (("partial", False), ("partial_within", True)):
        table = np.column_stack([g, local, d, k, np.log1p(k)])
        if remove:
            table = table - indicators @ np.linalg.lstsq(indicators, table, rcond=None)[0]
        precision = np.linalg.inv(np.cov(table.T))
        partial = -precision[0, 1] / math.sqrt(precision[0, 0] * precision[1, 1])
        assert smoke.scalars[f"{key}.pearson_local"] == pytest.approx(partial, rel=1e-6)

    mechanical, l1 = [], []
    for run_number in range(run_of.max() + 1):
        rows = np.flatnonzero(grid)[run_of == run_number]
        value, intercept = np.polyfit(s["grad_norm"][rows], s["path_0.5"][rows], 1)
        assert value > 0
        if intercept < 0:  # the fit has L0 ≥ 0; on that edge the line goes through zero
            x, y = s["grad_norm"][rows], s["path_0.5"][rows]
            value = (x @ y) / (x @ x)
        l1.append(value)
        mechanical.append(2 / (s["lr"][rows[0]] * s["max_norm"][rows[0]]))
    slope = np.polyfit(np.log(mechanical), np.log(l1), 1)[0]
    assert smoke.scalars["fit.slope_midpoint"] == pytest.approx(slope, rel=1e-8)
    ratio = np.exp(np.log(np.array(l1) / mechanical).mean())
    assert smoke.scalars["fit.ratio_midpoint"] == pytest.approx(ratio, rel=1e-8)

    clipped = np.isfinite(s["hessian_norm"]) & grid & (s["grad_norm"] > s["max_norm"])
    edge = 2 * s["grad_norm"][clipped] / (s["lr"] * s["max_norm"])[clipped]
    # Of an even number, the mean of the two in the middle is taken of logarithms there: a bracket.
    middle = np.sort(s["hessian_norm"][clipped] / edge)
    low, high = middle[(len(middle) - 1) // 2], middle[len(middle) // 2]
    assert low * (1 - 1e-5) <= smoke.scalars["edge.ratio_clipped"] <= high * (1 + 1e-5)
    assert smoke.scalars["edge.count_clipped"] == clipped.sum()
    # The offset is the height of the line where its abscissa is the mean: `polyfit` evaluated there.
    x, y = np.log(edge), np.log(s["hessian_norm"][clipped])
    height = np.polyval(np.polyfit(x, y, 1), x.mean()) - x.mean()
    assert smoke.scalars["edge.offset_clipped"] == pytest.approx(math.exp(height), rel=1e-6)


def test_the_first_probe_is_what_its_formulas_say(language):
    # Independent of ClippedSGD and of the smoothness package: in float64, a Hessian-vector product by a
    # central difference of gradients.
    corpus = text.reference_manual()

    def first(words):
        return text.segments(text.batchify(words, TEXT.batch), TEXT.bptt)[0]

    sizes = {"embedding": TEXT.embedding, "hidden": TEXT.hidden, "layers": TEXT.layers}
    generator = torch.Generator().manual_seed(0)
    model = LanguageModel(len(corpus.vocabulary), **sizes, generator=generator).double()
    params = list(model.parameters())
    x = torch.nn.utils.parameters_to_vector(params).detach()

    def gradient(offset, pair=None):
        torch.nn.utils.vector_to_parameters(x + offset, params)
        value, _ = model.loss(*(pair or first(corpus.train)), model.initial_state(TEXT.batch))
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, params)])

    def product(direction):
        unit = direction / direction.norm()
        return (gradient(1e-5 * unit) - gradient(-1e-5 * unit)).norm().item() / 2e-5

    g = gradient(0 * x)
    d = -10.0 * min(1.0, 0.25 / g.norm().item()) * g
    generator = torch.Generator().manual_seed(1)
    r = torch.cat([torch.randn(p.shape, generator=generator).flatten() for p in params]).double()
    fixed = gradient(0 * x, first(corpus.valid))
    expected = {
        "grad_norm": g.norm().item(),
        "update_length": d.norm().item(),
        "path_0.5": ((gradient(d / 2) - g).norm() / (d / 2).norm()).item(),
        "path_0.01": ((gradient(d / 100) - g).norm() / (d / 100).norm()).item(),
        "swapped": ((gradient(-5.0 * g) - g).norm() / (5.0 * g).norm()).item(),
        "swapped_length": 10.0 * g.norm().item(),
        "along": product(d),
        "random": product(r),
        "fixed_grad_norm": fixed.norm().item(),
        "fixed": ((gradient(d / 100, first(corpus.valid)) - fixed).norm() / (d / 100).norm()).item(),
    }
    assert (language["lr"][0], language["max_norm"][0], language["seed"][0]) == (10.0, 0.25, 0)
    for name, value in expected.items():
        # float32 against float64: gradients are right to some 1e-6, and a hundredth of the step changes them
        # by some 1e-3 of their norm.
        assert language[name][0] == pytest.approx(
            value, rel=5e-3 if "0.01" in name or name == "fixed" else 1e-4
        )


@pytest.mark.parametrize("network", ["images", "bare"])
def test_the_first_probe_of_images_is_what_its_formulas_say(smoke, network):
    # As above: in float64, on the first batch of the first epoch's order, without the task's own loss.
    data = images.digits()
    trained, held_out = images.hold_out(len(data.train_labels), 237)
    statistics = images.channel_statistics(data.train[trained])
    order = trained[torch.randperm(len(trained), generator=torch.Generator().manual_seed(0))]

    def pixels(rows):
        return images.normalise(data.train[rows], *statistics, dtype=torch.float64)

    generator = torch.Generator().manual_seed(0)
    model = ResNet(
        blocks=1,
        width=2,
        channels=1,
        batch_norm=network == "images",
        sharpness=16.0,
        generator=generator,
    ).double()
    params = list(model.parameters())
    x = torch.nn.utils.parameters_to_vector(params).detach()

    def gradient(offset, rows=order[:8]):
        torch.nn.utils.vector_to_parameters(x + offset, params)
        value = torch.nn.functional.cross_entropy(model(pixels(rows)), data.train_labels[rows])
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, params)])

    def product(direction):
        unit = direction / direction.norm()
        return (gradient(1e-5 * unit) - gradient(-1e-5 * unit)).norm().item() / 2e-5

    setting = SMOKE.setting(network)
    lr, max_norm = setting.lrs[0], setting.max_norms[0]
    g = gradient(0 * x)
    d = -lr * min(1.0, max_norm / g.norm().item()) * g
    assert g.norm() > max_norm  # the swapped step is another one
    fixed = gradient(0 * x, held_out[:8])
    expected = {
        "grad_norm": g.norm().item(),
        "update_length": d.norm().item(),
        "path_0.5": ((gradient(d / 2) - g).norm() / (d / 2).norm()).item(),
        "path_0.01": ((gradient(d / 100) - g).norm() / (d / 100).norm()).item(),
        "swapped": ((gradient(-lr / 2 * g) - g).norm() / (lr / 2 * g).norm()).item(),
        "along": product(d),
        "fixed_grad_norm": fixed.norm().item(),
        "fixed": ((gradient(d / 100, held_out[:8]) - fixed).norm() / (d / 100).norm()).item(),
    }
    first = np.flatnonzero(smoke.series["network"] == network)[0]
    for name, value in expected.items():
        # float32 against float64, as above.
        assert smoke.series[name][first] == pytest.approx(
            value, rel=5e-3 if "0.01" in name or name == "fixed" else 1e-4
        ), name


def made_up(estimate):
    """Gradient norms around the thresholds, and every estimate from ``estimate(g, level, generator)``."""
    parts = []
    for number, (lr, max_norm) in enumerate(((10.0, 0.1), (30.0, 0.25), (60.0, 1.0), (2.0, math.inf))):
        for seed in (0, 1):
            generator = np.random.default_rng(10 * number + seed)
            g = np.exp(generator.normal(math.log(0.3), 0.8, 40))
            factor = np.minimum(1.0, max_norm / g)
            step = lr * factor * g
            part = {
                "lr": np.full(40, lr),
                "max_norm": np.full(40, max_norm),
                "seed": np.full(40, seed),
                "iteration": np.arange(40),
                "grad_norm": g,
                "fixed_grad_norm": g,
                "clip_factor": factor,
                "update_length": step,
                "hessian_norm": 2 / (lr * factor),
                "diverged": np.zeros(40),
                "full": np.zeros(40),
                "swapped_length": lr * g if math.isfinite(max_norm) else lr * np.minimum(g, 0.25),
            }
            names = (*(f"path_{a:g}" for a in FRACTIONS), "swapped", "along", "random", "fixed")
            part |= {name: estimate(g, g / (step / 2), generator) for name in names}
            parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_an_estimate_that_is_its_level_is_recognised_as_mechanical():
    series = made_up(lambda g, level, generator: level)
    clipped = landscape.fits(series, "midpoint", landscape.subsets(series)["clipped"])
    assert len(clipped["l1"]) >= 4
    np.testing.assert_allclose(clipped["l1"], clipped["mechanical"], rtol=1e-9)
    scalars = summarise(series)
    assert scalars["clipped.slope_midpoint"] == pytest.approx(1.0, rel=1e-9)
    assert scalars["clipped.pearson_midpoint"] == pytest.approx(1.0, rel=1e-9)
    # ρ is one number, so that shuffling it changes nothing.
    assert scalars["clipped.level_share_midpoint"] == pytest.approx(1.0, rel=1e-9)
    assert scalars["clipped.saturation_midpoint"] == pytest.approx(1.0, rel=1e-9)
    assert scalars["edge.ratio_clipped"] == pytest.approx(1.0, rel=1e-9)
    assert scalars["edge.slope_clipped"] == pytest.approx(1.0, rel=1e-9)
    assert scalars["edge.offset_clipped"] == pytest.approx(1.0, rel=1e-9)
    assert scalars["fraction.largest"] == FRACTIONS[-1]


def test_an_estimate_of_the_landscape_is_recognised_as_such():
    def real(g, level, generator):
        return (1 + 3 * g) * np.exp(generator.normal(0, 0.05, len(g)))

    scalars = summarise(made_up(real))
    # L1 = 3 wherever the step is; noise of 5 % moves a slope over 40 points by a few percent.
    assert scalars["fit.slope_local"] == pytest.approx(0.0, abs=0.1)
    assert scalars["partial_within.pearson_local_low"] > 0.8
    assert scalars["difference.pearson_local_low"] > 0.8
    assert scalars["grid.shuffled_local"] < 0.3


def test_an_estimate_that_ignores_the_gradient_shows_no_correlation():
    noise = summarise(made_up(lambda g, level, generator: np.exp(generator.normal(size=len(g)))))
    # 240 independent points: a correlation has the standard error 1/√234.
    for key in ("grid.pearson_local", "partial_within.pearson_local", "difference.pearson_local"):
        assert abs(noise[key]) < 4 / math.sqrt(234) * (1.5 if key.startswith("difference") else 1), key
    # And its level alone gives much, if ρ is what is shuffled, only where ρ moves less than the level.
    assert noise["clipped.level_midpoint"] < 0.8


def test_an_offset_is_the_height_of_the_line_over_the_edge():
    # Hessians on 3 (2/η_k)^(1/2): at the mean of the logarithms that is 3 exp(-mean ln(2/η_k)/2) of the edge.
    series = made_up(lambda g, level, generator: level)
    edge = series["hessian_norm"].copy()
    series["hessian_norm"] = 3 * np.sqrt(edge)
    scalars = summarise(series)
    clipped = (series["clip_factor"] < 1) & np.isfinite(series["max_norm"])
    assert scalars["edge.slope_clipped"] == pytest.approx(0.5, rel=1e-9)
    expected = 3 * math.exp(-np.log(edge[clipped]).mean() / 2)
    assert scalars["edge.offset_clipped"] == pytest.approx(expected, rel=1e-9)


def test_a_run_that_diverges_is_cut_and_counted(tmp_path):
    few = {"full_lrs": (), "full_max_norms": ()}
    config = dataclasses.replace(
        SMOKE,
        language=dataclasses.replace(SMOKE.language, lrs=(10.0,), max_norms=(1.0,), plain_lrs=(1e5,), **few),
        images=dataclasses.replace(SMOKE.images, lrs=(0.1,), max_norms=(1.0,), **few),
        bare=dataclasses.replace(SMOKE.bare, lrs=(0.1,), max_norms=(1.0,), **few),
        seeds=(0,),
    )
    record = run(config, tmp_path)
    assert record.scalars["plain_100000.diverged"] == 1
    assert record.scalars["bare.plain_0.3.diverged"] == 0
    language = record.series["network"] == "language"
    plain = language & np.isinf(record.series["max_norm"])
    assert 1 <= plain.sum() < 10
    diverged = record.series["diverged"]
    assert diverged[language].tolist() == [0.0] * 10 + [0.0] * (plain.sum() - 1) + [1.0]
    assert not diverged[~language].any()


def test_a_stopped_run_goes_on_to_the_same_record(tmp_path, monkeypatch, smoke):
    train, calls = landscape._train, []
    jobs = 2 * sum(len(SMOKE.setting(network).cells) for network in NETWORKS)

    def interrupted(*arguments):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(arguments)
        return train(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(landscape, "_train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(SMOKE, tmp_path)
    again = []
    monkeypatch.setattr(landscape, "_train", lambda *a: again.append(1) or train(*a))
    record = run(SMOKE, tmp_path)
    assert len(again) == jobs - 5
    same_scalars(record.scalars, smoke.scalars)
    for name, column in record.series.items():
        np.testing.assert_array_equal(column, smoke.series[name])
    # A finished one is read.
    run(SMOKE, tmp_path)
    assert len(again) == jobs - 5


def test_what_falls_between_two_probes_is_refused():
    with pytest.raises(ValueError, match=r"product_every must be a multiple of probe_every=2, got 3"):
        dataclasses.replace(LANGUAGE, product_every=3)
    with pytest.raises(ValueError, match=r"half of hessian_every must be a multiple .* got 5"):
        dataclasses.replace(LANGUAGE, hessian_every=10)


def test_an_unknown_profile_is_named():
    with pytest.raises(ValueError, match=r"profile must be one of .*, got 'large'"):
        Config.profile("large")


def test_every_run_on_the_full_batch_has_a_threshold():
    with pytest.raises(ValueError, match=r"one threshold for each of full_lrs=\(30.0,\), got \(\)"):
        dataclasses.replace(LANGUAGE, full_max_norms=())


def test_a_full_batch_of_images_has_some():
    with pytest.raises(ValueError, match=r"full_images must be at least 1, got 0"):
        dataclasses.replace(SMOKE.images, full_images=0)


def test_a_run_on_the_full_batch_is_descent_on_one_function(language):
    # Plain torch: the same batch at every step, from a hidden state of zeros.
    corpus = text.reference_manual()
    words, targets = text.segments(text.batchify(corpus.train, TEXT.batch), TEXT.bptt)[0]
    sizes = {"embedding": TEXT.embedding, "hidden": TEXT.hidden, "layers": TEXT.layers}
    model = LanguageModel(len(corpus.vocabulary), **sizes, generator=torch.Generator().manual_seed(0))
    optimizer, losses = torch.optim.SGD(model.parameters(), 30.0), []
    for _ in range(LANGUAGE.full_steps):
        loss, _ = model.loss(words, targets, model.initial_state(TEXT.batch))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        losses.append(loss.item())
    rows = (language["full"] == 1) & (language["seed"] == 0) & (language["iteration"] <= 8)
    # torch adds 1e-6 to the norm, a relative 4e-6 of a clipped step, and beyond the edge of stability errors
    # grow at every step: up to the eighth, to some 3e-4.
    np.testing.assert_allclose(language["loss"][rows], losses[: 9 : LANGUAGE.full_every], rtol=1e-3)


def test_the_full_batch_of_images_is_the_first_of_them(smoke):
    # Plain torch on the first 16 images that are not held out, in the order of the set.
    data = images.digits()
    trained, _ = images.hold_out(len(data.train_labels), 237)
    pixels = images.normalise(data.train[trained[:16]], *images.channel_statistics(data.train[trained]))
    model = ResNet(blocks=1, width=2, channels=1, sharpness=16.0, generator=torch.Generator().manual_seed(0))
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.3), []
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(model(pixels), data.train_labels[trained[:16]])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    series = landscape.of(smoke.series, "images")
    rows = (series["full"] == 1) & (series["seed"] == 0)
    # As for the text; four steps.
    np.testing.assert_allclose(series["loss"][rows], losses[::4], rtol=1e-3)


def test_swapped_steps_separate_the_points_from_the_step_lengths():
    # Curvature 1 + 3‖g‖ at every point, whatever the step: the swapped estimate correlates like the others.
    real = summarise(
        made_up(lambda g, level, generator: (1 + 3 * g) * np.exp(generator.normal(0, 0.05, len(g))))
    )
    assert real["clipped.pearson_swapped"] > 0.9
    assert real["plain_2.pearson_swapped"] > 0.9
    # Estimates on their own level: along unclipped steps it is flat, so nothing is left at clipped points.
    series = made_up(lambda g, level, generator: level)
    series["swapped"] = (
        2
        * series["grad_norm"]
        / series["swapped_length"]
        * np.exp(np.random.default_rng(0).normal(0, 0.05, len(series["lr"])))
    )
    flat = summarise(series)
    assert abs(flat["clipped.pearson_swapped"]) < 4 / math.sqrt(flat["clipped.count"])
    assert flat["clipped.pearson_midpoint"] > 0.99
