"""Weight files on the Hugging Face Hub, read by byte ranges and never kept.

Addresses, tokens, proxies and certificates are huggingface_hub's. What it redirects to (a signed
address that expires) is remembered until the server refuses it.
"""

from __future__ import annotations

import random
import threading
import time
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from flashmoe.base.errors import SourceError

# Failures in a row, without a byte between them, after which a read is given up.
ATTEMPTS = 8
BACKOFF_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 300.0
TIMEOUT_SECONDS = 30.0
MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
# What an address answers that has expired; asking the Hub again gives a new one.
EXPIRED = (400, 401, 403, 404, 410)
BUSY = (408, 425, 429, 500, 502, 503, 504)


class HubFile:
    """A file of a Hub repository at one commit; see `SourceFile`."""

    path: Path | None = None
    trusted = False

    def __init__(
        self, repo: str, commit: str, name: str, size_bytes: int, sha256: str | None, blob: str
    ) -> None:
        from huggingface_hub import hf_hub_url

        self.name = name
        self.size_bytes = size_bytes
        self.sha256 = sha256
        self.version = sha256 or blob
        self._repo = repo
        self._url = hf_hub_url(repo, name, revision=commit, endpoint=endpoint())
        self._location: str | None = None
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def read_into(self, offset: int, out: memoryview) -> None:
        failures = 0
        while out:
            wait = 0.0
            try:
                done, wait, reason = self._get(offset, out)
            except SourceError:
                raise
            except Exception as error:  # the client's transport raises a dozen unrelated types
                done, reason = 0, _first_line(error)
            out, offset = out[done:], offset + done
            failures = 0 if done else failures + 1
            if not out:
                return
            if self._stopped.is_set():
                raise SourceError(f"reading {self.name} of {self._repo} was stopped")
            if failures >= ATTEMPTS:
                raise SourceError(
                    f"{self.name} of {self._repo} cannot be fetched: {reason} ({failures} times); "
                    "run the same command again to go on from here"
                )
            if failures:
                backoff = BACKOFF_SECONDS * 2 ** (failures - 1) * random.uniform(0.75, 1.25)
                self._stopped.wait(min(max(wait, backoff), LONGEST_WAIT_SECONDS))

    def _get(self, offset: int, out: memoryview, redirects: int = 0) -> tuple[int, float, str]:
        """One request: bytes received, seconds that the server wants waited, what went wrong."""
        from huggingface_hub import get_session

        url, headers = self._address()
        headers |= {
            "Range": f"bytes={offset}-{offset + len(out) - 1}",
            "Accept-Encoding": "identity",
        }
        with get_session().stream(
            "GET", url, headers=headers, follow_redirects=False, timeout=TIMEOUT_SECONDS
        ) as response:
            status = response.status_code
            if status in REDIRECTS:
                self._remember(urljoin(url, response.headers.get("Location", "")))
                if redirects == MAX_REDIRECTS:
                    return 0, 0.0, "too many redirects"
                return self._get(offset, out, redirects + 1)
            if status in BUSY:
                return 0, _retry_after(response), f"the server answers {status}"
            if status in EXPIRED:
                return 0, 0.0, self._refused(url, status)
            self._check(response, offset, len(out))
            try:
                return self._receive(response, out), 0.0, "the connection ends early"
            except SourceError:
                raise
            except _Interrupted as error:
                return error.done, 0.0, error.reason

    def _receive(self, response: Any, out: memoryview) -> int:
        done = 0
        try:
            for piece in response.iter_raw(2**18):
                if done + len(piece) > len(out):
                    raise SourceError(
                        f"the server sends more of {self.name} than it was asked for; "
                        "byte ranges do not work with it"
                    )
                out[done : done + len(piece)] = piece
                done += len(piece)
                if self._stopped.is_set():
                    break
        except SourceError:
            raise
        except Exception as error:
            raise _Interrupted(done, _first_line(error)) from error
        return done

    def _check(self, response: Any, offset: int, size_bytes: int) -> None:
        """Raise SourceError unless a response is the range that was asked for."""
        status = response.status_code
        if status == 200:
            raise SourceError(
                f"the server sends {self.name} of {self._repo} whole instead of the byte range "
                "that was asked for; download the checkpoint (hf download) and repack its folder"
            )
        stated = response.headers.get("Content-Range", "")
        begin, _, total = stated.removeprefix("bytes ").partition("/")
        fits = status == 206 and begin == f"{offset}-{offset + size_bytes - 1}"
        if not fits or total not in ("*", str(self.size_bytes)):
            raise SourceError(
                f"{self.name} of {self._repo} is not what it was: bytes {offset} to "
                f"{offset + size_bytes - 1} of {self.size_bytes} were asked for, the server "
                f"answers {status} {stated}".rstrip()
            )

    def _address(self) -> tuple[str, dict[str, str]]:
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        with self._lock:
            location = self._location
        # A token is for the Hub, not for what it redirects to.
        if location is None or urlsplit(location).netloc == urlsplit(self._url).netloc:
            return location or self._url, build_hf_headers()
        return location, {}

    def _remember(self, location: str) -> None:
        with self._lock:
            self._location = location

    def _refused(self, url: str, status: int) -> str:
        if url != self._url:
            with self._lock:
                if url == self._location:
                    self._location = None
            return f"its address answers {status}"
        if status == 404:
            raise SourceError(f"{self._repo} has no {self.name} any more")
        raise SourceError(
            f"the Hub refuses {self.name} of {self._repo} ({status}); log in with hf auth login, "
            "or ask for access on its page"
        )


class _Interrupted(Exception):
    def __init__(self, done: int, reason: str) -> None:
        self.done = done
        self.reason = reason


def endpoint() -> str:
    """The Hub's address, as huggingface_hub has it."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _retry_after(response: Any) -> float:
    text = response.headers.get("Retry-After", "")
    if text.isdigit():
        return float(text)
    try:
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return 0.0


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
