"""Plain scalars mean what YAML 1.2 says, not what PyYAML takes them for."""

import math

import pytest
import yaml

from fastrl.config_loader import load_yaml


@pytest.mark.parametrize("text", ["8_4_48", "off", "on", "yes", "1_000", "007", "12:30", "8_4"])
def test_strategies_and_words_stay_strings(text: str) -> None:
    assert load_yaml(text) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("-3", -3),
        ("1e-6", 1e-6),
        ("1.5", 1.5),
        ("-.5E+2", -50.0),
        ("1.", 1.0),
        ("true", True),
        ("False", False),
        ("null", None),
        (".inf", math.inf),
    ],
)
def test_numbers_booleans_and_null_are_read(text: str, value: object) -> None:
    loaded = load_yaml(text)
    assert loaded == value
    assert type(loaded) is type(value)


def test_a_strategy_survives_writing_and_reading_in_both_versions() -> None:
    config = {"strategies": ["8_4_48", "off"], "lr": 1e-6, "stop": []}
    text = yaml.safe_dump(config)
    assert load_yaml(text) == config
    assert yaml.safe_load(text) == config


def test_a_list_of_strategies_needs_no_quotes() -> None:
    assert load_yaml("strategies: [8_4_48, off]") == {"strategies": ["8_4_48", "off"]}
