"""The page's server: for the browser of this machine, one drawing at a time.

    GET  /                   the page
    GET  /state              the strip and what may be asked for, as JSON (`Studio.state`), "busy":
                             whether something is being drawn
    GET  /strip.png?from=&to=  the strip's pixels, or columns of it;  /candidate?k=  one that waits
    GET  /strip.pt           its token file;  /start.png, /start.pt  the strip before the last step
                             (the picture: its beginning)
    POST /draw               an `Order` → lines of JSON: {"waiting": true} in the queue, {"at",
                             "png", …} pixels from column `at` on while it is drawn, at the end
                             {"state"} or {"error", "state"}
    POST /photo?version=     a picture file → the same
    POST /stop               {}: ends the drawing after this column

Refused are a foreign Host (another name that points here), Origin or Sec-Fetch-Site, a body over
its limit, a request that takes long to arrive, and more connections than a few.
"""

from __future__ import annotations

import base64
import io
import json
import socket
import tempfile
import time
import traceback
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Semaphore
from typing import Any, Callable
from urllib.parse import parse_qsl, urlsplit

import numpy as np
from PIL import Image

from equimini.page.drawing import CHUNK, Order, Studio, read_order
from equimini.sampling.edit import Tokens, save_tokens
from equimini.sampling.strip import flat
from equimini.utils.errors import UserError, in_words

PAGE = Path(__file__).with_name("index.html")
BYTES, PHOTO_BYTES = 2**17, 2**25  # of a request's body
SECONDS = 20.0  # for a request to arrive, and for a part of an answer to be taken
CONNECTIONS = 32
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
           "Cross-Origin-Resource-Policy": "same-origin", "Content-Security-Policy":
           "default-src 'self' 'unsafe-inline' data: blob:; frame-ancestors 'none'"}


class Refused(UserError):
    """A request that is not carried out: HTTP status, why."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Server(ThreadingHTTPServer):
    """Listens on this machine alone."""

    daemon_threads, request_queue_size = True, 64

    def __init__(self, studio: Studio, port: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.studio, self.turn, self.free = studio, Lock(), Semaphore(CONNECTIONS)
        self.hosts = [f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")]

    def verify_request(self, *_: Any) -> bool:
        """Whether one more connection is taken."""
        return self.free.acquire(blocking=False)

    def process_request_thread(self, *connection: Any) -> None:
        super().process_request_thread(*connection)
        self.free.release()

    def end(self) -> None:
        """Wait for the drawing to stop at its next column and to be saved; none begins after it."""
        while not self.turn.acquire(timeout=0.1):
            self.studio.stop.set()

    def handle_error(self, *_: Any) -> None:
        """Of a connection that broke: there is nobody to tell."""


class Arriving(io.RawIOBase):
    """What a connection sends; all of it must have come after SECONDS, however it comes."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.deadline = connection, time.monotonic() + SECONDS

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        self.connection.settimeout(max(1e-3, self.deadline - time.monotonic()))
        return self.connection.recv_into(buffer)


class Handler(BaseHTTPRequestHandler):
    """One request; a connection serves one."""

    server: Server

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(Arriving(self.connection))

    def log_message(self, *_: Any) -> None:
        """Nothing: the terminal is for what goes wrong."""

    def do_GET(self) -> None:
        studio, strip = self.server.studio, self.server.studio.strip
        self.answer({
            "/": lambda: self.send(PAGE.read_bytes(), "text/html; charset=utf-8"),
            "/state": lambda: self.send(json.dumps(self.state()).encode()),
            "/strip.png": lambda: self.send_png(strip.columns[
                self.number("from", 0):self.number("to", len(strip.columns))]),
            "/candidate": lambda: self.send_png(studio.candidate(self.number("k"))[1]),
            "/start.png": lambda: self.send_png(strip.before()[0][:CHUNK]),
            "/strip.pt": lambda: self.send_tokens(studio.tokens()),
            "/start.pt": lambda: self.send_tokens(studio.token_file(*strip.before()))})

    def do_POST(self) -> None:
        self.answer({
            "/draw": lambda: self.draw(read_order(self.json())),
            "/photo": lambda: self.draw(Order(do="photo", version=self.number("version")),
                                        self.body),
            "/stop": lambda: (self.server.studio.stop.set(), self.send(b"{}"))})

    def answer(self, routes: dict[str, Callable[[], Any]]) -> None:
        """Carry out a request that is in order; errors become words."""
        url = urlsplit(self.path)
        self.query, self.begun = dict(parse_qsl(url.query)), False
        try:
            self.check_sender()
            if url.path not in routes:
                raise Refused(404, f"there is no {url.path[:50]}")
            self.body = self.read(PHOTO_BYTES if url.path == "/photo" else BYTES)
            self.connection.settimeout(SECONDS)
            routes[url.path]()
        except (ConnectionError, TimeoutError):
            pass  # the tab was closed, or does not read
        except Exception as error:
            status, text = told(error)
            if self.begun:
                self.line({"error": text, "state": self.state()})
            else:
                self.send(json.dumps({"error": text}).encode(), status=status)
                while status == 413 and self.rfile.read1(2**16):
                    pass  # so that who is sending still sees the answer, no broken connection

    def check_sender(self) -> None:
        """Raises Refused for a request that another site sends (Host, Origin, Sec-Fetch-Site)."""
        host = self.headers.get("Host", "")
        if host not in self.server.hosts:
            raise Refused(403, f"this page is at http://{self.server.hosts[0]}/, nowhere else")
        if (self.headers.get("Origin", f"http://{host}") != f"http://{host}"
                or self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")):
            raise Refused(403, "another page's requests are not answered")

    def read(self, limit: int) -> bytes:
        """The request's body, of at most `limit` bytes; raises Refused."""
        length = self.headers.get("Content-Length", "0" if self.command == "GET" else "")
        if not (length.isascii() and length.isdecimal()):
            raise Refused(411, "a request needs its Content-Length")
        if int(length) > limit:
            raise Refused(413, f"that is too large: at most {limit / 2**20:g} MiB are taken")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise Refused(408, "the request did not arrive whole")
        return body

    def json(self) -> dict[str, Any]:
        """The request's body as a JSON object; raises Refused."""
        try:
            values = json.loads(self.body)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise Refused(400, "a request's body is a JSON object")
        return values

    def number(self, name: str, default: int | None = None) -> int:
        """A whole number of the query string; raises Refused."""
        text = self.query.get(name, "" if default is None else str(default))
        if not (text.isascii() and text.isdecimal() and len(text) < 16):
            raise Refused(400, f"{name} must be a whole number, got {text[:50]!r}")
        return int(text)

    def draw(self, order: Order, photo: bytes = b"") -> None:
        """Wait for the turn, draw, and send every piece at once; a closed tab ends it."""
        studio = self.server.studio
        studio.check(order)
        while not self.server.turn.acquire(timeout=0.5):
            self.line({"waiting": True})
        try:
            studio.stop.clear()
            with closing(studio.draw(order, photo)) as drawing:
                for piece in drawing:
                    piece["png"] = base64.b64encode(png(piece.pop("pixels"))).decode()
                    self.line(piece)
        finally:
            self.server.turn.release()
        self.line({"state": self.state()})

    # answers -------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """busy: something is being drawn, so the page asks again."""
        return {"busy": self.server.turn.locked(), **self.server.studio.state()}

    def send_png(self, columns: np.ndarray) -> None:
        if not len(columns):
            raise Refused(404, "there is nothing to show yet")
        self.send(png(flat(columns)), "image/png")

    def send_tokens(self, tokens: Tokens) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save_tokens(path := Path(folder) / "strip.pt", self.server.studio.model, tokens)
            self.send(path.read_bytes(), "application/octet-stream")

    def send(self, body: bytes, kind: str = "application/json", status: int = 200) -> None:
        self.head(kind, status, {"Content-Length": len(body)})
        self.wfile.write(body)

    def line(self, content: dict[str, Any]) -> None:
        """One of the lines of an answer that begins with the first of them."""
        if not self.begun:
            self.head("application/x-ndjson")
        self.begun = True
        self.wfile.write(json.dumps(content).encode() + b"\n")

    def head(self, kind: str, status: int = 200, more: dict[str, Any] = {}) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, **more}.items():
            self.send_header(name, value)
        self.end_headers()


def png(pixels: np.ndarray) -> bytes:
    """Pixels (H, W, 3) as a file's content."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def told(error: Exception) -> tuple[int, str]:
    """HTTP status and words; a fault of the program is shown in the terminal."""
    if text := in_words(error):
        return getattr(error, "status", 400 if isinstance(error, UserError) else 507), text
    traceback.print_exception(error)
    return 500, f"a fault of the program ({type(error).__name__}); the terminal says where"
