"""Chat prompts to warm drafters up on."""

from make_chat_prompts import KINDS, ChatPrompts, make_prompts, run

from fastrl.datamodules import JsonlPrompts


def test_held_out_prompts_are_about_other_subjects():
    train, held_out = make_prompts(seed=0)
    assert len({*train, *held_out}) == len(train) + len(held_out)
    subjects = [subject for _, of_kind in KINDS.values() for subject in of_kind]
    templates = [template for of_kind, _ in KINDS.values() for template in of_kind]
    made = {template.format(subject): subject for template in templates for subject in subjects}
    trained, held = ({made[prompt] for prompt in part} for part in (train, held_out))
    assert not trained & held
    assert trained | held == set(subjects)
    assert 0.05 < len(held_out) / len(train) < 0.2


def test_a_seed_gives_the_same_prompts_and_another_gives_others():
    assert make_prompts(seed=1) == make_prompts(seed=1)
    assert make_prompts(seed=1)[1] != make_prompts(seed=2)[1]


def test_what_is_written_is_read_as_questions(tmp_path):
    options = ChatPrompts(train=tmp_path / "a" / "train.jsonl", held_out=tmp_path / "held.jsonl")
    run(options)
    splits = JsonlPrompts(str(options.train), held_out_path=str(options.held_out)).load()
    train, held_out = make_prompts(seed=0)
    assert [question.text for question in splits.train] == train
    assert [question.text for question in splits.held_out] == held_out
