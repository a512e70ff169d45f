"""What every algorithm shares: counters, lag, features, evaluation, checkpoints, errors."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy

from fastrl.modules import GRPO, OptimizerSettings, Reinforce, ScoredResponse
from fastrl.modules.loading import load_causal_lm
from fastrl.types import FinishReason, Prompt, Rollout, RolloutBatch, SamplingParams
from tests.recording_logger import RecordingLogger

Fit = Callable[..., Trainer]
RaggedBatch = Callable[..., RolloutBatch]
MakeBatch = Callable[..., RolloutBatch]

FAST = OptimizerSettings(lr=1e-2)


@pytest.mark.parametrize(("num_epochs", "num_mini_batches"), [(1, 1), (3, 1), (2, 3)])
def test_one_batch_is_one_rl_step_whatever_the_number_of_updates(
    model_folder: str, ragged_batch: RaggedBatch, fit: Fit, num_epochs: int, num_mini_batches: int
) -> None:
    module = GRPO(model_folder, num_epochs=num_epochs, num_mini_batches=num_mini_batches)
    trainer = fit(module, [ragged_batch(version) for version in range(4)])
    assert (module.rl_step, module.policy_version) == (4, 4)
    assert trainer.global_step == 4 * num_epochs * num_mini_batches


class SeenAtBatchEnd(Callback):
    """The counters as other callbacks see them."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: object
    ) -> None:
        assert isinstance(pl_module, GRPO)
        self.seen.append((pl_module.rl_step, pl_module.policy_version))


def test_counters_are_up_before_callbacks_run(
    model_folder: str, ragged_batch: RaggedBatch, fit: Fit
) -> None:
    callback = SeenAtBatchEnd()
    fit(GRPO(model_folder), [ragged_batch(0), ragged_batch(1)], callbacks=[callback])
    assert callback.seen == [(1, 1), (2, 2)]


@pytest.mark.parametrize("versions", [[0, 0], [0, 2], [1]])
def test_a_batch_of_another_policy_version_is_an_error(
    model_folder: str, ragged_batch: RaggedBatch, fit: Fit, versions: list[int]
) -> None:
    module = GRPO(model_folder)
    with pytest.raises(ValueError, match=r"lag 0.*is version \d+, they were sampled by \[\d\]"):
        fit(module, [ragged_batch(version) for version in versions])
    assert module.rl_step == len(versions) - 1


def test_greedy_rollouts_are_refused(
    model_folder: str, ragged_batch: RaggedBatch, fit: Fit
) -> None:
    batch = ragged_batch(sampling=SamplingParams(temperature=0))
    with pytest.raises(ValueError, match=r"temperature must be > 0 to train, got 0"):
        fit(GRPO(model_folder), [batch])


def test_logged_values_by_hand(model_folder: str, ragged_batch: RaggedBatch, fit: Fit) -> None:
    settings = OptimizerSettings(lr=0.5, warmup_steps=4)
    logged = fit(GRPO(model_folder, optimizer=settings), [ragged_batch(0)]).logged_metrics
    rewards = [1.0, 0.0, 0.25, 0.0, 1.0, 0.5]
    mean = sum(rewards) / 6
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 6)
    assert logged["reward/mean"].item() == pytest.approx(mean)
    assert logged["reward/std"].item() == pytest.approx(std)
    assert logged["policy/lr"].item() == pytest.approx(0.5 / 4)
    assert logged["step"] == 1
    # The reference is loaded only where KL asks for it.
    assert "policy/kl" not in logged


def test_features_are_the_rows_of_a_plain_forward(
    model_folder: str, ragged_batch: RaggedBatch, fit: Fit
) -> None:
    batch = ragged_batch(0)
    module = GRPO(model_folder, micro_batch_tokens=14)
    module.collect_features = True
    fit(module, [batch])
    model = load_causal_lm(model_folder)
    features = module.take_features()
    assert len(features) == len(batch)
    for row, feature in enumerate(features):
        tokens = batch.tokens_BT[row][batch.attention_mask_BT[row]]
        assert torch.equal(feature.tokens_T, tokens)
        assert not feature.hidden_TD.requires_grad
        assert feature.rl_step == 0
        assert feature.num_prompt_tokens == (3 if row < 3 else 2)
        assert len(feature.hidden_TD) == len(tokens)
        for t in range(len(tokens)):
            plain = model.model(input_ids=tokens[None, : t + 1]).last_hidden_state[0, -1]
            torch.testing.assert_close(feature.hidden_TD[t], plain, rtol=1e-4, atol=1e-5)
    assert module.take_features() == []


def test_features_have_the_inputs_of_layers_that_a_drafter_reads(
    model_folder: str, ragged_batch: RaggedBatch, fit: Fit
) -> None:
    batch = ragged_batch(0)
    module = GRPO(model_folder, micro_batch_tokens=14)
    module.collect_features, module.feature_layers = True, (1, 0)
    fit(module, [batch])
    model = load_causal_lm(model_folder)
    for row, feature in enumerate(module.take_features()):
        tokens = batch.tokens_BT[row][batch.attention_mask_BT[row]]
        assert not feature.hidden_TD.requires_grad
        plain = model.model(input_ids=tokens[None], output_hidden_states=True)
        parts = (plain.last_hidden_state, plain.hidden_states[1], plain.hidden_states[0])
        torch.testing.assert_close(
            feature.hidden_TD, torch.cat(parts, dim=-1)[0], rtol=1e-4, atol=1e-5
        )


def test_features_come_from_the_first_epoch_and_only_on_request(
    model_folder: str, ragged_batch: RaggedBatch, fit: Fit
) -> None:
    module = GRPO(model_folder, num_epochs=2, optimizer=FAST)
    module.collect_features = True
    fit(module, [ragged_batch(0)])
    plain = load_causal_lm(model_folder).model(input_ids=torch.tensor([[1, 2, 3, 12]]))
    feature = module.take_features()[2]
    torch.testing.assert_close(feature.hidden_TD, plain.last_hidden_state[0], rtol=1e-4, atol=1e-5)
    module = GRPO(model_folder)
    fit(module, [ragged_batch(0)])
    assert module.take_features() == []


def test_features_nobody_took_do_not_outlive_their_batch(
    model_folder: str, ragged_batch: RaggedBatch, make_batch: MakeBatch, fit: Fit
) -> None:
    module = GRPO(model_folder)
    module.collect_features = True
    fit(module, [ragged_batch(0), make_batch([([1], [2]), ([1], [3])], [1, 0], [0, 0], version=1)])
    assert [feature.tokens_T.tolist() for feature in module.take_features()] == [[1, 2], [1, 3]]


def weights_of(module: GRPO) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for _, tensor in module.policy_tensors()])


def test_a_resumed_run_equals_one_that_was_not_stopped(
    model_folder: str, ragged_batch: RaggedBatch, fit: Fit, tmp_path: Path
) -> None:
    def make() -> GRPO:
        settings = OptimizerSettings(lr=1e-2, warmup_steps=5)
        return GRPO(model_folder, optimizer=settings, num_mini_batches=2, kl_coef=0.1)

    batches = [ragged_batch(version) for version in range(4)]
    whole = make()
    fit(whole, batches)
    path = str(tmp_path / "stopped.ckpt")
    fit(make(), batches[:2]).save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert (saved["rl_step"], saved["policy_version"]) == (2, 2)
    # The weights once: the reference is the initial model, and stays out.
    assert len(saved["state_dict"]) == len(load_causal_lm(model_folder).state_dict())
    resumed = make()
    fit(resumed, batches[2:], ckpt_path=path, max_epochs=2)
    assert (resumed.rl_step, resumed.policy_version) == (4, 4)
    assert torch.equal(weights_of(resumed), weights_of(whole))


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_a_resumed_run_goes_on_under_its_own_learning_rate_and_decay(
    model_folder: str,
    ragged_batch: RaggedBatch,
    fit: Fit,
    tmp_path: Path,
    schedule: Literal["constant", "linear"],
) -> None:
    """Twice as many steps at twice the rate: where the old schedule had come to 0, half the new."""

    def make(lr: float, weight_decay: float) -> GRPO:
        settings = OptimizerSettings(lr=lr, weight_decay=weight_decay, schedule=schedule)
        return GRPO(model_folder, optimizer=settings)

    batches = [ragged_batch(version) for version in range(4)]
    path = str(tmp_path / "stopped.ckpt")
    fit(make(1e-3, 0.0), batches[:2]).save_checkpoint(path)
    recorder = RecordingLogger(tmp_path)
    resumed = make(2e-3, 0.5)
    trainer = fit(resumed, batches[2:], ckpt_path=path, max_epochs=2, logger=recorder)
    rates = [metrics["policy/lr"] for _, metrics in recorder.logged if "policy/lr" in metrics]
    shares = {"constant": [1, 1], "linear": [0.5, 0.25]}[schedule]
    assert rates == pytest.approx([2e-3 * share for share in shares])
    (group,) = trainer.optimizers[0].param_groups
    assert group["weight_decay"] == 0.5


def test_model_checkpoint_saves_at_rl_steps(
    model_folder: str, ragged_batch: RaggedBatch, fit: Fit, tmp_path: Path
) -> None:
    callback = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1)
    fit(
        GRPO(model_folder),
        [ragged_batch(0), ragged_batch(1)],
        callbacks=[callback],
        enable_checkpointing=True,
    )
    assert len(list(tmp_path.glob("*.ckpt"))) == 2


def test_policy_tensors_are_the_live_parameters(
    model_folder: str, ragged_batch: RaggedBatch, fit: Fit
) -> None:
    module = GRPO(model_folder, optimizer=FAST)
    module.configure_model()
    before = dict(module.policy_tensors())
    old = {name: tensor.detach().clone() for name, tensor in before.items()}
    fit(module, [ragged_batch(0)])
    for name, tensor in module.policy_tensors():
        assert tensor is before[name]
        assert not torch.equal(tensor, old[name])


def test_validation_reports_mean_reward_and_pass_at_1_over_all_rows(
    model_folder: str, make_batch: MakeBatch, fit: Fit
) -> None:
    # Held-out rollouts may be greedy, and come in batches of different sizes.
    greedy = SamplingParams(temperature=0)
    held_out = [
        make_batch([([1], [2])] * 3, [1.0, 0.5, 0.0], [0, 1, 2], sampling=greedy),
        make_batch([([1], [2])], [1.0], [0], sampling=greedy),
    ]
    trainer = fit(GRPO(model_folder), held_out=held_out, verb="validate")
    assert trainer.callback_metrics["reward/held_out"].item() == pytest.approx(2.5 / 4)
    assert trainer.callback_metrics["reward/pass@1"].item() == pytest.approx(2 / 4)
    trainer = fit(GRPO(model_folder), held_out=held_out, verb="test")
    assert trainer.callback_metrics["reward/test"].item() == pytest.approx(2.5 / 4)


def test_pass_at_k_is_a_mean_over_prompts_whatever_the_batches(
    model_folder: str, make_batch: MakeBatch, fit: Fit
) -> None:
    held_out = [
        make_batch([([1], [2])] * 8, [1, 0, 0, 0, 0.9, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]),
        make_batch([([1], [2])] * 4, [1, 1, 0, 0], [0, 0, 0, 0]),
    ]
    metrics = fit(GRPO(model_folder), held_out=held_out, verb="validate").callback_metrics
    assert metrics["reward/pass@1"].item() == pytest.approx((1 / 4 + 0 + 2 / 4) / 3)
    assert metrics["reward/pass@2"].item() == pytest.approx((3 / 6 + 0 + 5 / 6) / 3)
    assert metrics["reward/pass@4"].item() == pytest.approx((1 + 0 + 1) / 3)
    assert "reward/pass@8" not in metrics
    metrics = fit(GRPO(model_folder), held_out=held_out, verb="test").callback_metrics
    assert metrics["reward/test_pass@4"].item() == pytest.approx(2 / 3)


def test_predict_returns_responses_and_rewards(model_folder: str, make_batch: MakeBatch) -> None:
    batch = make_batch([([1], [2]), ([1], [3])], [0.5, 1.0], [0, 0])
    prompt = Prompt(prompt_id=0, tokens=(1,), text="1 + 1", answer="2")
    rollouts = tuple(
        Rollout(
            prompt=prompt,
            sample_index=i,
            tokens=(2 + i,),
            logprobs=(-1.0,),
            text=text,
            finish_reason=FinishReason.STOP,
            policy_version=0,
        )
        for i, text in enumerate(("one", "two"))
    )
    object.__setattr__(batch, "rollouts", rollouts)
    assert GRPO(model_folder).predict_step(batch, 0) == [
        ScoredResponse(prompt="1 + 1", response="one", reward=0.5),
        ScoredResponse(prompt="1 + 1", response="two", reward=1.0),
    ]


def test_non_finite_weights_stop_the_run_with_the_culprit(
    model_folder: str, ragged_batch: RaggedBatch, fit: Fit
) -> None:
    module = GRPO(model_folder)
    module.configure_model()
    with torch.no_grad():
        module.policy.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"RL step 0: loss nan.*layers\.1\.mlp\.up_proj"):
        fit(module, [ragged_batch(0)])
    assert module.rl_step == 0


def test_non_finite_rewards_are_an_error(
    model_folder: str, make_batch: MakeBatch, fit: Fit
) -> None:
    batch = make_batch([([1], [2]), ([1], [3])], [math.inf, 0.0], [0, 0])
    with pytest.raises(FloatingPointError, match="advantages are not finite"):
        fit(Reinforce(model_folder), [batch])


def test_left_padding_is_refused(model_folder: str, ragged_batch: RaggedBatch, fit: Fit) -> None:
    batch = ragged_batch(0)
    flipped = batch.attention_mask_BT.flip(1)
    object.__setattr__(batch, "attention_mask_BT", flipped)
    with pytest.raises(ValueError, match="padding on the right"):
        fit(GRPO(model_folder), [batch])


def test_falling_schedules_end_with_the_run(
    model_folder: str, ragged_batch: RaggedBatch, fit: Fit
) -> None:
    settings = OptimizerSettings(lr=1.0e-3, schedule="linear")
    batches = [ragged_batch(version) for version in range(4)]
    by_epochs = fit(GRPO(model_folder, optimizer=settings, num_epochs=2), batches)
    assert by_epochs.logged_metrics["policy/lr"].item() == pytest.approx(1e-3 / 4)
    # max_steps counts optimizer steps: 4 are 2 RL steps here.
    by_steps = fit(GRPO(model_folder, optimizer=settings, num_epochs=2), batches, max_steps=4)
    assert by_steps.logged_metrics["policy/lr"].item() == pytest.approx(1e-3 / 2)


def test_rounded_weights_are_refused(
    model_folder: str, ragged_batch: RaggedBatch, fit: Fit
) -> None:
    with pytest.raises(ValueError, match=r"use trainer\.precision 32-true or bf16-mixed"):
        fit(GRPO(model_folder), [ragged_batch(0)], precision="bf16-true")


@pytest.mark.parametrize("option", ["num_epochs", "num_mini_batches", "micro_batch_tokens"])
def test_counts_below_one_are_an_error(model_folder: str, option: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.{option} must be >= 1, got 0"):
        GRPO(model_folder, **{option: 0})


def test_a_missing_model_folder_is_an_error_at_construction(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        GRPO(str(tmp_path / "nowhere"))


def test_mixed_precision_sees_the_weights_of_each_update(
    model_folder: str, ragged_batch: RaggedBatch, fit: Fit
) -> None:
    # A cache of bfloat16 weights that outlived an update would leave the ratios at 1.
    module = GRPO(model_folder, num_epochs=3, optimizer=FAST)
    logged = fit(module, [ragged_batch(0)], precision="bf16-mixed").logged_metrics
    exact = fit(GRPO(model_folder, num_epochs=3, optimizer=FAST), [ragged_batch(0)]).logged_metrics
    for name in ("policy/ratio_max", "policy/clip_fraction", "policy/grad_norm"):
        assert logged[name].item() == pytest.approx(exact[name].item(), rel=0.1)


def test_fsdp1_is_refused_with_what_to_use_instead(
    model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning refuses it on a CPU by itself, so only its name is given."""
    module = GRPO(model_folder)
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    monkeypatch.setattr(Trainer, "strategy", property(lambda _: FSDPStrategy()))
    with pytest.raises(ValueError, match=r"FSDP1[\s\S]*ModelParallelStrategy"):
        module.on_fit_start()
