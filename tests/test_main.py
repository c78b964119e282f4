import importlib
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from gradclip import experiments, records
from gradclip.__main__ import PROFILES, app


def call(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_the_list_names_every_experiment_and_says_what_it_is():
    result = call("list")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == experiments.names()
    assert "Gradient norm against smoothness" in result.stdout


def test_run_saves_a_record_and_prints_its_folder(tmp_path):
    result = call("run", "language-model", "--profile", "smoke", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    folder = tmp_path / "language-model" / "smoke-cpu"
    assert result.stdout.strip() == str(folder)
    record = records.load(folder)
    assert (record.experiment, record.profile) == ("language-model", "smoke")
    assert "language-model seed 0" in result.stderr  # progress


@pytest.mark.parametrize(
    ("arguments", "message", "choices"),
    [
        (["run", "langauge-model"], "no experiment 'langauge-model'", experiments.names()),
        (["run", "language_model"], "no experiment 'language_model'", experiments.names()),
        (["run", "language-model", "--profile", "huge"], "no profile 'huge'", PROFILES),
        (["run", "language-model", "--profile", "smoke", "--device", "tpu"], "no device 'tpu'", ["cpu"]),
    ],
)
def test_an_unknown_name_is_an_error_that_lists_the_choices(tmp_path, arguments, message, choices):
    result = call(*arguments, "--out", str(tmp_path))
    assert result.exit_code == 2
    assert message in result.stderr
    assert all(choice in result.stderr for choice in choices)
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = call("run", "language-model", "--device", "cuda", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "no device 'cuda'; choose from: cpu" in result.stderr


def test_missing_data_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADCLIP_DATA_DIR", str(tmp_path / "nowhere"))
    result = call("run", "language-model", "--profile", "paper", "--device", "cpu", "--out", str(tmp_path))
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert str(tmp_path / "nowhere" / "ptb" / "ptb.train.txt") in line
    assert list(tmp_path.iterdir()) == []


# Experiments with a short run on the paper's data.
SHORT = {"acceleration", "image-classifier", "landscape", "language-model", "threshold"}


def test_every_profile_of_every_experiment_exists():
    assert "language-model" in experiments.names()
    for name in experiments.names():
        module = importlib.import_module(f"gradclip.experiments.{name.replace('-', '_')}")
        profiles = set(PROFILES)
        if name not in SHORT:
            with pytest.raises(ValueError, match="profile must be one of"):
                module.Config.profile("short")
            profiles.remove("short")
        assert {module.Config.profile(profile).name for profile in profiles} == profiles


def test_a_profile_that_an_experiment_does_not_have_is_refused(tmp_path):
    result = call("run", "worst-case", "--profile", "short", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "profile must be one of" in result.output


def test_the_module_runs_as_a_program():
    command = [sys.executable, "-m", "gradclip", "run", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Usage: python -m gradclip run" in done.stderr
    assert "language-model" in done.stderr
