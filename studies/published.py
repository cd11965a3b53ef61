"""Every configuration that the code of the massive-activations paper states.

``PUBLISHED`` holds its ten pairs of network and data set, ``OWN`` pairs that the paper does not
have, ``CONFIGS`` both; the values stand in ``published.toml``, with the place of each.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from mapkg.models.config import Config

_NOT_STATED = dict.fromkeys(("num_node_types", "num_edge_types", "readout"))


def _read() -> dict[str, Config]:
    tables = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    configs: dict[str, Config] = {}
    for name, values in tables.items():
        like = values.pop("like", None)
        configs[name] = configs[like].replace(**values) if like else Config(**_NOT_STATED | values)
    return configs


CONFIGS: Mapping[str, Config] = MappingProxyType(_read())
OWN = {n: c for n, c in CONFIGS.items() if c.source.startswith("this companion")}
PUBLISHED = {name: config for name, config in CONFIGS.items() if name not in OWN}
