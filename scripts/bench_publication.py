"""How long it takes to give SGLang a new policy and a new drafter, and to compare it with them.

The weights lie where a trainer on the same device has them, in either dtype, and are published
again and again; each publication is timed from the call to its return, after which the engine
generates with the new weights. They are random ones of the model's shape: what is measured does
not depend on their values. Weights of SGLang's dtype on a GPU are read where they are, through the
handles of their memory; others are cast on the way, bucket by bucket. The comparison, number by
number, is what `callbacks/health.py` does after a publication.

    python scripts/bench_publication.py --model qwen2.5-7b --sglang.attention_backend triton \\
        --sglang.mem_fraction_static 0.4 --sglang.server_args.context_length 4096
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from bench_inputs import print_machine, random_weights, write_shape
from sd_engines import SGLangOptions
from torch import Tensor
from transformers import AutoConfig

from fastrl.rollout.bandit import FixedStrategy, InTurns
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.weight_differences import WeightDifference
from fastrl.types import Prompt, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What to measure."""

    model: str
    """A folder with a config.json, or one of qwen2.5-7b and qwen2.5-32b."""
    rounds: int = 5
    """Publications of each, after one that is not counted."""
    trainer_dtypes: list[Literal["float32", "bfloat16"]] = field(
        default_factory=lambda: ["float32", "bfloat16"]
    )
    """Of the published weights: FastRL trains float32 ones."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """SGLang's."""
    device: str = "auto"
    """Where: cpu, cuda, or auto for a GPU if there is one."""
    sglang: SGLangOptions = field(default_factory=SGLangOptions)
    """Options of SGLang."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Publication:
    """Of one model's weights, or their comparison, repeated."""

    seconds: list[float]
    gigabytes: float
    """Of SGLang's copy."""

    def __str__(self) -> str:
        median = statistics.median(self.seconds)
        return (
            f"{median:.3f} s [{min(self.seconds):.3f}, {max(self.seconds):.3f}], "
            f"{self.gigabytes:.2f} GB, {self.gigabytes / median:.1f} GB/s"
        )


def run(bench: Bench) -> Mapping[str, Publication]:
    """Measure both, print a line for each."""
    device = bench.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(write_shape(bench.model, Path(scratch) / "model"))
        config = AutoConfig.from_pretrained(folder)
        drafter = EagleDrafter.for_target(config, seed=0)
        drafter_folder = str(Path(scratch) / "drafter")
        drafter.save_pretrained(drafter_folder)
        print_machine(device, bench.dtype)
        engine = bench.sglang.new_engine(
            drafter=drafter_folder,
            max_batch_size=4,
            dtype=bench.dtype,
            device=device,
            selector=InTurns(["off", "2_1_3"]),
            further={"load_format": "dummy"},
        )
        publications: dict[str, Publication] = {}
        try:
            engine.start(folder)
            for trainer_dtype in bench.trainer_dtypes:
                dtype = getattr(torch, trainer_dtype)
                policy = dict(random_weights(config, dtype=dtype, device=device, seed=0))
                weights = {name: one.to(device, dtype) for name, one in drafter.named_weights()}
                for name, own, work in (
                    ("policy", policy, partial(_publish, engine.load_policy, policy)),
                    ("policy compared", policy, partial(_compare, engine.compare_policy, policy)),
                    ("drafter", weights, partial(_publish, engine.load_drafter, weights)),
                    (
                        "drafter compared",
                        weights,
                        partial(_compare, engine.compare_drafter, weights),
                    ),
                ):
                    publication = publications[f"{name}, {trainer_dtype}"] = _measure(
                        bench, own, work
                    )
                    print(f"{name + ', ' + trainer_dtype:>26}: {publication}", flush=True)
                del policy, weights, own, work
            engine.strategy_selector = FixedStrategy("off")
            prompt = Prompt(prompt_id=0, tokens=(2, 3, 4), text="", answer="")
            engine.generate([prompt], SamplingParams(max_tokens=2))  # what was published runs
        finally:
            engine.close()
    return publications


def _publish(load: Callable[..., None], weights: Mapping[str, Tensor], version: int) -> None:
    load(weights.items(), version=version)


def _compare(
    compare: Callable[..., list[WeightDifference]], weights: Mapping[str, Tensor], version: int
) -> None:
    if differences := compare(weights.items()):
        raise RuntimeError(f"publication {version} did not arrive: {differences[0]}")


def _measure(
    bench: Bench, weights: Mapping[str, Tensor], work: Callable[[int], None]
) -> Publication:
    seconds = []
    for version in range(bench.rounds + 1):
        _settle(weights)
        started = time.perf_counter()
        work(version)
        seconds.append(time.perf_counter() - started)
    width = getattr(torch, bench.dtype).itemsize
    num_bytes = sum(tensor.numel() for tensor in weights.values()) * width
    return Publication(seconds=seconds[1:], gigabytes=num_bytes / 1e9)


def _settle(weights: Mapping[str, Tensor]) -> None:
    """Work on the weights is over, as it is after an optimizer step that was waited for."""
    if next(iter(weights.values())).is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    """As the command line says."""
    import jsonargparse  # not installed where tests run beside SGLang alone
    import yaml

    from fastrl.config_loader import load_yaml

    jsonargparse.set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))
    bench: Bench = jsonargparse.auto_cli(Bench, as_positional=False)
    run(bench)


if __name__ == "__main__":
    main()
