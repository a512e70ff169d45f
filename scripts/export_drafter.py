"""Write an EAGLE drafter in the layout that stock SGLang loads: a published one, or one of a run.

Reads the layouts of SafeAILab/EAGLE and SGLang (fastrl/rollout/drafters/checkpoints.py). With a
checkpoint of a run, its co-trained weights take the place of the folder's. Weights keep their
values as float32, and in the dtype they were published in. Leaves out EAGLE-3.

    python scripts/export_drafter.py --drafter runs/drafters/smollm2 --ckpt CKPT --output exported
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jsonargparse
import torch

from fastrl.rollout.drafters.loading import load_drafter


@dataclass(frozen=True, kw_only=True)
class Export:
    """What to write, and where."""

    drafter: str
    """Folder of the drafter."""
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
    drafter = load_drafter(wanted.drafter)
    if wanted.ckpt is not None:
        checkpoint = torch.load(wanted.ckpt, map_location="cpu", weights_only=True)
        weights = [
            state["drafter"]
            for name, state in checkpoint["callbacks"].items()
            if name.startswith("DrafterTraining")
        ]
        if not weights:
            raise ValueError(
                f"checkpoint {wanted.ckpt} has no drafter: its run trained none; leave --ckpt out"
            )
        drafter.load_weights(weights[0].items(), source=wanted.ckpt)
    drafter.to(getattr(torch, wanted.dtype)).save_pretrained(wanted.output)
    print(f"the drafter is in {wanted.output}, for speculative_draft_model_path of SGLang's EAGLE")


def parse(args: list[str] | None = None) -> Export:
    """The drafter that the command line asks for."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    wanted: Export = jsonargparse.auto_cli(Export, args=args, as_positional=False)
    return wanted


if __name__ == "__main__":
    export(parse())
