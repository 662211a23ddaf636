"""A server on this machine that speaks the Hugging Face Hub's API, and can misbehave."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.support.checkpoints import save_speaking

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEWER = "fedcba9876543210fedcba9876543210fedcba98"


class Hub:
    """One model, whatever it is called, at a commit that can move; it can be out of reach.

    Weight files are large files: the Hub redirects to a signed address, which `expire` makes
    void. `faults` are what happens to the next requests for ranges of them, "" being nothing,
    and `always` to all of them: drop, short, 429, 503, 500, corrupt, wrong, other, whole, gone.
    `ranges` are the ranges that were sent whole; `requests` all requests.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commit = COMMIT
        self.reachable = True
        self.token: str | None = None
        self.faults: deque[str] = deque()
        self.always = ""
        self.retry_after = "0"
        self.requests: list[str] = []
        self.ranges: list[tuple[str, int, int]] = []
        self.epoch = 0
        self.delay = 0.0
        self.lock = threading.Lock()
        self.idle = threading.Condition()
        self.answering = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        # Another host, as far as anyone can tell from the address.
        self.elsewhere = f"http://localhost:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def forget_ranges(self) -> None:
        """Empty `ranges`, once what has been asked for until now is in it."""
        with self.idle:
            assert self.idle.wait_for(lambda: self.answering == 0, timeout=10)
        self.ranges.clear()

    @property
    def files(self) -> Path:
        return self.folder / "files"

    @property
    def environment(self) -> dict[str, str]:
        """What makes huggingface_hub of another process talk to this server."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.folder / "home"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    @property
    def downloads(self) -> int:
        """Requests for parts of weight files."""
        return sum("/signed/" in request for request in self.requests)

    def expire(self) -> None:
        """No address that was handed out is good any more."""
        self.epoch += 1

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def listing(self) -> list[dict[str, Any]]:
        entries = []
        for path in sorted(self.files.iterdir()):
            content = path.read_bytes()
            entry: dict[str, Any] = {
                "rfilename": path.name,
                "size": len(content),
                "blobId": git_hash(content),
            }
            if path.suffix == ".safetensors":
                entry["lfs"] = {
                    "sha256": hashlib.sha256(content).hexdigest(),
                    "size": len(content),
                    "pointerSize": 130,
                }
            entries.append(entry)
        return entries

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                with hub.idle:
                    hub.answering += 1
                try:
                    self.take()
                finally:
                    with hub.idle:
                        hub.answering -= 1
                        hub.idle.notify_all()

            def take(self) -> None:
                with hub.lock:
                    # huggingface_hub asks for this of its own accord, once a day.
                    if self.path != "/api/agent-harnesses":
                        hub.requests.append(f"{self.command} {self.path}")
                path = unquote(urlsplit(self.path).path)
                if not hub.reachable:
                    self.close_connection = True
                elif hub.token and "/signed/" not in path and not self._has_token():
                    self.answer(401, b"log in")
                elif "/signed/" in path:
                    self.send_range(path)
                elif path.startswith("/api/"):
                    self.send_listing(path)
                else:
                    self.resolve(Path(path).name)

            def _has_token(self) -> bool:
                return self.headers.get("Authorization") == f"Bearer {hub.token}"

            def answer(self, status: int, body: bytes, **headers: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def send_listing(self, path: str) -> None:
                if "/tree/" in path:
                    tree = [
                        {"type": "file", "path": e["rfilename"], "oid": e["blobId"]}
                        | {key: e[key] for key in ("size", "lfs") if key in e}
                        for e in hub.listing()
                    ]
                    for entry in tree:
                        if "lfs" in entry:
                            entry["lfs"] = {**entry["lfs"], "oid": entry["lfs"]["sha256"]}
                    self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
                    return
                answer = {"id": "owner/name", "sha": hub.commit, "siblings": hub.listing()}
                self.answer(200, json.dumps(answer).encode(), Content_Type="application/json")

            def resolve(self, name: str) -> None:
                path = hub.files / name
                if not path.is_file():
                    self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=hub.commit)
                    return
                content = path.read_bytes()
                common = {"X_Repo_Commit": hub.commit, "Accept_Ranges": "bytes"}
                if path.suffix != ".safetensors":
                    etag = f'"{git_hash(content)}"'
                    self.answer(200, content, ETag=etag, **common)
                    return
                etag = f'"{hashlib.sha256(content).hexdigest()}"'
                location = f"{hub.elsewhere}/signed/{hub.epoch}/{name}"
                self.answer(
                    302,
                    b"",
                    Location=location,
                    X_Linked_Etag=etag,
                    X_Linked_Size=str(len(content)),
                    **common,
                )

            def send_range(self, path: str) -> None:
                _, _, epoch, name = path.split("/")
                with hub.lock:
                    fault = hub.faults.popleft() if hub.faults else hub.always
                if epoch != str(hub.epoch):
                    self.answer(403, b"expired")
                    return
                if not (hub.files / name).is_file():
                    self.answer(404, b"")
                    return
                content = (hub.files / name).read_bytes()
                stated = self.headers.get("Range", f"bytes=0-{len(content) - 1}")
                begin, _, end = stated.removeprefix("bytes=").partition("-")
                first, last = int(begin), int(end)
                body = content[first : last + 1]
                stated = f"bytes {first}-{last}/{len(content)}"
                if hub.delay:
                    threading.Event().wait(hub.delay)
                if fault in ("429", "503", "500"):
                    self.answer(int(fault), b"", Retry_After=hub.retry_after)
                elif fault == "gone":
                    self.answer(404, b"")
                elif fault == "whole":
                    self.answer(200, content)
                elif fault == "wrong":
                    self.answer(206, body, Content_Range=f"bytes {first}-{last}/{len(content) + 1}")
                elif fault == "other":
                    self.answer(206, body, Content_Range=f"bytes {first + 1}-{last + 1}/*")
                elif fault == "short":
                    self.answer(206, body[: len(body) // 2], Content_Range=stated)
                elif fault == "drop":
                    self.send_response(206)
                    self.send_header("Content-Range", stated)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body[: len(body) // 2])
                    self.close_connection = True
                else:
                    if fault == "corrupt" and first > 8:
                        body = bytes([body[0] ^ 1]) + body[1:]
                    elif fault == "corrupt" and not hub.always:
                        with hub.lock:  # not a header: the next one
                            hub.faults.appendleft(fault)
                    self.answer(206, body, Content_Range=stated)
                    if self.command == "GET":
                        with hub.lock:
                            hub.ranges.append((name, first, last + 1))

        return Handler


def git_hash(content: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def save_small(folder: Path) -> None:
    """The model that most tests ask for."""
    save_speaking(folder, "qwen3_moe", bits=None)
