"""Several sources in one."""

import pytest

from fastrl.datamodules import MixedPrompts, ReasoningGymPrompts, ReasoningGymReward
from fastrl.datamodules.prompts import (
    HELD_OUT_ID_OFFSET,
    PromptSource,
    Question,
    QuestionSplits,
    split_disjoint,
)
from fastrl.types import Prompt


class Listed(PromptSource):
    """Questions of given texts."""

    def __init__(self, train: str, held_out: str) -> None:
        self._texts = train, held_out

    def load(self) -> QuestionSplits:
        train, held_out = (
            [
                Question(prompt_id=first + 7 * place, text=text, answer=text.upper())
                for place, text in enumerate(texts)
            ]
            for first, texts in zip((0, HELD_OUT_ID_OFFSET), self._texts, strict=True)
        )
        return split_disjoint(train, held_out, source="Listed")


def test_questions_of_all_sources_have_ids_of_their_own():
    splits = MixedPrompts([Listed("abc", "xy"), Listed("de", "z")]).load()
    assert [question.text for question in splits.train] == list("abcde")
    assert [question.prompt_id for question in splits.train] == list(range(5))
    assert [question.text for question in splits.held_out] == list("xyz")
    assert [one.prompt_id - HELD_OUT_ID_OFFSET for one in splits.held_out] == [0, 1, 2]
    assert splits.train[4].answer == "E"
    assert splits.num_duplicates == 0


def test_what_one_source_holds_out_no_other_trains_on():
    splits = MixedPrompts([Listed("abx", "x"), Listed("cadx", "b")]).load()
    assert [question.text for question in splits.train] == list("acad")
    assert splits.num_duplicates == 3  # x of the first by itself, b and the second's x here


def test_tasks_side_by_side_are_judged_each_by_its_own():
    tasks = [
        ReasoningGymPrompts(task, num_train=3, num_held_out=1) for task in ("gcd", "chain_sum")
    ]
    splits = MixedPrompts(tasks).load()
    assert [one.metadata["task"] for one in splits.train] == ["gcd"] * 3 + ["chain_sum"] * 3
    assert MixedPrompts(tasks).load() == splits
    for question in splits.train:
        prompt = Prompt(
            prompt_id=question.prompt_id,
            text=question.text,
            tokens=(1,),
            answer=question.answer,
            metadata=question.metadata,
        )
        assert ReasoningGymReward().score(f"<answer>{question.answer}</answer>", prompt) == 1


def test_no_source_is_refused():
    with pytest.raises(ValueError, match="needs a source"):
        MixedPrompts([])
