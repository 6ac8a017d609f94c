"""The registry of all models: one entry per model.

Names in configs and saved folders are looked up only here, so an import path in a file is never executed. A model's
module is imported when the model is first looked up and loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vistok.utils.spelling import suggestion

if TYPE_CHECKING:
    from vistok.checkpoints.official import OfficialCheckpoint, OfficialReference


@dataclass(frozen=True)
class Licence:
    """The licences of a reference implementation and of its released weights, as their repositories state them. The
    repositories' own texts are authoritative."""

    code: str = "not stated"
    weights: str = "not stated"


UNSTATED = Licence()


@dataclass(frozen=True)
class Entry:
    """One model: its ``name`` in configs, its ``kind``, its class, and the official name of its weights."""

    name: str
    kind: str  # "tokenizer" or "generator"
    target: str  # "module:Class"
    official: str  # "system/part", as from_official takes it
    paper: str  # its arXiv number
    # Official names of the same model in other systems, each with its ``OfficialReference`` as "module:NAME".
    references: Mapping[str, str] = field(default_factory=dict)
    # Formats of token caches that the reference implementation writes, each with its reader as "module:Class".
    token_files: Mapping[str, str] = field(default_factory=dict)
    # For a generator: the name in configs of the tokenizer whose tokens its paper models.
    tokenizer: str | None = None
    licence: Licence = UNSTATED

    @property
    def official_names(self) -> tuple[str, ...]:
        return (self.official, *self.references)

    @property
    def room(self) -> Path:
        """The folder that holds the model's code."""
        found = find_spec(self.target.partition(":")[0])
        if found is None or found.origin is None:
            raise ImportError(f"there is no module {self.target}")
        return Path(found.origin).parent

    def load(self) -> type[Any]:
        return _load(self.target)

    def reference(self, name: str) -> OfficialReference | None:
        """The ``OfficialReference`` of official weights called ``name``; None if ``from_official`` converts them."""
        return _load(self.references[name]) if name in self.references else None

    def licence_of(self, name: str) -> Licence:
        """The licences of the reference implementation whose official name is ``name``."""
        reference = self.reference(name)
        return self.licence if reference is None else reference.licence

    def released(self) -> list[tuple[str, OfficialCheckpoint]]:
        """All official checkpoints, each with the official name of the model it holds."""
        own = [(self.official, checkpoint) for checkpoint in self.load().checkpoints]
        return own + [(name, item) for name, target in self.references.items() for item in _load(target).checkpoints]


ENTRIES = (
    Entry(
        "vit_vqgan",
        "tokenizer",
        "vistok.tokenizers.vit_vqgan:ViTVQGAN",
        "vit_vqgan/tokenizer",
        "2110.04627",
        licence=Licence("MIT"),
    ),
    Entry(
        "llamagen_vq",
        "tokenizer",
        "vistok.tokenizers.llamagen_vq:LlamaGenVQ",
        "llamagen/tokenizer",
        "2406.06525",
        token_files={"llamagen": "vistok.tokenizers.llamagen_vq.codes:LlamaGenCodes"},
        licence=Licence("MIT"),
    ),
    Entry(
        "var_vq", "tokenizer", "vistok.tokenizers.var_vq:VARVQ", "var/tokenizer", "2404.02905", licence=Licence("MIT")
    ),
    Entry(
        "kl_vae",
        "tokenizer",
        "vistok.tokenizers.kl_vae:KLVAE",
        "kl_vae/tokenizer",
        "2112.10752",
        licence=Licence("MIT"),
    ),
    Entry(
        "flextok",
        "tokenizer",
        "vistok.tokenizers.flextok:FlexTok",
        "flextok/tokenizer",
        "2502.13967",
        licence=Licence("Apple sample code", "Apple, research only"),
    ),
    Entry(
        "dar",
        "tokenizer",
        "vistok.tokenizers.dar:DAR",
        "dar/tokenizer",
        "2505.23660",
        licence=Licence("MIT, parts other"),
    ),
    Entry(
        "gigatok",
        "tokenizer",
        "vistok.tokenizers.gigatok:GigaTok",
        "gigatok/tokenizer",
        "2504.08736",
        licence=Licence("MIT"),
    ),
    Entry("framewise", "tokenizer", "vistok.tokenizers.framewise:Framewise", "framewise/tokenizer", ""),
    Entry("larp", "tokenizer", "vistok.tokenizers.larp:LARP", "larp/tokenizer", "2410.21264", licence=Licence("MIT")),
    Entry(
        "maskgit_vqgan",
        "tokenizer",
        "vistok.tokenizers.maskgit_vqgan:MaskGITVQGAN",
        "titok/codec",
        "2202.04200",
        licence=Licence("Apache-2.0", "research only"),
    ),
    Entry(
        "titok",
        "tokenizer",
        "vistok.tokenizers.titok:TiTok",
        "titok/tokenizer",
        "2406.07550",
        licence=Licence("Apache-2.0", "research only"),
    ),
    Entry(
        "ta_titok",
        "tokenizer",
        "vistok.tokenizers.titok:TATiTok",
        "tatitok/tokenizer",
        "2501.07730",
        licence=Licence("Apache-2.0", "research only"),
    ),
    Entry(
        "robustok",
        "tokenizer",
        "vistok.tokenizers.robustok:RobusTok",
        "robustok/tokenizer",
        "2509.12474",
        licence=Licence("no licence file"),
    ),
    Entry(
        "mingtok",
        "tokenizer",
        "vistok.tokenizers.mingtok:MingTok",
        "mingtok/tokenizer",
        "2510.06590",
        licence=Licence("MIT", "Apache-2.0"),
    ),
    Entry(
        "open_magvit2",
        "tokenizer",
        "vistok.tokenizers.open_magvit2:OpenMAGVIT2",
        "magvit2/tokenizer",
        "2409.04410",
        licence=Licence("Apache-2.0"),
    ),
    Entry(
        "open_magvit2_video",
        "tokenizer",
        "vistok.tokenizers.open_magvit2:OpenMAGVIT2Video",
        "magvit2/video_tokenizer",
        "2409.04410",
        licence=Licence("Apache-2.0"),
    ),
    Entry(
        "ibq", "tokenizer", "vistok.tokenizers.ibq:IBQ", "ibq/tokenizer", "2412.02692", licence=Licence("Apache-2.0")
    ),
    Entry(
        "seed",
        "tokenizer",
        "vistok.tokenizers.seed:SEED",
        "seed/tokenizer",
        "2307.08041",
        licence=Licence("Apache-2.0"),
    ),
    Entry(
        "vit_vqgan_gpt",
        "generator",
        "vistok.generators.vit_vqgan_gpt:ViTVQGANGPT",
        "vit_vqgan/gpt",
        "2110.04627",
        tokenizer="vit_vqgan",
        licence=Licence("MIT"),
    ),
    Entry(
        "mar",
        "generator",
        "vistok.generators.mar:MAR",
        "mar/generator",
        "2406.11838",
        tokenizer="kl_vae",
        token_files={"mar": "vistok.generators.mar.moments:MarMoments"},
        licence=Licence("MIT"),
    ),
    Entry(
        "xar",
        "generator",
        "vistok.generators.xar:XAR",
        "xar/generator",
        "2502.20388",
        tokenizer="kl_vae",
        licence=Licence("no licence file"),
    ),
    Entry(
        "maskgit",
        "generator",
        "vistok.generators.maskgit:MaskGIT",
        "titok/generator",
        "2202.04200",
        tokenizer="titok",
        licence=Licence("Apache-2.0", "research only"),
    ),
    Entry(
        "rar",
        "generator",
        "vistok.generators.rar:RAR",
        "rar/generator",
        "2411.00776",
        tokenizer="maskgit_vqgan",
        licence=Licence("Apache-2.0", "research only"),
    ),
    Entry(
        "var",
        "generator",
        "vistok.generators.var:VAR",
        "var/gpt",
        "2404.02905",
        tokenizer="var_vq",
        licence=Licence("MIT"),
    ),
    Entry(
        "open_magvit2_gpt",
        "generator",
        "vistok.generators.open_magvit2_gpt:OpenMAGVIT2GPT",
        "magvit2/gpt",
        "2409.04410",
        tokenizer="open_magvit2",
        licence=Licence("Apache-2.0"),
    ),
    Entry(
        "ibq_gpt",
        "generator",
        "vistok.generators.ibq_gpt:IBQGPT",
        "ibq/gpt",
        "2412.02692",
        tokenizer="ibq",
        licence=Licence("Apache-2.0"),
    ),
    Entry(
        "llama",
        "generator",
        "vistok.generators.llama:Llama",
        "llamagen/gpt",
        "2406.06525",
        references={
            "dar/gpt": "vistok.generators.dar:REFERENCE",
            "gigatok/gpt": "vistok.generators.gigatok:REFERENCE",
            "larp/gpt": "vistok.generators.larp:REFERENCE",
        },
        tokenizer="llamagen_vq",
        licence=Licence("MIT"),
    ),
    Entry(
        "ming_univision",
        "generator",
        "vistok.generators.ming_univision:MingUniVision",
        "ming_univision/generator",
        "2510.06590",
        tokenizer="mingtok",
        licence=Licence("MIT"),
    ),
    Entry(
        "token_shuffle",
        "generator",
        "vistok.generators.token_shuffle:TokenShuffle",
        "token_shuffle/generator",
        "2504.17789",
        tokenizer="llamagen_vq",
    ),
    Entry(
        "randar",
        "generator",
        "vistok.generators.randar:RandAR",
        "randar/gpt",
        "2412.01827",
        tokenizer="llamagen_vq",
        licence=Licence("MIT"),
    ),
    Entry("lpd", "generator", "vistok.generators.lpd:LPD", "lpd/generator", "2507.01957", tokenizer="llamagen_vq"),
)


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


class UnknownModelError(ValueError):
    """A model name that is not registered."""


def entry(name: str, kind: str | None = None) -> Entry:
    """Look up a model by its config name.

    Raises:
        UnknownModelError: no model (of this kind) has the name; the message lists all names.
    """
    return _find(name, {e.name: e for e in ENTRIES if kind in (None, e.kind)}, kind or "model")


def official_entry(name: str) -> Entry:
    """Look up a model by an official name, for example "llamagen/gpt"; raises ``UnknownModelError``."""
    return _find(name, {official: e for e in ENTRIES for official in e.official_names}, "official model")


def token_files() -> dict[str, Any]:
    """The readers of token caches that reference implementations write, by the format's name."""
    return {name: _load(target) for item in ENTRIES for name, target in item.token_files.items()}


def _find(name: str, table: dict[str, Entry], what: str) -> Entry:
    if name in table:
        return table[name]
    hint = suggestion(name, list(table)) or "."
    raise UnknownModelError(f"unknown {what} {name!r}{hint} Known: {', '.join(sorted(table))}.")
