"""Toyland's tokenizer and text encoder: one token a word, and a small UMT5."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast
from transformers.models.umt5.configuration_umt5 import UMT5Config
from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel

from vgen.toyland.captions import words

SPECIALS = ("<pad>", "</s>", "<unk>")
TEXT_WIDTH = 128


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a lower-casing tokenizer that knows the captions' words and ends every text with </s>."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    vocabulary = {word: index for index, word in enumerate((*SPECIALS, *words()))}
    fast = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    fast.normalizer = Lowercase()
    fast.pre_tokenizer = Whitespace()
    fast.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def text_encoder() -> UMT5EncoderModel:
    """Return an untrained text encoder for `tokenizer`."""
    config = UMT5Config(
        vocab_size=len(SPECIALS) + len(words()),
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return UMT5EncoderModel(config)
