"""Refuses published weights that do not fit: a tensor missing, unknown or of another shape."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def check_fits(given: Mapping[str, Tensor], own: Mapping[str, Tensor], *, what: str) -> None:
    """Raise ValueError naming every tensor of `given` that does not fit `own`.

    Args:
        given: tensors by name, as published or loaded.
        own: those of the module that is to take them.
        what: whose weights they are, for the message.
    """
    missing, unknown = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    misshapen = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(own[name].shape)}"
        for name in sorted(own.keys() & given.keys())
        if own[name].shape != given[name].shape
    ]
    if missing or unknown or misshapen:
        raise ValueError(
            f"{what} do not fit: missing {missing}, unknown {unknown}, misshapen {misshapen}"
        )
