"""What several test modules share."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared"
ORACLE = Path(os.environ.get("MAPKG_ORACLE", SHARED / "oracle"))


@pytest.fixture
def oracle():
    """Loads recorded values of the published layers, or skips with the reason."""

    def load(name):
        path = ORACLE / f"{name}.npz"
        if not path.is_file():
            pytest.skip(f"no recorded values of the published layers at {path}")
        with np.load(path) as stored:
            return {
                key: str(stored[key]) if key == "meta" else torch.from_numpy(stored[key])
                for key in stored.files
            }

    return load
