"""A fresh drafter: it fits its model, repeats by its seed, and takes no other one's place."""

import json
from pathlib import Path

import pytest
import torch
from make_drafter import Recipe, make, parse
from safetensors.torch import load_file
from transformers import AutoConfig

from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.eagle3 import Eagle3Drafter
from fastrl.rollout.drafters.loading import load_drafter

POLICY = str(Path(__file__).parents[2] / "models/quickstart/policy")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_it_fits_its_model_and_repeats_by_its_seed(tmp_path, capsys):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make(Recipe(model=POLICY, output=tmp_path / name, seed=seed))
    EagleDrafter.from_pretrained(tmp_path / "a", AutoConfig.from_pretrained(POLICY))
    first, same, other = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(weight, same[name]) for name, weight in first.items())
    assert not torch.equal(first["fc.weight"], other["fc.weight"])
    assert "million random weights" in capsys.readouterr().out


def test_an_eagle_3_drafter_fits_its_model(tmp_path):
    make(Recipe(model=POLICY, output=tmp_path / "drafter", kind="eagle3"))
    drafter = load_drafter(tmp_path / "drafter", AutoConfig.from_pretrained(POLICY))
    assert isinstance(drafter, Eagle3Drafter)


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_it_drafts_the_tokens_that_come_most_often(tmp_path, kind, capsys):
    config = AutoConfig.from_pretrained(POLICY)
    lines = [json.dumps({"tokens": [7, 7, 40, 40, number % 3 + 50]}) + "\n" for number in range(9)]
    (tmp_path / "step_000001.jsonl").write_text("".join(lines))
    rollouts = str(tmp_path / "*.jsonl")
    options = {"model": POLICY, "output": tmp_path / "drafter", "kind": kind}
    make(Recipe(**options, draft_vocab_size=3, rollouts=rollouts))
    drafter = load_drafter(tmp_path / "drafter", config)
    assert drafter.token_map_F.tolist() == sorted((7, 40, config.eos_token_id))
    assert "3 tokens cover 80.00%" in capsys.readouterr().out
    with pytest.raises(ValueError, match="give both, or neither"):
        Recipe(**options, draft_vocab_size=3)


def test_a_drafter_that_is_there_stays(tmp_path):
    make(Recipe(model=POLICY, output=tmp_path / "drafter"))
    before = weights(tmp_path / "drafter")
    with pytest.raises(FileExistsError, match="might be a trained drafter"):
        make(Recipe(model=POLICY, output=tmp_path / "drafter", seed=1))
    assert torch.equal(weights(tmp_path / "drafter")["fc.weight"], before["fc.weight"])


def test_a_model_that_is_not_there_is_named(tmp_path):
    recipe = parse(["--model", str(tmp_path / "nothing"), "--output", str(tmp_path / "drafter")])
    with pytest.raises(FileNotFoundError, match="nothing' does not exist"):
        make(recipe)
