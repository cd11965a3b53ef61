"""Readings of the Explicit Bias Term: in a layer, on the record, and in trained networks."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.utils import scatter

from mapkg import hooks
from mapkg.all_measures import SUN_MAGNITUDE
from mapkg.evaluation import batches, predictions
from mapkg.measures import MASSIVE_RATIO, ActivationSummary
from mapkg.models import EdgeAttention, GraphNetwork, build
from mapkg.models.config import Config
from studies import tables
from studies.data import Splits
from studies.figures import THRESHOLD_LOOK, over_seeds, whole_ticks
from studies.laws import compare_laws
from studies.observation import summarise_scores
from studies.published import grid, margin
from studies.results import MODELS, ORIGIN, Emergence, read_emergence, read_network
from studies.statistics import contrasts, with_interval

READINGS = ("none", "intended", "overwritten", "sink", "sink, closed")
"""What ``readings`` compares; the last is a sink whose coefficient is minus infinity."""


def readings(
    model: GraphNetwork, graphs: Sequence[Data], *, seed: int = 0, scale: float = 1.0
) -> pd.DataFrame:
    """What a fresh term does to each layer of a trained network, in double precision.

    Every layer gets what it gets in the network, all ``graphs`` as one batch, and a term as at the
    start of a training: k', e' and v' standard normal, times ``scale``. ``to_plain``,
    ``to_shifted`` and ``to_mean`` are root mean squares of o minus o without the term, that plus
    v', and the mean of the neighbors' V plus v', over that of o without the term. ``key_gradient``
    and ``edge_gradient`` are the largest of the sum of o with respect to a projection's weights.
    """
    rows = []
    for layer, inputs in enumerate(_inputs(model, graphs)):
        plain = copy.deepcopy(model.layers[layer].attention).double().eval()
        generator = torch.Generator().manual_seed(seed)
        size, draw = (plain.heads, plain.head_channels), dict(generator=generator)
        names = ("key_term", "edge_term", "value_term")
        vectors = {n: scale * torch.randn(size, **draw, dtype=torch.float64) for n in names}
        (without, _), (x, (source, target), _) = plain(*inputs), inputs
        mean = scatter(plain.value(x)[source], target, dim_size=len(x), reduce="mean")
        shift, has_neighbors = vectors["value_term"].flatten(), target.unique()
        others = {"plain": without, "shifted": without + shift, "mean": mean + shift}
        size_of_output = without[has_neighbors].square().mean().sqrt()
        for reading in READINGS:
            attention = _with_term(plain, reading.partition(",")[0], vectors)
            edits = {"coefficient": lambda beta: torch.full_like(beta, -torch.inf)}
            with hooks.edit(attention, edits if reading == "sink, closed" else {}):
                attended, score = attention(*inputs)
            row = {"layer": layer, "reading": reading}
            for name, other in others.items():
                off = (attended - other)[has_neighbors].square().mean().sqrt() / size_of_output
                row[f"to_{name}"] = off.item()
            for name in ("key", "edge"):
                weight = getattr(attention, name).weight
                (gradient,) = torch.autograd.grad(
                    attended.sum(), weight, retain_graph=True, materialize_grads=True
                )
                row[f"{name}_gradient"] = gradient.abs().max().item()
            summary = ActivationSummary(heads=attention.heads)
            summary.update(score.detach())
            rows.append(row | {name: summary.statistics()[name] for name in SCORES})
    return pd.DataFrame(rows)


def _inputs(model: GraphNetwork, graphs: Sequence[Data]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What each layer is given, in double precision, all graphs in one batch."""
    names = ["node_embedding", "edge_embedding", *(f"layers.{i}" for i in range(len(model.layers)))]
    ((batch, seen),) = hooks.scan(model, batches(graphs, len(graphs)), names)
    x, edge_attr = (seen[name] for name in names[:2])
    for name in names[2:]:
        yield x.double(), batch.edge_index, edge_attr.double()
        x, edge_attr = seen[name]


def _with_term(plain: EdgeAttention, reading: str, vectors: dict[str, Tensor]) -> EdgeAttention:
    """The same layer with a term of that reading."""
    settings = dict(bias=plain.query.bias is not None, attention=plain.attention)
    channels = plain.heads * plain.head_channels
    attention = EdgeAttention(channels, plain.heads, explicit_bias=reading, **settings).double()
    terms = {name: vectors[name] for name, _ in attention.named_parameters() if name in vectors}
    attention.load_state_dict(plain.state_dict() | terms)
    return attention


def idle_term(
    model: GraphNetwork, config: Config, graphs: Sequence[Data], *, seed: int = 0
) -> pd.DataFrame:
    """What a term that no weight and no attended value can feel does to record and predictions.

    An intended one with k' and e' standard normal, e' less its mean within each head, and v' = 0:
    it adds zero to a summed score, clamp or no clamp. Predictions' ``largest_change`` is over their
    standard deviation.
    """
    if config.explicit_bias != "none":
        raise ValueError(f"config: expected no Explicit Bias Term, got {config.explicit_bias!r}")
    changed = build(config.replace(explicit_bias="intended"))
    changed.load_state_dict(model.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in changed.layers:
            attention = layer.attention
            attention.value_term.zero_()
            for term in (attention.key_term, attention.edge_term):
                term.copy_(torch.randn(term.shape, generator=generator))
            attention.edge_term -= attention.edge_term.mean(dim=-1, keepdim=True)
    before, after = (
        predictions(network, graphs, batch_size=config.batch_size)[0].double()
        for network in (model, changed)
    )
    change = ((after - before).abs().max() / before.std()).item()
    return pd.DataFrame(
        {"layer": layer, "term": term, **summary.statistics(), "largest_change": change}
        for term, network in ((False, model), (True, changed))
        for layer, summary in enumerate(summarise_scores(network, config, graphs))
    )


def idle_term_of_run(
    folder: Path | str,
    splits: Splits,
    *,
    seed: int = 0,  # of the term
) -> pd.DataFrame:
    """``idle_term`` of a finished run's best weights on the test split."""
    model, config, origin = read_network(folder, splits)
    return idle_term(model, config, splits.test, seed=seed).assign(**origin)


def with_and_without_term(table: pd.DataFrame) -> sns.FacetGrid:
    """Ratio, magnitude and median of each layer's scores, a row of panels per ``label``."""
    names = {"max_ratio": "largest ratio", "max_abs": "largest |s|", "row_median_q50": "median |s|"}
    long = table.melt(["label", "seed", "layer", "term"], [*names])
    long = long.sort_values("label", kind="stable")
    long["panel"] = long["label"] + ", " + long["variable"].map(names)
    long["term"] = long["term"].map({False: "without the term", True: "with it"})
    look = dict(x="layer", y="value", color="term", panel="panel", labels={"value": ""}, log="y")
    look |= dict(columns=3, palette=["#264653", "#E76F51"], sharing={"sharey": False})
    grid = over_seeds(long, **look)
    for ax in grid.axes[::3]:
        ax.axhline(MASSIVE_RATIO, **THRESHOLD_LOOK)
    whole_ticks(grid)
    return grid


def weight_on_sink(
    model: GraphNetwork, graphs: Sequence[Data], *, batch_size: int = 128
) -> pd.DataFrame:
    """How much of its attention a node gives to the sink, by its number of neighbors.

    ``share``, what the neighbors lack, is the mean over ``nodes`` and heads, ``least_head`` and
    ``most_head`` are the means of the heads that give least and most.
    """
    if any(layer.attention.explicit_bias != "sink" for layer in model.layers):
        raise ValueError("model: expected layers with a sink")
    parts, name = [], "layers.*.attention.attention_weight"
    for batch, seen in hooks.scan(model, batches(graphs, batch_size), name):
        target = batch.edge_index[1]
        number = torch.bincount(target, minlength=batch.num_nodes)
        for layer, weight in enumerate(seen.values()):
            share = 1 - scatter(weight.double(), target, dim_size=batch.num_nodes)  # [N, H]
            table = pd.DataFrame(share.numpy()).assign(layer=layer, neighbours=number.numpy())
            parts.append(table.query("neighbours > 0"))
    by_number = pd.concat(parts).groupby(["layer", "neighbours"])
    heads = by_number.mean()  # a column per head
    ends = {"least_head": heads.min(axis=1), "most_head": heads.max(axis=1)}
    columns = {"nodes": by_number.size(), "share": heads.mean(axis=1), **ends}
    return pd.DataFrame(columns).reset_index()


def weight_on_sink_of_run(folder: Path | str, splits: Splits) -> pd.DataFrame:
    """``weight_on_sink`` of a finished run's best weights on the test split."""
    model, config, origin = read_network(folder, splits)
    return weight_on_sink(model, splits.test, batch_size=config.batch_size).assign(**origin)


ARMS = {
    "none": "none",
    "bias": "biases",
    "published": "published + biases",
    "intended": "intended + biases",
    "term": "intended",
    "sink": "sink",
}
"""The readings that are trained, from names of files to titles."""

CONTRASTS = {
    "biases": (ARMS["none"], ARMS["bias"]),
    "term": (ARMS["none"], ARMS["term"]),
    "term beside biases": (ARMS["bias"], ARMS["intended"]),
    "published term": (ARMS["bias"], ARMS["published"]),
    "sink": (ARMS["none"], ARMS["sink"]),
}
"""What is compared with what, networks of the same seed; GT's published term is the intended."""

OTHERS = {
    "layernorm": "LayerNorm for BatchNorm",
    "decay": "weight decay 0.0001",
    "clip": "score clipped",
    "tanh": "tanh of the score",
    "dropout": "dropout on the score",
}
"""Other remedies that are trained."""

COUNTED = {"count": "neighbors counted", "countsink": "sink, neighbors counted"}
"""Controls of the sink, whose node types say how many neighbors a node has, see
``bond_changes.count_neighbors``."""

SAME = {"gt_zinc_intended": "gt_zinc_published"}
"""GT's published term is the intended one."""

SCORES = ("max_ratio", "share_rows_with_massive", "max_abs", "row_median_q50", "share_saturated")
LOGARITHMIC = ("max_ratio", "max_abs", "row_median_q50")
"""Those of the ``SCORES`` of a layer whose means are geometric."""


def compact(run: Emergence, fits: pd.DataFrame | None = None) -> dict[str, pd.DataFrame]:
    """Scores, metrics and ``laws.compare_laws`` of ``layers`` in two states, and of ``epochs``."""
    keys, states = ["seed", "layer", "state"], ("base", "best")
    if fits is None:
        chosen = run.histogram[run.histogram["state"].isin(states)]
        bins = chosen[[*keys, "bin", "low", "count"]].assign(run="")
        fits = compare_laws(bins, base=states[0])
    gamma = fits[fits["law"] == "gamma"][[*keys, "ks_own", "ks_base", "ks_two_sample"]]
    summary = run.summary[run.summary["state"].isin(states)]
    metrics = [name for name in summary if name.startswith("test_")]
    layers = summary[[*keys, *SCORES, *metrics, "best_epoch", *ORIGIN]]
    epochs = run.trajectory[["seed", "layer", "epoch", *SCORES, *ORIGIN]]
    return {"layers": layers.merge(gamma, on=keys, validate="one_to_one"), "epochs": epochs}


def compact_run(folder: Path | str) -> dict[str, pd.DataFrame]:
    """The compact tables of a finished run."""
    return compact(read_emergence(folder))


def read_remedies(
    folder: Path | str, data: str, arms: Mapping[str, str] = ARMS, models: Iterable[str] = MODELS
) -> dict[str, pd.DataFrame]:
    """The tracked tables of several networks, with architecture (``label``) and title (``run``)."""
    parts: dict[str, list[pd.DataFrame]] = {"layers": [], "epochs": []}
    for model, (arm, title) in product(models, arms.items()):
        pair = f"{model.lower()}_{data}"
        name = SAME.get(f"{pair}_{arm}", f"{pair}_{arm}")
        if arm == "none" and name not in grid():  # the grid of emergence has it, as long trained
            laws = pd.read_csv(Path(folder) / "laws.csv.gz").query("run == @pair")
            network = compact(read_emergence(folder, f"emergence_{pair}_"), laws)
        else:
            network = {kind: tables.read(folder, "remedy", [name], kind) for kind in parts}
        for kind, table in network.items():
            parts[kind].append(table.assign(label=model, run=title))
    return {kind: pd.concat(part, ignore_index=True) for kind, part in parts.items()}


def later_epochs(epochs: pd.DataFrame, *, keys: Sequence[str] = ()) -> pd.DataFrame:
    """What the scores are like over the second half of training, by network and ``keys``.

    Means over layers and epochs, geometric for ``LOGARITHMIC``; but ``largest``, the ratio, and
    ``max_abs`` are the largest of any layer, averaged over epochs, as is ``edges_with``, the share
    with a massive activation. ``epochs_with`` is the share of epochs in which any layer has one.
    """
    late = _later(epochs)
    by = ["label", "run", "seed", *keys]
    logs = late.assign(**{name: np.log(late[name]) for name in LOGARITHMIC})
    means = logs.groupby(by, sort=False)[list(SCORES)].mean()
    most = ["max_ratio", "max_abs", "share_rows_with_massive"]
    any_layer = logs.groupby([*by, "epoch"], sort=False)[most].max()
    any_layer.columns = ["largest", "max_abs", "edges_with"]
    any_layer["epochs_with"] = any_layer["edges_with"] > 0
    means = means.drop(columns="max_abs").join(any_layer.groupby(by, sort=False).mean())
    logarithmic = [*LOGARITHMIC, "largest"]
    means[logarithmic] = np.exp(means[logarithmic])
    return means.reset_index()


def _later(epochs: pd.DataFrame) -> pd.DataFrame:
    half = epochs.groupby(["label", "run", "seed"])["epoch"].transform("max") / 2
    return epochs[epochs["epoch"] > half]


def massive_layers(epochs: pd.DataFrame) -> pd.DataFrame:
    """Layers an epoch that are massive in the second half; Sun's rule with typical row medians."""
    late = _later(epochs)
    bar = (MASSIVE_RATIO * late["row_median_q50"]).clip(lower=SUN_MAGNITUDE)
    passed = {"row ratio": late["max_ratio"] > MASSIVE_RATIO, "Sun's rule": late["max_abs"] > bar}
    late = late.assign(**passed)
    keys, measures = ["label", "run", "seed"], ["row ratio", "Sun's rule"]
    by_epoch = late.groupby([*keys, "epoch"], sort=False)[measures].sum()
    return by_epoch.groupby(keys, sort=False).mean()


def against_arms(
    networks: pd.DataFrame, value: str, of: str, among: Mapping[str, tuple] = CONTRASTS
) -> pd.DataFrame:
    """``statistics.contrasts`` where there are both arms, by the margin of the grid."""
    pairs = {
        f"{label}, {title}": ((label, one), (label, other))
        for label, runs in networks.groupby("label", sort=False)["run"]
        for title, (one, other) in among.items()
        if {one, other} <= {*runs} and (label, title) != ("GT", "published term")
    }
    columns = ["factor", "low", "high", "holm", "alike", "verdict"]
    return contrasts(networks, pairs, value, margin(of))[columns]


def contrast_table(tests: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Results of ``against_arms`` for several values, as text side by side."""
    parts = {}
    for value, test in tests.items():
        ends = test[["factor", "low", "high"]].itertuples(index=False)
        factor = [f"{f:.2f} [{low:.2f}, {high:.2f}]" for f, low, high in ends]
        p = test["holm"].map("{:.2f}".format)
        parts[value] = test.assign(factor=factor, p=p)[["factor", "p", "verdict"]]
    return pd.concat(parts, axis=1)


def by_network(remedies: Mapping[str, pd.DataFrame], metric: str) -> pd.DataFrame:
    """``later_epochs`` of each network with ``test_METRIC`` at its best epoch."""
    keys = ["label", "run", "seed"]
    best = remedies["layers"].query("state == 'best'")
    metrics = best.groupby(keys, sort=False)[[f"test_{metric}"]].first().reset_index()
    return metrics.merge(later_epochs(remedies["epochs"]), on=keys, validate="one_to_one")


def typical_scores(networks: pd.DataFrame) -> pd.DataFrame:
    """Geometric means over seeds of ``by_network``, a row per architecture and arm."""
    logs = np.log(networks.set_index(["label", "run"])[[*LOGARITHMIC, "largest"]])
    return np.exp(logs.groupby(level=[0, 1]).mean())


def remedy_table(remedies: Mapping[str, pd.DataFrame], metric: str) -> pd.DataFrame:
    """What remedies do and what they cost, as text, a row per architecture and arm.

    The metric, mean over seeds with its 95 % t interval; ranges over seeds of ``later_epochs``.
    """
    keys = ["label", "run"]
    networks = by_network(remedies, metric)
    networks["max_abs"] = networks["max_abs"].map("{:.3g}".format).astype(float)  # 1,100, not 1,099
    by_arm = networks.groupby(keys, sort=False)[f"test_{metric}"]
    table = by_arm.agg(with_interval, form="{:.3f}").to_frame("test score")
    for title, name, form in (
        ("epochs with one", "epochs_with", ".0%"),
        ("largest ratio", "largest", ",.0f"),
        ("largest |s|", "max_abs", ",.6g"),
        ("median |s|", "row_median_q50", ".2g"),
    ):
        ranges = tables.over_seeds(networks, name, rows=keys, statistic="range", form=form)
        table[title] = ranges[name]
    return table.rename_axis(["network", "arm"])


def arms(
    late: pd.DataFrame, values: Mapping[str, str], *, logarithmic: Sequence[str] = ()
) -> sns.FacetGrid:
    """Values of networks with different remedies (``run``), a row of panels per architecture.

    A dot is a seed; a line is at the mean over seeds, the geometric one on a logarithmic axis.
    """
    order = list(late["run"].unique())
    height = 0.6 + 0.2 * len(order)
    long = late.melt(["label", "run", "seed"], list(values), var_name="quantity")
    size = dict(height=height, aspect=2.2 / height, sharex="col", margin_titles=True)
    grid = sns.FacetGrid(long, row="label", col="quantity", **size)
    for (_, value), ax in grid.axes_dict.items():
        ax.set_xscale("log" if value in logarithmic else "linear")
    look = dict(x="value", y="run", hue="run", order=order, hue_order=order, palette="colorblind")
    grid.map_dataframe(sns.stripplot, **look, jitter=False, alpha=0.8, size=4.5)
    grid.map_dataframe(sns.pointplot, **look, errorbar=None, marker="|", markersize=9)
    grid.set_titles(row_template="{row_name}", col_template="").set_axis_labels("", "")
    for (_, value), ax in grid.axes_dict.items():
        if value == "largest":
            ax.axvline(MASSIVE_RATIO, **THRESHOLD_LOOK)
        if value in logarithmic:  # often less than a decade; of more than two, labels have no room
            low, high = ax.get_xlim()
            ax.xaxis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 3)))
            powers = high > 10_000 * low  # of ten, beside which 10000 and 1e+06 would read badly
            ax.xaxis.set_major_formatter(LogFormatterSciNotation() if powers else "{x:g}")
            ax.xaxis.set_minor_formatter(NullFormatter())
    for ax, title in zip(grid.axes[-1], values.values(), strict=True):
        ax.set_xlabel(title)
    return grid
