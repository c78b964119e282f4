import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradclip import records
from gradclip.records import Record, RecordError

FLOATS = [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.nan, math.inf, -math.inf, 1 / 3]


def make(**changes) -> Record:
    fields = {
        "experiment": "language-model",
        "profile": "cpu",
        "config": {
            "lr": 30.0,
            "seeds": [0, 1],
            "corpus": "manual",
            "nested": {"limit": math.inf, "none": None},
        },
        "scalars": {
            "a.float": 1 / 3,
            "a.nan": math.nan,
            "a.inf": -math.inf,
            "n": 3,
            "ok": True,
            "no": None,
            "s": "x",
        },
        "series": {
            "loss": FLOATS,
            "iteration": range(len(FLOATS)),
            "clipped": [i % 2 == 0 for i in range(len(FLOATS))],
            "word": ["a", "", 'b,"c"', "#", "True", "é", "nan", " "],
        },
        "provenance": {"device": "cpu", "source_sha256": records.source_hash(), "wall_time_s": 1.5},
    }
    return Record(**{**fields, **changes})


def same(a, b) -> bool:
    """Equality that tells -0.0 from 0.0, takes NaN as equal to NaN, and compares types."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def test_round_trip_is_exact(tmp_path):
    record = make()
    folder = records.save(record, tmp_path)
    assert folder == tmp_path / "language-model" / "cpu-cpu"
    assert sorted(path.name for path in folder.iterdir()) == ["record.json", "series.csv"]
    for path in (folder, folder / "record.json", str(folder)):
        loaded = records.load(path)
        assert (loaded.experiment, loaded.profile) == ("language-model", "cpu")
        assert same(loaded.config, record.config)
        assert same(loaded.scalars, record.scalars)
        assert loaded.series.keys() == record.series.keys()
        for name, column in record.series.items():
            assert loaded.series[name].dtype.kind == column.dtype.kind
            assert same(loaded.series[name].tolist(), column.tolist()), name
        series_sha256 = hashlib.sha256((folder / "series.csv").read_bytes()).hexdigest()
        assert loaded.provenance == {**record.provenance, "series_sha256": series_sha256}


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    values=st.lists(st.floats(width=64), min_size=1, max_size=20),
    whole=st.integers(min_value=-(2**63), max_value=2**63 - 1),
)
def test_every_float_and_integer_round_trips(tmp_path_factory, values, whole):
    record = make(
        scalars={str(i): value for i, value in enumerate(values)} | {"whole": whole},
        series={"x": values, "n": [whole] * len(values)},
    )
    loaded = records.load(records.save(record, tmp_path_factory.mktemp("record")))
    assert same(loaded.scalars, record.scalars)
    assert same(loaded.series["x"].tolist(), list(values))
    assert loaded.series["n"].tolist() == [whole] * len(values)


def test_columns_of_other_types_are_widened_and_an_empty_series_is_kept(tmp_path):
    record = make(series={"x": torch.tensor([0.1]), "n": np.array([7], dtype=np.uint8)})
    assert record.series["x"].tolist() == [float(np.float32(0.1))]
    assert [column.dtype for column in record.series.values()] == [np.float64, np.int64]
    empty = make(series={"x": np.array([]), "n": np.array([], dtype=int)})
    loaded = records.load(records.save(empty, tmp_path))
    assert [(column.dtype, len(column)) for column in loaded.series.values()] == [
        (np.float64, 0),
        (np.int64, 0),
    ]


def test_saving_again_replaces_and_is_byte_for_byte_stable(tmp_path):
    folder = records.save(make(), tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    records.save(make(), tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    records.save(make(scalars={"only": 1}), tmp_path)
    assert records.load(folder).scalars == {"only": 1}


def edit_json(folder: Path, **changes) -> None:
    content = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize("part", ["experiment", "profile", "config", "scalars", "columns", "provenance"])
def test_an_edited_record_is_refused_with_both_hashes(tmp_path, part):
    folder = records.save(make(), tmp_path)
    claimed = json.loads((folder / "record.json").read_text())["sha256"]
    old = json.loads((folder / "record.json").read_text())[part]
    edit_json(folder, **{part: {**old, "loss": "0"} if isinstance(old, dict) else "other"})
    with pytest.raises(RecordError, match=claimed) as error:
        records.load(folder)
    assert str(folder / "record.json") in str(error.value)
    assert len({word for word in str(error.value).split() if len(word.strip(",")) == 64}) == 2


def test_an_edited_series_is_refused_with_both_hashes(tmp_path):
    folder = records.save(make(), tmp_path)
    path = folder / "series.csv"
    old = path.read_bytes()
    path.write_bytes(old.replace(b"0.1", b"0.2", 1))
    hashes = [hashlib.sha256(data).hexdigest() for data in (path.read_bytes(), old)]
    with pytest.raises(RecordError) as error:
        records.load(folder)
    assert str(path) in str(error.value)
    assert all(digest in str(error.value) for digest in hashes)


def test_reformatted_json_and_windows_line_ends_are_the_same_record(tmp_path):
    # What an editor or git's autocrlf may do to a text file without changing what it says.
    folder = records.save(make(series={"x": [1.5, 2.5]}), tmp_path)
    edit_json(folder)
    (folder / "series.csv").write_bytes((folder / "series.csv").read_bytes().replace(b"\n", b"\r\n"))
    assert records.load(folder).series["x"].tolist() == [1.5, 2.5]


@pytest.mark.parametrize("name", ["record.json", "series.csv"])
def test_a_missing_file_is_named(tmp_path, name):
    folder = records.save(make(), tmp_path)
    (folder / name).unlink()
    with pytest.raises(RecordError, match="no such file") as error:
        records.load(folder)
    assert str(folder / name) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"format": 1', "not valid JSON"),
        (b"[]", "format must be 1, got 'list'"),
        (b'{"format": 2}', "format must be 1, got 2"),
        (b'{"format": 1}', "but the file says None"),
        (b'{"format": 1, "scalars": {"x": NaN}}', "NaN is not JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (
            b'{"format": 1, "sha256": "%s"}' % hashlib.sha256(b'{"format":1}').hexdigest().encode(),
            "not a whole record",
        ),
    ],
)
def test_what_is_not_a_record_is_refused(tmp_path, content, message):
    folder = records.save(make(), tmp_path)
    (folder / "record.json").write_bytes(content)
    with pytest.raises(RecordError, match=message):
        records.load(folder)


def test_what_is_not_even_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder/record.json").mkdir(parents=True)
    for path in (tmp_path / "file", tmp_path / "folder"):
        with pytest.raises(RecordError, match="cannot be read"):
            records.load(path)


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """A power cut after the rename must not find an empty file under the final name."""
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (events.append("rename"), replace(self, to)))
    records.write_atomically(tmp_path / "x", b"data")
    assert events == ["fsync", "rename"]
    assert (tmp_path / "x").read_bytes() == b"data"


def test_many_writers_never_show_half_a_file(tmp_path):
    path, stop = tmp_path / "x", threading.Event()
    texts = [bytes([letter]) * 100_000 for letter in b"abc"]
    path.write_bytes(texts[0])
    seen = []

    def read():
        while not stop.is_set():
            seen.append(path.read_bytes() in texts)

    reader = threading.Thread(target=read)
    reader.start()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda number: records.write_atomically(path, texts[number % 3]), range(60)))
    stop.set()
    reader.join()
    assert seen
    assert all(seen)
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_what_a_killed_writer_left_is_cleared_away_in_time(tmp_path):
    old, new = tmp_path / ".x.a.partial", tmp_path / ".x.b.partial"
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (0, 0))
    records.write_atomically(tmp_path / "x", b"data")
    assert sorted(file.name for file in tmp_path.iterdir()) == [".x.b.partial", "x"]


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("older", [False, True])
def test_a_killed_write_never_leaves_a_record_that_mixes_two_runs(tmp_path, monkeypatch, after, older):
    folder = tmp_path / "language-model" / "cpu-cpu"
    if older:
        records.save(make(scalars={"run": 1}, series={"x": [1.0]}), tmp_path)
    replace = Path.replace
    renamed = []

    def killed(self, target):
        if len(renamed) == after:
            raise KeyboardInterrupt
        renamed.append(target)
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            records.save(make(scalars={"run": 2}, series={"x": [2.0]}), tmp_path)
    if older and after == 0:
        assert records.load(folder).scalars == {"run": 1}
    else:
        with pytest.raises(RecordError):
            records.load(folder)
    # What was left behind is in nobody's way.
    records.save(make(scalars={"run": 3}), tmp_path)
    assert records.load(folder).scalars == {"run": 3}
    assert sorted(path.name for path in folder.iterdir()) == ["record.json", "series.csv"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experiment": "language_model"}, "experiment must be .* got 'language_model'"),
        ({"profile": "../cpu"}, "profile must be .* got '../cpu'"),
        ({"scalars": {"x": [1]}}, "scalar 'x' must be .* got <class 'list'>"),
        ({"scalars": {"x": torch.tensor(1.0)}}, "scalar 'x'"),
        ({"series": {"x": [1], "y": [1, 2]}}, r"one length, got \{'x': 1, 'y': 2\}"),
        ({"series": {"x": [[1.0]]}}, r"column 'x' must have one dimension, got shape \(1, 1\)"),
        ({"series": {"x": ["a\r\n"]}}, "column 'x' must not hold line breaks"),
        ({"series": {"x": [None]}}, "column 'x' must hold .* got dtype object"),
        ({"series": {"x": [2**63]}}, "column 'x' cannot hold 9223372036854775808 unchanged"),
        ({"series": {"x": [1, "b", 2.5]}}, "column 'x' cannot hold 1 unchanged, it would become '1'"),
        ({"series": {"x": [True, 2]}}, "column 'x' cannot hold True unchanged, it would become 1"),
        ({"series": {"x": [2**60 + 1, 0.5]}}, "column 'x' cannot hold 1152921504606846977 unchanged"),
        ({"series": {"x": ["a\0"]}}, "column 'x' cannot hold 'a.x00' unchanged"),
        ({"series": {"x\r\n": [1]}}, "name must be a string without line breaks, got 'x.r.n'"),
    ],
)
def test_a_record_is_checked_when_made(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"provenance": {}}, "must be a slug such as 'cpu', got None"),
        ({"provenance": {"device": "a/b"}}, "got 'a/b'"),
        ({"scalars": {"x": "nan"}}, "record.scalars.x is the string 'nan'"),
        ({"config": {"x": [{"y": "inf"}]}}, r"record.config.x\[0\].y is the string 'inf'"),
        ({"config": {"x": {1: 2}}}, "record.config.x has the key 1"),
        ({"config": {"x": Path()}}, "record.config.x has type PosixPath|WindowsPath"),
    ],
)
def test_what_would_not_read_back_unchanged_is_not_saved(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        records.save(make(**changes), tmp_path)
    assert list(tmp_path.rglob("*.json")) == []


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for the library's folder, with sources of its own."""
    root = tmp_path / "repository" / "package"
    (root / "sub").mkdir(parents=True)
    for name in ("records.py", "sub/b.py", "sub/a.py"):
        (root / name).write_text(f"# {name}\n")
    (root / "data.txt").write_text("not source")
    monkeypatch.setattr(records, "_PACKAGE", root)
    return root


def test_source_hash_is_the_documented_one(package):
    # Written out by hand: names in sorted order, each followed by the length and the text.
    parts = [("records.py", "# records.py\n"), ("sub/a.py", "# sub/a.py\n"), ("sub/b.py", "# sub/b.py\n")]
    stream = "".join(f"{name}\n{len(source)}\n{source}" for name, source in parts)
    assert records.source_hash() == hashlib.sha256(stream.encode()).hexdigest()


def test_source_hash_changes_with_source_and_names_only(package):
    original = records.source_hash()
    (package / "records.py").write_bytes(b"# records.py\r\n")
    (package / "data.txt").write_text("still not source")
    assert records.source_hash() == original
    seen = {original}
    (package / "records.py").write_text("# records.py \n")
    seen.add(records.source_hash())
    (package / "sub" / "b.py").rename(package / "sub" / "c.py")
    seen.add(records.source_hash())
    (package / "sub" / "empty.py").touch()
    seen.add(records.source_hash())
    assert len(seen) == 4


def test_a_record_is_current_until_the_source_changes(package):
    record = make()
    assert records.is_current(record)
    (package / "sub" / "a.py").write_text("changed = True\n")
    assert not records.is_current(record)
    assert not records.is_current(dataclasses.replace(record, provenance={"device": "cpu"}))


def git(folder: Path, *arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    identity = [
        "-c",
        "user.name=Someone",
        "-c",
        "user.email=someone@example.org",
        "-c",
        "commit.gpgsign=false",
    ]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return done.stdout.strip()


def test_provenance_says_which_commit_and_whether_it_was_clean(package, monkeypatch):
    repository = package.parent
    assert records.provenance("cpu", data_sha256=None, wall_time=0.0)["git_commit"] is None
    git(repository, "init", "--quiet")
    # A hook exports these; they must not lead to another repository.
    monkeypatch.setenv("GIT_DIR", str(repository / "nowhere"))
    untracked = records.provenance("cpu", data_sha256=None, wall_time=0.0)
    assert (untracked["git_commit"], untracked["git_clean"]) == (None, None)
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "-m", "first")
    (repository / "new-result.csv").touch()
    clean = records.provenance("cpu", data_sha256=None, wall_time=0.0)
    assert (clean["git_commit"], clean["git_clean"]) == (git(repository, "rev-parse", "HEAD"), True)
    (package / "sub" / "a.py").write_text("changed = True\n")
    assert records.provenance("cpu", data_sha256=None, wall_time=0.0)["git_clean"] is False


def test_provenance_names_versions_device_and_time():
    found = records.provenance("cpu", data_sha256="abc", wall_time=2.5)
    assert (found["torch"], found["numpy"], found["cuda"]) == (
        torch.__version__,
        np.__version__,
        torch.version.cuda,
    )
    assert found["numba"] == importlib.metadata.version("numba")
    assert found["python"].count(".") == 2
    assert found["device"] == "cpu"
    assert found["device_name"]
    assert (found["data_sha256"], found["wall_time_s"]) == ("abc", 2.5)
    assert found["source_sha256"] == records.source_hash()
    assert found["finished"].endswith("+00:00")


@pytest.mark.usefixtures("without_kernels")
def test_provenance_without_numba():
    assert records.provenance("cpu", data_sha256=None, wall_time=0.0)["numba"] is None


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-sxm4"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"),
    ],
)
def test_a_gpu_is_named_by_its_model(monkeypatch, name, slug):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert records.device_slug("cuda") == slug


def test_all_records_of_an_experiment_are_found(tmp_path):
    assert records.found(tmp_path, "language-model") == {}
    records.save(make(), tmp_path)
    records.save(make(profile="short"), tmp_path)
    records.save(make(experiment="other"), tmp_path)
    found = records.found(tmp_path, "language-model")
    assert list(found) == ["cpu-cpu", "short-cpu"]
    assert found["short-cpu"].profile == "short"
    (tmp_path / "language-model/short-cpu/series.csv").write_text("loss\n1.0\n")
    with pytest.raises(RecordError):
        records.found(tmp_path, "language-model")
