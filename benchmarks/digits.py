"""The recipes of configs/digits from start to end: tokenizers and generators of handwritten digits, in minutes each.

    python benchmarks/digits.py --out runs/digits
    python benchmarks/digits.py --out runs/digits --only llamagen_vq llama
    python benchmarks/digits.py --out runs/digits --only seed_contrast seed ta_titok --minilm minilm/

Tokenizers come first. A generator reads the tokens of the tokenizer that the first lines of its config name. A run
that is in the folder already is not trained again; ``OUT/digits-NAME/report.html`` shows its curve and its samples.

Reported, as seen: the core-seconds of training; of a tokenizer the scores of ``vistok eval`` on the 364 held-out
digits; of a generator the share of samples that are recognised as the class asked for, and their Frechet distance to
the training digits on the features of the classifier that recognises them. It is fitted to real digits in the run, so
that the distance is not FID.
"""

from __future__ import annotations

import argparse
import re
import shutil
import time
from pathlib import Path
from typing import Any

from common import RECIPES, digit_scorer, finish, say, use_threads

FOLDER = RECIPES / "digits"


def main() -> None:
    arguments = parse_arguments()
    use_threads(arguments.threads)
    figures: dict[str, Any] = {name: getattr(arguments, name) for name in ("num", "threads")}
    for name in sorted(arguments.only, key=lambda name: (is_generator(name), name != "seed_contrast", name)):
        if "minilm/" in text(name) and arguments.minilm is None:
            say(f"{name:16} is left out: name a text encoder with --minilm")
            continue
        run, seconds = trained(name, arguments)
        found = {"core_seconds": seconds} | (
            samples(run, arguments.num) if is_generator(name) else reconstructions(run)
        )
        figures |= {f"{name}_{key}": value for key, value in found.items()}
        say(f"{name:16} " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()))
    finish("digits", {}, figures)


def parse_arguments() -> argparse.Namespace:
    names = sorted(file.stem for file in FOLDER.glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs and tokens")
    parser.add_argument("--only", nargs="*", default=names, choices=names, help="configs")
    parser.add_argument("--num", type=int, default=500, help="samples that are scored")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minilm", help="folder of an unpacked MiniLM, for the recipes that read names")
    return parser.parse_args()


def text(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def is_generator(name: str) -> bool:
    return "\ntask: generator\n" in text(name)


def trained(name: str, arguments: argparse.Namespace) -> tuple[Path, float]:
    """The run of a config, and the core-seconds that its training took."""
    from vistok.config import load_config
    from vistok.train import train

    run = arguments.out / f"digits-{name.replace('_', '-')}"
    if not (run / "core_seconds.txt").exists():
        changes = [f"output_dir={run}", "curve=null"]
        if is_generator(name):
            changes.append(f"tokens={tokens(name, arguments.out)}")
        if name == "seed_contrast":
            changes.append(f"losses.text_contrast.encoder={arguments.minilm}")
        if name == "ta_titok":
            changes.append(f"text.encoder={arguments.minilm}")
        if name == "seed":
            changes.append(f"init_from.path={arguments.out / 'digits-seed-contrast'}")
        shutil.rmtree(run, ignore_errors=True)  # what was interrupted begins anew
        begin = time.process_time()
        train(load_config(FOLDER / f"{name}.yaml", changes))
        (run / "core_seconds.txt").write_text(str(time.process_time() - begin))
    return run, float((run / "core_seconds.txt").read_text())


def tokens(name: str, out: Path) -> Path:
    """The cache that the command in a generator's config makes, of the run in ``out``."""
    from vistok.pipelines.folders import load_tokenizer
    from vistok.pipelines.runs import data_of_run
    from vistok.train.tokenize import tokenize

    command = re.search(r"vistok tokenize runs/(\S+) --augmentation (\S+)( --latents)? --out tokens/(\S+)", text(name))
    assert command is not None, f"{name} does not say what makes its tokens"
    run, cache = out / command[1], out / f"tokens-{command[4]}"
    if not cache.exists():
        tokenizer = load_tokenizer(run).eval()
        data = data_of_run(run, (), input_shape=tokenizer.input_shape)
        tokenize(tokenizer, data, cache, augmentation=command[2], latents=command[3] is not None)
    return cache


def reconstructions(run: Path) -> dict[str, float]:
    """Scores of a tokenizer on the held-out digits."""
    from vistok.eval.tokenizers import evaluate_tokenizer
    from vistok.pipelines.folders import load_tokenizer
    from vistok.pipelines.runs import data_of_run
    from vistok.pipelines.texts import conditions_of, text_of_run

    tokenizer = load_tokenizer(run).eval()
    if tokenizer.embeds and "image" not in tokenizer.loss_terms:
        return {}  # the first stage of SEED decodes to nothing yet
    data = data_of_run(run, ["data.split=test"], input_shape=tokenizer.input_shape)
    conditions = conditions_of(text_of_run(run, tokenizer), tokenizer, data)
    scores = evaluate_tokenizer(tokenizer, data, conditions=conditions)["scores"]
    return {key: value for key, value in scores.items() if isinstance(value, float)}


def samples(run: Path, count: int) -> dict[str, float]:
    """Scores of a generator's samples, drawn as its config says."""
    from vistok.pipelines import pipeline

    return digit_scorer()(pipeline(run)(list(range(10)), count // 10, batch_size=250))


if __name__ == "__main__":
    main()
