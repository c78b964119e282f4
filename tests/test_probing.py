"""Measured training: the columns against their formulas, and that measuring changes nothing."""

import math

import pytest
import torch

from gradclip.experiments._probing import FRACTIONS, PATHS, PROBES, PRODUCTS, RARE, Plan, Probed
from gradclip.experiments._tasks import Language, Pictures
from gradclip.optim import ClippedSGD

LANGUAGE = Language("reference-manual", embedding=8, hidden=12, layers=2, batch=4, bptt=6)
PICTURES = Pictures("digits", blocks=1, width=4, batch=32, batch_norm=True, held_out=287, augment=False)
PLAN = Plan(2, 4, 8)


def clipped(params, lr=30.0, max_norm=0.25, **options):
    return ClippedSGD(params, lr, max_norm=max_norm, **options)


@pytest.mark.parametrize("task", [LANGUAGE, PICTURES], ids=["language", "pictures"])
def test_measuring_changes_no_bit_of_the_training(task):
    # Batch norm's running statistics are part of it.
    probed = Probed(task, 0, lambda p: clipped(p, lr=0.1, momentum=0.9), PLAN)
    for k in range(9):
        probed.step(k)
    model = task.model(0)
    optimizer = clipped(model.parameters(), lr=0.1, momentum=0.9)
    state = task.start()
    for k in range(9):
        loss, state = task.loss(model, k, state)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, probed.model.state_dict()[name]), name


def test_each_column_is_measured_when_its_time_comes():
    probed = Probed(
        LANGUAGE, 0, clipped, PLAN, extra=lambda model, k, d: {"mine": k}, extra_columns=("mine",)
    )
    rows = [probed.step(k) for k in range(9)]
    for names, every in ((PROBES, 2), (PRODUCTS, 4), (RARE, 8), (("mine",), 2)):
        for k, row in enumerate(rows):
            for name in names:
                assert math.isfinite(row[name]) == (k % every == 0), (name, k)
    assert all(row["diverged"] == 0.0 for row in rows)
    assert all(row["lr"] == 30.0 for row in rows)


def test_a_probe_is_what_its_formulas_say():
    # Gradients in float64 from the network itself, a Hessian-vector product by a central difference.
    probed = Probed(LANGUAGE, 0, clipped, PLAN)
    row = probed.step(0)
    model = LANGUAGE.model(0).double()
    params = list(model.parameters())
    x = torch.nn.utils.parameters_to_vector(params).detach()
    words, targets = LANGUAGE.segments[0]
    following = LANGUAGE.segments[1]

    def gradient(offset, pair=(words, targets), state=None):
        torch.nn.utils.vector_to_parameters(x + offset, params)
        value, _ = model.loss(*pair, model.initial_state(4) if state is None else state)
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, params)])

    g = gradient(0 * x)
    _, after = model.loss(words, targets, model.initial_state(4))
    d = -30.0 * min(1.0, 0.25 / g.norm().item()) * g
    expected = {
        "grad_norm": g.norm(),
        "update_length": d.norm(),
        "path_1": (gradient(d) - g).norm() / d.norm(),
        "end_grad_norm": gradient(d).norm(),
        "other_batch": (gradient(d / 2, following, after) - g).norm() / (d.norm() / 2),
        "bound": g.norm() / (d.norm() / 2),
        "along": (gradient(1e-5 * d) - gradient(-1e-5 * d)).norm() / (2e-5 * d.norm()),
    }
    for name, a in zip((*PATHS, "local"), (*FRACTIONS, 0.01), strict=True):
        expected[name] = (gradient(a * d) - g).norm() / (a * d.norm())
    expected["path_max"] = max(expected[name] for name in PATHS)
    for name, value in expected.items():
        # A difference of float32 gradients over a hundredth of the step keeps about four digits.
        assert row[name] == pytest.approx(value.item(), rel=2e-3), name
    assert row["path_1"] <= (row["grad_norm"] + row["end_grad_norm"]) / row["update_length"]


def test_a_run_that_goes_on_from_its_state_gives_the_same_rows():
    def fresh():
        return Probed(PICTURES, 1, lambda p: clipped(p, lr=0.1, momentum=0.9), PLAN)

    whole = fresh()
    rows = [whole.step(k) for k in range(9)]
    first, second = fresh(), fresh()
    for k in range(5):
        first.step(k)
    second.load_state_dict(first.state_dict())
    assert [repr(second.step(k)) for k in range(5, 9)] == [repr(row) for row in rows[5:]]


def test_a_run_that_diverges_is_given_up():
    # The first step, 1e6 times the gradient, leaves logits far apart.
    probed = Probed(LANGUAGE, 0, lambda p: clipped(p, lr=1e6, max_norm=math.inf), Plan(100))
    rows = [probed.step(k) for k in range(6)]
    lost = [row["diverged"] == 1.0 for row in rows]
    assert not lost[0]
    assert lost[-1]
    assert lost == sorted(lost)
    assert all(math.isnan(row["loss"]) and math.isnan(row["grad_norm"]) for row in rows if row["diverged"])
    assert rows[0].keys() == rows[-1].keys()
    again = Probed(LANGUAGE, 0, lambda p: clipped(p, lr=1e6, max_norm=math.inf), Plan(100))
    again.load_state_dict(probed.state_dict())
    assert again.step(6)["diverged"] == 1.0


def test_a_plan_says_what_is_wrong():
    with pytest.raises(ValueError, match="probe_every must be at least 1, got 0"):
        Plan(0)
    with pytest.raises(ValueError, match="hessian_every must be a multiple of probe_every=4, or 0, got 6"):
        Plan(4, 8, 6)
