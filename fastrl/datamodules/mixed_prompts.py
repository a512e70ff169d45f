"""Questions of several sources in one: tasks side by side, or tasks and conversations.

Leaves out shares and curricula: each source gives as many questions as it has, and a pass takes
every one of them once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from fastrl.datamodules.prompts import (
    HELD_OUT_ID_OFFSET,
    PromptSource,
    Question,
    QuestionSplits,
    split_disjoint,
)


class MixedPrompts(PromptSource):
    """All questions of its sources, numbered through in their order.

    What one source holds out is dropped from the training questions of all, and counted.

    Args:
        sources: At least one; their order decides the questions' ids.
    """

    def __init__(self, sources: Sequence[PromptSource]) -> None:
        if not sources:
            raise ValueError("MixedPrompts needs a source of questions, got none; set sources")
        self.sources = tuple(sources)

    def load(self) -> QuestionSplits:
        """Load them all; errors are those of the sources."""
        splits = [source.load() for source in self.sources]
        train = _renumbered((one.train for one in splits), first_id=0)
        held_out = _renumbered((one.held_out for one in splits), first_id=HELD_OUT_ID_OFFSET)
        mixed = split_disjoint(train, held_out, source="MixedPrompts")
        num_duplicates = mixed.num_duplicates + sum(one.num_duplicates for one in splits)
        return dataclasses.replace(mixed, num_duplicates=num_duplicates)


def _renumbered(parts: Iterable[Sequence[Question]], first_id: int) -> list[Question]:
    questions = [question for part in parts for question in part]
    return [
        dataclasses.replace(question, prompt_id=first_id + place)
        for place, question in enumerate(questions)
    ]
