"""Tables: how they are written, read and summed up, studies of trainings, the tracked ones."""

import gzip
import re
from collections import Counter
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image

from mapkg.measures import NEG_LOG_RATIO_BINS, StreamingHistogram
from mapkg.models import build
from mapkg.models.config import Config
from mapkg.nulls import ProductNull
from studies import bond_types, checkpoint, explanations, explicit_bias, results, robustness
from studies.commands import make
from studies.data import BUNDLED, load
from studies.emergence import examine_checkpoint
from studies.files import sha256, write_atomically
from studies.laws import compare_laws
from studies.published import CONFIGS, titles
from studies.results import (
    TABLES,
    Emergence,
    by_measure,
    count_types,
    networks_with,
    read_emergence,
    with_spread,
)
from studies.tables import over_seeds, read, run_study, styled, write

RESULTS = BUNDLED / "results"
SHIPPED = BUNDLED / "checkpoints" / "gt_moses_seed0"
KEYS = ["run", "seed", "layer", "state"]
ORIGIN = {"config": "GT-ZINC", "changes": "none", "dataset": "ZINC", "epochs": 100}
ORIGIN |= {"versions": "torch 2.13.0", "commit": "a" * 40}


def test_a_table_is_compressed_csv_of_six_digits_and_the_same_bytes_anywhere(tmp_path):
    table = pd.DataFrame({"name": ["a", "b, c"], "value": [1 / 3, 123456789.0], "count": [1, 2]})
    paths = [tmp_path / "new" / "table.csv.gz", tmp_path / "other.csv.gz"]
    for path in paths:
        write(path, table.set_index(pd.Index([7, 9])))
    first, second = (path.read_bytes() for path in paths)
    text = gzip.decompress(first).decode()
    assert text == 'name,value,count\na,0.333333,1\n"b, c",1.23457e+08,2\n'
    assert first == second, "gzip can store a file's name"
    assert first[4:8] == bytes(4), "and here the time of writing"
    values = 10 ** np.random.default_rng(0).uniform(-12, 12, 500)
    write(paths[0], pd.DataFrame({"value": values, "gap": np.nan}))
    write(paths[1], pd.read_csv(paths[0]))
    assert paths[0].read_bytes() == paths[1].read_bytes(), "read and written again"


def test_values_over_seeds_stand_in_the_order_of_the_table():
    rows = [("b", "y", 1.0), ("b", "y", 4.0), ("b", "x", 2.0), ("a", "x", 9.0), ("a", "y", np.nan)]
    table = pd.DataFrame(rows, columns=["row", "column", "value"])
    look = dict(rows=["row"], columns=["column"], form=".1f")
    found = over_seeds(table, "value", **look)
    assert found.values.tolist() == [["2.5 [1.0, 4.0]", "2.0 [2.0, 2.0]"], ["-", "9.0 [9.0, 9.0]"]]
    assert (found.index.tolist(), found.columns.tolist()) == (["b", "a"], ["y", "x"])
    spans = over_seeds(table, "value", statistic="range", **look)
    assert spans.loc["b"].tolist() == ["1.0 to 4.0", "2.0"]


def cells(values, form=None):
    return re.findall(r"<td[^>]*>(.*)</td>", styled(pd.DataFrame(values), form).to_html())


def test_cells_show_yes_and_no_and_rounded_numbers_that_stay_on_a_line():
    values = {"factor": [1234.56, np.nan], "massive": [True, False]}
    assert cells(values, "{:,.1f}") == ["1,234.6", "yes", "–", "no"]
    texts = ["0.95 [0.90, 1.01]", "-1 to 2", "three words here", "1" * 9 + " " * 12, "74–79"]
    found = cells({"a": texts})
    assert [" " in cell for cell in found] == [False, False, True, True, False]
    assert found[:2] == ["0.95\xa0[0.90,\xa01.01]", "-\u20601\xa0to\xa02"]
    assert found[4] == "74–\u206079"


def test_headers_of_a_styled_table_are_in_words_and_take_their_formats_along():
    table = pd.DataFrame({"max_abs": [2.5]}, index=pd.Index([3], name="num_layers"))
    by_state = pd.concat({"best_epoch": table}, axis=1, names=["the_state"])
    for shown, form in ((table, {"max_abs": "{:.3f}"}), (by_state, "{:.3f}")):
        heads = re.findall(r"<th[^>]*>([^<&]+)</th>", (page := styled(shown, form).to_html()))
        assert "layers" in heads and "largest |s|" in heads and ">2.500</td>" in page
        assert not any("_" in head for head in heads)


def test_types_are_counted_in_every_split():
    splits, counts = load("moses"), count_types(load("moses"))
    for (split, kind), part in counts.groupby(["split", "kind"]):
        key = "x" if kind == "atom" else "edge_attr"
        ids = Counter(i for graph in getattr(splits, split)[:] for i in graph[key].tolist())
        assert +Counter(part.set_index("id")["count"].to_dict()) == ids
    assert counts.groupby(["split", "kind"]).ngroups == 6


def test_pages_call_runs_by_the_titles_of_the_grid():
    assert titles("grid")["gt_zinc"] == "GT, ZINC" and titles("variants")["gt_zinc"] == "GT"
    with pytest.raises(ValueError, match="group gird: did you mean grid"):
        titles("gird")


def trainings(log, seeds=(0, 1), scale=None):
    def train(seed):
        log.append(seed)
        return {"loss": seed + 0.123456789}, pd.DataFrame({"epoch": [1, 2], "value": [0.5, seed]})

    about = {"norm": "none", "scale": scale}
    return [({**about, "seed": seed}, lambda seed=seed: train(seed)) for seed in seeds]


@pytest.fixture
def study(tmp_path):
    """Does some trainings; those that are written under a prefix are not done again."""

    def run(some):
        prefix = tmp_path / "deep" / "study"
        return run_study(some, labels=["scale", "seed"], prefix=prefix, progress=False)

    return run


@pytest.mark.parametrize("scale", [None, 1.0, 4])
def test_what_is_written_is_not_done_again(study, tmp_path, scale):
    log = []
    study(trainings(log, [0], scale))
    found = study(trainings(log, [0, 1], scale))
    assert log == found.runs["seed"].tolist() == [0, 1]
    assert found.runs["versions"].str.contains("torch").all() and found.runs["commit"].all()
    runs, curves = (read(tmp_path, "deep/study", [name]) for name in ("runs", "curves"))
    assert runs["loss"].tolist() == [0.123457, 1.12346]
    assert curves["value"].tolist() == [0.5, 0, 0.5, 1]
    other = study(trainings(log, [0], 7.5))
    assert log == [0, 1, 0] and len(other.runs) == 3


@pytest.mark.parametrize("value", ["true", "0 1 2", "7", 0.0012345678, 123456.789, None, 3])
def test_settings_are_the_same_after_they_were_written(study, value):
    log = []
    for _ in range(2):
        some = [({**about, "how": value}, train) for about, train in trainings(log)]
        assert len(study(some).runs) == 2 and log == [0, 1]
    with pytest.raises(
        ValueError, match=r"runs.csv.gz has scale none, seed 1 with how .*, not how another; name"
    ):
        study([({**about, "how": "another"}, train) for about, train in trainings(log)[1:]])
    with pytest.raises(ValueError, match="different trainings, got scale none, seed 2 twice"):
        study(trainings(log, [2, 2]))
    assert log == [0, 1]


def test_a_study_that_was_stopped_anywhere_goes_on_with_nothing_lost_or_doubled(study, tmp_path):
    def fails():
        raise RuntimeError("out of luck")

    paths = [tmp_path / "deep" / f"study_{name}.csv.gz" for name in ("runs", "curves")]
    with pytest.raises(RuntimeError, match="out of luck"):
        study([*trainings([], [0]), ({"norm": "none", "scale": None, "seed": 1}, fails)])
    before = [path.read_bytes() for path in paths]
    whole = study(trainings([], [0, 1]))
    paths[0].write_bytes(before[0])  # the curve of the second was written, its row was not
    log = []
    again = study(trainings(log, [0, 1]))
    assert log == [1]
    pd.testing.assert_frame_equal(again.curves, whole.curves, check_dtype=False)
    paths[0].unlink()
    assert len(study(trainings(log, [0, 1])).curves) == 4 and log == [1, 0, 1]


def test_what_would_write_over_another_study_is_refused(study, tmp_path):
    def meanwhile():
        with pytest.raises(ValueError, match="study: another process writes to it"):
            study(trainings([], [0]))
        return {"loss": 0.5}, pd.DataFrame({"epoch": [1]})

    study([({"norm": "none", "scale": None, "seed": 9}, meanwhile)])
    before = {path.name: path.read_bytes() for path in (tmp_path / "deep").iterdir()}
    assert set(before) == {"study_runs.csv.gz", "study_curves.csv.gz"}
    others = [({"model": "GCN", "scale": 1, "seed": 0}, trainings([])[0][1])]
    with pytest.raises(ValueError, match=r"study_runs.csv.gz holds the table of another study"):
        study(others)
    place = tmp_path / "deep" / "study_curves.csv.gz"
    write(place, pd.DataFrame({"epoch": [1], "model": "GCN"}))
    with pytest.raises(ValueError, match=r"study_curves.csv.gz holds the table of another study"):
        study(trainings([], [9]))
    place.write_bytes(before[place.name])
    assert {path.name: path.read_bytes() for path in (tmp_path / "deep").iterdir()} == before
    (tmp_path / "deep" / "study_curves.csv.gz").unlink()
    with pytest.raises(ValueError, match=r"expected .*curves.csv.gz beside .*runs.csv.gz"):
        study(trainings([], [0]))


def test_the_tables_of_several_runs_are_one_set_with_the_name_of_the_run(tmp_path):
    for run, name in product(("gt_zinc", "san", "other"), TABLES):
        table = pd.DataFrame({"seed": [0, 1], name: len(run)})
        write(tmp_path / f"emergence_{run}_{name}.csv.gz", table)
    found = results.read_runs(tmp_path, {"san": "SAN, ZINC", "gt_zinc": "GT, ZINC"})
    for name in TABLES:
        columns = {"seed": [0, 1, 0, 1], name: [3, 3, 7, 7]}
        expected = pd.DataFrame(columns | {"run": ["san", "san", "gt_zinc", "gt_zinc"]})
        pd.testing.assert_frame_equal(getattr(found, name), expected)
    with pytest.raises(FileNotFoundError, match=r"no table at .*emergence_none_summary\.csv\.gz"):
        results.read_runs(tmp_path, ["none"])


def test_three_measures_of_one_layer_need_not_agree():
    lows = {"base": (0.0, 0.2), "best": (0.0, 0.3)}  # -log10 of a ratio, as often each
    rows = [
        (run, seed, 0, state, low * (0.5 if run == "c" else 1.0), 5)
        for run, seed, state in product("abc", (0, 1), lows)
        for low in lows[state]
    ]
    histogram = pd.DataFrame(rows, columns=[*KEYS, "low", "count"])
    histogram.loc[histogram.eval("run == 'b' and seed == 1 and state == 'base'"), "low"] *= 2
    values = {"a": (1001, 99, 0.001), "b": (999, 101, 0.1), "c": (999, 101, 0.102)}
    every = product("abc", (0, 1), lows)
    every = [(run, seed, 0, state, *values[run]) for run, seed, state in every]
    summary = pd.DataFrame(every, columns=[*KEYS, "max_ratio", "max_abs", "row_median_q50"])
    empty = pd.DataFrame()
    found = by_measure(with_spread(Emergence(summary, empty, empty, histogram, empty)))
    assert found.set_index(["run", "seed"]).drop(columns="layer").to_numpy().tolist() == [
        *[[True, False, True]] * 2,
        *[[False, True, False]] * 2,  # the other seed's untrained network is as wide
        *[[False, False, True]] * 2,
    ]


def test_networks_that_pass_are_counted_with_an_exact_interval():
    passes = pd.DataFrame({"run": [*"bbaaaaa"], "row": [False] * 6 + [True], "sun": True})
    found = networks_with(passes)
    assert found.index.tolist() == ["b", "a"]
    # Of n of n the lower end is 0.025 ** (1 / n), that of none of n one less.
    assert found.loc["b"].tolist() == ["0 of 2 [0.00, 0.84]", "2 of 2 [0.16, 1.00]"]
    assert found.loc["a"].tolist() == ["1 of 5 [0.01, 0.72]", "5 of 5 [0.48, 1.00]"]


def test_a_layer_is_ranked_among_untrained_networks_of_the_same_run_and_layer():
    rows = ("a", 0, 0, 50.0), ("a", 0, 1, 50.0), ("b", 3, 0, 50.0), ("c", 0, 0, np.nan)
    columns = ["run", "seed", "layer", "max_ratio"]
    trained = pd.DataFrame(rows, columns=columns).assign(state="best")
    other = trained.assign(max_ratio=1e9, state="base")
    untrained = [
        pd.DataFrame({"run": run, "layer": layer, "state": state, "max_ratio": ratios})
        for run, layer, state, ratios in (
            ("a", 0, "base_calibrated", [10.0, 49.0, 50.0, 60.0]),  # two of four reach 50
            ("a", 1, "base_calibrated", [10.0, 20.0, 30.0]),  # none of three
            ("b", 0, "base_calibrated", [51.0] * 9),  # all nine
            ("a", 1, "base", [1e9] * 5),  # BatchNorm not calibrated: no null
            ("c", 0, "base_calibrated", [1.0, 2.0]),
        )
    ]
    summary = pd.concat([trained, other]).assign(channels=8, rows=1000)
    found = results.how_unlikely(summary, pd.concat(untrained))
    assert found[columns[:3]].values.tolist() == [[*row[:3]] for row in rows]
    assert found["untrained_max"].tolist() == [60.0, 30.0, 51.0, 2.0]
    assert found["p_untrained"].tolist()[:3] == [3 / 5, 1 / 4, 1.0]
    assert found.loc[3, ["p_untrained", "p_chance"]].isna().all(), "a layer without a usable row"
    chance = ProductNull(8)
    assert (found["chance_threshold"] == chance.threshold(0.05, 1000)).all()
    assert (found["p_chance"][:3] == chance.exceedance(50.0, 1000)).all()


def test_the_grid_table_is_the_one_made_by_hand():
    ratio = {("reg", 0): (10.0, 2000.0, 900.0), ("reg", 1): (20.0, 1500.4, 1001.0)}
    ratio |= {("cls", 0): (5.0, 6.0, 7.0), ("cls", 1): (5.0, 6.0, 7.0)}
    rows = []
    for (run, seed), ratios in ratio.items():
        for layer, value in enumerate(ratios):
            about = {"run": run, "seed": seed, "layer": layer, "epochs": 100 + 20 * seed}
            rows.append({**about, "state": "base", "max_ratio": 100 * value})
            share = 0.01 * (layer + seed) * (run == "reg")
            best = {"max_ratio": value, "share_rows_with_massive": share}
            metric = "test_mae" if run == "reg" else "test_roc_auc"
            rows.append({**about, "state": "best", metric: 0.5 + 0.25 * seed, **best})
            rows.append({**about, "state": "last", "max_ratio": 1e9, metric: 9.0})
    summary = pd.DataFrame(rows)
    found = results.grid_table(summary)
    assert found.loc["reg"].to_dict() == {
        "seeds": 2,
        "epochs": "100 to 120",
        "test split": "mae 0.500 to 0.750",
        "untrained": "150,040 to 200,000",
        "trained": "1,500 to 2,000",
        "layers, every seed": "1",
        "layers, some seed": "2",
        "edges, at most": "2.00% to 3.00%",
    }
    cells = ["roc_auc 0.500 to 0.750", "700", "7", "none", "none", "0.00%"]
    assert found.loc["cls"].iloc[2:].tolist() == cells
    assert results.grid_table(summary, threshold=6.0).loc["cls", "layers, every seed"] == "2"


def test_the_table_of_lengths_is_the_one_made_by_hand():
    ratios = {  # of the larger of two layers; the other has 1 less
        ("b", 7): {0: 90.4, 1: 1000.0, 2: 1500.6, 5: 300.2},
        ("a", 0): {0: 50.0, 1: 80.0, 2: 70.0},
        ("b", 3): {0: 60.0, 1: 1001.0, 2: 2500.0},
    }
    rows = [
        (run, seed, epoch, layer, ratio - (layer != epoch % 2))
        for (run, seed), by_epoch in ratios.items()
        for epoch, ratio in by_epoch.items()
        for layer in (0, 1)
    ]
    trajectory = pd.DataFrame(rows, columns=["run", "seed", "epoch", "layer", "max_ratio"])
    table = results.length_table(trajectory)
    assert table.loc["b"].loc[7].tolist() == [90, 1501, 2, 300, "2"], "at the threshold it is not"
    assert table.loc["b"].loc[3].tolist() == [60, 2500, 2, 2500, "1"]
    assert table.loc["a"].loc[0].tolist() == [50, 80, 1, 70, "never"]
    assert table.index.get_level_values("run").unique().tolist() == ["b", "a"], "in their order"
    lower = results.length_table(trajectory, threshold=70.0)
    assert lower["massive from"].tolist() == ["0", "1", "1"]


def test_laws_are_fitted_run_by_run_and_know_their_origin(tmp_path):
    draw = np.random.default_rng(0)
    for place, run in enumerate("ab"):
        parts = []
        for state in ("base", "best", "last"):
            counted = StreamingHistogram(*NEG_LOG_RATIO_BINS)
            counted.update(torch.from_numpy(draw.normal(place + len(parts), 0.1, 500)))
            low = counted.edges[:-1].numpy()
            part = pd.DataFrame({"bin": range(len(low)), "low": low, "count": counted.counts})
            parts.append(part[part["count"] > 0].assign(state=state, seed=0, layer=0, **ORIGIN))
        for name in TABLES:
            write(tmp_path / f"emergence_{run}_{name}.csv.gz", pd.concat(parts))
    found = results.laws(["a", "b"], results=tmp_path)
    assert all((found[column] == value).all() for column, value in ORIGIN.items())
    for run in "ab":  # as if there were no other run
        chosen = read(tmp_path, "emergence", [run], "histogram").query("state != 'last'")
        expected = compare_laws(chosen[[*KEYS, "bin", "low", "count"]])
        of_run = found[found["run"] == run].reset_index(drop=True)
        pd.testing.assert_frame_equal(of_run[expected.columns], expected)


def test_the_law_table_is_the_one_made_by_hand():
    columns = ["run", "layer", "law", "ks_own", "aic_rank", "ks_base", "ks_two_sample"]
    rows = [
        ("a", 0, "gamma", 0.01, 1, 0.4, 0.12345),
        ("a", 0, "normal", 0.1, 2, 99.0, 99.0),
        ("a", 1, "gamma", 0.02, 1, 1.4, 0.12345),
        ("a", 1, "normal", 0.2, 2, 99.0, 99.0),
        ("a", 2, "normal", 0.4, 1, 99.0, 99.0),
        ("a", 2, "gamma", 0.3, 2, 2.4, 0.12345),
        ("b", 9, "gamma", 0.5, 1, 0.4, 0.12345),
        ("b", 9, "normal", 0.5, 2, 99.0, 99.0),
    ]
    laws = pd.DataFrame(rows, columns=columns).assign(seed=0, state="best")
    found = results.law_table(laws)
    expected = {"fits": 3, "gamma": "0.020 (2)", "normal": "0.200 (1)"}
    assert found.loc[("a", "best")].to_dict() == expected | {"ks_base": 1.4, "ks_two_sample": 0.123}
    assert found.loc[("b", "best"), ["fits", "gamma"]].tolist() == [1, "0.500 (1)"]
    by_layer = results.law_table(laws, ["run", "layer"])
    assert by_layer["gamma"].tolist() == ["0.010 (1)", "0.020 (1)", "0.300 (0)", "0.500 (1)"]


def test_a_run_given_twice_is_refused_be_it_a_link_or_a_copy(tmp_path):
    a, copy, link, other, empty = (tmp_path / name for name in "abcde")
    for folder, content in ((a, b"1"), (copy, b"1"), (other, b"2")):
        write_atomically(folder / "best.safetensors", content)
    link.symlink_to(other)
    results.refuse_twice([a, other, empty])
    for folders in ([a, a], [a, other, copy], [other, a, link], [empty, tmp_path / "x/../e"]):
        with pytest.raises(ValueError, match=f"^{folders[-1]}: expected different runs"):
            results.refuse_twice(folders)
    with pytest.raises(ValueError, match="expected different runs"):
        make("bonds", results.of_run, output="x", folders=[a, copy])


def test_a_study_looks_at_a_run_on_its_own_data_only(tmp_path):
    config = CONFIGS["GT-ZINC"].replace(hidden_channels=8, heads=2, num_layers=1)
    title = "MOSES sample, first 9"
    about = dict(dataset=title, seed=0, name="GT-ZINC", history=[], epoch=1)
    checkpoint.save(tmp_path / "best", build(config).state_dict(), config, **about)
    for study in (
        *(explanations.explain_run, bond_types.bond_types, robustness.attack_run),
        *(explicit_bias.idle_term_of_run, explicit_bias.weight_on_sink_of_run),
    ):
        with pytest.raises(ValueError, match=f"trained on '{title}', got 'MOSES sample'"):
            study(tmp_path, load("moses"))


@pytest.mark.slow
def test_the_tracked_tables_of_the_bundled_run_are_those_of_the_shipped_checkpoint():
    model, information = checkpoint.load(SHIPPED)
    asked = CONFIGS["GT-ZINC"].replace(max_epochs=100)
    assert Config.from_dict(information["config"]) == asked
    assert sum(p.numel() for p in model.parameters()) == 588_353
    assert re.fullmatch("[0-9a-f]{40}", information["commit"])
    examined = examine_checkpoint(SHIPPED, load("moses"))
    history = examined["history"].set_index("epoch")
    assert information["epoch"] == history["val_loss"].idxmin()
    tracked = read_emergence(RESULTS, "emergence_gt_moses_").summary
    tracked = tracked[tracked["state"] != "last"].reset_index(drop=True)
    # Sums run in another order on another number of threads.
    for name in ("test_mae", "max_ratio", "max_abs", "row_median_q50"):
        pd.testing.assert_series_equal(examined["summary"][name], tracked[name], rtol=2e-3)


def test_the_picture_of_the_readme_was_drawn_from_the_tracked_results():
    with Image.open(REPOSITORY / "book" / "emergence.png") as image:
        stored = image.text["Source-SHA256"]
    assert stored == sha256(RESULTS / "emergence_gt_zinc_graph_maxima.csv.gz"), (
        "run book/figures.py"
    )


def test_tracked_data_and_results_stay_small():
    files = [path for path in BUNDLED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 15e6
