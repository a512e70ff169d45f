"""JSON Lines: what is read, how it is split, and errors with file, line and cure."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastrl.datamodules.jsonl_prompts import JsonlPrompts
from fastrl.datamodules.prompts import HELD_OUT_ID_OFFSET

GOOD = '{"prompt": "1+1?", "answer": "2"}'


def write(path: Path, *lines: str | bytes) -> str:
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    )
    return str(path)


def write_questions(path: Path, count: int, letter: str = "q") -> str:
    lines = (json.dumps({"prompt": f"{letter}{i}", "answer": i}) for i in range(count))
    return write(path, *lines)


def test_keys_other_than_question_and_answer_become_metadata(tmp_path: Path) -> None:
    line = '{"problem": "1+1?", "solution": 2, "level": "easy"}'
    path = write(tmp_path / "data.jsonl", "", line, "  ", "")
    source = JsonlPrompts(path, held_out_fraction=0, prompt_key="problem", answer_key="solution")
    (question,) = source.load().train
    assert (question.prompt_id, question.text, question.answer) == (0, "1+1?", "2")
    assert question.metadata == {"level": "easy"}


def test_keys_may_be_dotted_paths_and_questions_conversations(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1+1?"}]
    line = json.dumps({"prompt": messages, "reward_model": {"ground_truth": "2"}})
    path = write(tmp_path / "data.jsonl", line)
    source = JsonlPrompts(path, held_out_fraction=0, answer_key="reward_model.ground_truth")
    (question,) = source.load().train
    assert (question.context, question.text) == ((("system", "Think."),), "1+1?")
    assert question.answer == "2"


def test_a_share_is_held_out_by_seed_and_ids_stay_the_place_in_the_file(tmp_path: Path) -> None:
    path = write_questions(tmp_path / "data.jsonl", 20)

    def load(seed: int) -> tuple[list[int], list[int]]:
        splits = JsonlPrompts(path, held_out_fraction=0.25, seed=seed).load()
        assert all(q.text == f"q{q.prompt_id}" for q in (*splits.train, *splits.held_out))
        return [q.prompt_id for q in splits.train], [q.prompt_id for q in splits.held_out]

    train, held_out = load(0)
    assert len(held_out) == 5
    assert sorted(train + held_out) == list(range(20))
    assert load(0) == (train, held_out)
    assert load(1) != (train, held_out)


def test_a_second_file_is_held_out_with_ids_of_its_own(tmp_path: Path) -> None:
    train = write_questions(tmp_path / "train.jsonl", 4)
    held_out = write(
        tmp_path / "test.jsonl", GOOD, json.dumps({"prompt": "q2", "answer": "trained on"})
    )
    splits = JsonlPrompts(train, held_out_path=held_out).load()
    assert [q.prompt_id for q in splits.train] == [0, 1, 3]
    assert [q.prompt_id for q in splits.held_out] == [HELD_OUT_ID_OFFSET, HELD_OUT_ID_OFFSET + 1]
    assert splits.num_duplicates == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "?", "answer"}', "data.jsonl, line 3, column 25: malformed JSON"),
        ("[1, 2]", "data.jsonl, line 3: expected a JSON object, got list"),
        ('{"question": "?", "answer": "2"}',
         "no key 'prompt', found 'question', 'answer'; mend the data or set prompt_key"),
        ('{"prompt": "?"}', "no key 'answer', found 'prompt'; mend the data or set answer_key"),
        ("{}", "line 3: no key 'prompt', found none"),
        ('{"prompt": " ", "answer": "2"}', "line 3: 'prompt' must be a non-empty string, got ' '"),
        ('{"prompt": 5, "answer": "2"}',
         "line 3: 'prompt' must be a non-empty string or a list of chat messages, got 5"),
        ('{"prompt": "?", "answer": null}', "'answer' must be a string or a number, got None"),
        ('{"prompt": "?", "answer": true}', "'answer' must be a string or a number, got True"),
        (b'{"prompt": "\xff", "answer": "2"}', "line 3: not UTF-8 text"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_by_file_and_number(
    tmp_path: Path, line: str | bytes, message: str
) -> None:
    path = write(tmp_path / "data.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(ValueError, match=re.escape(message)):
        JsonlPrompts(path).load()


@pytest.mark.parametrize("lines", [[], ["", "  "]])
def test_an_empty_file_is_an_error(tmp_path: Path, lines: list[str]) -> None:
    path = write(tmp_path / "data.jsonl", *lines)
    with pytest.raises(ValueError, match=r"data\.jsonl is empty; expected one JSON object a line"):
        JsonlPrompts(path).load()


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jsonl does not exist"):
        JsonlPrompts(str(tmp_path / "none.jsonl")).load()


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_the_held_out_fraction_is_checked(fraction: float) -> None:
    arguments: dict[str, Any] = {"path": "x", "held_out_fraction": fraction}
    with pytest.raises(ValueError, match=r"held_out_fraction of JsonlPrompts must be in \[0, 1\)"):
        JsonlPrompts(**arguments)
