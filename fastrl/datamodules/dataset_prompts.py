"""Questions from Parquet, JSON and CSV files and Hugging Face data sets, local or on the hub.

All of them are read by the `datasets` library (https://huggingface.co/docs/datasets), which only
this file imports, and which keeps an Arrow copy of what it read in its cache. Leaves out streaming:
questions are held in memory, as every source does.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastrl.datamodules.prompts import (
    HELD_OUT_ID_OFFSET,
    PromptSource,
    Question,
    QuestionSplits,
    check_held_out_fraction,
    hold_out_share,
    split_disjoint,
)
from fastrl.datamodules.question_fields import QuestionFields

_FILE_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


class DatasetPrompts(PromptSource):
    r"""Questions of a file or a Hugging Face data set; needs `pip install -e ".[data]"`.

    `path` is a `.parquet`, `.json`, `.jsonl` or `.csv` file, a folder of such files, a folder that
    `Dataset.save_to_disk` wrote, or a data set's name on the Hugging Face hub. Rows of verl, and
    with them of the original FastRL, are read with `prompt_key: prompt` and `answer_key:
    reward_model.ground_truth` (`data_source`, `extra_info` and the rest become metadata); GSM8K
    with `path: openai/gsm8k`, `name: main`, `held_out_split: test`, `prompt_key: question` and
    `answer_pattern: '#### (.+)'`.

    Args:
        path: Training questions: a file, a folder, or a name on the Hugging Face hub.
        held_out_path: Held-out questions, of the same kinds; `path` where left out.
        name: Configuration of a data set that has several, such as `main` of GSM8K.
        split: Split of `path`, slices as in `train[:90%]` included; a single file is all `train`.
        held_out_split: Split of the held-out questions; with neither this nor `held_out_path`,
            `held_out_fraction` of the training questions is held out.
        held_out_fraction: Share of the questions to hold out, chosen by `seed`, in [0, 1).
        prompt_key: Column of the question, or a dotted path into one: a string, or chat messages
            (role and content) that end with the user's.
        answer_key: Column of the reference answer, or a dotted path into one.
        answer_pattern: Regular expression with one group, whose last match in that column is the
            answer; all of it where left out.
        metadata_keys: Columns, or dotted paths, handed to the reward function as `Prompt.metadata`;
            all but those of question and answer where left out.
        seed: Seeds the choice of the questions held out.
    """

    def __init__(
        self,
        path: str,
        held_out_path: str | None = None,
        name: str | None = None,
        split: str = "train",
        held_out_split: str | None = None,
        held_out_fraction: float = 0.1,
        prompt_key: str = "prompt",
        answer_key: str = "answer",
        answer_pattern: str | None = None,
        metadata_keys: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        check_held_out_fraction(held_out_fraction, type(self).__name__)
        _import_datasets()
        self.path = path
        self.held_out_path = held_out_path
        self.name = name
        self.split = split
        self.held_out_split = held_out_split
        self.held_out_fraction = held_out_fraction
        self.fields = QuestionFields(
            prompt_key=prompt_key,
            answer_key=answer_key,
            answer_pattern=answer_pattern,
            metadata_keys=metadata_keys,
        )
        self.seed = seed

    def load(self) -> QuestionSplits:
        """Read and split; ValueError names the file, the row (from 0) and the column at fault."""
        questions = self._read(self.path, self.split, first_id=0)
        if self.held_out_path is None and self.held_out_split is None:
            return hold_out_share(questions, self.held_out_fraction, self.seed, source=self.path)
        held_out = self._read(
            self.held_out_path or self.path,
            self.held_out_split or "train",
            first_id=HELD_OUT_ID_OFFSET,
        )
        return split_disjoint(questions, held_out, source=self.path)

    def _read(self, path: str, split: str, first_id: int) -> list[Question]:
        place = f"{path}, split {split!r}"
        return [
            self.fields.read(row, first_id + index, f"{place}, row {index}")
            for index, row in enumerate(_load_rows(path, self.name, split))
        ]


def _import_datasets() -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise ValueError(
            "DatasetPrompts needs the `datasets` library, which is not installed; run pip install "
            '-e ".[data]", or use JsonlPrompts, which reads JSON Lines without it'
        ) from error
    return datasets


def _load_rows(path: str, name: str | None, split: str) -> Iterable[dict[str, Any]]:
    """All rows of a split; there is at least one, which the library sees to."""
    datasets = _import_datasets()
    try:
        rows: Iterable[dict[str, Any]] = _open(datasets, path, name, split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = f" ({error.__cause__})" if error.__cause__ is not None else ""
        raise ValueError(
            f"cannot read split {split!r} of data {path!r}: {error}{cause}; expected a file of "
            f"{', '.join(_FILE_FORMATS)}, a folder of them, a folder that save_to_disk wrote, or a "
            f"data set's name on the Hugging Face hub"
        ) from error
    return rows


def _open(datasets: Any, path: str, name: str | None, split: str) -> Any:
    """By what `path` is; a name that looks like a file is not looked for on the hub."""
    file_format = _FILE_FORMATS.get(Path(path).suffix.lower())
    if Path(path).is_file() or (file_format is not None and not Path(path).is_dir()):
        return _open_file(datasets, path, file_format, split)
    for marker in ("dataset_dict.json", "state.json"):
        if (Path(path) / marker).is_file():
            return _open_saved(datasets, path, split)
    return datasets.load_dataset(path, name, split=split)


def _open_file(datasets: Any, path: str, file_format: str | None, split: str) -> Any:
    if file_format is None:
        raise ValueError(f"files of type {Path(path).suffix!r} cannot be read")
    if Path(path).stat().st_size == 0:
        raise ValueError("the file is empty")
    return datasets.load_dataset(file_format, data_files=path, split=split)


def _open_saved(datasets: Any, path: str, split: str) -> Any:
    saved = datasets.load_from_disk(path)
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ValueError(f"it has no such split, but {', '.join(map(repr, saved))}")
        return saved[split]
    if split != "train":
        raise ValueError("it was saved as a single data set, whose one split is 'train'")
    return saved
