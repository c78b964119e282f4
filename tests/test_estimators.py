"""The experiment `estimators`: its re-implementation of the released scheme, its record, its scalars."""

import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from gradclip import records
from gradclip.data import text
from gradclip.experiments import estimators
from gradclip.experiments.estimators import (
    Config,
    objective,
    released_estimate,
    run,
    segment_lengths,
    summarise,
)
from gradclip.models.lstm import LanguageModel

SMOKE = Config.profile("smoke")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return run(SMOKE, tmp_path_factory.mktemp("records"))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model() -> LanguageModel:
    return LanguageModel(11, embedding=4, hidden=5, generator=seeded(0)).double()


STREAMS = torch.randint(11, (30, 3), generator=seeded(1))


def loop(model: LanguageModel, lengths: list[int]) -> tuple[list[Tensor], int]:
    """Gradients summed segment by segment with ``backward``, as a trainer does it; and their number."""
    model.zero_grad()
    state, start, count = model.initial_state(3), 0, 0
    for length in lengths:
        words, targets = STREAMS[start : start + length], STREAMS[start + 1 : start + 1 + length]
        h, state = model.outputs(words, state)
        loss = cross_entropy(linear(h, model.embedding, model.bias).flatten(0, 1), targets.flatten())
        (loss + 2 * (h**2).mean() + ((h[1:] - h[:-1]) ** 2).mean()).backward()
        state = [(a.detach(), b.detach()) for a, b in state]
        start, count = start + length, count + 1
    return [p.grad.clone() for p in model.parameters()], count


def test_the_released_estimate_is_that_of_a_loop_over_segments(model):
    lengths = ([4, 7, 5], [6, 10])
    step = [
        torch.randn(p.shape, generator=seeded(i), dtype=p.dtype) for i, p in enumerate(model.parameters())
    ]
    before = [p.detach().clone() for p in model.parameters()]
    value, norm = released_estimate(model, STREAMS, step, lengths)
    assert all(torch.equal(p, x) for p, x in zip(model.parameters(), before, strict=True))

    here, count = loop(model, lengths[0])
    with torch.no_grad():
        for p, d in zip(model.parameters(), step, strict=True):
            p += d / 2
    there, _ = loop(model, lengths[1])

    def length(tensors):
        return math.sqrt(sum((t**2).sum().item() for t in tensors))

    change = length([b - a for a, b in zip(here, there, strict=True)])
    assert value == pytest.approx(change / (length(step) / 2), rel=1e-12)
    assert norm == pytest.approx(length(here) / count, rel=1e-12)


def test_a_segment_that_reaches_over_the_end_is_cut(model):
    # 30 rows make 29 pairs of a word and the next one.
    whole = objective(model, STREAMS, [20, 9])
    assert objective(model, STREAMS, [20, 30]).item() == whole.item()
    assert objective(model, STREAMS, [20, 30, 5]).item() == whole.item()


def test_the_penalties_and_masks_enter_the_objective(model):
    plain = objective(model, STREAMS, [10], penalties=False).item()
    h, _ = model.outputs(STREAMS[:10], model.initial_state(3))
    extra = 2 * h.square().mean() + (h[1:] - h[:-1]).square().mean()
    assert objective(model, STREAMS, [10]).item() == pytest.approx(plain + extra.item(), rel=1e-12)
    one, same, other = (objective(model, STREAMS, [10], masks=seeded(s)).item() for s in (1, 1, 2))
    assert one == same != other


def test_segment_lengths_have_the_distribution_described():
    stream = np.random.RandomState(0)
    lengths = np.array(segment_lengths(stream, 200_000, 70))
    assert 200_000 <= lengths.sum() < 200_000 + 150
    assert lengths.min() >= 5
    # 0.95 · 70 + 0.05 · 35 less the half that `int` cuts off; standard error √(25 + 0.0475 · 35²)/√n = 0.17.
    assert lengths.mean() == pytest.approx(67.75, abs=4 * 0.17)
    # Halved ones are 35 ± 5, seven standard deviations from the others at the middle.
    share = (lengths < 52).mean()
    assert share == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / len(lengths)))


def test_the_smoke_profile_gives_a_whole_record(smoke):
    assert (smoke.experiment, smoke.profile) == ("estimators", "smoke")
    assert records.is_current(smoke)
    assert smoke.scalars["data.sha256"] == smoke.provenance["data_sha256"] == text.reference_manual().sha256
    assert np.isfinite(smoke.series["value"]).all()
    assert set(smoke.series["seed"]) == {0, 1}


def test_every_documented_key_is_there_and_every_key_is_documented(smoke):
    tables = [block for block in estimators.__doc__.split("\n\n") if block.startswith("====")]
    columns, keys = (
        [name for row in table.splitlines()[3:-1] for name in re.findall(r"^``(.+?)``", row)]
        for table in tables
    )
    assert set(smoke.series) == set(columns)
    listed = estimators.__doc__.split("Methods of")[1].split("Scalars.")[0]
    methods = set(re.findall(r"``([a-z-]+)``", listed))
    of_batches = {f"{rule}-{end}" for rule in ("normalised", "clipped", "plain") for end in ("same", "other")}
    of_hessian = {f"{name}-{end}" for name in ("fast", "confident") for end in ("upper", "products")}
    assert set(smoke.series["method"]) <= methods | of_batches | of_hessian
    patterns = [
        re.escape(key).replace("METHOD", "[a-z-]+").replace("_S", r"_[\d.]+") + "(_min|_max)?" for key in keys
    ]
    for pattern in patterns:
        assert any(re.fullmatch(pattern, key) for key in smoke.scalars), pattern
    assert [key for key in smoke.scalars if not any(re.fullmatch(p, key) for p in patterns)] == []


def test_the_slopes_of_two_batches_are_those_of_the_theory(smoke):
    # Constant Hessians: no slope on one batch. With two, the gradients differ by about their length: the
    # estimate is that over the length of the step. Bounds as in the test of `path_smoothness`, for 12 points
    # per seed: 4 |e| / √(24 V) < 0.11, and 0.04.
    for rule, slope in (("normalised", 1.0), ("plain", 0.0)):
        assert smoke.scalars[f"batches.slope_{rule}-other"] == pytest.approx(slope, abs=0.15)
    for rule in ("normalised", "clipped", "plain"):
        assert smoke.scalars[f"batches.slope_{rule}-same"] == pytest.approx(0.0, abs=0.15)


def test_measuring_with_the_trainers_stream_changes_training_and_a_probe_does_not(smoke):
    def losses(method):
        rows = (smoke.series["study"] == "stream") & (smoke.series["method"] == method)
        return smoke.series["value"][rows]

    assert losses("probe").tolist() == losses("unmeasured").tolist()
    assert losses("released").tolist() != losses("unmeasured").tolist()
    # The first step is drawn before the first measurement.
    assert losses("released")[0] == losses("unmeasured")[0]
    assert smoke.scalars["stream.probe"] == 0.0


def test_identical_segments_converge_to_the_product_and_random_ones_do_not(smoke):
    # At a thousandth of the step the truncation error is a thousandth of its size at the full step.
    assert smoke.scalars["floor.identical_at_0.001"] == pytest.approx(1.0, abs=2e-2)
    for method in ("released", "masks"):
        ratio = smoke.scalars[f"floor.{method}_at_0.001"] / smoke.scalars[f"floor.{method}_at_0.01"]
        # What does not shrink is divided by a tenth of the length; two draws of four segments differ a lot.
        assert 2 < ratio < 50


def test_the_scalars_follow_from_the_series(smoke):
    again = summarise(smoke.series)
    assert {key: smoke.scalars[key] for key in again} == pytest.approx(again, nan_ok=True)
    study, method = smoke.series["study"], smoke.series["method"]
    count = smoke.series["value"][(study == "trajectory") & (method == "segments")]
    assert smoke.scalars["trajectory.segments"] == pytest.approx(count.mean())
    reference = smoke.series["x"][(study == "hessian") & (method == "fast")]
    value = smoke.series["value"][(study == "hessian") & (method == "fast")]
    assert smoke.scalars["hessian.fast_error"] == pytest.approx((1 - value / reference).max(), abs=1e-12)
    assert smoke.scalars["hessian.count"] == 4


def test_a_stopped_run_goes_on_to_the_same_record(tmp_path, monkeypatch, smoke):
    hessian_run, calls = estimators._hessian_run, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return hessian_run(*arguments)

    monkeypatch.setattr(estimators, "_hessian_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(SMOKE, tmp_path)
    released, again = estimators._released_run, []
    monkeypatch.setattr(estimators, "_released_run", lambda *a: again.append(1) or released(*a))
    record = run(SMOKE, tmp_path)
    assert len(again) == 1  # that of the first seed was not repeated
    for key, value in record.scalars.items():
        assert repr(value) == repr(smoke.scalars[key])
    for name, column in record.series.items():
        np.testing.assert_array_equal(column, smoke.series[name])


def test_an_unknown_profile_is_named():
    with pytest.raises(ValueError, match=r"profile must be one of .*, got 'large'"):
        Config.profile("large")
