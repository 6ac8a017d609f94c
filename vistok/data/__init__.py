"""Images and cached tokens, in batches that depend only on seed, epoch and position."""

from vistok.data.config import Affine, DataConfig
from vistok.data.loader import (
    ImageBatch,
    ImageBatches,
    InMemory,
    Loader,
    augmented_view_loader,
    evaluation_loader,
    training_loader,
)
from vistok.data.opening import open_source
from vistok.data.order import ResampledOrder, SequentialOrder, ShuffledOrder
from vistok.data.sources import ImageSource, UnreadableImageError
from vistok.data.token_writer import TokenWriter
from vistok.data.tokens import TokenBatch, TokenBatches, TokenCache, TokenCacheError, TokenMixture, token_loader
from vistok.data.transforms import ImageTransform, center_crop_adm, ten_crop, to_pixels

__all__ = [
    "Affine",
    "DataConfig",
    "ImageBatch",
    "ImageBatches",
    "ImageSource",
    "ImageTransform",
    "InMemory",
    "Loader",
    "ResampledOrder",
    "SequentialOrder",
    "ShuffledOrder",
    "TokenBatch",
    "TokenBatches",
    "TokenCache",
    "TokenCacheError",
    "TokenMixture",
    "TokenWriter",
    "UnreadableImageError",
    "augmented_view_loader",
    "center_crop_adm",
    "evaluation_loader",
    "open_source",
    "ten_crop",
    "to_pixels",
    "token_loader",
    "training_loader",
]
