"""Claims and verdicts: the box of each page and the tables of the front page, of one file.

``claims.yaml`` has the words. What stands in braces is filled in from the page: from the dict of
texts that its cell tagged ``claims`` ends with. So a number cannot be typed wrong.
"""

import ast
import json
from pathlib import Path

import yaml

FILE = Path(__file__).with_name("claims.yaml")
BADGES = {
    "reproduced": "success",
    "partly": "warning",
    "not reproduced": "danger",
    "open": "secondary",
    "new": "info",  # a question of this book, not a claim of a paper
}

Claims = dict[str, list[dict[str, str]]]
"""The claims of each page, by its file, with the keys that ``claims.yaml`` explains."""


def read(executed: Path) -> Claims:
    """All claims, with the numbers of the executed pages in a folder."""
    claims = yaml.safe_load(FILE.read_text())
    for page, of_page in claims.items():
        numbers = of(executed / Path(page).name)
        for claim in of_page:
            for text in ("number", "found"):
                filled = claim.get(text, "").format(**numbers)
                claim[text] = filled.replace(" %", "\N{NO-BREAK SPACE}%")
            claim["badge"] = f"{{bdg-{BADGES[claim['verdict']]}}}`{claim['verdict']}`"
    return claims


def of(executed: Path) -> dict[str, str]:
    """What an executed page says of its claims: the value of its cell tagged ``claims``, if any."""
    cells = json.loads(executed.read_text())["cells"] if executed.suffix == ".ipynb" else []
    tagged = [cell for cell in cells if "claims" in cell["metadata"].get("tags", ())]
    texts = ["".join(cell["outputs"][-1]["data"]["text/plain"]) for cell in tagged]
    return ast.literal_eval(texts[0]) if texts else {}


def with_box(source: str, claims: list[dict[str, str]]) -> str:
    """A page, or its first cell, with the box "In one minute" under its title."""
    title, _, rest = source.partition("\n")
    text = "{badge} **{claim}**\n\n{number} {found} *What would change our mind:* {doubt}"
    box = "\n\n".join(text.format(**each) for each in claims)
    return f"{title}\n\n:::{{admonition}} In one minute\n:class: claims\n{box}\n:::\n{rest}"


def tables(claims: Claims) -> str:
    """The verdicts on what the papers claim, and answers to what they do not ask, each short."""
    rows = {"verdict": [], "new": []}
    for page, of_page in claims.items():
        link = f"[page\N{NO-BREAK SPACE}{Path(page).stem.partition('_')[0]}](../{page})"
        for each in of_page:
            rows["new" if each["verdict"] == "new" else "verdict"].append(
                f"| {each['claim']} | {each['badge']} | {each['number']} | {link} |\n"
            )
    head = "| {} | verdict | what we find | page |\n|---|---|---|---|\n"
    papers, ours = (head.format(name) for name in ("claim of a paper", "question of this book"))
    return papers + "".join(rows["verdict"]) + "\n" + ours + "".join(rows["new"])
