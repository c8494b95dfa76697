"""The page in a real browser (headless Chromium, driven by selenium), with the model in the box.

SHOTS=folder python -m pytest -m slow tests/page/test_browser.py keeps screenshots to look at.
"""

import base64
import io
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from equimini import load_generator
from equimini.sampling.edit import load_tokens
from tests.helpers.scripts import ENVIRONMENT, ROOT, call

pytestmark = pytest.mark.slow
selenium = pytest.importorskip("selenium", reason="the page's tests need the package selenium")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
DRIVER = shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("no chromium with chromedriver here (apt-get install chromium chromium-driver)",
                allow_module_level=True)

from selenium import webdriver  # noqa: E402
from selenium.webdriver import ActionChains, Keys  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402

SECONDS = 120  # of patience
SIZE = 1280, 900


def serve(folder, port=0):
    """A server as a user starts it; the process and its address."""
    words = [sys.executable, "-m", "equimini.page", "--port", str(port), "--out", str(folder)]
    begun = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    return begun, re.search(r"http://\S+/", begun.stdout.readline())[0]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    begun, address = serve(tmp_path_factory.mktemp("page") / "strip")
    yield address
    begun.terminate()  # a background job's child may ignore SIGINT
    assert begun.wait(20) == 130


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(word)
    options.add_experimental_option("prefs", {
        "download.default_directory": str(tmp_path_factory.getbasetemp() / "downloads")})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, Service(DRIVER))
    yield browser
    browser.quit()


class Page:
    """What a person does with the page."""

    def __init__(self, driver, address):
        self.driver, self.address = driver, address

    def js(self, code, *values):
        return self.driver.execute_script(code, *values)

    def until(self, condition):
        """Wait for a condition in the page's script."""
        deadline = time.time() + SECONDS
        while not self.js(f"return !!({condition})"):
            if time.time() > deadline:
                self.shot("timeout")
                pytest.fail(f"waited in vain for {condition}; message: {self.text('message')!r}, "
                            f"log: {self.driver.get_log('browser')}")
            time.sleep(0.05)

    def open(self, width=SIZE[0], height=SIZE[1]):
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500})
        self.driver.get(self.address)
        self.until("S && !reloading")

    def new(self):
        """An empty strip and few steps."""
        while self.js("return N || running"):  # a drawing of a closed page may still end
            self.js("return change('new')")
        self.js("tell('')")
        self.js("$('steps').value = 2; $('cfg').value = 2.5; turn('right'); for (const f of FIELDS) "
                "localStorage.setItem(`${S.checkpoint} ${f}`, $(f).value)")

    def keys(self, *keys):
        ActionChains(self.driver).send_keys(*keys).perform()

    def chord(self, *keys):
        chain = ActionChains(self.driver)
        for key in keys[:-1]:
            chain.key_down(key)
        chain.send_keys(keys[-1])
        for key in keys[:-1]:
            chain.key_up(key)
        chain.perform()

    def drag(self, first, last, ribbon=False):
        """From one column to another with the mouse; a click where they are the same."""
        self.js("reveal(arguments[0])", first)
        time.sleep(0.2)
        left, top, width, high = self.js("const r = strip.getBoundingClientRect(); return "
                                         "[r.left + leftPlan() * cw, r.top, cw, r.height]")
        y = int(top + (high - 10 if ribbon else high / 3))
        chain = ActionChains(self.driver)
        mouse = chain.w3c_actions.pointer_action
        mouse.move_to_location(int(left + (first + 0.5) * width), y).pointer_down()
        mouse.move_to_location(int(left + (last + 0.5) * width), y).pointer_up()
        chain.perform()

    def draw(self, columns):
        self.js("$('columns').value = arguments[0]; $('columns').onchange()", columns)
        before = self.js("return N")
        self.keys(" ")
        self.until(f"N === {before + columns} && !running && !reloading")

    def text(self, name):
        return self.js("return $(arguments[0]).hidden ? '' : $(arguments[0]).textContent", name)

    def pixels(self):
        """The strip's pixels as the page shows them, (H, N·f, 3)."""
        self.until("!reloading && !running")
        content = self.js("""
            const all = document.createElement("canvas"); all.width = N * S.f; all.height = S.height;
            for (const [k, canvas] of tiles) all.getContext("2d").drawImage(canvas, (k * TILE + shift) * S.f, 0);
            return all.toDataURL().split(",")[1];""")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))

    def fetched(self, path):
        with urllib.request.urlopen(self.address + path) as answer:
            return answer.read()

    def shot(self, name):
        if folder := os.environ.get("SHOTS"):
            Path(folder).mkdir(exist_ok=True)
            time.sleep(0.3)
            self.driver.save_screenshot(f"{folder}/{name}.png")


@pytest.fixture
def page(driver, server):
    page = Page(driver, server)
    page.open()
    page.new()
    yield page
    wrong = [line for line in driver.get_log("browser") if "favicon" not in line["message"]
             and "status of 4" not in line["message"] and "ERR_CONNECTION" not in line["message"]]
    assert not wrong


def shows_the_strip(page):
    """The canvases show the server's pixels, to the bit."""
    whole = np.asarray(Image.open(io.BytesIO(page.fetched("strip.png"))))
    assert np.array_equal(page.pixels(), whole)
    return whole


def test_draw_redraw_choose_undo(page):
    page.shot("empty")
    page.keys(" ")
    page.until("running && tiles.size")
    page.shot("drawing")
    page.until("!running && !reloading")
    before = shows_the_strip(page)
    assert before.shape == (128, 256, 3)
    page.shot("drawn")
    page.drag(10, 12)
    page.until("cand")
    page.shot("candidates-come")
    page.until("!running && S.candidates")
    page.keys("3")
    page.shot("candidates")
    assert page.text("what") == "Columns 10 to 12" and page.js("return cand.shown") == 2
    page.keys(Keys.ENTER)
    page.until("!cand && !reloading")
    after = shows_the_strip(page)
    kept = np.r_[0:64, 120:256]
    assert np.array_equal(before[:, kept], after[:, kept]) and (before != after).any()
    page.chord(Keys.CONTROL, "z")
    page.until("S.redo && !reloading")
    assert np.array_equal(shows_the_strip(page), before)
    page.chord(Keys.CONTROL, Keys.SHIFT, "z")
    page.until("!S.redo && !reloading")
    assert np.array_equal(shows_the_strip(page), after)
    page.drag(20, 20)
    page.until("!running && S.candidates")
    seed = page.js("return S.seed")
    page.keys("n")
    page.until(f"!running && S.candidates && S.seed === {seed + 4}")
    page.keys("w")
    page.until("!running && cand && cand.end === 22")
    page.keys(Keys.ESCAPE)
    page.until("!cand")
    assert np.array_equal(shows_the_strip(page), after)


def test_with_the_keyboard_alone(page):
    page.keys("-", "-", "b", " ")  # 16 columns of the second class
    page.until("N === 16 && !running && !reloading")
    assert page.js("return new Set(S.labels).size === 1 && S.labels[0] === brush")
    page.keys(Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    page.chord(Keys.SHIFT, Keys.ARROW_RIGHT)
    assert page.js("return [sel.a, sel.b]") == [2, 4]
    page.keys("b", "p", "k", Keys.ENTER)
    page.until("!running && S.candidates")
    assert page.text("what") == "Columns 2 to 3 and all behind"
    page.shot("behind")
    page.keys("2", Keys.ENTER)
    page.until("!cand && !reloading")
    labels = page.js("return S.labels")
    assert labels[2] == labels[3] != labels[1] and labels[1] == labels[15]
    page.keys("k", "?")
    page.until("$('help').open")
    page.shot("keys")
    page.keys("?")


def test_paint_classes_before_they_are_drawn(page):
    page.js("$('columns').value = 12; $('columns').onchange()")
    page.js("$('palette').children[4].click()")
    page.drag(3, 6, ribbon=True)
    page.js("$('palette').children[1].click()")
    page.shot("painted")
    page.keys(" ")
    page.until("N === 12 && !running && !reloading")
    assert page.js("return S.labels") == [1] * 3 + [4] * 4 + [1] * 5


def test_other_candidates_keep_what_was_painted_and_escape_drops_it(page):
    page.draw(8)
    plain = page.js("return S.labels")  # of the class that an earlier test chose, perhaps
    page.js("$('palette').children[4].click()")
    page.drag(3, 4, ribbon=True)
    page.drag(3, 4)
    page.until("!running && S.candidates")
    seed = page.js("return S.seed")
    page.keys("n")
    page.until(f"S.seed > {seed} && !running && S.candidates")
    page.keys(Keys.ENTER)
    page.until("!cand && !reloading")
    assert page.js("return S.labels") == plain[:3] + [4] * 2 + plain[5:]
    page.drag(6, 6, ribbon=True)
    page.keys(Keys.ESCAPE)
    assert page.js("return repaint.size") == 0


def test_escape_stops_also_from_within_a_field(page):
    page.js("$('columns').value = 500; $('columns').onchange(); $('go').click()")
    page.until("running && tiles.size")
    page.js("$('cfg').focus()")
    page.keys(Keys.ESCAPE)
    page.until("!running && !reloading")
    assert 0 < page.js("return N") < 500


def test_a_second_tab(page, driver):
    first = driver.current_window_handle
    page.draw(4)
    driver.switch_to.new_window("tab")
    try:
        page.open()
        page.draw(2)
    finally:
        driver.close()
        driver.switch_to.window(first)
    page.js("document.activeElement.blur()")
    page.chord(Keys.CONTROL, "z")  # of a strip that has changed meanwhile
    page.until("!running && !reloading && N === 6")
    assert "another tab" in page.text("message")
    shows_the_strip(page)


def test_left_and_ring(page):
    page.js("$('palette').children[3].click()")
    page.draw(16)
    before = shows_the_strip(page)
    page.keys("l")
    page.shot("left-planned")
    page.keys(" ")
    page.until("running && tiles.has(-1)")
    page.shot("left-drawing")
    page.until("N === 32 && !running && !reloading")
    after = shows_the_strip(page)
    assert np.array_equal(after[:, 144:], before[:, 16:])
    page.keys("o", " ")
    page.until("N === 48 && S.ring && !running && !reloading")
    shows_the_strip(page)
    page.shot("ring")
    page.keys("r")


def test_a_photograph_is_dropped(page, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((240, 128), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    given = np.asarray(Image.open(tmp_path / "photo.png"))

    def drop(content, name):
        page.js("""
            const bytes = Uint8Array.from(arguments[0]), data = new DataTransfer();
            data.items.add(new File([bytes], arguments[1]));
            for (const kind of ["dragover", "drop"]) document.body.dispatchEvent(
                new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
            """, list(content), name)

    drop((tmp_path / "photo.png").read_bytes(), "photo.png")
    page.until("N === 30 && !reloading")
    assert np.array_equal(shows_the_strip(page), given)
    page.js("$('palette').children[5].click()")
    page.draw(8)
    assert np.array_equal(shows_the_strip(page)[:, :224], given[:, :224])
    page.shot("photograph")
    drop(b"no picture", "photo.png")
    page.until("!$('message').hidden")
    assert "no picture" in page.text("message") and page.js("return N") == 38
    page.shot("refused")


def test_stop_and_reload(page):
    page.js("$('columns').value = 500; $('columns').onchange()")
    page.keys(" ")
    page.until("running && tiles.size")
    page.keys(Keys.ESCAPE)
    page.until("!running && !reloading && N")
    drawn = page.js("return N")
    assert 0 < drawn < 500
    shown = shows_the_strip(page)
    page.drag(0, 0)
    page.until("!running && S.candidates")
    page.open()
    page.until("cand && !reloading")  # the strip and its candidates are found again
    assert np.array_equal(shows_the_strip(page), shown)
    page.keys("4", Keys.ENTER)
    page.until("!cand && !reloading")
    assert (shows_the_strip(page) != shown).any()
    page.keys(" ")
    page.until(f"running && N >= {drawn}")
    page.open()  # in the middle of a drawing: it stops, what it drew comes
    page.until(f"!S.busy && !reloading && N >= {drawn} && N < {drawn} + 500")
    shows_the_strip(page)


def test_take_away(page, tmp_path):
    page.draw(12)
    page.drag(4, 5)
    page.until("!running && S.candidates")
    page.keys("2", Keys.ENTER)
    page.until("!cand && !reloading")
    page.shot("take-away")
    downloads = tmp_path / "downloads"
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {
        "behavior": "allow", "downloadPath": str(downloads)})
    page.js("$('png').click(); setTimeout(() => $('pt').click(), 500)")
    deadline = time.time() + SECONDS
    while {p.name for p in downloads.glob("*")} != {"strip.png", "strip.pt"}:
        assert time.time() < deadline
        time.sleep(0.1)
    assert np.array_equal(np.asarray(Image.open(downloads / "strip.png")), page.pixels())
    _, script, *words = page.text("command").split()
    call(script, *words, cwd=downloads)
    model = load_generator("scenes")
    mine, its = (load_tokens(downloads / name, model).tokens for name in ("strip.pt", "again.pt"))
    assert (mine - its).abs().max() < 1e-3


def test_narrow(page):
    page.open(390, 844)
    page.draw(24)
    page.shot("narrow")
    assert page.js("return document.documentElement.scrollWidth") <= 390
    page.open(390, 844)
    assert 0 < page.js("return x(N) - view.scrollLeft") < 390  # the strip's end is in sight
    page.js("""
        const r = strip.getBoundingClientRect(), at = { clientX: r.left + 3.5 * cw, clientY: r.top + 40,
            bubbles: true, pointerType: "touch", pointerId: 7 };
        for (const kind of ["pointerdown", "pointerup"]) strip.dispatchEvent(new PointerEvent(kind, at));""")
    page.until("!running && S.candidates")
    assert page.text("what") == "Column 3"
    assert page.js("return document.documentElement.scrollWidth") <= 390
    page.shot("narrow-candidates")
    page.js("$('cards').children[1].click()")
    page.until("!cand && !reloading")
    shows_the_strip(page)


def test_a_server_that_dies(driver, tmp_path):
    begun, address = serve(tmp_path / "strip")
    page = Page(driver, address)
    page.open()
    page.new()
    page.draw(6)
    page.js("$('columns').value = 400; $('columns').onchange()")
    page.keys(" ")
    page.until("running && N > 6")
    begun.kill()
    begun.wait()
    page.until("!running && !$('message').hidden")
    assert "does not answer" in page.text("message")
    page.shot("server-died")
    begun, _ = serve(tmp_path / "strip", address.rstrip("/").rpartition(":")[2])
    try:
        page.until("$('message').hidden && !reloading")
        assert page.js("return N") >= 6 + 64  # what was saved
        shows_the_strip(page)
        page.draw(4)
    finally:
        begun.terminate()
        begun.wait(20)


def test_the_index_of_a_scroll(driver, tmp_path):
    call("sample.py", "--scroll", 40, "--classes", "forest:20,sea:20", "--steps", 1, "--tile-columns",
         16, "--out", tmp_path / "walk", cwd=tmp_path)
    page = Page(driver, "")
    driver.get((tmp_path / "walk/index.html").as_uri())
    page.until("[...document.images].every(image => image.complete)")
    sizes = page.js("return [...document.images].map(image => [image.naturalWidth, "
                    "image.naturalHeight])")
    assert sizes[:3] == [[128, 128], [128, 128], [64, 128]] and sizes[3][0] > 0
    assert page.js("return strip.scrollWidth >= strip.clientWidth")
    page.shot("scroll")
