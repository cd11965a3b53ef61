"""Train, validation and test: 80, 10 and 10 per cent, at random or by scaffold."""

from collections import defaultdict
from collections.abc import Hashable, Sequence

from sklearn.model_selection import train_test_split

SPLITS = ("train", "val", "test")


def random_split(
    number: int, *, seed: int, labels: Sequence[Hashable] | None = None
) -> dict[str, list[int]]:
    """Ascending indices below ``number`` by split; with labels, each split holds each class alike.

    Raises scikit-learn's ValueError if there are too few, or too few of a class.
    """
    train, rest = train_test_split(range(number), test_size=0.2, random_state=seed, stratify=labels)
    rest_labels = None if labels is None else [labels[i] for i in rest]
    val, test = train_test_split(rest, test_size=0.5, random_state=seed, stratify=rest_labels)
    return {"train": sorted(train), "val": sorted(val), "test": sorted(test)}


def scaffold_split(scaffolds: Sequence[Hashable]) -> dict[str, list[int]]:
    """The split in which no scaffold is in two splits; frequent scaffolds are for training.

    Groups of one scaffold are taken from the largest to the smallest (of equals, the one that
    appears last comes first). A group goes to training if training then holds at most 80 per
    cent; else to validation if both then hold at most 90 per cent; else to testing.

    Source: MoleculeNet (Wu et al., 2018) and its code in DeepChem.
    """
    groups = defaultdict(list)
    for i, scaffold in enumerate(scaffolds):
        groups[scaffold].append(i)
    split = {name: [] for name in SPLITS}
    for group in sorted(groups.values(), key=lambda group: (len(group), group[0]), reverse=True):
        in_train = len(split["train"]) + len(group)
        # Whole numbers: 0.8 + 0.1 is not 0.9.
        if 10 * in_train <= 8 * len(scaffolds):
            split["train"] += group
        elif 10 * (in_train + len(split["val"])) <= 9 * len(scaffolds):
            split["val"] += group
        else:
            split["test"] += group
    return {name: sorted(indices) for name, indices in split.items()}
