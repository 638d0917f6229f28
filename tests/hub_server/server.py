"""The HTTP side: requests are read, checked, passed on, answered and recorded."""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from . import routes
from .faults import Fault, Faults
from .state import Refusal, State

_CHUNK = 1 << 16


class HubServer:
    """A Hub that runs inside a `with` block, or between `start` and `stop`.

    Args:
        folder: where it keeps everything; a later server goes on with it only as far as git knows.
        users: name -> role of its token, "read" or "write".
        tokens: secret of each user; made up for those without one.
        free_bytes: room for large files; None: as much as there is.
    Attributes:
        requests: (method, path with query, status) of every request; secrets of addresses are cut off.
        unknown: those that no route answers.
    """

    def __init__(
        self,
        folder: Path,
        users: Mapping[str, str],
        tokens: Mapping[str, str] | None = None,
        free_bytes: int | None = None,
        port: int = 0,
    ) -> None:
        self._secrets = {user: f"hf_{secrets.token_hex(17)}" for user in users} | dict(tokens or {})
        self.state = State(folder, {self._secrets[user]: (user, role) for user, role in users.items()}, free_bytes)
        self.faults = Faults()
        self.requests: list[tuple[str, str, int]] = []
        self.unknown: list[str] = []
        self._http = _Server(("127.0.0.1", port), _Handler)
        self._http.hub = self
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        # Under another name, as the real Hub has its large files on another machine: the client takes care then that
        # no token goes there.
        self.storage = f"http://localhost:{self._http.server_address[1]}/storage"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    def start(self) -> HubServer:
        self._thread.start()
        return self

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    __enter__ = start

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def token(self, user: str) -> str:
        """The secret of a user."""
        return self._secrets[user]

    def fault(self, pattern: str, **how: Any) -> Fault:
        """Break requests from now on; see `Fault`."""
        return self.faults.add(Fault(pattern, **how))

    def count(self, pattern: str) -> int:
        """How many requests "METHOD path" match so far."""
        return sum(re.search(pattern, f"{method} {path}") is not None for method, path, _ in self.requests)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    hub: HubServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news; tests look at `requests`."""


class _Cut(Exception):
    """The connection ends here, without an answer."""


class Request:
    """One request, as routes see it."""

    def __init__(self, handler: _Handler, hub: HubServer, fault: Fault | None) -> None:
        address = urlsplit(handler.path)
        self.hub, self.state, self.url = hub, hub.state, hub.url
        self.method, self.path = handler.command, address.path
        self.query = {key: values[-1] for key, values in parse_qs(address.query).items()}
        self.headers = handler.headers
        self._handler, self._fault = handler, fault
        self.user: tuple[str, str] | None = None
        self.was_read = False

    def chunks(self) -> Iterator[bytes]:
        """The body, as it comes; an injected fault may cut it short."""
        self.was_read = True
        left = None if self._fault is None else self._fault.cut_after
        for chunk in self._chunks():
            if left is not None and len(chunk) >= left:
                raise _Cut
            left = None if left is None else left - len(chunk)
            yield chunk
        if left is not None:
            raise _Cut

    def _chunks(self) -> Iterator[bytes]:
        stream = self._handler.rfile
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(stream.readline().split(b";")[0] or b"0", 16):
                yield self._exactly(size)
                stream.readline()
            stream.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            chunk = self._exactly(min(left, _CHUNK))
            left -= len(chunk)
            yield chunk

    def _exactly(self, size: int) -> bytes:
        chunk = self._handler.rfile.read(size)
        if len(chunk) != size:
            raise _Cut
        return chunk

    def body(self) -> bytes:
        return b"".join(self.chunks())

    def json(self) -> dict[str, Any]:
        try:
            found = json.loads(self.body() or b"{}")
        except ValueError as problem:
            raise Refusal(400, f"The body is not JSON: {problem}") from problem
        if not isinstance(found, dict):
            raise Refusal(400, "The body must be a JSON object")
        return found


class Answer:
    """What is sent back: JSON, or bytes with their headers."""

    def __init__(
        self, body: Any = None, status: int = 200, headers: Mapping[str, str] | None = None, size: int | None = None
    ) -> None:
        self.status, self.headers = status, dict(headers or {})
        is_bytes = isinstance(body, bytes)
        self.body: bytes = body if is_bytes else json.dumps(body).encode()
        self.headers.setdefault("Content-Type", "application/octet-stream" if is_bytes else "application/json")
        self.size = len(self.body) if size is None else size


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *arguments: object) -> None:
        """Kept in `HubServer.requests` instead."""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (_Cut, ConnectionError):
            self.close_connection = True

    def _handle(self) -> None:
        hub = self.server.hub
        shown = re.sub(r"signature=\w+", "signature=...", self.path)
        fault = hub.faults.of(f"{self.command} {unquote(self.path)}")
        request = Request(self, hub, fault)
        status = 0
        try:
            answer = self._answer(request, fault)
            if fault is not None and fault.lose_answer:
                raise _Cut
            if not request.was_read:
                for _ in request.chunks():
                    pass
            status = answer.status
            self._send(answer)
        finally:
            hub.requests.append((self.command, shown, status))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _answer(self, request: Request, fault: Fault | None) -> Answer:
        if fault is not None and fault.status is not None:
            return Answer({"error": fault.message}, fault.status, fault.headers)
        try:
            request.user = request.state.user_of(request.headers.get("Authorization"))
            return routes.answer(request)
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message.splitlines()[0]}
            if refusal.code is not None:
                headers["X-Error-Code"] = refusal.code
            return Answer({"error": refusal.message, **refusal.body}, refusal.status, headers)

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(answer.size))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)
