"""Runners of the evaluation metrics: ADM's suite, torch-fidelity's metrics, reconstruction scores, Inception."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vistok.data.pictures import to_uint8
from vistok.eval import metrics as m
from vistok.eval.networks import InceptionV3Compat
from vistok.eval.reconstruction import SSIM, decibels, mean_squared_error
from vistok.eval.resize import resize as resize_images

from ..harness import Case, GoldenFailure, Step, runner


def _check(step: Step, name: str, value: Any, *known: Any) -> Any:
    """Refuse settings that no code here implements, instead of computing something else."""
    if value not in known:
        raise GoldenFailure(f"{step.id}: unknown {name} {value!r}; known: {known}")
    return value


def _per_output(step: Step) -> dict[str, dict[str, Any]]:
    """Settings by output; a step with a single output may give its settings without its name."""
    return step.args if set(step.args) <= set(step.outputs) and step.args else {step.outputs[0]: step.args}


# ---------------------------------------------------------------------------------------------------------------------
# ADM


def _flatten_spatial(maps: Tensor, channels: int, layout: str) -> Tensor:
    """(N, C, H, W) -> (N, values) of the first channels."""
    maps = maps[:, :channels]
    return maps.permute(0, 2, 3, 1).flatten(1) if layout == "hwc" else maps.flatten(1)


def _features(case: Case, name: str, settings: dict[str, Any]) -> Tensor:
    features = case.tensor(name)
    if features.ndim == 2:
        return features
    channels = settings.get("channels", case.config.get("spatial_channels"))
    return _flatten_spatial(features, channels, settings.get("layout", "hwc"))


@runner("eval/adm", "spatial_features")
def spatial_features(case: Case, step: Step) -> dict[str, Tensor]:
    layout = _check(step, "layout", step.args["layout"], "hwc", "chw")
    return step.answers(*(_flatten_spatial(case.tensor(name), step.args["channels"], layout) for name in step.inputs))


@runner("eval/adm", "statistics")
def statistics(case: Case, step: Step) -> dict[str, Tensor]:
    return {name: _statistic(case, step, settings) for name, settings in step.args.items()}


def _statistic(case: Case, step: Step, settings: dict[str, Any]) -> Tensor:
    _check(step, "stat", settings["stat"], "mean", "covariance")
    value = getattr(m.Moments.of(_features(case, settings["of"], settings)), settings["stat"])
    if "reduce" in settings:
        _check(step, "reduce", settings["reduce"], "trace")
        value = value.trace()
    # A setting of one output may hold its slice itself.
    return value[_as_index(settings["slice"])] if "slice" in settings else value


def _as_index(entries: list) -> tuple:
    return tuple(slice(*e) if isinstance(e, list) else slice(None) if e is None else e for e in entries)


def _frechet_distances(case: Case, step: Step) -> dict[str, float]:
    answers = {}
    for name, settings in _per_output(step).items():
        a, b = (m.Moments.of(_features(case, of, settings)).gaussian for of in settings.get("of", step.inputs))
        answers[name] = m.frechet_distance(a, b)
    return answers


runner("eval/adm", "fid")(_frechet_distances)
runner("eval/fidelity", "fid")(_frechet_distances)


def _logits(step: Step) -> Tensor:
    return step.tensor("pool_sample", 0) @ step.tensor("softmax_weight", 1)


@runner("eval/adm", "class_probs")
def class_probs(case: Case, step: Step) -> dict[str, Tensor]:
    _check(step, "bias", step.args["bias"], False)
    return step.answers(_logits(step).softmax(1))


@runner("eval/adm", "inception_score")
def adm_inception_score(case: Case, step: Step) -> dict[str, np.ndarray]:
    logits = _logits(step)
    if _check(step, "order", step.args["order"], "given", "argmax_class") == "argmax_class":
        logits = logits[logits.argmax(1).argsort(stable=True)]
    scores = [
        m.inception_score(logits, m.split_into_chunks(len(logits), size)).mean for size in step.args["split_sizes"]
    ]
    return step.answers(np.array(scores))


def _neighbourhood(step: Step) -> dict[str, Any]:
    args = step.args
    default = "euclidean" if step.case.model == "eval/fidelity" else "squared_euclidean"
    distance = _check(step, "distance", args.get("distance", default), "euclidean", "squared_euclidean")
    if _check(step, "dtype", args.get("dtype", "float32"), "float32", "float16") == "float16":
        distance = f"{distance}_float16"
    return {"neighbours": args["k"], "distance": distance}


@runner("eval/adm", "manifold_radii")
def manifold_radii(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(*(m.manifold_radii(case.tensor(name), **_neighbourhood(step)) for name in step.inputs))


@runner("eval/adm", "precision_recall")
def adm_precision_recall(case: Case, step: Step) -> dict[str, np.ndarray]:
    real, generated = step.tensor("pool_ref", 0), step.tensor("pool_sample", 1)
    return step.answers(np.array(m.precision_recall(generated, real, **_neighbourhood(step))))


# ---------------------------------------------------------------------------------------------------------------------
# torch-fidelity


@runner("eval/fidelity", "permutation")
def permutation(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(m.shuffled(torch.arange(step.args["n"]), step.args["seed"]))


@runner("eval/fidelity", "inception_score")
def fidelity_inception_score(case: Case, step: Step) -> dict[str, np.ndarray]:
    answers = {}
    for name, settings in _per_output(step).items():
        logits = case.tensor(settings["of"]) if "of" in settings else step.tensor("logits_generated", 0)
        if settings["shuffle"]:
            logits = m.shuffled(logits, settings["seed"])
        answers[name] = np.array(m.inception_score(logits, m.split_evenly(len(logits), settings["splits"])))
    return answers


@runner("eval/fidelity", "kid")
def kid(case: Case, step: Step) -> dict[str, np.ndarray]:
    generated, real = step.tensor("features_generated", 0), step.tensor("features_real", 1)
    return {name: np.array(_kid(step, generated, real, settings)) for name, settings in _per_output(step).items()}


def _kid(step: Step, generated: Tensor, real: Tensor, settings: dict[str, Any]) -> m.Spread:
    if _check(step, "kernel", settings["kernel"], "polynomial", "rbf") == "rbf":
        kernel = m.GaussianKernel(settings["sigma"])
    else:
        kernel = m.PolynomialKernel(settings["degree"], settings["gamma"], settings["coef0"])
    options = {key: settings[key] for key in ("subsets", "subset_size", "seed")}
    return m.kernel_distance(generated, real, kernel=kernel, **options)


@runner("eval/fidelity", "precision_recall")
def fidelity_precision_recall(case: Case, step: Step) -> dict[str, np.ndarray]:
    generated, real = step.tensor("features_generated", 0), step.tensor("features_real", 1)
    score = m.precision_recall(generated, real, **_neighbourhood(step))
    return step.answers(np.array([*score, score.f_score]))


# ---------------------------------------------------------------------------------------------------------------------
# Reconstruction


def _restored(step: Step) -> Tensor:
    return to_uint8(step.tensor("decoded", len(step.inputs) - 1))


@runner("eval/reconstruction", "to_uint8")
def eight_bit(case: Case, step: Step) -> dict[str, Tensor]:
    args = step.args
    rounding = {"truncate": "truncate", "round": "nearest", "nearest": "nearest"}[args["rounding"]]
    images = to_uint8(step.tensor("decoded", 0), gain=args["gain"], offset=args["offset"], rounding=rounding)
    nhwc = _check(step, "layout", args["layout"], "nhwc", "nchw") == "nhwc"
    return step.answers(images.permute(0, 2, 3, 1) if nhwc else images)


@runner("eval/reconstruction", "uint8_alternatives")
def uint8_alternatives(case: Case, step: Step) -> dict[str, np.ndarray]:
    decoded = step.tensor("decoded", 0)
    right = to_uint8(decoded)
    counts = [int((_alternative(step, decoded, formula) != right).sum()) for formula in step.args["alternatives"]]
    return step.answers(np.array(counts))


def _alternative(step: Step, x: Tensor, formula: str) -> Tensor:
    """The 8-bit image by a formula such as "round((x + 1) / 2 * 255)": arithmetic on x and numbers."""
    match = re.fullmatch(r"(round|truncate)\(([x\d\s.+*/()-]+)\)", formula)
    if not match:
        raise GoldenFailure(f"{step.id}: unknown formula {formula!r}")
    rounding = {"round": "nearest", "truncate": "truncate"}[match[1]]
    value = eval(match[2], {"__builtins__": {}}, {"x": x})  # arithmetic on x only, by the pattern above
    return to_uint8(value, gain=1.0, offset=0.0, rounding=rounding)


def _targets(step: Step, kind: str) -> Tensor:
    """Originals in [0, 1] (in 0..255 for "uint8" SSIM, see there)."""
    target = step.tensor("target", 0)
    if _check(step, "target", kind, "float32", "uint8", "uint8/255 float64") == "float32":
        return (target + 1) / 2
    return to_uint8(target).double() / 255


def _reduce(step: Step, values: Tensor, reduce: str | None) -> Tensor:
    return values.mean() if _check(step, "reduce", reduce, None, "mean") == "mean" else values


def _psnr(step: Step, settings: dict[str, Any]) -> Tensor:
    original = _targets(step, settings["target"])
    mse = mean_squared_error(original, (_restored(step).float() / 255).to(original.dtype))
    reduce = _check(step, "reduce", settings["reduce"], None, "mean_of_decibels", "mean", "decibels_of_mean_mse")
    if reduce == "decibels_of_mean_mse":
        return decibels(mse.mean(), settings["data_range"])
    values = decibels(mse, settings["data_range"])
    return values if reduce is None else values.mean()


def _ssim(step: Step, settings: dict[str, Any]) -> Tensor:
    scale = 255 if settings["images"] == "uint8" else 1
    variant = SSIM(**{key: value for key, value in settings.items() if key not in ("images", "reduce")})
    original = _targets(step, settings["images"]) * scale
    return _reduce(step, variant(original, (_restored(step).double() / 255 * scale).to(original)), settings["reduce"])


@runner("eval/reconstruction", "psnr")
@runner("eval/reconstruction", "ssim")
@runner("eval/reconstruction", "ssim_psnr_batch")
def psnr_and_ssim(case: Case, step: Step) -> dict[str, Tensor]:
    return {
        name: _ssim(step, settings) if "window" in settings else _psnr(step, settings)
        for name, settings in step.args.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Inception


def _network(case: Case) -> InceptionV3Compat:
    return case.once("inception", lambda: InceptionV3Compat(case.state))


@runner("eval/inception", "resize")
def resize(case: Case, step: Step) -> dict[str, Tensor]:
    args = step.args
    _check(step, "rule", args["rule"], "tensorflow1")
    images = (resize_images(step.tensor("images", 0), args["size"], "tf1-bilinear") - args["subtract"]) / args["divide"]
    answers = {}
    for name in step.outputs:
        reduce = _check(step, "reduce", args.get("reduce", {}).get(name), None, "sum_per_image")
        answers[name] = images.double().sum((1, 2, 3)) if reduce else images
    return answers


@runner("eval/inception", "features")
def features(case: Case, step: Step) -> dict[str, Tensor]:
    return _layers(case, step, dict(step.args))


@runner("eval/inception", "logits")
def logits(case: Case, step: Step) -> dict[str, Tensor]:
    names = {True: "logits", False: "logits_unbiased"}
    return _layers(case, step, {name: names[settings["bias"]] for name, settings in step.args.items()})


def _layers(case: Case, step: Step, wanted: dict[str, str]) -> dict[str, Tensor]:
    """Features by torch-fidelity's names. Those that the scores need come from our network's own call, the others from
    the layers inside it."""
    network, images = _network(case), step.tensor("images", 0)
    ours = network(images)
    values = {"2048": ours["pool"], "logits_unbiased": ours["logits"]}
    values["logits"] = values["logits_unbiased"] + network.network.fc.bias
    for name in set(wanted.values()) - set(values):
        values[name] = _spatial_mean(network, step, name, images)
    return {output: values[name] for output, name in wanted.items()}


def _spatial_mean(network: InceptionV3Compat, step: Step, name: str, images: Tensor) -> Tensor:
    layers = {"64": "MaxPool_1", "192": "MaxPool_2", "768": "Mixed_6e"}
    return _output_of(network, layers[_check(step, "feature", name, *layers)], images).mean((2, 3))


def _output_of(network: InceptionV3Compat, layer: str, images: Tensor) -> Tensor:
    seen = []
    module = network.network.get_submodule(layer)
    hook = module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        network(images)
    finally:
        hook.remove()
    return seen[0]


@runner("eval/inception", "spatial_features")
def inception_spatial_features(case: Case, step: Step) -> dict[str, Tensor]:
    args, network, images = step.args, _network(case), step.tensor("images", 0)
    layout = _check(step, "layout", args["layout"], "hwc", "chw")
    if (args["layer"], args["channels"], layout) == ("Mixed_6d.branch1x1", network.spatial_channels, "hwc"):
        return step.answers(network(images)["spatial"])
    return step.answers(_flatten_spatial(_output_of(network, args["layer"], images), args["channels"], layout))
