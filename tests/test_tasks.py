"""The tasks: batches in a fixed order, losses that are functions of parameters and batch, scores."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from gradclip.data import images, text
from gradclip.experiments._tasks import Characters, Language, Pictures, described, losses

LANGUAGE = Language("reference-manual", embedding=8, hidden=12, layers=2, batch=4, bptt=6)
PICTURES = Pictures("digits", blocks=1, width=4, batch=32, batch_norm=True, held_out=287, augment=False)
CHARACTERS = Characters("reference-manual", width=8, heads=2, layers=1, context=6, batch=4)
TASKS = pytest.mark.parametrize(
    "task", [LANGUAGE, PICTURES, CHARACTERS], ids=["language", "pictures", "characters"]
)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@TASKS
def test_a_seed_decides_the_weights_and_nothing_else_does(task):
    torch.manual_seed(1)
    first = flat(task.model(0))
    torch.manual_seed(2)
    assert torch.equal(flat(task.model(0)), first)
    assert not torch.equal(flat(task.model(1)), first)


@TASKS
def test_the_loss_of_a_batch_is_a_function(task):
    model = task.model(0)
    _, state = task.loss(model, 0, task.start())
    again = losses(task, model, 1, state)
    assert again().item() == again().item()
    assert again().item() != task.loss(model, 2, state)[0].item()
    torch.manual_seed(5)
    assert again().item() == task.loss(model, 1, state)[0].item()


@TASKS
def test_an_untrained_network_guesses_about_uniformly(task):
    # As they start, logits are small or of order one: the loss lies above that of a uniform guess by at most
    # about half the variance of the logits.
    model = task.model(0)
    score = task.evaluate(model)["valid"]
    assert task.guess * 0.8 < score < task.guess + 1.5


def test_language_batches_are_the_segments_and_the_state_is_carried_and_reset():
    corpus = text.reference_manual()
    assert LANGUAGE.guess == math.log(len(corpus.vocabulary))
    assert LANGUAGE.sha256 == corpus.sha256
    segments = text.segments(text.batchify(corpus.train, 4), 6)
    model = LANGUAGE.model(0)
    _, state = LANGUAGE.loss(model, 0, LANGUAGE.start())
    _, expected = model.loss(*segments[0], model.initial_state(4))
    assert all(
        torch.equal(a, b)
        for one, other in zip(state, expected, strict=True)
        for a, b in zip(one, other, strict=True)
    )
    loss, _ = LANGUAGE.loss(model, 1, state)
    assert loss.item() == model.loss(*segments[1], expected)[0].item()
    assert not state[0][0].requires_grad
    # Behind the last segment the text begins anew, with a state of zeros.
    anew, _ = LANGUAGE.loss(model, len(segments), state)
    assert anew.item() == model.loss(*segments[0], model.initial_state(4))[0].item()


def test_the_fixed_batch_of_language_is_of_the_validation_text():
    corpus = text.reference_manual()
    model = LANGUAGE.model(0)
    words, targets = text.segments(text.batchify(corpus.valid, 4), 6)[0]
    assert LANGUAGE.fixed(model).item() == model.loss(words, targets, model.initial_state(4))[0].item()


def test_character_batches_are_the_segments_and_begin_anew():
    corpus = text.reference_manual_characters()
    assert (CHARACTERS.guess, CHARACTERS.sha256) == (math.log(len(corpus.vocabulary)), corpus.sha256)
    segments = text.segments(text.batchify(corpus.train, 4), 6)
    model = CHARACTERS.model(0)
    for k, number in ((0, 0), (3, 3), (len(segments), 0), (2 * len(segments) + 1, 1)):
        loss, state = CHARACTERS.loss(model, k, None)
        assert state is None
        assert loss.item() == model.loss(*segments[number]).item()


def test_the_score_of_characters_is_that_of_the_beginning_of_the_validation_text():
    valid = text.reference_manual_characters().valid
    model = CHARACTERS.model(0)
    words, targets = text.segments(text.batchify(valid[:20_000], 4), 6)[0]
    assert CHARACTERS.fixed(model).item() == model.loss(words, targets).item()
    # One text after the other in float64: 20 streams of 1000, of which segments of 6 use 996.
    model, losses = model.double(), []
    with torch.no_grad():
        for j in range(20):
            stream = valid[1000 * j : 1000 * (j + 1)]
            for i in range(0, 996, 6):
                losses.append(model.loss(stream[i : i + 6, None], stream[i + 1 : i + 7, None]).item())
    # float32 rounds a loss of 5 by 3e-7; the mean of thousands is not worse.
    assert CHARACTERS.evaluate(model.float())["valid"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_an_epoch_of_pictures_shows_each_training_image_at_most_once(monkeypatch):
    seen = []
    monkeypatch.setattr(
        Pictures, "_loss", lambda self, model, pixels, labels: seen.append(pixels) or pixels.sum()
    )
    for k in range(2 * PICTURES.steps_per_epoch):
        PICTURES.loss(None, k, None)
    first, second = (
        torch.cat(seen[i * PICTURES.steps_per_epoch : (i + 1) * PICTURES.steps_per_epoch]).flatten(1)
        for i in range(2)
    )
    data = images.digits()
    train, held_out = images.hold_out(len(data.train), 287)
    assert PICTURES.steps_per_epoch == len(train) // 32
    trained = {tuple(row.tolist()) for row in data.train[train].flatten(1)}
    kept = [tuple(row.tolist()) for row in first]
    assert set(kept) <= trained
    # Digits contain no image twice, so a repeated one would be a repeated row.
    assert len(set(kept)) == len(kept)
    assert not trained & {tuple(row.tolist()) for row in data.train[held_out].flatten(1)}
    assert not torch.equal(first, second)


def test_scores_of_pictures_are_those_of_all_held_out_images_at_once():
    model = PICTURES.model(0)
    for k in range(3):  # so that running statistics are not the initial ones
        PICTURES.loss(model, k, None)
    score = PICTURES.evaluate(model)
    assert model.training
    data = images.digits()
    train, held_out = images.hold_out(len(data.train), 287)
    mean, std = data.train[train].double().mean(), data.train[train].double().std(correction=0)
    model.double().eval()
    with torch.no_grad():
        logits = model(((data.train[held_out].double() - mean) / std).movedim(-1, 1))
        test = model(((data.test.double() - mean) / std).movedim(-1, 1))
    # float32 against float64: 1e-5 is a hundred roundings of logits of order one.
    assert score["valid"] == pytest.approx(
        cross_entropy(logits, data.train_labels[held_out]).item(), rel=1e-5
    )
    right = (logits.argmax(1) == data.train_labels[held_out]).double().mean().item()
    assert score["accuracy"] == pytest.approx(right, abs=1e-12)
    expected = (test.argmax(1) == data.test_labels).double().mean().item()
    assert PICTURES.test_accuracy(model.float().train()) == pytest.approx(expected, abs=1e-12)


def test_augmented_pictures_are_the_same_at_every_call_and_others_at_every_step():
    task = Pictures("digits", blocks=1, width=4, batch=32, batch_norm=False, held_out=287, augment=True)
    plain = Pictures("digits", blocks=1, width=4, batch=32, batch_norm=False, held_out=287, augment=False)
    model = task.model(0)
    value = task.loss(model, 0, None)[0].item()
    assert value == task.loss(model, 0, None)[0].item()
    assert value != plain.loss(model, 0, None)[0].item()
    assert task.fixed(model).item() == plain.fixed(model).item()


def test_a_task_describes_itself():
    assert described(LANGUAGE)["task"] == "language"
    assert described(PICTURES)["width"] == 4
