"""What the pages say of the tracked results on bond types and attribution."""

import pandas as pd
import pytest
import yaml
from conftest import REPOSITORY

from studies.bond_type_tables import EXPERIMENTS, ON_ZINC, RUNS, late_means, read_bonds
from studies.data import BUNDLED
from studies.explanations import read_explanations
from studies.results import contrasts

RESULTS = BUNDLED / "results"
TYPES = ["single", "double", "triple"]


@pytest.fixture(scope="module")
def shares():
    return read_bonds(RESULTS, "shares", RUNS)


@pytest.fixture(scope="module")
def first(shares):
    """First layer, best epoch, by type of bond, on ZINC, at the usual threshold."""
    rows = shares.query("state == 'best' and layer == 0 and by == 'type' and threshold == 1000")
    return rows[rows["run"].isin(ON_ZINC.values())]


@pytest.fixture(scope="module")
def explained():
    return read_explanations(
        RESULTS, {"gt_zinc": "GT", "graphit_zinc": "GraphiT", "san_zinc": "SAN"}
    )


@pytest.fixture(scope="module")
def first_layers():
    """The first layer of networks trained on changed data, at every epoch that was kept."""
    return read_bonds(RESULTS, "first_layer", {name: name for name in EXPERIMENTS})


@pytest.fixture(scope="module")
def late(first_layers):
    return late_means(first_layers)


@pytest.fixture(scope="module")
def losses():
    table = read_bonds(RESULTS, "losses", {name: name for name in EXPERIMENTS})
    return table.query("state == 'best'").set_index(["run", "seed"]).sort_index()


def wide(rows, value="share"):
    return rows.pivot(index=["run", "seed"], columns="label", values=value)[TYPES]


def test_every_run_is_one_that_the_workflow_looks_at(shares):
    grid = yaml.safe_load((REPOSITORY / "workflow" / "grid.yaml").read_text())
    pairs = {name: grid["defaults"] | pair for name, pair in grid["pairs"].items()}
    assert {name for name, pair in pairs.items() if pair["by"]} == set(RUNS)
    for name, title in RUNS.items():
        rows = shares[shares["run"] == title]
        assert set(rows["config"]) == {pairs[name]["config"]}
        assert set(rows["by"]) == set(pairs[name]["by"])
        assert set(rows["seed"]) == {0, 1, 2}
        assert rows[["dataset", "epoch", "versions", "commit"]].notna().all(axis=None)
    assert {name for name, pair in pairs.items() if pair["explain"]} == set(ON_ZINC)


def test_the_test_split_has_the_published_counts_of_bonds(first):
    counts = wide(first, "edges").drop_duplicates()
    assert counts.to_numpy().tolist() == [[37_050, 12_542, 128]]
    assert set(wide(first, "graphs")["triple"]) == {60}


def test_seven_of_nine_networks_have_them_in_the_first_layer_and_least_on_triple_bonds(first):
    table = wide(first)
    having = table[(table > 0).any(axis=1)]
    assert len(table) == 9
    assert len(having) == 7
    assert (having["triple"] < having[["single", "double"]].max(axis=1)).all()
    assert (having["triple"] <= having.min(axis=1)).all()
    assert (having["triple"] > 0).sum() == 2
    nearly_doubles_alone = having[having["single"] < 0.01]
    assert len(nearly_doubles_alone) == 1
    assert nearly_doubles_alone["double"].item() > 0.7


def test_no_triple_bond_is_above_the_thresholds_of_the_published_figures(shares):
    rows = shares.query("state == 'best' and layer == 0 and by == 'type' and threshold > 1000")
    rows = rows[rows["run"].isin(ON_ZINC.values())]
    assert set(rows["threshold"]) == {3000, 4000}
    assert rows.query("label == 'triple'")["massive_edges"].sum() == 0
    assert (
        rows.query("run == 'GraphiT, ZINC' and seed == 2 and label != 'triple'")["share"] > 0
    ).all()


def test_on_thousands_of_triple_bonds_it_is_as_on_zinc():
    rows = read_bonds(RESULTS, "shares", {"graphit_unused": "GraphiT"})
    assert set(rows["looked_at"]) == {"unused.smi"}
    triple = rows.query("layer == 0 and threshold == 1000 and label == 'triple'").set_index("seed")
    assert triple["edges"].tolist() == [25_788] * 3
    assert triple["massive_edges"].gt(0).tolist() == [False, False, True]
    assert 0.4 < triple["share"][2] < 0.5
    assert (triple["share_bound"][:2] < 1 / 4000).all()


def test_rings_of_six_come_before_bonds_in_no_ring_with_six_of_seven_networks(shares):
    rows = shares.query("state == 'best' and layer == 0 and by == 'ring' and threshold == 1000")
    rows = rows[rows["run"].isin(ON_ZINC.values())]
    table = rows.pivot(index=["run", "seed"], columns="label", values="share")
    table = table[(table > 0).any(axis=1)]
    assert len(table) == 7
    assert (table["in a ring of 6"] > table["in no ring"]).sum() == 6


def test_conjugated_bonds_come_before_others_with_five_of_seven_networks(shares):
    rows = shares.query(
        "state == 'best' and layer == 0 and by == 'conjugation' and threshold == 1000"
    )
    rows = rows[rows["run"].isin(ON_ZINC.values())]
    table = rows.pivot(index=["run", "seed"], columns="label", values="share")
    table = table[(table > 0).any(axis=1)]
    assert len(table) == 7
    assert (table["conjugated"] > table["not conjugated"]).sum() == 5


def test_shares_on_proteins_are_none_one_direction_or_both(shares):
    rows = shares.query("state == 'best' and layer == 0 and threshold == 1000")
    rows = rows[rows["run"] == "GT, PROTEINS (TU)"]
    assert set(rows["share"]) == {0.0, 0.5, 1.0}


def test_at_every_epoch_the_weights_and_training_molecules_say_the_shares(first_layers):
    rows = first_layers[first_layers["label"].isin(TYPES)]
    rows = rows[rows["state"].str.startswith("epoch")]
    error = (rows["measured"] - rows["predicted"]).abs()
    assert error[rows["label"] != "triple"].max() < 0.02
    assert error.max() < 0.2  # few edges


def test_intervals_over_molecules_are_narrower_than_the_differences_of_networks(first):
    common = first[first["label"] != "triple"]
    assert (common["share_high"] - common["share_low"]).max() < 0.03
    spread = common.groupby(["run", "label"])["share"].agg(lambda s: s.max() - s.min())
    assert spread.median() > 0.3


def test_untrained_networks_have_none_and_neither_has_any_on_tox21(shares):
    assert shares.query("state == 'base'")["massive_edges"].sum() == 0
    assert shares[shares["run"].str.endswith("TOX21")]["massive_edges"].sum() == 0


def test_carbon_with_carbon_has_them_most_often_with_five_of_seven_networks(shares):
    rows = shares.query(
        "state == 'best' and layer == 0 and threshold == 1000 and by == 'atom pair'"
    )
    table = rows[rows["run"].isin(ON_ZINC.values())].pivot(
        index=["run", "seed"], columns="label", values="share"
    )
    table = table[(table > 0).any(axis=1)]
    assert len(table) == 7
    assert (table.idxmax(axis=1) == "C–C").sum() == 5
    edges = rows.groupby("label")["edges"].max()
    assert edges.idxmax() == "C–C"
    assert edges.max() > edges.sum() / 2


def test_the_first_layer_follows_from_its_weights():
    weights = read_bonds(RESULTS, "first_layer", ON_ZINC).query("state == 'best'")
    assert (weights["measured"] - weights["predicted"]).abs().max() < 0.03
    assert weights["heat_error"].max() < 0.02
    least = weights.groupby("label")["correlation"].min()
    assert least["single"] > 0.999
    assert least["double"] > 0.99
    assert least["triple"] > 0.95
    triples = weights.groupby(["run", "seed"])[["triples", "massive_triples"]].sum()
    assert set(triples["triples"]) == {95}
    assert triples["massive_triples"].max() < 30


def test_ratios_agree_with_frequency_in_seven_networks_and_with_no_attribution_in_all(explained):
    means = explained["correlation"].pivot(index="label", columns=["run", "seed"], values="mean")
    assert (means.loc["frequency"] > 0.5).sum() == 7
    assert (means.loc["frequency"] < 0).sum() == 2
    assert set(means.columns[means.loc["frequency"] < 0]) == {("GT", 0), ("GT", 1)}
    others = means.drop(index=["frequency", "random"])
    assert others.abs().max(axis=None) < 0.53
    assert others.abs().mean(axis=None) < 0.2
    assert not (others < 0).all(axis=1).any()


def test_deletion_in_the_order_of_ratio_frequency_and_mask(explained):
    areas = explained["areas"].assign(
        below=lambda t: t["difference_high"] < 0, above=lambda t: t["difference_low"] > 0
    )
    found = areas.groupby(["label", "order"])[["below", "above"]].sum()
    assert found.loc[("ratio", "descending"), "below"] == 7
    assert found.loc[("ratio", "ascending"), "above"] == 8
    assert found.loc[("frequency", "descending"), "below"] == 8
    assert found.loc[("frequency", "ascending"), "above"] == 9
    assert found.loc[("edge mask", "descending"), "above"] == 9
    assert found.loc[("edge mask", "ascending"), "below"] == 9


def test_replacing_massive_activations_hurts_where_there_are_many_and_controls_do_not(explained):
    rows = explained["interventions"]
    massive = rows.query("label == 'massive'").set_index(["run", "seed", "rule"])
    many = massive[massive["share"] > 1e-4]
    assert len(many.index.droplevel("rule").unique()) == 7
    replaced = many.query("rule != 'clip'")
    assert (replaced["loss_change_low"] > 0).all()
    assert 0.8 < (replaced["loss_change"] / replaced["loss_before"]).max() < 1
    clipped = many.query("rule == 'clip'")["loss_change"].droplevel("rule")
    removed = replaced.query("rule == 'zero'")["loss_change"].droplevel("rule")
    assert (clipped < removed).all()
    controls = rows.query("label != 'massive'")
    assert controls["loss_change"].abs().max() < 0.03
    shift = rows.pivot(index=["run", "seed", "rule"], columns="label", values="shift")
    removed = shift.loc[replaced.query("rule == 'zero'").index]
    assert (removed["massive"] > removed[["random", "largest non-massive"]].max(axis=1)).all()


def test_every_changed_run_is_one_that_the_workflow_trains():
    grid = yaml.safe_load((REPOSITORY / "workflow" / "grid.yaml").read_text())
    changed = {name: grid["defaults"] | pair for name, pair in grid["changed"].items()}
    assert set(changed) == set(EXPERIMENTS)
    for name, pair in changed.items():
        shares = read_bonds(RESULTS, "shares", {name: name})
        assert set(shares["config"]) == {pair["config"]}
        assert set(shares["by"]) == set(pair["by"])
        assert set(shares["seed"]) == set(pair["seeds"])
        assert shares["epoch"].max() <= pair["epochs"]
        assert shares["dataset"].nunique() == 1
        assert shares[["dataset", "epoch", "versions", "commit"]].notna().all(axis=None)


def test_without_meaning_every_type_has_larger_ratios(late, first_layers):
    found = contrasts(late, {kind: (("original", kind), ("shuffled", kind)) for kind in TYPES})
    assert (found["low"] > 1).all()
    assert (found["factor"] > 5).all()
    share = late.set_index(["run", "label", "seed"]).sort_index()
    assert (share["epochs"] == 4).all()
    assert (share.loc["shuffled"]["epochs_with"] > 0).all()
    assert (share.loc["shuffled"].loc[["single", "double"], "epochs_with"] == 4).all()
    kept = first_layers[first_layers["state"].str.startswith("epoch")]
    assert set(kept["epoch"]) == {0, 5, 10, 15, 20, 25, 30}
    as_they_are = kept[kept["run"] == "original"].set_index("label")["measured"]
    assert (as_they_are[["double", "triple"]] == 0).all()
    triple = kept[(kept["run"] == "original") & (kept["label"] == "triple")]
    assert (triple["triples"] == 3).all()


def test_other_windows_of_epochs_say_the_same(first_layers):
    pairs = {kind: (("original", kind), ("shuffled", kind)) for kind in TYPES}
    pairs |= {
        f"{kind} over triple": (("shuffled", "triple"), ("shuffled", kind))
        for kind in ("single", "double")
    }
    for since in (5, 10, 15, 20, 25):
        assert (contrasts(late_means(first_layers, since=since), pairs)["low"] > 1).all()


def test_among_meaningless_types_the_rare_one_has_the_smallest_ratios(late):
    pairs = {
        f"{kind} {run}": ((run, "triple"), (run, kind))
        for run in ("shuffled", "uniform")
        for kind in ("single", "double")
    }
    found = contrasts(late, pairs)
    shuffled, uniform = found.iloc[:2], found.iloc[2:]
    assert (shuffled["low"] > 1.5).all()
    assert (shuffled["factor"] > 4).all()
    assert (uniform["factor"] < 1.5).all()
    share = late.set_index(["run", "label", "seed"])["measured"].unstack("label").loc["shuffled"]
    assert (share["triple"] < share[["single", "double"]].min(axis=1)).all()


def test_gates_of_frequent_meaningless_types_shrink_and_those_of_informative_ones_grow(
    first_layers,
):
    gates = first_layers.pivot(
        index=["run", "label", "seed"], columns="state", values="gate_median"
    )
    grown = gates["best"] / gates["base"]
    assert (grown["shuffled"][["single", "double"]] < 0.8).all()
    assert (grown["original", "single"] < 0.8).all()
    assert (grown["original"][["double", "triple"]] > 1.5).all()
    moved = first_layers.query("state == 'best'").set_index(["run", "label", "seed"]).sort_index()
    for run in ("original", "shuffled"):
        of_run = moved["moved"][run].unstack("label")
        assert (of_run["triple"] > 0.8 * of_run[["single", "double"]].max(axis=1)).all()


def test_more_triple_bonds_have_larger_ratios_and_equally_frequent_types_are_alike(
    late, first_layers
):
    runs = first_layers[first_layers["run"].isin(["original", "triple", "equal"])]
    kinds = late_means(runs.assign(label=runs["label"].str.split().str[0]))
    more = contrasts(kinds, {"": (("original", "triple"), ("triple", "triple"))}).iloc[0]
    assert more["least"] > 1 > more["low"]
    pairs = {kind: (("equal", "triple"), ("equal", kind)) for kind in ("single", "double")}
    alike = contrasts(kinds, pairs)
    assert ((alike["low"] < 1) & (alike["factor"] < 2)).all()
    with_some = late[late["label"].str.startswith("triple")].groupby(["run", "seed"])
    with_some = with_some["epochs_with"].first()
    assert with_some["triple"].tolist() == [0, 2, 0]
    assert (with_some["equal"] > 0).sum() == 2
    edges = first_layers[first_layers["run"] == "triple"].groupby("label")["edges"].first()
    assert 0.04 < edges["triple"] / edges.sum() < 0.06


def test_a_target_of_a_rare_type_leaves_none_and_one_of_a_frequent_type_hardly_any(
    late, first_layers
):
    rare = first_layers[first_layers["run"] == "rare"]
    assert (rare["measured"] == 0).all()
    ratio = late.set_index(["run", "label", "seed"])["max_ratio"].unstack("label").loc["rare"]
    assert (ratio.dropna(axis=1).idxmin(axis=1) == "type 3 (5%), informative").all()
    pair = (("frequent", "type 3 (5%)"), ("frequent", "type 1 (70%), informative"))
    neither = contrasts(late, {"": pair}).iloc[0]
    assert neither["low"] < 1 < neither["high"]


def test_edges_of_the_global_node_and_what_shares_their_id_have_them(losses, late):
    shares = read_bonds(RESULTS, "shares", {name: name for name in EXPERIMENTS}).query(
        "state == 'best' and threshold == 1000"
    )
    hub = shares.query("run == 'global'").set_index(["layer", "label", "seed"]).sort_index()
    first = hub["share"][0]
    assert (first["global to atom"] > 0.99).all()
    assert (first["atom to global"] < 0.25).all()
    assert (first["double"] > 0.5).all()
    edges = hub["edges"][0]
    assert (edges["global to atom"] == edges["atom to global"]).all()
    deeper = hub["share"].drop(0)
    assert deeper[deeper.index.get_level_values("label").isin(TYPES)].max() < 0.005
    same_id = shares.query("run == 'global_triple' and by == 'role' and layer == 0")
    triple = same_id.query("label == 'triple'")
    assert triple["edges"].eq(128).all()
    assert triple["massive_edges"].eq(128).sum() == 2
    assert (triple["share"] > 0.5).all()
    lower = (
        1 - losses["loss"][["global", "global_triple"]].unstack(0).T / losses["loss"]["original"]
    )
    assert (lower > 0.2).all(axis=None)


def test_shuffled_types_raise_the_error_a_little(losses):
    raised = losses["loss"]["shuffled"] / losses["loss"]["original"] - 1
    assert (raised > 0).all()
    assert (raised < 1 / 8).all()
    assert (losses["loss"] < losses["constant"] / 2).all()


def test_the_pages_show_every_run_that_is_tracked():
    tracked = {path.name for path in RESULTS.glob("bonds_*")} | {
        path.name for path in RESULTS.glob("explain_*")
    }
    tables = ("shares", "heat", "parts", "first_layer", "losses")
    assert {name for name in tracked if name.startswith("explain_")} == {
        f"explain_{run}_{table}.csv.gz"
        for run in ON_ZINC
        for table in ("correlation", "curves", "areas", "interventions")
    }
    assert {
        f"bonds_{run}_{table}.csv.gz" for run in [*RUNS, *EXPERIMENTS] for table in tables
    } <= tracked
    assert all(len(pd.read_csv(RESULTS / name).columns) > 3 for name in tracked)
