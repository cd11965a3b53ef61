"""The hyper-parameters of a network and its training: one frozen dataclass."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

READOUTS = ("mean", "sum")
LOSSES = ("l1", "bce")

LAPLACIAN_CHANNELS = 8
"""Hidden channels that hold SAN's learned Laplacian encoding, as published."""


def _stated(source: str, **kwargs: Any) -> Any:
    """A dataclass field that carries where its value is stated."""
    return field(metadata={"source": source}, **kwargs)


_FILE = "the configuration file named in `source`"
_MAIN = "training script of the published code (common to all pairs)"
_OFF = "the configuration file named in `source`; off in all published runs"


_SIZES = ("num_node_types", "num_edge_types", "edge_channels")
_POSITIVE = (
    *("out_channels", "num_layers", "hidden_channels", "heads"),
    *("batch_size", "lr", "min_lr", "max_hours"),
)


_GONE = ("unread_node_type",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A model, its training schedule, and where both are stated.

    Every field carries the place its value is stated in as ``metadata["source"]``
    (``dataclasses.fields(Config)``); the published file of one pair is in ``source``.

    Raises:
        ValueError: if a value is out of range, or heads do not divide hidden channels.
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
    seed: int = _stated(_MAIN, default=41)
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
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a value above 0, got {getattr(self, name)!r}")
        for name in _SIZES:
            size = getattr(self, name)
            if size is not None and not (
                size and min(size if isinstance(size, tuple) else [size]) > 0
            ):
                raise ValueError(
                    f"{name}: expected a value above 0 or None (not stated), got {size!r}"
                )
        for name in ("lr_patience", "max_epochs", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)!r}")
        if self.hidden_channels % self.heads:
            raise ValueError(
                f"hidden_channels ({self.hidden_channels}) must be a multiple of heads "
                f"({self.heads}): each head has hidden_channels // heads channels"
            )
        for name in ("dropout", "score_dropout"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}: expected a probability in [0, 1), got {value!r}")
        if not 0 < self.lr_factor < 1:
            raise ValueError(f"lr_factor: expected a value in (0, 1), got {self.lr_factor!r}")
        if self.readout is not None and self.readout not in READOUTS:
            raise ValueError(
                f"readout: expected one of {READOUTS} or None (node-level task), "
                f"got {self.readout!r}"
            )
        if self.loss not in LOSSES:
            raise ValueError(f"loss: expected one of {LOSSES}, got {self.loss!r}")
        self._check_mechanisms()

    def _check_mechanisms(self) -> None:
        """Whether the mechanisms of GraphiT and SAN that can be switched on fit the rest."""
        if self.full_graph and self.architecture not in ("graphit", "san"):
            raise ValueError(
                "full_graph: expected False, only graphit and san attend over the full graph, "
                f"got True for {self.architecture!r}"
            )
        if (self.full_graph or self.laplacian_encoding) and self.readout is None:
            raise ValueError(
                "full_graph and laplacian_encoding: expected False for a node-level task (readout "
                "None), whose sampled neighbourhoods are not whole graphs, got True"
            )
        if self.gamma is not None and not (
            self.full_graph and self.architecture == "san" and 0 <= self.gamma <= 1
        ):
            raise ValueError(
                "gamma: expected a value in [0, 1] for san with full_graph=True, None otherwise, "
                f"got {self.gamma!r}"
            )
        if self.laplacian_encoding and self.hidden_channels <= LAPLACIAN_CHANNELS:
            raise ValueError(
                f"hidden_channels: expected more than the {LAPLACIAN_CHANNELS} of the Laplacian "
                f"encoding, got {self.hidden_channels}"
            )
        if self.laplacian_sign_flips and not self.laplacian_encoding:
            raise ValueError("laplacian_sign_flips: expected laplacian_encoding=True with it")

    def replace(self, **changes: Any) -> "Config":
        """The same configuration with some values changed.

        Raises:
            ValueError: if a name is not a field, or a value is out of range.
        """
        unknown = sorted(set(changes) - {f.name for f in fields(self)})
        if unknown:
            known = ", ".join(f.name for f in fields(self))
            raise ValueError(f"unknown configuration value {', '.join(unknown)}; known: {known}")
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values as JSON has them, lists for tuples; ``Config.from_dict`` is the way back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """The configuration of ``to_dict``; switches of old ones that are gone must be off."""
        values = dict(values)
        for name in _GONE:
            if values.pop(name, None) is not None:
                raise ValueError(f"{name}: expected None, the switch is gone")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
