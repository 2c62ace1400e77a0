"""Fetching data sets from a server on this machine: whole, resumed, changed, gone, damaged."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from recformer.commands.download import main
from recformer.files import UserError, lock
from recformer.preparation import download as module
from recformer.preparation.download import RemoteFile, download, remote_files, unpack_movielens

CONTENT = bytes(range(256)) * 1000
PAGE = "https://example.org/page"


class Server(ThreadingHTTPServer):
    files: dict[str, bytes]
    tag: str = '"1"'
    cut_after: int | None = None
    ranges: list[str | None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        content = self.server.files.get(self.path)
        asked = self.headers["Range"]
        self.server.ranges.append(asked)
        if content is None:
            self.send_error(404)
            return
        start = 0
        if asked and self.headers["If-Range"] == self.server.tag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", self.server.tag)
        self.end_headers()
        self.wfile.write(content[start : self.server.cut_after])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.files, server.ranges = {"/a.gz": CONTENT}, []
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def url(server: Server, path: str = "/a.gz") -> str:
    return f"http://127.0.0.1:{server.server_address[1]}{path}"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_whole_file_and_once_only(server: Server, tmp_path: Path) -> None:
    file = RemoteFile(url(server), sha256(CONTENT))
    assert download(file, tmp_path, PAGE).read_bytes() == CONTENT
    assert download(file, tmp_path, PAGE) == tmp_path / "a.gz"
    assert server.ranges == [None]
    assert [path.name for path in tmp_path.iterdir()] == ["a.gz"]


def test_a_cut_off_file_goes_on(server: Server, tmp_path: Path) -> None:
    server.cut_after = 100_000
    with pytest.raises(UserError, match="go on where it stopped"):
        download(RemoteFile(url(server)), tmp_path, PAGE)
    assert not (tmp_path / "a.gz").exists()
    kept = (tmp_path / "a.gz.partial").read_bytes()
    assert 0 < len(kept) <= 100_000
    assert CONTENT.startswith(kept)
    server.cut_after = None
    assert download(RemoteFile(url(server)), tmp_path, PAGE).read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={len(kept)}-"]


def test_a_file_that_changed_meanwhile_begins_anew(server: Server, tmp_path: Path) -> None:
    server.cut_after = 100_000
    with pytest.raises(UserError):
        download(RemoteFile(url(server)), tmp_path, PAGE)
    server.cut_after, server.tag, server.files["/a.gz"] = None, '"2"', CONTENT[::-1]
    assert download(RemoteFile(url(server)), tmp_path, PAGE).read_bytes() == CONTENT[::-1]


def test_nothing_behind_what_is_there_begins_anew(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.gz.partial").write_bytes(CONTENT + b"more")
    (tmp_path / "a.gz.version.partial").write_text(server.tag)
    assert download(RemoteFile(url(server)), tmp_path, PAGE).read_bytes() == CONTENT
    assert server.ranges == [f"bytes={len(CONTENT) + 4}-", None]


def test_a_file_that_another_process_is_fetching_is_left_to_it(
    server: Server, tmp_path: Path
) -> None:
    with open(tmp_path / "a.gz.partial", "wb") as handle:
        lock(handle.fileno())
        handle.write(CONTENT[:1000])
        handle.flush()
        with pytest.raises(UserError, match=r"another process is fetching .*a\.gz\.partial"):
            download(RemoteFile(url(server)), tmp_path, PAGE)
    assert (tmp_path / "a.gz.partial").read_bytes() == CONTENT[:1000]


def test_a_wrong_checksum_is_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="SHA-256"):
        download(RemoteFile(url(server), sha256(b"other")), tmp_path, PAGE)
    assert not (tmp_path / "a.gz").exists()
    assert not (tmp_path / "a.gz.partial").exists()


def test_a_file_that_is_gone_is_to_be_fetched_by_hand(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"answered 404: look on {PAGE} .* as gone.gz"):
        download(RemoteFile(url(server, "/gone.gz")), tmp_path, PAGE)
    closed = url(server).replace(str(server.server_address[1]), "9")
    with pytest.raises(UserError, match=f"cannot be reached .*{PAGE}"):
        download(RemoteFile(closed), tmp_path, PAGE)


def test_names() -> None:
    files, page = remote_files("amazon-2014/Beauty")
    assert [file.name for file in files] == ["reviews_Beauty_5.json.gz", "meta_Beauty.json.gz"]
    assert "amazon" in page
    for wrong in ("amazon-2014", "amazon-2015/Beauty", "ml-2m"):
        with pytest.raises(UserError, match="ml-latest-small"):
            remote_files(wrong)


def test_movielens_100k_and_10m_become_the_newer_form(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "ml-100k.zip", "w") as files:
        files.writestr("ml-100k/u.data", "196\t242\t3\t881250949\n")
        files.writestr("ml-100k/u.genre", "unknown|0\nAction|1\nDrama|2\n\n")
        movie = "242|Misérables, Les (1995)|01-Jan-1995||http://imdb|0|1|1\n"
        files.writestr("ml-100k/u.item", movie.encode("latin-1"))
    with zipfile.ZipFile(tmp_path / "ml-10m.zip", "w") as files:
        files.writestr("ml-10M100K/ratings.dat", "1::122::4.5::838985046\n")
        files.writestr("ml-10M100K/movies.dat", "122::Amélie (2001)::Comedy|Romance\n")
    ratings, movies = unpack_movielens(tmp_path / "ml-100k.zip")
    assert ratings.read_text() == "userId,movieId,rating,timestamp\n196,242,3,881250949\n"
    assert movies.read_text(encoding="utf-8").splitlines() == [
        "movieId,title,genres",
        '242,"Misérables, Les (1995)",Action|Drama',
    ]
    ratings, movies = unpack_movielens(tmp_path / "ml-10m.zip")
    assert ratings.read_text().splitlines()[1] == "1,122,4.5,838985046"
    assert movies.read_text(encoding="utf-8").splitlines()[1] == "122,Amélie (2001),Comedy|Romance"


def test_movielens_end_to_end(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    archive = tmp_path / "source.zip"
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr("ml-1m/ratings.dat", "1::2::5::978300760\n")
        files.writestr("ml-1m/movies.dat", "2::Misérables, Les (1995)::Drama\n".encode("latin-1"))
    server.files["/ml-1m.zip"] = archive.read_bytes()
    monkeypatch.setattr(module, "_GROUPLENS", url(server, ""))
    monkeypatch.setitem(module.MOVIELENS, "ml-1m", sha256(archive.read_bytes()))
    main(["ml-1m", "--output_path", str(tmp_path / "raw")])
    ratings, movies = (tmp_path / "raw" / "ml-1m" / f"{n}.csv" for n in ("ratings", "movies"))
    assert ratings.read_text() == "userId,movieId,rating,timestamp\n1,2,5,978300760\n"
    assert movies.read_text() == 'movieId,title,genres\n2,"Misérables, Les (1995)",Drama\n'
    assert f"--file_path {ratings} --meta_file_path {movies}" in capsys.readouterr().out


def test_a_damaged_archive(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="damaged"):
        unpack_movielens(tmp_path / "x.zip")
