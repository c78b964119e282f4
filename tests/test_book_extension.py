"""book/_ext/gradclip_book.py on a small book: what it renders, and that each kind of mistake is a warning."""

import base64
import dataclasses
import importlib.util
import io
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace

from gradclip import records

ROOT = Path(__file__).parents[1]
# The smallest PNG there is: one white pixel.
PIXEL = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
        "0000000a49444154789c63f80f0001010100"
        "1bb6ee560000000049454e44ae426082"
    )
).decode()
TESTS = "def test_good():\n    pass\n\n\nclass TestGroup:\n    def test_bad(self):\n        pass\n"
CLAIM = {
    "id": "X1",
    "source": "article S0",
    "kind": "measured",
    "statement": "the slope $s$ is positive",
    "page": "index",
    "verdict": "holds",
    "supported_by": [{"record": "demo/smoke", "key": "slope", "op": ">", "threshold": 0}],
}


@pytest.fixture
def build(tmp_path, monkeypatch):
    """``build(text)`` renders one page and returns its document, its HTML and the warnings."""
    project = tmp_path / "project"
    (project / "tests").mkdir(parents=True)
    (project / "tests/test_a.py").write_text(TESTS)
    (project / "_build/notebooks").mkdir(parents=True)
    (project / "_build/checks.json").write_text(
        json.dumps({"tests/test_a.py::test_good": True, "tests/test_a.py::TestGroup::test_bad": False})
    )
    (project / "pyproject.toml").write_text('[project.urls]\nRepository = "https://github.com/o/n"\n')
    record = records.Record(
        experiment="demo",
        profile="smoke",
        config={"seed": 0},
        scalars={"slope": 1.23456, "name": "lstm", "differs": False},
        series={"x": [1.0, 2.0]},
        provenance=records.provenance("cpu", data_sha256=None, wall_time=1.0),
    )
    records.save(record, project / "_build/records")
    (project / "claims.yml").write_text(yaml.safe_dump([CLAIM]))
    figure = {
        "cell_type": "code",
        "source": "fig",
        "metadata": {
            "mystnb": {
                "image": {"alt": "a white pixel"},
                "figure": {"name": "fig-00-pixel", "caption": "One $x$"},
            }
        },
        "outputs": [{"output_type": "display_data", "data": {"image/png": PIXEL}, "metadata": {}}],
    }
    (project / "_build/notebooks/00_x.ipynb").write_text(json.dumps({"cells": [figure]}))
    monkeypatch.syspath_prepend(str(ROOT / "book/_ext"))
    # Its lookups are cached: import it afresh.
    monkeypatch.delitem(sys.modules, "gradclip_book", raising=False)

    def render(text):
        (project / "index.md").write_text(f"# Page\n\n{text}\n")
        warnings = io.StringIO()
        with docutils_namespace():
            app = Sphinx(
                project,
                None,
                tmp_path / "html",
                tmp_path / "doctrees",
                "html",
                confoverrides={
                    "extensions": ["myst_parser", "sphinx_design", "gradclip_book"],
                    "myst_enable_extensions": ["dollarmath", "colon_fence"],
                    "exclude_patterns": ["_build"],
                },
                status=None,
                warning=warnings,
                freshenv=True,
            )
            app.build()
        doctree = app.env.get_doctree("index")
        return doctree, (tmp_path / "html/index.html").read_text(), warnings.getvalue()

    render.project, render.record = project, record
    return render


def test_a_test_cited_twice_is_listed_once(build):
    doctree, _, warnings = build("{test}`tests/test_a.py::test_good` {test}`tests/test_a.py::test_good`")
    assert warnings == ""
    assert [node.astext() for node in doctree.findall(nodes.reference)] == [
        "✓1",
        "✓1",
        "tests/test_a.py::test_good",
    ]


def abbreviations(doctree):
    return [(node.astext(), node["explanation"]) for node in doctree.findall(nodes.abbreviation)]


def test_a_measured_number_is_formatted_and_says_where_it_comes_from(build):
    doctree, _, warnings = build("{measured}`demo/smoke#slope|.2f` {measured}`demo/smoke-cpu#name`")
    assert warnings == ""
    assert abbreviations(doctree) == [
        ("1.23", "record demo/smoke, slope"),
        ("lstm", "record demo/smoke-cpu, name"),
    ]


def test_a_truth_value_is_written_in_words(build):
    document, _, warnings = build("{measured}`demo/smoke#differs|yes/not significant`")
    assert warnings == ""
    assert abbreviations(document)[0][0] == "not significant"


def test_a_setting_of_a_run_is_read_from_its_configuration(build):
    document, _, warnings = build("{measured}`demo/smoke#config.seed|d`")
    assert warnings == ""
    assert abbreviations(document) == [("0", "record demo/smoke, config.seed")]


def test_a_number_of_the_paper_names_its_section(build):
    doctree, _, warnings = build("{paper}`95.2 %|Section 5`")
    assert warnings == ""
    assert abbreviations(doctree) == [("95.2 %", "quoted from Zhang et al. (2020), Section 5")]


def test_a_test_is_linked_to_its_line_and_marked(build):
    doctree, html, warnings = build("{test}`tests/test_a.py::test_good`")
    assert warnings == ""
    mark, name = doctree.findall(nodes.reference)
    assert mark.astext() == "✓1"
    assert name.astext() == "tests/test_a.py::test_good"
    assert name["refuri"] == "https://github.com/o/n/blob/main/tests/test_a.py#L1"
    assert mark["refid"] in re.findall(r'id="([^"]+)"', html)


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("{measured}`demo/smoke#slop`", "record 'demo/smoke' has no key 'slop'"),
        ("{measured}`demo/paper#slope`", "no record is named 'demo/paper'"),
        ("{measured}`demo/smoke#name|.2f`", "Unknown format code 'f'"),
        ("{paper}`95.2 %`", "expected NUMBER|SECTION"),
        ("{test}`tests/test_a.py::test_none`", "tests/test_a.py has no 'test_none'"),
        ("{test}`tests/test_b.py::test_good`", "no test file 'tests/test_b.py'"),
        ("{test}`tests/test_a.py::TestGroup`", "tests/test_a.py::TestGroup was not run"),
        ("{test}`tests/test_a.py::TestGroup::test_bad`", "tests/test_a.py::TestGroup::test_bad failed"),
        ("{verdict}`X2`", "no claim 'X2'"),
        ("{measured}`demo/smoke#config.lr`", "the configuration of record 'demo/smoke' has no 'config.lr'"),
        ("```{record} demo/paper\n```", "no record is named 'demo/paper'"),
        ("```{notebook-figure} notebooks/00_x#fig-00-none\n```", "no notebooks/00_x#fig-00-none"),
    ],
)
def test_a_mistake_is_a_warning(build, text, warning):
    assert warning in build(text)[2]


def test_a_changed_record_is_refused(build):
    series = build.project / "_build/records/demo/smoke-cpu/series.csv"
    series.write_text(series.read_text().replace("2.0", "3.0"))
    assert "series.csv" in build("{measured}`demo/smoke#slope`")[2]


def test_this_builds_record_comes_before_a_recorded_one(build):
    other = dataclasses.replace(build.record, scalars={"slope": 9.0})
    records.save(other, build.project / "results")
    doctree, _, warnings = build("{measured}`demo/smoke#slope|.2f`")
    assert warnings == ""
    assert abbreviations(doctree)[0][0] == "1.23"


def test_two_devices_under_one_name_must_be_told_apart(build):
    provenance = {**build.record.provenance, "device": "h200"}
    records.save(dataclasses.replace(build.record, provenance=provenance), build.project / "_build/records")
    warnings = build("{measured}`demo/smoke#slope`\n\n```{claims-summary}\n```")[2]
    assert "2 records of records are named 'demo/smoke'; add the device" in warnings
    assert "claim X1: 2 records" in warnings
    assert build("{measured}`demo/smoke-h200#slope|.2f`")[2] == ""


def test_a_damaged_record_is_a_warning_on_the_claims_page_too(build):
    series = build.project / "_build/records/demo/smoke-cpu/series.csv"
    series.write_text("x\n1.0\n")
    assert "claim X1:" in build("```{claims-summary}\n```\n\n```{claims-detail}\n```")[2]


def test_a_record_tells_its_origin(build):
    doctree, _, warnings = build("```{record} demo/smoke\n```")
    assert warnings == ""
    assert records.source_hash()[:12] in doctree.astext()
    assert "the source of this build" in doctree.astext()


def test_a_record_of_other_source_is_flagged(build, monkeypatch):
    monkeypatch.setattr(records, "is_current", lambda record: False)
    doctree, html, _ = build("{measured}`demo/smoke#slope|.2f`\n\n```{record} demo/smoke\n```")
    assert abbreviations(doctree)[0][1].endswith("measured with other source than today's")
    assert "has changed since" in html
    (admonition,) = doctree.findall(nodes.admonition)
    assert "warning" in admonition["classes"]


def cells(document):
    return [entry.astext() for entry in document.findall(nodes.entry)]


def test_every_scale_has_a_column_and_a_missing_record_is_said(build, tmp_path):
    record = records.load(tmp_path / "project/_build/records/demo/smoke-cpu")
    scalars = {"slope": 2.0, "slope_min": 1.5, "slope_max": 2.5}
    records.save(
        dataclasses.replace(record, profile="cpu", scalars=scalars), tmp_path / "project/_build/records"
    )
    older = record.provenance | {"source_sha256": "0" * 64, "wall_time_s": 1234.0}
    records.save(dataclasses.replace(record, profile="short", provenance=older), tmp_path / "project/results")
    document, _, warnings = build(
        ":::{scales} demo\nslope of $|x|$ | slope | .1f\nspread | slope_max | .1f\n:::"
    )
    assert warnings == ""
    head, slope, spread, made = (cells(document)[i : i + 4] for i in (0, 4, 8, 12))
    assert [text.split(":")[0] for text in head] == ["", "cpu", "short", "paper"]
    assert slope == ["slope of |x|", "2.0 (1.5 to 2.5)", "1.2", "no record"]
    assert spread == ["spread", "2.5", "not in this record", "no record"]
    assert made[2].endswith("in 1,234 s, by source that has changed since")
    assert made[3] == "not yet"


def test_a_key_that_the_current_record_lacks_is_a_warning_in_a_table_of_scales(build, tmp_path):
    record = records.load(tmp_path / "project/_build/records/demo/smoke-cpu")
    records.save(dataclasses.replace(record, profile="cpu"), tmp_path / "project/_build/records")
    _, _, warnings = build(":::{scales} demo\nslope | slop | .1f\n:::")
    assert "record 'demo/cpu' has no key 'slop'" in warnings


def test_a_figure_of_a_notebook_is_shown_with_its_alt_text(build):
    doctree, _, warnings = build("```{notebook-figure} notebooks/00_x#fig-00-pixel\n```")
    assert warnings == ""
    (image,) = doctree.findall(nodes.image)
    assert image["alt"] == "a white pixel"
    (caption,) = doctree.findall(nodes.caption)
    assert caption.astext().startswith("One x")


def test_a_verdict_is_a_badge_that_leads_to_its_evidence(build):
    _, html, warnings = build("{verdict}`X1`\n\n```{claims-detail}\n```")
    assert warnings == ""
    assert re.search(r'href="#claim-x1">.*X1.* <span class="[^"]*sd-bg-success[^"]*">holds</span>', html)


def test_a_summary_can_be_narrowed_to_a_prefix(build):
    rows = [CLAIM, {**CLAIM, "id": "Y1", "note": "made later"}]
    (build.project / "claims.yml").write_text(yaml.safe_dump(rows))
    doctree, _, warnings = build("```{claims-summary} Y\n```\n\n```{claims-detail}\n```")
    assert warnings == ""
    (table,) = doctree.findall(nodes.table)
    assert "Y1" in table.astext()
    assert "X1" not in table.astext()
    assert "made later" in doctree.astext()


def test_a_range_of_claims(build):
    rows = [{**CLAIM, "id": f"X{n}"} for n in (1, 2, 3, 10, 20)] + [
        {**CLAIM, "id": "X2b"},
        {**CLAIM, "id": "Y2"},
    ]
    (build.project / "claims.yml").write_text(yaml.safe_dump(rows))
    doctree, _, warnings = build("```{claims-summary} X2-X10\n```\n\n```{claims-detail}\n```")
    assert warnings == ""
    (table,) = doctree.findall(nodes.table)
    (body,) = table.findall(nodes.tbody)
    assert [row.children[0].astext() for row in body.children] == ["X2", "X3", "X10"]


def test_a_summary_of_no_claim_is_an_error(build):
    assert "no claim's id fits 'Z'" in build("```{claims-summary} Z\n```")[2]


def test_claims_show_verdict_and_evidence(build):
    doctree, html, warnings = build("```{claims-summary}\n```\n\n```{claims-detail}\n```")
    assert warnings == ""
    assert "sd-bg-success" in html
    assert 'href="#claim-x1"' in html
    assert 'id="claim-x1"' in html
    assert "measured 1.23, yes" in doctree.astext()


def test_a_stored_verdict_that_the_evidence_does_not_give_is_a_warning(build):
    check = {**CLAIM["supported_by"][0], "threshold": 2}
    (build.project / "claims.yml").write_text(yaml.safe_dump([{**CLAIM, "supported_by": [check]}]))
    warnings = build("```{claims-summary}\n```")[2]
    assert "claim X1: claims.yml says 'holds', the evidence says 'does not hold'" in warnings


def test_missing_evidence_is_not_a_pass(build):
    check = {**CLAIM["supported_by"][0], "record": "demo/paper"}
    row = {**CLAIM, "supported_by": [check], "verdict": "not tested here"}
    (build.project / "claims.yml").write_text(yaml.safe_dump([row]))
    doctree, _, warnings = build("```{claims-summary}\n```\n\n```{claims-detail}\n```")
    assert warnings == ""
    assert "no record" in doctree.astext()


def test_notebooks_are_replaced_by_their_executed_copies(build):
    spec = importlib.util.spec_from_file_location("extension", ROOT / "book/_ext/gradclip_book.py")
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)

    class App:
        srcdir = build.project

    source = ["committed"]
    extension.show_executed_notebook(App, "notebooks/00_x", source)
    assert json.loads(source[0])["cells"][0]["source"] == "fig"
    source = ["prose"]
    extension.show_executed_notebook(App, "book/x", source)
    assert source == ["prose"]
