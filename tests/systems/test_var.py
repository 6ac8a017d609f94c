"""VAR: scales of the tokenizer, and the transformer that predicts one after another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import labels, pixels, tiny, token_ids
from support.tiny_runs import generator_config, tokenizer_config
from torch import Tensor

import vistok
from vistok.data import DataConfig
from vistok.data.masks import box_mask, scale_masks
from vistok.draws import Keys
from vistok.generators.engine.sampling import draw_ids
from vistok.generators.var import VAR, VAROptions
from vistok.pipelines import Pipeline
from vistok.tokenizers.var_vq import VARVQ
from vistok.train import train
from vistok.train.config import OptimizerConfig, SchedulerConfig
from vistok.train.monitor import read_metrics
from vistok.train.optim import lr_factor
from vistok.train.tokenize import tokenize
from vistok.types import Clock, Condition, TokenSpec

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
RAMP = {"guidance_scale": 2.5, "guidance_schedule": "linear"}
SIZES = (1, 4, 9, 16)
ALL = sum(SIZES)


@pytest.fixture
def tokenizer():
    return tiny("var_vq")


def guided(model: VAR, ids: Tensor, condition, tokenizer, scale: float) -> Tensor:
    """Teacher-forced logits with the guidance ramp, by its definition."""
    conditional, null = (model.logits(ids, rows, tokenizer) for rows in (condition, condition.null()))
    t = torch.cat([torch.full((n, 1), (scale - 1) * k / 3) for k, n in enumerate(SIZES)])
    return (1 + t) * conditional - t * null


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer


def test_tokens_of_the_first_scales_decode_coarsely_and_all_of_them_best(tokenizer):
    images = pixels(tokenizer)
    ids = tokenizer.encode(images)
    shown = tokenizer.decode_scales(ids)
    assert shown.shape == (4, *images.shape)
    for k in range(4):
        torch.testing.assert_close(tokenizer.decode(ids[:, : sum(SIZES[: k + 1])]), shown[k])
    with pytest.raises(ValueError, match="end within a scale: the scales end at 1, 5, 14, 30 tokens"):
        tokenizer.decode(ids[:, :7])


def test_code_vectors_decode_like_their_ids(tokenizer):
    ids = tokenizer.encode(pixels(tokenizer))
    torch.testing.assert_close(tokenizer.decode(tokenizer.quantizer.ids_to_latents(ids)), tokenizer.decode(ids))
    with pytest.raises(ValueError, match="code vectors must be"):
        tokenizer.decode(torch.zeros(1, ALL, 3))


def test_every_part_of_the_tokenizer_learns(tokenizer):
    output = tokenizer.train()(pixels(tokenizer))
    assert output.losses.keys() == set(tokenizer.loss_terms)
    (output.reconstruction.square().mean() + sum(term.mean() for term in output.losses.values())).backward()
    assert not [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_unused_codes_move_onto_what_scales_left():
    model = tiny("var_vq", codebook_restart_after=1).train()
    before = model.quantizer.codes().detach().clone()
    for _ in range(2):
        model(pixels(model))
        model.quantizer.codebook.after_backward()
    assert (model.quantizer.codes() != before).any(1).sum() > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scales": (1, 2, 3)}, r"scales end at \(3, 3\), but images of 16x16 have a map of \(4, 4\)"),
        ({"scales": ()}, "scales must be sides"),
        ({"scales": (0, 4)}, "at least 1"),
        ({"scales": 4}, "scales must be sides"),
        ({"scales": (1, 2.5, 4)}, "whole numbers"),
        ({"quant_conv_kernel": 2}, "must be odd"),
        ({"image_size": 18}, "multiples of 4"),
        ({"refiner_share": 1.5}, r"must lie in \[0, 1\]"),
        ({"num_refiners": 0}, "at least 1, got 0"),
    ],
)
def test_tokenizers_that_cannot_be_built_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny("var_vq", **arguments)


def test_images_that_are_not_square():
    model = tiny("var_vq", image_size=(8, 16), scales=((1, 1), (1, 2), (2, 4)))
    assert model.spec.length == 11
    assert model.reconstruct(pixels(model)).shape == (3, 3, 8, 16)


# ---------------------------------------------------------------------------------------------------------------------
# The transformer


@torch.no_grad()
@pytest.mark.parametrize("arguments", [{}, {"shared_modulation": True}, {"l2_norm": False}, {"num_classes": 0}])
def test_cached_sampling_equals_teacher_forcing(arguments, tokenizer):
    model = tiny("var", **arguments)
    condition = labels(0, 4, -1) if model.num_classes else Condition.none(3)
    ids = model.sample(condition, VAROptions(temperature=0, **RAMP), tokenizer=tokenizer)
    assert torch.equal(guided(model, ids, condition, tokenizer, 2.5).argmax(-1), ids)


@torch.no_grad()
def test_guidance_1_is_no_guidance(tokenizer):
    model, condition = tiny("var"), labels(0, 1, 2)
    ids = model.sample(condition, VAROptions(temperature=0, guidance_schedule="linear"), tokenizer=tokenizer)
    assert torch.equal(model.logits(ids, condition, tokenizer).argmax(-1), ids)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, ALL - 1), st.integers(0, 1000))
@torch.no_grad()
def test_a_scale_sees_smaller_ones_and_nothing_else(position, seed):
    model, tokenizer, condition = tiny("var"), tiny("var_vq"), labels(0, 4, -1)
    ids = token_ids(model, seed=seed)
    changed = ids.clone()
    changed[:, position] = (changed[:, position] + 7) % 32
    before, after = (model.logits(given_ids, condition, tokenizer) for given_ids in (ids, changed))
    end = next(sum(SIZES[: k + 1]) for k in range(4) if position < sum(SIZES[: k + 1]))
    torch.testing.assert_close(before[:, :end], after[:, :end], **TOLERANCE)
    if end < ALL:
        assert not torch.allclose(before[:, end:], after[:, end:], atol=1e-3)


@torch.no_grad()
def test_given_scales_are_continued(tokenizer):
    model, condition = tiny("var"), labels(0, 4, 2)
    options = VAROptions(temperature=0, **RAMP)
    whole = model.sample(condition, options, tokenizer=tokenizer)
    session = model.start(condition, options, tokenizer=tokenizer)
    session.append(whole[:, :5])
    for _ in session.generate():
        pass
    assert torch.equal(session.tokens, whole)
    with pytest.raises(ValueError, match="end within a step"):
        model.start(condition, options, tokenizer=tokenizer).append(whole[:, :3])


@torch.no_grad()
def test_one_seed_is_one_sample_in_any_batch(tokenizer):
    model = tiny("var")
    for more_smooth in (False, True):
        options = VAROptions(more_smooth=more_smooth, top_k=9, **RAMP)
        together = model.sample(
            labels(0, 1, 2), options, draws=model.sampling_draws(Keys.range(5, 3), options), tokenizer=tokenizer
        )
        alone = model.sample(
            labels(1), options, draws=model.sampling_draws(Keys.range(5, 1, start=1), options), tokenizer=tokenizer
        )
        torch.testing.assert_close(together[1:2], alone, **TOLERANCE)


@torch.no_grad()
def test_smooth_tokens_are_code_vectors_between_the_codes(tokenizer):
    model, options = tiny("var"), VAROptions(more_smooth=True, top_k=4)
    draws = model.sampling_draws(Keys.range(0, 2), options)
    vectors = model.sample(labels(0, 1), options, draws=draws, tokenizer=tokenizer)
    assert vectors.shape == (2, ALL, 4)
    codes = tokenizer.quantizer.codes()
    assert (vectors.amax((0, 1)) <= codes.amax(0) + 1e-5).all()
    assert torch.cdist(vectors, codes).amin(-1).max() > 1e-3
    one = VAROptions(more_smooth=True, top_k=1)
    alone = model.sample(labels(0, 1), one, draws=draws, tokenizer=tokenizer)
    ids = model.sample(labels(0, 1), VAROptions(top_k=1), draws=draws, tokenizer=tokenizer)
    torch.testing.assert_close(alone, codes[ids])


@torch.no_grad()
def test_edits_keep_what_is_outside_of_the_mask(tokenizer):
    model, ids = tiny("var"), token_ids(tiny("var"))
    regenerate = scale_masks(box_mask((0, 0.5, 1, 1), (4, 4))[None].expand(3, -1, -1), model.spec.scales)
    options = VAROptions(**RAMP)
    draws = model.sampling_draws(Keys.range(0, 3), options)
    edited = model.edit(ids, regenerate, labels(0, 1, -1), options, draws=draws, tokenizer=tokenizer)
    assert torch.equal(edited[~regenerate], ids[~regenerate])
    assert (edited != ids)[regenerate].float().mean() > 0.5
    logits = guided(model, edited, labels(0, 1, -1), tokenizer, 2.5)
    assert torch.equal(draw_ids(logits, draws["ids"], options)[regenerate], edited[regenerate])


def test_masks_of_scales():
    keep_right = ~scale_masks(box_mask((0, 0, 1, 0.5), (4, 4))[None], ((1, 1), (2, 2), (3, 3), (4, 4)))[0]
    first, second, third, last = keep_right.split(SIZES)
    assert first.all()
    assert second.view(2, 2).tolist() == [[False, True]] * 2
    assert third.view(3, 3).tolist() == [[False, False, True]] * 3  # exactly half of the middle column is kept
    assert last.view(4, 4).tolist() == [[False, False, True, True]] * 4
    with pytest.raises(ValueError, match=r"masks must be \(B, 4, 4\)"):
        scale_masks(torch.zeros(1, 3, 4, dtype=torch.bool), ((1, 1), (4, 4)))
    with pytest.raises(ValueError, match="a box is"):
        box_mask((0.5, 0, 0.2, 1), (4, 4))


def test_a_pipeline_samples_previews_and_edits(tokenizer, tmp_path):
    pipe = Pipeline(tokenizer, tiny("var"), sampling=RAMP)
    made = pipe([0, 1], seed=3)
    previews = list(pipe.stream([0, 1], seed=3))
    assert [preview.step for preview in previews] == [1, 5, 14, 30]
    assert torch.equal(previews[-1].tokens, made.tokens)
    torch.testing.assert_close(
        tokenizer.decode(made.tokens[:, :5]).clamp(-1, 1), tokenizer.decode_scales(made.tokens)[1].clamp(-1, 1)
    )
    assert all(len(preview.images) == 2 for preview in previews)
    smooth = pipe([0, 1], seed=3, more_smooth=True)
    assert smooth.tokens.shape == (2, ALL, 4)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:, :8] = True
    images = pixels(tokenizer, batch=2)
    edited, kept = pipe.edit(images, mask, [0, 1]).tokens, tokenizer.encode(images)
    assert torch.equal(edited.view(2, -1)[:, 14:].view(2, 4, 4)[:, :, 2:], kept[:, 14:].view(2, 4, 4)[:, :, 2:])
    assert (edited != kept).any()
    pipe.save_pretrained(tmp_path / "pipe")
    assert torch.equal(Pipeline.from_pretrained(tmp_path / "pipe", device="cpu")([0, 1], seed=3).tokens, made.tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_scales_join_one_after_another(tokenizer):
    options = {"progressive_share": 0.8, "progressive_from": 1, "progressive_after": 4, "stage_warmup": 3}
    model, ids = tiny("var", **options).train(), token_ids(tiny("var"))
    stages = [model.stage_at(step, 40) for step in range(40)]
    assert stages[:5] == [1] * 5
    assert stages == sorted(stages)
    assert stages[32:] == [3] * 8
    joined = stages.index(2)
    for step, warmth in ((joined, 0.01), (joined + 1, 1 / 3), (joined + 3, 1.0)):
        output = model(ids, labels(0, 1, 2), clock=Clock(step, 40), tokenizer=tokenizer)
        assert output.prediction.shape[1] == 14
        per_token = model.cross_entropy(output.prediction, ids[:, :14])
        expected = (per_token[:, :5].sum(1) + warmth * per_token[:, 5:].sum(1)) / ALL
        torch.testing.assert_close(output.loss, expected.mean())
    assert model.eval()(ids, labels(0, 1, 2), clock=Clock(0, 40), tokenizer=tokenizer).prediction.shape[1] == ALL


def test_scales_join_after_the_warm_up_however_short_their_share_is():
    model = tiny("var", progressive_share=0.1, progressive_from=1, progressive_after=8)
    assert [model.stage_at(step, 40) for step in (0, 3, 4, 8, 9, 39)] == [1, 1, 1, 1, 3, 3]
    plain = tiny("var", progressive_after=8)
    assert [plain.stage_at(step, 40) for step in (0, 8, 9)] == [3, 3, 3]


@pytest.mark.parametrize("scales", [((4, 6),), ((2, 3), (4, 6)), ((1, 1), (3, 2), (4, 6), (4, 6))])
def test_any_schedule_that_ends_at_the_map_is_learned_and_sampled(scales):
    """A single scale, several tokens in the first, one that does not grow."""
    tokenizer = tiny("var_vq", image_size=(16, 24), scales=scales)
    model, images = tiny("var", spec=tokenizer.spec).train(), pixels(tokenizer)
    ids, condition = tokenizer.encode(images), labels(0, 4, -1)
    model(ids, condition, draws=model.training_draws(Keys.range(0, 3)), tokenizer=tokenizer).loss.backward()
    model.eval()
    greedy = model.sample(condition, VAROptions(temperature=0), tokenizer=tokenizer)
    assert torch.equal(model.logits(greedy, condition, tokenizer).argmax(-1), greedy)
    assert tokenizer.decode(greedy).shape == images.shape
    for limits in ({"top_k": 1}, {"top_p": 1e-6}):  # which leave only the likeliest code
        for more_smooth in (False, True):
            options = VAROptions(**limits, more_smooth=more_smooth)
            draws = model.sampling_draws(Keys.range(0, 3), options)
            drawn = model.sample(condition, options, draws=draws, tokenizer=tokenizer)
            expected = tokenizer.quantizer.ids_to_latents(greedy) if more_smooth else greedy
            torch.testing.assert_close(drawn, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spec": TokenSpec(16, 32, dim=4, grid=(4, 4))}, "these tokens have no scales"),
        ({"spec": TokenSpec(5, None, dim=4, scales=((1, 1), (2, 2)))}, "continuous latents"),
        ({"progressive_share": 0.5}, "progressive_from 4 is no scale"),
        ({"progressive_share": 1.5}, r"must lie in \[0, 1\]"),
        ({"stage_warmup": -1}, "stage_warmup counts steps"),
        ({"label_smoothing": 2.0}, r"label_smoothing must lie in \[0, 1\]"),
    ],
)
def test_transformers_that_cannot_be_built_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny("var", **arguments)


def test_tokens_are_not_read_without_their_tokenizer():
    with pytest.raises(ValueError, match="pass tokenizer="):
        tiny("var").sample(labels(0))
    for other in (tiny("var_vq", codebook_size=16), tiny("var_vq", scales=(1, 2, 4)), tiny("vit_vqgan")):
        with pytest.raises(ValueError, match="of other tokens than its tokenizer's"):
            tiny("var").sample(labels(0), VAROptions(temperature=0), tokenizer=other)
    with pytest.raises(ValueError, match=r"must be \(B, 30\), of all scales; got \(1, 14\)"):
        tiny("var")(torch.zeros(1, 14, dtype=torch.int64), labels(0), tokenizer=tiny("var_vq"))
    with pytest.raises(ValueError, match="multiples of 4, got 18x16"):
        tiny("var_vq").encode_scales(torch.zeros(1, 3, 18, 16), (1, 4))


def test_a_new_model_starts_with_small_gates():
    arguments = {name: value for name, value in VAR.tiny.items() if name != "gate_init"}
    model = VAR(**arguments | {"dim": 64, "num_layers": 4})
    weight = model.blocks[0].modulation.modulation[1].weight.detach()
    assert weight[:128].std().item() == pytest.approx(1e-3 * (1 / 192) ** 0.5, rel=0.1)
    assert weight[128:].std().item() == pytest.approx(0.5 * (1 / 192) ** 0.5, rel=0.1)
    assert model.blocks[0].attn.out.weight.std().item() == pytest.approx((1 / 192) ** 0.5 / 8**0.5, rel=0.1)


def test_tokenizer_and_transformer_train_and_the_run_is_a_pipeline(tmp_path):
    model = {name: value for name, value in VARVQ.tiny.items() if name != "image_size"}
    config = tokenizer_config(tmp_path / "tokenizer")
    train(config | {"model": {"name": "var_vq", "codebook_restart_after": 2, **model}})
    data = DataConfig(16, source="digits", channels=1, limit=64)
    tokenize(vistok.load(tmp_path / "tokenizer" / "tokenizer"), data, tmp_path / "tokens")
    model = {name: value for name, value in VAR.tiny.items() if name not in ("spec", "num_classes")}
    progressive = {"progressive_share": 0.8, "progressive_from": 1, "stage_warmup": 2}
    run = generator_config(tmp_path / "run", tmp_path / "tokens", sampling=RAMP)
    run["model"] = {"name": "var", **model, **progressive}
    run["optimizer"] = {"weight_decay": 0.05, "final_weight_decay": 0.08, "no_decay": ["positions"]}
    run["lr_scheduler"] = {"name": "linear", "hold": 0.05, "warmup_from": 0.005, "warmup_steps": 2}
    train(run)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(torch.tensor([row["loss"], row["last_loss"]]).isfinite().all() for row in rows)
    assert len(vistok.pipeline(tmp_path / "run", device="cpu")([3], seed=1).images) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hold": 1.0}, r"hold must lie in \[0, 1\)"),
        ({"bend": 0.0}, r"bend must lie in \(0, 1\)"),
    ],
)
def test_schedules_that_never_fall_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SchedulerConfig(**options)


def test_a_decay_of_zero_has_no_final_one():
    with pytest.raises(ValueError, match="changes weight_decay, which is 0"):
        OptimizerConfig(final_weight_decay=0.08)


@pytest.mark.parametrize(("name", "own"), [("linear", "hold"), ("exponential", "hold"), ("bent", "bend")])
def test_schedules_fall_to_their_last_factor(name, own):
    factor = lr_factor(SchedulerConfig(name, warmup_steps=4, final_factor=0.1, **{own: 0.2}), 40)
    values = [factor(step) for step in range(40)]
    assert values[4:] == sorted(values[4:], reverse=True)
    assert values[4] == pytest.approx(1)
    assert values[-1] == pytest.approx(0.1)
