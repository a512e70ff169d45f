"""Tokenization through the chat template; over-long prompts are left out and counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastrl.datamodules.chat_template import load_tokenizer, tokenize_questions
from fastrl.datamodules.prompts import Question
from fastrl.types import Prompt
from tests.datamodules.conftest import save_tokenizer


def tokenize(
    model_folder: str, *texts: str, limit: int = 100, system: str | None = None
) -> list[Prompt]:
    questions = [
        Question(prompt_id=i, text=text, answer=f"a{i}", metadata={"i": i})
        for i, text in enumerate(texts)
    ]
    return tokenize_questions(
        questions,
        load_tokenizer(model_folder),
        system_prompt=system,
        max_prompt_tokens=limit,
        split="training",
    )


def decode(prompt: Prompt) -> str:
    return "".join(map(chr, prompt.tokens))


def test_prompts_follow_the_template_and_end_where_the_response_begins(model_folder: str) -> None:
    assert [decode(prompt) for prompt in tokenize(model_folder, "one", "two\nlines")] == [
        ">one=",
        ">two\nlines=",
    ]
    assert decode(tokenize(model_folder, "one", system="Be brief.")[0]) == "^Be brief.>one="


def test_messages_before_the_question_go_through_the_template_too(model_folder: str) -> None:
    def tokens(system: str | None, *context: tuple[str, str]) -> str:
        question = Question(prompt_id=3, text="two", answer="", context=context)
        (prompt,) = tokenize_questions(
            [question],
            load_tokenizer(model_folder),
            system_prompt=system,
            max_prompt_tokens=100,
            split="training",
        )
        return decode(prompt)

    assert tokens(None, ("system", "Think."), ("user", "one")) == "^Think.>one>two="
    assert tokens("Be brief.", ("user", "one")) == "^Be brief.>one>two="
    with pytest.raises(ValueError, match=r"training prompt 3 has a system message of its own"):
        tokens("Be brief.", ("system", "Think."))


def test_prompts_keep_the_question_its_answer_and_metadata(model_folder: str) -> None:
    prompt = tokenize(model_folder, "one", "two")[1]
    assert (prompt.prompt_id, prompt.text, prompt.answer) == (1, "two", "a1")
    assert prompt.metadata == {"i": 1}


def test_over_long_prompts_are_left_out_and_counted_once(
    model_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = tokenize(model_folder, "four", "fivee", "3", "sixsix", limit=6)
    assert [prompt.text for prompt in prompts] == ["four", "3"]
    assert [prompt.prompt_id for prompt in prompts] == [0, 2]
    assert len(caplog.records) == 1
    assert (
        "left out 2 of 4 training prompts, longer than 6 tokens (the longest has 8)" in caplog.text
    )


def test_nothing_is_said_when_all_fit(model_folder: str, caplog: pytest.LogCaptureFixture) -> None:
    tokenize(model_folder, "four", limit=6)
    assert not caplog.records


def test_none_left_is_an_error_naming_the_shortest_and_the_limit(model_folder: str) -> None:
    with pytest.raises(
        ValueError, match=r"all 2 training prompts are longer than 5 tokens \(the shortest has 6\)"
    ):
        tokenize(model_folder, "four", "sixsix", limit=5)


def test_a_tokenizer_without_a_chat_template_is_an_error(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(ValueError, match="has no chat template"):
        load_tokenizer(str(tmp_path))
