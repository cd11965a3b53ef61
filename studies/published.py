"""Every configuration that the code of the massive-activations paper states.

``PUBLISHED`` holds its ten pairs of network and data set, read from its configuration files. A
value that the code derives from the data set and that we do not know is ``None``, never a
guess. ``OWN`` holds pairs that the paper does not have; ``CONFIGS`` holds both.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from mapkg.models.config import Config

_ZINC = dict(dataset="zinc", num_node_types=28, num_edge_types=4, out_channels=1)
_TOX21 = dict(
    dataset="tox21", num_node_types=None, num_edge_types=None, out_channels=12, loss="bce"
)
_PROTEINS = dict(
    dataset="ogbn-proteins",
    num_node_types=8,
    num_edge_types=None,
    edge_channels=8,
    out_channels=112,
    readout=None,
    loss="bce",
)
# Sum readout, patience 25: common to the LSPE and SAN repositories' molecule runs.
_NODE_STREAM = dict(readout="sum", residual=True, lr_patience=25, heads=8, num_layers=10)

PUBLISHED: Mapping[str, Config] = MappingProxyType(
    {
        "GT-ZINC": Config(
            architecture="gt",
            **_ZINC,
            num_layers=10,
            hidden_channels=64,
            heads=8,
            batch_size=128,
            lr=7e-4,
            lr_patience=15,
            min_lr=1e-6,
            dropout=0.0,
            readout="mean",
            residual=True,
            max_hours=24.0,
            source="graphtransformer/configs/molecules_GraphTransformer_ZINC_500k_sparse_graph_BN.json",
        ),
        "GT-TOX21": Config(
            architecture="gt",
            **_TOX21,
            num_layers=10,
            hidden_channels=444,
            heads=12,
            batch_size=128,
            lr=7e-4,
            lr_patience=15,
            min_lr=1e-6,
            dropout=0.0,
            readout="mean",
            residual=True,
            max_hours=24.0,
            source="graphtransformer/configs/molecules_GraphTransformer_TOX21_sparse_graph_BN.json",
        ),
        "GT-PROTEINS": Config(
            architecture="gt",
            **_PROTEINS,
            num_layers=3,
            hidden_channels=64,
            heads=8,
            batch_size=512,
            lr=7e-4,
            lr_patience=15,
            min_lr=1e-6,
            dropout=0.0,
            residual=False,
            recompute_edges=True,
            max_hours=24.0,
            source="gnn-lspe/configs/GraphTransformer_PROTEINS_NoPE.json",
        ),
        "EGAT-PROTEINS": Config(
            architecture="egat",
            **_PROTEINS,
            num_layers=3,
            hidden_channels=64,
            heads=8,
            batch_size=512,
            lr=7e-4,
            lr_patience=15,
            min_lr=1e-6,
            dropout=0.0,
            residual=False,
            max_hours=24.0,
            source="gnn-lspe/configs/EdgeGAT_PROTEINS_NoPE.json",
        ),
        "GraphiT-ZINC": Config(
            architecture="graphit",
            **_ZINC,
            **_NODE_STREAM,
            hidden_channels=64,
            batch_size=32,
            lr=3e-4,
            min_lr=1e-6,
            dropout=0.0,
            max_hours=48.0,
            source="gnn-lspe/configs/GraphiT_ZINC_NoPE.json",
        ),
        "GraphiT-TOX21": Config(
            architecture="graphit",
            **_TOX21,
            **_NODE_STREAM,
            hidden_channels=88,
            batch_size=256,
            lr=7e-4,
            min_lr=1e-6,
            dropout=0.5,
            max_hours=96.0,
            source="gnn-lspe/configs/GraphiT_MOLTOX21_NoPE.json",
        ),
        "GraphiT-PROTEINS": Config(
            architecture="graphit",
            **_PROTEINS,
            num_layers=3,
            hidden_channels=88,
            heads=8,
            batch_size=768,
            lr=7e-4,
            lr_patience=25,
            min_lr=1e-5,
            dropout=0.5,
            residual=False,
            max_hours=96.0,
            source="gnn-lspe/configs/GraphiT_PROTEINS_NoPE.json",
        ),
        "SAN-ZINC": Config(
            architecture="san",
            **_ZINC,
            **_NODE_STREAM,
            hidden_channels=56,
            batch_size=32,
            lr=7e-4,
            min_lr=1e-6,
            dropout=0.0,
            max_hours=24.0,
            source="SAN/configs/ZINC/optimized",
        ),
        "SAN-TOX21": Config(
            architecture="san",
            **_TOX21,
            **_NODE_STREAM,
            hidden_channels=88,
            batch_size=128,
            lr=7e-4,
            min_lr=1e-6,
            dropout=0.5,
            max_hours=96.0,
            source="gnn-lspe/configs/SAN_MOLTOX21_NoPE.json",
        ),
        "SAN-PROTEINS": Config(
            architecture="san",
            **_PROTEINS,
            num_layers=3,
            hidden_channels=88,
            heads=8,
            batch_size=512,
            lr=7e-4,
            lr_patience=25,
            min_lr=1e-5,
            dropout=0.5,
            residual=False,
            max_hours=96.0,
            source="gnn-lspe/configs/SAN_PROTEINS_NoPE.json",
        ),
    }
)

_AS_GT_ZINC = "this companion: the schedule and sizes of GT-ZINC"
_AS_OGBN = "this companion: the sizes and schedule published for ogbn-proteins"
# On whole graphs nothing forces the residuals away, as the sampled blocks of ogbn-proteins did.
# A batch holds graphs, of 39 nodes on average: about as many nodes as the published seed nodes.
_TU = dict(
    dataset="proteins",
    num_node_types=3,
    num_edge_types=6,
    edge_channels=None,
    out_channels=1,
    residual=True,
    recompute_edges=False,
    source=_AS_OGBN,
)


def _on_zinc(architecture: str, **changes: Any) -> Config:
    return PUBLISHED["GT-ZINC"].replace(architecture=architecture, source=_AS_GT_ZINC, **changes)


OWN: Mapping[str, Config] = MappingProxyType(
    {
        "GT-TU": PUBLISHED["GT-PROTEINS"].replace(readout="mean", batch_size=13, **_TU),
        "GraphiT-TU": PUBLISHED["GraphiT-PROTEINS"].replace(readout="sum", batch_size=20, **_TU),
        "SAN-TU": PUBLISHED["SAN-PROTEINS"].replace(readout="sum", batch_size=13, **_TU),
        "EGAT-ZINC": _on_zinc("egat", residual=False),
        "GAT-ZINC": _on_zinc("gat"),
        "GATv2-ZINC": _on_zinc("gatv2"),
        "TransformerConv-ZINC": _on_zinc("transformer"),
        "GPS-ZINC": _on_zinc("gps"),
    }
)

CONFIGS: Mapping[str, Config] = MappingProxyType({**PUBLISHED, **OWN})
