"""What README and book tell a reader to type can be typed."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GCN

from studies import notebook
from studies.__main__ import parser
from studies.commands import overrides

PAGES = [
    path
    for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "book").glob("*.md")))
    if "```" in path.read_text()
]


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def commands(path):
    lines = "".join(blocks(path, "sh")).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_command_is_one_that_exists(path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    targets = re.findall(r"^([a-z]+):.*##", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    for words in commands(path):
        words = [word for word in words if not word.startswith("MAPKG_DATA=")]
        if words[0] == "make":
            assert words[1] in targets
            assert all(re.match(r"(CORES|WHAT)=\w+$", word) for word in words[2:]), words
        elif words[0].endswith("/snakemake"):
            given = [word for word in words[1:] if word.startswith("workflow/")]
            assert given and all((REPOSITORY / path).exists() for path in given), words
        elif words[1:3] == ["-m", "studies"]:
            parsed = vars(parser(words[3:]).parse_args(words[3:]))  # exits on an unknown option
            if words[3] == "run":
                notebook.parse(parsed["notebook"], parsed.get("parameter", ()))
            overrides(parsed.get("set", ()))
        else:
            assert Path(words[1]).is_file(), f"{path.name}: {' '.join(words)}"


def test_the_commands_of_the_pages_are_found():
    assert sum(len(commands(path)) for path in PAGES) >= 10


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_python_example_runs(path, capsys):
    for example in blocks(path, "python"):
        torch.manual_seed(0)
        graph = Data(x=torch.randn(20, 8), edge_index=torch.randint(20, (2, 60)))
        names = dict(  # what an example may take for granted
            model=GCN(in_channels=8, hidden_channels=16, num_layers=2),
            loader=DataLoader([graph]),
        )
        exec(compile(example, path.name, "exec"), names)
        if "report(" not in example:
            scores = names["model"](graph.x, graph.edge_index)
            assert scores.isfinite().all() and len(scores) == 20
            continue
        verdicts = re.findall(r"^convs\.\d:message +none: up to ", capsys.readouterr().out, re.M)
        assert len(verdicts) >= 2, "a report has a line for each layer"


def test_every_file_that_is_linked_from_the_readme_is_there():
    text = (REPOSITORY / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (REPOSITORY / target).is_file(), target
