"""Captions and conversations, with generators that read and write texts and images in one context."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image
from torch import Tensor

from vistok.conditions import WORDS
from vistok.data.movies import shown
from vistok.draws import Keys
from vistok.types import Condition
from vistok.utils.numbers import check_whole

if TYPE_CHECKING:
    from vistok.pipelines.generation import Pipeline

Role = Literal["human", "assistant"]
HUMAN: Role = "human"
ASSISTANT: Role = "assistant"
ROLES = (HUMAN, ASSISTANT)
MAX_TOKENS = 64


@dataclass(frozen=True)
class Message:
    """One turn of a conversation: a text, an image, or both.

    Attributes:
        role: ``human``, or ``assistant`` for the model.
        text: None for an image alone.
        image: None for a text alone.

    Raises:
        ValueError: the role is unknown, a value has the wrong type, the message is empty, or a reply of the assistant
            has both a text and an image.
    """

    role: Role
    text: str | None = None
    image: Image.Image | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"unknown role {self.role!r}; messages are of {' or '.join(ROLES)}")
        if not isinstance(self.text, str | None) or not isinstance(self.image, Image.Image | None):
            kind = type(self.image if isinstance(self.text, str | None) else self.text).__name__
            raise ValueError(f"a message has a text (str) and an image (PIL.Image), got {kind}; open files with PIL")
        if self.text is None and self.image is None:
            raise ValueError(f"the message of {self.role} is empty: give it a text, an image, or both")
        if self.role == ASSISTANT and self.text is not None and self.image is not None:
            raise ValueError("a reply of the assistant is a text or an image, not both")

    def _repr_png_(self) -> bytes | None:
        """The image, for notebooks."""
        return None if self.image is None else self.image._repr_png_()


class Chat:
    """A conversation with a model that replies with a text or an image. The model reads each message once.

    Args:
        pipe: a pipeline whose generator writes texts and images.
        history: earlier messages, also as mappings with the fields of ``Message``.
        seed: of the images; the same conversation with the same seed gives the same images.

    Attributes:
        messages: all messages so far. If a reply fails, its question is not among them, and the conversation is over:
            the model has read the question. Go on with a new conversation of these messages.

    Raises:
        ValueError: the generator writes no texts, a role is unknown, two messages in a row have the same role, or the
            history does not fit the model.
    """

    def __init__(self, pipe: Pipeline, history: Iterable[Message | Mapping[str, Any]] = (), *, seed: int = 0):
        self._pipe, self._seed = pipe, seed
        self.messages: list[Message] = []
        self._is_over = False
        self._session = pipe.generator.converse(1, pipe.options(), tokenizer=pipe.in_loop)
        for entry in history:
            self._recall(entry if isinstance(entry, Message) else _message(entry))

    @torch.no_grad()
    def __call__(
        self,
        text: str | None = None,
        image: Image.Image | None = None,
        *,
        reply: Literal["text", "image"] | None = None,
        max_tokens: int = MAX_TOKENS,
        **sampling: Any,
    ) -> Message:
        """Add a message of the human, and return the model's reply.

        Args:
            text, image: the content of the message, one or both.
            reply: kind of the reply; None lets the model choose.
            max_tokens: the most tokens of a text.
            **sampling: options of ``generator.options_type`` for an image; they override the pipeline's.

        Raises:
            ValueError: the message is empty, the model reads no images, the pipeline has no text tokenizer, the context
                is full, or an earlier reply failed.
            ConfigError: an option is unknown.
        """
        if reply not in (None, "text", "image"):
            raise ValueError(f"a reply is 'text' or 'image', or None for what the model chooses; got {reply!r}")
        check_whole("max_tokens", max_tokens, least=1)
        if reply == "image" and text is None and image is None:
            raise ValueError("say what to draw")
        pipe, said, options = self._pipe, Message(HUMAN, text, image), self._pipe.options(**sampling)
        if self._is_over:
            raise ValueError(
                "the last reply failed after the model had read its question, so this conversation is over; go on with "
                "pipe.chat(chat.messages)"
            )
        self._is_over = True  # until there is a reply
        try:
            self._ask(said)
        except ValueError:  # refused, and nothing of it was read
            self._is_over = False
            raise
        if reply is None:
            reply = "image" if bool(self._session.wants_image()) else "text"
        if reply == "text":
            answer = Message(ASSISTANT, decode_texts(pipe, self._session.write(max_tokens))[0])
        else:
            keys = Keys.range(self._seed, 1, len(self.messages) // 2)
            tokens = self._session.draw(options, pipe.generator.sampling_draws(keys, options))
            answer = Message(ASSISTANT, image=shown(pipe.decode(tokens, keys))[0])
        self.messages += [said, answer]
        self._is_over = False
        return answer

    def _ask(self, message: Message) -> None:
        if self.messages and self.messages[-1].role == HUMAN:
            raise ValueError("the human spoke last; a reply of the assistant comes before the human speaks again")
        self._session.ask(asked(self._pipe, message.text, None if message.image is None else [message.image]))

    @torch.no_grad()
    def _recall(self, message: Message) -> None:
        if message.role == HUMAN:
            self._ask(message)
        elif not self.messages or self.messages[-1].role == ASSISTANT:
            raise ValueError("a reply of the assistant comes after something that the human said")
        elif message.image is not None:
            self._session.append_image(self._pipe.tokens_of([message.image]))
        else:
            generator = self._pipe.generator
            ids = self._pipe.text.condition([message.text]).parts["ids"]
            words = [*ids.values[0][ids.valid()[0]].tolist(), generator.end]
            self._session.append_text(torch.tensor([words], device=self._pipe.device))
        self.messages.append(message)


def _message(values: Mapping[str, Any]) -> Message:
    if not isinstance(values, Mapping):
        raise ValueError(f"a history is a list of messages, got {values!r} in it; say [{{'role': 'human', 'text': …}}]")
    unknown = [key for key in values if key not in ("role", "text", "image")]
    if unknown or "role" not in values:
        raise ValueError(f"a message has role, and text or image; got {', '.join(map(str, values)) or 'nothing'}")
    return Message(**values)


@torch.no_grad()
def captions(
    pipe: Pipeline, images: Sequence[Image.Image] | Tensor, question: str | None, max_tokens: int, batch_size: int
) -> list[str]:
    """Describe each image in words, or answer ``question`` about it."""
    check_whole("max_tokens", max_tokens, least=1)
    check_whole("batch_size", batch_size, least=1)
    pipe.generator.check_writes()
    said = []
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        condition = asked(pipe, question, part).to(pipe.device)
        said += decode_texts(pipe, pipe.generator.describe(condition, max_tokens, tokenizer=pipe.in_loop))
    return said


def asked(pipe: Pipeline, text: str | None, images: Sequence[Image.Image] | Tensor | None) -> Condition:
    """The condition of a text, images, or both; the same text goes with every image.

    Raises:
        ValueError: the model reads no images, or the pipeline has no text tokenizer.
    """
    spec, parts, rows = pipe.generator.condition_spec, [], 1 if images is None else len(images)
    if images is not None:
        if spec.given is None:
            raise ValueError(
                f"{type(pipe.generator).__name__} reads no images: it takes {spec.describe()}. A model that reads them "
                f"is trained with {WORDS['given']} (condition=[ids, given])"
            )
        parts.append(_given(pipe.tokens_of(images).cpu(), spec.given.length))
    if text is not None:
        if "ids" not in pipe.text.parts:
            raise ValueError(f"this pipeline has no text tokenizer and takes no text; it takes {spec.describe()}")
        parts.append(pipe.text.condition([text] * rows))
    return Condition.together(*parts)


def _given(tokens: Tensor, length: int) -> Condition:
    """The condition of images' tokens (B, N, ...), padded on the left to ``length``, the most that the model reads."""
    missing = length - tokens.shape[1]
    if missing < 0:
        raise ValueError(
            f"these images become {tokens.shape[1]} tokens each, and this model reads at most {length}; shrink them"
        )
    if not missing:
        return Condition.from_given(tokens)
    valid = torch.ones(tokens.shape[:2], dtype=torch.bool)
    padding = tokens.new_zeros(len(tokens), missing, *tokens.shape[2:])
    return Condition.from_given(
        torch.cat([padding, tokens], 1), torch.cat([~valid.new_ones(len(tokens), missing), valid], 1)
    )


def decode_texts(pipe: Pipeline, ids: Tensor) -> list[str]:
    """The texts of written ids (B, n), each up to the end token and without special tokens."""
    spec, end, said = pipe.generator.condition_spec.ids, pipe.generator.end, list[str]()
    if spec is None:
        raise ValueError("this generator has no vocabulary of texts")
    for row in ids.tolist():
        words = row[: row.index(end)] if end in row else row
        said.append(pipe.text.decode([word for word in words if word < spec.vocabulary_size]))
    return said
