"""The experiment on iteration counts: every simulation against a plain loop that shares nothing with it."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch

from gradclip import problems, records, theory
from gradclip.experiments import convergence
from gradclip.experiments.convergence import METHODS, Config, run, select, summarise

SMOKE = Config.profile("smoke")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return run(SMOKE, tmp_path_factory.mktemp("records"))


def test_the_smoke_profile_gives_a_whole_record(smoke):
    assert (smoke.experiment, smoke.profile) == ("convergence", "smoke")
    assert records.is_current(smoke)
    assert set(smoke.series["part"]) == {"pair", "gain", "accuracy", "random", "noise", "bias", "outside"}
    assert smoke.provenance["data_sha256"] is None
    assert np.isfinite(select(smoke.series, "pair")["count"]).all()
    assert np.isfinite(select(smoke.series, "random")["count"]).all()


def test_every_documented_key_is_there_and_every_key_is_documented(smoke):
    blocks = [block for block in convergence.__doc__.split("\n\n") if block.startswith("====")]
    columns, keys = (
        [name for row in table.splitlines()[3:-1] for name in re.findall(r"``([\w.]+)``", row[:width])]
        for table, width in zip(blocks, (14, 39), strict=True)
    )
    assert columns == list(smoke.series)
    words = {"METHOD": "|".join(METHODS), "RANGE": "fine|coarse", "FUNCTION": "|".join(convergence.OUTSIDE)}
    words["KIND"] = "|".join({*convergence.NOISES, *convergence.BIASES})
    patterns = []
    for key in keys:
        pattern = re.escape(key)
        for word, choice in words.items():
            pattern = pattern.replace(word, f"({choice})")
        patterns.append(pattern)
        assert any(re.fullmatch(pattern, found) for found in smoke.scalars), key
    whole = re.compile("|".join(patterns))
    assert [key for key in smoke.scalars if not whole.fullmatch(key)] == []


# The counts of the pair


def plain_count(problem, x, eps, step, limit=100_000):
    """One run, one step at a time, on the library's problem: torch, and no vector."""
    x = torch.tensor([x], dtype=torch.float64)
    for t in range(limit):
        g = problem.gradient(x)
        norm = g.abs().item()
        if norm <= eps:
            return t
        x = x - float(step(norm, problem.f(x).item())) * g
    return math.inf


@pytest.mark.parametrize("method", ["paper", "vankov", "soft", "exact", "normalized", "polyak"])
@pytest.mark.parametrize("u", [3.0, 300.0])
def test_counts_of_a_rule_are_those_of_a_plain_loop(method, u):
    eps, gap = 0.3, 40.0
    config = dataclasses.replace(SMOKE, limit=20_000)
    steep, slow, _ = convergence.pair_counts(method, *(np.array([v]) for v in (u, gap, eps)), config)
    first, x, second, y = convergence.hard_problems(u, gap, eps)
    assert first.gradient(torch.tensor([x], dtype=torch.float64)).item() == pytest.approx(u, rel=1e-14)
    assert second.f(torch.tensor([y], dtype=torch.float64)).item() == pytest.approx(gap, rel=1e-14)
    step = convergence.rule(method, np.float64(eps))
    assert steep[0] == plain_count(first, x, eps, step)
    # Steps taken at once are one rounding, one by one many: the end of the slope may be met one step apart.
    assert abs(slow[0] - plain_count(second, y, eps, step)) <= 1


def test_best_fixed_step_is_the_best_of_its_grid():
    u, eps, gap = 30.0, 0.3, 40.0
    steep, slow, factor = convergence.pair_counts("fixed", *(np.array([v]) for v in (u, gap, eps)), SMOKE)
    first, x, second, y = convergence.hard_problems(u, gap, eps)
    limit = float(theory.exact_step_limit_1d(u, 1.0, 1.0))

    def worst(share):
        counts = [plain_count(p, z, eps, lambda *_: share * limit) for p, z in ((first, x), (second, y))]
        return max(counts)

    assert abs(max(steep[0], slow[0]) - worst(factor[0])) <= 1
    assert worst(factor[0]) <= min(worst(share) for share in (0.4, 0.6, 0.8)) + 1


def test_momentum_counts_are_those_of_a_plain_loop():
    u, eps, gap = 30.0, 0.3, 40.0
    counts = convergence.momentum_counts(*(np.array([v]) for v in (u, gap, eps)), 20_000)
    first, x, second, y = convergence.hard_problems(u, gap, eps)
    for problem, start, found in ((first, x, counts[0]), (second, y, counts[1])):
        z, m, t = torch.tensor([start], dtype=torch.float64), torch.zeros(1, dtype=torch.float64), 0
        while (g := problem.gradient(z)).abs().item() > eps:
            m = 0.9 * m + 0.1 * g
            z = z - min(0.5, 1 / (3 * m.abs().item())) * m
            t += 1
        # The straight part is crossed at once when m is the slope to twelve digits.
        assert abs(found[0] - t) <= 1


def test_runs_that_are_not_done_are_infinite():
    one = np.ones(1)
    assert convergence.steep_count(lambda g, F: 1e-3 * one, 3 * one, 0.1 * one, 10)[0] == math.inf
    assert convergence.steep_count(lambda g, F: 10 * one, 3 * one, 0.1 * one, 100)[0] == math.inf  # diverges
    assert convergence.slow_count(lambda g, F: 1e-6 * one, one, 0.1 * one, 10, jump=False)[0] == math.inf


def test_counts_of_the_record_are_inside_their_bounds(smoke):
    for part in ("pair", "accuracy"):
        for method in METHODS:
            rows = select(smoke.series, part, method)
            assert (rows["count"] == np.maximum(rows["steep"], rows["slow"])).all()
            if method not in ("momentum",):
                assert (rows["count"] <= np.ceil(rows["upper"])).all(), (part, method)
            if method not in ("momentum", "polyak"):
                # The slope is a millionth above ε, and the count has ε twice.
                assert (rows["count"] >= rows["lower"] * (1 - 1e-4)).all(), (part, method)


def test_bounds_of_the_record_are_those_of_the_theory(smoke):
    rows = select(smoke.series, "pair", "fixed")
    arguments = (rows["gap"], rows["eps"], rows["u"], 1.0, 1.0)
    np.testing.assert_array_equal(rows["upper"], theory.gd_iteration_bound(*arguments))
    np.testing.assert_array_equal(rows["lower"], theory.gd_iteration_lower_bound(*arguments))
    assert math.isnan(rows["recalled"][0])  # M = 1 has no logarithm there
    gain = select(smoke.series, "gain")
    low, high = theory.gain_bounds(gain["gap"], gain["eps"], 1.0, 1.0)
    np.testing.assert_array_equal((gain["lower"], gain["upper"]), (low, high))
    assert ((low <= gain["value"]) & (gain["value"] <= high)).all()


# Random functions


def test_random_functions_have_their_constants():
    """‖∇²f‖ ≤ L0 + L1‖∇f‖ at random points, the Hessian by finite differences of the coordinates' slopes."""
    rng = np.random.default_rng(4)
    for f in convergence.random_functions(40):
        for _ in range(20):
            z = rng.normal(size=len(f["names"])) * 2
            pieces = list(zip(f["names"], f["scales"], z, strict=True))
            slopes = np.array([convergence._RIDGES[name][0](v, b) for name, b, v in pieces])
            h = 1e-6
            curvature = max(
                abs(convergence._RIDGES[name][0](v + h, b) - convergence._RIDGES[name][0](v - h, b)) / (2 * h)
                for name, b, v in pieces
            )
            # Differences of slopes up to 1e3 over 2e-6: rounding 1e-7, truncation 1e-12.
            assert curvature <= (f["L0"] + f["L1"] * np.linalg.norm(slopes)) * (1 + 1e-6) + 1e-5
        assert f["L0"] > 0
        assert f["gap"] > 0


def test_gaps_of_the_random_functions_are_differences_of_values():
    """Derivative of the gap along a coordinate is the slope, and the gap vanishes at the infimum."""
    for name, (slope, gap, _, _) in convergence._RIDGES.items():
        z, h = np.linspace(-2, 2, 9), 1e-6
        numeric = (gap(z + h, 0.7) - gap(z - h, 0.7)) / (2 * h)
        np.testing.assert_allclose(numeric, slope(z, 0.7), rtol=1e-7, atol=1e-8, err_msg=name)
        bottom = {"exp": -60.0, "logistic": 60.0}.get(name, 0.0)
        assert 0 <= gap(np.float64(bottom), 0.7) < 1e-17


def test_counts_on_random_functions_are_those_of_a_plain_loop(smoke):
    functions = convergence.random_functions(SMOKE.functions)
    for i in (0, 3):
        f = functions[i]
        rows = select(smoke.series, "random", "soft")
        rows = {name: column[rows["seed"] == i] for name, column in rows.items()}
        x = f["x"].copy()
        t, first, found = 0, None, []
        while len(found) < len(rows["eps"]):
            g = np.array(
                [convergence._RIDGES[n][0](z, b) for n, b, z in zip(f["names"], f["scales"], x, strict=True)]
            )
            norm = math.sqrt(float(g @ g))
            first = first or norm
            while len(found) < len(rows["eps"]) and norm <= rows["eps"][len(found)] * first:
                found.append(t)
            x, t = x - g / (f["L0"] + f["L1"] * norm), t + 1
        # The sum of squares is taken in another order: a threshold may be met one step apart.
        assert np.abs(np.array(found) - rows["count"]).max() <= 1


# Noise


def test_noise_has_the_stated_moments():
    rng = np.random.default_rng(5)
    for kind, variance in (("coin", 1.0), ("skewed", 1.0)):
        values = convergence.draw(kind, rng, (400_000,))
        # Standard errors: 1/sqrt(4e5) = 1.6e-3 for the mean; the fourth moment of the skewed one is 82.
        assert abs(values.mean()) < 0.008
        assert values.var() == pytest.approx(variance, abs=0.06)
    c = np.array([0.1, 0.5, 1.0, 4.0])
    high, low, p = convergence.worst_noise(c)
    np.testing.assert_allclose(p * high + (1 - p) * low, 0, atol=1e-15)
    np.testing.assert_allclose(p * high**2 + (1 - p) * low**2, 1, rtol=1e-14)
    bias = theory.clip_bias(1.0, c)
    mean = p * np.clip(bias + high, -c, c) + (1 - p) * np.clip(bias + low, -c, c)
    np.testing.assert_allclose(mean[2:], 0, atol=1e-15)  # for c ≤ 1/2 the worst is a limit
    assert (mean[:2] > 0).all()  # the iterate is pulled back, to a bias a little smaller


def test_noisy_counts_without_noise_are_the_plain_ones():
    """τ = 1e-12 changes nothing: half of the runs are done after the deterministic count."""
    u, eps, gap = 30.0, 0.3, 40.0
    first, x, second, y = convergence.hard_problems(u, gap, eps)
    rates = np.array([0.05, 0.1])
    for function, problem, start in (("steep", first, x), ("slow", second, y)):
        counts, lost = convergence.noisy_counts(function, "coin", "fixed", rates, u, gap, eps, 1e-12, SMOKE)
        expected = [plain_count(problem, start, eps, lambda *_, h=h: h) for h in rates]
        assert np.abs(counts - expected).max() <= 1
        assert (lost == 0).all()


def test_search_ends_early_only_when_the_best_rate_is_known():
    arguments = ("slow", "coin", "fixed", np.array([0.02, 0.1, 0.2]), 30.0, 40.0, 0.3, 0.1, SMOKE)
    whole, _ = convergence.noisy_counts(*arguments)
    early, _ = convergence.noisy_counts(*arguments, after=np.array([1.0, 1.0, math.inf]))
    assert early[1] == whole[1]
    assert early[0] == math.inf
    late, _ = convergence.noisy_counts(*arguments, after=np.array([1e9, 1e9, 1e9]))
    np.testing.assert_array_equal(late, whole)


def test_runs_that_leave_every_bound_are_counted():
    counts, lost = convergence.noisy_counts(
        "steep", "coin", "fixed", np.array([5.0]), 30.0, 40.0, 0.01, 0.1, SMOKE
    )
    assert counts[0] == math.inf
    assert lost[0] > 0.5


# The record's scalars, and the house's rules


def test_scalars_follow_from_the_series(smoke):
    assert summarise(smoke.series) == pytest.approx(smoke.scalars, nan_ok=True)
    fixed, paper = (select(smoke.series, "pair", m) for m in ("fixed", "paper"))
    worse = fixed["u"][paper["count"] > fixed["count"]]
    assert smoke.scalars["pair.paper.loses_up_to"] == worse.max()
    assert smoke.scalars["pair.decades"] == pytest.approx(3)


def test_exponents_of_a_power_law_are_found():
    rows = [
        convergence._row(part="accuracy", method=m, eps=e, count=7 * e**-1.5)
        for m in METHODS
        for e in np.geomspace(100, 1e-3, 21)
    ]
    x = np.log(np.geomspace(1, 10, 5))
    assert convergence._slope(x, 3 * x + 1) == pytest.approx(3)
    table = convergence._table(rows)
    one = select(table, "accuracy", "soft")
    assert convergence._slope(np.log(one["eps"]), -np.log(one["count"])) == pytest.approx(1.5)


def test_bootstrap_interval_covers_about_as_often_as_it_says():
    """Means of 40 normal values, 300 intervals at 95 %; the percentile bootstrap covers about 93 %."""
    rng = np.random.default_rng(6)
    covered = 0
    for i in range(300):
        low, high = convergence.bootstrap_interval(rng.normal(size=40), samples=400, seed=i)
        covered += low <= 0 <= high
    # Binomial standard deviation 0.014: four of them below 0.93 and above 0.97.
    assert 0.87 <= covered / 300 <= 0.99


def test_a_finished_record_is_not_made_again_and_another_configuration_is(tmp_path, monkeypatch):
    small = dataclasses.replace(SMOKE, pair_decades=1, noise_u=(3.0,), functions=2, bias_steps=50)
    made = run(small, tmp_path)
    monkeypatch.setattr(convergence, "_PARTS", ())
    assert run(small, tmp_path).provenance["finished"] == made.provenance["finished"]
    with pytest.raises(ValueError, match="steps must be at least 1"):
        run(dataclasses.replace(small, fixed_steps=9), tmp_path)


def test_a_run_that_was_stopped_gives_the_same_record(tmp_path, monkeypatch):
    small = dataclasses.replace(SMOKE, pair_decades=1, noise_u=(3.0,), functions=2, bias_steps=50)
    whole = run(small, tmp_path / "whole")
    parts = convergence._PARTS

    def stop(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(convergence, "_PARTS", (*parts[:4], stop, *parts[5:]))
    with pytest.raises(KeyboardInterrupt):
        run(small, tmp_path / "stopped")
    monkeypatch.setattr(
        convergence, "_PARTS", (stop, *parts[1:4], *parts[4:])
    )  # the first ones are not run again
    resumed = run(small, tmp_path / "stopped")
    assert resumed.scalars == pytest.approx(whole.scalars, rel=0, abs=0, nan_ok=True)
    for name, column in whole.series.items():
        np.testing.assert_array_equal(resumed.series[name], column)


def test_the_number_of_threads_is_put_back(tmp_path):
    before = torch.get_num_threads()
    run(dataclasses.replace(SMOKE, pair_decades=1, noise_u=(3.0,), functions=2, bias_steps=50), tmp_path)
    assert torch.get_num_threads() == before


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match=r"profile must be one of .*, got 'huge'"):
        Config.profile("huge")
    with pytest.raises(ValueError, match="device must be cpu, got 'cuda'"):
        dataclasses.replace(SMOKE, device="cuda")


def test_hard_problems_are_in_the_class():
    first, _, second, _ = convergence.hard_problems(10.0, 50.0, 0.2)
    assert first.L0(1.0) == second.L0(1.0) == 1.0
    assert isinstance(second, problems.Problem)


def test_iterates_are_those_of_gradient_descent():
    problem, start, _, _ = convergence.hard_problems(10.0, 50.0, 0.2)
    x = convergence.iterates(problem, start, 0.1, 3)
    assert x.shape == (4, 1)
    assert x[1].item() == pytest.approx(start - 0.1 * 10.0, rel=1e-14)
    assert convergence.line(0.0, 1.0, 3).flatten().tolist() == [0.0, 0.5, 1.0]


def test_table_has_a_row_for_every_method(smoke):
    text = convergence.table(smoke)
    assert text.count("<tr>") == len(METHODS) + 1
    last = select(smoke.series, "pair", "soft")["count"][-1]
    assert f"<td>{last:.3g}</td>" in text
    assert "no bound" in text
