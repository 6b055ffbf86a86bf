"""How HunyuanVideo reads a prompt: a Llama that is asked to describe a video, or a Llava that also sees its image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# What the model was trained with, word for word; and how many tokens of it come before the prompt.
ASPECTS = (
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
)
TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    f"{ASPECTS}<|start_header_id|>user<|end_header_id|>\n\n%s<|eot_id|>"
)
TEMPLATE_TOKENS = 95
IMAGE_TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\n<image>\nDescribe the video by detailing the following aspects "
    f"according to the reference image: {ASPECTS}\n\n<|start_header_id|>user<|end_header_id|>\n\n%s<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
IMAGE_TEMPLATE_TOKENS = 103

# What CLIP's 24 x 24 patches become of an image of 336 x 336 pixels.
IMAGE_TOKENS = 576
# The text is taken from before the last two layers.
LAYER = -3


@dataclass(frozen=True, kw_only=True)
class HunyuanText:
    """A prompt as the model takes it: tokens [1, L, D], mask [1, L] of what is not padding, pooled [1, P]."""

    tokens: Tensor
    mask: Tensor
    pooled: Tensor


@dataclass(frozen=True)
class PromptEncoder:
    """Returns the tokens [1, length, D] and the mask [1, length] of a prompt."""

    tokenizer: Any
    text_encoder: Any
    length: int

    def __call__(self, prompt: str) -> tuple[Tensor, Tensor]:
        ids, mask = tokenize(self.tokenizer, TEMPLATE % prompt, TEMPLATE_TOKENS + self.length)
        ids, mask = ids.to(self.text_encoder.device), mask.to(self.text_encoder.device)
        hidden = self.text_encoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states[LAYER]
        # Offloaded, the encoder comes to where it computes when it is called, and its inputs with it.
        return hidden[:, TEMPLATE_TOKENS:], mask[:, TEMPLATE_TOKENS:].to(hidden.device)


@dataclass(frozen=True)
class SeeingPromptEncoder:
    """Returns tokens and mask of an image, every `interleave`-th of its tokens, and of a prompt that is about it.

    The four tokens that turn to the assistant are left out, so that [1, 576 / interleave + length - 4, D] remain.
    """

    tokenizer: Any
    text_encoder: Any
    length: int
    pixels: Tensor
    interleave: int

    LEFT_OUT = 4

    def __call__(self, prompt: str) -> tuple[Tensor, Tensor]:
        ids, mask = tokenize(self.tokenizer, IMAGE_TEMPLATE % prompt, IMAGE_TEMPLATE_TOKENS + self.length)
        config, device = self.text_encoder.config, self.text_encoder.device
        (place,) = (ids[0] == config.image_token_id).nonzero()[0].tolist()
        seen = torch.cat([ids[:, :place], ids[:, [place] * IMAGE_TOKENS], ids[:, place + 1 :]], dim=1)
        not_padding = seen != config.pad_token_id
        hidden = self.text_encoder(
            input_ids=seen.to(device),
            attention_mask=not_padding.long().to(device),
            position_ids=(not_padding.cumsum(-1) - 1).masked_fill(~not_padding, 1).to(device),
            pixel_values=self.pixels.to(device),
            output_hidden_states=True,
        ).hidden_states[LAYER]
        image = hidden[:, place : place + IMAGE_TOKENS : self.interleave]
        # The hidden states as if the image were one token, so that they are at the places of `ids`.
        told = torch.cat([hidden[:, : place + 1], hidden[:, place + IMAGE_TOKENS :]], dim=1)
        end = self._end_of_turn(ids)
        kept = [*range(IMAGE_TEMPLATE_TOKENS, end - self.LEFT_OUT), *range(end, told.shape[1])]
        mask = torch.cat([mask.new_ones(image.shape[:2]), mask[:, kept]], dim=1)
        return torch.cat([image, told[:, kept]], dim=1), mask.to(hidden.device)

    def _end_of_turn(self, ids: Tensor) -> int:
        """Return the place after the assistant's header; of a prompt too long to leave one, the end."""
        headers = (ids[0] == self.tokenizer.convert_tokens_to_ids("<|end_header_id|>")).nonzero().flatten().tolist()
        return headers[-1] + 1 if len(headers) > 2 else ids.shape[1]


def tokenize(tokenizer: Any, text: str, length: int) -> tuple[Tensor, Tensor]:
    """Return the ids [1, length] of a text, cut or padded, and the mask [1, length] of what is not padding."""
    tokens = tokenizer(
        [text],
        max_length=length,
        padding="max_length",
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    return tokens.input_ids, tokens.attention_mask
