"""What the tables of released weights say beside their arguments: the tokenizer that a generator was trained with, and
licences.

Licences are those that the repositories state; whoever uses weights reads the repository's own words.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

NOT_STATED, NONE = "not stated", "no licence file"


@dataclass(frozen=True)
class Licence:
    """Of a reference implementation, and of the weights that it released."""

    code: str
    weights: str = NOT_STATED


_RESEARCH = Licence("Apache-2.0", "research only")
LICENCES = {
    "vit_vqgan": Licence("MIT"),
    "llamagen": Licence("MIT"),
    "var": Licence("MIT"),
    "kl_vae": Licence("MIT"),
    "flextok": Licence("Apple sample code", "Apple, research only"),
    "dar": Licence("MIT, parts other"),
    "gigatok": Licence("MIT"),
    "larp": Licence("MIT"),
    "titok": _RESEARCH,
    "tatitok": _RESEARCH,
    "rar": _RESEARCH,
    "robustok": Licence(NONE),
    "mingtok": Licence("MIT", "Apache-2.0"),
    "ming_univision": Licence("MIT"),
    "magvit2": Licence("Apache-2.0"),
    "ibq": Licence("Apache-2.0"),
    "seed": Licence("Apache-2.0"),
    "mar": Licence("MIT"),
    "xar": Licence(NONE),
    "randar": Licence("MIT"),
    "lpd": Licence(NOT_STATED),
}
"""By the first word of an official name."""

WEIGHTS = {"EPFL-VILAB/flextok_vae_*": "Apple, research only", "qiuk6/*": NOT_STATED}
"""Licences of weights that differ from their system's, by patterns of checkpoint ids."""

TOKENIZERS = {
    "FoundationVision/LlamaGen/c2i_*": "FoundationVision/LlamaGen/vq_ds16_c2i.pt",
    "peizesun/llamagen_t2i/t2i_*": "peizesun/llamagen_t2i/vq_ds16_t2i.pt",
    "showlab/D-AR/D-AR-*L-360K.pt": "showlab/D-AR/D-AR-tokenizer_v1.pt",
    "GPT_*_VQ_SS.pt": "VQ_SS256_e100.pt",
    "GPT_*_VQ_SB.pt": "VQ_SB256_e200.pt",
    "GPT_*_VQ_BL.pt": "VQ_BL256_e200.pt",
    "GPT_*_VQ_BL_dino_disc.pt": "VQ_BL256_dino_disc.pt",
    "GPT_*_VQ_XLXXL.pt": "VQ_XLXXL256_e300.pt",
    "hywang66/LARP-L-long-AR*": "hywang66/LARP-L-long-tokenizer/model.safetensors",
    "mar_*/checkpoint-last.pth": "kl16.ckpt",
    "OliverRen/xAR/*": "kl16.ckpt",
    "yucornetto/generator_titok_l32_*": "yucornetto/tokenizer_titok_l32_imagenet/model.safetensors",
    "yucornetto/generator_titok_b64_*": "yucornetto/tokenizer_titok_b64_imagenet/model.safetensors",
    "yucornetto/generator_titok_s128_*": "yucornetto/tokenizer_titok_s128_imagenet/model.safetensors",
    "yucornetto/RAR/*": "fun-research/TiTok/maskgit-vqgan-imagenet-f16-256.bin",
    "qiuk6/RobusTok/rar_*": "qiuk6/RobusTok/post-train.pt",
    "FoundationVision/var/var_d[12]?.pth": "FoundationVision/var/vae_ch160v4096z32.pth",
    "FoundationVision/var/var_d30.pth": "FoundationVision/var/vae_ch160v4096z32.pth",
    "TencentARC/Open-MAGVIT2-AR-*": "TencentARC/Open-MAGVIT2-Tokenizer-256-resolution/imagenet_256_L.ckpt",
    "TencentARC/IBQ-AR-*": "TencentARC/IBQ-Tokenizer-16384/imagenet256_16384.ckpt",
    "ziqipang/RandAR/*_llamagen_*": "FoundationVision/LlamaGen/vq_ds16_c2i.pt",
    "ziqipang/RandAR/*_maskgit_*": "fun-research/TiTok/maskgit-vqgan-imagenet-f16-256.bin",
    "mit-han-lab/lpd_*": "FoundationVision/LlamaGen/vq_ds16_c2i.pt",
}
"""The tokenizers of released generators, by patterns of the generators' ids."""


def tokenizer_of(checkpoint: str) -> str | None:
    """The id of the tokenizer whose tokens a released generator models; None if it is not known."""
    return _matching(TOKENIZERS, checkpoint)


def licence_of(official: str) -> Licence:
    """The licences of the system that an official name ("system/part") belongs to."""
    return LICENCES.get(official.partition("/")[0], Licence(NOT_STATED))


def licence_of_weights(official: str, checkpoint: str) -> str:
    """The licence of one released file."""
    return _matching(WEIGHTS, checkpoint) or licence_of(official).weights


def _matching(table: dict[str, str], name: str) -> str | None:
    return next((value for pattern, value in table.items() if fnmatchcase(name, pattern)), None)
