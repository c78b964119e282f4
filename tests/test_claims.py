"""Verdict logic against its truth table, and claims.yml itself."""

import itertools
from pathlib import Path

import pytest
import yaml

from gradclip import claims

ROOT = Path(__file__).parents[1]
TEST = "tests/a.py::"


def row(**changes):
    base = {
        "id": "X1",
        "source": "article S0",
        "kind": "proved",
        "statement": "two is even",
        "page": "book/claims",
        "verdict": "holds",
        "supported_by": [{"test": TEST + "s"}],
        "refuted_by": [{"test": TEST + "r"}],
        "corrected": {"statement": "four is even", "supported_by": [{"test": TEST + "c"}]},
    }
    return {key: value for key, value in (base | changes).items() if value is not None}


def no_records(record, key):
    return None


# The table is written out by hand from the definition of a verdict, so that it does not share judge's
# branches: (support, refutation, correction) -> verdict, "-" meaning that the evidence is missing.
TABLE = {
    "1 0 1": "holds",
    "1 0 0": "holds",
    "1 0 -": "holds",
    "1 1 1": "holds with a correction",
    "1 1 0": "does not hold",
    "1 1 -": "does not hold",
    "1 - 1": "not tested here",
    "1 - 0": "not tested here",
    "1 - -": "not tested here",
    "0 0 1": "holds with a correction",
    "0 0 0": "does not hold",
    "0 0 -": "does not hold",
    "0 1 1": "holds with a correction",
    "0 1 0": "does not hold",
    "0 1 -": "does not hold",
    "0 - 1": "holds with a correction",
    "0 - 0": "does not hold",
    "0 - -": "does not hold",
    "- 0 1": "not tested here",
    "- 0 0": "not tested here",
    "- 0 -": "not tested here",
    "- 1 1": "holds with a correction",
    "- 1 0": "does not hold",
    "- 1 -": "does not hold",
    "- - 1": "not tested here",
    "- - 0": "not tested here",
    "- - -": "not tested here",
}


def test_the_table_is_complete():
    assert set(TABLE) == {" ".join(states) for states in itertools.product("10-", repeat=3)}


@pytest.mark.parametrize(("states", "verdict"), TABLE.items())
def test_verdict_follows_the_truth_table(states, verdict):
    outcomes = {
        TEST + name: state == "1" for name, state in zip("src", states.split(), strict=True) if state != "-"
    }
    assert claims.judge(claims.parse(row()), claims.Evidence(outcomes, no_records)) == verdict


@pytest.mark.parametrize(
    ("op", "value", "expected"),
    [
        ("<", 1.0, True),
        ("<", 2.0, False),
        ("<=", 2.0, True),
        ("==", 2.0, True),
        (">=", 2.0, True),
        (">", 2.0, False),
        (">", 3.0, True),
        (">", float("nan"), False),
        ("<", float("nan"), False),
        ("<", "text", False),
        ("<", None, None),
    ],
)
def test_record_checks_compare_as_stated(op, value, expected):
    check = claims.Check(record="e/p", key="k", op=op, threshold=2.0)
    assert claims.Evidence({}, lambda record, key: value).outcome(check) is expected


def test_a_claim_without_checks_never_holds():
    claim = claims.parse(row(supported_by=None, refuted_by=None, corrected=None, untested="needs a GPU"))
    assert claims.judge(claim, claims.Evidence({}, no_records)) == claims.UNTESTED


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "guessed"}, "kind must be one of .* got 'guessed'"),
        ({"verdict": "maybe"}, "verdict must be one of .* got 'maybe'"),
        ({"statement": None}, "statement must be a text, got None"),
        ({"statement": " "}, "statement must be a text, got ' '"),
        ({"supported_by": ["tests/a.py::s"]}, "a check must be a mapping, got 'tests/a.py::s'"),
        ({"supported_by": {"test": "tests/a.py::s"}}, "checks are a list, got {'test'"),
        ({"supported_by": [{"test": 3}]}, "a check is .* got {'test': 3}"),
        ({"supported_by": [{"record": "r", "key": "k", "op": "<", "threshold": True}]}, "a number, got True"),
        (
            {"supported_by": [{"record": "r", "key": "k", "op": "<", "threshold": float("nan")}]},
            "number, got nan",
        ),
        ({"corrected": "four is even"}, "corrected must be a mapping, got 'four is even'"),
        ({"corrected": {"statement": "x", "supported_by": []}}, "needs checks, got none"),
        ({"colour": "green"}, r"unknown fields \['colour'\]"),
        ({"supported_by": [{"tset": "a"}]}, "a check is"),
        (
            {"supported_by": [{"record": "r", "key": "k", "op": "~", "threshold": 1}]},
            "op must be one of .* got '~'",
        ),
        (
            {"supported_by": [{"record": "r", "key": "k", "op": "<", "threshold": "two"}]},
            "threshold must be a number, got 'two'",
        ),
        ({"corrected": {"statement": "x"}}, "corrected is {statement, supported_by}, got"),
        ({"supported_by": None, "refuted_by": None, "corrected": None}, "without checks"),
    ],
)
def test_malformed_claims_are_named(changes, message):
    with pytest.raises(claims.ClaimError, match=message):
        claims.parse(row(**changes))


def test_repeated_ids_are_rejected(tmp_path):
    path = tmp_path / "claims.yml"
    path.write_text(yaml.safe_dump([row(), row()]))
    with pytest.raises(claims.ClaimError, match="X1: the id is used twice"):
        claims.load(path)


def test_every_article_statement_has_a_claim():
    ids = {claim.id for claim in claims.load(ROOT / "claims.yml")}
    assert {f"S{number}" for number in range(1, 10)} <= ids


def test_every_page_named_by_a_claim_exists():
    for claim in claims.load(ROOT / "claims.yml"):
        assert any((ROOT / f"{claim.page}{end}").is_file() for end in (".md", ".ipynb")), claim.page
