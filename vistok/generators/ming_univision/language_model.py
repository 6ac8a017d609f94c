"""A causal language model of Hugging Face's ``transformers`` in place of Ming-UniVision's own backbone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vistok.generators.engine.cache import KVCache
from vistok.nn.attention import LayerCache

DEFAULT_LENGTH = 2048
"""Positions of a context if the model's config names no limit."""
REACHES = ("max_position_embeddings", "sliding_window", "attention_chunk_size")
"""Fields of a config that limit the context, whose entries must all see each other: positions, and attention spans."""
PROBED, HIDDEN = 10, 2
"""The number of ids that a model is tested with, and how many of them are hidden from it."""
NO_BACKBONE = (
    "cannot carry texts and images: it does not compute an embedding, attention over the entries that a mask leaves at "
    "positions that it is told, and an output layer; take another model, such as Qwen or Mistral"
)


class LanguageModel(nn.Module):
    """The layers of a causal language model: embeddings (R, n, D) to normed hidden states (R, n, D).

    Its embedding and its output layer are separated (``release``), untied, and enlarged for new special ids. The
    separated parts are compared with the whole model on a few ids.

    Args:
        source: a folder or a name on the hub, whose weights it starts from; or a config as JSON values, for a model
            whose weights are loaded later.
        vocabulary_size: the least number of ids.

    Attributes:
        config: the config of the whole model, as JSON values.
        dim: D.
        max_length: the most positions of a context, limited by positions and attention spans of the model.
        cache_sizes: layers, key and value heads, and channels of a head.

    Raises:
        ValueError: ``transformers`` is not installed, the source is no causal language model, or the model is more than
            an embedding, layers and an output layer.
    """

    def __init__(self, source: str | Mapping[str, Any], vocabulary_size: int):
        super().__init__()
        model = _open(source)
        was_training = model.training
        model.eval()
        if model.get_input_embeddings().num_embeddings < vocabulary_size:
            model.resize_token_embeddings(vocabulary_size, mean_resizing=False)
        text = model.config.get_text_config()
        self.config: dict[str, Any] = model.config.to_dict()
        self.dim: int = text.hidden_size
        reaches = [getattr(text, name, None) for name in REACHES]
        self.max_length: int = min((reach for reach in reaches if reach), default=DEFAULT_LENGTH)
        count = max(HIDDEN + 3, min(PROBED, self.max_length))
        ids = torch.arange(count, device=model.device)[None] % vocabulary_size
        try:
            with torch.no_grad():
                expected = model(ids[:, HIDDEN:]).logits
                table, head = model.get_input_embeddings(), model.get_output_embeddings()
                vectors = table(torch.arange(table.num_embeddings, device=model.device))  # some models scale them
                x = vectors[ids]
            embedding = nn.Embedding.from_pretrained(vectors.clone(), freeze=False)
            output = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, dtype=head.weight.dtype)
            output.load_state_dict({name: value.detach().clone() for name, value in head.state_dict().items()})
            self.layers = model.get_decoder()
            self.layers.set_input_embeddings(None)
            parameters = inspect.signature(type(self.layers).forward).parameters
            self._cache_name = "cache" if "cache" in parameters else "past_key_values"  # of older transformers
            self.cache_sizes = self._cache_sizes(text.num_hidden_layers, x)
            logits = self._in_steps(x, output)
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError) as error:
            raise ValueError(f"{_name(source)} {NO_BACKBONE} ({error})") from error
        if not logits.is_meta and not torch.allclose(logits, expected, rtol=1e-3, atol=1e-3 * float(expected.std())):
            apart = (logits - expected).abs().max()
            raise ValueError(f"{_name(source)} {NO_BACKBONE} (its logits differ by up to {apart:.3g})")
        self.layers.train(was_training)
        self._ends = (embedding, output)

    @torch.no_grad()
    def _cache_sizes(self, num_layers: int, x: Tensor) -> tuple[int, int, int]:
        """``cache_sizes``, found by feeding entries (1, n, D)."""
        caches = [_Sizes() for _ in range(num_layers)]
        self(x, *_all_visible(x), caches)
        found = set().union(*(cache.found for cache in caches))
        if len(found) != 1 or not all(cache.found for cache in caches):
            raise ValueError(f"its layers remember keys and values of {sorted(found) or 'no'} heads and channels")
        return num_layers, *found.pop()

    @torch.no_grad()
    def _in_steps(self, x: Tensor, output: nn.Linear) -> Tensor:
        """Logits of all but the first entries (1, n, D), which are hidden, computed in steps with a cache."""
        count = x.shape[1]
        num_layers, heads, dim = self.cache_sizes
        cache = KVCache(num_layers, 1, heads, count, dim, dtype=x.dtype, device=x.device)
        positions, mask = _all_visible(x)
        mask = mask & (positions >= HIDDEN) | torch.eye(count, dtype=torch.bool, device=x.device)
        parts = [
            self(x[:, a:b], (positions[:, a:b] - HIDDEN).clamp_min(0), mask[:, :, a:b, :b], cache.layers)
            for a, b in ((0, HIDDEN + 1), (HIDDEN + 1, HIDDEN + 2), (HIDDEN + 2, count))
        ]
        return output(torch.cat(parts, 1)[:, HIDDEN:])

    def release(self) -> tuple[nn.Embedding, nn.Linear]:
        """Hand the embedding and the output layer over to the caller; to be called once."""
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
        """See ``Backbone.forward``. ``images`` is ignored: texts and images share all routers."""
        lowest = torch.finfo(x.dtype).min
        answer = self.layers(
            inputs_embeds=x,
            position_ids=positions,
            attention_mask=torch.where(mask, 0.0, lowest).to(x.dtype),
            use_cache=caches is not None,
            **{self._cache_name: None if caches is None else _cache(caches)},
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
        raise ValueError(
            f"{_name(source)} is no causal language model, neither in a folder nor on the hub ({error})"
        ) from error


def _name(source: str | Mapping[str, Any]) -> str:
    return source if isinstance(source, str) else f"this config of a {source.get('model_type')!r}"


class _Sizes:
    """A stand-in for a layer's cache that stores nothing and records the numbers of heads and channels."""

    length = 0

    def __init__(self) -> None:
        self.found: set[tuple[int, int]] = set()

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.found |= {(part.shape[1], part.shape[3]) for part in (key, value)}
        return key, value


def _all_visible(x: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (1, n) and a causal mask (1, 1, n, n) of entries (1, n, D)."""
    count = x.shape[1]
    causal = torch.ones(count, count, dtype=torch.bool, device=x.device).tril()
    return torch.arange(count, device=x.device)[None], causal[None, None]


def _cache(caches: Sequence[LayerCache]) -> Any:
    """Our caches as a ``Cache`` of ``transformers``."""
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
