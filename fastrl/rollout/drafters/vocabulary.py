"""A drafter's vocabulary: the tokens it may draft, where these are fewer than the target's.

Most of a draft step goes into the LM head where vocabularies are large, and most tokens are rare.
A trimmed vocabulary is a list of target tokens; a drafter's LM head is the target's rows for them,
so its drafts are cheaper, and no other token is ever drafted. What is verified and sampled stays
the target's business: a missing token is one that was not foreseen.

Sources: FR-Spec (Zhao et al., ACL 2025, arXiv 2502.14856); SGLang loads the list of an EAGLE
drafter as `speculative_token_map`. Shape legend: fastrl/types.py; F tokens of the vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

TOKEN_MAP_FILE = "token_map.pt"
"""Of a drafter's folder: a list of token ids, as SGLang reads it."""
CONFIG_KEY = "hot_vocab_size"
"""In a drafter's config.json, by SGLang's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrequentTokens:
    """A choice of tokens."""

    token_ids: tuple[int, ...]
    """Ascending."""
    coverage: float
    """Share of the counted tokens that are among them; 1 where none was counted."""


def frequent_tokens(
    sequences: Iterable[Sequence[int]], *, vocab_size: int, size: int, always: Sequence[int] = ()
) -> FrequentTokens:
    """The tokens that come most often; of those that come as often, the lower ids.

    Args:
        sequences: of responses.
        vocab_size: of the target.
        size: tokens to choose.
        always: tokens that are among them however rare, such as those that end a response.

    Raises:
        ValueError: a size or a token out of range.
    """
    counts: Counter[int] = Counter()
    for tokens in sequences:
        counts.update(tokens)
    return most_counted(counts, vocab_size=vocab_size, size=size, always=always)


def most_counted(
    counts: Mapping[int, int], *, vocab_size: int, size: int, always: Sequence[int] = ()
) -> FrequentTokens:
    """The same of tokens that have been counted."""
    fixed = set(always)
    if not max(len(fixed), 1) <= size <= vocab_size:
        raise ValueError(
            f"a draft vocabulary of {size} tokens: expected at least the {len(fixed)} that are "
            f"always in it and at most the target's {vocab_size}"
        )
    if strange := sorted(token for token in (*fixed, *counts) if not 0 <= token < vocab_size):
        raise ValueError(
            f"tokens {strange[:5]} are beyond the target's vocabulary of {vocab_size}: are these "
            f"sequences of another tokenizer?"
        )
    ranked = sorted(range(vocab_size), key=lambda t: (t not in fixed, -counts.get(t, 0)))
    chosen = tuple(sorted(ranked[:size]))
    total = sum(counts.values())
    covered = sum(counts.get(token, 0) for token in chosen)
    return FrequentTokens(token_ids=chosen, coverage=covered / total if total else 1.0)


def checked_token_map(token_ids: Sequence[int] | Tensor, vocab_size: int, source: str) -> Tensor:
    """[F] int64; ValueError for what is no ascending list of the target's tokens."""
    token_map_F = torch.as_tensor(token_ids, dtype=torch.int64).flatten()
    is_ascending = bool((token_map_F[1:] > token_map_F[:-1]).all())
    if (
        not len(token_map_F)
        or not is_ascending
        or token_map_F[0] < 0
        or token_map_F[-1] >= vocab_size
    ):
        raise ValueError(
            f"the draft vocabulary of {source} has to be a list of different token ids, ascending "
            f"and below {vocab_size}; got {len(token_map_F)} from {token_map_F[:3].tolist()} to "
            f"{token_map_F[-3:].tolist()}"
        )
    return token_map_F


def write_token_map(folder: Path, token_map_F: Tensor) -> None:
    """Into a drafter's folder."""
    torch.save(token_map_F.tolist(), folder / TOKEN_MAP_FILE)


def read_token_map(folder: Path, vocab_size: int, size: int | None) -> Tensor | None:
    """Of a drafter's folder; None for one that drafts all tokens.

    Raises:
        FileNotFoundError: the configuration speaks of one, but there is none.
        ValueError: it is another than the configuration says, or none at all.
    """
    path = folder / TOKEN_MAP_FILE
    if not path.is_file():
        if size is None:
            return None
        raise FileNotFoundError(
            f"drafter checkpoint {folder} has no {TOKEN_MAP_FILE}, but by its config.json it "
            f"drafts {size} tokens ({CONFIG_KEY}): copy the file too"
        )
    token_map_F = checked_token_map(
        torch.load(path, weights_only=True), vocab_size, f"drafter {folder}"
    )
    if size is None or len(token_map_F) != size:
        raise ValueError(
            f"drafter checkpoint {folder}: {TOKEN_MAP_FILE} has {len(token_map_F)} tokens, but "
            f"{CONFIG_KEY} in its config.json is {size}; they are of two drafters"
        )
    return token_map_F


def check_same_vocabulary(ours_F: Tensor | None, resumed_F: Tensor | None) -> None:
    """Raise ValueError unless a drafter's vocabulary is that of the run that is resumed."""
    if ours_F is None or resumed_F is None:
        is_same = ours_F is resumed_F
    else:
        is_same = torch.equal(ours_F.cpu(), resumed_F.cpu())
    if not is_same:
        sizes = ["all" if one is None else str(len(one)) for one in (ours_F, resumed_F)]
        raise ValueError(
            f"the drafter of engine.drafter_path drafts {sizes[0]} tokens, the resumed run's "
            f"{sizes[1]}, or others: resume with the drafter that the run began with"
        )
