import math

import pytest
import torch

from gradclip.models.awd_lstm import AWDLSTM, NonMonotoneAverage
from gradclip.models.lstm import LanguageModel
from gradclip.optim import ClippedSGD
from gradclip.smoothness import directional_smoothness, hessian_norm

WORDS, EMBEDDING, HIDDEN, TIME, BATCH = 11, 3, 5, 6, 4
NONE = dict.fromkeys(
    ("word_dropout", "input_dropout", "hidden_dropout", "output_dropout", "weight_dropout"), 0.0
)


def make(seed=0, **changes):
    sizes = {"embedding": EMBEDDING, "hidden": HIDDEN, "layers": 3, **changes}
    return AWDLSTM(WORDS, **sizes, generator=torch.Generator().manual_seed(seed)).double()


def text(seed=0):
    words = torch.randint(WORDS, (TIME + 1, BATCH), generator=torch.Generator().manual_seed(seed))
    return words[:-1], words[1:]


def masks(model, seed=0, batch=BATCH):
    return model.masks(batch, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "sizes", [(10_000, 400, 1150, 3), (10_000, 200, 512, 2), (50, 7, 9, 1), (50, 7, 9, 4)]
)
def test_the_number_of_parameters_is_the_closed_form(sizes):
    v, e, h, n = sizes
    # By hand: the embedding, which the decoder shares, its bias, and four gates of each layer with weights
    # from below, from before, and two biases.
    expected = v * e + v
    if n == 1:
        expected += 4 * e * (e + e + 2)
    else:
        expected += 4 * h * (e + h + 2) + (n - 2) * 4 * h * (h + h + 2) + 4 * e * (h + e + 2)
    model = AWDLSTM(v, embedding=e, hidden=h, layers=n)
    assert sum(p.numel() for p in model.parameters()) == expected
    if sizes == (10_000, 400, 1150, 3):
        assert expected == 24_221_600


def test_without_dropout_and_penalties_it_is_the_plain_model():
    model = make(**NONE, activation=0.0, slowness=0.0)
    plain = LanguageModel(
        WORDS,
        embedding=EMBEDDING,
        hidden=HIDDEN,
        layers=3,
        generator=torch.Generator().manual_seed(0),
    ).double()
    words, targets = text()
    state = model.initial_state(BATCH)
    ours, after = model.training_loss(words, targets, state, masks(model))
    theirs, expected = plain.loss(words, targets, state)
    # The same operations but for products with one.
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-15)
    for pair, other in zip(after, expected, strict=True):
        assert all(torch.allclose(a, b, rtol=0, atol=1e-15) for a, b in zip(pair, other, strict=True))
    assert model.loss(words, targets, state)[0].item() == theirs.item()


def test_the_loss_is_that_of_the_equations():
    # Independent: the gate equations one word and one stream at a time, dropping by hand.
    model, (words, targets) = make(), text()
    drawn = masks(model)
    raw = torch.empty(TIME, BATCH, EMBEDDING, dtype=torch.float64)
    for j in range(BATCH):
        h = [torch.zeros(layer.hidden_size, dtype=torch.float64) for layer in model.layers]
        c = [torch.zeros_like(x) for x in h]
        for t in range(TIME):
            word = words[t, j]
            x = model.embedding[word] * drawn.words[word] * drawn.inputs[0, j]
            for n, layer in enumerate(model.layers):
                if n:
                    x = x * drawn.between[n - 1][0, j]
                gates = layer.weight_ih_l0 @ x + layer.bias_ih_l0 + layer.bias_hh_l0
                gates = gates + (layer.weight_hh_l0 * drawn.recurrent[n]) @ h[n]
                keep_in, forget, new, out = gates.chunk(4)
                c[n] = forget.sigmoid() * c[n] + keep_in.sigmoid() * new.tanh()
                h[n] = x = out.sigmoid() * c[n].tanh()
            raw[t, j] = x
    y = raw * drawn.outputs
    logits = y @ model.embedding.T + model.bias
    entropy = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
    slowness = (raw[1:] - raw[:-1]).pow(2).mean()
    expected = entropy + 2 * (y**2).mean() + slowness
    loss, after = model.training_loss(words, targets, model.initial_state(BATCH), drawn)
    # A few hundred float64 roundings of numbers below 3; a missing mask is off by 1e-3.
    assert loss.item() == pytest.approx(expected.item(), abs=1e-13)
    torch.testing.assert_close(after[-1][1][0, -1], c[-1].detach(), rtol=0, atol=1e-13)
    assert not any(part.requires_grad for pair in after for part in pair)


def test_one_word_has_no_slowness():
    model = make()
    words, targets = (part[:1] for part in text())
    loss, _ = model.training_loss(words, targets, model.initial_state(BATCH), masks(model))
    assert math.isfinite(loss.item())


def test_the_same_masks_give_the_same_objective_and_others_another():
    model, (words, targets) = make(), text()
    state = model.initial_state(BATCH)

    def gradient(drawn):
        loss, _ = model.training_loss(words, targets, state, drawn)
        return torch.autograd.grad(loss, list(model.parameters()))

    drawn = masks(model)
    first = gradient(drawn)
    torch.rand(3)  # the global generator has no say
    for again in (drawn, masks(model)):
        assert all(torch.equal(a, b) for a, b in zip(first, gradient(again), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, gradient(masks(model, 1)), strict=True))


def test_masks_keep_what_they_should():
    model = AWDLSTM(3000, embedding=60, hidden=80, layers=3)
    drawn = masks(model, batch=50)
    for p, several in (
        (0.1, [drawn.words]),
        (0.4, [drawn.inputs]),
        (0.3, drawn.between),
        (0.4, [drawn.outputs]),
        (0.5, drawn.recurrent),
    ):
        for mask in several:
            kept = mask != 0
            assert torch.equal(mask[kept], torch.full_like(mask[kept], 1 / (1 - p)))
            # Five standard deviations of a binomial share: a chance of 6e-7 per mask.
            assert abs(kept.float().mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / mask.numel())
    assert drawn.words.shape == (3000, 1)
    assert [mask.shape for mask in drawn.between] == [(1, 50, 80)] * 2
    assert [mask.shape for mask in drawn.recurrent] == [(320, 80), (320, 80), (240, 60)]


def test_masks_of_some_streams_are_those_of_the_whole_batch():
    # The loss is a mean over streams: the mean over two halves with their own masks is the whole.
    model, (words, targets) = make(), text()
    drawn, state = masks(model), model.initial_state(2)
    whole, _ = model.training_loss(words, targets, model.initial_state(BATCH), drawn)
    halves = [
        model.training_loss(words[:, i : i + 2], targets[:, i : i + 2], state, drawn.streams(i, 2))[0]
        for i in (0, 2)
    ]
    # Some ten roundings of numbers near 3.
    assert whole.item() == pytest.approx((halves[0] + halves[1]).item() / 2, abs=1e-14)


def test_second_derivatives_are_those_of_the_gradient():
    model, (words, targets) = make(), text()
    params = list(model.parameters())
    drawn, state = masks(model), model.initial_state(BATCH)

    def loss():
        return model.training_loss(words, targets, state, drawn)[0]

    generator = torch.Generator().manual_seed(5)
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params]
    length = torch.cat([d.flatten() for d in direction]).norm()

    def gradient(a):
        with torch.no_grad():
            for p, d in zip(params, direction, strict=True):
                p.add_(d, alpha=a)
        found = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), params)])
        with torch.no_grad():
            for p, d in zip(params, direction, strict=True):
                p.sub_(d, alpha=a)
        return found

    # Central differences: the error of order a² is below 1e-8 relative, that of rounding near 1e-16/a.
    a = 1e-5
    expected = (gradient(a) - gradient(-a)).norm() / (2 * a * length)
    assert directional_smoothness(loss, params, direction) == pytest.approx(expected.item(), rel=1e-6)
    assert hessian_norm(loss, params).value >= expected.item() * (1 - 1e-2)


@pytest.mark.parametrize("name", sorted(NONE))
@pytest.mark.parametrize("p", [-0.1, 1.0, math.nan])
def test_probabilities_are_checked(name, p):
    with pytest.raises(ValueError, match=f"{name} must be at least 0 and below 1, got {p}"):
        make(**{name: p})


def test_other_arguments_are_checked():
    with pytest.raises(ValueError, match="slowness must not be negative, got -1"):
        make(slowness=-1.0)
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        make(hidden=0)
    model, (words, targets) = make(), text()
    with pytest.raises(ValueError, match="masks are for 3 streams, got 4"):
        model.training_loss(words, targets, model.initial_state(BATCH), masks(model, batch=3))
    with pytest.raises(ValueError, match="patience must be at least 1, got 0"):
        NonMonotoneAverage(model, patience=0)


def test_averaging_starts_when_a_loss_is_above_one_that_is_older_than_the_patience():
    average = NonMonotoneAverage(make(), patience=2)
    # v > min(ℓ_1 ... ℓ_(t-2)): 4.5 is compared with 6 and 5, 4.9 with 6, 5 and 4, which it exceeds.
    answers = [average.after_validation(v) for v in (6.0, 5.0, 4.0, 4.5, 3.9, 4.9, 1.0)]
    assert answers == [False, False, False, False, False, True, True]
    never = NonMonotoneAverage(make(), patience=2)
    assert not any(never.after_validation(v) for v in (3.0, 9.0))


def trained(steps, average=None, start=0):
    model, (words, targets) = make(), text()
    optimizer = ClippedSGD(model.parameters(), 1.0, max_norm=0.25)
    iterates = []
    for k in range(steps):
        loss, _ = model.training_loss(words, targets, model.initial_state(BATCH), masks(model, k))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if average is not None:
            average.averaging = k >= start
            average.after_step(model)
        iterates.append([p.detach().clone() for p in model.parameters()])
    return model, iterates


def test_the_average_is_the_mean_of_the_iterates_and_is_lent():
    average = NonMonotoneAverage(make())
    model, iterates = trained(7, average, start=3)
    assert average.steps == 4
    expected = [torch.stack(several).mean(0) for several in zip(*iterates[3:], strict=True)]
    last = iterates[-1]

    def parameters_are(values, exactly):
        # Three updates a + (x - a)/m of numbers below 1.
        return all(
            torch.equal(p, v) if exactly else torch.allclose(p, v, rtol=0, atol=1e-15)
            for p, v in zip(model.parameters(), values, strict=True)
        )

    with average.applied(model):
        assert parameters_are(expected, exactly=False)
        assert not parameters_are(last, exactly=False)
    assert parameters_are(last, exactly=True)
    with pytest.raises(KeyboardInterrupt), average.applied(model):
        raise KeyboardInterrupt
    assert parameters_are(last, exactly=True)


def test_without_an_average_nothing_is_lent():
    average = NonMonotoneAverage(make())
    model, iterates = trained(2, average, start=9)
    with average.applied(model):
        assert all(torch.equal(p, x) for p, x in zip(model.parameters(), iterates[-1], strict=True))


def test_its_state_goes_into_a_checkpoint(tmp_path):
    average = NonMonotoneAverage(make(), patience=1)
    assert [average.after_validation(v) for v in (2.0, 3.0, 4.0)] == [False, False, True]
    model, _ = trained(3, average)
    torch.save(average.state_dict(), tmp_path / "state.pt")
    again = NonMonotoneAverage(make(), patience=1)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (again.losses, again.averaging, again.steps) == ([2.0, 3.0, 4.0], True, 3)
    for one in (average, again):
        one.after_step(model)
    for a, b in zip(average.average.parameters(), again.average.parameters(), strict=True):
        assert torch.equal(a, b)
    empty = NonMonotoneAverage(make())
    empty.load_state_dict(NonMonotoneAverage(make()).state_dict())
    assert (empty.steps, empty.averaging) == (0, False)
