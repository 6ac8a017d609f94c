"""Text encoders of Hugging Face: T5, CLIP's text tower, BERT and similar models.

LlamaGen (arXiv 2406.06525) conditions on at most 120 hidden states of flan-t5-xl, padded on the left.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vistok.checkpoints.weights import hash_weights
from vistok.data.ragged import Piece
from vistok.text.base import TextEncoder, TextError
from vistok.text.cleaning import clean_caption
from vistok.types import FeatureSpec

MOST_COPIED = 1 << 30
"""Largest size in bytes of the weights that are copied into a pipeline or token cache; larger ones stay in place."""

log = logging.getLogger(__name__)


class HuggingFaceEncoder(TextEncoder):
    """The last hidden states of a text model of ``transformers``.

    It uses the encoder of an encoder-decoder model, and the text tower of a model of texts and images.

    Args:
        name: a local folder, or a name on the hub.
        length: most tokens of a text; a longer one is cut, but keeps its end token.

    Raises:
        TextError: ``transformers`` is not installed, or there is no such model.
    """

    part = "features"
    kind = "huggingface"
    _model: Any  # transformers' models do not declare their attributes

    def __init__(self, name: str, length: int) -> None:
        try:
            import transformers
        except ImportError as error:
            raise TextError("text encoders need `transformers`; pip install 'vistok[text]'") from error
        self._name = str(Path(name).resolve()) if Path(name).is_dir() else name
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(self._name)
            self._model = _load_model(self._name).eval().requires_grad_(False)
        except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
            raise TextError(f"{name} is no text encoder: neither a folder nor a name on the hub ({error})") from error
        self.spec = FeatureSpec(self._model.config.hidden_size, length)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[Piece]:
        if not texts:
            return []
        texts, length = list(texts), self.spec.length
        uncut = [len(ids) for ids in self._tokenizer(texts, verbose=False)["input_ids"]]
        rows = self._tokenizer(texts, truncation=True, max_length=length, verbose=False)["input_ids"]
        states = self._states(rows)
        return [Piece(s.numpy(), full) for s, full in zip(states, uncut, strict=True)]

    def _states(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """The hidden states (n, D) of each text of n ids, float32 on the CPU."""
        device, longest = self._model.device, max(map(len, rows))
        ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.int64).unbind(0)
        for row, values in enumerate(rows):  # padded on the right, which encoders with absolute positions need
            ids[row, : len(values)] = torch.tensor(values, dtype=torch.int64)
            mask[row, : len(values)] = 1
        states = self._model(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state.float().cpu()
        return [state[: len(values)] for state, values in zip(states, rows, strict=True)]

    @cached_property
    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(repr(sorted(self._tokenizer.get_vocab().items())).encode())
        hash_weights(digest, self._model.state_dict())
        return {"kind": self.kind, "name": self._name, "length": self.spec.length, "hash": digest.hexdigest()}

    @property
    def network(self) -> nn.Module:
        return self._model

    def to(self, device: Any) -> HuggingFaceEncoder:
        self._model.to(device)
        return self

    def save_files(self, folder: Path) -> bool:
        source = Path(self._name)
        if not source.is_dir():
            return False  # it can be loaded from the hub again
        files = [file for file in source.iterdir() if file.is_file() and file.suffix in (".json", ".txt", ".model")]
        weights = sorted(source.glob("*.safetensors")) or sorted(source.glob("*.bin"))
        size = sum(file.stat().st_size for file in weights)
        if size > MOST_COPIED:
            log.info("the text encoder (%.1f GiB) stays in %s", size / 2**30, source)
            return False
        for file in [*files, *weights]:
            shutil.copyfile(file, folder / file.name)
        return True


class CleaningEncoder(HuggingFaceEncoder):
    """A text encoder that first cleans texts by ``clean_caption``, as LlamaGen does with T5 for captions and prompts.

    Raises:
        TextError: as ``HuggingFaceEncoder``; or the packages for cleaning are not installed.
    """

    kind = "cleaning"

    def __init__(self, name: str, length: int) -> None:
        super().__init__(name, length)
        clean_caption("")  # a missing package raises here, not after hours of tokenizing

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[Piece]:
        return super().encode([clean_caption(text) for text in texts])


class CLIPTower(HuggingFaceEncoder):
    """CLIP's text tower: the states of all ``length`` positions after the last norm, neither projected nor pooled.

    Texts are padded with id 0, as in OpenAI's and open_clip's tokenizers. The tower is causal, so the states of the
    text do not depend on the padding. TA-TiTok (arXiv 2501.07730) decodes with all 77 positions.

    Raises:
        TextError: as ``HuggingFaceEncoder``; or the model is not CLIP's text tower, or has fewer positions.
    """

    kind = "clip"

    def __init__(self, name: str, length: int) -> None:
        super().__init__(name, length)
        config = self._model.config
        if config.model_type != "clip_text_model":
            raise TextError(f"{name} is no text tower of CLIP but {config.model_type}; its padding means nothing")
        if length > config.max_position_embeddings:
            raise TextError(f"{name} has {config.max_position_embeddings} positions, not {length}")

    def _states(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        ids = torch.zeros(len(rows), self.spec.length, dtype=torch.int64)
        for row, values in enumerate(rows):
            ids[row, : len(values)] = torch.tensor(values, dtype=torch.int64)
        states = self._model(input_ids=ids.to(self._model.device)).last_hidden_state
        return list(states.float().cpu())


def _load_model(name: str) -> nn.Module:
    """The text part of the model."""
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

    if type(AutoConfig.from_pretrained(name)) in MODEL_FOR_TEXT_ENCODING_MAPPING:
        return AutoModelForTextEncoding.from_pretrained(name)
    return AutoModel.from_pretrained(name).text_model  # CLIP and similar models
