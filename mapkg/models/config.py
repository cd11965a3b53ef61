"""The hyper-parameters of a network and its training: one frozen dataclass."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

READOUTS = ("mean", "sum", "max")
LOSSES = ("l1", "bce")

_GONE = {"unread_node_type": None, "seed": 41}
"""Switches of configurations written before, and what they had to be."""


def head_channels(hidden_channels: int, heads: int) -> int:
    """Channels of each head; raises unless the heads divide all channels."""
    if hidden_channels % heads:
        raise ValueError(
            f"hidden_channels ({hidden_channels}) must be a multiple of heads ({heads}): each "
            "head has hidden_channels // heads channels"
        )
    return hidden_channels // heads


def _stated(source: str, **kwargs: Any) -> Any:
    """A dataclass field that carries where its value is stated."""
    return field(metadata={"source": source}, **kwargs)


_FILE = "the configuration file named in `source`"
_MAIN = "training script of the published code (common to all pairs)"
_OFF = "the configuration file named in `source`; off in all published runs, see studies.extras"

_ABOVE_0 = ("a value above 0", lambda value: value > 0)
_FROM_0 = ("0 or more", lambda value: value >= 0)
_SIZE = (
    "a value above 0 or None (not stated)",
    lambda n: n is None or (bool(n) and min(n if isinstance(n, tuple) else [n]) > 0),
)
_PROBABILITY = ("a probability in [0, 1)", lambda value: 0 <= value < 1)
_RANGES = {
    **dict.fromkeys(("num_node_types", "num_edge_types", "edge_channels"), _SIZE),
    **dict.fromkeys(("out_channels", "num_layers", "heads"), _ABOVE_0),
    "hidden_channels": ("4 or more, of which the head keeps a quarter", lambda n: n >= 4),
    **dict.fromkeys(("batch_size", "lr", "min_lr", "max_hours"), _ABOVE_0),
    **dict.fromkeys(("lr_patience", "max_epochs", "weight_decay"), _FROM_0),
    **dict.fromkeys(("dropout", "score_dropout"), _PROBABILITY),
    "lr_factor": ("a value in (0, 1)", lambda value: 0 < value < 1),
    "loss": (f"one of {LOSSES}", LOSSES.__contains__),
    "readout": (f"one of {READOUTS} or None (node-level task)", (*READOUTS, None).__contains__),
}
"""What each value has to be, in words and as a test."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A model, its training schedule, and where both are stated.

    Every field carries the place its value is stated in as ``metadata["source"]``
    (``dataclasses.fields(Config)``); the published file of one pair is in ``source``. Raises
    ``ValueError`` if a value is out of range, or heads do not divide hidden channels.
    """

    architecture: str = _stated(_FILE)
    dataset: str = _stated(_FILE)
    num_node_types: int | tuple[int, ...] | None = _stated("the data set: embedding table sizes")
    num_edge_types: int | tuple[int, ...] | None = _stated("the data set: embedding table sizes")
    out_channels: int = _stated("the data set: number of targets")
    num_layers: int = _stated(_FILE)
    hidden_channels: int = _stated(_FILE)
    heads: int = _stated(_FILE)
    batch_size: int = _stated(_FILE)
    lr: float = _stated(_FILE)
    lr_patience: int = _stated(_FILE)
    min_lr: float = _stated(_FILE)
    dropout: float = _stated(_FILE)
    readout: str | None = _stated(_FILE)
    residual: bool = _stated(_FILE)
    max_hours: float = _stated(_FILE)
    source: str = _stated("the published repository's own path")
    lr_factor: float = _stated(_MAIN, default=0.5)
    weight_decay: float = _stated(_MAIN, default=0.0)
    max_epochs: int = _stated(_MAIN, default=1000)
    batch_norm: bool = _stated(_MAIN, default=True)
    layer_norm: bool = _stated(_MAIN, default=False)
    use_bias: bool = _stated("scripts/train of the published code", default=False)
    loss: str = _stated(_MAIN, default="l1")
    edge_channels: int | None = _stated("the data set: width of float features", default=None)
    recompute_edges: bool = _stated("LSPE code: GT on PROTEINS discards its edges", default=False)
    attention: str = _stated("our ablations; the published attention is full", default="full")
    explicit_bias: str = _stated("scripts/explicit_bias of the published code", default="none")
    score_bound: str = _stated("our remedies; the published score has no bound", default="none")
    score_dropout: float = _stated("our remedies; the published score has none", default=0.0)
    full_graph: bool = _stated(_OFF, default=False)
    gamma: float | None = _stated("SAN code, full graph; None: learned, as in LSPE", default=None)
    laplacian_encoding: bool = _stated(_OFF, default=False)
    laplacian_sign_flips: bool = _stated("SAN; its published loop has no effect", default=False)

    def __post_init__(self) -> None:
        for name, (expected, is_valid) in _RANGES.items():
            if not is_valid(value := getattr(self, name)):
                raise ValueError(f"{name}: expected {expected}, got {value!r}")
        head_channels(self.hidden_channels, self.heads)

    def replace(self, **changes: Any) -> "Config":
        """The same configuration with some values changed; raises if a name is not a field."""
        known = [f.name for f in fields(self)]
        if unknown := ", ".join(sorted(set(changes) - set(known))):
            raise ValueError(f"unknown configuration value {unknown}; known: {', '.join(known)}")
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values as JSON has them, lists for tuples; ``Config.from_dict`` is the way back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """The configuration of ``to_dict``; switches of old ones that are gone must be off."""
        for name, off in _GONE.items():
            if (value := values.get(name, off)) != off:
                raise ValueError(f"{name}: expected {off}, the switch is gone, got {value!r}")
        kept = {k: v for k, v in values.items() if k not in _GONE}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()})
