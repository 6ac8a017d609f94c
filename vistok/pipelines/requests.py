"""Requests of users, and their conditions: from class names, prompts, or any condition that a generator takes."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from vistok.conditions import PARTS
from vistok.pipelines.classes import ClassLabel, ClassNames
from vistok.text import PromptEncoder
from vistok.types import Condition, ConditionSpec
from vistok.utils.numbers import MOST_IMAGES, SEEDS, check_seed, check_whole

Prompt = str | Sequence[str | None]
"""A text, or several; None among them is unconditional."""


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of a call of a pipeline, as the user gave them.

    Attributes:
        class_labels: classes by id or by name, one or several.
        prompt: texts, one or several.
        negative_prompt: what guidance leads away from, instead of the unconditional prediction: one text, or one per
            prompt.
        num_images: number of unconditional images, instead of classes and prompts.
        condition: any condition that the generator takes, instead of classes and prompts.
        num_images_per_label, num_images_per_prompt: images of each class, prompt or row; the two are synonyms.
        seed: None takes 0, or a seed drawn from ``generator``.
        generator: the source of the seed.
        index_start: the index of the first image; it selects the random draws, together with the seed.
        sampling: options by name.

    Raises:
        ValueError: both synonyms or both seed and generator are given, or a number is not an integer.
    """

    class_labels: ClassLabel | Iterable[ClassLabel] | None = None
    prompt: Prompt | None = None
    negative_prompt: Prompt | None = None
    num_images: int | None = None
    condition: Condition | None = None
    num_images_per_label: int = 1
    num_images_per_prompt: int = 1
    seed: int | None = None
    generator: torch.Generator | None = None
    index_start: int = 0
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_images_per_label != 1 and self.num_images_per_prompt != 1:
            raise ValueError("give num_images_per_label or num_images_per_prompt, not both")
        if self.seed is not None and self.generator is not None:
            raise ValueError("give either seed or generator, not both")
        check_seed(self.seed, optional=True)
        check_whole("num_images", self.num_images, most=MOST_IMAGES, optional=True)
        for name in ("num_images_per_label", "num_images_per_prompt"):
            check_whole(name, getattr(self, name), most=MOST_IMAGES)
        check_whole("index_start", self.index_start, least=0, most=SEEDS[1])

    @property
    def copies(self) -> int:
        """How many images each class, prompt or row gets."""
        return self.num_images_per_label if self.num_images_per_prompt == 1 else self.num_images_per_prompt

    def draw_seed(self) -> int:
        """The seed; with a ``generator`` each call draws a new one."""
        if self.generator is not None:
            return int(torch.randint(1 << 62, (), generator=self.generator, device=self.generator.device))
        return 0 if self.seed is None else operator.index(self.seed)

    def prompts(self, count: int) -> list[str | None] | None:
        """The prompt of each of ``count`` images; None if there are no prompts."""
        if self.prompt is None:
            return None
        texts = [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)
        each = max(count // len(texts), 1)
        return [texts[index // each] for index in range(count)]


class Conditions:
    """Turns requests into conditions of a generator.

    Args:
        spec: the conditions that the generator takes.
        classes: the generator's classes.
        text: turns prompts into conditions.

    Raises:
        ValueError: ``text`` makes a part that the generator does not take.
    """

    def __init__(self, spec: ConditionSpec, classes: ClassNames, text: PromptEncoder) -> None:
        self.spec, self.classes, self.text = spec, classes, text
        foreign = [part for part in text.parts if part not in spec.parts]
        if foreign:
            raise ValueError(f"this generator takes {spec.describe()}, but the text encoder makes {foreign[0]}")

    def of(self, request: Request) -> Condition:
        """The condition of a request, with a row per image.

        Raises:
            ValueError: the request gives no condition or several, a class is unknown, or the pipeline has no text
                encoder for prompts.
        """
        ways = {name: getattr(request, name) is not None for name in ("class_labels", "prompt", "num_images")}
        ways["condition"] = request.condition is not None
        both = ways["class_labels"] and ways["prompt"] and "labels" in self.spec.parts and self.text.parts
        if sum(ways.values()) - bool(both) != 1:
            raise ValueError(
                f"say what to generate by one of {', '.join(list(ways)[:-1])} and condition ({sum(ways.values())} were "
                f"given); for this pipeline, {self._usual()} is the usual one"
            )
        per = "prompt" if request.num_images_per_prompt != 1 else "label"
        check_whole(f"num_images_per_{per}", request.copies, least=1)
        check_whole("num_images", request.num_images, least=1, optional=True)
        if request.negative_prompt is not None and request.prompt is None:
            raise ValueError("negative_prompt goes with prompt=…")
        if request.num_images is not None:
            return Condition.none(request.num_images)
        condition = self._named(request) if request.condition is None else request.condition
        if not len(condition):
            what = "list of classes" if request.prompt is None else "list of prompts"
            raise ValueError(
                f"there is nothing to generate: the {what if request.condition is None else 'condition'} is empty"
            )
        return condition[torch.arange(len(condition)).repeat_interleave(request.copies)]

    def of_images(self, request: Request, count: int) -> Condition:
        """The condition of ``count`` given images; the request has one for all, one for each, or none.

        Raises:
            ValueError: the request has another number of classes or prompts, or as ``of``.
        """
        if request.class_labels is None and request.prompt is None:
            return Condition.none(count)
        condition = self.of(request)
        if len(condition) not in (1, count):
            what = "class" if request.prompt is None else "prompt"
            raise ValueError(f"give one {what}, or one for each of the {count} images; got {len(condition)}")
        return condition[torch.arange(count) % len(condition)]

    def class_ids(self, labels: ClassLabel | Iterable[ClassLabel]) -> list[int]:
        """Ids of classes given by id or by name.

        Raises:
            ValueError: an unknown or ambiguous name, an id out of range, or a pipeline without classes.
        """
        if not self.classes.count:
            raise ValueError(f"this pipeline has no classes; generate with {self._usual()}, without class labels")
        return self.classes.resolve(labels)

    def _named(self, request: Request) -> Condition:
        """The condition of class labels, of prompts, or of both."""
        conditions = []
        if request.class_labels is not None:
            ids = torch.tensor(self.class_ids(request.class_labels), dtype=torch.int64)
            conditions.append(Condition.from_labels(ids))
        if request.prompt is not None:
            conditions.append(self._prompted(request.prompt, request.negative_prompt))
        count = max(map(len, conditions))
        if any(len(condition) not in (1, count) for condition in conditions):
            raise ValueError(f"there are {' and '.join(str(len(c)) for c in conditions)} class labels and prompts")
        rows = torch.arange(count)
        return Condition.together(*(condition[rows % len(condition)] for condition in conditions))

    def _prompted(self, prompt: Prompt, negative: Prompt | None) -> Condition:
        if not self.text.parts:
            raise ValueError(
                f"this pipeline has no text encoder and takes no prompt; its generator takes {self.spec.describe()}. "
                f"Generate with {self._usual()}; a generator learns texts from `vistok tokenize --text-encoder …`"
            )
        texts = _texts("prompt", prompt)
        condition = self.text.condition(texts)
        if negative is None:
            return condition
        others = _texts("negative_prompt", negative)
        if len(others) not in (1, len(texts)):
            raise ValueError(f"give one negative_prompt, or one for each of the {len(texts)} prompts")
        rows = torch.arange(len(texts)) % len(others)
        return condition.instead(self.text.condition(others)[rows])

    def _usual(self) -> str:
        if self.text.parts:
            return 'prompt="…"'
        if self.classes.count:
            return "class_labels=[…]"
        sequences = [part for part in PARTS if part != "labels" and part in self.spec.parts]
        return "condition=…" if sequences else "num_images=…"


def _texts(name: str, value: Prompt) -> list[str | None]:
    """The texts of a prompt, as a list.

    Raises:
        ValueError: an item is neither a text nor None.
    """
    texts: list[str | None] = [value] if isinstance(value, str) or not isinstance(value, Sequence) else list(value)
    wrong = [text for text in texts if not isinstance(text, str | None)]
    if wrong:
        raise ValueError(f"{name} must be a text or a list of texts, got {wrong[0]!r} ({type(wrong[0]).__name__})")
    return texts
