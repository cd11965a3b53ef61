"""Random graphs with what attention over edges has to cope with."""

import networkx as nx
import torch
from torch_geometric.data import Data


def random_graph(seed, nodes=9, edges=30, channels=12, scale=1.0):
    """A graph with a self-loop, parallel edges, and a last node that only sends.

    Features x [nodes, channels], of standard deviation ``scale``, edge_index [2, edges] and
    edge_attr [edges, channels], in float64.
    """
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(nodes, channels, generator=generator, dtype=torch.float64)
    source = torch.randint(nodes, (edges,), generator=generator)
    target = torch.randint(nodes - 1, (edges,), generator=generator)
    source[:4] = torch.tensor([2, 2, 3, nodes - 1])
    target[:4] = torch.tensor([1, 1, 3, 0])
    edge_attr = torch.randn(edges, channels, generator=generator, dtype=torch.float64)
    return x, torch.stack([source, target]), edge_attr


def molecule(seed, nodes):
    """A random tree with two rings more and without symmetries that would repeat eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    graph = nx.random_labeled_tree(nodes, seed=seed)
    graph.add_edges_from([(0, nodes // 2), (1, nodes - 1)])
    graph.remove_edges_from(list(nx.selfloop_edges(graph)))
    pairs = torch.tensor(list(graph.edges)).T
    types = torch.randint(1, 4, (pairs.size(1),), generator=generator)
    return Data(
        x=torch.randint(28, (nodes,), generator=generator),
        edge_index=torch.cat([pairs, pairs.flip(0)], dim=1),
        edge_attr=torch.cat([types, types]),
    )


def path(*types, y=None):
    """A path whose bonds have these types, both directions next to each other."""
    bonds = [pair for i in range(len(types)) for pair in ((i, i + 1), (i + 1, i))]
    return Data(
        x=torch.zeros(len(types) + 1, dtype=torch.long),
        edge_index=torch.tensor(bonds, dtype=torch.long).reshape(-1, 2).t().contiguous(),
        edge_attr=torch.tensor(types, dtype=torch.long).repeat_interleave(2),
        y=None if y is None else torch.tensor([[y]]),
    )
