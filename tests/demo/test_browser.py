"""The page in a real browser: `pytest -n 0 -m browser tests/demo`.

It needs gradio (the extra `demo`), playwright (`pip install playwright`) and a Chromium: that of
the system (`apt-get install chromium`), or playwright's own (`playwright install chromium`).
With SCREENSHOTS=docs/guide/images it also makes the screenshots of the documents.
"""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.commands import ROOT, environment

pytest.importorskip("gradio", reason="the page needs gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser needs playwright")

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SHOTS = os.environ.get("SCREENSHOTS")
# Milliseconds: the first run of a program compiles.
LONG = 120_000


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def address(out):
    """A page with the embedded weights and an empty cache of compiled programs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "glide_jax.demo", "--port", str(port), "--out", "results"]
    with (out / "log").open("w") as log:
        variables = environment() | {"GLIDE_JAX_CACHE": str(out / "cache"), "XLA_FLAGS": ""}
        server = subprocess.Popen(command, cwd=out, env=variables, stdout=log, stderr=log)
    begun = time.monotonic()
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                urllib.request.urlopen(url, timeout=1).close()
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None, (out / "log").read_text()
                time.sleep(0.25)
        print(f"served after {time.monotonic() - begun:.1f} s")
        yield url
    finally:
        server.terminate()
        server.wait(20)
    assert "Traceback" not in (out / "log").read_text()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with playwright.sync_playwright() as driver:
        try:
            context = driver.chromium.launch_persistent_context(
                tmp_path_factory.mktemp("profile"),
                executable_path=CHROMIUM,
                args=QUIET,
                viewport={"width": 1280, "height": 900},
            )
        except playwright.Error as error:
            pytest.skip(f"there is no Chromium: {str(error).splitlines()[0]}")
        yield context
        context.close()


@pytest.fixture(scope="module")
def page(browser, address):
    """One visitor, whose requests all go to this machine."""
    page, elsewhere = browser.new_page(), []
    local = (address, "data:", "blob:")
    page.on("request", lambda r: r.url.startswith(local) or elsewhere.append(r.url))
    begun = time.monotonic()
    page.goto(address)
    page.wait_for_selector("#generate")
    print(f"opened in {time.monotonic() - begun:.1f} s")
    yield page
    assert not elsewhere


def finish(page, button: str) -> float:
    """Press a button, wait for its result, and return the seconds that it took."""
    begun = time.monotonic()
    page.click(button)
    # The old status may be "done" too.
    page.wait_for_selector("#status p:not(.done)", timeout=LONG)
    page.wait_for_selector("#status p:is(.done, .wrong)", timeout=LONG)
    assert page.locator("#status p.done").count(), page.inner_text("#status p")
    page.wait_for_selector("#gallery img")
    seconds = time.monotonic() - begun
    print(f"{button}: {seconds:.1f} s")
    return seconds


def downloaded(page) -> Image.Image:
    """The chosen result, as the visitor gets it."""
    with page.expect_download() as found:
        page.click("#download")
    return Image.open(io.BytesIO(Path(found.value.path()).read_bytes()))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def upload(page, file: Path) -> None:
    with page.expect_file_chooser() as found:
        page.click("#upload")
    found.value.set_files(file)


def shoot(page, name: str) -> None:
    """Write a screenshot of the documents, with few colours: it stays small."""
    if SHOTS:
        page.mouse.move(0, 0)
        page.wait_for_timeout(500)
        image = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
        folder = ROOT / SHOTS
        folder.mkdir(parents=True, exist_ok=True)
        image.quantize(128).save(folder / f"{name}.png", optimize=True)


def paint(page, *strokes: tuple[tuple[float, float], ...]) -> None:
    """Paint with the mouse; points are shares of the canvas, from its upper left."""
    box = page.locator("#editor canvas").first.bounding_box()
    for stroke in strokes:
        for i, (x, y) in enumerate(stroke):
            page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=12)
            if i == 0:
                page.mouse.down()
        page.mouse.up()
        page.wait_for_timeout(300)


def test_it_generates_and_the_result_knows_how(page):
    page.fill("#prompt textarea", "a red apple")
    page.fill("#seed input", "3")
    finish(page, "#generate")
    image = downloaded(page)
    made = json.loads(image.text["glide_jax"])
    assert image.size == (256, 256)
    assert (made["prompt"], made["seed"], made["weights"]) == ("a red apple", 3, "emoji64")
    page.click("#made > button")
    page.wait_for_selector("#command .cm-content")
    words = "glide-jax sample --num 1 --seed 3 --out results -- 'a red apple'"
    assert page.inner_text("#command .cm-content").replace("\n", "") == words
    assert "pipe('a red apple', num=1, seed=3)" in page.inner_text("#python .cm-content")
    assert '"seed": 3' in page.inner_text("#metadata .cm-content")
    page.click("#made > button")
    shoot(page, "demo-create")


def test_a_painted_mask_is_filled_and_the_rest_is_kept_to_the_byte(page, out):
    before = pixels(downloaded(page))
    page.click("#use")
    page.wait_for_selector("#editor canvas")
    page.wait_for_timeout(2500)
    paint(page, ((0.35, 0.35), (0.5, 0.3), (0.65, 0.35)))
    shoot(page, "demo-paint")
    finish(page, "#apply")
    (mask_file,) = (out / "results" / "inputs").glob("mask-*.png")
    mask = pixels(Image.open(mask_file))[..., 0] > 0
    after = pixels(downloaded(page))
    rows, columns = np.nonzero(mask)
    print(mask.mean(), rows.min(), rows.max(), columns.min(), columns.max())
    assert np.array_equal(after[~mask], before[~mask])
    assert (after[mask] != before[mask]).mean() > 0.2
    shoot(page, "demo-fill")


def test_a_run_is_stopped(page):
    page.click("button[role=tab][data-tab-id=create]")
    page.click("#sampling > button")
    page.fill("#steps input[type=number]", "100")
    page.press("#steps input[type=number]", "Enter")
    page.click("#generate")
    page.wait_for_selector("#status p.running", timeout=LONG)
    page.click("#stop")
    page.wait_for_selector("#status p.stopped", timeout=LONG)
    assert page.inner_text("#status p").startswith("Stopped after")
    assert not page.is_visible("#use")
    # The machine is free again.
    page.fill("#steps input[type=number]", "8")
    page.press("#steps input[type=number]", "Enter")
    page.click("#sampling > button")
    assert finish(page, "#generate") < 60


def test_a_visitor_who_leaves_mid_run_leaves_the_machine_free(page, browser, address):
    other = browser.new_page()
    other.goto(address)
    other.wait_for_selector("#generate")
    other.click("#sampling > button")
    other.fill("#steps input[type=number]", "100")
    other.press("#steps input[type=number]", "Enter")
    other.click("#generate")
    other.wait_for_selector("#status p.running", timeout=LONG)
    other.close()
    finish(page, "#generate")


def test_a_wrong_seed_gets_the_message_of_the_library(page):
    page.fill("#seed input", "-1")
    page.click("#generate")
    page.wait_for_selector("#status p.wrong")
    assert page.inner_text("#status p") == "seed must be between 0 and 2^32 - 1, not -1"
    page.fill("#seed input", "3")


def test_a_broken_file_gets_the_message_of_the_library(page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    page.click("button[role=tab][data-tab-id=edit]")
    upload(page, broken)
    page.wait_for_selector("#status p.wrong:has-text('broken.png')")
    text = page.inner_text("#status p")
    assert text.startswith("cannot read the image broken.png: ") and "\n" not in text
    assert str(tmp_path) not in text and "gradio" not in text


def test_a_photo_is_loaded_and_changed(page, tmp_path):
    photo = np.zeros((200, 300, 3), np.uint8)
    photo[:, 50:250] = (240, 200, 60)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    upload(page, tmp_path / "photo.png")
    page.wait_for_selector("#status p:has-text('photo.png: the middle square')")
    page.click("#mode label:has-text('Img2img')")
    page.wait_for_selector("#amount input")
    page.fill("#prompt textarea", "a lemon")
    finish(page, "#apply")
    made = json.loads(downloaded(page).text["glide_jax"])
    assert made["strength"] == 0.6 and made["image"].startswith("results/inputs/input-")


def test_more_like_this_and_a_path_between_prompts(page):
    finish(page, "#like")
    assert page.locator("#gallery img").count() == 4
    page.click("button[role=tab][data-tab-id=path]")
    page.fill("#end input, #end textarea", "a rocket")
    finish(page, "#interpolate")
    assert page.locator("#gallery img").count() == 6
    page.locator("#gallery img").nth(5).click()
    page.wait_for_timeout(1000)
    page.click("#made > button")
    assert '"share": 1.0' in page.inner_text("#metadata .cm-content")
    page.click("#made > button")


def test_it_fits_a_narrow_window(page):
    page.set_viewport_size({"width": 420, "height": 900})
    page.wait_for_timeout(800)
    width = page.evaluate("document.documentElement.scrollWidth")
    shoot(page, "demo-narrow")
    page.set_viewport_size({"width": 1280, "height": 900})
    assert width <= 420
