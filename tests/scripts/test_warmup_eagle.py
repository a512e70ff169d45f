"""The short cut: its options reach the fit, which ends, goes on, and leaves a drafter."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from warmup_eagle import parse, run

from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.loss import LossSettings
from tests.warmup_runs import POLICY, write_responses

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def argv(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns when pytest's own arguments are there."""
    monkeypatch.setattr(sys, "argv", ["fastrl"])


def warm_up(folder: Path, *own: str, others: tuple[str, ...] = ()) -> None:
    options = (
        *("--base_model_path", POLICY, "--output", str(folder / "drafter")),
        *("--accelerator", "cpu", "--learning_rate", "6e-3", *own),
    )
    run(*parse([*options, "--", "--data.init_args.prompts_per_shard=8", *others]))


def test_given_responses_warm_a_drafter_up_and_a_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_responses(tmp_path)
    keys = ("--data_path", str(data), "--response_key", "response")
    warm_up(tmp_path, *keys, "--num_steps", "4")
    drafter = EagleDrafter.from_pretrained(tmp_path / "drafter")
    run_folder = tmp_path / "drafter_warmup"
    (checkpoint,) = run_folder.rglob("last.ckpt")
    state = torch.load(checkpoint, weights_only=True)
    assert state["rl_step"] == 4
    assert torch.equal(state["state_dict"]["drafter.fc.weight"], drafter.fc.weight)
    assert len(list((run_folder / "features").rglob("*.safetensors"))) == 4
    shown = capsys.readouterr().out
    assert "warm-up step 4/4" in shown
    assert "RL step" not in shown
    warm_up(tmp_path, *keys, "--num_steps", "6", others=("--ckpt_path=last",))
    again = torch.load(checkpoint, weights_only=True)
    assert again["rl_step"] == 6
    shown = capsys.readouterr().out
    assert "warm-up step 4/" not in shown
    assert "warm-up step 6/6" in shown


def test_hass_trains_an_eagle_drafter_by_its_own_loss(tmp_path: Path) -> None:
    recipe, _ = parse(["--base_model_path", POLICY, "--output", str(tmp_path), "--kind", "hass"])
    shared, own = (
        yaml.safe_load((ROOT / "configs" / f"warmup_{kind}.yaml").read_text())["model"]["init_args"]
        for kind in ("eagle", recipe.kind)
    )
    assert "kind" not in own
    assert {**own, "loss": None, "output": None} == {**shared, "loss": None, "output": None}
    settings = LossSettings(**own["loss"])
    assert (settings.num_depths, settings.top_k, settings.detaches_depths) == (3, 10, True)
    # Of cross-entropy, SmoothL1 and top-k, as HASS's train/main_hass.py has them.
    assert (settings.hidden_weight, settings.top_k_weight) == (1.0 / 0.1, 1.0 / 0.1)
    data = write_responses(tmp_path)
    keys = ("--data_path", str(data), "--response_key", "response")
    warm_up(tmp_path, *keys, "--num_steps", "2", "--kind", "hass", "--draft_vocab_size", "20")
    assert EagleDrafter.from_pretrained(tmp_path / "drafter").num_drafted == 20


def test_without_responses_the_model_generates_them(tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"q": f"{n} + 1 ="}) + "\n" for n in range(10)))
    warm_up(
        tmp_path,
        *("--data_path", str(data), "--prompt_key", "q", "--num_steps", "2"),
        others=("--data.init_args.sampling.max_tokens=8",),
    )
    EagleDrafter.from_pretrained(tmp_path / "drafter")
    folder = tmp_path / "drafter_warmup" / "features"
    shards = {path.name: load_file(path) for path in folder.rglob("*.safetensors")}
    for shard in shards.values():
        num_generated = shard["num_tokens"] - shard["num_prompt_tokens"]
        assert ((num_generated >= 1) & (num_generated <= 8)).all()
    (held_out,) = (shard for name, shard in shards.items() if name.startswith("held_out"))
    assert len(held_out["num_tokens"]) == 2  # a tenth of the prompts, two responses each
    assert len(shards) > 1


def test_a_drafter_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--data_path", str(write_responses(tmp_path)), "--response_key", "response")
    warm_up(tmp_path, *data, "--num_steps", "1")
    with pytest.raises(SystemExit) as exit_:
        warm_up(tmp_path, *data, "--num_steps", "1")
    assert exit_.value.code == 2
    assert "holds a drafter already" in capsys.readouterr().err


def test_responses_without_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set data_path"):
        warm_up(tmp_path, "--response_key", "response")


def test_the_readmes_command_is_understood() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (command,) = re.findall(r"^python scripts/warmup_eagle.py (.*)$", text, flags=re.MULTILINE)
    recipe, _ = parse(command.split())
    assert recipe.output == Path("runs/drafters/smollm2")
