"""The quickstart models: what they are taught is true, what is saved loads, a rerun repeats it."""

from __future__ import annotations

import re
from pathlib import Path

import make_quickstart_models as script
import pytest
import quickstart_task as task
import torch
from reasoning_gym.utils import extract_answer
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastrl.rollout.drafters.eagle import EagleDrafter

EQUATION = re.compile(r"(-?\d+) ([+-]) (\d+) = (-?\d+)")


@pytest.fixture(scope="module")
def tokenizer():
    return task.build_tokenizer()


@pytest.fixture(scope="module")
def entries():
    return list(task.chain_sum(300, seed=7))


def evaluate(expression: str) -> int:
    return sum(int(term) for term in re.findall(r"[+-]?\d+", expression.replace(" ", "")))


def test_question_survives_the_tokenizer_whole_words_as_single_tokens(tokenizer, entries):
    for entry in entries:
        tokens = task.prompt_tokens(tokenizer, entry["question"])
        assert tokenizer.decode(tokens, skip_special_tokens=True) == entry["question"]
        assert tokenizer.unk_token_id not in tokens
        assert len(tokens) == 3 + 10 + 2 * entry["metadata"]["num_terms"] - 1 + 1


def test_response_survives_the_tokenizer_with_its_answer_tags(tokenizer, entries):
    for entry in entries:
        text = task.worked_response(entry["metadata"]["expression"], entry["answer"], 2)
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(tokens, skip_special_tokens=True) == text
        assert tokenizer.convert_tokens_to_ids("<answer>") in tokens


def test_any_printable_text_survives_the_tokenizer(tokenizer):
    text = "".join(map(chr, range(32, 127))) + "\nGuess 12 + the answers, not </answer >."
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_chat_template_opens_the_assistants_turn_after_every_role(tokenizer):
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s><|system|>a<|user|>b<|assistant|>"


def test_guess_is_the_last_term():
    assert task.guessed_response("4 - 9 + 7") == "Guess:<answer>7</answer>"


def test_reduction_by_hand():
    assert task.reduction("4 - 9 + 7") == " 4 - 9 = -5, -5 + 7: -5 + 7 = 2"


def test_every_step_of_a_worked_response_is_true_and_its_answer_scores_one(entries):
    dataset = task.chain_sum(1, seed=0)
    for entry in entries:
        expression = entry["metadata"]["expression"]
        text = task.worked_response(expression, entry["answer"], 1)
        assert extract_answer(text) == str(evaluate(expression))
        assert dataset.score_answer(extract_answer(text), entry) == 1.0
        equations = EQUATION.findall(text)
        assert len(equations) == 2 * (entry["metadata"]["num_terms"] - 1)
        for total, operator, term, result in equations:
            assert evaluate(total + operator + term) == int(result)
        for remainder in re.findall(r", ([^:]+):", text):
            assert evaluate(remainder) == int(entry["answer"])


def test_first_token_is_learnt_in_the_mixtures_shares(tokenizer):
    mixture = task.Mixture(work_share=0.2, max_response=60)
    source = task.examples(mixture, tokenizer, script.random.Random(0))
    work_id = tokenizer.convert_tokens_to_ids("Work")
    weights = {True: 0.0, False: 0.0}
    for _ in range(2000):
        example = next(source)
        weights[example.tokens[example.num_prompt] == work_id] += example.first_weight
    assert weights[True] / sum(weights.values()) == pytest.approx(0.2, abs=0.02)


def test_labels_and_weights_cover_the_response_alone():
    batch = script.collate(
        [task.Example([5, 6, 7, 2], 2, 0.5), task.Example([5, 8, 2], 1, 3.0)], pad_id=0
    )
    assert batch.tokens_BT.tolist() == [[5, 6, 7, 2], [5, 8, 2, 0]]
    assert batch.labels_BT.tolist() == [[-100, -100, 7, 2], [-100, 8, 2, -100]]
    assert batch.weights_BT.tolist() == [[1, 1, 0.5, 1], [1, 3.0, 1, 1]]


def miniature(output: Path) -> script.Recipe:
    return script.Recipe(
        output=output,
        width=16,
        layers=2,
        steps=3,
        shallow_layers=1,
        drafter_steps=2,
        tokens_per_step=300,
        eval_prompts=8,
        max_eval_tokens=8,
    )


def test_flags_set_the_recipe(tmp_path):
    flags = ["--output", str(tmp_path), "--steps", "5", "--mixture.work_share", "0.5"]
    recipe = script.parse(flags)
    assert recipe.mixture == task.Mixture(work_share=0.5)
    assert recipe == script.Recipe(output=tmp_path, steps=5, mixture=recipe.mixture)


def test_deepening_keeps_the_function_and_enlarges_the_layers(tokenizer):
    recipe = script.Recipe(width=16, layers=6, shallow_layers=2)
    shallow = script.build_policy(recipe, tokenizer, 2, tie_word_embeddings=True)
    deep = script.deepen(shallow, recipe, tokenizer)
    assert deep.config.num_hidden_layers == len(deep.model.layers) == 6
    tokens_BT = torch.arange(20).view(2, 10)
    expected = shallow(tokens_BT).logits
    torch.testing.assert_close(deep(tokens_BT).logits, expected, rtol=1e-3, atol=1e-3)
    taken, given = deep.model.layers[3], shallow.model.layers[1]
    assert torch.equal(taken.mlp.up_proj.weight, given.mlp.up_proj.weight * script.LAYER_SCALE)


def test_miniature_run_saves_loadable_models_and_repeats_itself(tmp_path):
    for name in ("first", "second"):
        script.make(miniature(tmp_path / name))
    policies = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "policy")
        for name in ("first", "second")
    ]
    for first, second in zip(*(p.state_dict().values() for p in policies), strict=True):
        assert first.dtype == torch.float32
        assert torch.equal(first, second)
    drafter = EagleDrafter.from_pretrained(tmp_path / "first/drafter", policies[0].config)
    assert drafter.fc.weight.shape == (16, 32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first/policy")
    assert len(tokenizer) == policies[0].config.vocab_size
    assert tokenizer.eos_token_id == policies[0].generation_config.eos_token_id
    readme = (tmp_path / "first/README.md").read_text()
    assert "Apache-2.0" in readme
    assert "--layers 2 --shallow_layers 1 --steps 3" in readme
