import math

import pytest
import torch

from gradclip.models.transformer import CharacterModel

CHARACTERS, WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 7, 6, 2, 2, 5, 3


def make(seed=0, **changes):
    sizes = {"width": WIDTH, "heads": HEADS, "layers": LAYERS, "context": CONTEXT, **changes}
    return CharacterModel(CHARACTERS, **sizes, generator=torch.Generator().manual_seed(seed)).double()


def text(seed=0, length=CONTEXT):
    return torch.randint(CHARACTERS, (length, BATCH), generator=torch.Generator().manual_seed(seed))


def moved(seed=0):
    """A model whose biases and scales are not where they start, so that each of them counts."""
    model, generator = make(seed), torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def norm(x, layer):
    centred = x - x.mean()
    return centred / torch.sqrt((centred**2).mean() + layer.eps) * layer.weight + layer.bias


@torch.no_grad()
def test_logits_are_those_of_the_formulas():
    # Independent: one stream, one character and one head at a time, the sum over the past written as a loop.
    model, words = moved(), text()
    expected = torch.empty(CONTEXT, BATCH, CHARACTERS, dtype=torch.float64)
    size = WIDTH // HEADS
    for j in range(BATCH):
        x = [model.embedding[words[t, j]] + model.positions[t] for t in range(CONTEXT)]
        for layer in model.layers:
            mixed = [layer.queries_keys_values(norm(v, layer.before_attention)) for v in x]
            q, k, v = ([m[i * WIDTH : (i + 1) * WIDTH] for m in mixed] for i in range(3))
            for t in range(CONTEXT):
                heads = []
                for h in range(HEADS):
                    part = slice(h * size, (h + 1) * size)
                    weights = [math.exp(q[t][part] @ k[s][part] / math.sqrt(size)) for s in range(t + 1)]
                    heads.append(sum(w * v[s][part] for s, w in enumerate(weights)) / sum(weights))
                x[t] = x[t] + layer.heads_out(torch.cat(heads))
            for t in range(CONTEXT):
                z = layer.hidden(norm(x[t], layer.before_hidden))
                x[t] = x[t] + layer.out(z * (1 + torch.erf(z / math.sqrt(2))) / 2)
        for t in range(CONTEXT):
            expected[t, j] = model.embedding @ norm(x[t], model.norm) + model.bias
    # A few hundred float64 roundings of numbers of size 10 at most; a wrong head or scale is off by 1e-2.
    torch.testing.assert_close(model(words), expected, rtol=0, atol=1e-12)


def test_no_character_sees_what_comes_later():
    model, words = moved(), text()
    logits = model(words)
    for t in range(1, CONTEXT):
        changed = words.clone()
        changed[t:] = (changed[t:] + 1) % CHARACTERS
        other = model(changed)
        # The same sums up to a zero times a number: rounding at most.
        torch.testing.assert_close(other[:t], logits[:t], rtol=0, atol=1e-14)
        assert (other[t] - logits[t]).abs().max() > 1e-3
        torch.testing.assert_close(model(words[:t]), logits[:t], rtol=0, atol=1e-14)


def test_every_character_sees_the_whole_past():
    model, words = moved(), text()
    for t in range(CONTEXT):
        changed = words.clone()
        changed[t] = (changed[t] + 1) % CHARACTERS
        assert ((model(changed)[-1] - model(words)[-1]).abs().amax(-1) > 1e-6).all()


def test_second_derivatives_are_those_of_finite_differences():
    model, words = moved(), text(length=CONTEXT)
    targets = text(seed=1)
    params = list(model.parameters())
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params]

    def gradient(create_graph=False):
        return torch.autograd.grad(model.loss(words, targets), params, create_graph=create_graph)

    inner = sum((g * d).sum() for g, d in zip(gradient(create_graph=True), direction, strict=True))
    product = torch.autograd.grad(inner, params)
    step = 1e-5
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(params, direction, strict=True):
                p.add_(sign * step * d)
        ends.append(gradient())
        with torch.no_grad():
            for p, d in zip(params, direction, strict=True):
                p.sub_(sign * step * d)
    scale = max(part.abs().max() for part in product)
    for found, ahead, behind in zip(product, *ends, strict=True):
        # Truncation of second order in the step, 1e-10, and rounding, 1e-16 / 1e-5; both times the size of
        # third derivatives along a direction of length √(parameters), some 1e3.
        torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=0, atol=1e-6 * float(scale))


def test_a_short_text_is_learned_by_heart():
    model = CharacterModel(
        CHARACTERS, width=16, heads=2, layers=2, context=8, generator=torch.Generator().manual_seed(0)
    )
    # From a position a character can be told, but the streams differ: the past must be used.
    words = torch.randint(CHARACTERS, (9, 4), generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    for _ in range(400):
        optimizer.zero_grad()
        loss = model.loss(words[:-1], words[1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    # The first targets of streams that start alike cannot be told apart, at no more than ln 4 / 8 per letter.
    assert loss.item() < 0.2 < math.log(CHARACTERS) / 5


def test_an_untrained_model_guesses_nearly_evenly():
    model = CharacterModel(90, width=32, heads=2, generator=torch.Generator().manual_seed(0))
    words = torch.randint(90, (65, 20), generator=torch.Generator().manual_seed(1))
    # Logits are sums of 32 numbers of size 0.1: deviation 0.1 √32 = 0.57 at most, which costs 0.57²/2 = 0.16.
    assert model.loss(words[:-1], words[1:]).item() == pytest.approx(math.log(90), abs=0.3)


def test_the_number_of_parameters_is_that_of_the_formula():
    count = sum(p.numel() for p in make().parameters())
    assert (
        count
        == (CHARACTERS + CONTEXT) * WIDTH + LAYERS * (12 * WIDTH**2 + 13 * WIDTH) + 2 * WIDTH + CHARACTERS
    )


def test_the_start_depends_on_the_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make(seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, third = make(seed=5), make(seed=6)
    names = [name for name, _ in first.named_parameters()]
    pairs = list(zip(first.parameters(), second.parameters(), third.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    alike = {name for name, (a, _, c) in zip(names, pairs, strict=True) if torch.equal(a, c)}
    assert alike == {name for name in names if name.endswith("bias") or "norm" in name or "before" in name}


def test_the_start_has_the_documented_deviations():
    model = CharacterModel(200, width=64, heads=4, layers=3, generator=torch.Generator().manual_seed(0))
    expected = {"embedding": 0.1, "positions": 0.1}
    for i in range(3):
        expected |= {
            f"layers.{i}.queries_keys_values.weight": 1 / 8,
            f"layers.{i}.heads_out.weight": 1 / 8 / math.sqrt(6),
            f"layers.{i}.hidden.weight": 1 / 8,
            f"layers.{i}.out.weight": 1 / 16 / math.sqrt(6),
        }
    parameters = dict(model.named_parameters())
    for name, deviation in expected.items():
        # Of at least 4096 normal numbers: the deviation is right to 1/√8192, times 5.
        assert parameters[name].std().item() == pytest.approx(deviation, rel=5 / math.sqrt(8192)), name


@pytest.mark.parametrize("name", ["width", "heads", "layers", "context"])
def test_sizes_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        make(**{name: 0})


def test_a_width_that_heads_cannot_share_and_a_text_that_is_too_long_are_refused():
    with pytest.raises(ValueError, match="width must be a multiple of heads=4, got 6"):
        make(heads=4)
    with pytest.raises(ValueError, match="at most context=5 characters are read at once, got 6"):
        make()(text(length=6))
