import hashlib
import io
import math
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from gradclip.train import train

STEPS = 12
IDENTITY = {"lr": 0.1, "seeds": [0, 1], "source_sha256": "a" * 64}


class Walk:
    """A run whose every number depends on everything a checkpoint has to hold.

    The global generator and a generator of its own drive it, momentum remembers, and ``position`` counts.
    """

    def __init__(self, stop_at=None, kill=False):
        torch.manual_seed(7)
        self.own = torch.Generator().manual_seed(3)
        self.x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        self.optimizer = torch.optim.SGD([self.x], lr=0.1, momentum=0.9)
        self.position = 0
        self.stop_at, self.kill = stop_at, kill
        self.iterations = []

    def step(self, iteration):
        if iteration == self.stop_at:
            torch.rand(5)  # half of a step is done when the interruption comes
            self.x.data += 1.0
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt
        self.iterations.append(iteration)
        noise = torch.rand(3, dtype=torch.float64) + torch.rand(3, generator=self.own, dtype=torch.float64)
        self.position += 1
        loss = ((self.x - noise * self.position) ** 2).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item(), "x": self.x[0].item()}

    def state_dict(self):
        return {
            "x": self.x.detach(),
            "optimizer": self.optimizer.state_dict(),
            "own": self.own.get_state(),
            "position": self.position,
        }

    def load_state_dict(self, state):
        with torch.no_grad():
            self.x.copy_(state["x"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.own.set_state(state["own"])
        self.position = state["position"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(
        Walk(), STEPS, checkpoint=tmp_path_factory.mktemp("whole") / "c.pt", identity=IDENTITY
    ).series


def test_the_series_has_one_value_per_step(whole):
    assert whole.keys() == {"loss", "x"}
    assert all(len(column) == STEPS for column in whole.values())


@pytest.mark.parametrize("stop_at", [0, 1, 7, STEPS - 1])
@pytest.mark.parametrize("interval", [0.0, math.inf])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, whole, stop_at, interval):
    path = tmp_path / "deep" / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        train(Walk(stop_at), STEPS, checkpoint=path, identity=IDENTITY, interval=interval)
    resumed = Walk()
    if path.exists():
        torch.manual_seed(99)  # the next process does not find the generator where the last one left it
    result = train(resumed, STEPS, checkpoint=path, identity=IDENTITY, interval=interval)
    assert result.series == whole  # exact: the same operations on the same bits
    assert resumed.iterations == list(range(stop_at if interval == 0.0 else 0, STEPS))


def test_a_run_stopped_many_times_gives_the_same_bits(tmp_path, whole):
    for stop_at in (2, 3, 8):
        with pytest.raises(KeyboardInterrupt):
            train(Walk(stop_at), STEPS, checkpoint=tmp_path / "c.pt", identity=IDENTITY, interval=0.0)
    assert train(Walk(), STEPS, checkpoint=tmp_path / "c.pt", identity=IDENTITY).series == whole


def test_a_killed_process_goes_on_to_the_same_bits(tmp_path, whole):
    # SIGKILL: no handler, no clean-up, as when the machine's memory or a build's time runs out.
    script = f"""
        import runpy
        here = runpy.run_path({__file__!r})
        run = here["Walk"](stop_at=6, kill=True)
        options = dict(checkpoint={str(tmp_path / "c.pt")!r}, identity=here["IDENTITY"], interval=0.0)
        here["train"](run, {STEPS}, **options)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    resumed = Walk()
    assert train(resumed, STEPS, checkpoint=tmp_path / "c.pt", identity=IDENTITY).series == whole
    assert resumed.iterations == list(range(6, STEPS))


def test_a_finished_run_is_not_repeated(tmp_path, whole):
    first = train(Walk(), STEPS, checkpoint=tmp_path / "c.pt", identity=IDENTITY)
    again = Walk()
    result = train(again, STEPS, checkpoint=tmp_path / "c.pt", identity=IDENTITY)
    assert again.iterations == []
    assert result == first
    assert result.series == whole


def test_time_is_added_up_over_restarts(tmp_path, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr("gradclip.train.time.monotonic", lambda: float(next(clock)))
    with pytest.raises(KeyboardInterrupt):
        train(Walk(5), STEPS, checkpoint=tmp_path / "c.pt", identity=IDENTITY, interval=0.0)
    # The clock ticks once per reading and a step is read at both ends: one second each.
    assert train(Walk(), STEPS, checkpoint=tmp_path / "c.pt", identity=IDENTITY).seconds == STEPS


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({**IDENTITY, "lr": 0.2}, "lr=0.2 instead of 0.1"),
        ({**IDENTITY, "source_sha256": "b" * 64}, "source_sha256='bbb"),
        ({**IDENTITY, "new": 1}, "new=1 instead of 'absent'"),
        ({"lr": 0.1, "seeds": [0, 1]}, "source_sha256='absent' instead of 'aaa"),
    ],
)
def test_a_checkpoint_of_another_run_is_ignored_and_named(tmp_path, whole, other, difference):
    path = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        train(Walk(7), STEPS, checkpoint=path, identity=other, interval=0.0)
    fresh = Walk()
    with pytest.warns(UserWarning, match="it belongs to another run") as caught:
        result = train(fresh, STEPS, checkpoint=path, identity=IDENTITY)
    assert str(path) in str(caught[0].message)
    assert difference in str(caught[0].message)
    assert fresh.iterations == list(range(STEPS))
    assert result.series == whole


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:50], lambda data: b"junk" * 99])
def test_a_damaged_checkpoint_is_ignored_and_named(tmp_path, whole, damage):
    path = tmp_path / "c.pt"
    train(Walk(), STEPS, checkpoint=path, identity=IDENTITY)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="unreadable") as caught:
        result = train(Walk(), STEPS, checkpoint=path, identity=IDENTITY)
    assert str(path) in str(caught[0].message)
    assert result.series == whole


def hashed(content):
    """A checkpoint file with this content and a hash that fits."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue()


@pytest.mark.parametrize("content", [[1], 3, torch.zeros(2), {"identity": 5}, {"identity": IDENTITY}, {}])
def test_a_file_that_is_no_checkpoint_is_ignored(tmp_path, whole, content):
    path = tmp_path / "c.pt"
    path.write_bytes(hashed(content))
    with pytest.warns(UserWarning, match="unreadable"):
        result = train(Walk(), STEPS, checkpoint=path, identity=IDENTITY)
    assert result.series == whole


def test_no_flipped_bit_goes_unnoticed(tmp_path, whole):
    path = tmp_path / "c.pt"
    train(Walk(), STEPS, checkpoint=path, identity=IDENTITY)
    good = path.read_bytes()
    for position in range(0, len(good), len(good) // 40):
        path.write_bytes(good[:position] + bytes([good[position] ^ 16]) + good[position + 1 :])
        with pytest.warns(UserWarning, match="unreadable"):
            assert train(Walk(), STEPS, checkpoint=path, identity=IDENTITY).series == whole


class Trap:
    def __reduce__(self):
        return (os.mkdir, ("sprung",))


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch, whole):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.pt"
    path.write_bytes(hashed({"identity": IDENTITY, "rows": [], "state": Trap()}))
    with pytest.warns(UserWarning, match="unreadable"):
        train(Walk(), STEPS, checkpoint=path, identity=IDENTITY)
    assert not (tmp_path / "sprung").exists()


def test_a_checkpoint_with_more_steps_than_asked_for_is_ignored(tmp_path, whole):
    path = tmp_path / "c.pt"
    train(Walk(), STEPS, checkpoint=path, identity=IDENTITY)
    with pytest.warns(UserWarning, match="it has 12 steps, more than the 5 asked for"):
        result = train(Walk(), 5, checkpoint=path, identity=IDENTITY)
    assert result.series == {name: values[:5] for name, values in whole.items()}


def test_a_kill_inside_a_write_leaves_the_last_whole_checkpoint(tmp_path, monkeypatch, whole):
    path = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        train(Walk(5), STEPS, checkpoint=path, identity=IDENTITY, interval=0.0)
    before = path.read_bytes()

    def power_cut(descriptor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", power_cut)
        with pytest.raises(KeyboardInterrupt):
            train(Walk(), STEPS, checkpoint=path, identity=IDENTITY, interval=0.0)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["c.pt"]
    assert train(Walk(), STEPS, checkpoint=path, identity=IDENTITY).series == whole


def test_progress_goes_to_stderr(tmp_path, capsys):
    train(Walk(), STEPS, checkpoint=tmp_path / "c.pt", identity=IDENTITY, label="a walk")
    out, err = capsys.readouterr()
    assert out == ""
    assert "a walk" in err
    assert f"{STEPS}/{STEPS}" in err
    assert "loss=" in err


def test_no_steps_are_refused(tmp_path):
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        train(Walk(), 0, checkpoint=tmp_path / "c.pt", identity=IDENTITY)
