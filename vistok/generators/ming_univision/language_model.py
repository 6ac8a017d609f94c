"""A causal language model of Hugging Face's ``transformers`` in the place of Ming-UniVision's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vistok.nn.attention import LayerCache

DEFAULT_LENGTH = 2048
"""Positions of a context where a model's config names no limit."""


class LanguageModel(nn.Module):
    """The layers of a causal language model: embeddings (R, n, D) to normed hidden states (R, n, D).

    Its embedding and its output layer are taken out of it (``release``), each with weights of its own, and with room
    for marks that the model did not know.

    Args:
        source: a folder or a name on the hub, whose weights it starts from; or a config as JSON values, for a model of
            which the weights come later.
        vocabulary_size: ids that there must be at least.

    Raises:
        ValueError: ``transformers`` is not installed, or the source is no causal language model.
    """

    def __init__(self, source: str | Mapping[str, Any], vocabulary_size: int):
        super().__init__()
        model = _open(source)
        if model.get_input_embeddings().num_embeddings < vocabulary_size:
            model.resize_token_embeddings(vocabulary_size, mean_resizing=False)
        sizes = model.config
        self.sizes: dict[str, Any] = sizes.to_dict()
        self.dim: int = sizes.hidden_size
        self.max_length: int = getattr(sizes, "max_position_embeddings", None) or DEFAULT_LENGTH
        heads = sizes.num_attention_heads
        head_dim = getattr(sizes, "head_dim", None) or self.dim // heads
        self.cache_sizes = (sizes.num_hidden_layers, getattr(sizes, "num_key_value_heads", None) or heads, head_dim)
        embedding = nn.Embedding.from_pretrained(model.get_input_embeddings().weight.detach().clone(), freeze=False)
        head = model.get_output_embeddings()
        output = nn.Linear(self.dim, head.out_features, bias=head.bias is not None, dtype=head.weight.dtype)
        output.load_state_dict({name: value.detach().clone() for name, value in head.state_dict().items()})
        self.layers = model.get_decoder()
        self.layers.set_input_embeddings(None)
        self._ends = (embedding, output)

    def release(self) -> tuple[nn.Embedding, nn.Linear]:
        """The embedding and the output layer, which belong to the caller from now on."""
        ends = self._ends
        del self._ends
        return ends

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor,
        caches: Sequence[LayerCache] | None = None,
        images: Tensor | None = None,
    ) -> Tensor:
        """As of ``Backbone``; there is one router for texts and images, if there are any."""
        lowest = torch.finfo(x.dtype).min
        answer = self.layers(
            inputs_embeds=x,
            position_ids=positions,
            attention_mask=torch.where(mask, 0.0, lowest).to(x.dtype),
            past_key_values=None if caches is None else _cache(caches),
            use_cache=caches is not None,
        )
        return answer.last_hidden_state


def _open(source: str | Mapping[str, Any]) -> Any:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ValueError("a language model by name needs `transformers`; pip install 'vistok[text]'") from error
    try:
        if isinstance(source, str):
            return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        values = dict(source)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = source if isinstance(source, str) else "this config"
        raise ValueError(f"{what} is no causal language model, neither in a folder nor on the hub ({error})") from error


def _cache(caches: Sequence[LayerCache]) -> Any:
    """Our caches as ``transformers`` wants them."""
    from transformers import Cache

    class Caches(Cache):
        def __init__(self) -> None:
            self.layers: list[Any] = []

        def update(
            self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            return caches[layer_idx].append(key, value)

        def get_seq_length(self, layer_idx: int = 0) -> int:
            memory: Any = caches[layer_idx]
            return memory.length

    return Caches()
