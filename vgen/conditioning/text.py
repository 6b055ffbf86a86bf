"""The prompt as a model reads it."""

from __future__ import annotations

import html
import importlib.util
import re
from typing import Any


def encodable(prompt: str) -> str:
    """Return a prompt in which what cannot be encoded has become a question mark."""
    return prompt.encode("utf-8", "replace").decode("utf-8")


def unknown_words(tokenizer: Any, prompt: str) -> list[str]:
    """Return the words of a prompt that become a tokenizer's unknown token, each once, in order."""
    unknown = tokenizer.unk_token_id
    tokens = tokenizer(prompt, return_offsets_mapping=True, verbose=False)
    spans = [span for token, span in zip(tokens.input_ids, tokens.offset_mapping, strict=True) if token == unknown]
    words = (prompt[start:end] for start, end in spans)
    return list(dict.fromkeys(word for word in words if any(character.isalnum() for character in word)))


def num_tokens(tokenizer: Any, prompt: str) -> int:
    """Return how many tokens a prompt has, with the end token where the tokenizer adds one."""
    return len(tokenizer(prompt, verbose=False).input_ids)


def clean_prompt(prompt: str) -> str:
    """Return a prompt with HTML entities resolved and white space joined, as diffusers' Wan pipelines clean it.

    Broken Unicode is mended where ftfy is installed, as it is there; what cannot be encoded becomes a question mark.
    """
    prompt = encodable(prompt)
    if importlib.util.find_spec("ftfy") is not None:
        prompt = importlib.import_module("ftfy").fix_text(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()
