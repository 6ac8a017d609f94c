"""The official generators of D-AR: LlamaGen's transformer with one-dimensional positions; the class is at position 0.

D-AR (arXiv 2505.23660), github.com/showlab/D-AR.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.checkpoints import Model, OfficialCheckpoint, OfficialReference
from vistok.checkpoints.registry import Licence

POSITIONS = {"positions": "rope1d"}


def _released(dim: int, num_layers: int, num_heads: int) -> dict[str, Any]:
    sizes = {"dim": dim, "n_layer": num_layers, "n_head": num_heads}
    return sizes | {"block_size": 256, "vocab_size": 16384}


def build(model_class: type[Model], config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Model:
    """The generator that the reference's arguments (those of LlamaGen) describe, with its weights.

    Raises:
        CheckpointError: arguments that are unknown or not supported, or weights that do not fit.
    """
    return model_class.from_official({**config, **POSITIONS}, state_dict)


TOKENIZER = "showlab/D-AR/D-AR-tokenizer_v1.pt"
REFERENCE = OfficialReference(
    build,
    (
        OfficialCheckpoint("showlab/D-AR", "D-AR-L-360K.pt", _released(1024, 24, 16), tokenizer=TOKENIZER),
        OfficialCheckpoint("showlab/D-AR", "D-AR-XL-360K.pt", _released(1280, 36, 20), tokenizer=TOKENIZER),
    ),
    Licence("MIT, parts other"),
)
