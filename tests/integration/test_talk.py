"""The quickstart of a conversational model with a few training steps; captions and chats of a pipeline."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from support.tiny_models import tiny

import vistok
from vistok.cli import main
from vistok.data.tokens import TokenCache
from vistok.draws import Keys
from vistok.pipelines import Message, Pipeline
from vistok.quickstart import Recipe, quickstart
from vistok.quickstart.scores import fit_classifier
from vistok.quickstart.styled import STYLE_NAMES, draw_request, edit_request, load_styled, word
from vistok.quickstart.talk import Judged, score
from vistok.text import PromptEncoder, open_text_tokenizer
from vistok.types import Condition

SHORT = Recipe(
    system="ming_univision",
    tokenizer=(
        "training.max_steps=2",
        "training.log_every=1",
        *(f"model.{part}.num_layers=1" for part in ("encoder", "semantic_decoder", "pixel_decoder")),
    ),
    generator=("training.max_steps=2", "training.log_every=1", "model.backbone.num_layers=1", "sampling.num_steps=2"),
    views=1,
    classifier_steps=20,
    samples_per_class=2,
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("talk") / "quick start"
    quickstart(out, SHORT)
    return out


@pytest.fixture(scope="module")
def held_out():
    return load_styled("test")


def test_the_chain_leaves_scores_pictures_and_a_pipeline_that_talks(folder, held_out, capsys):
    result = json.loads((folder / "result.json").read_text())
    shares = ("drawings", "captions", "edits", "edits_kept", "turns", "turns_kept", "copies", "distinct")
    assert all(0 <= result[share] <= 1 for share in shares)
    counts = [result["protocol"][name] for name in ("training_digits", "held_out_digits", "drawings", "edits", "turns")]
    assert counts == [5732, 1456, 20, 20, 20]
    names = {"conversations", "drawings", "edits"}
    assert {path.stem for path in folder.glob("*.png")} == names
    report = (folder / "report.html").read_text()
    assert "human: draw a seven" in report
    assert "assistant: " in report
    cache = TokenCache(folder / "tokens")
    texts = [
        bytes(cache.text_of(torch.tensor([40]).numpy(), number).ids[0].tolist()).strip(b"\0") for number in range(4)
    ]
    digit = int(load_styled("train").labels[40])
    assert texts[1:3] == [edit_request(digit).encode(), word(digit).encode()]
    image = folder / "seven.png"
    pipe = vistok.pipeline(folder / "generator", device="cpu")
    message = pipe.chat(seed=3)("draw a seven", reply="image")
    message.image.save(image)
    with pytest.raises(SystemExit, match="0"):
        main(["caption", str(folder / "generator"), str(image), str(image), "--max-tokens", "3"])
    lines = capsys.readouterr().out.split("\n")
    assert sum(str(image.name) in line for line in lines) == 2


def test_given_digits_are_of_the_same_hand_and_of_the_classes_that_are_asked_for(folder):
    digits, cache = load_styled("train"), TokenCache(folder / "tokens")
    tokens, _ = cache.batch(range(len(cache)), [0] * len(cache))
    rows = torch.arange(0, len(cache), 97).numpy()
    given = cache.condition(rows, 0 * rows, 0.0 * rows).given
    second, first = (
        torch.cdist(part.flatten(1), tokens.flatten(1)).argmin(1) for part in given.chunk(2, 1)
    )  # of the chain first, second, sample
    for partners in (first, second):
        assert torch.equal(digits.styles[partners], digits.styles[rows])
    chain = [digits.labels[places].tolist() for places in (first, second, rows)]
    assert not any(a == b or b == c for a, b, c in zip(*chain))

    def texts(number):
        return [bytes(row.tolist()).strip(b"\0").decode() for row in cache.text_of(rows, number).ids]

    asked = [draw_request, edit_request, word, draw_request, edit_request, draw_request]
    for number, (request, place) in enumerate(zip(asked, (2, 2, 2, 1, 1, 0))):
        assert texts(number) == [request(digit) for digit in chain[place]]


def test_held_out_digits_in_the_place_of_edits_score_as_they_should(folder, held_out):
    pipe, cache = vistok.pipeline(folder / "generator", device="cpu"), TokenCache(folder / "tokens")
    real = load_styled("train")
    digits = fit_classifier(real, steps=200)
    styles = fit_classifier(real.by_style(), steps=200, classes=len(STYLE_NAMES))
    said = [word(digit) for digit in held_out.labels.tolist()]
    images = held_out.pixels
    far = 100 * Keys.range(9, len(images)).normal("far", 16, 4)
    judged = Judged(images, held_out.labels, images, held_out.labels, held_out, images, held_out.labels, said, far)
    scores = score(judged, digits, styles, pipe=pipe, cache=cache, held_out=held_out)
    assert scores.drawings == scores.edits == scores.recognised_real > 0.8
    assert scores.edits_kept == scores.style_real > 0.9
    assert (scores.captions, scores.copies, scores.distinct, scores.turns_kept) == (1, 0, 1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Pipelines


@pytest.fixture(scope="module")
def pipe():
    text = PromptEncoder([open_text_tokenizer("bytes", 12)])
    marks = {"text_vocabulary_size": 256, "text_length": 12, "human": (7,), "assistant": (8,)}
    generator = tiny("ming_univision", **marks, num_classes=0)
    return Pipeline(tiny("mingtok"), generator, text=text, sampling={"num_steps": 2})


@pytest.fixture(scope="module")
def images(pipe):
    return pipe(prompt=["a", "b"], seed=5).images


def test_a_conversation_is_one_context_in_which_nothing_is_read_twice(pipe):
    read = []
    original, chat = pipe.generator.backbone.forward, pipe.chat(seed=2)
    pipe.generator.backbone.forward = lambda x, *a, **k: read.append(x.shape[1]) or original(x, *a, **k)
    try:
        first, second = chat("draw a 7", reply="image"), chat("now a 3", reply="image")
    finally:
        del pipe.generator.backbone.forward
    asked = 1 + 1  # roles
    assert sum(read) == (asked + len("draw a 7") + 17) + 1 + (asked + len("now a 3") + 17)  # the first image is closed
    assert [m.role for m in chat.messages] == ["human", "assistant"] * 2
    assert first.image.size == second.image.size == (16, 16)
    again = pipe.chat(seed=2)
    assert again("draw a 7", reply="image").image == first.image
    assert again("now a 3", reply="image").image == second.image
    assert pipe.chat(seed=2)("now a 3", reply="image").image != second.image


def test_a_conversation_whose_reply_failed_is_over(pipe, monkeypatch):
    chat = pipe.chat(seed=2)
    chat("draw a 7", reply="image")
    with monkeypatch.context() as broken:
        broken.setattr(type(chat._session), "begin_image", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            chat("now a 3", reply="image")
    assert len(chat.messages) == 2
    with pytest.raises(ValueError, match=r"this conversation is over; go on with pipe\.chat\(chat\.messages\)"):
        chat("now a 4", reply="image")
    assert pipe.chat(chat.messages, seed=2)("now a 4", reply="image").image is not None


def test_a_refused_message_does_not_end_a_conversation(pipe):
    chat = pipe.chat(seed=2)
    for bad in ({"text": 7}, {"text": "a", "temperatur": 2}):
        with pytest.raises(ValueError, match=r"int|temperatur"):
            chat(**bad)
    assert chat("draw a 7", reply="image").image is not None


def test_a_conversation_goes_on_from_its_history(pipe):
    chat = pipe.chat()
    chat("hello", reply="text", max_tokens=3)
    chat("draw a 7", reply="image")
    told = pipe.chat([{"role": "human", "text": "hello"}, chat.messages[1], *chat.messages[2:]])
    assert len(told.messages) == 4
    assert isinstance(told("and now?", max_tokens=3, reply="text").text, str)


def test_captions_of_a_batch_are_those_of_each_image(pipe, images):
    together = pipe.caption(images, max_tokens=4)
    assert together == [pipe.caption(image, max_tokens=4) for image in images]
    assert pipe.caption(images, question="what?", max_tokens=4, batch_size=1) == pipe.caption(
        images, question="what?", max_tokens=4
    )


def test_the_model_chooses_whether_it_draws(pipe):
    session = pipe.generator.converse(1, tokenizer=pipe.tokenizer)
    session.ask(pipe.text.condition(["draw"]))
    chosen = pipe.chat()("draw", max_tokens=2)
    assert (chosen.image is not None) == bool(session.wants_image())


REFUSED = {
    "unknown role": (
        lambda p, i: p.chat([{"role": "system", "text": "be kind"}]),
        "unknown role 'system'; messages are",
    ),
    "another role": (lambda p, i: p.chat([{"role": "Human", "text": "be kind"}]), "unknown role 'Human'"),
    "history of texts": (lambda p, i: p.chat(["hello"]), r"a list of messages, got 'hello' in it"),
    "text": (lambda p, i: p.chat()(7), r"a text \(str\) and an image \(PIL.Image\), got int"),
    "path": (lambda p, i: p.chat()("a", "photo.png"), "got str; open files with PIL"),
    "length": (lambda p, i: p.chat()("a", reply="text", max_tokens=0), "max_tokens must be at least 1, got 0"),
    "large": (
        lambda p, i: p.caption(torch.zeros(1, 3, 32, 32)),
        "become 64 tokens each, and this model reads at most 16",
    ),
    "no role": (lambda p, i: p.chat([{"text": "be kind"}]), "a message has role"),
    "empty": (lambda p, i: p.chat()(), "message of human is empty"),
    "reply": (lambda p, i: p.chat()("a", reply="sound"), "got 'sound'"),
    "two replies": (lambda p, i: p.chat([Message("assistant", "a")]), "comes after something that the human said"),
    "unanswered": (lambda p, i: p.chat([Message("human", "a")])("b"), "the human spoke last"),
    "option": (lambda p, i: p.chat()("a", temperatur=2), "temperatur"),
    "tokens": (lambda p, i: p.caption(i, max_tokens=0), "at least 1, got 0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_requests_are_refused(pipe, images, what):
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        call(pipe, images)


def test_images_of_any_size_and_mode_are_read(pipe):
    large = Pipeline(
        pipe.tokenizer, tiny("ming_univision", **pipe.generator.config | {"given_length": 20}), text=pipe.text
    )
    for mode in ("L", "RGBA", "P", "I;16", "1"):
        for size in ((16, 16), (64, 40), (5, 3)):
            image = Image.new(mode, size)
            assert isinstance(pipe.caption(image, max_tokens=2), str)
    assert large.caption(torch.zeros(2, 3, 16, 16), max_tokens=3) == large.caption([image, image], max_tokens=3)
    assert len(large.caption(torch.zeros(2, 3, 8, 12), max_tokens=3)) == 2  # fewer tokens than the model allows


def test_models_of_texts_alone_or_of_images_alone_say_so(pipe, images):
    blind = tiny("ming_univision", given_length=0, text_vocabulary_size=256, text_length=12, num_classes=0)
    talks = Pipeline(tiny("mingtok"), blind, text=pipe.text)
    with pytest.raises(ValueError, match="reads no images: it takes condition ids"):
        talks.caption(images)
    with pytest.raises(ValueError, match="reads no images"):
        talks.chat()("what is it?", images[0])
    mute = Pipeline(tiny("vit_vqgan"), tiny("llama"))
    with pytest.raises(ValueError, match=r"Llama writes images alone.* need a model that writes texts"):
        mute.caption(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="writes images alone"):
        mute.chat()
    wordless = Pipeline(tiny("mingtok"), tiny("ming_univision"))
    with pytest.raises(ValueError, match="no text tokenizer"):
        wordless.chat()("draw")


def test_a_context_that_is_full_says_so_and_stays_as_it_was(pipe):
    sizes = {"dim": 32, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 16, "num_experts": 0}
    marks = {"text_vocabulary_size": 256, "text_length": 12, "num_classes": 0}
    short = tiny("ming_univision", **marks, backbone=sizes | {"max_length": 40})
    chat = Pipeline(tiny("mingtok"), short, text=pipe.text, sampling={"num_steps": 2}).chat()
    chat("draw a 7", reply="image")
    with pytest.raises(ValueError, match="exceed the 40 that this model is built for"):
        chat("now a 3", reply="image")
    assert len(chat.messages) == 2
    tight = tiny("ming_univision", **marks, backbone=sizes | {"max_length": 25})
    chat = Pipeline(tiny("mingtok"), tight, text=pipe.text, sampling={"num_steps": 2}).chat()
    with pytest.raises(ValueError, match="17 more entries of an image of 16 tokens exceed the 25"):
        chat("draw a 7", reply="image")


def test_latents_of_another_tokenizer_are_refused():
    tokenizer = tiny("mingtok", latent_mean=0.5, latent_scale=2.0)
    model = tiny("ming_univision", latent_mean=0.5, latent_scale=2.0)
    Pipeline(tokenizer, model)
    with pytest.raises(ValueError, match=r"latent_mean 0, and this model learned latents with 0\.5"):
        Pipeline(tiny("mingtok"), model)
    with pytest.raises(ValueError, match="latent_scale 1"):
        model.start(Condition.none(1), draws={}, tokenizer=tiny("mingtok", latent_mean=0.5))
