"""The prompt as a model reads it."""

from __future__ import annotations

import html
import importlib.util
import re


def clean_prompt(prompt: str) -> str:
    """Return a prompt with HTML entities resolved and white space joined, as diffusers' Wan pipelines clean it.

    Broken Unicode is mended where ftfy is installed, as it is there; what cannot be encoded becomes a question mark.
    """
    prompt = prompt.encode("utf-8", "replace").decode("utf-8")
    if importlib.util.find_spec("ftfy") is not None:
        prompt = importlib.import_module("ftfy").fix_text(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()
