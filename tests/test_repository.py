"""The repository's address stands in one place and is repeated faithfully; the package lists agree."""

import importlib.util
import re
import shutil
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("set_repository", ROOT / "scripts/set_repository.py")
repository = importlib.util.module_from_spec(spec)
spec.loader.exec_module(repository)

ADDRESS = re.compile(r"github(?:\.com)?/([\w.-]+/[\w.-]+?)(?:\.git)?(?=[/\s\"'\\)>#]|$)")
SITE = re.compile(r"https://([\w-]+)\.github\.io/([\w.-]+)")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def copy(tmp_path):
    for folder in ("notebooks", "book"):
        (tmp_path / folder).mkdir()
    for path in repository.files(ROOT):
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    return tmp_path


def addresses(root):
    """Every repository address in the files, found by a pattern of its own and not by the script's."""
    found = set()
    for path in repository.files(root):
        text = path.read_text()
        found |= {match[1] for match in ADDRESS.finditer(text)}
        found |= {f"{match[1]}/{match[2]}" for match in SITE.finditer(text)}
    return found - {"JingzhaoZhang/why-clipping-accelerates"}


def test_all_files_agree_with_pyproject():
    assert addresses(ROOT) == {repository.current(ROOT)}


def test_no_other_file_carries_the_address():
    """What the script does not rewrite must not need it."""
    slug = repository.current(ROOT)
    others = [ROOT / "environment.yml", ROOT / "Makefile", ROOT / "claims.yml", ROOT / "_toc.yml"]
    for folder in ("src/gradclip", "scripts", "workflow", ".github", "book/_ext", "book/_static"):
        others += [
            path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts
        ]
    assert [path for path in others if f"/{slug}" in path.read_text()] == []


def carriers(root):
    slug = repository.current(root)
    return {path for path in repository.files(root) if f"/{slug}" in path.read_text()}


def test_every_notebook_and_the_front_matter_carry_the_address():
    pages = {path for path in repository.files(ROOT) if path.parent.name == "book"}
    assert set(repository.files(ROOT)) - carriers(ROOT) <= pages
    assert ROOT / "book/reproduce.md" in carriers(ROOT)


def test_set_repository_changes_every_mention_and_is_idempotent(copy):
    carrying = carriers(copy)
    changed = repository.set_repository(copy, "some-body/clip.book")
    assert set(changed) == carrying
    assert addresses(copy) == {"some-body/clip.book"}
    assert repository.set_repository(copy, "some-body/clip.book") == []
    repository.set_repository(copy, repository.current(ROOT))
    for path in repository.files(copy):
        assert path.read_text() == (ROOT / path.relative_to(copy)).read_text()


NO_ADDRESSES = ["", "owner", "owner/", "/name", "a/b/c", "ow ner/x", "-o/x", "a/.", "a/..", "a/b.git"]


@pytest.mark.parametrize("wrong", [*NO_ADDRESSES, "https://github.com/a/b"])
def test_a_wrong_name_is_refused_and_nothing_is_written(copy, wrong):
    with pytest.raises(ValueError, match=re.escape(f"got {wrong!r}")):
        repository.set_repository(copy, wrong)
    for path in repository.files(copy):
        assert path.read_text() == (ROOT / path.relative_to(copy)).read_text()


def test_an_address_that_only_starts_alike_is_left_alone():
    text = "https://github.com/OWNER/gradclip-extras https://github.com/OWNER/gradclip.js https://github.com/OWNER/gradclip."
    assert repository.rewrite(text, "OWNER/gradclip", "a/b") == (
        "https://github.com/OWNER/gradclip-extras https://github.com/OWNER/gradclip.js https://github.com/a/b."
    )


REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*(.*)")
# conda-forge's name -> the package index's name, where they differ.
CONDA_NAMES = {"pytorch": "torch", "snakemake-minimal": "snakemake"}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def declared():
    """name -> version bound, over the dependencies and all extras of pyproject.toml."""
    extras = PROJECT["optional-dependencies"].values()
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    bounds = {}
    for name, bound in (REQUIREMENT.fullmatch(line).groups() for line in lines):
        assert bounds.setdefault(normal(name), bound) == bound, f"{name} is declared with two bounds"
    return bounds


def locked():
    """name -> exact version, of the lines of requirements.lock that apply to this Python."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") for pin in pins)
    return {
        normal(pin.name): str(pin.specifier).removeprefix("==")
        for pin in pins
        if pin.marker is None or pin.marker.evaluate()
    }


def release(version):
    return tuple(int(part) for part in re.match(r"[\d.]*\d", version)[0].split("."))


def test_environment_yml_asks_for_what_pyproject_asks_for():
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(entry["pip"] for entry in entries if isinstance(entry, dict))
    asked = {}
    for line in [*(entry for entry in entries if isinstance(entry, str)), *pip]:
        name, bound = REQUIREMENT.fullmatch(line).groups()
        asked[normal(CONDA_NAMES.get(name, name))] = bound
    low, high = re.fullmatch(r">=([\d.]+),<([\d.]+)", asked.pop("python")).groups()
    assert low == PROJECT["requires-python"].removeprefix(">=")
    assert high == "3.14"
    assert asked.pop("pip") == ""
    assert asked.pop("-e") == "."  # the library itself
    assert asked == declared()


def test_the_lock_satisfies_every_bound():
    versions = locked()
    for name, bound in declared().items():
        for clause in bound.split(","):
            operator, limit = re.fullmatch(r"(>=|<)([\d.]+)", clause).groups()
            version = release(versions[name])
            assert version >= release(limit) if operator == ">=" else version < release(limit), name


def test_the_lock_is_what_is_installed():
    """Whatever runs these tests was installed from the lock, and the lock has every declared package."""
    installed = {normal(dist.metadata["Name"]): dist.version.split("+")[0] for dist in distributions()}
    pins = locked()
    assert {name: installed.get(name) for name in pins} == pins
    assert set(declared()) <= set(pins)


def test_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
