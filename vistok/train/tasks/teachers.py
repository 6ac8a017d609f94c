"""Terms of a tokenizer's objective that use a frozen network: a classifier, another tokenizer, or an image encoder."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from vistok.draws import Draws
from vistok.losses import (
    ClassifierDistance,
    EncoderConfig,
    FrozenEncoder,
    SemanticGuide,
    alignment_distance,
    contrastive_loss,
)
from vistok.nn.alignment import AlignmentHead
from vistok.nn.frozen import Frozen
from vistok.pipelines.folders import load_tokenizer
from vistok.signatures import ConfigError
from vistok.tokenizers.base import Tokenizer
from vistok.train.tasks.terms import PixelTerm, Term, TermConfig
from vistok.types import Clock, TokenizerOutput

ENCODER = EncoderConfig()
CONTRAST_ENCODER = EncoderConfig(image_size=256)


@dataclass(frozen=True)
class ClassifierConfig(TermConfig):
    """The distance between a classifier's logits.

    Attributes:
        weights: ConvNeXt-S's weights file; None downloads torchvision's.
    """

    weights: str | None = None


class ClassifierTerm(PixelTerm):
    """Mean squared difference of ConvNeXt-S's logits for pixels in [-1, 1]. Weight maps have no effect on it."""

    config_type = ClassifierConfig
    config: ClassifierConfig

    def __init__(self, name: str, config: ClassifierConfig, tokenizer: Tokenizer):
        super().__init__(name, config)
        self.distance = Frozen(ClassifierDistance.from_pretrained(config.weights))

    def frozen(self) -> dict[str, nn.Module]:
        return {"classifier": self.distance.network}

    def compare(self, reconstruction: str, output: TokenizerOutput, target: Tensor) -> Tensor:
        return self.distance.network(output.reconstructions[reconstruction], target).mean()


@dataclass(frozen=True)
class CodePredictionConfig(TermConfig):
    """Prediction of another tokenizer's codes.

    Attributes:
        tokenizer: the folder of that tokenizer, for example a converted codec.
    """

    tokenizer: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight and not self.tokenizer:
            raise ValueError("tokenizer is missing: the folder of the tokenizer whose codes are predicted")


class CodePredictionTerm(Term):
    """Cross entropy in nats of the feature "code_logits" with the codes of a frozen tokenizer, the codec."""

    config_type = CodePredictionConfig
    config: CodePredictionConfig

    def __init__(self, name: str, config: CodePredictionConfig, tokenizer: Tokenizer):
        super().__init__(name, config)
        codec = load_tokenizer(config.tokenizer)
        if not codec.spec.discrete or codec.spec.depth != 1:
            raise ConfigError(f"losses.{name}.tokenizer: {config.tokenizer} has no single ids to predict")
        sides = codec.spec_for(tokenizer.input_shape)
        given, predicted = (sides.length, codec.spec.num_ids), tokenizer.predicted_codes
        if predicted is not None and given != predicted:
            raise ConfigError(
                f"losses.{name}.tokenizer: {config.tokenizer} makes {given[0]} codes of {given[1]} of an image, but "
                f"the model predicts {predicted[0]} of {predicted[1]}; see model.codec"
            )
        self.codec = Frozen(codec)

    @classmethod
    def fits(cls, tokenizer: Tokenizer) -> bool:
        return tokenizer.predicted_codes is not None

    def frozen(self) -> dict[str, nn.Module]:
        return {"codec": self.codec.network}

    def forward(
        self, output: TokenizerOutput, target: Tensor, clock: Clock, draws: Draws, tokenizer: Tokenizer
    ) -> Tensor:
        codes = self.codec.network.encode(target)  # (B, P)
        return F.cross_entropy(output.features["code_logits"].float().mT, codes)


@dataclass(frozen=True)
class SemanticContrastConfig(TermConfig):
    """The semantic loss of RobusTok (arXiv 2509.12474).

    Attributes:
        encoder: the frozen vision transformer; its class feature is the partner of the latents.
        patch_size: side of its patches; None keeps the model's own.
        scale: factor of the inner products.
        normalise: whether vectors are l2-normalised first.
    """

    encoder: EncoderConfig = CONTRAST_ENCODER
    patch_size: int | None = None
    scale: float = 1.0
    normalise: bool = False


class SemanticContrastTerm(Term):
    """Contrastive loss between the mean of an image's quantized latents and the class feature of the image.

    The tokenizer projects the class feature if its ``semantic_dim`` is that of the feature; else a linear layer of this
    term does.
    """

    config_type = SemanticContrastConfig
    config: SemanticContrastConfig

    def __init__(self, name: str, config: SemanticContrastConfig, tokenizer: Tokenizer):
        super().__init__(name, config)
        option = f"losses.{name}.encoder.weights"
        guide = SemanticGuide.from_config(config.encoder, config.patch_size, option=option)
        self.guide = Frozen(guide)
        own = tokenizer.semantic_dim == guide.dim
        self.projection = None if own else nn.Linear(guide.dim, tokenizer.spec.dim)

    @classmethod
    def fits(cls, tokenizer: Tokenizer) -> bool:
        return tokenizer.spec.discrete

    def frozen(self) -> dict[str, nn.Module]:
        return {"contrast_encoder": self.guide.network}

    def forward(
        self, output: TokenizerOutput, target: Tensor, clock: Clock, draws: Draws, tokenizer: Tokenizer
    ) -> Tensor:
        project = tokenizer.project_semantic if self.projection is None else self.projection
        partners = project(self.guide.network(target))
        mean = output.features["quantized"].mean(1)
        return contrastive_loss(mean, partners, scale=self.config.scale, normalise=self.config.normalise)


@dataclass(frozen=True)
class AlignmentTermConfig(TermConfig):
    """Alignment with a frozen encoder (REPA, arXiv 2410.06940).

    Attributes:
        encoder: the frozen encoder.
    """

    encoder: EncoderConfig = ENCODER


class AlignmentTerm(Term):
    """1 - the cosine similarity of the tokenizer's feature "alignment" and the frozen encoder's patch features."""

    config_type = AlignmentTermConfig
    config: AlignmentTermConfig

    def __init__(self, name: str, config: AlignmentTermConfig, tokenizer: Tokenizer):
        super().__init__(name, config)
        encoder = FrozenEncoder(config.encoder)
        if encoder.dim != tokenizer.alignment_dim:
            raise ConfigError(
                f"model.alignment.dim is {tokenizer.alignment_dim}, but {config.encoder.name} has {encoder.dim} "
                "channels"
            )
        self.encoder = Frozen(encoder)

    @classmethod
    def fits(cls, tokenizer: Tokenizer) -> bool:
        return tokenizer.alignment_dim is not None

    def frozen(self) -> dict[str, nn.Module]:
        return {"repa_encoder": self.encoder.network}

    def forward(
        self, output: TokenizerOutput, target: Tensor, clock: Clock, draws: Draws, tokenizer: Tokenizer
    ) -> Tensor:
        weights = output.weight_maps.get("alignment")
        return alignment_distance(output.features["alignment"], self.encoder.network(target), weights).mean()


@dataclass(frozen=True)
class SemanticConfig(TermConfig):
    """Semantic regularisation (GigaTok, arXiv 2504.08736): features predict those of a frozen encoder.

    Attributes:
        feature: a name in the tokenizer's ``raster_features``.
        encoder: the frozen encoder; "efficientnet_lite0" needs no download.
        hidden_ratio: hidden width of the head that predicts, relative to that of the feature.
    """

    feature: str = "decoded"
    encoder: EncoderConfig = ENCODER
    hidden_ratio: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_ratio <= 0:
            raise ValueError(f"hidden_ratio must be positive, got {self.hidden_ratio}")


class SemanticTerm(Term):
    """1 - the cosine similarity of a tokenizer's feature, after a trained head, and the frozen encoder's patch
    features. A raster of another size is resized."""

    config_type = SemanticConfig
    config: SemanticConfig

    @classmethod
    def fits(cls, tokenizer: Tokenizer) -> bool:
        return bool(tokenizer.raster_features)

    def __init__(self, name: str, config: SemanticConfig, tokenizer: Tokenizer):
        super().__init__(name, config)
        dim = tokenizer.raster_features[config.feature]
        encoder = FrozenEncoder(config.encoder)
        self.head = AlignmentHead(dim, round(config.hidden_ratio * dim), encoder.dim)
        self.encoder = Frozen(encoder)

    def frozen(self) -> dict[str, nn.Module]:
        return {f"{self.name}_encoder": self.encoder.network}

    def forward(
        self, output: TokenizerOutput, target: Tensor, clock: Clock, draws: Draws, tokenizer: Tokenizer
    ) -> Tensor:
        feature = self.config.feature
        aligned, weights = self.head(output.features[feature]), output.weight_maps.get(feature)
        return alignment_distance(aligned, self.encoder.network(target), weights).mean()
