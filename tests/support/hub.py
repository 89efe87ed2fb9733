"""A Hugging Face Hub on this machine: it answers what a test tells it to, or not at all."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


class LocalHub:
    """What the Hub answers, by path; anything else is a repository that does not exist."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, str, Any]] = {}
        """Of a path that begins so: status, X-Error-Code and JSON."""
        self.asked: list[str] = []
        self.delay = threading.Event()
        """While it is not set, nothing is answered."""
        self.delay.set()

    def user(self, name: str, *organizations: str, role: str = "write") -> None:
        """Who a token belongs to."""
        self.answers["/api/whoami-v2"] = (
            200,
            "",
            {
                "name": name,
                "orgs": [{"name": one} for one in organizations],
                "auth": {"accessToken": {"role": role}},
            },
        )


@contextmanager
def local_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[LocalHub]:
    """The Hub's client talks to a LocalHub, without a token, and its cache is an empty folder."""
    from huggingface_hub import constants

    hub = LocalHub()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/api/agent-harnesses":  # asked once a day, by the client itself
                hub.asked.append(self.path)
            hub.delay.wait(20)
            found = next((answer for path, answer in hub.answers.items() if self.path.startswith(path)), None)
            status, code, content = found or (401, "RepoNotFound", {})
            body = json.dumps(content).encode()
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, here)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", here)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no token"))
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    try:
        yield hub
    finally:
        hub.delay.set()
        server.shutdown()
        server.server_close()
