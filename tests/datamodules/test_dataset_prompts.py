"""Files and data sets through the real `datasets` library: formats, splits, verl's Parquet, errors.

What the hub would send is a folder in its layout: there is no network in a test.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from fastrl.datamodules.dataset_prompts import DatasetPrompts
from fastrl.datamodules.jsonl_prompts import JsonlPrompts
from fastrl.datamodules.prompts import HELD_OUT_ID_OFFSET, Question

Row = dict[str, Any]


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def rows(count: int, letter: str = "q") -> list[Row]:
    return [{"prompt": f"{letter}{i}", "answer": str(i), "level": i % 3} for i in range(count)]


def write(path: Path, content: Sequence[Row]) -> str:
    """In the format of the file's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        dataset = datasets.Dataset.from_list(list(content))
        {
            ".parquet": dataset.to_parquet,
            ".jsonl": dataset.to_json,
            ".csv": dataset.to_csv,
        }[path.suffix](str(path))
    return str(path)


def texts(questions: Sequence[Question]) -> list[str]:
    return [question.text for question in questions]


@pytest.mark.parametrize("suffix", [".parquet", ".json", ".jsonl", ".csv"])
def test_every_format_gives_the_questions_in_the_order_of_its_rows(
    tmp_path: Path, suffix: str
) -> None:
    path = write(tmp_path / f"data{suffix}", rows(5))
    questions = DatasetPrompts(path, held_out_fraction=0).load().train
    assert [(q.prompt_id, q.text, q.answer, q.metadata) for q in questions] == [
        (i, f"q{i}", str(i), {"level": i % 3}) for i in range(5)
    ]


def test_it_reads_and_splits_json_lines_as_jsonl_prompts_does(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", rows(30))
    assert DatasetPrompts(path, seed=3).load() == JsonlPrompts(path, seed=3).load()


def test_verls_parquet_loads_with_two_keys_named(tmp_path: Path) -> None:
    """The columns that verl's preprocessing scripts write."""

    def verl_row(index: int, split: str) -> Row:
        return {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": f"{split} question {index}"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(index)},
            "extra_info": {"split": split, "index": index},
        }

    train = write(tmp_path / "train.parquet", [verl_row(i, "train") for i in range(4)])
    test = write(tmp_path / "test.parquet", [verl_row(i, "test") for i in range(2)])
    splits = DatasetPrompts(
        train, held_out_path=test, prompt_key="prompt", answer_key="reward_model.ground_truth"
    ).load()
    assert texts(splits.train) == [f"train question {i}" for i in range(4)]
    assert [q.answer for q in splits.held_out] == ["0", "1"]
    assert [q.prompt_id for q in splits.held_out] == [HELD_OUT_ID_OFFSET, HELD_OUT_ID_OFFSET + 1]
    question = splits.train[3]
    assert question.context == ()
    assert question.metadata["data_source"] == "openai/gsm8k"
    assert question.metadata["extra_info"] == {"split": "train", "index": 3}


def test_a_folder_in_the_hubs_layout_has_its_splits(tmp_path: Path) -> None:
    write(tmp_path / "gsm" / "main" / "train-00000-of-00002.parquet", rows(3))
    write(tmp_path / "gsm" / "main" / "train-00001-of-00002.parquet", rows(2, "r"))
    write(tmp_path / "gsm" / "main" / "test-00000-of-00001.parquet", rows(2, "t"))
    (tmp_path / "gsm" / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n"
        "  - split: train\n    path: main/train-*\n  - split: test\n    path: main/test-*\n---\n"
    )
    source = DatasetPrompts(str(tmp_path / "gsm"), name="main", held_out_split="test")
    splits = source.load()
    assert texts(splits.train) == ["q0", "q1", "q2", "r0", "r1"]
    assert texts(splits.held_out) == ["t0", "t1"]


def test_splits_may_be_slices(tmp_path: Path) -> None:
    path = write(tmp_path / "data.parquet", rows(10))
    splits = DatasetPrompts(path, split="train[:80%]", held_out_split="train[80%:]").load()
    assert texts(splits.train) == [f"q{i}" for i in range(8)]
    assert texts(splits.held_out) == ["q8", "q9"]


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    one = datasets.Dataset.from_list(rows(3))
    other = datasets.Dataset.from_list(rows(2, "t"))
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": other}).save_to_disk(tmp_path / "both")
    alone = DatasetPrompts(str(tmp_path / "one"), held_out_fraction=0).load()
    assert texts(alone.train) == ["q0", "q1", "q2"]
    both = DatasetPrompts(str(tmp_path / "both"), held_out_split="test").load()
    assert (texts(both.train), texts(both.held_out)) == (["q0", "q1", "q2"], ["t0", "t1"])
    with pytest.raises(ValueError, match=r"split 'dev' .* no such split, but 'train', 'test'"):
        DatasetPrompts(str(tmp_path / "both"), split="dev").load()
    with pytest.raises(ValueError, match="saved as a single data set"):
        DatasetPrompts(str(tmp_path / "one"), split="test").load()


def test_a_bad_row_is_named_by_file_split_and_row(tmp_path: Path) -> None:
    path = write(tmp_path / "data.parquet", [*rows(2), {"prompt": "?", "answer": None}])
    message = f"{path}, split 'train', row 2: 'answer' must be a string or a number, got None"
    with pytest.raises(ValueError, match=re.escape(message)):
        DatasetPrompts(path).load()
    with pytest.raises(ValueError, match="no key 'question', found 'prompt', 'answer'"):
        DatasetPrompts(path, prompt_key="question").load()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", '{"prompt": "?"\n', "JSON parse error"),
        ("data.parquet", "not Parquet", "cannot read split 'train' of data '.*data.parquet': "),
        ("data.txt", "text", r"files of type '\.txt' cannot be read; expected a file of \.parquet"),
        ("data.csv", "", "the file is empty"),
        ("data.jsonl", "\n\n", "corresponds to no data"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        DatasetPrompts(str(tmp_path / name)).load()


def test_a_split_without_rows_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "data.parquet", rows(3))
    with pytest.raises(ValueError, match=r"split 'train\[:0\]' of data .* no data"):
        DatasetPrompts(path, split="train[:0]").load()


@pytest.mark.parametrize("path", ["nowhere/data.parquet", "no-such/data-set"])
def test_a_missing_file_and_an_unknown_name_are_errors(path: str) -> None:
    with pytest.raises(ValueError, match=f"cannot read split 'train' of data '{path}'"):
        DatasetPrompts(path).load()


def test_a_missing_library_is_an_error_naming_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=re.escape('pip install -e ".[data]"')):
        DatasetPrompts("data.parquet")


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_the_held_out_fraction_is_checked(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"of DatasetPrompts must be in \[0, 1\)"):
        DatasetPrompts("x.parquet", held_out_fraction=fraction)
