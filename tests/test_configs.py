"""Configurations against a second, independent copy of the published hyper-parameters."""

import json

import pytest

from mapkg.models.config import Config
from studies.published import CONFIGS, PUBLISHED

# Typed from the configuration files of the published code, apart from the package's own copy.
# "-" is a node-level task, which has no readout.
STATED = """
name             layers channels heads batch lr   patience min_lr dropout readout residual hours
GT-ZINC          10     64       8     128   7e-4 15       1e-6   0       mean    yes      24
GT-TOX21         10     444      12    128   7e-4 15       1e-6   0       mean    yes      24
GT-PROTEINS      3      64       8     512   7e-4 15       1e-6   0       -       no       24
EGAT-PROTEINS    3      64       8     512   7e-4 15       1e-6   0       -       no       24
GraphiT-ZINC     10     64       8     32    3e-4 25       1e-6   0       sum     yes      48
GraphiT-TOX21    10     88       8     256   7e-4 25       1e-6   0.5     sum     yes      96
GraphiT-PROTEINS 3      88       8     768   7e-4 25       1e-5   0.5     -       no       96
SAN-ZINC         10     56       8     32    7e-4 25       1e-6   0       sum     yes      24
SAN-TOX21        10     88       8     128   7e-4 25       1e-6   0.5     sum     yes      96
SAN-PROTEINS     3      88       8     512   7e-4 25       1e-5   0.5     -       no       96
"""
COLUMNS = {
    **dict.fromkeys(("num_layers", "hidden_channels", "heads", "batch_size"), int),
    **{"lr": float, "lr_patience": int, "min_lr": float, "dropout": float},
    "readout": {"mean": "mean", "sum": "sum", "-": None}.get,
    "residual": {"yes": True, "no": False}.get,
    "max_hours": float,
}
ROWS = [line.split() for line in STATED.strip().splitlines()[1:]]

COMMON = dict(lr_factor=0.5, weight_decay=0.0, max_epochs=1000)
COMMON |= dict(batch_norm=True, layer_norm=False, use_bias=False)

# Per data set: its name, node types, edge types, targets, loss.
DATA_SETS = {
    "ZINC": ("zinc", 28, 4, 1, "l1"),
    "TOX21": ("tox21", None, None, 12, "bce"),
    "PROTEINS": ("ogbn-proteins", 8, None, 112, "bce"),
}
OF_DATA = ("dataset", "num_node_types", "num_edge_types", "out_channels", "loss")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_published_row_is_reproduced(row):
    name, *texts = row
    architecture, _, data_set = name.partition("-")
    expected = COMMON | dict(zip(OF_DATA, DATA_SETS[data_set], strict=True))
    expected["architecture"] = architecture.lower()
    for (field, convert), text in zip(COLUMNS.items(), texts, strict=True):
        expected[field] = convert(text)
    found = CONFIGS[name].to_dict()
    assert {field: found[field] for field in expected} == expected
    # The file names say the data set; MOLTOX21 is the OGB version of TOX21.
    assert data_set in found["source"].upper()


def test_all_configurations_are_the_ten_published_pairs_and_our_own():
    assert sorted(PUBLISHED) == sorted(row[0] for row in ROWS)
    for config in CONFIGS.values():  # no configuration has a mechanism switched on
        assert not (config.full_graph or config.laplacian_encoding or config.gamma)


ABOVE_0 = ("out_channels", "num_layers", "heads", "batch_size", "lr", "min_lr")
OUT_OF_RANGE = {
    "a value above 0": {
        **dict.fromkeys((*ABOVE_0, "max_hours"), (0, -1, float("nan"))),
        **dict.fromkeys(("num_node_types", "num_edge_types", "edge_channels"), (0, -1, (), (3, 0))),
    },
    "4 or more": {"hidden_channels": (0, 1, 3)},
    "0 or more": dict.fromkeys(("lr_patience", "max_epochs", "weight_decay"), (-1, float("nan"))),
    r"a probability in \[0, 1\)": dict.fromkeys(("dropout", "score_dropout"), (1.0, -0.1)),
    r"a value in \(0, 1\)": {"lr_factor": (0.0, 1.0)},
    "one of .*'l1', 'bce'": {"loss": ("mse",)},
    "one of .*'mean', 'sum', 'max'.* or None": {"readout": ("median",)},
}
ON_THE_EDGE = [
    {"max_epochs": 0, "lr_patience": 0, "weight_decay": 0.0, "dropout": 0.0},
    {"dropout": 0.999, "hidden_channels": 4, "heads": 4, "readout": None},
    {"num_node_types": None, "num_edge_types": None},
    {"num_node_types": 1, "num_edge_types": (2,)},
]


def test_a_value_out_of_range_is_refused_by_name_and_one_on_its_edge_is_not():
    config = CONFIGS["GT-ZINC"]
    for expected, names in OUT_OF_RANGE.items():
        for name, values in names.items():
            for value in values:
                with pytest.raises(ValueError, match=f"{name}: expected {expected}"):
                    config.replace(**{name: value})
    for changes, message in (
        ({"heads": 7}, r"hidden_channels \(64\) must be a multiple of heads \(7\)"),
        ({"num_head": 4, "rate": 1}, "unknown configuration value num_head, rate; known: archit"),
    ):
        with pytest.raises(ValueError, match=message):
            config.replace(**changes)
    for changes in ON_THE_EDGE:
        changed = config.replace(**changes)
        assert {name: getattr(changed, name) for name in changes} == changes


def test_a_configuration_survives_json_and_one_with_a_switch_that_is_gone_is_read_if_it_was_off():
    for config in CONFIGS.values():
        changed = config.replace(num_node_types=(119, 9))  # JSON has no tuples
        values = json.loads(json.dumps(changed.to_dict()))
        for switch, off in (("unread_node_type", None), ("seed", 41)):
            assert Config.from_dict(values | {switch: off}) == changed
            words = f"{switch}: expected {off}, the switch is gone, got 2"
            with pytest.raises(ValueError, match=words):
                Config.from_dict(values | {switch: 28})
