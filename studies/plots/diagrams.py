"""Diagrams."""

from matplotlib.axes import Axes


def score_in_layer(ax: Axes) -> Axes:
    """Where the score sits in a GraphTransformer layer, as a diagram."""
    plain, watched = "white", "#FFE0B2"
    boxes = {
        "nodes": (0.07, 0.62, "node features\n$h_j,\\ h_i$", plain),
        "edges": (0.07, 0.22, "edge features\n$e_{ji}$", plain),
        "value": (0.28, 0.90, "value\n$V_j$", plain),
        "key_query": (
            0.28,
            0.62,
            "key of source, query of target\n$K_j \\odot Q_i\\,/\\sqrt{d}$",
            plain,
        ),
        "gate": (0.28, 0.22, "edge gate\n$E_{ji}$", plain),
        "score": (0.50, 0.42, "score\n$s_{ji}$  [E, D]", watched),
        "weight": (0.67, 0.62, "sum per head, clamp,\nexp, normalise: $\\alpha_{ji}$", plain),
        "attended": (0.81, 0.90, "attended\n$o_i = \\sum_j \\alpha_{ji} V_j$  [N, D]", watched),
        "node_block": (0.96, 0.62, "node block\n$h_i'$", plain),
        "edge_block": (0.96, 0.22, "edge block\n$e_{ji}'$", plain),
    }
    arrows = [
        *(("nodes", "value"), ("nodes", "key_query"), ("edges", "gate")),
        *(("key_query", "score"), ("gate", "score"), ("score", "weight"), ("score", "edge_block")),
        *(("value", "attended"), ("weight", "attended"), ("attended", "node_block")),
    ]
    look = dict(boxstyle="round,pad=0.5", edgecolor="#444444")
    texts = {
        name: ax.text(
            x, y, text, ha="center", va="center", fontsize=10, bbox=dict(facecolor=colour, **look)
        )
        for name, (x, y, text, colour) in boxes.items()
    }
    for start, end in arrows:
        ax.annotate(
            "",
            xy=boxes[end][:2],
            xytext=boxes[start][:2],
            arrowprops=dict(
                arrowstyle="-|>",
                color="#444444",
                patchA=texts[start].get_bbox_patch(),
                patchB=texts[end].get_bbox_patch(),
                shrinkA=3,
                shrinkB=3,
            ),
        )
    ax.set(xlim=(0, 1.03), ylim=(0.1, 1.0))
    ax.set_axis_off()
    return ax
