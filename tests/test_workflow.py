"""The build graph: what an edit makes Snakemake run again, told by its dry runs on a copy of the project.

And what ``make test`` leaves out because the build has run it.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gradclip import experiments

ROOT = Path(__file__).parents[1]
SNAKEMAKE = [sys.executable, "-m", "snakemake", "--snakefile", "workflow/Snakefile", "--cores", "2"]
COPIED = ["book", "notebooks", "results", "src", "tests", "workflow"]
FILES = ["_config.yml", "_toc.yml", "claims.yml", "pyproject.toml", "requirements.lock"]


def snakemake(root, *arguments):
    done = subprocess.run([*SNAKEMAKE, *arguments], cwd=root, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def planned(root):
    """The names of the rules that a build would run now."""
    code, text = snakemake(root, "--dry-run", "--rerun-incomplete")
    assert code == 0, text
    lines = text.splitlines()
    rules = {line.split()[1].rstrip(":") for line in lines if line.startswith(("rule ", "localrule "))}
    return rules - {"all"}


def outputs(root):
    """The files that the build makes, as the workflow itself lists them."""
    code, text = snakemake(root, "--detailed-summary")
    assert code == 0, text
    return [line.split("\t")[0] for line in text.splitlines() if line.startswith("_build/")]


def edit(path, text):
    # A later time than the outputs', whatever the file system's resolution.
    path.write_text(path.read_text() + text)
    later = time.time() + 5
    os.utime(path, (later, later))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of the project in which every output exists, as after a build."""
    root = tmp_path_factory.mktemp("project")
    for folder in COPIED:
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, root / name)
    for name in outputs(root):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("made")
    code, text = snakemake(root, "--touch")
    assert code == 0, text
    return root


@pytest.fixture
def project(built, tmp_path):
    root = tmp_path / "project"
    shutil.copytree(built, root, copy_function=shutil.copy2)
    return root


ALL_NOTEBOOKS = {f"notebook_{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")}


EXPERIMENTS = {f"experiment_{name.replace('-', '_')}" for name in experiments.names()}
EVERYTHING = {"book", "checks", *EXPERIMENTS, *ALL_NOTEBOOKS}


def test_no_change_plans_nothing(project):
    assert planned(project) == set()


def test_an_edit_of_prose_builds_the_book_alone(project):
    edit(project / "book/clipping.md", "\nOne more sentence.\n")
    assert planned(project) == {"book"}


def test_an_edit_of_one_notebook_runs_that_one(project):
    path = project / "notebooks/01_clipping.ipynb"
    nb = json.loads(path.read_text())
    nb["cells"][0]["source"] = "# Another title"
    path.write_text(json.dumps(nb))
    edit(path, "\n")
    assert planned(project) == {"notebook_01_clipping", "book"}


def test_an_edit_of_the_library_runs_everything(project):
    edit(project / "src/gradclip/rules.py", "\n")
    assert planned(project) == EVERYTHING


def test_another_environment_runs_everything(project):
    edit(project / "requirements.lock", "# torch==3.0.0\n")
    assert planned(project) == EVERYTHING


def test_an_edit_of_the_notebook_of_an_experiment_keeps_its_record(project):
    edit(project / "notebooks/07_first_measurement.ipynb", "\n")
    assert planned(project) == {"notebook_07_first_measurement", "book"}


def test_citing_another_test_runs_the_checks_and_not_the_notebooks(project):
    edit(project / "book/clipping.md", "\n{test}`tests/test_rules.py::test_another`\n")
    assert planned(project) == {"checks", "book"}


def test_a_lost_output_is_made_again(project):
    (project / "_build/notebooks/02_smoothness.ipynb").unlink()
    assert planned(project) == {"notebook_02_smoothness", "book"}


def test_an_unknown_parameter_stops_the_build_before_anything_is_planned(project):
    path = project / "workflow/Snakefile"
    path.write_text(path.read_text().replace('"profile": "cpu"', '"profil": "cpu"'))
    code, text = snakemake(project, "--dry-run")
    assert code != 0
    assert "unknown parameter profil" in text


def test_only_cited_tests_that_passed_are_left_out(tmp_path):
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('x', [1, 2])\n"
        "def test_good(x): pass\n"
        "def test_good_or_not(): pass\n"
        "def test_bad(): pass\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "checks.json").write_text(
        '{"test_some.py::test_good": true, "test_some.py::test_bad": false}'
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-n", "2", "--checked=checks.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = [line.split("::")[1] for line in done.stdout.splitlines() if "PASSED" in line]
    assert sorted(run) == ["test_bad ", "test_good_or_not "]
