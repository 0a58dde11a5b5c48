"""Downloads from a local server: resumed, checked against their hash, and only when asked for."""

import hashlib
import http.server
import io
import re
import socket
import tarfile
import threading
import urllib.request

import cv2
import numpy as np
import pytest

from data_builders import build, download
from data_builders.btad import btad_dataset_builder
from data_builders.visa import visa_dataset_builder


def tar_of(content: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


DATA = tar_of({f"01/{kind}/{i}.png": picture(i) for i, kind in enumerate(
    ("train/ok", "test/ok", "test/ko"))})  # fmt: skip


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`; `stop_after` bytes into an answer it hangs up."""

    content = DATA
    stop_after: int | None = None
    continues = True
    announces = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}/btad.tar"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers["Range"]
        server.asked.append(wanted)
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and server.continues else 0
        if start and start >= len(server.content):
            self.send_error(416)
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if server.announces:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.stop_after])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def archive(server):
    return download.Archive(server.url, hashlib.sha256(DATA).hexdigest(), "none")


def names(folder) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_archive_is_fetched_checked_and_unpacked_once(server, archive, tmp_path):
    log = []
    folder = download.fetch_and_unpack(archive, tmp_path / "raw", log.append)
    assert folder == tmp_path / "raw/btad"
    assert (folder / "01/test/ko/2.png").read_bytes() == picture(2)
    assert names(tmp_path / "raw") == {"btad", "btad.tar"}
    assert any("licence none" in line for line in log)
    assert download.fetch_and_unpack(archive, tmp_path / "raw", log.append) == folder
    assert "nothing is downloaded" in log[-1]
    assert server.asked == [None]


def test_archive_put_there_by_hand_needs_no_network(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", None)
    (tmp_path / "btad.tar").write_bytes(DATA)
    assert download.fetch_and_unpack(archive, tmp_path, print).is_dir()


def test_local_files_can_be_fetched(archive, tmp_path):
    (tmp_path / "btad.tar").write_bytes(DATA)
    local = download.Archive((tmp_path / "btad.tar").as_uri(), archive.sha256, "none")
    assert download.fetch(local, tmp_path / "raw", print).read_bytes() == DATA


@pytest.mark.parametrize("continues", [True, False])
def test_interrupted_download_continues_or_starts_over(server, archive, tmp_path, continues):
    server.stop_after, server.continues = 4000, continues
    with pytest.raises(OSError, match=r"btad\.tar cannot be downloaded: .*; the same command cont"):
        download.fetch(archive, tmp_path, print)
    assert names(tmp_path) == {"btad.tar.part"}
    assert (tmp_path / "btad.tar.part").stat().st_size == 4000
    server.stop_after = None
    assert download.fetch(archive, tmp_path, print).read_bytes() == DATA
    assert names(tmp_path) == {"btad.tar"}
    assert server.asked == [None, "bytes=4000-"]


def test_download_that_was_whole_but_not_renamed_is_finished(server, archive, tmp_path):
    (tmp_path / "btad.tar.part").write_bytes(DATA)
    assert download.fetch(archive, tmp_path, print).read_bytes() == DATA
    assert server.asked == [f"bytes={len(DATA)}-"]


def test_another_file_than_expected_is_refused_before_unpacking(server, archive, tmp_path):
    server.content = tar_of({"../evil.txt": b"evil"})
    found = hashlib.sha256(server.content).hexdigest()
    message = rf"has sha256 {found}, expected {archive.sha256}: .* it has been deleted"
    with pytest.raises(ValueError, match=message):
        download.fetch_and_unpack(archive, tmp_path / "raw", print)
    assert not names(tmp_path / "raw")
    assert not (tmp_path / "evil.txt").exists()


def test_continued_download_of_a_changed_file_is_refused_by_its_hash(server, archive, tmp_path):
    (tmp_path / "btad.tar.part").write_bytes(b"an older version")
    with pytest.raises(ValueError, match=r"has sha256 .* it has been deleted: run again"):
        download.fetch(archive, tmp_path, print)
    assert download.fetch(archive, tmp_path, print).read_bytes() == DATA


def test_truncated_file_without_announced_length_is_refused(server, archive, tmp_path):
    server.stop_after, server.announces = 4000, False
    with pytest.raises(ValueError, match=r"has sha256 .* expected"):
        download.fetch(archive, tmp_path, print)
    assert not names(tmp_path)


def test_wrong_file_put_there_by_hand_is_kept_and_named(archive, tmp_path):
    (tmp_path / "btad.tar").write_bytes(DATA[:-100])
    with pytest.raises(ValueError, match=r"btad\.tar .*; delete it and run again"):
        download.fetch(archive, tmp_path, print)
    assert names(tmp_path) == {"btad.tar"}


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH\r\n", b""])
def test_answer_that_is_no_http_is_one_message(tmp_path, answer):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.tar"
        with pytest.raises(OSError, match=r"x\.tar cannot be downloaded: .*the same") as e:
            download.fetch(download.Archive(url, "0" * 64, "none"), tmp_path, print)
        assert "\n" not in str(e.value)
        thread.join()


def test_missing_file_at_the_publisher_is_one_message(server, archive, tmp_path, monkeypatch):
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.send_error(404))
    with pytest.raises(OSError, match=r"btad\.tar cannot be downloaded: HTTP Error 404"):
        download.fetch(archive, tmp_path, print)


# --- the command line


def test_command_downloads_builds_and_does_neither_again(
    server, archive, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(btad_dataset_builder.Builder, "DOWNLOAD", archive)
    command = ["btad", f"--raw_dir={tmp_path / 'raw'}", f"--data_dir={tmp_path / 'data'}"]
    assert build.main(command) == 1  # not asked to download
    assert server.asked == []
    capsys.readouterr()
    assert build.main([*command, "--download"]) == 0
    assert "btad/01: found/expected: train good 1/400" in capsys.readouterr().out
    assert build.main([*command, "--download"]) == 0
    assert "lies in" in (out := capsys.readouterr().out)
    assert "up to date" in out
    assert server.asked == [None]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["kolektor_sdd2", "--raw_dir=x"], r"cannot fetch this data set. Get .*vicos\.si"),
        (["rsdds", "--raw_dir=x"], r"cannot fetch this data set. Get .*10\.21227/qtv6-n081"),
        (["demo_parts", "--raw_dir=x"], "A program draws it: leave the flag away"),
        (["visa"], "--download needs --raw_dir, the folder to put"),
    ],
)
def test_what_cannot_be_fetched_says_why(tmp_path, capsys, args, message):
    assert build.main([*args, f"--data_dir={tmp_path}", "--download"]) == 1
    err = capsys.readouterr().err
    assert re.search(message, err)
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_published_archives_are_those_of_the_publishers():
    visa, btad = visa_dataset_builder.Builder.DOWNLOAD, btad_dataset_builder.Builder.DOWNLOAD
    assert visa.filename == "VisA_20220922.tar"
    assert visa.sha256.startswith("2eb8690c803ab37d")
    assert btad.filename == "btad.zip"
    assert btad.sha256.startswith("461c9387e515bfed")
    assert "NC" in btad.licence
    assert all(len(a.sha256) == 64 and a.url.startswith("https://") for a in (visa, btad))
