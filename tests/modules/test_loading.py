"""What a model folder must hold, and what loading makes of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastrl.modules.loading import load_causal_lm


def test_weights_are_float32_and_dropout_is_off(model_folder: str) -> None:
    assert json.loads((Path(model_folder) / "config.json").read_text())["attention_dropout"] == 0.5
    model = load_causal_lm(model_folder).train()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    tokens = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(model(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_a_missing_folder_is_named_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere' does not exist.*Give its path"):
        load_causal_lm(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_causal_lm(str(tmp_path))


def test_what_may_be_a_name_on_the_hub_is_told_how_to_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"hf download Qwen/Qwen2\.5-7B --local-dir Qwen/"):
        load_causal_lm("Qwen/Qwen2.5-7B")
    for path in ("models/mine/policy", "/models/mine", "mine"):
        with pytest.raises(FileNotFoundError) as error:
            load_causal_lm(path)
        assert "hf download" not in str(error.value)


def test_weights_missing_from_the_checkpoint_are_an_error(
    model_folder: str, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, first 'model\.layers\.1\.mlp\.up_proj"):
        load_causal_lm(str(folder))


def test_an_architecture_that_changes_logits_after_the_head_is_refused(
    model_folder: str, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"final_logit_softcapping": 30.0}))
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        load_causal_lm(str(folder))
