"""Run the tests that the book leans on, and write down how each came out.

    python workflow/checks.py _build/cited_tests.txt _build/checks.json

The ids come from ``claims.yml`` and from the ``{test}`` roles in the book's pages; the book's build reads the
outcomes to compute verdicts and to mark each proof step. An outcome is recorded whether it is good or bad:
judging is the book's work.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEST_ROLE = re.compile(r"\{test\}`([^`]+)`")
TEST_CHECK = re.compile(r"\btest:\s*([^\s,}]+)")


def cited_tests(root: Path) -> list[str]:
    """Every pytest id that ``claims.yml`` or a page of the book names, sorted.

    Read by pattern, not by parsing: the workflow asks for the list before each build, and must stay quick.
    """
    ids = set(TEST_CHECK.findall((root / "claims.yml").read_text(encoding="utf-8")))
    for page in (root / "book").glob("*.md"):
        ids.update(TEST_ROLE.findall(page.read_text(encoding="utf-8")))
    return sorted(ids)


class Outcomes:
    """A pytest plugin: an id passes when every phase of every parametrisation of it passed."""

    def __init__(self) -> None:
        self.passed: dict[str, bool] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = report.nodeid.split("[")[0]
        self.passed[test] = self.passed.get(test, True) and report.passed


def run(ids: Iterable[str], root: Path) -> dict[str, bool]:
    """Run the tests and return id -> passed; an id unknown to pytest ends the program with its message."""
    outcomes = Outcomes()
    os.chdir(root)
    status = pytest.main(["-q", "--no-header", *ids], plugins=[outcomes])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        sys.exit(f"workflow/checks.py: pytest stopped with {status!r}")
    return dict(sorted(outcomes.passed.items()))


def main() -> None:
    cited, output = (Path(argument).resolve() for argument in sys.argv[1:])
    outcomes = run(cited.read_text(encoding="utf-8").split(), ROOT)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_suffix(".tmp")
    temporary.write_text(json.dumps(outcomes, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, output)


if __name__ == "__main__":
    main()
