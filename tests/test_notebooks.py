"""What every committed notebook must look like, so that it opens on Colab, runs under papermill and reads
well in the book.

The rules are functions from a notebook to complaints; each is shown a notebook that breaks it and nothing
else.
"""

import ast
import copy
import re
from pathlib import Path

import nbformat
import pytest

from gradclip import claims

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SETUP = """\
import sys

if "google.colab" in sys.modules:  # Colab brings torch and the rest; only the library is missing
    !git clone --quiet --depth 1 https://github.com/{slug} gradclip
    %pip install --quiet --no-deps -e gradclip
    sys.path.insert(0, "gradclip/src")"""
# What MyST adds to Markdown, and Colab would show as it stands.
MYST = re.compile(r"\{[a-z:-]+\}`|^\s*(:::|```)\{|^\([\w-]+\)=$", re.MULTILINE)
LONGEST_CELL = 25


def source_of(nb, name):
    slug = re.search(r"github/([\w.-]+/[\w.-]+)/blob", nb.cells[0].source)
    return slug[1] if slug else None


def has_no_outputs(nb, name):
    for number, cell in enumerate(nb.cells, 1):
        if cell.cell_type == "code" and (cell.outputs or cell.execution_count is not None):
            yield f"cell {number} carries outputs"


def runs_with_the_plain_kernel(nb, name):
    if nb.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "the kernel is not python3"
    if set(nb.metadata) - {"kernelspec", "language_info"}:
        yield f"metadata beyond the kernel's: {sorted(nb.metadata)}"


def opens_with_title_and_badge(nb, name):
    first = nb.cells[0]
    if first.cell_type != "markdown" or not first.source.startswith("# "):
        yield "the first cell is not a title"
    if f"/blob/main/notebooks/{name}.ipynb" not in first.source:
        yield "the first cell has no Colab badge for this notebook"


def sets_up_in_the_one_way(nb, name):
    if nb.cells[1].source != SETUP.format(slug=source_of(nb, name)):
        yield "the second cell is not the set-up cell"
    if "remove-cell" not in nb.cells[1].metadata.get("tags", []):
        yield "the set-up cell is not tagged remove-cell"


def has_one_cell_of_parameters(nb, name):
    tagged = [cell for cell in nb.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1 or nb.cells[2] is not tagged[0]:
        yield "the third cell is not the only one tagged parameters"
        return
    for statement in ast.parse(tagged[0].source).body:
        try:
            ast.literal_eval(statement.value)
        except (AttributeError, ValueError):
            yield f"a parameter is not a literal: {ast.unparse(statement)}"


def is_plain_markdown(nb, name):
    for number, cell in enumerate(nb.cells, 1):
        if cell.cell_type == "markdown" and (found := MYST.search(cell.source)):
            yield f"cell {number} has MyST that Colab cannot show: {found[0].strip()}"


def describes_its_figures(nb, name):
    names = []
    for number, cell in enumerate(nb.cells, 1):
        if cell.cell_type != "code":
            continue
        mystnb = cell.metadata.get("mystnb", {})
        draws = cell.source.rstrip().rsplit("\n", 1)[-1] == "fig"
        if draws != ("image" in mystnb):
            yield f"cell {number}: a cell that ends with fig, and no other, has an image description"
        if draws:
            if len(mystnb.get("image", {}).get("alt", "")) < 40:
                yield f"cell {number}: the alt text says too little"
            if not mystnb.get("figure", {}).get("caption"):
                yield f"cell {number}: the figure has no caption"
            names.append(mystnb.get("figure", {}).get("name"))
    if len(set(names)) != len(names) or None in names:
        yield "figures need names of their own"


def keeps_logic_in_the_library(nb, name):
    for number, cell in enumerate(nb.cells, 1):
        if cell.cell_type != "code" or number == 2:
            continue
        if len(cell.source.splitlines()) > LONGEST_CELL:
            yield f"cell {number} has more than {LONGEST_CELL} lines"
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ClassDef):
                yield f"cell {number} defines a class"


RULES = [
    has_no_outputs,
    runs_with_the_plain_kernel,
    opens_with_title_and_badge,
    sets_up_in_the_one_way,
    has_one_cell_of_parameters,
    is_plain_markdown,
    describes_its_figures,
    keeps_logic_in_the_library,
]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_notebook_follows(rule, path):
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    assert list(rule(nb, path.stem)) == []


def test_every_notebook_is_in_the_book_and_numbered_in_its_order():
    toc = (ROOT / "_toc.yml").read_text()
    assert re.findall(r"file: notebooks/(\w+)", toc) == [path.stem for path in NOTEBOOKS]
    assert [path.stem[:2] for path in NOTEBOOKS] == [
        f"{number:02d}" for number in range(1, len(NOTEBOOKS) + 1)
    ]


def test_the_readme_lists_every_figure_with_its_notebook_and_known_claims():
    figures = {
        cell.metadata.mystnb.figure.name: path.stem
        for path in NOTEBOOKS
        for cell in nbformat.read(path, as_version=4).cells
        if "mystnb" in cell.metadata
    }
    row = re.compile(r"\| .+ \(`(fig-[\w-]+)`\) \| \[`(\w+)`\]\(.+\) \| `make notebook_(\w+)` \| (.+) \|")
    rows = row.findall((ROOT / "README.md").read_text())
    assert {figure: notebook for figure, notebook, _, _ in rows} == figures
    assert all(notebook == command for _, notebook, command, _ in rows)
    known = {claim.id for claim in claims.load(ROOT / "claims.yml")}
    assert {claim for *_, listed in rows for claim in listed.split(", ")} <= known


def good_notebook():
    new = nbformat.v4
    cells = [
        new.new_markdown_cell(
            "# T\n\nhttps://colab.research.google.com/github/o/n/blob/main/notebooks/00_x.ipynb"
        ),
        new.new_code_cell(SETUP.format(slug="o/n"), metadata={"tags": ["remove-cell"]}),
        new.new_code_cell("seed = 0", metadata={"tags": ["parameters"]}),
        new.new_code_cell(
            "fig",
            metadata={
                "mystnb": {
                    "image": {"alt": "a line that rises, then stays level"},
                    "figure": {"caption": "c", "name": "f"},
                }
            },
        ),
    ]
    cells[3].metadata.mystnb.image.alt += " from the middle of the axis on"
    return new.new_notebook(
        cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    )


def change(position, **fields):
    def apply(nb):
        nb.cells[position].update(fields)

    return apply


BAD = [
    (has_no_outputs, change(2, execution_count=1)),
    (runs_with_the_plain_kernel, lambda nb: nb.metadata.kernelspec.update(name="conda-env")),
    (runs_with_the_plain_kernel, lambda nb: nb.metadata.update(papermill={})),
    (opens_with_title_and_badge, change(0, source="T\n\ngithub/o/n/blob/main/notebooks/00_x.ipynb")),
    (opens_with_title_and_badge, change(0, source="# T\n\ngithub/o/n/blob/main/notebooks/01_y.ipynb")),
    (sets_up_in_the_one_way, change(1, source="!pip install gradclip torch")),
    (sets_up_in_the_one_way, lambda nb: nb.cells[1].metadata.pop("tags")),
    (has_one_cell_of_parameters, lambda nb: nb.cells[2].metadata.pop("tags")),
    (has_one_cell_of_parameters, change(2, source="seed = int('0')")),
    (is_plain_markdown, lambda nb: nb.cells.append(nbformat.v4.new_markdown_cell("see {prf:ref}`thm`"))),
    (is_plain_markdown, lambda nb: nb.cells.append(nbformat.v4.new_markdown_cell(":::{note}\nx\n:::"))),
    (describes_its_figures, lambda nb: nb.cells[3].metadata.mystnb.pop("image")),
    (describes_its_figures, lambda nb: nb.cells[3].metadata.mystnb.image.update(alt="plot")),
    (describes_its_figures, lambda nb: nb.cells[3].metadata.mystnb.figure.pop("caption")),
    (describes_its_figures, lambda nb: nb.cells.append(copy.deepcopy(nb.cells[3]))),
    (
        keeps_logic_in_the_library,
        lambda nb: nb.cells.append(nbformat.v4.new_code_cell("class A:\n    x = 1")),
    ),
    (
        keeps_logic_in_the_library,
        lambda nb: nb.cells.append(nbformat.v4.new_code_cell("x = 1\n" * (LONGEST_CELL + 1))),
    ),
]


def test_a_good_notebook_passes_every_rule():
    assert [complaint for rule in RULES for complaint in rule(good_notebook(), "00_x")] == []


@pytest.mark.parametrize(("rule", "break_it"), BAD)
def test_a_bad_notebook_breaks_its_rule_only(rule, break_it):
    nb = good_notebook()
    break_it(nb)
    assert list(rule(nb, "00_x"))
    assert [other.__name__ for other in RULES if other is not rule and list(other(nb, "00_x"))] == []


def test_every_rule_is_shown_a_notebook_that_breaks_it():
    assert {rule for rule, _ in BAD} == set(RULES)
