"""Ming-UniVision: one autoregressive model that reads and writes texts and images."""

from vistok.generators.ming_univision.model import MingUniVision
from vistok.generators.ming_univision.networks import BackboneConfig, FlowHeadConfig
from vistok.generators.ming_univision.sampling import MingOptions

__all__ = ["BackboneConfig", "FlowHeadConfig", "MingOptions", "MingUniVision"]
