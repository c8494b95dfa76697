"""The page's server: for the browser of this machine, one drawing at a time.

    GET  /                   the page
    GET  /state              the strip and what may be asked for, as JSON (`Studio.state`)
    GET  /pixels?from=&to=   columns of the strip as a PNG;  /candidate?k=  one that waits
    GET  /strip.png          the whole strip;  /strip.pt  its token file;  /start.png, /start.pt
                             the strip before the last drawing (the picture: its beginning)
    POST /draw               an `Order` → lines of JSON while it is drawn: {"waiting": true} in the
                             queue, {"at", "png", …} pixels from column `at` on, at the end
                             {"state"} or {"error"}
    POST /choose             {"candidate": k} → the state, as of those below
    POST /undo  /redo  /new  {}
    POST /photo              a picture file
    POST /stop               {}: ends the drawing after this column

A change (all but /draw and /stop) names the version of the strip that it is meant for (?version=);
where that is not the present one, or a drawing runs, the answer is 409.  Refused are a foreign
Host (another name that points here), Origin or Sec-Fetch-Site, a body over its limit, a request
that takes long to arrive, and more connections than a few.
"""

from __future__ import annotations

import base64
import io
import json
import socket
import tempfile
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Semaphore, Timer
from typing import Any, Callable
from urllib.parse import parse_qsl, urlsplit

import numpy as np
from PIL import Image

from equimini.page.drawing import CHUNK, Studio, read_order
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


class Refused(Exception):
    """A request that is not carried out: HTTP status, why."""


class Server(ThreadingHTTPServer):
    """Listens on this machine alone."""

    daemon_threads, request_queue_size = True, 64

    def __init__(self, studio: Studio, port: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.studio, self.turn, self.free = studio, Lock(), Semaphore(CONNECTIONS)
        self.hosts = [f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")]

    def process_request(self, request: socket.socket, address: Any) -> None:
        if self.free.acquire(blocking=False):
            super().process_request(request, address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: socket.socket, address: Any) -> None:
        super().process_request_thread(request, address)
        self.free.release()

    def end(self) -> None:
        """Wait for the drawing to stop at its next column and to be saved; none begins after it."""
        while not self.turn.acquire(timeout=0.1):
            self.studio.stop.set()

    def handle_error(self, request: socket.socket, address: Any) -> None:
        """Of a connection that broke: there is nobody to tell."""


class Handler(BaseHTTPRequestHandler):
    """One request; a connection serves one."""

    server: Server
    timeout = SECONDS

    def setup(self) -> None:
        super().setup()
        self.deadline = Timer(SECONDS, self.connection.shutdown, [socket.SHUT_RD])
        self.deadline.daemon = True
        self.deadline.start()

    def finish(self) -> None:
        self.deadline.cancel()
        super().finish()

    def log_message(self, *_: Any) -> None:
        """Nothing: the terminal is for what goes wrong."""

    def do_GET(self) -> None:
        studio = self.server.studio
        self.answer({
            "/": lambda: self.send(PAGE.read_bytes(), "text/html; charset=utf-8"),
            "/state": self.send_state,
            "/pixels": lambda: self.send(png(flat(studio.strip.columns[
                self.number("from"):self.number("to")])), "image/png"),
            "/candidate": lambda: self.send(png(studio.candidate(self.number("k"))), "image/png"),
            "/strip.png": lambda: self.send(png(flat(studio.strip.columns)), "image/png"),
            "/start.png": lambda: self.send(png(flat(
                studio.strip.before(step=False)[:CHUNK])), "image/png"),
            "/strip.pt": lambda: self.send_tokens(studio.tokens()),
            "/start.pt": lambda: self.send_tokens(studio.tokens(studio.strip.before(step=True)))})

    def do_POST(self) -> None:
        studio = self.server.studio
        self.answer({
            "/draw": self.draw, "/stop": lambda: (studio.stop.set(), self.send_state()),
            "/choose": lambda: self.change(lambda: studio.choose(**self.fields(candidate=int))),
            "/photo": lambda: self.change(lambda: studio.photo(self.body)),
            **{f"/{name}": lambda act=act: self.change(lambda: act(**self.fields()))
               for name, act in (("undo", studio.strip.undo), ("redo", studio.strip.redo),
                                 ("new", studio.new))}})

    def answer(self, routes: dict[str, Callable[[], Any]]) -> None:
        """Carry out a request that is in order; errors become words."""
        url = urlsplit(self.path)
        self.query, self.begun = dict(parse_qsl(url.query)), False
        try:
            self.check_sender()
            if url.path not in routes:
                raise Refused(404, f"there is no {url.path[:50]}")
            self.body = self.read(PHOTO_BYTES if url.path == "/photo" else BYTES)
            self.deadline.cancel()
            routes[url.path]()
        except (ConnectionError, TimeoutError):
            pass  # the tab was closed, or does not read
        except Exception as error:
            status, text = error.args if isinstance(error, Refused) else told(error)
            if self.begun:
                self.line({"error": text, "state": self.server.studio.state()})
            else:
                self.send(json.dumps({"error": text}).encode(), status=status)

    def check_sender(self) -> None:
        host = self.headers.get("Host", "")
        if host not in self.server.hosts:
            raise Refused(403, f"this page is at http://{self.server.hosts[0]}/, nowhere else")
        if (self.headers.get("Origin", f"http://{host}") != f"http://{host}"
                or self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")):
            raise Refused(403, "another page's requests are not answered")

    def read(self, limit: int) -> bytes:
        length = self.headers.get("Content-Length", "0" if self.command == "GET" else "")
        if not (length.isascii() and length.isdecimal()):
            raise Refused(411, "a request needs its Content-Length")
        if int(length) > limit:
            raise Refused(413, f"that is too large: at most {limit / 2**20:g} MiB are taken")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise Refused(408, "the request did not arrive whole")
        return body

    def fields(self, **kinds: type) -> dict[str, Any]:
        """The body's fields, which must be these."""
        values = self.json()
        if {name: type(value) for name, value in values.items()} != kinds:
            raise Refused(400, f"this takes the fields {', '.join(kinds) or '(none)'}, got "
                               f"{str(values)[:50]}")
        return values

    def json(self) -> dict[str, Any]:
        try:
            values = json.loads(self.body)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise Refused(400, "a request's body is a JSON object")
        return values

    def number(self, name: str) -> int:
        text = self.query.get(name, "")
        if not (text.isascii() and text.isdecimal() and len(text) < 10):
            raise Refused(400, f"{name} must be a whole number, got {text[:50]!r}")
        return int(text)

    def change(self, act: Callable[[], None]) -> None:
        """A change that takes no time; not while something is drawn."""
        if not self.server.turn.acquire(blocking=False):
            raise Refused(409, "something is being drawn; stop it first")
        try:
            if self.query.get("version") != str(self.server.studio.strip.version):
                raise Refused(409, "the strip has changed, in another tab perhaps")
            act()
        finally:
            self.server.turn.release()
        self.send_state()

    def draw(self) -> None:
        """Wait for the turn, draw, and send every piece at once; a closed tab ends it."""
        studio, order = self.server.studio, read_order(self.json())
        studio.check(order)
        self.head("application/x-ndjson")
        self.begun = True
        while not self.server.turn.acquire(timeout=0.5):
            self.line({"waiting": True})
        try:
            studio.stop.clear()
            drawing = studio.draw(order)
            try:
                for piece in drawing:
                    piece["png"] = base64.b64encode(png(piece.pop("pixels"))).decode()
                    self.line(piece)
            finally:
                drawing.close()
        finally:
            self.server.turn.release()
        self.line({"state": studio.state()})

    # answers -------------------------------------------------------------------------------------

    def send_state(self) -> None:
        self.send(json.dumps(self.server.studio.state()).encode())

    def send_tokens(self, tokens: Tokens) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save_tokens(path := Path(folder) / "strip.pt", self.server.studio.model, tokens)
            self.send(path.read_bytes(), "application/octet-stream")

    def send(self, body: bytes, kind: str = "application/json", status: int = 200) -> None:
        self.head(kind, status, len(body))
        self.wfile.write(body)

    def head(self, kind: str, status: int = 200, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind}.items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def line(self, content: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(content).encode() + b"\n")


def png(pixels: np.ndarray) -> bytes:
    """Pixels (H, W, 3) as a file's content; an empty strip as one black column of pixels."""
    file = io.BytesIO()
    if not pixels.size:
        raise Refused(404, "there is nothing to show yet")
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def told(error: Exception) -> tuple[int, str]:
    """HTTP status and words; a fault of the program is shown in the terminal."""
    if text := in_words(error):
        return 400 if isinstance(error, UserError) else 507, text
    traceback.print_exception(error)
    return 500, f"a fault of the program ({type(error).__name__}); the terminal says where"
