"""Files by URL: each is brought once into the cache, goes on where it stopped, and appears there whole or not at all."""

import fcntl
import hashlib
import http.client
import logging
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from mae_bench.data.sets.index import cache_folder
from mae_bench.errors import Interrupted, UserError
from mae_bench.files import is_full

log = logging.getLogger(__name__)

AT_A_TIME = 8
TRIES = 5  # in a row without a byte more
TIMEOUT_SECONDS = 30.0  # without a byte
WAIT_SECONDS = 1.0  # before the next try, doubled each time
BLOCK = 1 << 20  # bytes
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


class _Failed(Exception):
    """One try that another may mend."""


def fetch_all(urls: Sequence[str]) -> list[Path]:
    """The files behind the URLs, in their order; what the cache has already is not asked for again. UserError names the URL."""
    stop = threading.Event()
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        running = [pool.submit(fetch, url, stop) for url in urls]
        try:
            for each in wait(running, return_when=FIRST_EXCEPTION).done:
                each.result()
            return [each.result() for each in running]
        except (
            BaseException
        ):  # one has failed, or the user has had enough: the others end with their next block
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def fetch(url: str, stop: threading.Event | None = None) -> Path:
    """The file behind one URL; once `stop` is set it ends with Interrupted and keeps what has come."""
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    folder = cache_folder() / "fetched" / hashlib.sha256(url.encode()).hexdigest()[:16]
    path = folder / ("file" if name in ("", "..") else name)
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(path):
            if not path.is_file():
                _bring(url, path, stop or threading.Event())
    except OSError as error:
        if is_full(error):
            part_of(path).unlink(missing_ok=True)
        raise UserError(
            f"{url} cannot be kept in {path.parent}: {error}", expected="a cache folder with room for the shards",
            fix="export MAE_BENCH_CACHE=FOLDER",
        ) from error  # fmt: skip
    return path


def part_of(path: Path) -> Path:
    """What has come so far."""
    return path.with_name(f"{path.name}.part")


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the system releases it when this process ends."""
    with open(path.with_name(f"{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _bring(url: str, path: Path, stop: threading.Event) -> None:
    part, tries, reason = part_of(path), 0, ""
    while tries < TRIES:
        before = _size(part)
        try:
            _receive(url, part, stop)
        except _Failed as error:
            reason, tries = str(error), 1 if _size(part) > before else tries + 1
            log.info("%s: %s; trying again", url, reason)
            stop.wait(WAIT_SECONDS * 2 ** (tries - 1) if tries < TRIES else 0)
            continue
        os.replace(part, path)
        _tag_of(part).unlink(missing_ok=True)
        return
    raise UserError(
        f"{url} could not be fetched: {reason}",
        expected="the whole file",
        fix="try again: what has come is kept, and it goes on",
    )


def _receive(url: str, part: Path, stop: threading.Event) -> None:
    """One request for what is still lacking; returns when the file is whole."""
    have, tag = _size(part), _tag_of(part).read_text() if _tag_of(part).is_file() else ""
    headers = {"Range": f"bytes={have}-", "If-Range": tag} if have and tag else {}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS
        ) as answer:
            goes_on = answer.status == http.HTTPStatus.PARTIAL_CONTENT
            length = answer.headers.get("Content-Length")
            whole = None if length is None else int(length) + (have if goes_on else 0)
            _tag_of(part).write_text(answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "")
            with open(part, "ab" if goes_on else "wb") as file:
                _copy(answer, file, stop)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink(missing_ok=True)
        elif error.code not in TRANSIENT:
            raise UserError(
                f"{url}: the server answers {error.code} {error.reason}", expected="a file behind every URL"
            ) from error
        raise _Failed(f"the server answers {error.code} {error.reason}") from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise _Failed(str(getattr(error, "reason", error)) or type(error).__name__) from error
    if whole is not None and _size(part) != whole:
        raise _Failed(f"it ended after {_size(part)} of {whole} bytes")


def _copy(answer: http.client.HTTPResponse, file: BinaryIO, stop: threading.Event) -> None:
    try:
        while block := answer.read(BLOCK):
            file.write(block)
            if stop.is_set():
                raise Interrupted(f"the transfer of {file.name} was stopped")
    except http.client.IncompleteRead as error:
        raise _Failed(f"it was cut short: {error}") from error


def _tag_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.tag")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
