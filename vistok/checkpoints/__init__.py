"""Models on disk: the base class of models, saving and loading, official weights, and the registry of models."""

from vistok.checkpoints.hub import snapshot
from vistok.checkpoints.model import CONFIG, WEIGHTS, Model, load, read_config
from vistok.checkpoints.official import (
    OfficialCheckpoint,
    OfficialReference,
    convert,
    from_official,
    known_config,
    official_name,
)
from vistok.checkpoints.weights import (
    CheckpointError,
    fuse,
    load_strictly,
    read_weights,
    rename,
    unwrap,
    with_averages,
)

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "CheckpointError",
    "Model",
    "OfficialCheckpoint",
    "OfficialReference",
    "convert",
    "from_official",
    "fuse",
    "known_config",
    "load",
    "load_strictly",
    "official_name",
    "read_config",
    "read_weights",
    "rename",
    "snapshot",
    "unwrap",
    "with_averages",
]
