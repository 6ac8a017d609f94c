"""Runners of the video scores: feature statistics, Frechet distance, PSNR and SSIM of clips."""

from __future__ import annotations

from torch import Tensor

from vistok.eval.metrics import Moments, frechet_distance
from vistok.eval.reconstruction import SSIM
from vistok.eval.video import mean_squared_error, psnr, ssim

from ..decoding import refuse
from ..harness import Case, GoldenFailure, Step, runner
from .larp_tokenizer import by_quantity


@runner("eval/video", "feature_stats")
def feature_stats(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(*Moments.of(step.tensor("features", 0)).fit(step.args["ddof"]))


@runner("eval/video", "frechet_distance")
def distance(case: Case, step: Step) -> dict[str, float]:
    refuse(step, against="self")
    generated = step.tensor("gen", 0)
    real = generated if "against" in step.args else step.tensor("real", 1)
    gaussians = (Moments.of(features).fit(step.args["ddof"]) for features in (generated, real))
    return step.answers(frechet_distance(*gaussians))


@runner("eval/video", "psnr")
def psnr_of_clips(case: Case, step: Step) -> dict[str, Tensor]:
    pair = step.tensor("video_a", 0), step.tensor("video_b", 1)
    decibels = psnr(*pair, per=step.args["per"], data_range=step.args["data_range"])
    mse = mean_squared_error(*pair, per=step.args["per"])
    return by_quantity(step, {"mse": mse, "psnr": decibels, "psnr_mean": decibels.mean()})


@runner("eval/video", "ssim")
def ssim_of_clips(case: Case, step: Step) -> dict[str, Tensor]:
    borders = {"valid": "crop", "reflect": "reflect"}
    if step.args["padding"] not in borders:
        raise GoldenFailure(f"{step.id}: unknown padding {step.args['padding']!r}")
    variant = SSIM(
        data_range=step.args["data_range"],
        window="gaussian",
        window_size=step.args["window"],
        sigma=step.args["sigma"],
        covariance="population",
        border=borders[step.args["padding"]],
        k1=step.args["k1"],
        k2=step.args["k2"],
    )
    frames = ssim(step.tensor("video_a", 0), step.tensor("video_b", 1), variant)
    return by_quantity(step, {"ssim": frames.mean(), "ssim_per_video": frames.mean(1)})
