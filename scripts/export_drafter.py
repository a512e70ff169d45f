"""Write a drafter in the layout that stock SGLang loads: a published one, or one of a run.

Reads EAGLE and EAGLE-3 drafters in the layouts of SafeAILab/EAGLE and SGLang
(fastrl/rollout/drafters/checkpoints.py), trimmed ones with their vocabulary. With a checkpoint of
a run, its co-trained weights take the place of the folder's. Weights keep their values as float32,
and in the dtype they were published in. Leaves out training.

    python scripts/export_drafter.py --drafter runs/drafters/smollm2 --ckpt CKPT --output exported
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jsonargparse
import torch
from transformers import AutoConfig

from fastrl.model_files import resolve_model
from fastrl.rollout.drafters.loading import load_drafter
from fastrl.rollout.drafters.vocabulary import TOKEN_MAP_FILE


@dataclass(frozen=True, kw_only=True)
class Export:
    """What to write, and where."""

    drafter: str
    """Folder of the drafter."""
    model: str | None = None
    """The target, which some published EAGLE-3 drafters leave to say what layers they read."""
    output: Path
    """Folder to write to, which must hold no drafter yet."""
    ckpt: str | None = None
    """Checkpoint of a run that trained this drafter, whose weights are taken."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """To write; the narrower ones round what a run has trained."""


def export(wanted: Export) -> None:
    """Write it; raises FileExistsError rather than write over another."""
    if (wanted.output / "config.json").exists():
        raise FileExistsError(
            f"{wanted.output} holds a model already; give another --output, or remove it"
        )
    target = None
    if wanted.model is not None:
        target = AutoConfig.from_pretrained(resolve_model(wanted.model))
    drafter = load_drafter(wanted.drafter, target)
    if wanted.ckpt is not None:
        checkpoint = torch.load(wanted.ckpt, map_location="cpu", weights_only=True)
        states = [
            state
            for name, state in checkpoint["callbacks"].items()
            if name.startswith("DrafterTraining")
        ]
        if not states:
            raise ValueError(
                f"checkpoint {wanted.ckpt} has no drafter: its run co-trained none; leave --ckpt "
                f"out (a warm-up writes its drafter to model.output)"
            )
        drafter.check_reads_the_same(states[0])
        drafter.load_weights(states[0]["drafter"].items(), source=wanted.ckpt)
    drafter.to(getattr(torch, wanted.dtype)).save_pretrained(wanted.output)
    algorithm = "EAGLE" if drafter.PREDICTS_HIDDEN else "EAGLE3"
    print(
        f"the drafter is in {wanted.output}, for speculative_draft_model_path of SGLang's "
        f"{algorithm}"
    )
    if (wanted.output / TOKEN_MAP_FILE).is_file():
        print(f"and its vocabulary, for speculative_token_map: {wanted.output / TOKEN_MAP_FILE}")


def parse(args: list[str] | None = None) -> Export:
    """The drafter that the command line asks for."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    wanted: Export = jsonargparse.auto_cli(Export, args=args, as_positional=False)
    return wanted


if __name__ == "__main__":
    export(parse())
