"""workflow/execute.py: parameters are checked first, failures are told, only whole copies get the name."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

SCRIPT = Path(__file__).parents[1] / "workflow/execute.py"


@pytest.fixture
def project(tmp_path):
    (tmp_path / "notebooks").mkdir()

    def write(*sources, parameters="n = 1"):
        cells = [nbformat.v4.new_markdown_cell("# T"), nbformat.v4.new_code_cell(parameters)]
        cells[1].metadata["tags"] = ["parameters"]
        cells += [nbformat.v4.new_code_cell(source) for source in sources]
        metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        path = tmp_path / "notebooks/00_x.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
        return path

    return tmp_path, write


def command(root, *arguments):
    return [sys.executable, str(SCRIPT), "notebooks/00_x.ipynb", "_build/notebooks/00_x.ipynb", *arguments]


def execute(root, *arguments):
    return subprocess.run(command(root, *arguments), cwd=root, capture_output=True, text=True, timeout=120)


def test_a_good_run_leaves_a_clean_copy_and_the_source_untouched(project):
    root, write = project
    path = write("import os\nprint(n, os.path.basename(os.getcwd()))")
    before = path.read_bytes()
    done = execute(root, "-p", "n=7")
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == before
    executed = (root / "_build/notebooks/00_x.ipynb").read_text()
    nb = nbformat.reads(executed, as_version=4)
    assert nb.cells[-1].outputs[0].text == "7 notebooks\n"
    assert "papermill" not in nb.metadata
    assert "start_time" not in executed
    assert nb.cells[2].metadata.tags == ["injected-parameters", "remove-cell"]
    assert not list((root / "_build/running").iterdir())
    assert "00_x: cell" in done.stderr


def test_two_runs_give_the_same_bytes(project):
    root, write = project
    write("print(n)")
    executed = []
    for _ in range(2):
        assert execute(root, "-p", "n=2").returncode == 0
        executed.append((root / "_build/notebooks/00_x.ipynb").read_bytes())
    assert executed[0] == executed[1]


@pytest.mark.parametrize(
    ("argument", "message"), [("m=1", "unknown parameter m"), ("n", "NAME=VALUE, got 'n'")]
)
def test_a_wrong_parameter_is_an_error_before_anything_runs(project, argument, message):
    root, write = project
    write("open('ran', 'w').close()")
    done = execute(root, "-p", argument)
    assert done.returncode != 0
    assert message in done.stderr
    assert not (root / "notebooks/ran").exists()
    assert not (root / "_build").exists()


def test_a_failure_names_notebook_cell_and_error_last_and_keeps_the_traceback(project):
    root, write = project
    write("x = 1", "raise ValueError('no such threshold')", "print('not reached')")
    done = execute(root, "-p", "n=2")
    assert done.returncode == 1
    # The fourth cell of the committed notebook: papermill's own cell is not counted.
    last = "notebooks/00_x.ipynb, cell 4 of 5: ValueError: no such threshold"
    assert done.stderr.strip().splitlines()[-1] == last
    assert (root / "_build/failed/00_x.txt").read_text().strip().splitlines()[-1] == last
    assert not (root / "_build/notebooks/00_x.ipynb").exists()
    kept = json.loads((root / "_build/failed/00_x.ipynb").read_text())
    assert any(
        output["output_type"] == "error" for cell in kept["cells"] for output in cell.get("outputs", ())
    )
    write("x = 1")
    assert execute(root).returncode == 0
    assert not list((root / "_build/failed").iterdir())


def test_a_dead_kernel_is_told_like_any_other_failure(project):
    root, write = project
    write("x = 1", "import os\nos._exit(1)")
    done = execute(root)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == "notebooks/00_x.ipynb, cell 4 of 4: DeadKernelError: Kernel died"
    assert (root / "_build/failed/00_x.txt").read_text().strip().splitlines()[-1] == last
    assert (root / "_build/failed/00_x.ipynb").is_file()


def test_an_error_of_many_lines_keeps_the_notebook_on_the_last_one(project):
    root, write = project
    write("raise ValueError('first\\nsecond')")
    last = execute(root).stderr.strip().splitlines()[-1]
    assert last == "notebooks/00_x.ipynb, cell 3 of 3: ValueError: first second"


def test_a_killed_run_leaves_nothing_under_the_final_name(project):
    root, write = project
    write("open('started', 'w').close()", "import time\ntime.sleep(600)")
    process = subprocess.Popen(command(root), cwd=root, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (root / "notebooks/started").exists():
        assert time.monotonic() < deadline, "the notebook did not start"
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (root / "_build/notebooks/00_x.ipynb").exists()
