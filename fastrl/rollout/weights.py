"""Refuses what cannot be served exactly: tensors that do not fit, logits changed after the head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def changes_after_head(settings: Mapping[str, Any]) -> list[str]:
    """Settings of a model's configuration by which it scales or caps logits after its LM head."""
    return [name for name in _AFTER_HEAD if settings.get(name) not in (None, 1, False)]


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
