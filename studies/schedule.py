"""How long a network is trained, and what training gives."""

import math
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mapkg.models.config import Config

EPOCH_STRIDE = 1_000_003  # a prime: keeps the seeds of all runs' epochs apart


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast a network is trained, with Adam.

    The rate is multiplied by ``lr_factor`` after more than ``lr_patience`` rows of the history
    without progress in validation; None leaves it. Progress is as in torch's
    ``ReduceLROnPlateau``: the loss falls by more than 1e-4 of its least value so far (trees: the
    accuracy gains more than 1e-4). Any fall makes the weights the best ones. Training ends after
    ``epochs`` passes over the data, when the rate falls below ``min_lr``, after ``patience`` rows
    without progress, or after ``max_hours``. A row is a block of epochs. Without a batch size a
    step takes all data.

    Source: the defaults are those of the LipschitzNorm paper's code, for the nodes of a graph.
    """

    epochs: int = 200
    batch_size: int | None = None
    lr: float = 0.005
    weight_decay: float = 5e-4
    lr_factor: float = 0.1
    lr_patience: int | None = 10
    min_lr: float = 1e-6
    block: int = 1
    patience: int | None = None
    max_hours: float = math.inf

    def __post_init__(self) -> None:
        for name, least in dict(epochs=0, batch_size=1, block=1, patience=1, min_lr=0).items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name}: expected {least} or more, got {value}")
        if not self.lr > 0:
            raise ValueError(f"lr: expected a value above 0, got {self.lr}")
        if not 0 < self.lr_factor < 1:
            raise ValueError(f"lr_factor: expected a value in (0, 1), got {self.lr_factor}")

    @classmethod
    def of(cls, config: Config) -> "Schedule":
        """The schedule that a configuration states."""
        names = ("batch_size", "lr", "weight_decay", "lr_factor", "lr_patience", "min_lr")
        stated = {name: getattr(config, name) for name in names}
        return cls(epochs=config.max_epochs, max_hours=config.max_hours, **stated)

    def columns(self, *names: str) -> dict[str, Any]:
        """Some values, for the row of a table."""
        return {name: getattr(self, name) for name in names}


@dataclass
class Fit:
    """What training gave; of several seeds, tables have a column ``seed``, other values a dict.

    Attributes:
        history: rows of epoch, train_loss, what the task validates, lr (of that epoch), seconds.
        observations: what the observer returned; of several seeds the measures of their scores.
        best_epoch: the epoch with the least validation loss; 0 before or without the first one.
        best_weights, last_weights: state dicts of that epoch and of the last one.
        stop_reason: ``"max epochs"``, ``"min lr"``, ``"time limit"``, ``"not finite"``,
            ``"solved"``, ``"plateau"``, or of several seeds ``"not finished"``.
        commit, versions: of the process that started the run.
    """

    history: pd.DataFrame
    observations: pd.DataFrame
    best_epoch: Any
    best_weights: dict[Any, Any]
    last_weights: dict[Any, Any]
    stop_reason: Any
    commit: str
    versions: str


@dataclass
class SeedProgress:
    """How far one of several seeds that are trained at once has come."""

    seed: int
    lr: float
    best_loss: float = math.inf
    best_epoch: int = 0
    last_epoch: int = 0
    stop_reason: str = ""
    plateau: dict[str, Any] = field(default_factory=dict)

    def learn_from(self, val_loss: float, config: Config) -> None:
        """Let torch's own scheduler decide on the learning rate."""
        dummy = torch.optim.SGD([torch.zeros(1)], lr=self.lr)
        settings = dict(factor=config.lr_factor, patience=config.lr_patience, eps=0)
        plateau = ReduceLROnPlateau(dummy, **settings)
        plateau.load_state_dict(self.plateau)  # nothing before the first epoch
        plateau.step(val_loss)
        self.plateau, self.lr = plateau.state_dict(), dummy.param_groups[0]["lr"]
