"""A drafter's vocabulary from the responses that a run has written."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from trim_vocabulary import parse, trim

from fastrl.rollout.drafters.eagle import EagleDrafter

MODELS = Path(__file__).parents[2] / "models/quickstart"
EOS = AutoConfig.from_pretrained(MODELS / "policy").eos_token_id


def options(tmp_path, size):
    return parse(
        [
            *("--model", str(MODELS / "policy"), "--drafter", str(MODELS / "drafter")),
            *("--rollouts", str(tmp_path / "**/step_*.jsonl"), "--size", str(size)),
            *("--output", str(tmp_path / f"trimmed_{size}")),
        ]
    )


@pytest.fixture
def rollouts(tmp_path):
    """Ten responses in two files: the first is held out, 7 comes most often in the others."""
    responses = [[50, 7, 51], *[[7, 7, 40 + number % 3] for number in range(9)]]
    (tmp_path / "run").mkdir()
    for name, some in (("step_000001", responses[:4]), ("step_000002", responses[4:])):
        lines = (json.dumps({"tokens": tokens}) + "\n" for tokens in some)
        (tmp_path / "run" / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "run" / "held_out_000001.jsonl").write_text("no rollouts of training")


def test_the_most_frequent_tokens_and_the_end_of_a_response(tmp_path, rollouts, capsys):
    trim(options(tmp_path, 3))
    drafter = EagleDrafter.from_pretrained(tmp_path / "trimmed_3")
    assert drafter.token_map_F.tolist() == sorted((EOS, 7, 40))
    before = EagleDrafter.from_pretrained(MODELS / "drafter")
    for (name, ours), (_, theirs) in zip(
        drafter.named_weights(), before.named_weights(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    printed = capsys.readouterr().out
    assert f"3 of {drafter.config.vocab_size} tokens cover 77.78% of 27 tokens" in printed
    assert "33.33% of 3 others" in printed


def test_a_trimmed_drafter_is_trimmed_further(tmp_path, rollouts, capsys):
    """What it covers is of all tokens, also those that it could not draft before."""
    trim(options(tmp_path, 5))
    again = dataclasses.replace(
        options(tmp_path, 3), drafter=str(tmp_path / "trimmed_5"), output=tmp_path / "again"
    )
    capsys.readouterr()
    trim(again)
    tokens = EagleDrafter.from_pretrained(tmp_path / "again").token_map_F.tolist()
    assert tokens == sorted((EOS, 7, 40))
    assert "cover 77.78% of 27 tokens" in capsys.readouterr().out


def test_what_it_cannot_do_is_said(tmp_path, rollouts):
    trim(options(tmp_path, 5))
    with pytest.raises(FileExistsError, match="might be a trained drafter"):
        trim(options(tmp_path, 5))
    with pytest.raises(ValueError, match="a draft vocabulary of 5000 tokens"):
        trim(options(tmp_path, 5000))
    for file in tmp_path.glob("run/*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="RolloutDump"):
        trim(options(tmp_path, 6))
