"""The page's server over loopback: drawing, history, refusals, and the command that draws the same."""

import base64
import http.client
import io
import json
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from equimini import load_generator
from equimini.page import drawing
from equimini.page import server as page_server
from equimini.page.drawing import Order, Studio
from equimini.page.history import create
from equimini.page.server import Server
from equimini.sampling.edit import load_tokens
from equimini.sampling.strip import flat, row_type
from equimini.utils.errors import UserError
from tests.helpers.scripts import ENVIRONMENT, ROOT, call

QUICK = {"solver": "euler", "steps": 2}


class Client:
    """Talks to a server in this process."""

    def __init__(self, studio):
        self.studio, self.server = studio, Server(studio, 0)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        self.host = f"127.0.0.1:{self.server.server_port}"

    def ask(self, method, path, body=None, **headers):
        """Status and content of the answer."""
        link = http.client.HTTPConnection(self.host, timeout=60)
        link.request(method, path, body, headers)
        answer = link.getresponse()
        content = answer.read()
        kind = answer.headers["Content-Type"]
        link.close()
        return answer.status, json.loads(content) if kind == "application/json" else content

    def draw(self, **order):
        """The lines that an order is answered with."""
        status, content = self.ask("POST", "/draw", json.dumps(QUICK | order))
        return [json.loads(line) for line in content.splitlines()] if status == 200 else [content]

    def do(self, what, **more):
        """The state after a change that takes no time; where it is refused, {"error"}."""
        answer = self.draw(do=what, version=self.studio.strip.version, **more)[-1]
        return answer.get("state", answer)

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def client(model, tmp_path):
    client = Client(Studio(model, tmp_path))
    yield client
    client.close()


def picture(content):
    return np.asarray(Image.open(io.BytesIO(content)))


def test_it_draws_on_shows_what_it_keeps_and_is_found_again(client, model, tmp_path):
    lines = client.draw(columns=70, classes=[0] * 30 + [2] * 40, seed=3)
    assert lines[0]["at"] == 0 and lines[-1]["state"]["labels"] == [0] * 30 + [2] * 40
    shown = np.zeros((32, 280, 3), np.uint8)
    for line in lines[:-1]:
        piece = picture(base64.b64decode(line["png"]))
        shown[:, line["at"] * 4:line["at"] * 4 + piece.shape[1]] = piece
    whole = picture(client.ask("GET", "/strip.png")[1])
    assert np.array_equal(shown, whole)
    assert np.array_equal(picture(client.ask("GET", "/strip.png?from=5&to=9")[1]), whole[:, 20:36])
    tokens = client.studio.strip.columns["token"]
    labels = torch.tensor([[0] * 30 + [2] * 40])
    drawn = torch.stack(list(model.draw(labels, [3], lines_options(client))), 1)[0]
    torch.testing.assert_close(torch.tensor(tokens), drawn, rtol=1e-4, atol=1e-4)
    again = Studio(model, tmp_path)
    assert np.array_equal(flat(again.strip.columns), whole)


def lines_options(client):
    from equimini.sampling.options import SamplingOptions
    return SamplingOptions(**client.studio.strip.last()["options"])


def test_candidates_change_their_columns_and_fade_into_two(client):
    client.draw(columns=30, classes=[1] * 30)
    before = client.studio.strip.columns.copy()
    lines = client.draw(do="redraw", start=10, end=12, fit=2)
    assert {line.get("candidate") for line in lines[:-1]} == {0, 1, 2, 3}
    state = lines[-1]["state"]
    assert state["candidates"] == {"at": 8, "span": [10, 12], "count": 4}
    third = picture(client.ask("GET", "/candidate?k=2")[1])
    state = client.do("choose", candidate=2)
    assert state["candidates"] is None
    after = client.studio.strip.columns
    assert np.array_equal(flat(after[8:14]), third)
    changed = (before["token"] != after["token"]).any(1).nonzero()[0].tolist()
    assert changed == [10, 11] and len(set(after["seed"][10:12])) == 1
    kept = [*range(8), *range(14, 30)]
    assert np.array_equal(before["pixels"][kept], after["pixels"][kept])
    assert "no such candidate" in client.do("choose")["error"]  # they are gone
    lines = client.draw(do="redraw", start=20, end=21, later="draw", candidates=2)
    client.do("choose", candidate=1)
    assert (client.studio.strip.columns["token"][20:] != after["token"][20:]).any(1).all()


def test_to_the_left_kept_columns_stay_and_a_ring_joins(client):
    client.draw(columns=20, classes=[1] * 20)
    before = client.studio.strip.columns.copy()
    lines = client.draw(do="left", columns=5, classes=[0, 0, 2, 2, 2])
    assert lines[0]["at"] == -1 and lines[-1]["state"]["labels"] == [0, 0, 2, 2, 2] + [1] * 20
    after = client.studio.strip.columns
    assert np.array_equal(after["token"][5:], before["token"])
    assert np.array_equal(after["pixels"][7:], before["pixels"][2:])
    assert client.ask("GET", "/start.png")[0] == 200
    state = client.draw(do="ring", columns=6, fit=2)[-1]["state"]
    assert state["ring"] and len(state["labels"]) == 31
    assert not np.array_equal(client.studio.strip.columns["pixels"][0], after["pixels"][0])  # faded
    assert client.do("undo")["ring"] is False
    assert np.array_equal(client.studio.strip.columns, after)
    client.studio.model.mirrored = False
    assert "mirrored" in client.ask("POST", "/draw", json.dumps(
        {"do": "left", "columns": 2}))[1]["error"]


def test_on_the_left_pixels_are_encoded_once_for_a_change_of_direction(client, model, tmp_path,
                                                                       monkeypatch):
    """What follows on the left is drawn from what was drawn there, also after a restart."""
    client.draw(columns=20, classes=[1] * 20)
    encode, seen = drawing.encode, []
    monkeypatch.setattr(drawing, "encode", lambda m, strip: seen.append(1) or encode(m, strip))
    counts, order = [], {"do": "left", "columns": 5, "classes": [2] * 5, "seed": 7}
    for what in (order, order, {"columns": 2}, order):
        client.draw(**what)
        counts.append(len(seen))
    assert counts == [2, 3, 3, 5]  # one of them is the way back
    client.do("undo"), client.do("undo"), client.do("undo")
    drawn = set()
    for studio in (client.studio, Studio(model, tmp_path), Studio(model, tmp_path)):
        client.studio = client.server.studio = studio
        client.draw(**order)
        drawn.add(studio.strip.columns.tobytes())
        client.do("undo")
    assert len(drawn) == 1


def test_undo_and_redo_without_end(client, model, tmp_path):
    client.draw(columns=3, classes=[0] * 3)
    states = [client.studio.strip.columns]
    for k in range(5):
        client.draw(do="redraw", start=1, end=2, candidates=1)
        client.do("choose")
        states.append(client.studio.strip.columns)
    for state in states[-2::-1]:
        client.do("undo")
        assert np.array_equal(client.studio.strip.columns, state)
    assert client.do("undo")["labels"] == [] == client.do("undo")["labels"]
    for state in states:
        client.do("redo")
        assert np.array_equal(client.studio.strip.columns, state)
    again = Studio(model, tmp_path)
    assert np.array_equal(again.strip.columns, states[-1])
    again.strip.undo()
    assert np.array_equal(Studio(model, tmp_path).strip.columns, states[-2])
    again.strip.edit(0, 1, states[0][:1])
    assert again.strip.edits == again.strip.done == 6  # nothing to redo
    again = Studio(model, tmp_path).strip
    assert np.array_equal(again.columns[1:], states[-2][1:])
    again.edit(2, 1, states[0][:0], joined=True)  # a step of two
    assert np.array_equal(again.before()[0], states[-2])
    again.undo()
    assert np.array_equal(again.columns, states[-2])
    again.redo()
    assert np.array_equal(again.columns[1:], states[-2][1:2])


def test_what_an_edit_takes_on_disk(tmp_path):
    """A column drawn again and chosen, with the model in the box."""
    client = Client(Studio(load_generator("scenes"), tmp_path))
    client.draw(columns=24, classes=[1] * 24, steps=1)
    sizes = [(tmp_path / "history.db").stat().st_size]
    for k in range(50):
        client.draw(do="redraw", start=4 + k % 16, end=5 + k % 16, candidates=1, fit=1, steps=1)
        client.do("choose")
    client.close()
    pixels = 3 * 128 * 8  # of one column, as they are
    assert ((tmp_path / "history.db").stat().st_size - sizes[0]) / 50 < 2 * pixels


def old_history(folder, row):
    """A strip as it was kept at first: all columns in columns.bin, their numbers in a log."""
    rows = np.zeros(5, row)
    rows["token"] = np.random.default_rng(0).normal(size=rows["token"].shape)
    rows["pixels"][..., 0] = np.arange(5)[:, None, None]
    (folder / "columns.bin").write_bytes(rows.tobytes() + b"cut off")
    lines = [{"at": 0, "take": [], "put": [0, 1, 2], "joined": False}, {"move": "undo"},
             {"move": "redo"}, {"at": 1, "take": [1], "put": [3, 4], "joined": True, "fit": 2}]
    return rows, "".join(json.dumps(line) + "\n" for line in lines)


def test_older_histories_open(model, tmp_path):
    rows, log = old_history(tmp_path, row_type(model))
    (tmp_path / "history.jsonl").write_text(log + '{"at": 0, "take": [], "pu')  # killed
    strip = Studio(model, tmp_path).strip
    assert np.array_equal(strip.columns, rows[[0, 3, 4, 2]]) and strip.last()["fit"] == 2
    strip.edit(0, 4, rows[[1]])
    strip = Studio(model, tmp_path).strip
    assert np.array_equal(strip.columns, rows[[1]])
    strip.undo()
    assert np.array_equal(strip.columns, rows[[0, 3, 4, 2]])
    strip.undo()
    assert len(strip.columns) == 0 and strip.done == 0


@pytest.mark.parametrize("line", (
    '{"at": "x", "take": [], "put": [0], "joined": false}', '{"at": 0, "take": [], "joined": true}',
    '{"at": 0, "take": [], "put": ["x"], "joined": false}', '{"at": 0, "take": [5], "put": [0]}',
    '{"move": "away"}', "[" * 10**5, "3", "}"))
def test_a_damaged_line_of_an_older_history_loses_nothing(model, tmp_path, line):
    _, log = old_history(tmp_path, row_type(model))
    (tmp_path / "history.jsonl").write_text(f"{line}\n{log}")
    with pytest.raises(UserError, match="history.jsonl is damaged in line 1"):
        Studio(model, tmp_path)
    assert (tmp_path / "history.jsonl").read_text() == f"{line}\n{log}"
    assert not (tmp_path / "history.db").exists()


@pytest.mark.parametrize("content, words", (
    (b"", "it is empty"), (b"PK" * 4000, "not a database"), (None, "unable to open"),
    ("CREATE TABLE other (a)", "no such table"), ("CREATE TABLE edits (number)", "record"),
    ("PRAGMA application_id = 2", "later version"), ("PRAGMA user_version = -1", "later version"),
    ("PRAGMA user_version = 9", "later version")))
def test_what_is_no_history_is_refused_and_left_alone(model, tmp_path, content, words):
    path = tmp_path / "history.db"
    if isinstance(content, str):
        if not content.startswith("CREATE"):
            create(tmp_path, row_type(model))
        with closing(sqlite3.connect(path)) as db:
            db.execute(content)
    elif content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    before = path.is_file() and path.read_bytes()
    with pytest.raises(UserError, match=f"no strip that can be read .*{words}.* move it away"):
        Studio(model, tmp_path)
    assert (path.is_file() and path.read_bytes()) == before
    assert {p.name for p in tmp_path.iterdir()} == {"history.db", "plan.json"}


def test_a_full_disk_leaves_the_strip_as_it_was(client, model, tmp_path):
    client.draw(columns=3, classes=[0] * 3)
    client.studio.strip.db.execute("PRAGMA max_page_count = 2")
    assert "is full" in client.draw(columns=400, classes=[0] * 400)[-1]["error"]
    strip, again = client.studio.strip, Studio(model, tmp_path).strip
    assert np.array_equal(strip.columns, again.columns) and 3 <= len(again.columns) < 403
    assert (strip.done, strip.edits) == (again.done, again.edits)
    (tmp_path / "history.db").unlink()
    assert "cannot write" in client.do("new")["error"]
    assert np.array_equal(strip.columns, again.columns)


def test_a_photograph_keeps_its_pixels(client, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 66, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    status, lines = client.ask("POST", f"/photo?version={client.studio.strip.version}",
                               file.getvalue())
    state = json.loads(lines)["state"]
    assert status == 200 and state["labels"] == [-1] * 16 and state["command"] == ""
    assert np.array_equal(picture(client.ask("GET", "/strip.png")[1]), pixels[:, :64])
    error = client.draw(columns=4)[-1]["error"]
    assert "which class" in error
    client.draw(columns=4, classes=[2] * 4)
    assert np.array_equal(picture(client.ask("GET", "/strip.png")[1])[:, :56], pixels[:, :56])
    (tmp_path / "strip.pt").write_bytes(client.ask("GET", "/strip.pt")[1])
    assert load_tokens(tmp_path / "strip.pt", client.studio.model).labels.tolist() == [[2] * 20]


def test_what_is_refused_changes_nothing(client, tmp_path):
    client.draw(columns=4, classes=[0] * 4)
    state = {path: path.read_bytes() for path in tmp_path.iterdir()}
    good, text = json.dumps({"columns": 2, **QUICK}), "x" * 10
    version = f"?version={client.studio.strip.version}"
    large, bomb = io.BytesIO(), io.BytesIO()
    Image.new("1", (8_000, 8_000)).save(large, "PNG")
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    for method, path, body, headers, status, words in (
            ("POST", "/draw", good, {"Host": "example.com"}, 403, "nowhere else"),
            ("GET", "/state", None, {"Host": f"evil.test:{client.server.server_port}"}, 403, "page"),
            ("POST", "/draw", good, {"Origin": "http://example.com"}, 403, "another page"),
            ("POST", "/draw", good, {"Origin": "null"}, 403, "another page"),
            ("POST", "/draw", good, {"Sec-Fetch-Site": "cross-site"}, 403, "another page"),
            ("GET", "/strip.pt", None, {"Sec-Fetch-Site": "same-site"}, 403, "another page"),
            ("POST", "/draw", text, {}, 400, "JSON"), ("POST", "/draw", "[1]", {}, 400, "JSON"),
            ("POST", "/draw", "[" * 100_000, {}, 400, "JSON"),
            ("POST", "/draw", '{"colour": 1}', {}, 400, "unknown field 'colour'"),
            ("POST", "/draw", '{"columns": "2"}', {}, 400, "columns must be a whole"),
            ("POST", "/draw", '{"columns": 0}', {}, 400, "at least 1"),
            ("POST", "/draw", '{"columns": true}', {}, 400, "columns must be a whole"),
            ("POST", "/draw", '{"columns": 9999}', {}, 400, "at most 4096"),
            ("POST", "/draw", '{"cfg": NaN}', {}, 400, "cfg must be a finite number"),
            ("POST", "/draw", '{"solver": "magic"}', {}, 400, "solver must be one of"),
            ("POST", "/draw", '{"solver": "mean-flow"}', {}, 400, "average velocities"),
            ("POST", "/draw", '{"classes": [0, 3], "columns": 2}', {}, 400, "below 3"),
            ("POST", "/draw", '{"classes": [0], "columns": 2}', {}, 400, "must be 2 numbers"),
            ("POST", "/draw", '{"classes": ["0"], "columns": 1}', {}, 400, "classes must be whole"),
            ("POST", "/draw", '{"classes": 5}', {}, 400, "classes must be whole"),
            ("POST", "/draw", '{"do": "redraw", "start": 3, "end": 5}', {}, 400, "has 4 columns"),
            ("POST", "/draw", " " * 200_000, {}, 413, "too large"),
            ("POST", "/photo" + version, bytes(2**25 + 1), {}, 413, "too large"),
            ("POST", "/draw", None, {"Transfer-Encoding": "chunked"}, 411, "Content-Length"),
            ("POST", "/draw", "", {"Content-Length": "-5"}, 411, "Content-Length"),
            ("POST", "/draw", '{"do": "choose"}', {}, 400, "no such candidate"),
            ("POST", "/draw", '{"do": "choose", "candidate": -1}', {}, 400, "at least 0"),
            ("POST", "/draw", '{"do": "undo", "version": 0}', {}, 400, "changed"),
            ("POST", "/draw", '{"do": "photo"}', {}, 400, "no picture"),
            ("POST", "/photo", b"", {}, 400, "version"),
            ("POST", "/photo?version=0", b"", {}, 400, "changed"),
            ("POST", "/photo" + version, b"no picture", {}, 400, "no picture"),
            ("POST", "/photo" + version, b"%!PS-Adobe-3.0 EPSF-3.0\n", {}, 400, "no picture"),
            ("POST", "/photo" + version, large.getvalue(), {}, 400, "8000x8000"),
            ("POST", "/photo" + version, bomb.getvalue(), {}, 400, "no picture"),
            ("POST", "/photo" + version, large.getvalue()[:900], {}, 400, "picture"),
            ("GET", "/strip.png?from=a&to=2", None, {}, 400, "from must be"),
            ("GET", "/strip.png?from=9&to=12", None, {}, 404, "nothing"),
            ("GET", "/../../etc/passwd", None, {}, 404, "there is no"),
            ("GET", "/draw", None, {}, 404, "there is no"), ("POST", "/state", "{}", {}, 404, "no /")):
        found, answer = client.ask(method, path, body, **headers)
        assert (found, words in answer["error"]) == (status, True), (path, body, headers, answer)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == state
    assert len(client.draw(columns=2)[-1]["state"]["labels"]) == 6  # it lives on


def test_slow_and_many_connections_block_nobody_and_leave_no_thread(client, monkeypatch):
    monkeypatch.setattr(page_server, "SECONDS", 0.5)
    before = threading.active_count()
    slow = [socket.create_connection(("127.0.0.1", client.server.server_port)) for _ in range(40)]
    for k in range(4):  # nothing, half a body, or header by header, for ever
        for i, one in enumerate(slow):
            text = f"POST /draw HTTP/1.0\r\nHost: {client.host}\r\nContent-Length: 9\r\n\r\n{{"
            text = ("", text, "GET /state HTTP/1.0\r\n")[i % 3] if k == 0 else (
                "", "", "X: y\r\n")[i % 3]
            try:
                one.sendall(text.encode())
            except OSError:
                pass
        time.sleep(0.2)
    deadline = time.time() + 10
    while threading.active_count() > before:  # though all of them are still open here
        assert time.time() < deadline
        time.sleep(0.05)
    assert client.ask("GET", "/state")[0] == 200
    for one in slow:
        one.close()


def start(client, **order):
    """An order whose answer is read line by line."""
    link = socket.create_connection(("127.0.0.1", client.server.server_port))
    body = json.dumps(QUICK | order)
    link.sendall(f"POST /draw HTTP/1.0\r\nHost: {client.host}\r\n"
                 f"Content-Length: {len(body)}\r\n\r\n{body}".encode())
    file = link.makefile("rb")
    while file.readline().strip():
        pass
    return link, file


def test_stop_a_closed_tab_and_the_queue(client):
    one, lines = start(client, columns=4000, classes=[0] * 4000)
    lines.readline()
    two, waiting = start(client, columns=2, classes=[1] * 2)
    assert json.loads(waiting.readline()) == {"waiting": True}
    three, changed = start(client, do="new", version=client.studio.strip.version)
    assert client.ask("POST", "/stop", "{}")[0] == 200
    assert len(json.loads(lines.readlines()[-1])["state"]["labels"]) < 4000
    labels = json.loads(waiting.readlines()[-1])["state"]["labels"]
    assert labels[-3:] == [0, 1, 1]  # the second one's turn came
    assert "has changed" in json.loads(changed.readlines()[-1])["error"]
    four, lines = start(client, columns=4000, classes=[0] * 4000)
    lines.readline()
    for part in (one, two, waiting, three, changed, four, lines):
        part.close()
    with client.server.turn:  # the tab is closed: its drawing ends, what it drew stays
        n = len(client.studio.strip.columns)
        assert len(labels) < n < 4000
    assert client.do("undo")["labels"] == labels


def test_a_listener_gone_at_a_saved_piece_leaves_one_step(client):
    drawing = client.studio.draw(Order(do="right", columns=100, classes=(0,) * 100, **QUICK))
    while not len(client.studio.strip.columns):
        next(drawing)
    drawing.close()
    assert len(client.studio.strip.columns) == 64 and client.do("undo")["labels"] == []


def test_a_page_loaded_in_the_middle_of_a_drawing_is_told_so(client):
    link, lines = start(client, columns=4000, classes=[0] * 4000)
    lines.readline()
    assert client.ask("GET", "/state")[1]["busy"]
    link.close(), lines.close()
    while (state := client.ask("GET", "/state")[1])["busy"]:  # what the closed one still saves
        time.sleep(0.05)
    assert state["labels"] == client.studio.strip.columns["label"].tolist()


@pytest.mark.slow  # a server of its own
def test_sigterm_in_the_middle_of_a_drawing(tmp_path):
    words = [sys.executable, "-m", "equimini.page", "--port", "0", "--out", tmp_path / "page"]
    begun = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    port = int(re.search(r"http://127.0.0.1:(\d+)/", begun.stdout.readline())[1])
    server = SimpleNamespace(server_port=port)
    link, lines = start(SimpleNamespace(server=server, host=f"127.0.0.1:{port}"), columns=4000,
                        classes=[0] * 4000)
    lines.readline()
    begun.terminate()
    assert begun.wait(60) == 130
    lines.close(), link.close()
    assert (tmp_path / "page" / "history.db").stat().st_size > 0  # what was drawn is kept


def test_a_fault_of_the_program_is_told_and_survived(client, monkeypatch, capfd):
    client.draw(columns=2, classes=[0] * 2)
    with monkeypatch.context() as patch:
        patch.setattr(client.studio.model.tokenizer, "decode", lambda tokens: 1 / 0)
        assert "ZeroDivisionError" in client.draw(columns=2)[-1]["error"]
    assert "Traceback" in capfd.readouterr().err
    assert client.do("undo")["labels"] == []


def test_a_folder_of_another_tokenizer_is_refused(client, model, tmp_path):
    client.draw(columns=2, classes=[0] * 2)
    model.tokenizer.set_statistics(0.0, 1.0)
    with pytest.raises(UserError, match="holds a strip of other settings"):
        Studio(model, tmp_path)


@pytest.mark.slow  # sample.py, nine times
def test_the_command_draws_the_same_tokens(tmp_path):
    model = load_generator("scenes")
    client = Client(Studio(model, tmp_path, "scenes"))
    order = {"solver": "midpoint", "steps": 1}
    try:
        for act in ({"columns": 6, "classes": [4] * 3 + [1] * 3}, {"columns": 3},
                    {"do": "redraw", "start": 2, "end": 4, "classes": [0, 0], "candidates": 2},
                    {"do": "redraw", "start": 7, "end": 9, "candidates": 1},
                    {"do": "redraw", "start": 5, "end": 6, "later": "draw", "candidates": 2},
                    {"do": "ring", "columns": 5, "fit": 3, "classes": [2] * 4 + [3]},
                    {"do": "redraw", "start": 0, "end": 2, "candidates": 2, "fit": 1},
                    {"do": "redraw", "start": 12, "end": 13, "candidates": 1, "fit": 3}):
            client.draw(**order | act)
            if act.get("do") == "redraw":
                client.do("choose", candidate=act["candidates"] - 1)
            again, mine = drawn_again(client, model, tmp_path)
            torch.testing.assert_close(again.tokens, mine.tokens, rtol=1e-3, atol=1e-3)
            assert torch.equal(again.labels, mine.labels) and torch.equal(again.seeds, mine.seeds)
        assert "--ring" in client.ask("GET", "/state")[1]["command"]
        for start in ("start.png", "start.pt"):
            client.draw(do="left", columns=4, classes=[5, 5, 4, 4], **order)
            assert f"--continue-left-from {start}" in client.ask("GET", "/state")[1]["command"]
            again, mine = drawn_again(client, model, tmp_path)
            assert again.labels[0].tolist()[:4] == [5, 5, 4, 4]  # from pixels: near, not equal
            assert (again.tokens - mine.tokens)[:, :4].square().mean().sqrt() < 0.1
    finally:
        client.close()


def drawn_again(client, model, folder):
    """What the page's command draws from the page's files, and what the page shows."""
    _, script, *words = client.ask("GET", "/state")[1]["command"].split()
    for name in {"strip.pt", "start.pt", "start.png"} & {"strip.pt", *words}:
        (folder / name).write_bytes(client.ask("GET", f"/{name}")[1])
    call(script, *words, cwd=folder)
    return [load_tokens(folder / name, model) for name in ("again.pt", "strip.pt")]
