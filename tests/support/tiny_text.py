"""A text encoder of random weights in a folder, as transformers saves one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vistok.data.captions import NUMBERS

WORDS = (*NUMBERS, "a", "an", "the", ",", "turned", "left", "right", "red", "blue", "cat", "bird")


def save_tiny_t5(folder: Path, seed: int = 0) -> Path:
    """A T5 encoder-decoder of width 16 and its tokenizer, which knows WORDS and ends every text with </s>."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5Model

    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5Model(T5Config(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder)
    return folder


def save_tiny_clip(folder: Path, seed: int = 0) -> Path:
    """CLIP's tower of texts, of width 16 and 8 positions, and its tokenizer, which knows WORDS and two marks."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["!", "<start>", "<end>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [("<start>", 1), ("<end>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=marks)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="!", eos_token="<end>", pad_token="<end>")
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPTextConfig(
        vocab_size=len(vocabulary), max_position_embeddings=8, bos_token_id=1, eos_token_id=2, pad_token_id=2, **sizes
    )
    CLIPTextModel(config).save_pretrained(folder)
    return folder
