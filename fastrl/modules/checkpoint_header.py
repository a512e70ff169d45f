"""What a checkpoint says of itself, and why it is refused: format, algorithm, model.

Compared before any of its weights are loaded, so that the reason is given in the user's terms.
Leaves out the drafter (datamodules/rollouts.py) and the bandit's arms, which their owners check.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from fastrl.rollout.architecture import architecture, differences

KEY = "fastrl"
"""Where the header is in a checkpoint."""
FORMAT = 6
"""Grows with a change of any part's state after which code and checkpoint do not understand one
another. 2: what the model-based bandit keeps of acceptance and step times, by bucket. 3: a step's
histograms and texts, its heat map, if it is not drawn yet, and estimates of acceptance that a
bucket has of its own. 4: those of n-grams, by rows with a reference. 5: profiles of step times by
context, and steps of the bandit that wait to be learned without their place. 6: co-training's steps
since its last publication, and what it did in idle time."""


def make_header(algorithm: type, config: PretrainedConfig) -> dict[str, Any]:
    """The header of a run's checkpoints; plain values."""
    return {
        "format": FORMAT,
        "algorithm": _path(algorithm),
        "policy": architecture(config.to_dict()),
    }


def check_header(
    checkpoint: Mapping[str, Any], algorithm: type, config: PretrainedConfig, *, is_resume: bool
) -> None:
    """Raise ValueError with the reason unless the checkpoint is one of such a run.

    Args:
        checkpoint: as loaded.
        algorithm: class of the module that is to take it.
        config: of its policy.
        is_resume: whether training goes on; evaluation takes any algorithm's policy.
    """
    if (header := checkpoint.get(KEY)) is None:
        raise ValueError(
            "the checkpoint has no FastRL header, so it is not one of a FastRL run; give one that "
            "`fastrl fit` wrote"
        )
    if header["format"] != FORMAT:
        fix = "or a newer one" if header["format"] > FORMAT else "or start anew"
        raise ValueError(
            f"the checkpoint has format {header['format']}, this version of FastRL reads {FORMAT}: "
            f"callbacks keep other state in it; use the version that wrote it, {fix}"
        )
    if different := differences(header["policy"], architecture(config.to_dict())):
        raise ValueError(
            f"the checkpoint is of another model: {different}; set model.model_path to the model "
            f"it was trained from, or start anew"
        )
    if is_resume and header["algorithm"] != _path(algorithm):
        raise ValueError(
            f"the checkpoint is of a run of {header['algorithm']}, this one is of "
            f"{_path(algorithm)}: its optimizer and counters belong to the other; resume with that "
            f"class, or start anew"
        )


def _path(algorithm: type) -> str:
    return f"{algorithm.__module__}.{algorithm.__qualname__}"
