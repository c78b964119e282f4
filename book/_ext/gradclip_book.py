"""What this book needs of Sphinx: executed notebooks, numbers read from records, tests behind proof steps,
verdicts.

Every mistake is a warning, and the build turns warnings into errors: an unknown record, key or test, a test
that failed, a stored verdict that today's evidence does not give.
"""

from __future__ import annotations

import ast
import base64
import json
import re
import tomllib
from functools import cache
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from pybtex.plugin import register_plugin
from pybtex.style.formatting.unsrt import Style as UnsrtStyle
from pybtex.style.labels import BaseLabelStyle
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

from gradclip import claims, records

logger = logging.getLogger(__name__)

BADGE = {
    claims.HOLDS: "success",
    claims.CORRECTED: "warning",
    claims.FAILS: "danger",
    claims.UNTESTED: "muted",
}
BADGE_CLASSES = {verdict: [f"sd-bg-{colour}", f"sd-bg-text-{colour}"] for verdict, colour in BADGE.items()}


# The profiles whose records are compared, and what each is.
SCALES = {"cpu": "small", "short": "the paper's data, shorter runs", "paper": "the paper's scale"}


class UnknownEvidence(LookupError):
    """A record, key or test that a page names does not exist."""


class MissingRecord(UnknownEvidence):
    """No record of that name exists, in this build or in ``results/``."""


@cache
def load_record(root: Path, name: str) -> records.Record:
    """The record ``EXPERIMENT/PROFILE`` or ``EXPERIMENT/PROFILE-DEVICE``.

    A record of this build comes before one of ``results/``, which may be there for comparison.
    """
    experiment, _, run = name.partition("/")
    for folder in (root / "_build/records", root / "results"):
        patterns = (f"{experiment}/{run}/record.json", f"{experiment}/{run}-*/record.json")
        found = sorted(path for pattern in patterns for path in folder.glob(pattern))
        if len(found) > 1:
            raise UnknownEvidence(f"{len(found)} records of {folder.name} are named {name!r}; add the device")
        if found:
            return records.load(found[0].parent)
    raise MissingRecord(f"no record is named {name!r}")


def scalar(root: Path, record: str, key: str) -> float | int | str | bool | None:
    """The record's number under ``key``; ``config.NAME`` is a setting, ``config.NAME.FIELD`` one in it."""
    if key.startswith("config."):
        value = load_record(root, record).config
        for name in key.split(".")[1:]:
            if not isinstance(value, dict) or name not in value:
                raise UnknownEvidence(f"the configuration of record {record!r} has no {key!r}")
            value = value[name]
        return value
    scalars = load_record(root, record).scalars
    if key not in scalars:
        raise UnknownEvidence(f"record {record!r} has no key {key!r}")
    return scalars[key]


@cache
def test_outcomes(root: Path) -> dict[str, bool]:
    path = root / "_build/checks.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@cache
def repository(root: Path) -> str:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"][
        "Repository"
    ]


def test_address(root: Path, test: str) -> str:
    """Where the test's source can be read, down to the line."""
    file, _, qualified = test.partition("::")
    path = root / file
    if not path.is_file():
        raise UnknownEvidence(f"no test file {file!r}")
    body = ast.parse(path.read_text(encoding="utf-8")).body
    node = None
    for name in qualified.split("::"):
        node = next((child for child in body if getattr(child, "name", None) == name), None)
        if node is None:
            raise UnknownEvidence(f"{file} has no {name!r}")
        body = node.body
    return f"{repository(root)}/blob/main/{file}#L{node.lineno}"


class AuthorYearLabels(BaseLabelStyle):
    """Label the bibliography as the text cites it: first author and year."""

    def format_labels(self, entries):
        for entry in entries:
            people = entry.persons.get("author") or entry.persons.get("editor") or []
            names = [
                " ".join(map(str, person.rich_prelast_names + person.rich_last_names)) for person in people
            ]
            who = names[0] + " et al." if len(names) > 2 else " and ".join(names)
            yield f"{who or entry.key}, {entry.fields['year']}"


class AuthorYearStyle(UnsrtStyle):
    """The references page: sorted by author, labelled by author and year."""

    default_sorting_style = "author_year_title"
    default_label_style = AuthorYearLabels


class MeasuredRole(SphinxRole):
    """``{measured}`EXPERIMENT/PROFILE#KEY|FORMAT` ``: a number read from a record when the book is built.

    For a truth value FORMAT is two words, ``IF TRUE/IF FALSE``.
    """

    def run(self):
        target, _, spec = self.text.partition("|")
        name, _, key = target.partition("#")
        root = Path(self.env.srcdir)
        try:
            value = scalar(root, name, key)
            if isinstance(value, bool) and "/" in spec:
                text = spec.split("/")[not value]
            else:
                text = format(value, spec)
        except (UnknownEvidence, records.RecordError, ValueError, TypeError) as error:
            logger.warning("measured: %s", error, location=self.get_location())
            return [], []
        stale = (
            "" if records.is_current(load_record(root, name)) else ", measured with other source than today's"
        )
        return [nodes.abbreviation(text, text, explanation=f"record {name}, {key}{stale}")], []


class PaperRole(SphinxRole):
    """``{paper}`NUMBER|SECTION` ``: a number quoted from the 2020 paper, with its section."""

    def run(self):
        text, bar, section = self.text.partition("|")
        if not (bar and text and section):
            logger.warning("paper: expected NUMBER|SECTION, got %r", self.text, location=self.get_location())
        return [nodes.abbreviation(text, text, explanation=f"quoted from Zhang et al. (2020), {section}")], []


def resolve_test(root: Path, test: str, location: str) -> tuple[str, str]:
    """The address of a test and a mark for its outcome; warns when it is unknown, was not run or failed."""
    try:
        address = test_address(root, test)
    except UnknownEvidence as error:
        logger.warning("test: %s", error, location=location)
        return "", ""
    passed = test_outcomes(root).get(test)
    if passed is None:
        logger.warning("test: %s was not run", test, location=location)
    elif not passed:
        logger.warning("test: %s failed", test, location=location)
    return address, "✓" if passed else "✗"


class TestRole(SphinxRole):
    """``{test}`tests/FILE.py::NAME` ``: a proof step's test, as a mark that leads to its name."""

    def run(self):
        address, mark = resolve_test(Path(self.env.srcdir), self.text, self.get_location())
        return [nodes.inline("", mark, classes=["cited-test"], test=self.text, address=address)], []


def list_cited_tests(app: Sphinx, doctree: nodes.document) -> None:
    """Number the tests that a page cites and name them at its end, so that prose stays readable."""
    cited = {}
    for node in list(doctree.findall(nodes.inline)):
        if "cited-test" in node["classes"]:
            number, _, _ = cited.setdefault(node["test"], (len(cited) + 1, node["address"], node.astext()))
            text = f"{node.astext()}{number}"
            mark = nodes.reference(
                "", text, refid=f"cited-test-{number}", classes=["cited-test"], internal=True
            )
            mark["reftitle"] = node["test"]
            node.replace_self(mark)
    if not cited:
        return
    items = nodes.bullet_list(classes=["cited-tests"])
    for test, (number, address, mark) in cited.items():
        name = nodes.reference("", "", nodes.literal("", test), refuri=address, internal=False)
        items += nodes.list_item(
            "", nodes.paragraph("", f"{mark}{number} ", name), ids=[f"cited-test-{number}"]
        )
    section = nodes.section(ids=["tests-cited-on-this-page"], names=["tests cited on this page"])
    section += nodes.title("", "Tests cited on this page")
    section += nodes.paragraph("", "Each ran when this page was built: ✓ passed, ✗ failed.")
    section += items
    doctree.next_node(nodes.section).append(section)


class VerdictRole(SphinxRole):
    """``{verdict}`ID` ``: the computed verdict on a claim as a badge, and a link to its evidence."""

    def run(self):
        root = Path(self.env.srcdir)
        claim = next((claim for claim in claims.load(root / "claims.yml") if claim.id == self.text), None)
        if claim is None:
            logger.warning("verdict: no claim %r", self.text, location=self.get_location())
            return [], []
        verdict = computed_verdict(claim, evidence(root), self.get_location())
        badge = nodes.inline("", verdict, classes=["sd-sphinx-override", "sd-badge", *BADGE_CLASSES[verdict]])
        link = addnodes.pending_xref(
            "",
            nodes.inline("", claim.id),
            refdomain="std",
            reftype="ref",
            reftarget=f"claim-{claim.id.lower()}",
            refexplicit=True,
            refdoc=self.env.docname,
            refwarn=True,
        )
        return [link, nodes.Text(" "), badge], []


class MarkdownDirective(SphinxDirective):
    """A directive that writes MyST."""

    def parse(self, lines: list[str]) -> list[nodes.Node]:
        box = nodes.container()
        self.state.nested_parse(StringList(lines, source=self.get_source_info()[0]), self.content_offset, box)
        return box.children

    @property
    def root(self) -> Path:
        return Path(self.env.srcdir)


def evidence(root: Path) -> claims.Evidence:
    def lookup(record: str, key: str):
        try:
            return scalar(root, record, key)
        except MissingRecord:
            return None

    return claims.Evidence(test_outcomes(root), lookup)


class NotebookFigureDirective(MarkdownDirective):
    """``{notebook-figure} NOTEBOOK#NAME``: an executed notebook's figure, with its caption."""

    required_arguments = 1

    def run(self):
        name, _, figure = self.arguments[0].partition("#")
        executed = self.root / "_build" / f"{name}.ipynb"
        nb = json.loads(executed.read_text(encoding="utf-8")) if executed.is_file() else {"cells": []}
        for cell in nb["cells"]:
            mystnb = cell["metadata"].get("mystnb", {})
            bundles = (output.get("data", {}) for output in cell.get("outputs", ()))
            png = next((data["image/png"] for data in bundles if "image/png" in data), None)
            if mystnb.get("figure", {}).get("name") == figure and png:
                image = self.root / "_build/figures" / f"{figure}.png"
                image.parent.mkdir(parents=True, exist_ok=True)
                image.write_bytes(base64.b64decode(png))
                return self.parse(
                    [
                        f":::{{figure}} /_build/figures/{image.name}",
                        f":alt: {mystnb['image']['alt']}",
                        "",
                        mystnb["figure"]["caption"],
                        ":::",
                    ]
                )
        logger.warning("notebook-figure: no %s", self.arguments[0], location=self.get_location())
        return []


def computed_verdict(claim: claims.Claim, known: claims.Evidence, location: str) -> str:
    """The verdict on a claim; evidence that is damaged or ambiguous is a warning, not a verdict."""
    try:
        return claims.judge(claim, known)
    except (UnknownEvidence, records.RecordError) as error:
        logger.warning("claim %s: %s", claim.id, error, location=location)
        return claims.UNTESTED


def is_chosen(name: str, argument: str) -> bool:
    """Whether the id of a claim starts with the argument, or lies in the range that it is."""
    span = re.fullmatch(r"([A-Z]+)(\d+)-\1(\d+)", argument)
    if span is None:
        return name.startswith(argument)
    number = re.fullmatch(rf"{span[1]}(\d+)", name)
    return number is not None and int(span[2]) <= int(number[1]) <= int(span[3])


class ClaimsSummaryDirective(MarkdownDirective):
    """One row per claim: the computed verdict, the claim.

    An argument chooses the claims whose ids start with it, or, as ``L1-L14``, those with numbers in a range.
    """

    optional_arguments = 1

    def run(self):
        argument = self.arguments[0] if self.arguments else ""
        lines = [":::{list-table}", ":header-rows: 1", ":widths: 9 31 60", ":class: claims", ""]
        lines += ["* - Claim", "  - Verdict", "  - Statement"]
        known = evidence(self.root)
        for claim in claims.load(self.root / "claims.yml"):
            verdict = computed_verdict(claim, known, self.get_location())
            if not is_chosen(claim.id, argument):
                continue
            if verdict != claim.verdict:
                logger.warning(
                    "claim %s: claims.yml says %r, the evidence says %r",
                    claim.id,
                    claim.verdict,
                    verdict,
                    location=self.get_location(),
                )
            lines += [
                f"* - [{claim.id}](#claim-{claim.id.lower()})",
                f"  - {{bdg-{BADGE[verdict]}}}`{verdict}`",
                f"  - {claim.statement}",
            ]
        if lines[-1] == "  - Statement":
            raise self.error(f"no claim's id fits {argument!r}")
        return self.parse([*lines, ":::"])


class ClaimsDetailDirective(MarkdownDirective):
    """Every claim with what it needs, what corrects it, and each piece of evidence with its outcome."""

    def run(self):
        lines = []
        known = evidence(self.root)
        for claim in claims.load(self.root / "claims.yml"):
            verdict = computed_verdict(claim, known, self.get_location())
            lines += [
                f"::::{{dropdown}} {claim.id}: {verdict}",
                f":name: claim-{claim.id.lower()}",
                ":open:" if verdict in (claims.CORRECTED, claims.FAILS) else "",
                "",
                f"{claim.statement}",
                "",
                f"**Where** {claim.source}. **Kind** {claim.kind}. **Needs** {claim.needs}. "
                f"**Page** [](/{claim.page}).",
                "",
            ]
            if claim.corrected:
                lines += [f"**Corrected statement.** {claim.corrected}", ""]
            if claim.untested:
                lines += [f"**Not tested.** {claim.untested}", ""]
            if claim.note:
                lines += [f"**Note.** {claim.note}", ""]
            for title, checks in (
                ("Supports the statement", claim.supported_by),
                ("Refutes the statement as worded", claim.refuted_by),
                ("Supports the correction", claim.corrected_supported_by),
            ):
                if checks:
                    lines += [
                        f"**{title}**",
                        "",
                        *(f"- {self.describe(check, known)}" for check in checks),
                        "",
                    ]
            lines += ["::::", ""]
        return self.parse(lines)

    def describe(self, check: claims.Check, known: claims.Evidence) -> str:
        if check.test:
            address, mark = resolve_test(self.root, check.test, self.get_location())
            return f"{mark} [`{check.test.removeprefix('tests/')}`]({address})"
        try:
            outcome = known.outcome(check)
        except (UnknownEvidence, records.RecordError):  # told with the verdict
            outcome = None
        if outcome is None:
            return f"`{check}`: no record"
        outcome = "yes" if outcome else "no"
        return f"`{check}`: measured {{measured}}`{check.record}#{check.key}|.3g`, {outcome}"


class RecordDirective(MarkdownDirective):
    """Where a record comes from, with a warning when it was made by other source than today's."""

    required_arguments = 1

    def run(self):
        name = self.arguments[0]
        try:
            record = load_record(self.root, name)
        except (UnknownEvidence, records.RecordError) as error:
            logger.warning("record: %s", error, location=self.get_location())
            return []
        made = record.provenance
        numba = f"numba {made['numba']}" if made.get("numba") else "no numba"
        current = records.is_current(record)
        origin = "the source of this build." if current else "**which has changed since.**"
        lines = [
            f":::{{admonition}} Record {name}",
            f":class: {'note' if current else 'warning'}",
            f"Finished {made['finished']} on {made['device_name']} in {made['wall_time_s']:.0f} s, "
            f"with Python {made['python']}, torch {made['torch']} and {numba}, "
            f"from source `{made['source_sha256'][:12]}`, {origin}",
            ":::",
        ]
        return self.parse(lines)


class ScalesDirective(MarkdownDirective):
    """``{scales} EXPERIMENT``: numbers of one experiment at every scale, and which scales have no record.

    Each line of the content is ``label | key | format``; the range over seeds is added where a record has it.
    """

    required_arguments = 1
    has_content = True

    def run(self):
        experiment = self.arguments[0]
        found = {}
        for profile in SCALES:
            try:
                found[profile] = load_record(self.root, f"{experiment}/{profile}")
            except MissingRecord:
                found[profile] = None
            except (UnknownEvidence, records.RecordError) as error:
                logger.warning("scales: %s", error, location=self.get_location())
                return []
        lines = ["```{list-table}", ":header-rows: 1", ":class: scales", "", "* -"]
        lines += [f"  - {profile}: {what}" for profile, what in SCALES.items()]
        for row in self.content:
            label, key, spec = (part.strip() for part in row.rsplit("|", 2))
            lines += [f"* - {label}", *(f"  - {self.cell(name, r, key, spec)}" for name, r in found.items())]
        lines += ["* - made", *(f"  - {self.origin(r)}" for r in found.values()), "```"]
        return self.parse(lines)

    def cell(self, profile: str, record: records.Record | None, key: str, spec: str) -> str:
        if record is None:
            return "no record"
        if key not in record.scalars and not records.is_current(record):
            return "not in this record"
        name = f"{record.experiment}/{profile}"
        text = f"{{measured}}`{name}#{key}|{spec}`"
        if f"{key}_min" in record.scalars:
            text += "".join(
                f"{before}{{measured}}`{name}#{key}{end}|{spec}`"
                for before, end in ((" (", "_min"), (" to ", "_max"))
            )
            text += ")"
        return text

    @staticmethod
    def origin(record: records.Record | None) -> str:
        if record is None:
            return "not yet"
        made = record.provenance
        stale = "" if records.is_current(record) else ", by source that has changed since"
        return f"{made['finished'][:10]} on {made['device_name']}, in {made['wall_time_s']:,.0f} s{stale}"


def show_executed_notebook(app: Sphinx, docname: str, source: list[str]) -> None:
    """Give Sphinx the executed copy of a notebook in place of the committed one, which carries no outputs."""
    if not docname.startswith("notebooks/"):
        return
    executed = Path(app.srcdir, "_build", f"{docname}.ipynb")
    if not executed.is_file():
        logger.warning("%s has not been executed: run make book", docname, location=docname)
        return
    source[0] = executed.read_text(encoding="utf-8")


def drop_live_code(
    app: Sphinx, page: str, template: str, context: dict, doctree: nodes.document | None
) -> None:
    """Leave out the live-code scripts: Jupyter Book adds them twice, which is an error in the browser."""
    context["script_files"] = [
        script
        for script in context["script_files"]
        if "thebe" not in f"{script.filename} {script.attributes.get('body')}"
    ]


def setup(app: Sphinx) -> dict:
    register_plugin("pybtex.style.formatting", "author_year", AuthorYearStyle)
    app.connect("source-read", show_executed_notebook)
    app.connect("doctree-read", list_cited_tests)
    app.connect("html-page-context", drop_live_code, priority=900)
    app.add_role("measured", MeasuredRole())
    app.add_role("paper", PaperRole())
    app.add_role("test", TestRole())
    app.add_role("verdict", VerdictRole())
    app.add_directive("notebook-figure", NotebookFigureDirective)
    app.add_directive("claims-summary", ClaimsSummaryDirective)
    app.add_directive("claims-detail", ClaimsDetailDirective)
    app.add_directive("record", RecordDirective)
    app.add_directive("scales", ScalesDirective)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
