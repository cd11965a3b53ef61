"""Bad inputs and faults, hundreds of them: is each refused in words, by our own code?

Each case runs in a process of its own. It is *clear* if it ends in an error of the kinds for bad
input that our code raises itself, in words (one line and exit status 2 from a command); *right* if
it states that nothing was lost; else *silent* (taken without a word), *bare* (an error of somebody
else's code), *hang* or *crash*. What is bad for a user's eye alone, misleading words, ``--words``
prints for reading::

    python benchmarks/campaign.py [--part NAME] [--words] [--out TABLE.csv]
"""

import argparse
import contextlib
import copy
import gzip
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.process import BaseProcess as Process
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GAT, GATConv
from tqdm import tqdm

import mapkg
from mapkg import (
    attack,
    attribution,
    evaluation,
    hooks,
    interventions,
    lipschitz,
    measures,
    nulls,
    oversmoothing,
)
from mapkg.models import Config, build
from studies import checkpoint, notebook, tables, train
from studies.__main__ import STUDIES, main
from studies.data import load, load_table, molecule_graph, read_smiles
from studies.published import CONFIGS

REPOSITORY = Path(__file__).parents[1]
KINDS = (ValueError, TypeError, KeyError, IndexError, OSError, ImportError, FloatingPointError)
LIMIT = 60  # seconds
SMALL = ["hidden_channels=16", "heads=2", "num_layers=2", "batch_size=4"]
TRAIN = ["train", "--config", "GT-ZINC", "--dataset", "moses", "--limit", "8"]
Case = tuple[str, Callable[[], object]]


class Right(Exception):
    """Raised by a case that was checked and lost nothing."""


def main_of(*arguments: object) -> Callable[[], object]:
    return lambda: main([str(a) for a in arguments])


def tiny(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    values = dict(hidden_channels=16, heads=2, num_layers=2, **changes)
    return build(CONFIGS["GT-ZINC"].replace(**values))


def molecules(number: int = 8) -> list[Data]:
    return copy.deepcopy(load("moses").train[:number])


def command_line() -> Iterator[Case]:
    """Options of every command, one at a time."""
    wrong = {
        "--config": ("", "GT", "gt-zinc ", "zinc", "../x"),
        "--dataset": ("", "zinnc", "cora", "citation", "trees-2", "trees-99", "."),
        "--seed": ("-1", "1.5", "x", "9" * 30),
        "--epochs": ("-1", "0.5", "ten", "1000000000", "1" + "0" * 30, ""),
        "--limit": ("0", "-3", "1" + "0" * 30, "all"),
        "--threads": ("0", "-1", "10000", "two"),
        "--device": ("gpu", "cuda:99", "", "cpu:x"),
        "--keep-every": ("0", "-2", "1" + "0" * 30),
        "--change": ("", "shuffle", "none"),
        "--set": (
            *("heads=0", "heads=eight", "heads=3", "hidden_channels=", "=3", "heads", "x=1"),
            *("lr=nan", "lr=-1", "lr=inf", "min_lr=1", "dropout=1", "dataset=zinc", "seed=1"),
            *("hidden_channels=0", "num_layers=-1", "loss=l2", "readout=median", "lr_factor=1"),
            *("batch_size=0", "num_layers=1" + "0" * 9, "architecture=gnn", "residual=maybe"),
            *("explicit_bias=yes", "attention=some", "score_bound=soft", "max_hours=0"),
            *("num_node_types=5", "num_edge_types=2", "score_dropout=1.5", "weight_decay=-1"),
        ),
        "--out": ("", "a-pipe", "a-file", "a-file/below"),
    }
    plain = dict(zip(TRAIN[1::2], TRAIN[2::2], strict=True)) | {"--epochs": "1", "--out": "run"}
    for option, values in wrong.items():
        for value in values:
            parts = [p for pair in (plain | {option: value}).items() for p in pair]
            if option != "--set":
                parts += ["--set", *SMALL]
            elif option == "--set":
                parts += [s for s in SMALL if s.split("=")[0] != value.split("=")[0]]
            yield f"train {option} {value[:12]}", main_of("train", *parts)
    for words in ("", "tran", "train --confg x", "study", "study bond", "data", "data nothing"):
        yield f"command {words!r}", main_of(*words.split())
    for name in ("../moses", "MOSES", "trees-1", "zinc-12k"):
        yield f"data {name}", main_of("data", name)
    for study in STUDIES:
        of_runs = [*STUDIES].index(study) < 8
        for words in ("", "--output x --no-such-option 1", "--output"):
            yield f"{study} {words}", main_of("study", study, *words.split())
        for folder in ("nowhere", "empty", "a-file", "damaged") if of_runs else ():
            further = () if study in ("emergence", "idle", "sink") else ("--dataset", "moses")
            whole = ("study", study, folder, "--output", "x", *further)
            yield f"{study} {folder}", main_of(*whole)
        if of_runs and study not in ("emergence",):
            for data in ("citation", "trees-2", "nothing"):
                whole = ("study", study, "run-0", "--output", "x", "--dataset", data)
                yield f"{study} of {data}", main_of(*whole)
        elif not of_runs and study not in ("laws", "trees", "mechanism"):
            for data in ("moses", "trees-2") if study != "untrained" else ("citation", "trees-2"):
                config = ("--config", "GT-ZINC") if study == "untrained" else ()
                whole = ("study", study, "--output", "x", "--dataset", data, *config)
                yield f"{study} of {data}", main_of(*whole)
    run = ("run", REPOSITORY / "notebooks/02_edge_attention.ipynb")
    for path in ("nowhere.ipynb", "a-file", "empty", "old.ipynb", "no-parameters.ipynb"):
        yield f"run {path}", main_of("run", path, "-o", "out.ipynb")
    for target in ("empty", "a-file/x.ipynb", "a-pipe", "read-only.ipynb", ""):
        yield f"run -o {target}", main_of(*run, "-o", target)
    yield "run without -o", main_of(*run)
    for name, text in (("head", "2"), ("heads", "two"), ("heads", "1.5"), ("edge_scale", "x")):
        yield f"run -p {name} {text}", main_of(*run, "-o", "out.ipynb", "-p", name, text)
    yield "run onto itself", _onto_itself


def _onto_itself() -> object:
    source = Path("mine.ipynb")
    shutil.copy(REPOSITORY / "notebooks/02_edge_attention.ipynb", source)
    return main(["run", str(source), "-o", str(source)])


def notebook_parameters() -> Iterator[Case]:
    """Each parameter of each page, out of its type and out of its range."""
    counts = "heads channels layers epochs graphs rows networks passes points size nodes dimensions"
    for path in sorted((REPOSITORY / "notebooks").glob("*.ipynb")):
        for name, parameter in notebook.parameters(path).items():
            bad = {"int": ["9" * 23, "1.5", "x"], "float": ["nan", "x"], "list": ["[]", "5"]}
            kind = next((k for k in bad if k in parameter.type), None)
            texts = bad.get(kind, [])
            if kind == "int" and "seed" not in name:
                texts = [*texts, "-7"]
            if kind == "int" and name.split("_")[-1] in counts.split() and name != "epochs":
                texts = [*texts, "0"]
            if kind == "float" and name not in ("edge_scale", "weight_decay", "shown_rate"):
                texts = [*texts, "-1"]
            if kind == "list" and "[" in parameter.default:
                texts = [*texts, "[[1]]", "[nan]"]
            for text in texts:
                what = lambda p=path, n=name, t=text: notebook.parse(p, [(n, t)])  # noqa: E731
                yield f"{path.stem[:2]} {name} {text[:8]}", what


def training() -> Iterator[Case]:
    """Graphs of one's own."""
    config = CONFIGS["GT-ZINC"].replace(
        hidden_channels=16, heads=2, num_layers=2, batch_size=4, max_epochs=1
    )

    def fit(change: Callable[[list[Data]], object], **settings: object) -> Callable[[], object]:
        def run() -> object:
            whole, graphs = load("moses"), molecules()
            graphs = change(graphs) or graphs
            splits = replace(whole, train=graphs, val=molecules(4), test=molecules(4))
            settings_now = config.replace(**settings)
            return train.fit(build(settings_now), splits, settings_now, progress=False)

        return run

    def each(**changes: Callable[[Data], object]) -> Callable[[list[Data]], None]:
        def apply(graphs: list[Data]) -> None:
            for name, change in changes.items():
                graphs[1][name] = change(graphs[1])

        return apply

    yield "no graphs", fit(lambda graphs: graphs.clear())
    yield "a generator", fit(lambda graphs: iter(graphs))
    yield "one graph", fit(lambda graphs: graphs[0])
    yield "not graphs", fit(lambda graphs: [1, 2, 3])
    yield "node ids too large", fit(each(x=lambda g: g.x + 1000))
    yield "node ids below 0", fit(each(x=lambda g: g.x - 100))
    yield "node ids as floats", fit(each(x=lambda g: g.x.float()))
    yield "node ids missing", fit(each(x=lambda g: None))
    yield "node ids of two columns", fit(each(x=lambda g: torch.stack([g.x, g.x], 1)))
    yield "edge ids too large", fit(each(edge_attr=lambda g: g.edge_attr + 1000))
    yield "edge ids short", fit(each(edge_attr=lambda g: g.edge_attr[:-2]))
    yield "edge ids missing", fit(each(edge_attr=lambda g: None))
    yield "edge ids as floats", fit(each(edge_attr=lambda g: g.edge_attr.float()))
    yield "edges as int32", fit(each(edge_index=lambda g: g.edge_index.int()))
    yield "edges as floats", fit(each(edge_index=lambda g: g.edge_index.float()))
    yield "edges out of range", fit(each(edge_index=lambda g: g.edge_index + 99))
    yield "edges below 0", fit(each(edge_index=lambda g: g.edge_index - 1))
    yield "edges transposed", fit(each(edge_index=lambda g: g.edge_index.t()))
    yield "edges missing", fit(each(edge_index=lambda g: None))
    yield "targets missing", fit(each(y=lambda g: None))
    yield "targets all NaN", fit(lambda gs: [g.update({"y": g.y * torch.nan}) for g in gs] and None)
    yield "targets infinite", fit(each(y=lambda g: g.y * torch.inf))
    yield (
        "targets beyond float32",
        fit(each(y=lambda g: torch.tensor([[1e300]], dtype=torch.double))),
    )
    yield "targets of two columns", fit(each(y=lambda g: torch.zeros(1, 2)))
    yield "targets as text", fit(each(y=lambda g: "high"))
    yield "targets above 1, BCE", fit(lambda graphs: None, loss="bce")
    for name, value in (("min_lr", 1.0), ("max_epochs", -1), ("num_layers", 0)):
        yield f"{name} {value}", fit(lambda graphs: None, **{name: value})

    def seeds(values: object, **further: object) -> Callable[[], object]:
        def run() -> object:
            whole = load("moses")
            splits = replace(whole, train=molecules(), val=molecules(4), test=molecules(4))
            return train.fit(build, splits, config, seeds=values, progress=False, **further)

        return run

    for values in ([], [0, 0], [1.5], "01"):
        yield f"seeds {values}", seeds(values)


def _damages(content: bytes) -> Iterator[tuple[str, bytes]]:
    """A file cut short, empty, of another kind, with a part overwritten."""
    for share in (0.1, 0.5, 0.9, 0.99):
        yield f"cut at {share}", content[: int(share * len(content))]
    yield "empty", b""
    yield "zeros", bytes(len(content))
    yield "another kind", b"%PDF-1.4 nothing\n" * 40
    yield "a web page", b"<!DOCTYPE html><html><body>Not found</body></html>"
    middle = len(content) // 2
    yield "overwritten", content[:middle] + bytes(64) + content[middle + 64 :]


def data_files() -> Iterator[Case]:
    """Tables of SMILES, tracked tables, and the raw files of published data sets."""
    good = b"split,smiles,y\ntrain,CCO,1.0\nval,CCN,2.0\ntest,CCC,3.0\n"

    def of(name: str, content: bytes, read: Callable[[Path], object]) -> Callable[[], object]:
        def run() -> object:
            Path(name).write_bytes(content)
            return read(Path(name))

        return run

    texts = {
        "column missing": good.replace(b"smiles", b"smile"),
        "column twice": good.replace(b"split", b"y", 1),
        "header alone": good.splitlines()[0],
        "no SMILES": good.replace(b"CCO", b"C(C"),
        "empty SMILES": good.replace(b"CCO", b""),
        "NaN target": good.replace(b"1.0", b"nan"),
        "infinite target": good.replace(b"1.0", b"1e999"),
        "beyond float32": good.replace(b"1.0", b"1e300"),
        "text target": good.replace(b"1.0", b"high"),
        "unknown split": good.replace(b"train", b"tain"),
        "a field more": good.replace(b"1.0", b"1.0,7"),
        "an atom without type": good.replace(b"CCO", b"[U]"),
        "a radical": good.replace(b"CCO", b"[CH2]C"),
        "two parts": good.replace(b"CCO", b""),
        "latin-1": good.replace(b"CCO", "CÖ".encode("latin-1")),
    }
    for what, content in [*texts.items(), *_damages(gzip.compress(good * 9))]:
        name = "t.csv" if what in texts else "t.csv.gz"
        if what == "zeros":
            name = "t.csv"
        yield f"table, {what}", of(name, content, load_table)
    for name in ("t.csv.gz", "t.csv.bz2", "t.csv.xz", "t.csv.zip", "t.csv.zst"):
        yield f"table that is no {name}", of(name, good, load_table)
    for text in (b"", b"C(C\n", b"NA\n", b"12\n", b"\n\n", b"\xff\xfe", b"CCO\n[U]\n"):
        yield f"SMILES {text!r}", of("s.smi", text, read_smiles)
    for smiles in ("", "C(C", None, 5, "[CH2]", "[H][H]", "*", "C.C" * 0):
        yield f"molecule {smiles!r}", lambda s=smiles: molecule_graph(s)
    tracked = next((REPOSITORY / "data/results").glob("emergence_*.csv.gz")).read_bytes()
    for what, content in _damages(tracked):
        name, kind = "emergence_x_summary.csv.gz", ("emergence", ["x"], "summary")
        yield f"tracked table, {what}", of(name, content, lambda p, k=kind: tables.read(".", *k))
    root = Path(os.environ.get("MAPKG_DATA", "nowhere"))
    for name, pattern in (
        *(("zinc-substitute", "zinc/zinc12k.csv.gz"), ("zinc", "zinc/zinc12k_official.csv.gz")),
        *(("tox21", "tox21/**/*.csv*"), ("proteins", "**/PROTEINS_A.txt")),
        *(("proteins", "**/PROTEINS_graph_labels.txt"), ("cora", "**/ind.cora.x")),
    ):
        for path in [p for p in sorted(root.glob(pattern)) if p.is_file()][:1]:
            for what, content in _damages(path.read_bytes()):
                yield f"{name}, {path.name} {what}", _raw(name, root, path, content)
    for place in ("nowhere", "a-file", ""):
        yield f"root {place!r}", lambda p=place: load("proteins", p or "empty", download=False)


def _raw(name: str, root: Path, path: Path, content: bytes) -> Callable[[], object]:
    def run() -> object:
        own = Path("root")
        for other in path.parent.iterdir():
            target = own / other.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(other.resolve())
        changed = own / path.relative_to(root)
        changed.unlink()
        changed.write_bytes(content)
        return load(name, own, download=False)

    return run


def checkpoints() -> Iterator[Case]:
    """Weights and descriptions, changed or damaged."""

    def changed(suffix: str, change: Callable[[bytes], bytes]) -> Callable[[], object]:
        def run() -> object:
            model = tiny()
            config = CONFIGS["GT-ZINC"].replace(hidden_channels=16, heads=2, num_layers=2)
            checkpoint.save("saved", model.state_dict(), config, seed=0)
            path = Path(f"saved{suffix}")
            path.write_bytes(change(path.read_bytes()))
            return checkpoint.load("saved")

        return run

    others = {
        "heads": 4, "residual": False, "readout": "sum", "attention": "uniform", "dropout": 0.5,
        "dataset": "tox21", "batch_norm": False, "explicit_bias": "sink", "score_bound": "clip",
    }  # fmt: skip

    def of_config(name: str, value: object) -> Callable[[bytes], bytes]:
        def change(content: bytes) -> bytes:
            values = json.loads(content)
            values["config"][name] = value
            return json.dumps(values, indent=1).encode()

        return change

    for name, value in others.items():
        yield f"description, {name}", changed(".json", of_config(name, value))
    yield "description, seed", changed(".json", lambda c: c.replace(b'"seed": 0', b'"seed": 1'))
    for place in (0.02, 0.3, 0.5, 0.7, 0.99):

        def flip(content: bytes, place: float = place) -> bytes:
            at = int(place * len(content))
            return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

        yield f"weights, a bit at {place}", changed(".safetensors", flip)
        yield f"description, a bit at {place}", changed(".json", flip)
    sample = next((REPOSITORY / "data/checkpoints").glob("*.json")).read_bytes()
    for suffix in (".safetensors", ".json"):
        for what, content in _damages(sample):
            yield f"{suffix} {what}", changed(suffix, lambda c, new=content: new)
    yield "NaN weights", _nan_weights


def _nan_weights() -> object:
    weights = {name: value * torch.nan for name, value in tiny().state_dict().items()}
    config = CONFIGS["GT-ZINC"].replace(hidden_channels=16, heads=2, num_layers=2)
    checkpoint.save("nan", weights, config, seed=0)
    return checkpoint.load("nan")


class _Output(nn.Module):
    """Gives what it is told to."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.inner, self.output = nn.Identity(), output

    def forward(self, batch: object) -> object:
        return self.inner(self.output)


def library() -> Iterator[Case]:
    """What a user of ``mapkg`` may pass by mistake."""
    loader = lambda: DataLoader(molecules(), 4)  # noqa: E731
    graph = lambda: molecules(1)[0]  # noqa: E731
    gat = lambda: GAT(8, 8, 2, 4, heads=2)  # noqa: E731
    models = {
        "None": lambda: None,
        "a function": lambda: torch.relu,
        "a class": lambda: GAT,
        "a dict": lambda: tiny().state_dict(),
        "a scripted model": lambda: torch.jit.script(nn.Sequential(nn.Linear(2, 2))),
    }
    for what, model in models.items():
        yield f"record of {what}", lambda m=model: hooks.record(m(), "*").__enter__()
        yield f"edit of {what}", lambda m=model: hooks.edit(m(), {"*": abs}).__enter__()
        yield f"report of {what}", lambda m=model: mapkg.report(m(), loader())
        yield f"lipschitz_normalise of {what}", lambda m=model: mapkg.lipschitz_normalise(m())
    yield "lipschitz_normalise of no attention", lambda: mapkg.lipschitz_normalise(nn.Linear(2, 2))
    for mode in ("", "papr", None):
        yield f"mode {mode}", lambda m=mode: mapkg.lipschitz_normalise(gat(), m)
    for scale in (0, -1, torch.nan, "big"):
        yield f"scale {scale}", lambda s=scale: mapkg.lipschitz_normalise(gat(), scale=s)
    for names in ("nothing", "layers.9", ["layers.0", "x"], None, 3, "*:sum"):
        yield f"record names {names}", lambda n=names: hooks.record(tiny(), n).__enter__()
    for names in ([], "nothing", 3):
        yield f"report names {names}", lambda n=names: mapkg.report(tiny(), loader(), names=n)
    for what, batches in {
        "None": lambda: None,
        "no batches": lambda: [],
        "numbers": lambda: [1, 2],
        "a graph": lambda: graph(),
        "texts": lambda: ["CCO"],
        "a batch without edges": lambda: [Data(x=torch.zeros(2).long())],
        "a path": lambda: Path("x"),
    }.items():
        action = lambda b=batches: mapkg.report(tiny(), b())  # noqa: E731
        yield f"report on {what}", (_right(action) if what == "a graph" else action)
    for what, value in {
        "a text": "high",
        "an empty output": torch.zeros(0, 4),
        "no channels": torch.zeros(4, 0),
        "complex numbers": torch.zeros(4, 2, dtype=torch.cfloat),
        "integers": torch.zeros(4, 2, dtype=torch.long),
        "booleans": torch.zeros(4, 2, dtype=torch.bool),
        "a sparse tensor": torch.eye(4).to_sparse(),
        "the meta device": torch.zeros(4, 2, device="meta"),
        "a number": torch.tensor(1.0),
        "a vector": torch.zeros(4),
        "four axes": torch.zeros(2, 2, 2, 2),
        "three axes": torch.randn(3, 9, 8),
        "nested tensors": torch.nested.nested_tensor([torch.zeros(2, 2), torch.zeros(3, 2)]),
        "NaN alone": torch.full((4, 2), torch.nan),
    }.items():
        action = lambda v=value: mapkg.report(_Output(v), [torch.zeros(1)], names="inner")  # noqa: E731
        is_said = what in ("NaN alone", "an empty output")  # by the verdict
        yield f"report on {what}", (_right(action) if is_said else action)
    for threshold in (0, -1, torch.nan, "high", None):
        yield (
            f"report threshold {threshold}",
            lambda t=threshold: mapkg.report(tiny(), loader(), threshold=t),
        )
        yield (
            f"is_massive threshold {threshold}",
            lambda t=threshold: mapkg.is_massive(torch.ones(2, 2), t),
        )
    for null in ([], [None], {}, 3, {"layers.0.score": []}):
        yield f"report null {null}", lambda n=null: mapkg.report(tiny(), loader(), null=n)
    for what, x in {
        "a list": [[1.0, 2.0]],
        "numpy": np.ones((2, 2)),
        "a vector": torch.ones(3),
        "no channels": torch.ones(3, 0),
        "integers": torch.ones(3, 2).long(),
        "complex": torch.ones(3, 2, dtype=torch.cfloat),
    }.items():
        yield f"activation_ratio of {what}", lambda v=x: mapkg.activation_ratio(v)
    for change in (
        *({"heads": 3}, {"heads": 0}, {"hidden_channels": 0}, {"architecture": "x"}, {"loss": "x"}),
        *({"num_layers": 0}, {"dropout": 1.0}, {"attention": "x"}, {"explicit_bias": "x"}),
        *({"score_bound": "x"}, {"lr": torch.nan}, {"nothing": 1}, {"num_node_types": 0}),
        *({"full_graph": True}, {"laplacian_encoding": True}, {"hidden_channels": 2.5}),
    ):
        yield f"config {change}", lambda c=change: build(CONFIGS["GT-ZINC"].replace(**c))
    yield "config from nothing", lambda: Config.from_dict({})
    yield (
        "config from a switch that is gone",
        lambda: Config.from_dict(CONFIGS["GT-ZINC"].to_dict() | {"unread_node_type": 3}),
    )
    quick = attack.Ascent(passes=1)
    for what, settings in {
        "sigma 0": dict(sigmas=[0.0]),
        "sigma NaN": dict(sigmas=[torch.nan]),
        "no sigmas": dict(sigmas=[]),
        "loss": dict(loss="l2"),
        "no restarts": dict(restarts=[]),
        "batch size": dict(batch_size=0),
        "masks": dict(masks={"x": None}),
    }.items():
        yield (
            f"attack, {what}",
            lambda s=settings: attack.attack(
                tiny(), molecules(4), **{"sigmas": [0.1], "progress": False, "ascent": quick} | s
            ),
        )
    yield "attack of nothing", lambda: attack.attack(tiny(), [], [0.1], ascent=quick)
    yield "attack of another network", lambda: attack.attack(gat(), molecules(4), [0.1])
    for name, value in (("lr", 0.0), ("passes", 0), ("patience", -1), ("lr", torch.nan)):
        yield f"ascent {name}", lambda n=name, v=value: attack.Ascent(**{n: v})
    yield (
        "intervene nowhere",
        lambda: interventions.intervene(
            tiny(), molecules(2), reference=molecules(2), layers="nothing"
        ),
    )
    yield (
        "intervene without graphs",
        lambda: interventions.intervene(tiny(), [], reference=molecules(2)),
    )
    yield (
        "heat map with short labels",
        lambda: attribution.heat_map(tiny(), molecules(2), [torch.zeros(1).long()] * 2, 3),
    )
    yield (
        "heat map with labels too large",
        lambda: attribution.heat_map(
            tiny(), molecules(1), [torch.full((molecules(1)[0].num_edges,), 9)], 3
        ),
    )
    for graphs in ([], [Data(x=torch.zeros(2).long())], [3], None):
        yield f"evaluate on {graphs}", lambda g=graphs: evaluation.evaluate(tiny(), g)
    for smooth in (
        lambda: oversmoothing.limits(torch.zeros(2, 3)),
        lambda: oversmoothing.limits(-torch.ones(3, 3)),
        lambda: oversmoothing.limits(torch.eye(3)),
        lambda: oversmoothing.relative_spread(torch.ones(3, 2), torch.ones(4)),
        lambda: oversmoothing.uniform_attention_limits(torch.tensor([[0], [1]]), 2),
    ):
        yield "oversmoothing of no such graph", smooth
    edges = torch.tensor([[0, 1], [1, 0]])
    for what, layer in {
        "edges of features": lambda: GATConv(4, 4, edge_dim=2),
        "not normalized": lambda: GATConv(4, 4),
        "another layer": lambda: nn.Linear(4, 4),
    }.items():
        yield f"bound, {what}", lambda la=layer: lipschitz.gat_bound(la(), edges, 2)
    yield (
        "bound, edges out of range",
        lambda: lipschitz.gat_bound(mapkg.lipschitz_normalise(GATConv(4, 4)), edges + 5, 2),
    )
    yield "null of no rows", lambda: nulls.ProductNull(8).exceedance(3.0, 0)
    yield "histogram backwards", lambda: measures.StreamingHistogram(2.0, 1.0, 8)


def _right(action: Callable[[], object]) -> Callable[[], object]:
    """Of something that is to be taken."""

    def run() -> object:
        action()
        raise Right

    return run


def _run(folder: str, said: str = "said") -> Process:
    """A training as a command makes it, in a process that can be killed."""
    process = get_context("fork").Process(target=_train, args=(folder, said))
    process.start()
    return process


def _train(folder: str, said: str) -> None:
    with open(said, "w") as file, contextlib.redirect_stderr(file):
        parts = ["--out", folder, "--threads", "1", "--epochs", "3", "--set", *SMALL]
        sys.exit(main([*TRAIN, *parts]))


def _ended(process: Process) -> int | None:
    process.join()
    return process.exitcode


def _same(folder: str) -> None:
    """The run's tables and weights equal those of the one that was not disturbed."""
    for name in ("best.safetensors", "last.safetensors"):
        if Path("run-0", name).read_bytes() != Path(folder, name).read_bytes():
            raise AssertionError(f"{name} differs from the undisturbed run")
    left = [p.name for p in Path(folder).iterdir() if p.name.endswith(".part")]
    if left:
        raise AssertionError(f"left behind: {left}")
    raise Right


def faults() -> Iterator[Case]:
    """Kills, damaged states, two processes, a full disk."""

    def killed(after: float) -> Callable[[], object]:
        def run() -> object:
            process = _run("run")
            process.join(after)
            process.kill()
            process.join()
            if _ended(_run("run")) != 0:
                raise AssertionError("the run could not go on")
            return _same("run")

        return run

    for tenths in range(1, 26):
        yield f"killed after {tenths / 10} s", killed(tenths / 10)

    def state(change: Callable[[bytes], bytes]) -> Callable[[], object]:
        def run() -> object:
            shutil.copytree("run-0", "run")
            path = Path("run/state.safetensors")
            path.write_bytes(change(path.read_bytes()))
            return main([*TRAIN, "--out", "run", "--epochs", "4", "--set", *SMALL])

        return run

    for place in np.linspace(0.001, 0.999, 24):

        def flip(content: bytes, place: float = place) -> bytes:
            at = int(place * len(content))
            return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]

        yield f"state, a bit at {place:.3f}", state(flip)
    for what, content in _damages(bytes(range(256)) * 400):
        yield f"state {what}", state(lambda c, new=content: new)
    for old, new in ((b'"epoch": 3', b'"epoch": 1'), (b'"lr": 0.0007', b'"lr": 0.0009')):
        yield (
            f"state {new!r}",
            state(
                lambda c, o=old, n=new: c.replace(o, n).replace(
                    o.replace(b'"', b'\\"'), n.replace(b'"', b'\\"')
                )
            ),
        )
    yield (
        "fewer epochs than there are",
        main_of(*TRAIN, "--out", "run-0", "--epochs", "2", "--set", *SMALL),
    )
    yield (
        "another network's folder",
        main_of(*TRAIN, "--out", "run-0", "--epochs", "4", "--set", *SMALL[:-1], "batch_size=2"),
    )

    def two() -> object:
        both = [_run("run", f"said-{number}") for number in (0, 1)]
        codes = sorted(map(_ended, both))
        said = Path("said-0").read_text() + Path("said-1").read_text()
        if codes != [0, 2] or "another process writes to it" not in said:
            raise AssertionError(f"{codes}: {said}")
        return _same("run")

    for number in range(3):
        yield f"two processes on one folder, {number}", two

    def full() -> object:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        return main([*TRAIN, "--out", "run", "--epochs", "1", "--set", *SMALL])

    yield "a file cannot grow", full
    for name in ("best.safetensors", "best.json", "run.json"):
        for study in ("bonds", "idle"):
            yield f"{study} without {name}", _without(study, name)
            yield f"{study} with {name} cut", _without(study, name, cut=True)


def _without(study: str, name: str, cut: bool = False) -> Callable[[], object]:
    def run() -> object:
        shutil.copytree("run-0", "run")
        path = Path("run", name)
        if not path.exists():
            raise Right  # no such file in a run
        path.write_bytes(path.read_bytes()[:50]) if cut else path.unlink()
        return main(["study", study, "run", "--dataset", "moses", "--limit", "4", "--output", "x"])

    return run


PARTS = {
    part.__name__: part
    for part in (
        command_line, notebook_parameters, training, data_files, checkpoints, library, faults
    )
}  # fmt: skip


def prepared(base: Path) -> None:
    """What cases find in their working folder: a finished run, and files that are none."""
    os.chdir(base)
    if _ended(_run("run-0")) != 0:
        raise SystemExit("the undisturbed run failed")
    Path("empty").mkdir()
    shutil.copytree("run-0", "damaged")
    for path in Path("damaged").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    Path("a-file").write_text("nothing of use\n")
    Path("read-only.ipynb").write_text("mine")
    Path("read-only.ipynb").chmod(0o400)
    Path("old.ipynb").write_text('{"nbformat": 3, "nbformat_minor": 0, "worksheets": []}')
    Path("no-parameters.ipynb").write_text(
        '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
    )


def judged(action: Callable[[], object], base: Path) -> dict[str, str]:
    """What became of one case, in a process of its own."""
    folder = Path(tempfile.mkdtemp(dir=base.parent))
    os.mkfifo(folder / "a-pipe")
    for entry in base.iterdir():
        copied = shutil.copytree if entry.is_dir() else shutil.copy
        copied(entry, folder / entry.name)
    answer = folder / ".answer"
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(folder)
        with contextlib.suppress(BaseException):
            answer.write_text(json.dumps(_outcome(action)))
        os._exit(0)
    end, status = time.monotonic() + LIMIT, None
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        shutil.rmtree(folder, ignore_errors=True)
        return {"outcome": "hang", "words": ""}
    result = {"outcome": "crash", "words": f"status {status}"}
    if answer.is_file():
        result = json.loads(answer.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    return result


def _outcome(action: Callable[[], object]) -> dict[str, str]:
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
            returned = action()
    except Right:
        return {"outcome": "right", "words": ""}
    except SystemExit as ended:
        returned = ended.code
    except BaseException as error:  # what a user would see
        frames = traceback.extract_tb(error.__traceback__)
        own = frames[-1].filename if frames and "raise" in frames[-1].line else ""
        is_ours = any(f"/{package}/" in own for package in ("mapkg", "studies"))
        words = f"{type(error).__name__}: {error}"
        is_clear = isinstance(error, KINDS) and is_ours and len(str(error).split()) > 3
        return {"outcome": "clear" if is_clear else "bare", "words": _line(words)}
    status = returned if isinstance(returned, int) else None
    if status == 2:
        text = printed.getvalue().strip()
        return {"outcome": "bare" if "Traceback" in text else "clear", "words": _line(text)}
    if status == 1:  # a notebook failed
        return {"outcome": "clear", "words": _line(printed.getvalue())}
    return {"outcome": "silent", "words": _line(repr(returned))}


def _line(text: str) -> str:
    return " ".join(text.split())[-300:]


def campaign() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--words", action="store_true", help="print what each case said")
    parser.add_argument("--out", type=Path, help="a table of all cases")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load("moses")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        base.mkdir()
        prepared(base)
        cases = [(part, *case) for part in options.part or PARTS for case in PARTS[part]()]
        for part, name, action in tqdm(cases, "cases", file=sys.stderr):
            rows.append({"part": part, "case": name, **judged(action, base)})
            bad = rows[-1]["outcome"] not in ("clear", "right")
            if bad or options.words:
                tqdm.write(" | ".join(rows[-1].values()), file=sys.stdout)
    table = pd.DataFrame(rows)
    if options.out:
        table.to_csv(options.out, index=False)
    print(pd.crosstab(table["part"], table["outcome"], margins=True))


if __name__ == "__main__":
    campaign()
