"""The experiment `image-classifier`: record, probes, kinks counted by hand, statistics on made-up series."""

import dataclasses
import math
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradclip import records
from gradclip.data import images
from gradclip.experiments import image_classifier as ic
from gradclip.experiments.image_classifier import ESTIMATORS, SETTINGS, Cell, Config, run
from gradclip.models.resnet import Activation, ResNet
from gradclip.smoothness import directional_smoothness, path_smoothness

SMOKE = Config.profile("smoke")
CLIPPED = Cell("clipped", True, math.inf)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return run(SMOKE, tmp_path_factory.mktemp("records"))


def test_the_smoke_profile_gives_a_whole_record(smoke):
    assert (smoke.experiment, smoke.profile) == ("image-classifier", "smoke")
    assert records.is_current(smoke)
    assert smoke.scalars["data.sha256"] == smoke.provenance["data_sha256"] == images.digits().sha256
    assert smoke.scalars["data.images"] == 1437 - 360
    s = smoke.series
    training = s["kind"] == "training"
    probes = SMOKE.steps // SMOKE.probe_every
    assert training.sum() == len(SMOKE.cells) * len(SMOKE.seeds) * probes == 12 * 2 * 2
    assert ic.cells(s) == SMOKE.cells
    k = s["iteration"]
    for names, every in (
        (("path_max", "local", "bound", "path_1", "swapped", "other_batch"), 1),
        (("along", "random", "fixed"), SMOKE.product_every),
        (("hessian_norm",), SMOKE.hessian_every),
        (("released", "released_grad_norm"), SMOKE.released_every),
    ):
        for name in names:
            np.testing.assert_array_equal(np.isfinite(s[name]), training & (k % every == 0), err_msg=name)
            assert (s[name][training & (k % every == 0)] > 0).all()
    # Per network, seed and step: each number of images, gates held, each β; the limit and each fraction.
    paths = len(SMOKE.kink_images) + 1 + len(SMOKE.kink_sharpness)
    assert (~training).sum() == 2 * 2 * len(SMOKE.kink_steps) * paths * (1 + len(SMOKE.kink_fractions))
    assert np.isfinite(s["estimate"][~training]).all()


def test_every_documented_key_is_there_and_every_key_is_documented(smoke):
    tables = [block for block in ic.__doc__.split("\n\n") if block.startswith("====")]
    columns, keys = (
        [name for row in table.splitlines()[3:-1] for name in re.findall(r"``(.+?)``", row[:32])]
        for table in tables
    )
    assert set(smoke.series) == set(columns) | {"path_1_3", "path_1_2", "path_2_3", "path_5_6"}
    cell = rf"({'|'.join(SETTINGS)})_(norm|bare)_(relu|smooth)"
    patterns = []
    for key in keys:
        pattern = re.escape(key).replace("CELL", cell).replace("EST", f"({'|'.join(ESTIMATORS)})")
        patterns.append(pattern.replace("NORM", "(norm|bare)"))
    for pattern in patterns:
        assert any(re.fullmatch(pattern, key) for key in smoke.scalars), pattern
    whole = re.compile(rf"({'|'.join(patterns)})(_min|_max)?")
    assert [key for key in smoke.scalars if not whole.fullmatch(key)] == []


def network(**changes):
    generator = torch.Generator().manual_seed(0)
    sizes = {"blocks": SMOKE.blocks, "width": SMOKE.width, "channels": 1}
    return ResNet(10, generator=generator, **(sizes | changes)).double()


def test_the_first_probe_is_what_its_formulas_say(smoke):
    # Independent of ClippedSGD, of the smoothness package and of the tasks: in float64, with batches put
    # together here and Hessian-vector products by central differences, which a smooth activation permits.
    digits = images.digits()
    train, held_out = images.hold_out(1437, SMOKE.held_out)
    mean, std = images.channel_statistics(digits.train[train])
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    rows = train[order[: SMOKE.batch]]
    model = network(sharpness=SMOKE.sharpness)
    params = list(model.parameters())
    x = torch.nn.utils.parameters_to_vector(params).detach()

    def gradient(offset, rows=rows):
        torch.nn.utils.vector_to_parameters(x + offset, params)
        pixels = (digits.train[rows].double() - mean) / std
        loss = cross_entropy(model(pixels.permute(0, 3, 1, 2)), digits.train_labels[rows])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])

    def product(direction):
        unit = direction / direction.norm()
        return (gradient(1e-5 * unit) - gradient(-1e-5 * unit)).norm().item() / 2e-5

    def path(d, a, rows=rows):
        return ((gradient(a * d, rows) - gradient(0 * d, rows)).norm() / (a * d).norm()).item()

    g = gradient(0 * x)
    factor = min(1.0, 0.25 / g.norm().item())
    # The first step of clipped training; weight decay is added to the clipped gradient.
    d = -5.0 * (factor * g + 1e-4 * x)
    generator = torch.Generator().manual_seed(1_000_003)
    r = torch.cat([torch.randn(p.shape, generator=generator).flatten() for p in params]).double()
    fixed = held_out[: SMOKE.batch]
    tenth = [train[:16], train[16:20]]

    def over_tenth(offset):
        return sum(gradient(offset, part) for part in tenth) / 2

    expected = {
        "grad_norm": g.norm().item(),
        "update_length": d.norm().item(),
        "weight_norm": x.norm().item(),
        "path_1_6": path(d, 1 / 6),
        "path_1_2": path(d, 1 / 2),
        "path_max": max(path(d, a) for a in (1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6)),
        "path_1": path(d, 1.0),
        "bound": (g.norm() / (d / 2).norm()).item(),
        "along": product(d),
        "random": product(r),
        "fixed_grad_norm": gradient(0 * x, fixed).norm().item(),
        "swapped": path(d / factor, 1 / 2),
        "released": ((over_tenth(d / 2) - over_tenth(0 * d)).norm() / (d / 2).norm()).item(),
        "released_grad_norm": over_tenth(0 * x).norm().item(),
        "local": path(d, 0.01),
        "fixed": path(d, 0.01, fixed),
    }
    s = smoke.series
    first = np.flatnonzero(
        (s["setting"] == "clipped") & (s["batch_norm"] == 1) & np.isfinite(s["sharpness"])
    )[0]
    assert s["clip_factor"][first] == pytest.approx(factor, rel=1e-5)
    for name, value in expected.items():
        # float32 against float64: gradients are right to some 1e-6; a hundredth of the step changes them by
        # some 1e-2 of their norm.
        assert s[name][first] == pytest.approx(value, rel=1e-3 if name in ("local", "fixed") else 1e-4), name


class Kinked(nn.Module):
    """w ↦ relu(w - t) at the thresholds t: its mean has slope m/n where m of n thresholds are below w."""

    def __init__(self, thresholds):
        super().__init__()
        self.thresholds = torch.tensor(thresholds, dtype=torch.float64)
        self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.activation = Activation()

    def forward(self):
        return self.activation(self.w - self.thresholds)


def test_kinks_are_counted_and_held_gates_have_none():
    model = Kinked([-1.0, 0.05, 0.3, 0.3, 0.8])
    update = [torch.ones(1, dtype=torch.float64)]

    def loss():
        return model().mean()

    assert ic.gates(model, loss)[0].tolist() == [True, False, False, False, False]
    fractions = (0.01, 0.1, 0.5, 1.0)
    counts = ic.crossings(model, loss, update, fractions)
    assert counts == [0, 1, 3, 4]
    assert model.w.item() == 0.0
    free = path_smoothness(loss, model.parameters(), update, fractions=fractions)
    # By hand: each kink adds 1/5 to the slope.
    expected = [count / 5 / a for count, a in zip(counts, fractions, strict=True)]
    np.testing.assert_allclose(free.values, expected, rtol=1e-12, atol=1e-12)
    held = ic.with_gates_held(model, loss, ic.gates(model, loss))
    assert path_smoothness(held, model.parameters(), update, fractions=fractions).values == (0.0,) * 4
    assert not model.activation._forward_hooks


@pytest.mark.parametrize("batch_norm", [True, False])
def test_held_gates_change_nothing_at_the_point_itself(batch_norm):
    model = network(width=4, batch_norm=batch_norm)
    x = torch.randn(8, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(8)

    def loss():
        return cross_entropy(model(x), labels)

    held = ic.with_gates_held(model, loss, ic.gates(model, loss))
    params = list(model.parameters())
    assert held().item() == loss().item()
    pairs = list(zip(torch.autograd.grad(loss(), params), torch.autograd.grad(held(), params), strict=True))
    for free, fixed in pairs:
        torch.testing.assert_close(free, fixed, rtol=0, atol=1e-14)
    step = [-g for g, _ in pairs]
    along = directional_smoothness(loss, params, step)
    # The same operations but for the activation, which multiplies by a mask instead of cutting.
    assert directional_smoothness(held, params, step) == pytest.approx(along, rel=1e-9)
    # Held, the function is smooth: over a short step the difference of gradients is the product.
    short = path_smoothness(held, params, step, fractions=(1e-4, 1e-3)).values
    assert short[0] == pytest.approx(along, rel=1e-2)
    assert abs(short[0] - along) < abs(short[1] - along) or abs(short[1] - along) < 1e-6 * along


def made_up_paths(coherent, seed=0, steps=40, dim=200):
    """Kinks drawn at random on paths, unrelated or all along one direction; jumps of length 1/n."""
    generator = np.random.default_rng(seed)
    rows = []
    for n in (20, 80, 320):
        for step in range(steps):
            places = generator.random(generator.poisson(10 * n))
            jumps = generator.normal(size=(len(places), dim)) / math.sqrt(dim) / n
            if coherent:
                jumps = np.eye(1, dim).repeat(len(places), 0) / n
            for a in (1e-3, 1e-2, 1e-1):
                total = np.linalg.norm(jumps[places < a].sum(axis=0))
                rows.append((step, n, a, math.hypot(total / a, 1.0), (places < a).sum()))
    _, n, a, estimate, crossed = np.array(rows).T
    return {"images": n, "fraction": a, "estimate": estimate, "along": np.ones(len(n)), "crossed": crossed}


def test_unrelated_jumps_have_the_exponents_of_shot_noise_and_related_ones_have_not():
    # E² a n has the same mean for all a and n. Groups have 40 steps with N >= 0.2 kinks in the mean; the
    # variance of a sum of N squares is about N, so that ln E is off by 1/(2 √(40 · 0.2)) = 0.18 at most.
    p, q = ic._exponents(made_up_paths(coherent=False))
    assert p == pytest.approx(-0.5, abs=0.1)
    assert q == pytest.approx(-0.5, abs=0.1)
    # Related jumps make a curvature: N jumps of 1/n over a length a, and N ∝ n a.
    p, q = ic._exponents(made_up_paths(coherent=True) | {})
    assert p == pytest.approx(0.0, abs=0.2)
    assert q == pytest.approx(0.0, abs=0.2)


def test_paths_with_too_few_kinks_do_not_count():
    paths = made_up_paths(coherent=False)
    found = ic.excess(paths)
    rare = found["crossed"] < 5
    paths["crossed"] = np.where(paths["fraction"] < 0.05, 0, paths["crossed"])
    assert not rare.all()
    assert all(math.isnan(value) for value in ic._exponents(paths))  # one fraction is left


def made_up(estimate, seeds=(0, 1), length=60):
    """A record's training rows of the cell ``CLIPPED``, estimates from ``estimate(g, bound, generator)``."""
    parts = []
    for seed in seeds:
        generator = np.random.default_rng(seed)
        g = np.exp(generator.normal(math.log(2), 0.5, length))
        factor = np.minimum(1.0, 0.25 / g)
        step = 5.0 * factor * g
        names = ("path_max", "local", "along", "random", "fixed", "other_batch", "swapped", "released")
        bound = g / (step / 2)
        part = {
            "kind": np.full(length, "training"),
            "setting": np.full(length, CLIPPED.setting),
            "batch_norm": np.full(length, int(CLIPPED.batch_norm)),
            "sharpness": np.full(length, CLIPPED.sharpness),
            "seed": np.full(length, seed),
            "iteration": np.arange(length),
            "loss": np.ones(length),
            "grad_norm": g,
            "fixed_grad_norm": g,
            "released_grad_norm": g,
            "clip_factor": factor,
            "lr": np.full(length, 5.0),
            "update_length": step,
            "weight_norm": np.exp(generator.normal(size=length)),
            "bound": bound,
            "end_grad_norm": 3 * g,
            "path_1": 2 * g / step,
            "crossed": np.arange(length, dtype=float),
            "hessian_norm": 2 / (5.0 * factor),
            "diverged": np.zeros(length),
        }
        part["path_1_2"] = estimate(g, bound, generator)
        part |= {name: estimate(g, bound, generator) for name in names}
        parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_an_estimate_that_is_its_bound_is_recognised_as_mechanical():
    scalars = ic._cell(made_up(lambda g, bound, generator: bound), CLIPPED)
    name = "clipped_norm_relu"
    for key in ("pearson_midpoint", "slope_midpoint", "level_share", "saturation_midpoint", "edge"):
        assert scalars[f"{name}.{key}"] == pytest.approx(1.0, rel=1e-9), key
    # A gradient that changes by twice its length and ends three times as long: half of the four it could.
    assert scalars[f"{name}.saturation_strict"] == pytest.approx(0.5, rel=1e-9)
    assert scalars[f"{name}.ratio_local"] == 1.0
    assert scalars[f"{name}.deviation_local"] == 0.0
    assert scalars[f"{name}.clipped_share"] == 1.0


def test_an_estimate_of_the_landscape_is_recognised_as_such():
    def real(g, bound, generator):
        return g**1.5 * np.exp(generator.normal(0, 0.05, len(g)))

    scalars = ic._cell(made_up(real), CLIPPED)
    for key in ("pearson", "late", "partial", "weights", "difference"):
        # Step lengths are one number here, so that partial correlations lose nothing. Noise of 5 % on logs
        # that vary by 75 %.
        assert scalars[f"clipped_norm_relu.{key}_local_min"] > 0.98, key
    assert scalars["clipped_norm_relu.slope_local"] == pytest.approx(1.5, abs=0.05)
    assert scalars["clipped_norm_relu.shuffled_local"] < 0.3


def test_statistics_are_those_of_numpy_alone():
    series = made_up(lambda g, bound, generator: g * np.exp(generator.normal(size=len(g))), length=25)
    scalars = ic._cell(series, CLIPPED)
    runs = [series["seed"] == seed for seed in (0, 1)]
    logs = [(np.log(series["grad_norm"][run]), np.log(series["path_max"][run])) for run in runs]
    each = [np.corrcoef(x, y)[0, 1] for x, y in logs]
    assert scalars["clipped_norm_relu.pearson_largest_min"] == pytest.approx(min(each), rel=1e-9)
    assert scalars["clipped_norm_relu.pearson_largest_max"] == pytest.approx(max(each), rel=1e-9)
    x, y = (np.concatenate([part[i] - part[i].mean() for part in logs]) for i in (0, 1))
    assert scalars["clipped_norm_relu.pearson_largest"] == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-9)
    assert scalars["clipped_norm_relu.slope_largest"] == pytest.approx(np.polyfit(x, y, 1)[0], rel=1e-9)
    # Partial correlation by another way: from the inverse of the correlation matrix.
    w = np.concatenate([np.log(series["weight_norm"][run]) for run in runs])
    w = np.concatenate([w[run] - w[run].mean() for run in runs])
    p = np.linalg.inv(np.cov([x, y, w]))
    expected = -p[0, 1] / math.sqrt(p[0, 0] * p[1, 1])
    assert scalars["clipped_norm_relu.weights_largest"] == pytest.approx(expected, rel=1e-9)


def test_an_estimate_that_ignores_the_gradient_shows_no_correlation():
    series = made_up(lambda g, bound, generator: np.exp(generator.normal(size=len(g))))
    scalars = ic._cell(series, CLIPPED)
    # 120 independent points: a correlation has the standard error 1/√118.
    for key in ("pearson_local", "partial_local", "weights_local"):
        assert abs(scalars[f"clipped_norm_relu.{key}"]) < 4 / math.sqrt(118), key


def only(*cells):
    return property(lambda config: list(cells))


def test_a_run_that_diverges_is_cut_and_counted(tmp_path, monkeypatch):
    wild = dataclasses.replace(SETTINGS["plain"], lr=1e6)
    monkeypatch.setitem(ic.SETTINGS, "plain", wild)
    monkeypatch.setattr(Config, "cells", only(Cell("plain", False, math.inf)))
    record = run(dataclasses.replace(SMOKE, steps=8, control_steps=8), tmp_path)
    assert record.scalars["plain_bare_relu.diverged"] == 2
    training = record.series["kind"] == "training"
    assert 2 <= record.scalars["plain_bare_relu.count"] < training.sum() == 8
    assert np.isfinite(record.series["grad_norm"][training]).sum() == record.scalars["plain_bare_relu.count"]


def test_the_learning_rate_drops_at_milestones_and_lengths_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Config, "cells", only(Cell("momentum", True, math.inf), Cell("momentum", False, math.inf))
    )
    config = dataclasses.replace(SMOKE, steps=8, control_steps=4, milestones=(0.5, 0.75), seeds=(0,))
    s = run(config, tmp_path).series
    primary = (s["kind"] == "training") & (s["batch_norm"] == 1)
    control = (s["kind"] == "training") & (s["batch_norm"] == 0)
    np.testing.assert_allclose(s["lr"][primary], [0.1, 0.1, 0.01, 0.001], rtol=1e-12)
    np.testing.assert_allclose(s["lr"][control], [0.1, 0.01], rtol=1e-12)


def test_a_stopped_run_goes_on_to_the_same_record(tmp_path, monkeypatch):
    cells = (Cell("momentum", True, math.inf), Cell("clipped", False, 16.0))
    monkeypatch.setattr(Config, "cells", only(*cells))
    whole = run(SMOKE, tmp_path / "whole")
    step, calls = ic._Training.step, []

    def interrupted(self, iteration):
        if len(calls) == 3 * SMOKE.steps + 2:  # in the middle of the fourth training
            raise KeyboardInterrupt
        calls.append(iteration)
        return step(self, iteration)

    monkeypatch.setattr("gradclip.experiments.image_classifier.train", every_step(ic.train))
    with monkeypatch.context() as patch:
        patch.setattr(ic._Training, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(SMOKE, tmp_path / "stopped")
    again = []
    monkeypatch.setattr(ic._Training, "step", lambda self, k: again.append(k) or step(self, k))
    record = run(SMOKE, tmp_path / "stopped")
    assert again == [2, 3]
    assert repr(record.scalars) == repr(whole.scalars)
    for name, column in record.series.items():
        np.testing.assert_array_equal(column, whole.series[name])
    run(SMOKE, tmp_path / "stopped")  # a finished one is read
    assert again == [2, 3]


def test_runs_can_be_sent_to_workers(tmp_path, monkeypatch):
    sent = []

    def keep(tasks, *, workers, **options):
        sent.extend((pickle.dumps(task), workers) for task in tasks)
        raise KeyboardInterrupt

    monkeypatch.setattr(ic, "run_tasks", keep)
    with pytest.raises(KeyboardInterrupt):
        run(dataclasses.replace(SMOKE, workers=3), tmp_path)
    assert len(sent) == (len(SMOKE.cells) + 2) * len(SMOKE.seeds)
    # Settings and names, and no images.
    assert all(len(task) < 10_000 and workers == 3 for task, workers in sent)


def every_step(train):
    return lambda *arguments, **options: train(*arguments, **options, interval=0.0)


def test_what_falls_between_two_probes_is_refused():
    with pytest.raises(ValueError, match=r"product_every must be a multiple of probe_every=2, or 0, got 3"):
        dataclasses.replace(SMOKE, product_every=3)
    with pytest.raises(ValueError, match=r"released_every must be a multiple of probe_every=2, got 5"):
        dataclasses.replace(SMOKE, released_every=5)


def test_the_paper_profile_is_resnet20_as_published():
    config = Config.profile("paper")
    model = ResNet(10, blocks=config.blocks, width=config.width)
    assert sum(p.numel() for p in model.parameters()) == 269_722
    # He et al.: 64k iterations of 128 images, a tenth of the rate at 32k and 48k.
    drops = [part * config.steps for part in config.milestones]
    assert (config.steps, config.batch, drops) == (64_000, 128, [32_000, 48_000])
    assert config.released_images == 45_000 // 10


def test_an_unknown_profile_is_named():
    with pytest.raises(ValueError, match=r"profile must be one of .*, got 'large'"):
        Config.profile("large")
