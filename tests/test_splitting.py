"""Random, stratified and scaffold splits."""

from collections import Counter

import pytest

from studies.data.splitting import SPLITS, random_split, scaffold_split


def sizes(split):
    return [len(split[name]) for name in SPLITS]


def all_of(split):
    return sorted(i for indices in split.values() for i in indices)


@pytest.mark.parametrize(
    ("scaffolds", "train", "val", "test"),
    [
        # Both groups fill training to 80 %; of single ones, the last takes the next place.
        ("aaaaabbbcd", [0, 1, 2, 3, 4, 5, 6, 7], [9], [8]),
        # b would overfill training and goes to validation; the smaller c still fits.
        ("bbcaaaaaaa", [2, 3, 4, 5, 6, 7, 8, 9], [0, 1], []),
        # Of two groups of the same size the one that begins later is taken first.
        ("aaaaabbccd", [0, 1, 2, 3, 4, 7, 8, 9], [5, 6], []),
        # A group above 80 % fits validation, one above 90 % neither.
        ("aaaaaaaaab", [9], [0, 1, 2, 3, 4, 5, 6, 7, 8], []),
        ("aaaaaaaaaa", [], [], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_scaffold_groups_go_where_the_rule_written_by_hand_puts_them(scaffolds, train, val, test):
    assert scaffold_split(scaffolds) == {"train": train, "val": val, "test": test}


def test_no_scaffold_is_in_two_splits_and_every_molecule_in_one():
    scaffolds = [str(i % (1 + i % 37)) for i in range(500)]
    split = scaffold_split(scaffolds)
    assert all_of(split) == list(range(500))
    for name in SPLITS:
        inside = {scaffolds[i] for i in split[name]}
        assert not inside & {scaffolds[i] for o in SPLITS if o != name for i in split[o]}


def test_names_of_scaffolds_do_not_matter():
    scaffolds = [i * i % 23 for i in range(200)]
    renamed = [f"scaffold {100 - scaffold}" for scaffold in scaffolds]
    assert scaffold_split(renamed) == scaffold_split(scaffolds)


def test_a_random_split_is_eighty_ten_and_ten_per_cent():
    split = random_split(200, seed=0)
    assert sizes(split) == [160, 20, 20]
    assert all_of(split) == list(range(200))
    assert all(indices == sorted(indices) for indices in split.values())


def test_a_seed_gives_one_random_split_and_another_seed_another():
    assert random_split(200, seed=3) == random_split(200, seed=3)
    assert random_split(200, seed=3) != random_split(200, seed=4)


def test_a_stratified_split_has_each_class_in_its_proportion():
    labels = [1.0] * 40 + [0.0] * 160
    split = random_split(200, seed=0, labels=labels)
    assert all_of(split) == list(range(200))
    counted = [Counter(labels[i] for i in split[name]) for name in SPLITS]
    assert counted == [{1.0: 32, 0.0: 128}, {1.0: 4, 0.0: 16}, {1.0: 4, 0.0: 16}]


def test_a_class_too_small_for_three_splits_is_an_error():
    with pytest.raises(ValueError, match="least populated class"):
        random_split(20, seed=0, labels=[1] + [0] * 19)
