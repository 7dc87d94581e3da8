"""Shards are downloaded from a local server that truncates, fails and changes files."""

import http.server
import io
import os
import re
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mae_bench.data.checks.layouts import check_layout
from mae_bench.data.sets import fetch as fetching
from mae_bench.data.sets.fetch import fetch, fetch_all, partial_path
from mae_bench.data.sets.open import open_images
from mae_bench.errors import UserError


def tar_of(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """A server.

    files: path -> content.
    cuts: path -> bytes after which each transfer ends.
    log: (path, Range) of every request.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cuts: dict[str, int] = {}
        self.failures: dict[str, list[int]] = {}
        self.tag = "1"
        self.ranges = True
        self.log: list[tuple[str, str | None]] = []

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.log.append((self.path, asked))
        if failures := self.server.failures.get(self.path):
            self.send_error(failures.pop(0))
            return
        if self.path not in self.server.files:
            self.send_error(404)
            return
        content, first = self.server.files[self.path], 0
        if self.server.ranges and asked and self.headers.get("If-Range") == self.server.tag:
            found = re.fullmatch(r"bytes=(\d+)-", asked)
            assert found
            first = int(found[1])
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(content) - first))
        self.send_header("ETag", self.server.tag)
        self.end_headers()
        self.wfile.write(content[first : first + self.server.cuts.get(self.path, len(content))])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(fetching, "WAIT_SECONDS", 0.0)
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_shards_by_url_are_brought_once(server: Server, picture: Callable[..., bytes]) -> None:
    for split, count in (("train", 3), ("val", 1)):
        for number in range(count):
            members = {
                f"{i}.{kind}": content
                for i in range(2)
                for kind, content in (("jpg", picture(i)), ("cls", b"%d" % i))
            }
            server.files[f"/set/{split}-{number:03}.tar"] = tar_of(members)
    url = server.url("/set/train-{000..002}.tar")
    images = open_images(url, "train")
    assert [images.read(i) for i in range(6)] == 3 * [picture(0), picture(1)]
    assert images.name(2) == "train-001.tar/0.jpg"
    assert len(server.log) == 3
    assert len(open_images(Path(url), "train")) == 6, "a path has lost a slash of the URL"
    report = check_layout("imagenet", f"train={url},val={server.url('/set/val-{000..000}.tar')}")
    assert report.splits == {"train": 6, "val": 2}
    assert len(server.log) == 4, "no shard twice"


def test_a_wrong_body_does_not_stay_in_the_cache(
    server: Server, cache: Path, picture: Callable[..., bytes]
) -> None:
    server.files["/train-000.tar"] = b"<!doctype html><title>Log in</title>"
    with pytest.raises(UserError, match=r"train-000.tar does not hold the expected file.*cannot be read as"):
        open_images(server.url("/train-000.tar"), "train")
    assert not list(cache.rglob("train-000.tar*[!k]"))
    server.files["/train-000.tar"] = tar_of({"0.jpg": picture(0), "0.cls": b"0"})
    assert len(open_images(server.url("/train-000.tar"), "train")) == 1


def test_a_transfer_that_is_cut_goes_on_where_it_stopped(server: Server) -> None:
    content = os.urandom(10_000)
    server.files["/a.tar"], server.cuts["/a.tar"] = content, 4000
    assert fetch(server.url("/a.tar")).read_bytes() == content
    assert [asked for _, asked in server.log] == [None, "bytes=4000-", "bytes=8000-"]


def test_a_file_that_changed_on_the_way_starts_anew(server: Server, cache: Path) -> None:
    server.files["/a.tar"], server.cuts["/a.tar"] = b"a" * 1000, 0
    with pytest.raises(UserError, match=r"/a.tar could not be downloaded: it ended after 0 of 1000 bytes"):
        fetch(server.url("/a.tar"))
    assert not list(cache.rglob("a.tar"))
    (part,) = cache.rglob("a.tar.part")
    part.write_bytes(b"a" * 400)
    server.files["/a.tar"], server.tag = b"b" * 1000, "2"
    del server.cuts["/a.tar"]
    assert fetch(server.url("/a.tar")).read_bytes() == b"b" * 1000
    assert server.log[-1] == ("/a.tar", "bytes=400-")


def test_a_server_without_ranges_is_asked_again(server: Server, cache: Path) -> None:
    server.files["/a.tar"], server.ranges = b"x" * 5000, False
    path = cache / "fetched"
    server.failures["/a.tar"] = [503]
    assert fetch(server.url("/a.tar")).read_bytes() == b"x" * 5000
    assert path.is_dir()
    assert not list(path.rglob("*.part"))


def test_what_is_not_there_is_named_at_once(server: Server, cache: Path) -> None:
    server.files["/a-0.tar"] = b"x"
    with pytest.raises(UserError, match=r"/a-1.tar: the server responds 404"):
        fetch_all([server.url("/a-0.tar"), server.url("/a-1.tar")])
    assert [path for path, _ in server.log].count("/a-1.tar") == 1
    assert not list(cache.rglob("a-1.tar"))


def test_one_that_fails_stops_the_others(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "BLOCK", 100)
    server.files["/endless.tar"] = b"x" * 100_000_000
    with pytest.raises(UserError, match="404"):
        fetch_all([server.url("/endless.tar"), server.url("/none.tar")])
    assert not list(cache.rglob("endless.tar"))


def test_a_server_that_stumbles_is_asked_again_but_not_for_ever(server: Server) -> None:
    server.files["/a.tar"] = b"x" * 10
    server.failures["/a.tar"] = [503, 500]
    assert fetch(server.url("/a.tar")).stat().st_size == 10
    server.failures["/b.tar"] = [503] * 100
    with pytest.raises(UserError, match=r"/b.tar could not be downloaded: the server responds 503"):
        fetch(server.url("/b.tar"))
    assert len(server.log) == 3 + fetching.TRIES


def test_a_server_that_is_silent_or_gone(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "TRIES", 1)
    monkeypatch.setattr(fetching, "TIMEOUT_SECONDS", 0.2)
    silent = threading.Event()
    monkeypatch.setattr(Handler, "do_GET", lambda self: silent.wait(20))
    with pytest.raises(UserError, match="timed out"):
        fetch(server.url("/a.tar"))
    silent.set()
    with pytest.raises(UserError, match="could not be downloaded"):
        fetch("http://127.0.0.1:9/a.tar")


@pytest.mark.parametrize("path", ["/..%2f..%2fa.tar", "/x/%2e%2e"])
def test_no_url_leads_out_of_the_cache(server: Server, path: str) -> None:
    server.files[path] = b"content"
    found = fetch(server.url(path))
    assert found.read_bytes() == b"content"
    assert found.resolve().parent.parent == (fetching.cache_folder() / "fetched").resolve()


def test_a_cache_that_cannot_be_written_is_named(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MAE_BENCH_CACHE", str(tmp_path / "file" / "x"))
    with pytest.raises(UserError, match="MAE_BENCH_CACHE"):
        fetch(server.url("/a.tar"))


def test_two_at_once_bring_one_file(server: Server) -> None:
    server.files["/a.tar"] = os.urandom(200_000)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(server.url("/a.tar")))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert found[0].read_bytes() == server.files["/a.tar"]
    assert len(server.log) == 1
    assert not partial_path(found[0]).exists()
