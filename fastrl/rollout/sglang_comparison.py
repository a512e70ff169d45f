"""Compares SGLang's weights with published ones, inside SGLang's own processes.

SGLang lets an update of weights name a function of ours that takes them in place of the model
(`custom_weight_loader`). The functions here hand the tensors to the model's own loader, as a
publication does, but turn every write into a weight to a comparison: so names, fused matrices and
shards are SGLang's own business, and nothing is changed. SGLang gives no answer back from there, so
each rank writes what it found to a file, in a folder that the first tensor is named after.

Buffers, such as a rotary embedding's cache, nobody publishes: they are held against what they were
when the engine had started. SGLang keeps the policy's for the time that memory is given back, but
not the drafter's, which come back as garbage unless they are the policy's own: a rotary cache is,
where both models ask for the same one.

The trainer reads the files: `read_differences`. Leaves out deciding what a difference means.
"""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastrl.rollout.sglang_process import Role
from fastrl.rollout.weight_differences import Comparison, WeightDifference, added

NamedTensors = Iterable[tuple[str, Tensor]]

COMPARERS: dict[Role, str] = {
    "target": "fastrl.rollout.sglang_comparison.compare_target",
    "draft": "fastrl.rollout.sglang_comparison.compare_drafter",
}
"""By the dotted names that SGLang imports them by."""
REMEMBERERS: dict[Role, str] = {
    "target": "fastrl.rollout.sglang_comparison.remember_target",
    "draft": "fastrl.rollout.sglang_comparison.remember_drafter",
}

_buffers_at_start: weakref.WeakKeyDictionary[nn.Module, dict[str, Tensor]] = (
    weakref.WeakKeyDictionary()
)


def folder_entry(folder: Path) -> tuple[str, Tensor]:
    """What a bucket to compare begins with: where to report to."""
    return str(folder), torch.empty(0)


def compare_target(model: Any, named_tensors: NamedTensors) -> None:
    """Compare with the policy's weights."""
    _compare(model, named_tensors)


def compare_drafter(model: Any, named_tensors: NamedTensors) -> None:
    """Compare with the drafter's weights; SGLang before 0.5.21 offers them to the target too."""
    if is_drafter(model):
        _compare(model, named_tensors)


def remember_target(model: Any, named_tensors: NamedTensors) -> None:
    """Keep a copy of the policy's buffers as they are now."""
    _remember_buffers(model)


def remember_drafter(model: Any, named_tensors: NamedTensors) -> None:
    """Keep a copy of the drafter's buffers as they are now."""
    if is_drafter(model):
        _remember_buffers(model)


def is_drafter(model: Any) -> bool:
    """Whether a model of SGLang's is an EAGLE drafter."""
    return "Eagle" in type(model).__name__


def read_differences(folder: Path, num_ranks: int) -> list[WeightDifference]:
    """What all ranks found.

    Raises RuntimeError if a rank has not reported.
    """
    files = sorted(folder.iterdir())
    if len(files) != num_ranks:
        raise RuntimeError(
            f"{len(files)} of {num_ranks} ranks of SGLang compared their weights; has this version "
            f"of SGLang another model for the drafter?"
        )
    return added(
        [WeightDifference(**json.loads(line)) for line in file.read_text("utf-8").splitlines()]
        for file in files
    )


def _compare(model: Any, named_tensors: NamedTensors) -> None:
    (folder, _), *published = named_tensors
    mode = _ComparisonMode(model)
    with mode:
        model.load_weights(mode.naming(published))
    rank = dist.get_rank() if dist.is_initialized() else 0
    report = Path(folder) / f"rank{rank}.jsonl"
    if not report.exists():  # with the first bucket
        _compare_buffers(model, mode.comparison)
    with report.open("a", encoding="utf-8") as file:
        for one in mode.comparison.differences():
            file.write(json.dumps(dataclasses.asdict(one)) + "\n")


def _remember_buffers(model: nn.Module) -> None:
    _buffers_at_start[model] = {
        name: buffer.detach().to("cpu", copy=True) for name, buffer in model.named_buffers()
    }


def _compare_buffers(model: nn.Module, comparison: Comparison) -> None:
    served = dict(model.named_buffers())
    for name, buffer in _buffers_at_start[model].items():
        same = served[name]
        if same.shape != buffer.shape:  # a rotary cache grows with the positions it is asked for
            same = same[: len(buffer)]
        comparison.compare(f"buffer {name}", same, buffer)


class _ComparisonMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, writes into a model's weights change nothing and are compared instead.

    Args:
        model: whose weights are held against what would be written.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.comparison = Comparison()
        self._memory = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._name = ""

    def naming(self, named_tensors: NamedTensors) -> Iterator[tuple[str, Tensor]]:
        """The same, for a loader that writes each before it asks for the next: what it writes
        meanwhile is a part of it."""
        for name, tensor in named_tensors:
            self._name = name
            self.comparison.expect(name)
            yield name, tensor

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compare what would be written; run everything else."""
        operation = func.overloadpacket
        if operation not in _WRITES or not self._is_weight(args[0]):
            return func(*args, **(kwargs or {}))
        served = args[0]
        value = _WRITES[operation](served, *args[1:])
        if served.numel() > 0:
            self.comparison.compare(self._name, served, value.expand_as(served))
        return served

    def _is_weight(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._memory


def _copied(served: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return source


def _filled(served: Tensor, value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=served.dtype, device=served.device)


def _zeroed(served: Tensor) -> Tensor:
    return torch.zeros((), dtype=served.dtype, device=served.device)


_WRITES: Mapping[Any, Callable[..., Tensor]] = {
    torch.ops.aten.copy_: _copied,
    torch.ops.aten.fill_: _filled,
    torch.ops.aten.zero_: _zeroed,
}
