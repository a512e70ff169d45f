"""Learning rate over RL steps, clipping, and errors that name the culprit."""

import math

import pytest
import torch
from torch import nn

from fastrl.modules.optimization import OptimizerSettings, clip_gradients


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
    ],
)
def test_schedules_by_hand(schedule: str, expected: list[float]) -> None:
    settings = OptimizerSettings(lr=2.0, schedule=schedule, warmup_steps=2)  # type: ignore[arg-type]
    optimizer, scheduler = settings.build([nn.Parameter(torch.ones(1))], num_rl_steps=6)
    rates = []
    for _ in range(6):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([2 * share for share in expected])


def test_a_falling_schedule_without_an_end_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"set trainer\.max_steps"):
        OptimizerSettings(schedule="cosine").build([nn.Parameter(torch.ones(1))], math.inf)


@pytest.mark.parametrize(
    ("field", "value"),
    [("lr", -1.0), ("weight_decay", -0.1), ("warmup_steps", -1), ("max_grad_norm", 0.0)],
)
def test_bad_settings_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{field} must be .*got {value}"):
        OptimizerSettings(**{field: value})  # type: ignore[arg-type]


def linear_with_gradients() -> nn.Linear:
    module = nn.Linear(2, 1)
    module.weight.grad = torch.tensor([[3.0, 0.0]])
    module.bias.grad = torch.tensor([4.0])
    return module


def test_gradients_are_scaled_to_the_norm_and_the_norm_before_is_returned() -> None:
    module = linear_with_gradients()
    assert clip_gradients(module, 1.0, loss=torch.tensor(0.0), rl_step=0).item() == 5.0
    assert module.weight.grad is not None
    assert module.weight.grad.tolist() == [[pytest.approx(0.6, rel=1e-5), 0.0]]
    module = linear_with_gradients()
    clip_gradients(module, 6.0, loss=torch.tensor(0.0), rl_step=0)
    assert module.weight.grad is not None
    assert module.weight.grad.tolist() == [[3.0, 0.0]]


@pytest.mark.parametrize("what", ["gradients", "weights"])
def test_non_finite_numbers_name_the_step_and_the_parameter(what: str) -> None:
    module = linear_with_gradients()
    assert module.bias.grad is not None
    with torch.no_grad():
        (module.bias if what == "weights" else module.bias.grad).fill_(math.nan)
    loss = torch.tensor(math.nan)
    with pytest.raises(FloatingPointError, match=rf"RL step 7: .*non-finite {what} .*first bias"):
        clip_gradients(module, 1.0, loss=loss, rl_step=7)
