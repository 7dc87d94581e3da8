"""Download files into the cache once, resumably and atomically."""

import hashlib
import http.client
import logging
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from mae_bench.data.sets.index import cache_folder
from mae_bench.errors import Interrupted, UserError
from mae_bench.files import is_full
from mae_bench.locks import file_lock

log = logging.getLogger(__name__)

NUM_PARALLEL = 8
TRIES = 5  # in a row without progress
TIMEOUT_SECONDS = 30.0  # without receiving a byte
WAIT_SECONDS = 1.0  # before the next try; doubles each time
BLOCK = 1 << 20  # bytes
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


Check = Callable[[Path], object]


class _Failed(Exception):
    """A failed attempt that is worth repeating."""


def fetch_all(urls: Sequence[str], check: Check | None = None) -> list[Path]:
    """Download the files unless cached and return their paths in order; raise UserError if one fails."""
    stop = threading.Event()
    with ThreadPoolExecutor(NUM_PARALLEL) as pool:
        running = [pool.submit(fetch, url, check, stop) for url in urls]
        try:
            for each in wait(running, return_when=FIRST_EXCEPTION).done:
                each.result()
            return [each.result() for each in running]
        except BaseException:  # one failed, or the user interrupted: the others stop at their next block
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def fetch(url: str, check: Check | None = None, stop: threading.Event | None = None) -> Path:
    """Download one file and return its path; once `stop` is set, keep the part and raise Interrupted.

    check: called with the path of a complete download; if it raises UserError, nothing enters the cache.
    """
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    folder = cache_folder() / "fetched" / hashlib.sha256(url.encode()).hexdigest()[:16]
    path = folder / ("file" if name in ("", "..") else name)
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(path):
            if not path.is_file():
                _download(url, path, stop or threading.Event())
                _admit(url, path, check)
    except OSError as error:
        if is_full(error):
            partial_path(path).unlink(missing_ok=True)
        raise UserError(
            f"{url} cannot be stored in {path.parent}: {error}",
            expected="a cache folder with enough space for the downloads",
            fix="export MAE_BENCH_CACHE=FOLDER",
        ) from error
    return path


def partial_path(path: Path) -> Path:
    """Return the path of the partial download."""
    return path.with_name(f"{path.name}.part")


def _download(url: str, path: Path, stop: threading.Event) -> None:
    part, tries, reason = partial_path(path), 0, ""
    while tries < TRIES:
        before = _file_size(part)
        try:
            _receive(url, part, stop)
        except _Failed as error:
            reason = str(error)
            tries = 1 if _file_size(part) > before else tries + 1
            log.info("%s: %s; retrying", url, reason)
            stop.wait(WAIT_SECONDS * 2 ** (tries - 1) if tries < TRIES else 0)
            continue
        return
    raise UserError(
        f"{url} could not be downloaded: {reason}",
        expected="the complete file",
        fix="re-run the same command to resume the download",
    )


def _admit(url: str, path: Path, check: Check | None) -> None:
    """Move a complete download to `path`, or remove it if it is not what the URL should hold."""
    part = partial_path(path)
    _tag_path(part).unlink(missing_ok=True)
    try:
        if check:
            check(part)
    except UserError as error:
        part.unlink(missing_ok=True)
        raise UserError(
            f"{url} does not hold the expected file; what came was removed: {error.given}",
            expected=error.expected,
            fix="open the address in a browser: the server may ask for a login, or the file has changed",
        ) from error
    os.replace(part, path)


def _receive(url: str, part: Path, stop: threading.Event) -> None:
    """Request the missing bytes; return once the file is complete."""
    have = _file_size(part)
    tag = _tag_path(part).read_text() if _tag_path(part).is_file() else ""
    headers = {"Range": f"bytes={have}-", "If-Range": tag} if have and tag else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            resumes = answer.status == http.HTTPStatus.PARTIAL_CONTENT
            length = answer.headers.get("Content-Length")
            start = have if resumes else 0
            total = None if length is None else start + int(length)
            _tag_path(part).write_text(
                answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
            )
            with open(part, "ab" if resumes else "wb") as file:
                _copy(answer, file, stop)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink(missing_ok=True)
        elif error.code not in TRANSIENT:
            raise UserError(
                f"{url}: the server responds {error.code} {error.reason}", expected="a file at every URL"
            ) from error
        raise _Failed(f"the server responds {error.code} {error.reason}") from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise _Failed(str(getattr(error, "reason", error)) or type(error).__name__) from error
    if total is not None and _file_size(part) != total:
        raise _Failed(f"it ended after {_file_size(part)} of {total} bytes")


def _copy(answer: http.client.HTTPResponse, file: BinaryIO, stop: threading.Event) -> None:
    try:
        while block := answer.read(BLOCK):
            file.write(block)
            if stop.is_set():
                raise Interrupted(f"the download of {file.name} was stopped")
    except http.client.IncompleteRead as error:
        raise _Failed(f"the response was truncated: {error}") from error


def _tag_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.tag")


def _file_size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
