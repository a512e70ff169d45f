"""The acceptance report over tiny models: its figures against counts of the rollouts themselves."""

import dataclasses
import importlib.util
import json
from collections import defaultdict
from pathlib import Path

import drafter_runs
import eval_drafter
import pytest
import torch
from acceptance_figures import KS, Part
from drafter_runs import features_of
from eval_drafter import Evaluation, evaluate, load_pair, parse, timed_arms
from sd_engines import SGLangOptions, TorchArm
from transformers import AutoConfig

from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.eagle3 import Eagle3Drafter
from fastrl.rollout.model_bandit import ModelBased
from fastrl.types import Prompt, SamplingParams
from tests.rollout.tiny_models import make_prompts, make_target
from tests.sglang_cpu import environment

STRATEGIES = ["2_1_3", "3_2_6"]


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory) -> Path:
    """A target and a drafter that is often right: it predicts that the hidden state stays."""
    root = tmp_path_factory.mktemp("pair")
    target = make_target(root / "target")
    drafter = EagleDrafter.for_target(target.config, seed=0)
    with torch.no_grad():
        for weight in drafter.parameters():
            if weight.ndim == 2:
                weight.mul_(0.1)
        size = target.config.hidden_size
        drafter.fc.weight[:, size:] += torch.eye(size)
    drafter.save_pretrained(root / "drafter")
    return root


def tiny(folder: Path, **changes: object) -> Evaluation:
    settings = {
        "model": str(folder / "target"),
        "drafter": str(folder / "drafter"),
        "tasks": ["short", "long"],
        "strategies": STRATEGIES,
        "num_samples": 2,
        "max_batch_size": 4,
        "max_depth": 3,
        "batch_sizes": [1, 2],
        "responses_per_round": 2,
        "rounds": 2,
        "sampling": SamplingParams(max_tokens=20, temperature=0.3, ignore_eos=True),
        "device": "cpu",
        "num_threads": 1,
    }
    return Evaluation(**{**settings, **changes})


def prompts_of(evaluation: Evaluation, folder: str) -> dict[str, list[Prompt]]:
    """In place of questions, which a tiny tokenizer has no words for."""
    short, long = make_prompts(3), make_prompts(2, seed=1, shortest=9)
    long = [dataclasses.replace(one, prompt_id=one.prompt_id + 3) for one in long]
    return {"short": short, "long": long}


@pytest.fixture(scope="module")
def evaluated(pair_folder):
    """A report, its JSON, and the rollouts and steps that it is of, by strategy and task."""
    generated = {}
    real = eval_drafter.generate

    def keeping(*args, **options):
        generated.update(real(*args, **options))
        return generated

    evaluation = tiny(
        pair_folder, json=pair_folder / "report.json", plot=pair_folder / "report.png"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_drafter, "load_prompts", prompts_of)
        patch.setattr(eval_drafter, "generate", keeping)
        report = evaluate(evaluation)
    return evaluation, report, json.loads((pair_folder / "report.json").read_text()), generated


def test_accept_lengths_are_those_of_the_rollouts(evaluated):
    """Counted anew, token by token: a token opens a step when the one before has ended."""
    _, report, written, generated = evaluated
    for strategy in STRATEGIES:
        tokens, steps = defaultdict(int), defaultdict(int)
        for task, rollouts in generated[strategy].rollouts.items():
            assert len(rollouts) == {"short": 6, "long": 4}[task]
            for rollout in rollouts:
                left = list(rollout.accept_lengths)
                rest = 0
                for place in range(1, len(rollout.tokens)):
                    if rest == 0:
                        rest = left.pop(0)
                        first = 1
                        while 2 * first <= place:
                            first *= 2
                        keys = (None, task, first)
                        for key in keys:
                            steps[key] += 1
                    for key in keys:
                        tokens[key] += 1
                    rest -= 1
                assert (left, rest) == ([], 0)
        found = {}
        for figure in report.lengths:
            if figure.strategy == strategy:
                key = figure.part.places[0] if figure.part.places else figure.part.task
                found[key] = (figure.num_tokens, figure.num_steps)
        assert found == {key: (tokens[key], steps[key]) for key in steps}
        stats = generated[strategy].stats.values()
        assert tokens[None] == sum(one.accepted_tokens for one in stats)
        assert steps[None] == sum(one.row_steps for one in stats)
        assert tokens[None] > steps[None] + 10  # else nothing was put to the test
    assert [entry["strategy"] for entry in written["lengths"] if entry["task"]] == [
        *("2_1_3", "2_1_3", "3_2_6", "3_2_6"),
    ]


def test_acceptance_by_depth_and_rank_is_that_of_the_rollouts(evaluated):
    """A step that emitted n + 1 tokens accepted n drafts, unless the response ended within it."""
    evaluation, report, _, generated = evaluated
    for strategy in STRATEGIES:
        depth = int(strategy[0])
        accepted_least, accepted_most = [0] * (depth + 2), [0] * (depth + 2)
        for rollouts in generated[strategy].rollouts.values():
            for rollout in rollouts:
                *whole, last = rollout.accept_lengths
                assert len(rollout.tokens) == evaluation.sampling.max_tokens
                for length in whole:
                    for reached in range(length):
                        accepted_least[reached] += 1
                        accepted_most[reached] += 1
                for reached in range(depth + 1):  # the last step may have been cut
                    accepted_least[reached] += reached < last
                    accepted_most[reached] += 1
        by_depth = [f for f in report.depths if (f.strategy, f.part) == (strategy, Part())]
        assert [figure.depth for figure in by_depth] == list(range(1, depth + 1))
        for figure in by_depth:
            for count, reached in (
                (figure.num_offered, figure.depth - 1),
                (figure.num_accepted, figure.depth),
            ):
                assert accepted_least[reached] <= count <= accepted_most[reached]
            by_rank = [
                f
                for f in report.ranks
                if (f.strategy, f.part, f.depth) == (strategy, Part(), figure.depth)
            ]
            assert sum(f.num_accepted for f in by_rank) == figure.num_accepted
            offered = [f.num_offered for f in by_rank]  # none if the pruned tree ended before
            assert max(offered, default=0) <= figure.num_offered
        assert by_depth[0].num_offered == sum(
            one.row_steps for one in generated[strategy].stats.values()
        )
    assert {f.rank for f in report.ranks if f.strategy == "3_2_6"} == {1, 2}


@pytest.mark.parametrize("kind", ["task", "places"])
def test_acceptance_of_tasks_and_of_places_adds_up_to_the_whole(evaluated, kind):
    """By depth and by rank; and steps are as many as those of the accept lengths."""
    _, report, written, _ = evaluated
    for figures in (report.depths, report.ranks):
        whole, parts = {}, defaultdict(lambda: [0, 0])
        for figure in figures:
            key = figure.strategy, figure.depth, figure.rank
            if figure.part == Part():
                whole[key] = [figure.num_offered, figure.num_accepted]
            elif getattr(figure.part, kind) is not None:
                parts[key][0] += figure.num_offered
                parts[key][1] += figure.num_accepted
        assert parts == whole
    steps = {(f.strategy, f.part): f.num_steps for f in report.lengths}
    assert {(f.strategy, f.part): f.num_offered for f in report.depths if f.depth == 1} == steps
    for name in ("depths", "ranks"):
        assert {entry["task"] for entry in written[name]} == {None, "short", "long"}
        assert [1, 1] in [entry["places"] for entry in written[name]]


def test_topk_accuracy_is_that_of_a_loop_over_places(evaluated):
    """In float32, one forward of the drafter for each token it drafts, nothing packed or cached."""
    evaluation, report, _, generated = evaluated
    pair = load_pair(evaluation)
    model, drafter = pair.model, pair.drafter
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    hits, counts = defaultdict(int), defaultdict(int)
    for task, rollouts in generated[STRATEGIES[0]].rollouts.items():
        for rollout in rollouts:
            num_prompt = len(rollout.prompt.tokens)
            tokens = torch.tensor((*rollout.prompt.tokens, *rollout.tokens))
            with torch.no_grad():
                true = model.model(tokens[None]).last_hidden_state[0]
            for place in range(1, len(rollout.tokens)):
                hidden = list(true[: num_prompt + place - 1])
                for depth in range(1, evaluation.max_depth + 1):
                    drafted = num_prompt + place + depth - 1
                    if drafted == len(tokens):
                        break
                    with torch.no_grad():
                        output = drafter(
                            embedding[tokens[1:drafted]][None],
                            torch.stack(hidden)[None],
                            torch.arange(drafted - 1)[None],
                        )[0, -1]
                        best = (head @ output).sort(descending=True).indices.tolist()
                    hidden.append(output)
                    for key in (None, task, 1 << place.bit_length() - 1):
                        counts[key, depth] += 1
                        for k in KS:
                            hits[key, depth, k] += int(tokens[drafted]) in best[:k]
    assert len(report.topk) == len(counts) * len(KS)
    for figure in report.topk:
        key = figure.part.places[0] if figure.part.places else figure.part.task
        assert figure.num_tokens == counts[key, figure.depth]
        assert figure.num_hits == hits[key, figure.depth, figure.k]
    whole = {(f.depth, f.k): f.accuracy for f in report.topk if f.part == Part()}
    assert whole[1, 1] < whole[1, 8]


def test_every_arm_is_timed_against_off(evaluated):
    evaluation, report, written, _ = evaluated
    assert [(f.batch_size, f.arm) for f in report.speed] == [
        (size, arm) for size in evaluation.batch_sizes for arm in ("off", *STRATEGIES, "adaptive")
    ]
    for figure in report.speed:
        low, high = figure.spread
        assert 0 < low <= figure.ratio_to_off <= high
        if figure.arm != "adaptive":  # which may find that plain decoding is the fastest
            assert (figure.accept_length > 1) == (figure.arm != "off")
    assert all(f.ratio_to_off == 1 for f in report.speed if f.arm == "off")
    assert [entry["tokens_per_s"] for entry in written["speed"]] == [
        figure.tokens_per_s for figure in report.speed
    ]
    assert evaluation.plot.stat().st_size > 10_000


def test_the_bandit_chooses_among_n_grams_if_asked(pair_folder, monkeypatch):
    """The very one that a run has, for all batch sizes."""
    monkeypatch.setattr(eval_drafter, "load_prompts", prompts_of)
    selectors = []
    real = TorchArm.run

    def keeping(self, *args):
        selectors.append(self.engine.strategy_selector)
        return real(self, *args)

    monkeypatch.setattr(TorchArm, "run", keeping)
    report = evaluate(tiny(pair_folder, ngram_strategies=["ngram_2_1_3"]))
    arms = ["off", *STRATEGIES, "ngram_2_1_3", "adaptive"]
    assert [f.arm for f in report.speed] == [*arms, *arms]
    (bandit,) = {id(one): one for one in selectors if isinstance(one, ModelBased)}.values()
    assert set(map(str, bandit.strategies)) == {"off", *STRATEGIES, "ngram_2_1_3"}
    assert {figure.strategy for figure in report.lengths} == set(STRATEGIES)


def test_the_bandit_is_left_out_if_asked(pair_folder):
    assert timed_arms(tiny(pair_folder, adaptive=False)) == ["off", *STRATEGIES]


def test_hidden_states_are_those_that_engines_draft_from(pair_folder):
    evaluation = tiny(pair_folder)
    pair = load_pair(evaluation)
    (session,) = drafter_runs.SESSIONS["torch"](pair.subject, ["2_1_3"], [4])
    with session.open() as arms:
        arm = arms["2_1_3"]
        assert isinstance(arm, TorchArm)
        rollouts = arm.engine.generate(
            make_prompts(2), evaluation.sampling, return_hidden_states=True
        )
    for rollout in rollouts:
        features = features_of(pair.model, pair.drafter, rollout)
        torch.testing.assert_close(features.hidden_TD, rollout.hidden_states, atol=3e-5, rtol=1e-4)
        assert features.num_prompt_tokens == len(rollout.prompt.tokens)


def test_an_eagle_3_drafter_is_evaluated(pair_folder, tmp_path, monkeypatch, capsys):
    """With half of the vocabulary: no rank is beyond it but of tokens that it lacks."""
    monkeypatch.setattr(eval_drafter, "load_prompts", prompts_of)
    target = AutoConfig.from_pretrained(pair_folder / "target")
    tokens = range(0, target.vocab_size, 2)
    Eagle3Drafter.for_target(target, seed=0, token_ids=tokens).save_pretrained(tmp_path / "eagle3")
    evaluation = tiny(pair_folder, drafter=str(tmp_path / "eagle3"), batch_sizes=[1])
    report = evaluate(evaluation)
    assert [figure.arm for figure in report.speed] == ["off", *STRATEGIES, "adaptive"]
    assert "2_1_3: the same by task" in capsys.readouterr().out
    pair = load_pair(evaluation)
    (session,) = drafter_runs.SESSIONS["torch"](pair.subject, ["2_1_3"], [4])
    with session.open() as arms:
        rollouts = arms["2_1_3"].engine.generate(make_prompts(3), evaluation.sampling)
    ranks = drafter_runs.ranks_of(pair.model, pair.drafter, rollouts, max_depth=1)
    for rollout, (first,) in zip(rollouts, ranks, strict=True):
        for rank, token in zip(first.tolist(), rollout.tokens[1:], strict=True):
            assert (rank == len(tokens)) == (token not in tokens)


def test_a_bad_drafter_is_evaluated_but_not_timed(pair_folder, tmp_path, monkeypatch, capsys):
    """The engine would leave its strategies out; the report is of them nevertheless."""
    monkeypatch.setattr(eval_drafter, "load_prompts", prompts_of)
    drafter = EagleDrafter.from_pretrained(pair_folder / "drafter")
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.zero_()
    drafter.save_pretrained(tmp_path / "zero")
    with pytest.warns(UserWarning, match="left out until the next"):
        report = evaluate(tiny(pair_folder, drafter=str(tmp_path / "zero"), num_samples=8))
    assert report.failures
    assert report.speed == []
    assert "not timed" in capsys.readouterr().out
    assert {figure.strategy for figure in report.depths} == set(STRATEGIES)
    assert all(figure.num_offered > 0 for figure in report.depths if figure.depth == 1)


def test_a_runs_policy_and_drafter_take_the_folders_places(pair_folder, tmp_path):
    """Where the accuracy is counted, and in the engines."""
    pair = load_pair(tiny(pair_folder))
    policy = {f"policy.{name}": w + 0.01 for name, w in pair.model.state_dict().items()}
    trained = {name: w.detach() + 0.01 for name, w in pair.drafter.named_weights()}
    state = {"state_dict": policy, "callbacks": {"DrafterTraining{}": {"drafter": trained}}}
    torch.save(state, tmp_path / "run.ckpt")
    ours = load_pair(tiny(pair_folder, ckpt=str(tmp_path / "run.ckpt")))
    assert all(w.equal(policy[f"policy.{name}"]) for name, w in ours.model.named_parameters())
    assert all(w.equal(trained[name]) for name, w in ours.drafter.named_weights())
    (session,) = drafter_runs.SESSIONS["torch"](ours.subject, ["2_1_3"], [1])
    with session.open() as arms:
        engine = arms["2_1_3"].engine
        assert engine.compare_policy(ours.model.named_parameters()) == []
        assert engine.compare_drafter(trained.items()) == []
        assert engine.compare_drafter(pair.drafter.named_weights()) != []


def test_weights_of_a_drafter_of_another_vocabulary_are_refused(pair_folder, tmp_path):
    """They would fit: an EAGLE drafter's weights do not tell what tokens it drafts."""
    pair = load_pair(tiny(pair_folder))
    pair.drafter.trim_vocabulary((1, 4, 6))
    drafter = {"drafter": dict(pair.drafter.named_weights()), **pair.drafter.what_it_reads()}
    policy = {f"policy.{name}": w for name, w in pair.model.state_dict().items()}
    torch.save(
        {"state_dict": policy, "callbacks": {"DrafterTraining{}": drafter}}, tmp_path / "run.ckpt"
    )
    with pytest.raises(ValueError, match="drafts all tokens, the resumed run's 3"):
        load_pair(tiny(pair_folder, ckpt=str(tmp_path / "run.ckpt")))


# -- prompts and options --------------------------------------------------------------------------

QUICKSTART = Path(__file__).parents[2] / "models/quickstart"


def test_prompts_of_several_tasks_have_ids_of_their_own(pair_folder):
    evaluation = tiny(
        pair_folder,
        tasks=["chain_sum", "basic_arithmetic"],
        task_configs={"chain_sum": {"min_terms": 6, "max_terms": 6}},
        num_prompts=3,
    )
    prompts = eval_drafter.load_prompts(evaluation, str(QUICKSTART / "policy"))
    assert {task: len(of_task) for task, of_task in prompts.items()} == {
        "chain_sum": 3,
        "basic_arithmetic": 3,
    }
    assert [p.prompt_id for of_task in prompts.values() for p in of_task] == list(range(6))
    assert all(p.metadata["entry"]["metadata"]["num_terms"] == 6 for p in prompts["chain_sum"])
    assert {p.metadata["task"] for p in prompts["basic_arithmetic"]} == {"basic_arithmetic"}


def test_prompts_come_from_a_file_as_well(pair_folder, tmp_path):
    lines = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(5)]
    (tmp_path / "doubles.jsonl").write_text("\n".join(map(json.dumps, lines)))
    evaluation = tiny(
        pair_folder, jsonl=tmp_path / "doubles.jsonl", prompt_key="question", num_prompts=4
    )
    prompts = eval_drafter.load_prompts(evaluation, str(QUICKSTART / "policy"))
    assert [p.text for p in prompts["doubles"]] == [line["question"] for line in lines[:4]]


def test_the_command_line_is_read():
    evaluation = parse(
        [
            *("--model", "m", "--drafter", "d", "--tasks", "[chain_sum, leg_counting]"),
            *("--strategies", "[8_4_32]", "--sampling.temperature", "0", "--batch_sizes", "[]"),
        ]
    )
    assert evaluation.tasks == ["chain_sum", "leg_counting"]
    assert evaluation.strategies == ["8_4_32"]
    assert evaluation.sampling.temperature == 0
    assert evaluation.batch_sizes == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategies": []}, "at least one draft tree"),
        ({"strategies": ["off"]}, "plain decoding is always measured"),
        ({"strategies": ["ngram_2_1_3"]}, "name n-gram trees in ngram_strategies"),
        ({"ngram_strategies": ["2_1_3"]}, "written as 'ngram_8_1_9', got '2_1_3'"),
        ({"ngram_strategies": ["ngram_2_1_3"], "engine": "sglang"}, "drafts no n-gram trees"),
        ({"tasks": []}, "at least one, each once"),
        ({"tasks": ["a", "a"]}, "at least one, each once"),
        ({"task_configs": {"other": {}}}, r"of \['other'\], which are not"),
        ({"num_samples": 0}, "num_samples must be >= 1"),
        ({"rounds": 0}, "must be >= 1"),
        ({"batch_sizes": [0]}, "batch size 0"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(pair_folder, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(pair_folder, **changes)


# -- SGLang ---------------------------------------------------------------------------------------


@pytest.mark.sglang
def test_sglang_counts_what_the_embedded_engine_does(pair_folder, monkeypatch):
    """Greedy, so that both generate the same; SGLang tells no ranks."""
    if importlib.util.find_spec("sglang") is None:
        pytest.skip("SGLang is not installed; see tests/sglang_cpu/requirements.txt")
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(eval_drafter, "load_prompts", prompts_of)
    on_cpu = SGLangOptions(
        mem_fraction_static=0.1,
        attention_backend="intel_amx",
        server_args={
            "disable_cuda_graph": True,
            "max_total_tokens": 4096,
            "skip_server_warmup": True,
            "sleep_on_idle": True,
        },
    )
    greedy = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    settings = {"sampling": greedy, "batch_sizes": [2]}
    ours = evaluate(tiny(pair_folder, **settings))
    theirs = evaluate(tiny(pair_folder, engine="sglang", sglang=on_cpu, **settings))
    assert theirs.lengths == ours.lengths
    assert [f for f in theirs.depths if not f.part.places] == [
        figure for figure in ours.depths if not figure.part.places
    ]
    by_place = {(f.strategy, f.part, f.depth): (f.num_offered, f.num_accepted) for f in ours.depths}
    for figure in theirs.depths:  # of places without the ends of responses
        offered, accepted = by_place[figure.strategy, figure.part, figure.depth]
        assert offered - 10 <= figure.num_offered <= offered
        assert accepted - 10 <= figure.num_accepted <= accepted
    assert theirs.topk == ours.topk
    assert theirs.ranks == []
    assert ours.ranks
    assert [figure.arm for figure in theirs.speed] == ["off", *STRATEGIES, "adaptive"]
