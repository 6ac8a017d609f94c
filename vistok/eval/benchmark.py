"""``benchmark``: generate images, extract their features, and score them.

It can be interrupted and resumed, and several processes can share it; the scores are the same every time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.data.pictures import to_uint8
from vistok.eval.classes import class_table
from vistok.eval.comparison import Source, score_sides
from vistok.eval.features import FeaturePass
from vistok.eval.networks import FeatureNetwork
from vistok.eval.plan import BenchmarkError, BenchmarkPlan, Labels, recorded_options
from vistok.eval.protocols import ImageProtocol, choose_protocol, load_network
from vistok.eval.record import RESULT_FILE, save_result
from vistok.eval.references import Reference, open_reference
from vistok.eval.report import write_report
from vistok.eval.scoring import Side, choose_metrics, extract_side
from vistok.eval.search import LOWEST_SCALE, local_minimum
from vistok.eval.store import FeatureStore
from vistok.eval.sweep import Setting, choose_settings
from vistok.generators.base import Generator
from vistok.tokenizers.base import Tokenizer
from vistok.utils.devices import choose_device, dtype_of
from vistok.utils.files import read_json
from vistok.utils.numbers import check_whole
from vistok.utils.outputs import continued
from vistok.utils.processes import ALONE, Processes
from vistok.utils.progress import Bar

NO_REFERENCE = Reference("no reference")


class ImagePipeline(Protocol):
    """The pipeline of images that is benchmarked; ``vistok.pipeline(path)`` returns one."""

    tokenizer: Tokenizer
    generator: Generator

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def options(self, **sampling: Any) -> Any:
        """The dataclass of sampling options of a call with these keyword arguments."""
        ...

    def __call__(self, *, class_labels: Any = None, num_images: int | None = None, **sampling: Any) -> Any:
        """Generate images; the result has ``pixels`` (B, C, H, W) in [-1, 1]."""
        ...


def benchmark(
    pipe: ImagePipeline,
    out: str | Path,
    *,
    num_images: int = 50_000,
    labels: Labels | None = None,
    seed: int = 0,
    guidance_scales: Sequence[float] | None = None,
    temperatures: Sequence[float] | None = None,
    search_from: float | None = None,
    sampling: Mapping[str, Any] | None = None,
    reference: Source | None = None,
    protocol: str = "adm",
    weights: str | Path | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    network: str | None = None,
    eval_size: int | None = None,
    save_npz: bool = False,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    processes: Processes = ALONE,
    command: str | None = None,
) -> dict[str, Any]:
    """Generate ``num_images`` images, keep their features, and score them.

    Image i depends on the seed and on i alone. Features are written shard by shard. If called again with the same
    arguments, the benchmark resumes where it stopped. Batch size, processes, reference, settings, and a protocol with
    the same network may differ between calls; features that exist are reused.

    Args:
        out: folder for features, ``result.json`` and ``report.html``; a new folder, or that of the same benchmark.
        num_images: images per setting, at least 2.
        labels: "balanced" (class i modulo the number of classes: 50 each of 50,000 ImageNet images), "random"
            (uniform), or "none"; by default balanced if the generator has classes.
        guidance_scales, temperatures: every pair of them is one setting; by default the pipeline's own.
        search_from: guidance scale from which to search for the lowest Frechet distance, in steps of 0.25, until
            neither neighbour is better. Scales below 1, which is no guidance, are not tried. ``runs`` holds all
            scales that were tried, and ``found`` the best. Excludes ``guidance_scales`` and ``temperatures``.
        sampling: sampling options that differ from the pipeline's.
        reference, protocol, weights, features, network, device, processes: as for ``evaluate``. Without a reference
            only the Inception Score can be computed.
        eval_size: side to which images are resized before they become 8 bit: bicubic without antialias, as LlamaGen
            resizes its 384 px images to 256. By default images are scored at their own size.
        save_npz: also write the images of each setting as ``samples.npz``, which ADM's own evaluator reads.
        batch_size: images generated at a time.
        command: the equivalent command line, for the report.

    Returns:
        The contents of ``result.json``: ``benchmark`` (the plan), ``protocol``, ``runs`` (one per setting: ``scores``,
        ``warnings``, ``classes``, … as ``evaluate`` returns them), ``generated`` (images of this call), ``seconds``,
        ``processes``, ``command``.

    Raises:
        ResumeError: ``out`` belongs to another benchmark.
        BenchmarkError: ``out`` is damaged.
        FolderInUseError: another process writes ``out``.
        ValueError: a search is given scales or temperatures, has no reference, or starts below 1.
        ValueError, ConfigError, CheckpointError, ImageError, InvalidReferenceError: as the pipeline and ``evaluate``.
    """
    if search_from is not None:
        _check_search(search_from, guidance_scales, temperatures, reference)
        guidance_scales = [search_from]
    rules = choose_protocol(protocol, features, network)
    if protocol == "reconstruction":
        raise ValueError("the protocol 'reconstruction' compares images with their originals; generated ones have none")
    check_whole("batch_size", batch_size, least=1)
    real = NO_REFERENCE if reference is None else open_reference(reference, reading=rules.reading)
    device = choose_device(processes.device() if device is None else device)
    net = load_network(rules, weights=weights, features=features, network=network, device=device)
    plan = _plan(pipe, num_images, labels, seed, sampling or {}, rules.describe(net), eval_size)
    example = net(torch.zeros(1, 3, *plan.scored_size, dtype=torch.uint8))
    metrics, skipped = _choose_metrics(rules, plan, real)
    if search_from is not None and "fid" not in metrics:
        raise ValueError(f"a search needs a Frechet distance, and there is none: {'; '.join(skipped)}")
    real.check_network(net, example)
    settings = choose_settings(pipe, guidance_scales, temperatures, sampling or {}, plan.sampling)

    out = Path(out)
    with continued(out, plan.to_json(), processes=processes):
        started = time.perf_counter()
        sampler = _Sampler(pipe, plan, dict(sampling or {}))
        scoring = _Scoring(rules, net, tuple(example), metrics, real, batch_size, device, processes)
        stores = [(setting, _store(out, setting, plan, keep_images=save_npz)) for setting in settings]
        stores = _earlier(out, plan, stores) + stores
        found = None
        runs = [scoring.run(sampler, setting, store) for setting, store in stores]
        if search_from is not None:

            def try_setting(setting: Setting) -> _Run:
                return scoring.run(sampler, setting, _store(out, setting, plan, keep_images=save_npz))

            found = _search(search_from, runs, try_setting)
        seconds = time.perf_counter() - started
        generated = sum(processes.gather(sum(run.generated for run in runs)))
        if processes.is_first:
            noted = [run.result | {"warnings": skipped + plan.warnings + run.result["warnings"]} for run in runs]
            result = {
                "benchmark": plan.to_json(),
                "protocol": rules.name,
                "runs": noted,
                "generated": generated,
                "seconds": round(seconds, 2),
                "processes": processes.count,
                "command": command,
            }
            result |= {} if found is None else {"found": found}
            save_result(result, out)
            write_report(result, [run.store.previews() for run in runs], out)
        processes.wait()
        return read_json(out / RESULT_FILE)


def _check_search(
    start: float, scales: Sequence[float] | None, temperatures: Sequence[float] | None, reference: Source | None
) -> None:
    if scales is not None or temperatures is not None:
        raise ValueError("a search tries scales by itself: leave out what a sweep compares, or the search")
    if reference is None:
        raise ValueError("a search needs a reference, from which distances are measured")
    if not LOWEST_SCALE <= start < math.inf:
        raise ValueError(f"a search begins at a scale of at least {LOWEST_SCALE:g}, which is no guidance; got {start}")


@dataclass(frozen=True)
class _Run:
    """The generated images of one setting, and their scores.

    Attributes:
        generated: number of images that this process generated in this call.
        distance: the Frechet distance, known to all processes; None without a reference.
        result: as ``evaluate`` returns it, on the first process; empty on the others.
    """

    setting: Setting
    store: FeatureStore
    generated: int
    distance: float | None
    result: dict[str, Any]


@dataclass
class _Scoring:
    """Generates the missing images of a setting on all processes, and scores the setting on the first process."""

    rules: ImageProtocol
    network: FeatureNetwork
    features: tuple[str, ...]
    metrics: Sequence[str]
    reference: Reference
    batch_size: int
    device: torch.device
    processes: Processes

    @cached_property
    def _real(self) -> Side:
        return _extract_reference(self.reference, self.network, self.metrics, self.batch_size)

    def run(self, sampler: _Sampler, setting: Setting, store: FeatureStore) -> _Run:
        made = _generate(sampler, setting, store, self.network, self.features, self.batch_size, self.processes)
        self.processes.wait()
        result: dict[str, Any] = {}
        if self.processes.is_first:
            scored = _score(self.rules, self.network, self.metrics, store, sampler, self._real, self.device)
            result = setting.describe(sampler.plan.sampling) | scored
        name = self.rules.score_names.get("fid", "fid")
        distance = self.processes.gather(result.get("scores", {}).get(name))[0]
        return _Run(setting, store, made, distance, result)


def _search(start: float, runs: list[_Run], try_setting: Callable[[Setting], _Run]) -> float:
    """The guidance scale with the lowest distance; the run of every scale that was tried is added to ``runs``."""

    def distance(scale: float) -> float:
        setting = Setting(scale)
        known = next((one for one in runs if one.setting == setting), None)
        if known is None:
            known = try_setting(setting)
            runs.append(known)
        return cast(float, known.distance)  # a search has a distance

    return local_minimum(distance, start)


def _store(out: Path, setting: Setting, plan: BenchmarkPlan, *, keep_images: bool) -> FeatureStore:
    return FeatureStore(out / setting.folder, plan.shards, plan.scored_size, keep_images=keep_images)


def _earlier(
    out: Path, plan: BenchmarkPlan, stores: list[tuple[Setting, FeatureStore]]
) -> list[tuple[Setting, FeatureStore]]:
    """The settings that earlier calls finished in this folder and that are not among ``stores``. They are scored again.

    Raises:
        BenchmarkError: the earlier ``result.json`` is damaged.
    """
    path = out / RESULT_FILE
    if not path.exists():
        return []
    try:
        settings = dict.fromkeys(Setting.read(run, plan.sampling) for run in read_json(path)["runs"])
        names = {setting: setting.folder for setting in settings}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"{path} is damaged ({error!r}); remove it and run the benchmark again") from error
    asked = {store.folder.name for _, store in stores}
    found = []
    for setting, name in names.items():
        store = _store(out, setting, plan, keep_images=False)
        if name not in asked and not store.missing():
            found.append((setting, store))
    return found


@dataclass(frozen=True)
class _Sampler:
    """Generates images of a plan by their index."""

    pipe: ImagePipeline
    plan: BenchmarkPlan
    sampling: dict[str, Any]

    def images(self, start: int, stop: int, setting: Setting, bar: Bar, done: int) -> Tensor:
        """Images ``start`` to ``stop`` of one setting, uint8 (B, 3, H, W). ``bar`` shows the sampling steps, after the
        ``done`` images before."""
        labels = self.plan.labels_of(start, stop)
        what = {"num_images": stop - start} if labels is None else {"class_labels": labels}
        options = setting.options(self.sampling) | bar.of_batch(done, stop - start, self.pipe.generator.spec.length)
        output = self.pipe(**what, seed=self.plan.seed, index_start=start, batch_size=stop - start, **options)
        pixels = output.pixels
        if self.plan.eval_size is not None:
            pixels = F.interpolate(pixels, self.plan.scored_size, mode="bicubic")
        return to_uint8(pixels).expand(-1, 3, -1, -1)  # grey becomes RGB


def _plan(
    pipe: ImagePipeline,
    num_images: int,
    labels: Labels | None,
    seed: int,
    sampling: Mapping[str, Any],
    network: Mapping[str, Any],
    eval_size: int | None,
) -> BenchmarkPlan:
    spec = pipe.generator.condition_spec
    num_classes = spec.num_classes
    if labels is None and spec.parts and not num_classes:
        raise ValueError(
            f"this generator takes {spec.describe()}, and a benchmark generates by class labels or by nothing: say "
            'labels="none" to score unconditional images'
        )
    _, height, width = pipe.tokenizer.image_shape("the benchmark of a pipeline")
    return BenchmarkPlan(
        num_images=num_images,
        labels=labels or ("balanced" if num_classes else "none"),
        num_classes=num_classes,
        seed=seed,
        sampling=recorded_options(pipe, sampling),
        tokenizer=pipe.tokenizer.fingerprint(),
        generator=pipe.generator.fingerprint(),
        network=network,
        dtype=dtype_of(pipe.generator),
        image_size=(height, width),
        eval_size=eval_size,
    )


def _choose_metrics(rules: ImageProtocol, plan: BenchmarkPlan, real: Reference) -> tuple[list[str], list[str]]:
    # All features of the samples are kept, so that only the number of images can rule a metric out.
    planned: Any = _PlannedImages(plan.num_images, plan.scored_size)
    samples = Reference("the benchmark", planned)
    return choose_metrics(None, rules, samples, real)


@dataclass(frozen=True)
class _PlannedImages:
    """Count and size of images that are not generated yet: an ``ImageSet`` without images."""

    count: int
    size: tuple[int, int]
    source: ClassVar[str] = "the benchmark"
    names: ClassVar[None] = None
    lossy: ClassVar[int] = 0
    files_read: ClassVar[None] = None


def _generate(
    sampler: _Sampler,
    setting: Setting,
    store: FeatureStore,
    network: FeatureNetwork,
    names: Sequence[str],
    batch_size: int,
    processes: Processes,
) -> int:
    """Generate this process's share of the missing shards; returns the number of images."""
    todo = store.todo(processes)
    count, done = sum(stop - start for start, stop in todo), 0
    with Bar(f"{sampler.plan.num_images:,} samples, {store.folder.name}", count) as bar:
        for shard in todo:
            features = FeaturePass(network, "the generated images", keep=names)
            images = []
            for start in range(*shard, batch_size):
                images.append(sampler.images(start, min(start + batch_size, shard[1]), setting, bar, done))
                features.add(images[-1])
                done += len(images[-1])
                bar.show(done)
            store.write(shard, torch.cat(images), features.result())
    return count


def _extract_reference(real: Reference, network: FeatureNetwork, metrics: Sequence[str], batch_size: int) -> Side:
    if real is NO_REFERENCE:
        return Side(real)
    return extract_side(real, network, metrics, is_sample=False, batch_size=batch_size, processes=ALONE)


def _score(
    rules: ImageProtocol,
    network: FeatureNetwork,
    metrics: Sequence[str],
    store: FeatureStore,
    sampler: _Sampler,
    real: Side,
    device: torch.device,
) -> dict[str, Any]:
    """The result of ``evaluate`` for the images of one setting, with a table of classes."""
    samples = store.read(keep=_kept(metrics), moments=_summed(metrics))
    side = Side(Reference(f"generated images ({store.folder.name})"), samples)
    result, scores = score_sides(rules, network, metrics, side, real, device=device)
    labels = sampler.plan.labels_of(0, sampler.plan.num_images)
    if labels is not None:
        result["classes"] = class_table(samples, labels, scores.inside, sampler.pipe.class_names)
    if store.keep_images:
        result["samples"] = str(store.write_npz())
    return result


def _kept(metrics: Sequence[str]) -> list[str]:
    """The features to keep: the class table needs the pooled features, the Inception Score the logits."""
    return ["pool", *(["logits"] if "is" in metrics else [])]


def _summed(metrics: Sequence[str]) -> list[str]:
    return [feature for metric, feature in (("fid", "pool"), ("sfid", "spatial")) if metric in metrics]
