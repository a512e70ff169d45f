"""Give a drafter a vocabulary of its own: the tokens that a model's responses are made of.

A draft step's LM head then has that many rows instead of the model's whole vocabulary; tokens left
out are never drafted, and sampled as before. Tokens are counted in responses that runs have written
(the callback `RolloutDump`), all but every tenth of them, which tell how many tokens of new
responses are covered. The weights stay: co-train the drafter, or go on as it is.

    python scripts/trim_vocabulary.py --model MODEL --drafter DRAFTER --size 4096 \\
        --rollouts 'runs/quickstart/lightning_logs/version_0/rollouts/*.jsonl' --output TRIMMED
"""

from __future__ import annotations

import glob
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jsonargparse
from transformers import AutoConfig

from fastrl.datamodules.chat_template import load_tokenizer
from fastrl.model_files import resolve_model
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.loading import load_drafter
from fastrl.rollout.drafters.vocabulary import frequent_tokens
from fastrl.rollout.end_of_sequence import eos_token_ids

_HELD_OUT = 10
"""One response of so many is not counted, but covered or not."""


@dataclass(frozen=True, kw_only=True)
class Trim:
    """What to make."""

    model: str
    """The target: its folder, or what else a `model_path` may be; tokens that end its responses are
    always drafted."""
    drafter: str
    """Folder of its EAGLE drafter."""
    rollouts: str
    """Files of `RolloutDump`; a pattern with * and **."""
    size: int
    """Tokens to draft; a multiple of 64 suits GPUs."""
    output: Path
    """Folder to write to, which must hold no drafter yet."""


def trim(options: Trim) -> None:
    """Write the drafter with its vocabulary, and print what it covers.

    Raises:
        FileExistsError: the output holds a model.
        FileNotFoundError: no file of rollouts, or no model or drafter.
        ValueError: tokens of another model, or a size out of range.
    """
    if (options.output / "config.json").exists():
        raise FileExistsError(
            f"{options.output} holds a model already, which might be a trained drafter; give "
            f"another --output, or remove it"
        )
    folder = resolve_model(options.model)
    config = AutoConfig.from_pretrained(folder)
    drafter = load_drafter(options.drafter, config)
    responses = list(read_responses(options.rollouts))
    counted = [tokens for number, tokens in enumerate(responses) if number % _HELD_OUT]
    held_out = responses[::_HELD_OUT]
    chosen = frequent_tokens(
        _draftable(counted, drafter),
        vocab_size=drafter.config.vocab_size,
        size=options.size,
        always=eos_token_ids(folder, config, load_tokenizer(folder)),
    )
    drafter.trim_vocabulary(chosen.token_ids)
    drafter.save_pretrained(options.output)
    known = set(chosen.token_ids)
    print(
        f"{options.size} of {drafter.config.vocab_size} tokens cover {_share(counted, known):.2%} "
        f"of {sum(map(len, counted))} tokens that were counted and {_share(held_out, known):.2%} "
        f"of {sum(map(len, held_out))} others; the drafter is in {options.output}"
    )


def _draftable(responses: Sequence[list[int]], drafter: EagleDrafter) -> Sequence[list[int]]:
    """The tokens that it can draft as it is: of others it has no row to keep."""
    if drafter.token_map_F is None:
        return responses
    own = set(drafter.token_map_F.tolist())
    return [[token for token in tokens if token in own] for tokens in responses]


def _share(responses: Sequence[list[int]], known: Collection[int]) -> float:
    """Of all their tokens that are known."""
    total = sum(map(len, responses))
    return sum(token in known for tokens in responses for token in tokens) / max(total, 1)


def read_responses(pattern: str) -> Iterator[list[int]]:
    """Tokens of each response in files of `RolloutDump`; FileNotFoundError if there is none."""
    paths = sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise FileNotFoundError(
            f"no file is named like {pattern}: have a run write its rollouts by the callback "
            f"RolloutDump"
        )
    for path in paths:
        with open(path, encoding="utf-8") as lines:
            yield from (json.loads(line)["tokens"] for line in lines)


def parse(args: list[str] | None = None) -> Trim:
    """What the command line asks for."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    options: Trim = jsonargparse.auto_cli(Trim, args=args, as_positional=False)
    return options


if __name__ == "__main__":
    trim(parse())
