"""A model folder with a character tokenizer and a chat template, without weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

CONTEXT_LENGTH = 64
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '^' if message.role == 'system' else '>' }}{{ message.content }}"
    "{% endfor %}{% if add_generation_prompt %}={% endif %}"
)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One token a character: the ids of 256 byte-sized characters are their code points."""
    folder = tmp_path_factory.mktemp("model")
    save_tokenizer(folder, CHAT_TEMPLATE)
    LlamaConfig(max_position_embeddings=CONTEXT_LENGTH, vocab_size=256).save_pretrained(folder)
    return str(folder)


def save_tokenizer(folder: Path, chat_template: str | None) -> None:
    """Write a character tokenizer into `folder`."""
    vocabulary = {chr(code): code for code in range(256)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="\x00"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(?m)."), behavior="isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="\x02")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
