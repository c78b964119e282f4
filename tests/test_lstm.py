import math

import pytest
import torch

from gradclip.models.lstm import LanguageModel

WORDS, EMBEDDING, HIDDEN, TIME, BATCH = 11, 3, 5, 7, 4


def make(seed=0, **changes):
    sizes = {"embedding": EMBEDDING, "hidden": HIDDEN, "layers": 2, **changes}
    return LanguageModel(WORDS, **sizes, generator=torch.Generator().manual_seed(seed)).double()


def text(seed=0):
    return torch.randint(WORDS, (TIME + 1, BATCH), generator=torch.Generator().manual_seed(seed))


def test_the_released_configuration_has_the_released_number_of_parameters():
    model = LanguageModel(10_000, embedding=200, hidden=512, layers=2)
    # By hand: tied embedding, four gates of each layer with two biases, decoder bias.
    expected = 10_000 * 200 + 4 * 512 * (200 + 512 + 2) + 4 * 200 * (512 + 200 + 2) + 10_000
    assert sum(p.numel() for p in model.parameters()) == expected == 4_043_472


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_last_layer_is_as_wide_as_the_embedding(layers):
    model = make(layers=layers)
    assert [layer.hidden_size for layer in model.layers] == [HIDDEN] * (layers - 1) + [EMBEDDING]
    logits, state = model(text(), model.initial_state(BATCH))
    assert logits.shape == (TIME + 1, BATCH, WORDS)
    assert [h.shape[-1] for h, _ in state] == [layer.hidden_size for layer in model.layers]


def test_logits_are_those_of_the_lstm_equations():
    # Independent: the gate equations, one word and one stream at a time, without torch's LSTM.
    model, words = make(), text()
    expected = torch.empty(TIME + 1, BATCH, WORDS, dtype=torch.float64)
    for j in range(BATCH):
        h = [torch.zeros(layer.hidden_size, dtype=torch.float64) for layer in model.layers]
        c = [torch.zeros_like(x) for x in h]
        for t in range(TIME + 1):
            x = model.embedding[words[t, j]]
            for n, layer in enumerate(model.layers):
                gates = (
                    layer.weight_ih_l0 @ x + layer.bias_ih_l0 + layer.weight_hh_l0 @ h[n] + layer.bias_hh_l0
                )
                keep_in, forget, new, out = gates.chunk(4)
                c[n] = forget.sigmoid() * c[n] + keep_in.sigmoid() * new.tanh()
                h[n] = x = out.sigmoid() * c[n].tanh()
            expected[t, j] = model.embedding @ x + model.bias
    logits, state = model(words, model.initial_state(BATCH))
    # A few hundred float64 roundings of numbers below 1; a wrong gate is off by 1e-3.
    torch.testing.assert_close(logits, expected.detach(), rtol=0, atol=1e-13)
    torch.testing.assert_close(state[-1][1][0, -1], c[-1], rtol=0, atol=1e-13)


def test_a_text_in_two_parts_is_read_as_one_text():
    model, words = make(), text()
    whole, _ = model(words, model.initial_state(BATCH))
    first, state = model(words[:3], model.initial_state(BATCH))
    second, _ = model(words[3:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole, rtol=0, atol=1e-13)


def test_loss_is_the_mean_negative_log_probability_and_the_state_is_cut_off():
    model, words = make(), text()
    loss, state = model.loss(words[:-1], words[1:], model.initial_state(BATCH))
    logits, _ = model(words[:-1], model.initial_state(BATCH))
    total = sum(
        logits[t, j].logsumexp(0) - logits[t, j, words[t + 1, j]] for t in range(TIME) for j in range(BATCH)
    )
    # 28 terms of size 2.4 in float64.
    assert loss.item() == pytest.approx(total.item() / (TIME * BATCH), abs=1e-14)
    assert loss.requires_grad
    assert not any(part.requires_grad for pair in state for part in pair)


def test_an_untrained_model_guesses_evenly():
    model = LanguageModel(2000, embedding=64, hidden=128, generator=torch.Generator().manual_seed(0))
    words = torch.randint(2000, (36, 20), generator=torch.Generator().manual_seed(1))
    loss, _ = model.loss(words[:-1], words[1:], model.initial_state(20))
    # |logit| <= 0.1 ‖h‖_1 <= 0.1 * 64, in truth near 0.1 * 0.1 * 8: the loss is ln 2000 up to that.
    assert loss.item() == pytest.approx(math.log(2000), abs=0.08)


def test_the_same_batch_gives_the_same_gradient_bit_for_bit():
    model, words = make().float(), text()

    def gradient():
        loss, _ = model.loss(words[:-1], words[1:], model.initial_state(BATCH))
        return torch.autograd.grad(loss, list(model.parameters()))

    first = gradient()
    assert all(g.abs().sum() > 0 for g in first)
    assert all(torch.equal(a, b) for a, b in zip(first, gradient(), strict=True))


def test_the_start_depends_on_the_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make(seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, third = make(seed=5), make(seed=6)
    pairs = list(zip(first.parameters(), second.parameters(), third.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    # The decoder's bias, zero in every model, is the only one that the seed leaves alone.
    assert sum(torch.equal(a, c) for a, _, c in pairs) == 1


def test_the_start_fills_the_documented_ranges():
    model = LanguageModel(500, embedding=40, hidden=60, generator=torch.Generator().manual_seed(0))
    ranges = [(model.embedding, 0.1)] + [
        (p, 1 / math.sqrt(layer.hidden_size)) for layer in model.layers for p in layer.parameters()
    ]
    for parameter, limit in ranges:
        assert parameter.abs().max() <= limit
        # The largest of n >= 160 uniform numbers exceeds 0.9 of the limit but for a chance of 0.9^160 < 1e-7.
        assert parameter.abs().max() > 0.9 * limit
    assert not model.bias.any()


@pytest.mark.parametrize("name", ["embedding", "hidden", "layers"])
def test_sizes_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        make(**{name: 0})
    with pytest.raises(ValueError, match="vocabulary must be at least 1, got -3"):
        LanguageModel(-3)
