"""What the readings of the Explicit Bias Term do to a layer, without training anything."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import seaborn as sns
import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.utils import scatter

from mapkg import hooks
from mapkg.evaluation import batches, predict, predictions
from mapkg.measures import MASSIVE_RATIO, ActivationSummary
from mapkg.models import EdgeAttention, GraphNetwork, build
from mapkg.models.config import Config
from mapkg.models.edge_attention import SCORE_CLAMP
from studies.data import Splits
from studies.figures import THRESHOLD_LOOK
from studies.observation import summarise_scores
from studies.results import read_network

READINGS = ("none", "intended", "overwritten", "sink", "sink, closed")
"""What ``readings`` compares; the last is a sink whose coefficient is minus infinity."""

_Inputs = tuple[Tensor, Tensor, Tensor]


def readings(
    model: GraphNetwork, graphs: Sequence[Data], *, seed: int = 0, scale: float = 1.0
) -> pd.DataFrame:
    """What a fresh term does to each layer of a trained network, in double precision.

    Every layer is given what it is given in the network, all ``graphs`` as one batch, and a term
    as at the start of a training: k', e' and v' standard normal, times ``scale``. Its own weights
    stay as they are.

    A row per layer and reading, see ``READINGS``. Columns are

    - ``to_plain``: root mean square, over nodes with neighbors and channels, of o - (o of the
      layer without the term), over that of o without it;
    - ``to_shifted``: the same for o - (o without the term + v');
    - ``to_mean``: the same for o - (mean of the neighbors' V + v');
    - ``key_gradient``, ``edge_gradient``: largest magnitude of the gradient of the sum of o with
      respect to the weights of the key and edge projections;
    - statistics of the recorded score as in ``ActivationSummary``, and ``max_abs_sum``, the
      largest magnitude of the summed score of a head, before the clamp.
    """
    attentions = [getattr(layer, "attention", None) for layer in model.layers]
    rows = []
    for layer, inputs in enumerate(_inputs(model, graphs)):
        plain = copy.deepcopy(attentions[layer]).double().eval()
        generator = torch.Generator().manual_seed(seed)
        size = plain.heads, plain.head_channels
        vectors = {
            name: scale * torch.randn(size, generator=generator, dtype=torch.float64)
            for name in ("key_term", "edge_term", "value_term")
        }
        without, _ = plain(*inputs)
        mean = _mean_value(plain, inputs)
        shift = vectors["value_term"].flatten()
        neighbours = torch.isin(torch.arange(len(mean)), inputs[1][1])
        scale_of_output = without[neighbours].square().mean().sqrt()
        for reading in READINGS:
            attention = _with_term(plain, reading.partition(",")[0], vectors)
            edits = {"coefficient": lambda beta: torch.full_like(beta, -torch.inf)}
            with hooks.edit(attention, edits if reading == "sink, closed" else {}):
                found, score = attention(*inputs)
            others = {"plain": without, "shifted": without + shift, "mean": mean + shift}
            row = {"layer": layer, "reading": reading}
            for name, other in others.items():
                off = (found - other)[neighbours].square().mean().sqrt() / scale_of_output
                row[f"to_{name}"] = off.item()
            rows.append(row | _gradients(attention, found) | _of_score(attention, score))
    return pd.DataFrame(rows)


def with_idle_term(model: GraphNetwork, config: Config, *, seed: int = 0) -> GraphNetwork:
    """The same network with an intended term that no weight and no attended value can feel.

    k' and e' are standard normal, e' less its mean within each head, and v' is zero. What the
    term adds to a summed score is then zero but for rounding, clamp or no clamp; only the
    recorded score differs. (The edge stream of GT is fed by the score, so there the next layers
    do differ.)

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
    return changed.train(model.training)


def idle_term(
    model: GraphNetwork, config: Config, graphs: Sequence[Data], *, seed: int = 0
) -> pd.DataFrame:
    """What ``with_idle_term`` does to what is recorded, and to what is predicted.

    A row per layer, and for ``term`` being False and True, with the statistics of
    ``ActivationSummary`` and ``largest_change``, the largest magnitude of the change of a
    prediction by the term, over the standard deviation of the predictions.
    """
    changed = with_idle_term(model, config, seed=seed)
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


def weight_on_sink(
    model: GraphNetwork, graphs: Sequence[Data], *, batch_size: int = 128
) -> pd.DataFrame:
    """How much of its attention a node gives to the sink, by its number of neighbours.

    The weights of a node and of its sink add up to 1, but for the small number in the denominator,
    so that what the neighbours lack is the sink's. A softmax without a sink cannot tell one
    neighbour from two alike; with one, two take more from the sink.

    A row per layer and number of ``neighbours`` (1 or more): how many ``nodes`` have so many;
    ``share``, the weight of the sink, mean over these nodes and over heads; and ``least_head`` and
    ``most_head``, the mean over nodes of the heads that have least and most.
    """
    for number, layer in enumerate(model.layers):
        attention = getattr(layer, "attention", None)
        if getattr(attention, "explicit_bias", None) != "sink":
            raise ValueError(f"model: expected layers with a sink, but layer {number} has none")
    found = []
    name = "layers.*.attention.attention_weight"
    for batch, seen in hooks.scan(model, batches(graphs, batch_size), name, forward=predict):
        target = batch.edge_index[1]
        neighbours = torch.bincount(target, minlength=batch.num_nodes)
        for layer, weight in enumerate(seen.values()):
            share = 1 - scatter(weight.double(), target, dim_size=batch.num_nodes)  # [N, H]
            table = pd.DataFrame(share.numpy()).assign(layer=layer, neighbours=neighbours.numpy())
            found.append(table[table["neighbours"] > 0])
    by_neighbours = pd.concat(found).groupby(["layer", "neighbours"])
    heads = by_neighbours.mean()  # a column per head
    return pd.DataFrame(
        {
            "nodes": by_neighbours.size(),
            "share": heads.mean(axis=1),
            "least_head": heads.min(axis=1),
            "most_head": heads.max(axis=1),
        }
    ).reset_index()


def weight_on_sink_of_run(folder: Path | str, splits: Splits) -> pd.DataFrame:
    """``weight_on_sink`` of a finished run's best weights on the test split."""
    model, config, origin = read_network(folder, splits)
    return weight_on_sink(model, splits.test, batch_size=config.batch_size).assign(**origin)


def _inputs(model: GraphNetwork, graphs: Sequence[Data]) -> Iterator[_Inputs]:
    """What each layer is given, in double precision, all graphs in one batch."""
    names = ["node_embedding", "edge_embedding", *(f"layers.{i}" for i in range(len(model.layers)))]
    ((batch, seen),) = hooks.scan(model, batches(graphs, len(graphs)), names, forward=predict)
    x, edge_attr = (seen[name] for name in names[:2])
    for name in names[2:]:
        yield x.double(), batch.edge_index, edge_attr.double()
        x, edge_attr = seen[name]


def _with_term(plain: EdgeAttention, reading: str, vectors: dict[str, Tensor]) -> EdgeAttention:
    attention = EdgeAttention(
        plain.heads * plain.head_channels,
        plain.heads,
        bias=plain.query.bias is not None,
        attention=plain.attention,
        explicit_bias=reading,
    ).double()
    terms = {name: vectors[name] for name, _ in attention.named_parameters() if name in vectors}
    attention.load_state_dict(plain.state_dict() | terms)
    return attention


def _mean_value(attention: EdgeAttention, inputs: _Inputs) -> Tensor:
    """The mean over neighbours of V, [N, D]; 0 for a node without any."""
    x, (source, target), _ = inputs
    value = attention.value(x)
    total = torch.zeros_like(value).index_add(0, target, value[source])
    count = torch.bincount(target, minlength=len(x)).clamp(min=1)
    return total / count.unsqueeze(-1)


def _gradients(attention: EdgeAttention, attended: Tensor) -> dict[str, float]:
    modules = {"key": attention.key, "edge": attention.edge}
    found = {}
    for name, module in modules.items():
        if module is None:
            found[f"{name}_gradient"] = float("nan")
            continue
        (gradient,) = torch.autograd.grad(
            attended.sum(), module.weight, retain_graph=True, allow_unused=True
        )
        found[f"{name}_gradient"] = 0.0 if gradient is None else gradient.abs().max().item()
    return found


def _of_score(attention: EdgeAttention, score: Tensor) -> dict[str, float]:
    summary = ActivationSummary(heads=attention.heads, clamp=SCORE_CLAMP)
    summary.update(score.detach())
    statistics = summary.statistics()
    names = ("max_ratio", "share_rows_with_massive", "max_abs", "row_median_q50", "share_saturated")
    sums = attention.split_heads(score.detach()).sum(dim=-1)
    return {name: statistics[name] for name in names} | {"max_abs_sum": sums.abs().max().item()}


def with_and_without_term(table: pd.DataFrame) -> sns.FacetGrid:
    """Ratio, magnitude and median of each layer's scores, from ``idle_term`` of networks.

    A row of panels per network, ``label``, and a line for each ``seed``.
    """
    names = {
        "max_ratio": "largest ratio",
        "max_abs": "largest |s|",
        "row_median_q50": "typical median |s|",
    }
    shown = table.rename(columns=names).replace(
        {"term": {False: "without the term", True: "with it"}}
    )
    long = shown.melt(["label", "seed", "layer", "term"], list(names.values()))
    grid = sns.relplot(
        long,
        kind="line",
        x="layer",
        y="value",
        hue="term",
        palette=["#264653", "#E76F51"],
        units="seed",
        estimator=None,
        row="label",
        col="variable",
        marker=".",
        height=1.9,
        aspect=1.35,
        facet_kws=dict(sharey="col", margin_titles=True),
    )
    grid.set(yscale="log", ylabel="")
    grid.set_titles(col_template="{col_name}", row_template="{row_name}")
    for ax in grid.axes[:, 0]:
        ax.axhline(MASSIVE_RATIO, **THRESHOLD_LOOK)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    grid.legend.set_title(None)
    return grid
