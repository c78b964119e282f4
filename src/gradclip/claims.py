"""Claims and their verdicts.

``claims.yml`` lists what the article, the paper and the book assert. A claim carries checks, and the verdict
is computed from them, never typed:

* ``supported_by``: checks that must all come out true for the claim to stand as it is worded;
* ``refuted_by``: checks of which one is enough to overturn that wording (a counter-example);
* ``corrected``: the statement that does hold, with its own ``supported_by``;
* ``note``: what a reader must know about how the checks came about.

A check is either ``{test: ID}``, true when that pytest id passed, or ``{record: EXPERIMENT/PROFILE, key: KEY,
op: OP, threshold: NUMBER}``, true when the record's scalar compares as stated. A missing record or a test
that was not run makes the check unknown, and unknown is never counted as true or false.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HOLDS = "holds"
CORRECTED = "holds with a correction"
FAILS = "does not hold"
UNTESTED = "not tested here"
VERDICTS = (HOLDS, CORRECTED, FAILS, UNTESTED)
KINDS = ("definition", "proved", "computed", "measured")

OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    ">=": operator.ge,
    ">": operator.gt,
}


class ClaimError(ValueError):
    """``claims.yml`` is malformed; the message names the claim and the value."""


@dataclass(frozen=True)
class Check:
    """One piece of evidence: a test id, or a record's scalar against a threshold fixed before the run."""

    test: str | None = None
    record: str | None = None
    key: str | None = None
    op: str | None = None
    threshold: float | None = None

    def __str__(self) -> str:
        return self.test or f"{self.record}#{self.key} {self.op} {self.threshold:g}"


@dataclass(frozen=True)
class Claim:
    """One row of ``claims.yml``; ``verdict`` is the stored one, to be compared with :func:`judge`."""

    id: str
    source: str
    kind: str
    statement: str
    needs: str
    page: str
    verdict: str
    supported_by: tuple[Check, ...]
    refuted_by: tuple[Check, ...]
    corrected: str | None
    corrected_supported_by: tuple[Check, ...]
    untested: str | None
    note: str | None

    @property
    def checks(self) -> tuple[Check, ...]:
        """All checks of the claim, in the order of the file."""
        return self.supported_by + self.refuted_by + self.corrected_supported_by


@dataclass(frozen=True)
class Evidence:
    """What is known today: test outcomes by id, and a lookup of record scalars.

    Args:
        tests: pytest id -> passed. An id stands for all its parametrisations.
        scalar: ``scalar(record, key)`` gives a number, or ``None`` when the record does not exist. An
            existing record without the key must raise ``LookupError``: that is a mistake in ``claims.yml``,
            not missing evidence.
    """

    tests: Mapping[str, bool]
    scalar: Callable[[str, str], float | None]

    def outcome(self, check: Check) -> bool | None:
        """True, False, or None when the evidence is not there."""
        if check.test is not None:
            return self.tests.get(check.test)
        value = self.scalar(check.record, check.key)
        if value is None:
            return None
        if not isinstance(value, int | float) or math.isnan(value):
            return False
        return OPERATORS[check.op](value, check.threshold)


def judge(claim: Claim, evidence: Evidence) -> str:
    """The verdict that today's evidence gives, one of ``VERDICTS``.

    With ``s``, ``r`` and ``c`` for the outcomes of ``supported_by``, ``refuted_by`` and
    ``corrected.supported_by``: the wording stands if all of ``s`` are true and none of ``r`` is; otherwise,
    if something was decided against it, the corrected statement stands if all of ``c`` are true; otherwise
    the claim does not hold. If nothing decides, the claim is not tested here. A claim without any check can
    never hold.

    >>> row = {"id": "X", "source": "here", "kind": "proved", "statement": "s", "page": "p"}
    >>> claim = parse({**row, "verdict": "holds", "supported_by": [{"test": "tests/t.py::a"}]})
    >>> judge(claim, Evidence({"tests/t.py::a": True}, lambda record, key: None))
    'holds'
    >>> judge(claim, Evidence({}, lambda record, key: None))
    'not tested here'
    """
    supported = [evidence.outcome(check) for check in claim.supported_by]
    refuted = [evidence.outcome(check) for check in claim.refuted_by]
    corrected = [evidence.outcome(check) for check in claim.corrected_supported_by]
    if any(refuted) or False in supported:
        return CORRECTED if corrected and all(corrected) else FAILS
    if supported and all(supported) and None not in refuted:
        return HOLDS
    return UNTESTED


def load(path: str | Path) -> tuple[Claim, ...]:
    """Read ``claims.yml``.

    Raises:
        ClaimError: an unknown field, kind, operator or verdict, a repeated id, or a check that is neither a
            test nor a complete record comparison; the message names the claim and the value.
    """
    rows = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(rows, list):
        raise ClaimError(f"{path}: expected a list of claims, got {type(rows).__name__}")
    claims = tuple(parse(row) for row in rows)
    seen: set[str] = set()
    for claim in claims:
        if claim.id in seen:
            raise ClaimError(f"claim {claim.id}: the id is used twice")
        seen.add(claim.id)
    return claims


def parse(row: Mapping[str, Any]) -> Claim:
    """One claim from its mapping in ``claims.yml``; raises :class:`ClaimError` as :func:`load` does."""
    if not isinstance(row, Mapping):
        raise ClaimError(f"a claim is a mapping, got {row!r}")
    row = dict(row)
    name = row.get("id", "(without id)")

    def take(field: str, *, optional: bool = False) -> str | None:
        value = row.pop(field, None)
        if value is None and optional:
            return None
        if not isinstance(value, str) or not value.strip():
            raise ClaimError(f"claim {name}: {field} must be a text, got {value!r}")
        return value

    corrected = row.pop("corrected", None)
    if corrected is not None and set(_mapping(name, "corrected", corrected)) != {"statement", "supported_by"}:
        raise ClaimError(f"claim {name}: corrected is {{statement, supported_by}}, got {corrected!r}")
    claim = Claim(
        id=take("id"),
        source=take("source"),
        kind=take("kind"),
        statement=take("statement"),
        needs=take("needs", optional=True) or "nothing beyond its own definition",
        page=take("page"),
        verdict=take("verdict"),
        supported_by=_checks(name, row.pop("supported_by", [])),
        refuted_by=_checks(name, row.pop("refuted_by", [])),
        corrected=corrected["statement"] if corrected else None,
        corrected_supported_by=_checks(name, corrected["supported_by"]) if corrected else (),
        untested=take("untested", optional=True),
        note=take("note", optional=True),
    )
    if row:
        raise ClaimError(f"claim {name}: unknown fields {sorted(row)}")
    for field, value, allowed in (("kind", claim.kind, KINDS), ("verdict", claim.verdict, VERDICTS)):
        if value not in allowed:
            raise ClaimError(f"claim {name}: {field} must be one of {allowed}, got {value!r}")
    if corrected and not claim.corrected_supported_by:
        raise ClaimError(f"claim {name}: a corrected statement needs checks, got none")
    if not claim.checks and claim.untested is None:
        raise ClaimError(f"claim {name}: without checks it must say in 'untested' what is missing")
    return claim


def _mapping(name: str, field: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ClaimError(f"claim {name}: {field} must be a mapping, got {value!r}")
    return value


def _checks(name: str, rows: Any) -> tuple[Check, ...]:
    if not isinstance(rows, list):
        raise ClaimError(f"claim {name}: checks are a list, got {rows!r}")
    checks = []
    for row in rows:
        fields = set(_mapping(name, "a check", row))
        if fields == {"test"} and isinstance(row["test"], str):
            checks.append(Check(test=row["test"]))
        elif fields == {"record", "key", "op", "threshold"}:
            if row["op"] not in OPERATORS:
                raise ClaimError(f"claim {name}: op must be one of {tuple(OPERATORS)}, got {row['op']!r}")
            threshold = row["threshold"]
            if isinstance(threshold, bool) or not isinstance(threshold, int | float) or math.isnan(threshold):
                raise ClaimError(f"claim {name}: threshold must be a number, got {threshold!r}")
            checks.append(Check(**row))
        else:
            raise ClaimError(
                f"claim {name}: a check is {{test}} or {{record, key, op, threshold}}, got {dict(row)!r}"
            )
    return tuple(checks)
