"""The built site, opened in a real browser that cannot resolve any name."""

import functools
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urldefrag, urljoin

import pytest
from conftest import REPOSITORY

HTML = REPOSITORY / "_build" / "html"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
THEME_NOISE = ("Got invalid theme mode",)  # the theme's own script, before it picks one


@pytest.fixture(scope="module")
def site():
    """The folder of the site, built if it is out of date."""
    command = [sys.executable, str(REPOSITORY / "book" / "build.py")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return HTML


@pytest.fixture(scope="module")
def address(site):
    """Where the site is served on this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def end_headers(self):
            self.send_header("Cache-Control", "max-age=3600")  # scripts are the same on all pages
            super().end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium without name resolution."""
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--no-first-run",
            ],
        )
        yield started
        started.close()


class Page(HTMLParser):
    """What a page links to, loads and names."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values[key] for key in ("id", "name") if values.get(key)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        loaded = {"script": "src", "img": "src", "link": "href", "iframe": "src"}.get(tag)
        if loaded and values.get(loaded) and values.get("rel") not in ("canonical", "author"):
            self.loads.append(values[loaded])


def pages(site):
    found = [*site.glob("book/*.html"), *site.glob("notebooks/*.html")]
    assert len(found) >= 9
    return sorted(found)


def test_nothing_is_loaded_from_another_host(site):
    for path in site.rglob("*.html"):
        if "_static" in path.parts:
            continue
        for target in Page(path).loads:
            assert not target.startswith(("http:", "https:", "//")), f"{path.name}: {target}"


def test_no_internal_link_is_broken(site):
    parsed = {path: Page(path) for path in site.rglob("*.html") if "_static" not in path.parts}
    checked = 0
    for path, page in parsed.items():
        for link in page.links:
            if link.startswith(("http:", "https:", "mailto:", "javascript:")):
                continue
            target, fragment = urldefrag(urljoin(path.as_uri(), link))
            file = type(path)(unquote(target.removeprefix("file://")).partition("?")[0])
            assert file.is_file(), f"{path.name} links to {link}"
            if fragment and file in parsed:
                assert unquote(fragment) in parsed[file].anchors, f"{path.name} links to {link}"
            checked += 1
    assert checked > 100


def test_every_page_renders_its_maths_and_figures_without_an_error(site, address, browser):
    formulas = figures = 0
    errors, failed = [], []
    page = browser.new_page()
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: failed.append(request.url))
    for path in pages(site):
        page.goto(address + path.relative_to(site).as_posix())
        page.wait_for_function(
            "() => [...document.querySelectorAll('.math')]"
            ".every(e => e.querySelector('mjx-container svg'))"
        )
        assert page.locator("[data-mjx-error], mjx-merror").count() == 0, path.name
        formulas += page.locator("mjx-container svg").count()
        images = page.locator("main img")
        broken = images.evaluate_all(
            "all => all.filter(i => !(i.complete && i.naturalWidth)).map(i => i.src)"
        )
        assert broken == [], path.name
        figures += images.count()
        ours = [text for text in errors if not text.startswith(THEME_NOISE)]
        assert (ours, failed) == ([], []), path.name
    page.goto(address)
    page.wait_for_url("**/book/intro.html")
    page.close()
    assert formulas > 20
    assert figures >= 10


def test_the_search_finds_the_graphtransformer(address, browser):
    page = browser.new_page()
    page.goto(address + "search.html?q=GraphTransformer")
    # Results come in one by one, so the page is waited for, not the first result.
    page.locator('#search-results li a[href*="04_emergence"]').first.wait_for()
    page.close()


def test_the_site_names_no_path_of_the_machine_that_built_it(site):
    texts = [p for p in site.rglob("*") if p.suffix in (".html", ".ipynb", ".md", ".js", ".txt")]
    assert len(texts) > 20
    for path in texts:
        text = path.read_text()
        assert str(REPOSITORY) not in text, path.name
        if path.suffix in (".html", ".ipynb"):
            assert "Traceback (most recent call last)" not in text, path.name


def test_a_build_with_nothing_changed_does_nothing(site):
    before = (site / "index.html").stat().st_mtime_ns
    command = [sys.executable, str(REPOSITORY / "book" / "build.py")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0
    assert "up to date" in result.stderr
    assert (site / "index.html").stat().st_mtime_ns == before
