"""`data.fetch` against a server on this machine that breaks off and lies; no other network is used."""

import functools
import hashlib
import io
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pooch
import pytest
from typer.testing import CliRunner

from gradclip.__main__ import app
from gradclip.data import DataError, fetch, images, text


def sha256(content):
    return hashlib.sha256(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves ``server.files``; writes each request to ``server.requests``."""

    def do_GET(self):
        server = self.server
        name = self.path.rpartition("/")[2]
        wanted = self.headers.get("Range")
        server.requests.append((name, wanted))
        server.encodings.add(self.headers.get("Accept-Encoding"))
        if name not in server.files:
            self.send_error(404)
            return
        content, start = server.files[name], 0
        if wanted and server.ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = len(content) if server.breaks_at is None else min(server.breaks_at, len(content))
        self.wfile.write(content[start:end])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.requests, server.encodings = {}, [], set()
        server.ranges, server.breaks_at = True, None
        thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def address(server, name=""):
    return f"http://127.0.0.1:{server.server_port}/data/{name}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADCLIP_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


PTB = {
    "ptb.train.txt": b" the <unk> sat \n" * 20_000,
    "ptb.valid.txt": b" the sat \n" * 20,
    "ptb.test.txt": b" sat the \n" * 30,
}


@pytest.fixture
def ptb(server, folder, monkeypatch):
    """A server with three small files, whose hashes are the recorded ones."""
    server.files = dict(PTB)
    monkeypatch.setattr(fetch, "PTB_URL", address(server))
    monkeypatch.setattr(text, "PTB_SHA256", {name: sha256(content) for name, content in PTB.items()})
    return server, folder / "ptb"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_files_arrive_and_are_not_downloaded_again(ptb):
    server, folder = ptb
    assert fetch.fetch("ptb") == folder
    assert contents(folder) == PTB  # and nothing else: no temporary file is left
    assert text.penn_treebank().vocabulary == ("the", "<unk>", "sat", "<eos>")
    assert server.requests == [(name, None) for name in PTB]
    # A compressed answer could not be continued, so none is asked for.
    assert server.encodings == {"identity"}
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    fetch.fetch("ptb")
    assert len(server.requests) == 3
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_only_what_is_missing_or_wrong_is_downloaded(ptb):
    server, folder = ptb
    fetch.fetch("ptb")
    (folder / "ptb.valid.txt").write_bytes(PTB["ptb.valid.txt"][:-1])
    (folder / "ptb.test.txt").unlink()
    server.requests.clear()
    fetch.fetch("ptb")
    assert server.requests == [("ptb.valid.txt", None), ("ptb.test.txt", None)]
    assert contents(folder) == PTB


def test_another_folder_can_be_named(ptb, tmp_path):
    assert fetch.fetch("ptb", tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert contents(tmp_path / "a" / "b") == PTB
    assert not ptb[1].exists()


def test_without_the_variable_the_files_go_to_the_cache(ptb, monkeypatch, tmp_path):
    monkeypatch.delenv("GRADCLIP_DATA_DIR")
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    assert fetch.fetch("ptb") == tmp_path / "cache" / "gradclip" / "ptb"
    assert text.penn_treebank().name == "penn-treebank"


def test_a_wrong_file_is_not_kept_and_both_hashes_are_named(ptb):
    server, folder = ptb
    name, good = "ptb.train.txt", PTB["ptb.train.txt"]
    server.files[name] = bad = good.replace(b"sat", b"cat", 1)
    with pytest.raises(DataError) as error:
        fetch.fetch("ptb")
    message = str(error.value)
    assert all(
        part in message for part in (str(folder / name), address(server, name), sha256(good), sha256(bad))
    )
    assert contents(folder) == {}


def test_a_wrong_download_does_not_replace_the_file_that_is_there(ptb):
    server, folder = ptb
    folder.mkdir(parents=True)
    (folder / "ptb.train.txt").write_bytes(b"an old edition")
    server.files["ptb.train.txt"] = b"nonsense"
    with pytest.raises(DataError, match=sha256(b"nonsense")):
        fetch.fetch("ptb")
    assert contents(folder) == {"ptb.train.txt": b"an old edition"}


def break_off(ptb):
    """Two whole pieces arrive and a part of the third, which is lost; returns the temporary file."""
    server, folder = ptb
    server.breaks_at = 2 * fetch._PIECE + 1000
    with pytest.raises(DataError) as error:
        fetch.fetch("ptb")
    message = str(error.value)
    assert address(server, "ptb.train.txt") in message
    partial = folder / ".ptb.train.txt.partial"
    # Only the temporary name exists, and it holds what was sent.
    assert contents(folder) == {partial.name: PTB["ptb.train.txt"][:131_072]}
    assert f"131072 bytes are kept in {partial}" in message
    server.breaks_at = None
    server.requests.clear()
    return partial


def test_a_broken_transfer_goes_on_where_it_was(ptb):
    server, folder = ptb
    break_off(ptb)
    fetch.fetch("ptb")
    assert server.requests[0] == ("ptb.train.txt", "bytes=131072-")
    assert contents(folder) == PTB


def test_a_transfer_that_breaks_twice_goes_on_twice(ptb):
    server, folder = ptb
    break_off(ptb)
    server.breaks_at = 3 * fetch._PIECE
    with pytest.raises(DataError, match="196608 bytes are kept"):
        fetch.fetch("ptb")
    server.breaks_at = None
    fetch.fetch("ptb")
    assert [wanted for name, wanted in server.requests if name == "ptb.train.txt"] == [
        "bytes=131072-",
        "bytes=196608-",
    ]
    assert contents(folder) == PTB


def test_a_server_that_cannot_continue_sends_all_of_it_again(ptb):
    server, folder = ptb
    break_off(ptb)
    server.ranges = False
    fetch.fetch("ptb")
    assert server.requests[0] == ("ptb.train.txt", "bytes=131072-")
    assert contents(folder) == PTB


@pytest.mark.parametrize("extra", [b"", b"more"])
def test_a_temporary_file_as_long_as_the_file_or_longer_is_begun_again(ptb, extra):
    server, folder = ptb
    folder.mkdir(parents=True)
    (folder / ".ptb.train.txt.partial").write_bytes(PTB["ptb.train.txt"] + extra)
    fetch.fetch("ptb")
    assert [wanted for _, wanted in server.requests[:2]] == [f"bytes={320_000 + len(extra)}-", None]
    assert contents(folder) == PTB


def test_a_damaged_temporary_file_is_found_out_and_the_next_call_begins_again(ptb):
    folder = ptb[1]
    partial = break_off(ptb)
    partial.write_bytes(b"x" * 131_072)
    with pytest.raises(DataError, match="expected"):
        fetch.fetch("ptb")
    assert contents(folder) == {}
    fetch.fetch("ptb")
    assert contents(folder) == PTB


def test_a_file_that_the_server_lacks_is_named(ptb):
    server, folder = ptb
    del server.files["ptb.valid.txt"]
    with pytest.raises(DataError, match="404") as error:
        fetch.fetch("ptb")
    assert address(server, "ptb.valid.txt") in str(error.value)
    assert contents(folder) == {"ptb.train.txt": PTB["ptb.train.txt"]}


def test_a_server_that_is_not_there_is_named(ptb, monkeypatch):
    # Port 1 has no server here: the connection is refused at once.
    monkeypatch.setattr(fetch, "PTB_URL", "http://127.0.0.1:1/")
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:1/ptb\.train\.txt"):
        fetch.fetch("ptb")
    assert contents(ptb[1]) == {}


def test_a_folder_that_cannot_be_made_is_named(ptb):
    folder = ptb[1]
    folder.parent.write_text("a file where the folder should be")
    with pytest.raises(DataError, match="cannot write to") as error:
        fetch.fetch("ptb")
    assert str(folder) in str(error.value)


def test_an_unknown_name_is_refused(folder):
    with pytest.raises(ValueError, match="name must be one of ptb, cifar10, got 'imagenet'"):
        fetch.fetch("imagenet")
    assert not folder.exists()


MEMBERS = {name: name.encode() * 1000 for name in images.CIFAR10_SHA256}
INSIDE = "cifar-10-batches-bin/"


def archive(members, *others):
    """A tar.gz with these files, and with the other entries that come after them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        for entry in others:
            tar.addfile(entry)
    return buffer.getvalue()


def inside(members):
    return {INSIDE + name: content for name, content in members.items()}


def special(name, kind, target):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


NAME = "cifar-10-binary.tar.gz"


@pytest.fixture
def serve(server, folder, monkeypatch):
    """Makes the server offer an archive, whose hash becomes the recorded one."""
    monkeypatch.setattr(fetch, "CIFAR10_URL", address(server, NAME))
    monkeypatch.setattr(
        images, "CIFAR10_SHA256", {name: sha256(content) for name, content in MEMBERS.items()}
    )

    def serve(content):
        server.files[NAME] = content
        monkeypatch.setattr(fetch, "CIFAR10_ARCHIVE_SHA256", sha256(content))
        return server, folder / "cifar10"

    return serve


def test_the_archive_is_unpacked_and_removed(serve):
    extra = {INSIDE + "batches.meta.txt": b"airplane\n", INSIDE + "readme.html": b"<p>"}
    server, folder = serve(archive(inside(MEMBERS) | extra))
    assert fetch.fetch("cifar10") == folder
    assert contents(folder) == MEMBERS
    fetch.fetch("cifar10")
    assert server.requests == [(NAME, None)]


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_damaged_image_file_is_fetched_again(serve, damage):
    server, folder = serve(archive(inside(MEMBERS)))
    fetch.fetch("cifar10")
    path = folder / "data_batch_3.bin"
    path.unlink() if damage == "missing" else path.write_bytes(b"damaged")
    fetch.fetch("cifar10")
    assert contents(folder) == MEMBERS
    assert server.requests == [(NAME, None)] * 2


def test_an_archive_that_lies_there_is_used_and_kept(serve):
    content = archive(inside(MEMBERS))
    server, folder = serve(content)
    folder.mkdir(parents=True)
    (folder / NAME).write_bytes(content)
    fetch.fetch("cifar10")
    assert contents(folder) == MEMBERS | {NAME: content}
    assert server.requests == []


def test_the_transfer_of_the_archive_goes_on_too(serve, monkeypatch):
    monkeypatch.setattr(fetch, "_PIECE", 10)
    server, folder = serve(archive(inside(MEMBERS)))
    server.breaks_at = 100
    with pytest.raises(DataError, match="100 bytes are kept"):
        fetch.fetch("cifar10")
    assert set(contents(folder)) == {f".{NAME}.partial"}
    server.breaks_at = None
    fetch.fetch("cifar10")
    assert server.requests == [(NAME, None), (NAME, "bytes=100-")]
    assert contents(folder) == MEMBERS


def test_no_member_leaves_the_folder(serve, tmp_path):
    outside = tmp_path / "outside"
    hostile = {
        "../escaped": b"x",
        f"{INSIDE}../../escaped": b"x",
        str(outside): b"x",
        f"{INSIDE}sub/data_batch_1.bin": b"x",
        "data_batch_1.bin": b"x",
        f"/{INSIDE}data_batch_1.bin": b"x",
        f"{INSIDE}.hidden": b"x",
    }
    links = [
        special(f"{INSIDE}link", tarfile.SYMTYPE, ".."),
        special(f"{INSIDE}link/data_batch_1.bin", tarfile.SYMTYPE, "/"),
    ]
    _, folder = serve(archive(hostile | inside(MEMBERS), *links))
    fetch.fetch("cifar10")
    assert contents(folder) == MEMBERS
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["data", "cifar10", *MEMBERS])


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
def test_a_member_that_is_no_plain_file_is_refused(serve, tmp_path, kind):
    secret = tmp_path / "secret"
    secret.write_bytes(MEMBERS["test_batch.bin"])
    members = {name: content for name, content in MEMBERS.items() if name != "test_batch.bin"}
    _, folder = serve(archive(inside(members), special(f"{INSIDE}test_batch.bin", kind, str(secret))))
    with pytest.raises(DataError, match=r"test_batch\.bin is not a plain file") as error:
        fetch.fetch("cifar10")
    assert str(folder / NAME) in str(error.value)
    assert not (folder / "test_batch.bin").exists()


def test_a_second_member_of_the_same_name_changes_nothing(serve):
    twice = archive(inside(MEMBERS), special(f"{INSIDE}test_batch.bin", tarfile.SYMTYPE, "/etc/hostname"))
    _, folder = serve(twice)
    fetch.fetch("cifar10")
    assert contents(folder) == MEMBERS


def test_an_archive_without_a_member_is_refused(serve):
    members = {name: content for name, content in MEMBERS.items() if "_2" not in name and "_4" not in name}
    _, folder = serve(archive(inside(members)))
    with pytest.raises(DataError, match=r"the archive has no data_batch_2\.bin, data_batch_4\.bin") as error:
        fetch.fetch("cifar10")
    assert str(folder / NAME) in str(error.value)


def test_a_member_with_another_hash_is_refused_and_not_kept(serve):
    wrong = MEMBERS | {"data_batch_5.bin": b"wrong"}
    _, folder = serve(archive(inside(wrong)))
    with pytest.raises(DataError) as error:
        fetch.fetch("cifar10")
    message = str(error.value)
    expected = sha256(MEMBERS["data_batch_5.bin"])
    assert all(part in message for part in (str(folder / "data_batch_5.bin"), sha256(b"wrong"), expected))
    assert not {"data_batch_5.bin", ".data_batch_5.bin.partial"} & set(contents(folder))


@pytest.mark.parametrize("cut", [0, 5, 200, -20])
def test_an_archive_that_cannot_be_read_is_refused(serve, cut):
    """The recorded hash would be that of a broken archive: the unpacking must still say so."""
    _, folder = serve(archive(inside(MEMBERS))[:cut])
    with pytest.raises(DataError, match="archive") as error:
        fetch.fetch("cifar10")
    assert str(folder / NAME) in str(error.value)


def test_a_wrong_archive_is_not_unpacked(serve, monkeypatch):
    _, folder = serve(archive(inside(MEMBERS)))
    monkeypatch.setattr(fetch, "CIFAR10_ARCHIVE_SHA256", "0" * 64)
    with pytest.raises(DataError, match="0" * 64):
        fetch.fetch("cifar10")
    assert contents(folder) == {}


def call(*arguments):
    return CliRunner().invoke(app, ["fetch", *arguments])


def test_the_command_fetches_and_prints_the_folders(ptb, serve):
    _, cifar10 = serve(archive(inside(MEMBERS)))
    result = call("ptb", "cifar10")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [str(ptb[1]), str(cifar10)]
    assert "ptb.train.txt: 100%" in result.stderr  # progress
    assert contents(ptb[1]) == PTB
    assert contents(cifar10) == MEMBERS


def test_the_command_names_the_choices_before_it_downloads_anything(ptb):
    result = call("ptb", "imagenet")
    assert result.exit_code == 2
    assert "no data set 'imagenet'; choose from: ptb, cifar10" in result.stderr
    assert ptb[0].requests == []
    assert call().exit_code == 2


def test_the_command_says_in_one_line_what_failed(ptb):
    ptb[0].files["ptb.test.txt"] = b"nonsense"
    result = call("ptb")
    assert result.exit_code == 1
    assert result.stdout == ""
    [line] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert str(ptb[1] / "ptb.test.txt") in line
    assert sha256(b"nonsense") in line


def test_the_library_is_importable_without_pooch_and_says_what_is_missing(ptb, monkeypatch):
    code = "import sys; sys.modules['pooch'] = None; import gradclip, gradclip.__main__, gradclip.data.fetch"
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(DataError, match="downloading needs pooch"):
        fetch.fetch("ptb")
