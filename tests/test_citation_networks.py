"""Citation networks: Planetoid's files with their counts, and the synthetic one with its mixing."""

import shutil

import pytest
import torch
from conftest import NOT_BUNDLED, planetoid
from torch_geometric.datasets import Planetoid

from studies.data import load
from studies.data.networks import PER_CLASS, citation_like, planetoid_folder

COUNTS = {
    "cora": (2708, 10556, 1433, 7, 140),
    "citeseer": (3327, 9104, 3703, 6, 120),
    "pubmed": (19717, 88648, 500, 3, 60),
    "pubmed-missing": (19717, 88648, 500, 3, 60),
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_planetoid_network_has_its_published_counts(name):
    splits = planetoid(name)
    graph = splits.train.graph
    nodes, edges, words, classes, train = COUNTS[name]
    assert (graph.num_nodes, graph.num_edges, graph.num_features) == (nodes, edges, words)
    assert splits.description.num_targets == len(graph.y.unique()) == classes
    assert [len(getattr(splits, s)) for s in ("train", "val", "test")] == [train, 500, 1000]
    assert torch.bincount(graph.y[splits.train.nodes]).tolist() == [PER_CLASS] * classes
    assert not graph.has_self_loops()
    assert graph.is_undirected()


def test_missing_features_are_zero_outside_the_training_nodes():
    splits = planetoid("pubmed-missing")
    graph = splits.train.graph
    has_words = graph.x.abs().sum(1) > 0
    assert has_words.nonzero().flatten().tolist() == sorted(splits.train.nodes.tolist())
    assert "Every feature outside the 60 training nodes is zero." in splits.description.deviations


def test_a_file_that_is_not_the_published_one_is_not_read(tmp_path):
    planetoid("cora")
    folder = tmp_path / planetoid_folder("cora")
    shutil.copytree(NOT_BUNDLED / planetoid_folder("cora"), folder)
    file = folder / "ind.cora.graph"
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=r"ind\.cora\.graph: expected sha256 58f13302"):
        load("cora", tmp_path)


def test_pubmed_is_complete():
    graph = planetoid("pubmed").train.graph
    assert int((graph.x != 0).sum()) == 988_031
    assert graph.y.bincount().tolist() == [4_103, 7_739, 7_875]
    missing = planetoid("pubmed-missing").train.graph
    assert torch.equal(missing.x, graph.x * graph.train_mask[:, None])


@pytest.mark.parametrize("cut", [0, 9])
def test_a_network_is_fetched_and_kept_if_it_is_whole(cut, tmp_path, fresh_cache, monkeypatch):
    planetoid("cora")
    mirror = tmp_path / "mirror"
    shutil.copytree(NOT_BUNDLED / planetoid_folder("cora"), mirror, copy_function=shutil.copyfile)
    file = mirror / "ind.cora.allx"
    file.write_bytes(file.read_bytes()[: -cut or None])
    monkeypatch.setattr(Planetoid, "url", mirror.as_uri())
    if cut:
        with pytest.raises(ValueError, match=r"ind\.cora\.allx, as fetched: expected sha256"):
            load("cora", tmp_path)
        assert not fresh_cache.exists()
    else:
        assert len(load("cora", tmp_path).train) == 140
        assert len(list((fresh_cache / planetoid_folder("cora")).iterdir())) == 8


# ------------------------------------------------------------------------------
# The synthetic one


@pytest.fixture(scope="module")
def synthetic():
    return citation_like(0)


def test_the_synthetic_network_has_the_size_and_mixing_of_cora(synthetic):
    assert (synthetic.num_nodes, synthetic.num_edges) == (2708, 2 * 5278)
    assert synthetic.x.shape == (2708, 1433)
    assert set(synthetic.x.unique().tolist()) == {0, 1}
    source, target = synthetic.edge_index
    within = (synthetic.y[source] == synthetic.y[target]).float().mean().item()
    assert within == pytest.approx(0.81, abs=0.015)
    assert synthetic.is_undirected()
    assert not synthetic.has_self_loops()
    assert not synthetic.has_isolated_nodes()
    assert 15 < synthetic.x.sum(1).mean() < 20


def test_degrees_are_corrected(synthetic):
    degree = torch.bincount(synthetic.edge_index[0]).double()
    # As many edges at random would give a variance near the mean and no node above 20.
    assert degree.var() > 5 * degree.mean()
    assert degree.max() > 40


def test_words_tell_something_of_the_class_and_neighbours_more(synthetic):
    train = synthetic.train_mask
    profile = torch.stack([synthetic.x[train & (synthetic.y == c)].mean(0) for c in range(7)])
    profile = profile - profile.mean(0)
    source, target = synthetic.edge_index
    summed = synthetic.x.clone().index_add_(0, target, synthetic.x[source])
    alone, together = (
        ((x @ profile.t()).argmax(1) == synthetic.y)[synthetic.test_mask].float().mean().item()
        for x in (synthetic.x, summed)
    )
    assert 1 / 7 < alone < together < 0.9


def test_the_split_has_the_public_sizes_and_no_overlap(synthetic):
    masks = [synthetic[f"{name}_mask"] for name in ("train", "val", "test")]
    assert [int(mask.sum()) for mask in masks] == [140, 500, 1000]
    assert int(sum(masks).max()) == 1
    assert torch.bincount(synthetic.y[masks[0]]).tolist() == [PER_CLASS] * 7


def test_the_seed_fixes_the_draw():
    small = dict(num_nodes=300, num_edges=500, num_words=40)
    first, same, other = (citation_like(seed, **small) for seed in (3, 3, 4))
    for key in first.to_dict():
        assert torch.equal(first[key], same[key])
    assert not torch.equal(first.edge_index, other.edge_index)


def test_homophily_is_what_is_asked_for():
    for homophily in (0.0, 0.5, 1.0):
        graph = citation_like(0, num_nodes=600, num_edges=2000, homophily=homophily)
        source, target = graph.edge_index
        within = (graph.y[source] == graph.y[target]).float().mean().item()
        assert within == pytest.approx(homophily, abs=0.04)


def test_what_is_impossible_is_refused():
    with pytest.raises(ValueError, match=r"homophily: expected a probability in \[0, 1\]"):
        citation_like(homophily=1.2)
    with pytest.raises(ValueError, match="num_edges: expected from 2708"):
        citation_like(num_edges=2000)
    with pytest.raises(ValueError, match="at least 294 nodes for 7"):
        citation_like(num_nodes=200, num_edges=300)


def test_it_is_loaded_by_name_and_says_that_it_is_synthetic():
    splits = load("citation")
    assert "synthetic" in splits.description.title
    assert any("Synthetic" in text for text in splits.description.deviations)
    assert splits.val.graph is splits.test.graph
