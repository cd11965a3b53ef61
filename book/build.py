"""Build the book: run the notebooks that changed, then render all pages.

    python book/build.py

A notebook is executed again when it, mapkg, studies, the installed packages or the data it reads
have changed; what it reads stands in its metadata (``mapkg.reads``). Executed copies and the
pages are in ``_build``; pages are rendered from a staging folder, with execution off. When
nothing changed at all, nothing is done.
"""

import ast
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from importlib.metadata import distribution
from pathlib import Path

import claims
import yaml
from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from studies.files import versions, write_atomically

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "_build"
EXECUTED = BUILD / "executed"
STAGE = BUILD / "stage"
HTML = BUILD / "html"
STAMP = BUILD / "html.sha256"
KEYS = EXECUTED / "keys.json"
PACKAGES = ("mapkg", "studies")
SCRIPT = r'<script [^>]*src="([^"]*/(?:{})\.js[^"]*)"[^>]*></script>'
UNUSED = SCRIPT.format("scripts/fontawesome|searchtools|language_data|searchindex")
"""Scripts that the theme puts on each page: icons, which its style sheet has as a font, and what
only the page of search needs."""
LATER = r"""<script>addEventListener("load", () => {
document.head.append(Object.assign(document.createElement("script"), {src: "\1"})) })</script>"""
"""In place of MathJax's script, the largest by far: a page can be read before it has come."""
BESIDE_PAGES = ("book/references.bib", "book/emergence.png")


def main() -> int:
    """Build what is out of date; returns the exit status."""
    BUILD.mkdir(exist_ok=True)
    with FileLock(BUILD / "lock"):  # a second build waits for the first
        return build()


def build() -> int:
    """Build what is out of date, alone; returns the exit status."""
    pages = list(toc_pages(yaml.safe_load((ROOT / "_toc.yml").read_text())))
    notebooks = [page for page in pages if page.suffix == ".ipynb"]
    failed = execute(notebooks)
    if failed:
        print("\n\n".join(failed), file=sys.stderr)
        return 1
    stage(pages)
    shared = [ROOT / name for name in ("requirements.lock", *PACKAGES)]
    key = digest([STAGE, Path(__file__), *shared])
    if STAMP.is_file() and STAMP.read_text() == key and HTML.is_dir():
        print(f"the book is up to date: {HTML / 'index.html'}", file=sys.stderr)
        return 0
    STAMP.unlink(missing_ok=True)
    status = render()
    if status == 0:
        STAMP.write_text(key)
        print(f"built {HTML / 'index.html'}", file=sys.stderr)
    return status


def toc_pages(toc: dict) -> Iterator[Path]:
    """The source file of every page in the table of contents."""
    for entry in (toc["root"], *(c["file"] for p in toc.get("parts", ()) for c in p["chapters"])):
        found = [ROOT / f"{entry}{suffix}" for suffix in (".md", ".ipynb")]
        existing = [path for path in found if path.is_file()]
        if not existing:
            raise FileNotFoundError(f"_toc.yml names {entry}, but there is no {found[0]}")
        yield existing[0]


def execute(notebooks: list[Path]) -> list[str]:
    """Run the notebooks whose key changed, side by side; returns what failed."""
    # The last pages first: they train most, and none should be left to run alone.
    stale = [path for path in reversed(notebooks) if not is_current(path)]
    if not stale:
        return []
    import kernels  # only here, so that a build with nothing to do takes no second

    cores = os.cpu_count() or 1
    jobs = min(len(stale), cores)
    # One thread of arithmetic per notebook: pools of threads that share cores crawl.
    kernels.preload(stale, threads=max(1, cores // jobs))
    EXECUTED.mkdir(parents=True, exist_ok=True)
    keys, failures = executed_keys(), []
    with (
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=len(stale), desc="notebooks", file=sys.stderr) as bar,
    ):
        for path, failure in zip(stale, pool.map(run_notebook, stale), strict=True):
            bar.update()
            if failure is None:
                keys[path.name] = notebook_key(path)
                write_atomically(KEYS, json.dumps(keys, indent=1).encode())
            else:
                failures.append(failure)
    return failures


def is_current(notebook: Path) -> bool:
    """Whether the executed copy of a notebook is what a run would give now."""
    kept = executed_keys().get(notebook.name)
    return kept == notebook_key(notebook) and (EXECUTED / notebook.name).is_file()


def executed_keys() -> dict[str, str]:
    """The key with which each notebook was executed; none if they cannot be read."""
    try:
        return dict(json.loads(KEYS.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def run_notebook(path: Path) -> str | None:
    """Run one notebook through the strict runner; returns what failed, if anything did."""
    import kernels

    from studies import notebook

    try:
        notebook.run(
            path,
            EXECUTED / path.name,
            {},
            progress=False,
            kernel_manager_class=kernels.ForkedKernelManager,
        )
    except Exception as error:  # of a cell, or a kernel that died
        return f"{path.name}: {error}"
    return None


def notebook_key(path: Path) -> str:
    """Changes when the notebook, the package, the locked packages or its data do."""
    reads = json.loads(path.read_text())["metadata"].get("mapkg", {}).get("reads", [])
    missing = [name for name in reads if not (ROOT / name).exists()]
    if missing:
        raise FileNotFoundError(f"{path.name} reads {', '.join(missing)}, which is not there")
    return digest([path, *(ROOT / name for name in (*PACKAGES, "requirements.lock", *reads))])


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 over names and contents of files, and of all files in folders."""
    total = hashlib.sha256()
    for path in paths:
        total.update(_contents(path))
    return total.hexdigest()


@cache  # the package is part of every key
def _contents(path: Path) -> bytes:
    total = hashlib.sha256()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        if file.is_file() and "__pycache__" not in file.parts:
            total.update(str(file.relative_to(ROOT)).encode())
            total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.digest()


def stage(pages: list[Path]) -> None:
    """Lay out what Jupyter Book reads: pages, executed notebooks, configuration, statics."""
    shutil.rmtree(STAGE, ignore_errors=True)
    every = claims.read(EXECUTED)
    for page in pages:
        name = page.relative_to(ROOT)
        of_page = every.get(name.as_posix())
        (STAGE / name).parent.mkdir(parents=True, exist_ok=True)
        if page.suffix == ".ipynb":
            text = published((EXECUTED / page.name).read_text(), of_page)
        else:
            text = page.read_text()
            text = claims.with_box(text, of_page) if of_page else text
        (STAGE / name).write_text(text)
    for name, more in {"api": api(), "status": status(pages), "intro": ()}.items():
        page = STAGE / "book" / f"{name}.md"
        page.write_text(page.read_text().replace("<!-- verdicts -->", claims.tables(every)))
        with page.open("a") as file:
            file.writelines(more)
    for name in ("_config.yml", "_toc.yml", *BESIDE_PAGES):
        shutil.copy(ROOT / name, STAGE / name)
    # Pages load MathJax from the site itself: the site must work without a network.
    package = distribution("sphinx-mathjax-offline")
    scripts = [file for file in package.files or () if file.name == "tex-svg.js"]
    # Not "_static": Jupyter Book would load every script in a folder of that name once more.
    shutil.copytree(ROOT / "book" / "assets", STAGE / "assets")
    shutil.copy(package.locate_file(scripts[0]), STAGE / "assets" / "tex-svg.js")


def api() -> Iterator[str]:
    """The page of the API after its introduction: the library in full, the studies by title."""
    modules = {package: sorted((ROOT / package).rglob("*.py")) for package in PACKAGES}
    for path in modules["mapkg"]:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.name != "__init__.py":
            directive = f".. automodule:: {name}\n   :members:"
            yield f"\n## {name}\n\n```{{eval-rst}}\n{directive}\n```\n"
    yield "\n## studies\n\n| module | what it is for |\n|---|---|\n"
    for path in modules["studies"]:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        purpose = ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]
        yield f"| `{name}` | {purpose} |\n"


def status(pages: Iterable[Path]) -> Iterator[str]:
    """The page of versions and run times after its introduction."""
    yield f"\n{versions()}\n\n| page | seconds |\n|---|---|\n"
    for page in pages:
        if page.suffix == ".ipynb":
            ran = json.loads((EXECUTED / page.name).read_text())["metadata"]["papermill"]
            yield f"| [](../notebooks/{page.name}) | {ran['duration']:.0f} |\n"


def published(text: str, of_page: list[dict[str, str]] | None) -> str:
    """An executed notebook with its box, without what belongs to the machine it ran on.

    That is papermill's record of paths and times, and stderr: progress bars and warnings.
    """
    book = json.loads(text)
    if of_page:
        first = book["cells"][0]
        first["source"] = claims.with_box("".join(first["source"]), of_page)
    for part in (book, *book["cells"]):
        part["metadata"].pop("papermill", None)
    for cell in book["cells"]:
        if "outputs" in cell:
            cell["outputs"] = [o for o in cell["outputs"] if o.get("name") != "stderr"]
    return json.dumps(book, indent=1)


def render() -> int:
    """Run Jupyter Book on the staging folder, warnings as errors; returns the exit status."""
    import kernels

    output, log = STAGE / "_build", BUILD / "render.log"
    # What autodoc needs is imported in the server already, if a notebook was run.
    status = kernels.run_jupyter_book(["build", str(STAGE), "-W", "-n", "--keep-going", "-q"], log)
    if status != 0:
        print(log.read_text(), file=sys.stderr)
        return status
    with ThreadPoolExecutor() as pool:
        list(pool.map(lighten, output.glob("html/_images/*.png")))
    for page in output.glob("html/*/*.html"):
        text = re.sub(UNUSED, "", page.read_text())
        text = re.sub(SCRIPT.format("tex-svg"), LATER, text)
        page.write_text(re.sub(r'<img [^>]*src="([^"]+)"', partial(sized, page), text))
    shutil.rmtree(HTML, ignore_errors=True)
    shutil.move(output / "html", HTML)
    shutil.rmtree(output)
    return 0


def lighten(image: Path) -> None:
    """Give an opaque picture a palette of 256 colors, a third of the bytes."""
    picture = Image.open(image).convert("RGBA")
    if picture.getextrema()[3] == (255, 255):
        drawn = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        drawn.save(image, optimize=True)


def sized(page: Path, tag: re.Match[str]) -> str:
    """The beginning of an image's tag with its size, so that nothing moves as it comes, late."""
    if not tag[1].endswith(".png"):
        return tag[0]
    width, height = Image.open(page.parent / tag[1]).size
    return f'{tag[0]} width="{width}" height="{height}" loading="lazy"'


if __name__ == "__main__":
    sys.exit(main())
