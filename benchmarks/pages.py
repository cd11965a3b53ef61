"""How soon each page of the built book is usable on a slow phone, in headless Chromium.

    python benchmarks/pages.py [--site FOLDER] [--slower 4] [--tries 3]

The window is 420 pixels wide and the processor slowed four times. A page is usable when its largest
text or image is painted and the page is loaded; its formulas come after that. Milliseconds are the
least of some tries with an empty cache. The network is this machine's own, so they are the work of
the browser alone. Kilobytes are what a server sends that compresses text, all images included.
"""

import argparse
import functools
import gzip
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pandas as pd
from playwright.sync_api import Browser, sync_playwright

SITE = Path(__file__).parents[1] / "_build" / "html"
FORMULAS = "[...document.querySelectorAll('.math')]"
TIMES = """() => new Promise(done => new PerformanceObserver(list => {
    const [page] = performance.getEntriesByType("navigation")
    done([list.getEntries().at(-1).startTime, page.loadEventEnd])
}).observe({type: "largest-contentful-paint", buffered: true}))"""


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Says nothing."""


def sent(file: Path) -> int:
    """The bytes that a server sends for a file, text compressed."""
    content = file.read_bytes()
    is_text = file.suffix in (".html", ".js", ".css", ".svg", ".json")
    return len(gzip.compress(content, 6)) if is_text else len(content)


def measure(browser: Browser, site: Path, address: str, slower: float) -> dict[str, float]:
    """Milliseconds and kilobytes of one visit with an empty cache."""
    context = browser.new_context(viewport={"width": 420, "height": 850}, device_scale_factor=2)
    page, asked = context.new_page(), set()
    page.on("request", lambda request: asked.add(unquote(urlsplit(request.url).path)))
    context.new_cdp_session(page).send("Emulation.setCPUThrottlingRate", {"rate": slower})
    page.goto(address)
    page.wait_for_function(f"() => {FORMULAS}.every(e => e.querySelector('mjx-container svg'))")
    maths = page.evaluate(f"() => {FORMULAS}.length && performance.now()")
    painted, loaded = page.evaluate(TIMES)
    images = "() => [...document.querySelectorAll('main img')].map(i => new URL(i.src).pathname)"
    asked |= {unquote(path) for path in page.evaluate(images)}
    files = [site / path.lstrip("/") for path in asked]
    context.close()
    return {
        **{"painted": painted, "loaded": loaded, "maths": maths},
        "kilobytes": sum(sent(file) for file in files if file.is_file()) / 1000,
    }


def main() -> None:
    """Print a table, a row for each page, the slowest last."""
    words = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    words.add_argument("--site", type=Path, default=SITE)
    words.add_argument("--slower", type=float, default=4.0)
    words.add_argument("--tries", type=int, default=3)
    chosen = words.parse_args()
    site, rows = chosen.site.resolve(), {}
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for path in sorted([*site.glob("book/*.html"), *site.glob("notebooks/*.html")]):
            name = path.relative_to(site).as_posix()
            address = f"http://127.0.0.1:{server.server_port}/{name}"
            tries = [measure(browser, site, address, chosen.slower) for _ in range(chosen.tries)]
            rows[name] = pd.DataFrame(tries).min()
        browser.close()
    server.shutdown()
    table = pd.DataFrame(rows).T.sort_values("loaded")
    print(table.round().astype(int).to_string())


if __name__ == "__main__":
    main()
