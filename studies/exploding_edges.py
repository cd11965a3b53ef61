r"""The edges that explode: where single scores of a GraphTransformer reach thousands, and why.

The score of an edge is linear in its own features e, and the edge stream is fed with the score:

.. math::
    s = \frac{K_j \odot Q_i}{\sqrt d} \odot E e, \qquad
    u = \mathrm{norm}_1(e + O s), \qquad e' = \mathrm{norm}_2(u + \mathrm{FFN}(u)) .

The clamp comes after the score, in the attention weight, and so bounds nothing here.
"""

from collections.abc import Callable, Sequence
from functools import partial

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch_geometric.data import Data

from mapkg import hooks
from mapkg.evaluation import batches, predict
from studies.data import directions, to_molecule
from studies.figures import THRESHOLD_LOOK
from studies.statistics import equivalence, paired
from studies.viewer import draw_molecule

EXPLODING = 100.0
"""An edge explodes where the magnitude of its score exceeds this, the first half of Sun's rule."""

SCORES = "layers.*.attention.score"

STREAM = {
    "score": "attention.score",
    "projected": "edge_block.project",
    "norm 1": "edge_block.batch_norm1",
    "feed-forward": "edge_block.contract",
    "norm 2": "edge_block.batch_norm2",
}
"""What an edge's features pass in a layer, by the name in figures."""


def largest_scores(model: nn.Module, graphs: Sequence[Data]) -> pd.DataFrame:
    """The largest magnitude of the score of each edge, a column per layer, and where the edge is.

    ``atom`` is what the edge enters and ``neighbors`` how many that atom has; ``ring`` is the
    size of the smallest ring of the bond, and ``largest_ring`` of the molecule, 0 for none.
    """
    passes = hooks.scan(model, batches(graphs, 128), SCORES)
    scores = [torch.stack([s.abs().amax(1) for s in seen.values()], dim=1) for _, seen in passes]
    places = [row for number, graph in enumerate(graphs) for row in _places(number, graph)]
    return pd.DataFrame(places).join(pd.DataFrame(torch.cat(scores).numpy()))


def _places(number: int, graph: Data) -> list[dict[str, int | str]]:
    molecule, rows = to_molecule(graph), []
    rings = molecule.GetRingInfo()
    for source, target in graph.edge_index.t().tolist():
        atom, bond = molecule.GetAtomWithIdx(target), molecule.GetBondBetweenAtoms(source, target)
        is_saturated = atom.GetSymbol() == "C" and str(atom.GetHybridization()) == "SP3"
        row = {"graph": number, "source": source, "target": target}
        row["atom"] = "saturated carbon" if is_saturated else "another atom"
        row |= {"neighbors": atom.GetDegree(), "ring": rings.MinBondRingSize(bond.GetIdx())}
        rows.append(row | {"largest_ring": max(map(len, rings.AtomRings()), default=0)})
    return rows


def exploding(edges: pd.DataFrame) -> pd.Series:
    """Whether each edge explodes in any layer."""
    return (edges[_layers(edges)] > EXPLODING).any(axis=1)


def _layers(edges: pd.DataFrame) -> list[int]:
    return [name for name in edges if isinstance(name, int)]


def share_by(edges: pd.DataFrame, by: str) -> pd.DataFrame:
    """Edges and molecules of each value of a column, and how many of the edges explode."""
    groups = edges.assign(exploding=exploding(edges)).groupby(by)
    table = groups.agg(edges=("exploding", "size"), exploding=("exploding", "sum"))
    table["molecules"] = groups["graph"].nunique()
    return table.assign(share=table["exploding"] / table["edges"])


def scores_by_layer(edges: pd.DataFrame) -> pd.DataFrame:
    """Quantiles over edges of the largest magnitude of the score, a row per layer."""
    table = edges[_layers(edges)].quantile([0.5, 0.99, 0.999, 1]).T
    return table.set_axis(["median", "99 %", "99.9 %", "largest"], axis=1)


def along_the_stream(model: nn.Module, graph: Data, edge: int) -> pd.DataFrame:
    """Norms of what one edge passes, and the median over all edges of its molecule, by layer."""
    names = [f"layers.*.{part}" for part in STREAM.values()]
    ((_, seen),) = hooks.scan(model, batches([graph], 1), names)
    rows = []
    for layer in range(len(seen) // len(STREAM)):
        for step, part in STREAM.items():
            norm = seen[f"layers.{layer}.{part}"].norm(dim=1)
            rows.append((layer, step, norm[edge].item(), norm.median().item()))
    return pd.DataFrame(rows, columns=["layer", "step", "this edge", "median edge"])


def _batch_norm(module: nn.BatchNorm1d, x: Float[Tensor, "E D"]) -> Float[Tensor, "E D"]:
    """The output of a BatchNorm, as the statistics of this batch would have it."""
    spread = x.std(dim=0, correction=0) * module.weight.sign()
    return (x - x.mean(dim=0)) / spread * module.weight + module.bias


def without(model: nn.Module, graphs: Sequence[Data], first: int) -> pd.DataFrame:
    """The largest score in each layer, with parts of the edge stream changed from ``first`` on."""
    layers = range(first, len(model.layers))
    blocks = {f"layers.{i}.edge_block": model.layers[i].edge_block for i in layers}
    norms = {
        f"{name}.batch_norm{k}": getattr(b, f"batch_norm{k}")
        for name, b in blocks.items()
        for k in (1, 2)
    }
    changes: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
        "nothing": {},
        "the feed-forward map": {f"{name}.contract": torch.zeros_like for name in blocks},
        "the score in the stream": {f"{name}.project": torch.zeros_like for name in blocks},
        "fixed statistics of BatchNorm": {n: partial(_batch_norm, m) for n, m in norms.items()},
    }
    rows = {}
    for name, edits in changes.items():
        largest: dict[str, float] = {}
        with hooks.edit(model, edits):
            for _, seen in hooks.scan(model, batches(graphs, 128), SCORES):
                for score, x in seen.items():
                    largest[score] = max(largest.get(score, 0), x.abs().max().item())
        rows[name] = list(largest.values())
    return pd.DataFrame(rows).T.rename_axis(index="without", columns="layer")


TREATMENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "clipped": lambda score, mask: score[mask].clamp(-EXPLODING, EXPLODING),
    "averaged": lambda score, mask: score[~mask].mean(dim=0).expand(int(mask.sum()), -1),
    "swapped": lambda score, mask: score[mask].roll(1, dims=0),
}
"""What may take the place of the score of chosen edges, from the score and their mask. It is
clipped, the mean over all other edges of the batch, or that of the next such edge."""


def treat(
    model: nn.Module, graphs: Sequence[Data], edges: pd.DataFrame, *, first: int, seed: int = 0
) -> pd.DataFrame:
    """Errors of molecules with exploding edges, as they are and treated, a row per molecule.

    ``edges`` is of ``largest_scores``. Treated are scores of the layers from ``first`` on, of
    the ``exploding`` edges, and as a control of as many ``other`` edges of the same molecules.
    """
    explode = exploding(edges)
    numbers = edges.loc[explode, "graph"].unique()
    if len(numbers) < 2:
        raise ValueError(
            f"expected two molecules or more with a score above {EXPLODING:g}, got {len(numbers)} "
            f"of {len(graphs)}; look at more molecules"
        )
    inside = edges["graph"].isin(numbers)
    generator = torch.Generator().manual_seed(seed)
    chosen = {"exploding": torch.tensor(explode[inside].to_numpy())}
    others = (~chosen["exploding"]).nonzero().flatten()
    drawn = others[torch.randperm(len(others), generator=generator)[: int(explode.sum())]]
    chosen["other"] = torch.zeros_like(chosen["exploding"]).index_fill(0, drawn, True)
    few = [graphs[number] for number in numbers]
    layers = [f"layers.{i}.attention.score" for i in range(first, len(model.layers))]

    def errors(change: Callable[[Tensor, Tensor], Tensor] | None, mask: Bool[Tensor, " E"]):
        found, start = [], 0
        for batch in batches(few, 256):
            of_batch = mask[start : (start := start + batch.num_edges)]

            def edit(score: Tensor, of_batch: Tensor = of_batch) -> Tensor:
                treated = score.clone()
                treated[of_batch] = change(score, of_batch)
                return treated

            edits = dict.fromkeys(layers, edit) if change else {}
            with torch.no_grad(), hooks.evaluating(model), hooks.edit(model, edits):
                found.append((predict(model, batch) - batch.y).flatten())
        return torch.cat(found).abs().numpy()

    rings = edges.groupby("graph")["largest_ring"].first().loc[numbers].to_numpy()
    before = errors(None, chosen["other"])
    about = {"graph": numbers, "largest_ring": rings, "before": before}
    rows = [
        pd.DataFrame({"treatment": name, "edges": which, **about, "after": errors(change, mask)})
        for name, change in TREATMENTS.items()
        for which, mask in chosen.items()
    ]
    return pd.concat(rows, ignore_index=True)


def effects(treated: pd.DataFrame, margin: float) -> pd.DataFrame:
    """Mean change of the error by treatment, with its interval, and whether it is equivalent.

    ``margin`` is a share of the error before, within which a change counts as none.
    """
    rows = {}
    for key, part in treated.groupby(["treatment", "edges"], sort=False):
        change = part["after"] - part["before"]
        test = equivalence(change, margin * part["before"].mean())
        rows[key] = {"before": part["before"].mean(), "after": part["after"].mean()}
        rows[key] |= dict(list(paired(change).items())[:3])
        rows[key]["equivalent"] = test["equivalent"]
    return pd.DataFrame(rows).T.infer_objects().rename_axis(["treatment", "edges"])


def overview(edges: pd.DataFrame, graphs: Sequence[Data], number: int) -> Figure:
    """A molecule, its exploding bonds marked, and the scores of all edges by layer."""
    largest = edges[_layers(edges)].max(axis=1)
    of_bond = largest[edges["graph"] == number].to_numpy()[directions(graphs[number]).numpy()]
    notes = [f"{score:,.0f}" if score > EXPLODING else "" for score in of_bond.max(axis=0)]
    look = dict(figsize=(10, 3.6), width_ratios=(1.25, 1), layout="constrained")
    figure, (left, right) = plt.subplots(1, 2, **look)
    draw_molecule(to_molecule(graphs[number]), left, bond_notes=notes)
    long = scores_by_layer(edges).rename_axis("layer").reset_index().melt("layer", var_name="edges")
    look = dict(hue="edges", style="edges", dashes=False, markers=True, palette="flare")
    sns.lineplot(long, x="layer", y="value", **look, ax=right)
    right.axhline(EXPLODING, **THRESHOLD_LOOK)
    right.set(yscale="log", ylabel="largest |score| of an edge")
    right.legend(title=None)
    return figure
