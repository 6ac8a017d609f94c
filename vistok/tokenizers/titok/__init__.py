"""TiTok and TA-TiTok: images as short sequences of tokens without a raster."""

from vistok.tokenizers.titok.model import TiTok
from vistok.tokenizers.titok.networks import CodecConfig, TransformerSize
from vistok.tokenizers.titok.text import TATiTok

__all__ = ["CodecConfig", "TATiTok", "TiTok", "TransformerSize"]
