"""How configuration files read plain scalars: by the core schema of YAML 1.2 (yaml.org/spec/1.2.2).

YAML 1.1, which PyYAML reads, takes the strategy `8_4_48` for the number 8448, `off` for false, and
`1e-6` for a string. Here they are a string, a string and a number. Leaves out octal, hexadecimal.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_REDEFINED = {f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "timestamp")}
_INTEGER = r"(?:0|[1-9][0-9]*)"
_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (rf"[-+]?{_INTEGER}", "-+0123456789"),
    "float": (
        rf"[-+]?(?:\.[0-9]+|{_INTEGER}\.[0-9]*|{_INTEGER}(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
"""Name of a type: its pattern, and the characters it can begin with."""


class CoreSchemaLoader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's booleans and numbers."""


CoreSchemaLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REDEFINED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, (_pattern, _first) in _SCALARS.items():
    CoreSchemaLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), list(_first)
    )


def load_yaml(text: str) -> Any:
    """The content of a YAML document."""
    return yaml.load(text, Loader=CoreSchemaLoader)
