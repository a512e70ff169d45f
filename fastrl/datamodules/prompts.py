"""Where questions come from and in which order a run asks them.

A `PromptSource` reads or generates questions, split into training and held-out ones; its kinds are
`ReasoningGymPrompts`, `JsonlPrompts` and `DatasetPrompts`, and `MixedPrompts` joins several.
`PromptOrder` and `PromptCursor` decide which of the training questions an RL step takes. Leaves out
tokenization (chat_template.py).
"""

from __future__ import annotations

import itertools
import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_log = logging.getLogger(__name__)

HELD_OUT_ID_OFFSET = 1 << 40
"""Prompt ids of held-out questions start here, so that no two prompts of a run share random
streams."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question before tokenization."""

    prompt_id: int
    """Its place in the data set, from 0; held-out questions of a split of their own count from
    HELD_OUT_ID_OFFSET. Filtering other questions out does not change it."""
    text: str
    answer: str
    context: tuple[tuple[str, str], ...] = ()
    """Chat messages before the question, (role, content) each."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Becomes `Prompt.metadata`: what the reward function wants besides the answer; picklable."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionSplits:
    """Training and held-out questions; none occurs, word by word, in both."""

    train: tuple[Question, ...]
    held_out: tuple[Question, ...]
    num_duplicates: int
    """Training questions dropped because they are held out as well."""


class PromptSource(ABC):
    """Supplies a run's questions. Subclass it, and name the subclass as `class_path` in YAML."""

    @abstractmethod
    def load(self) -> QuestionSplits:
        """Read or generate all questions; the same ones on every call and every rank."""


def split_disjoint(
    train: Sequence[Question], held_out: Sequence[Question], source: str
) -> QuestionSplits:
    """Drop from `train` what is held out, and count it.

    Raises ValueError, naming `source`, if no training question is left.
    """
    known = {(question.context, question.text) for question in held_out}
    kept = tuple(question for question in train if (question.context, question.text) not in known)
    num_duplicates = len(train) - len(kept)
    if not kept:
        raise ValueError(
            f"{source}: none of its {len(train)} training questions is left after dropping those "
            f"that are among the {len(held_out)} held-out ones; hold out fewer, or make the "
            f"questions more varied"
        )
    if num_duplicates:
        _log.warning(
            "%s: dropped %d of %d training questions that are held out as well",
            source,
            num_duplicates,
            len(train),
        )
    return QuestionSplits(train=kept, held_out=tuple(held_out), num_duplicates=num_duplicates)


def hold_out_share(
    questions: Sequence[Question], fraction: float, seed: int, source: str
) -> QuestionSplits:
    """Hold out a share of the questions, chosen by `seed`; errors as `split_disjoint`."""
    num_held_out = round(len(questions) * fraction)
    chosen = set(random.Random(f"held out/{seed}").sample(range(len(questions)), num_held_out))
    train = [question for index, question in enumerate(questions) if index not in chosen]
    return split_disjoint(train, [questions[index] for index in sorted(chosen)], source)


def check_held_out_fraction(fraction: float, source: str) -> None:
    """ValueError, naming the `source`'s class, for what is no share of its questions."""
    if not 0 <= fraction < 1:
        raise ValueError(f"held_out_fraction of {source} must be in [0, 1), got {fraction}")


@dataclass(frozen=True, slots=True)
class PromptOrder:
    """The endless order in which a run takes its prompts: a fresh permutation of all of them each
    pass.

    It is a function of (seed, pass) alone, so it depends neither on the number of ranks nor on the
    past.
    """

    num_prompts: int
    seed: int

    def take(self, position: int, count: int) -> tuple[list[int], int]:
        """Indices of `count` distinct prompts from `position` on, and the position after them.

        What is left of a pass is skipped if it is less than `count`: a step that took the same
        prompt twice would sample the same responses twice.
        """
        if count > self.num_prompts:
            raise ValueError(
                f"prompts_per_step {count} exceeds the {self.num_prompts} training prompts, but "
                f"the prompts of a step are distinct; lower data.prompts_per_step or add prompts"
            )
        pass_index, offset = divmod(position, self.num_prompts)
        if offset + count > self.num_prompts:
            pass_index, offset = pass_index + 1, 0
        permutation = list(range(self.num_prompts))
        random.Random(f"prompt order/{self.seed}/{pass_index}").shuffle(permutation)
        start = pass_index * self.num_prompts + offset
        return permutation[offset : offset + count], start + count


@dataclass(slots=True)
class PromptCursor:
    """Position in the order at which the next RL step starts taking prompts.

    It moves once the policy has finished the step that took them, not when they are taken: a
    checkpoint written in between (on an exception, on Ctrl-C) repeats the step instead of skipping
    its prompts.
    """

    position: int = 0
    _rl_step: int = -1
    _position_after: int = 0

    def at(self, rl_step: int) -> int:
        """Position from which RL step `rl_step` takes prompts."""
        if rl_step > self._rl_step >= 0:
            self.position, self._rl_step = self._position_after, -1
        return self.position

    def taken(self, rl_step: int, position_after: int) -> None:
        """RL step `rl_step` took the prompts up to `position_after`."""
        self._rl_step, self._position_after = rl_step, position_after


def even_slices(length: int, num_slices: int) -> list[slice]:
    """Consecutive slices that cover `length` items, their sizes differing by one at most."""
    bounds = [index * length // num_slices for index in range(num_slices + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
