"""How the book runs notebooks and checks what it ran; its site, opened in a real browser."""

import functools
import gzip
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from statistics import median
from textwrap import dedent
from urllib.parse import unquote, urldefrag, urljoin

import nbformat
import pytest
import yaml
from conftest import REPOSITORY

HTML = REPOSITORY / "_build" / "html"
BUILD = [sys.executable, str(REPOSITORY / "book" / "build.py")]
THEME_NOISE = ("Got invalid theme mode",)  # the theme's own script, before it picks one

CONFTEST = f"""
import importlib.util
from pathlib import Path

path = "{REPOSITORY / "notebooks" / "conftest.py"}"
spec = importlib.util.spec_from_file_location("pages", path)
pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pages)
pages.build.EXECUTED = Path("executed").resolve()
pages.build.is_current = lambda path: True
"""

pytest_plugins = ["pytester"]


def write(path, *sources, printed=None):
    """A notebook; what is printed is the stored output of every cell, which is checked."""
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = ["parameters"]
    if printed is not None:
        for cell in cells:
            cell.metadata["tags"], cell.execution_count = ["nbval-check-output"], 1
            cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=printed)]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.mark.parametrize(("now", "outcome"), [("0.25\n", "passed"), ("0.26\n", "failed")])
def test_nbval_compares_the_stored_output_with_that_of_the_executed_copy(now, outcome, pytester):
    pytester.makeconftest(CONFTEST)
    source = "raise SystemError('no kernel runs this')"
    write(pytester.path / "page.ipynb", source, printed="0.25\n")
    write(pytester.path / "executed" / "page.ipynb", source, printed=now)
    result = pytester.runpytest_subprocess("--nbval-lax", "--nbval-current-env", "page.ipynb")
    result.assert_outcomes(**{outcome: 1})


def test_a_progress_bar_of_a_running_kernel_is_no_output_that_is_compared(pytester):
    pytester.makeconftest(CONFTEST.replace("lambda path: True", "lambda path: False"))
    bar = "import sys; print('half', file=sys.stderr, flush=True)"
    write(pytester.path / "page.ipynb", f"print(1, flush=True); {bar}; print(2)", printed="1\n2\n")
    result = pytester.runpytest_subprocess("--nbval-lax", "--nbval-current-env", "page.ipynb")
    result.assert_outcomes(passed=1)


def in_a_process(folder, code):
    """What a script prints that sees the modules of ``book`` and works on a folder.

    nbclient leaves its event loop open, which the tests' own process would report.
    """
    script = f"import sys; sys.path.insert(0, {str(REPOSITORY / 'book')!r})\n{dedent(code)}"
    (folder / "script.py").write_text(script)
    command = [sys.executable, "script.py"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_notebook_is_out_of_date_when_it_or_the_package_or_its_copy_is_changed(tmp_path):
    (tmp_path / "mapkg").mkdir()
    (tmp_path / "requirements.lock").touch()
    write(tmp_path / "page.ipynb", "x = 1")
    code = """
        import build
        from pathlib import Path

        build.ROOT = Path.cwd()
        build.EXECUTED = build.ROOT / "executed"
        build.KEYS = build.EXECUTED / "keys.json"
        page, module = build.ROOT / "page.ipynb", build.ROOT / "mapkg" / "new.py"

        def change(old, new):
            page.write_text(page.read_text().replace(old, new))

        if __name__ == "__main__":
            for step in (
                lambda: None,
                lambda: build.execute([page]),
                module.touch,
                module.unlink,
                lambda: change("x = 1", "x = 2"),
                lambda: change("x = 2", "x = 1"),
                (build.EXECUTED / "page.ipynb").unlink,
                lambda: build.execute([page]),
                lambda: build.KEYS.write_text(build.KEYS.read_text()[:9]),
                lambda: build.execute([page]),
                lambda: build.KEYS.write_text("[1]"),
            ):
                step()
                build._contents.cache_clear()
                print(build.is_current(page), end=" ")
    """
    expected = ["never executed", True, "a module more", True, "another word", True, "no copy"]
    expected += [True, "keys cut short", True, "other keys"]
    assert in_a_process(tmp_path, code).split() == [str(shown is True) for shown in expected]


RUN = """
    import kernels, nbformat
    from studies import notebook

    def run():
        try:
            notebook.run(
                "page.ipynb", "out.ipynb", {}, progress=False,
                kernel_manager_class=kernels.ForkedKernelManager,
            )
        except Exception as error:
            return print(type(error).__name__, error)
        for cell in nbformat.read("out.ipynb", 4).cells:
            print(*(output.text.strip() for output in cell.outputs))

    if __name__ == "__main__":
        run()
        run()
"""


def test_each_forked_kernel_is_a_process_of_its_own_in_the_folder_of_the_notebook(tmp_path):
    seen = "import os; print(os.getpid(), os.path.exists('page.ipynb'), 'x' in globals()); x = 1"
    write(tmp_path / "page.ipynb", "", seen)
    first, second = (line.split() for line in in_a_process(tmp_path, RUN).splitlines() if line)
    assert first[1:] == second[1:] == ["True", "False"]
    assert first[0] != second[0]


def test_a_forked_kernel_that_dies_is_an_error_and_the_next_one_starts(tmp_path):
    write(tmp_path / "page.ipynb", "", "import os; os._exit(3)")
    message = "NotebookFailed page.ipynb: code cell 2, which begins 'import os; os._exit(3)', "
    assert in_a_process(tmp_path, RUN).count(message) == 2


@pytest.fixture(scope="module")
def site():
    """The folder of the site, built if it is out of date."""
    result = subprocess.run(BUILD, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return HTML


@pytest.fixture(scope="module")
def page(site, browser):
    """A page of headless Chromium that resolves no name, and the address of the site."""

    class Quiet(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def end_headers(self):
            self.send_header("Cache-Control", "max-age=3600")  # scripts are the same on all pages
            super().end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield browser.new_page(), f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@functools.cache
def bytes_sent(file):
    """Of a file, by a server that compresses text, as those of static pages do."""
    content = file.read_bytes()
    is_image = file.suffix in (".png", ".woff2", ".ico")
    return len(content if is_image else gzip.compress(content, 6))


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


def test_nothing_is_loaded_from_another_host_and_no_internal_link_is_broken(site):
    parsed = {path: Page(path) for path in site.rglob("*.html") if "_static" not in path.parts}
    checked = 0
    for path, page in parsed.items():
        for target in page.loads:
            assert not target.startswith(("http:", "https:", "//")), f"{path.name}: {target}"
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


LOADED = """() => [location.href, ...performance.getEntriesByType("resource").map(e => e.name),
    ...[...document.images].map(e => e.src)]"""


def test_every_page_renders_without_an_error_and_loads_at_most_a_megabyte_and_a_half(site, page):
    (page, address), formulas, figures, errors, failed = page, 0, 0, [], []
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: failed.append(request.url))
    paths = sorted([*site.glob("book/*.html"), *site.glob("notebooks/*.html")])
    for path in paths:
        page.goto(address + path.relative_to(site).as_posix())
        page.wait_for_function(
            "() => [...document.querySelectorAll('.math')]"
            ".every(e => e.querySelector('mjx-container svg'))"
        )
        assert page.locator("[data-mjx-error], mjx-merror").count() == 0, path.name
        formulas += page.locator("mjx-container svg").count()
        images = page.locator("main img")
        images.evaluate_all("all => all.map(image => image.loading = 'eager')")
        images.evaluate_all("all => Promise.allSettled(all.map(image => image.decode()))")
        broken = images.evaluate_all(
            "all => all.filter(i => !(i.complete && i.naturalWidth)).map(i => i.src)"
        )
        assert broken == [], path.name
        figures += images.count()
        page.wait_for_load_state("networkidle")
        urls = {unquote(urldefrag(url)[0].partition("?")[0]) for url in page.evaluate(LOADED)}
        files = [site / url.removeprefix(address) for url in urls if url.startswith(address)]
        sent = {file.name: bytes_sent(file) for file in files}
        assert len(sent) > 10 and sum(sent.values()) < 1_500_000, f"{path.name}: {sent}"
        ours = [text for text in errors if not text.startswith(THEME_NOISE)]
        assert (ours, failed) == ([], []), path.name
    assert len(paths) >= 9 and formulas > 20 and figures >= 10
    page.goto(address)
    page.wait_for_url("**/book/intro.html")
    page.goto(address + "search.html?q=GraphTransformer")
    # Results come in one by one, so the page is waited for, not the first result.
    page.locator('#search-results li a[href*="04_emergence"]').first.wait_for()


READ = """() => {
    const article = document.querySelector("article"), text = e => e.innerText.trim()
    const all = selector => [...article.querySelectorAll(selector)]
    const top = e => e.getBoundingClientRect().top + scrollY
    const prose = all("p, li, figcaption").filter(e => !e.closest("table, .toctree-wrapper, nav"))
    const figures = all("img").filter(e => !e.closest("p"))
    const column = article.getBoundingClientRect().right + 1
    const scrolls = e => e !== article && (getComputedStyle(e).overflowX !== "visible"
        || scrolls(e.parentElement))
    const caption = e => e.closest("figure")?.querySelector("figcaption")?.innerText
    return {
        boxes: all(".admonition.claims").map(e => [...e.querySelectorAll(".sd-badge")].map(text)),
        before: top(all("h2")[0]),
        first: Math.min(...figures.map(top)),
        captions: figures.map(e => [e.alt, caption(e)]),
        heads: all("table.dataframe thead th").map(text),
        printed: all("div.output pre").map(text).filter(t => /\\S {2,}\\S/.test(t)),
        code: all("div.cell_input pre").filter(e => e.checkVisibility()).map(text),
        wide: all("*").filter(e => e.checkVisibility() && e.getBoundingClientRect().right > column
            && !scrolls(e.parentElement)).map(e => e.outerHTML.slice(0, 80)),
        prose: prose.filter(e => !e.querySelector("p, li")).map(e => {
            const copy = e.cloneNode(true)
            copy.querySelectorAll(".math, code").forEach(m => m.replaceWith("x"))
            return copy.textContent.replace(/\\s+/g, " ").trim()
        }),
    }
}"""

AVOIDED = re.compile(
    "of ours|not to be seen|what two cores allow|a rate that dies|gives it nothing|by far"
    "|a likely reason",
    re.IGNORECASE,
)


@pytest.fixture(scope="module")
def read(site, page):
    """What a reader finds on each page, on a laptop; and on a phone."""
    (page, address), found = page, {}
    for path in sorted(site.glob("notebooks/*.html")):
        page.set_viewport_size({"width": 1400, "height": 850})
        page.goto(address + path.relative_to(site).as_posix())
        found[path.stem] = page.evaluate(READ)
        page.set_viewport_size({"width": 420, "height": 850})
        found[path.stem]["wide"] += page.evaluate(READ)["wide"]
    return found


def test_a_page_has_one_box_with_the_verdicts_of_the_claims_and_all_are_on_the_front_page(
    site, read
):
    front = (site / "book" / "intro.html").read_text()
    every = yaml.safe_load((REPOSITORY / "book" / "claims.yaml").read_text())
    assert front.count("sd-badge") == sum(map(len, every.values()))
    for name, shown in read.items():
        claims = every[f"notebooks/{name}.ipynb"]
        assert shown["boxes"] == [[claim["verdict"] for claim in claims]], name
        assert front.count(f'href="../notebooks/{name}.html"') >= len(claims), name
        assert all("{" in claim["number"] for claim in claims), f"{name}: a number that was typed"
        page = (site / "notebooks" / f"{name}.html").read_text()
        assert re.findall(r"\d\.0 of \d", page) == [], f"{name}: a count is a whole number"


def test_a_figure_is_on_the_first_screen_and_each_has_a_caption_and_a_text_instead(read):
    for name, shown in read.items():
        assert shown["first"] < min(shown["before"], 850), name
        assert all(alt and caption for alt, caption in shown["captions"]), name
        alone = [caption for _, caption in shown["captions"] if " As the " in caption]
        assert alone == [], f"{name}: a caption that cannot be read alone"


def test_tables_are_styled_visible_cells_short_and_nothing_is_wider_than_the_column(read):
    for name, shown in read.items():
        assert [head for head in shown["heads"] if "_" in head] == [], name
        assert shown["printed"] == [], name
        assert all(len(cell.splitlines()) <= 10 for cell in shown["code"]), name
        assert shown["wide"] == [], name


def test_pages_are_short_and_so_are_their_sentences(read):
    for name, shown in read.items():
        text = " ".join(shown["prose"])
        sentences = [s for part in shown["prose"] for s in re.split(r"(?<=[.?!:;])\s+", part)]
        lengths = [len(sentence.split()) for sentence in sentences]
        long = [s for s in sentences if len(s.split()) > 30]
        assert long == [], name
        assert median(lengths) <= 20 and len(text.split()) <= 1500, name
        assert AVOIDED.findall(text) == [], name


ALIKE = "mjx-container, .highlight, dl.py, table.dataframe tbody tr:nth-child(n + 4)"
"""What makes axe slow, many of a kind: drawn formulas, code in the theme's colors, entries of the
API, and rows of tables that code makes, which look as the three above them."""


def test_axe_finds_no_serious_barrier_on_any_page_in_light_or_dark(site, page):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    (page, address), found = page, []
    page.set_viewport_size({"width": 1400, "height": 850})
    for path in sorted([*site.glob("book/*.html"), *site.glob("notebooks/*.html")]):
        page.goto(address + path.relative_to(site).as_posix())
        # Sphinx's list of references has links between its items; navigation is as on the front.
        left_out = f"{ALIKE}, .citation-list" + ", .bd-sidebar" * (path.stem != "intro")
        page.locator(left_out).evaluate_all("all => all.forEach(each => each.remove())")
        # Rules other than that of contrast do not look at colors.
        for theme, rules in {"light": {}, "dark": {"runOnly": ["color-contrast"]}}.items():
            page.emulate_media(color_scheme=theme, reduced_motion="reduce")  # no color in between
            page.locator(f"html[data-theme={theme}]").wait_for()
            options = {"resultTypes": ["violations"], **rules}
            for rule in axe.run(page, options=options).response["violations"]:
                if rule["impact"] in ("serious", "critical"):
                    where = f"{path.stem}, {theme}: {rule['id']}"
                    found += [f"{where}, {node['html']}" for node in rule["nodes"]]
    page.emulate_media(color_scheme="light", reduced_motion="null")
    assert found == []


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
    result = subprocess.run(BUILD, capture_output=True, text=True)
    assert result.returncode == 0 and "up to date" in result.stderr
    assert (site / "index.html").stat().st_mtime_ns == before
