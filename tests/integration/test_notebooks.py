"""The notebooks run from top to bottom, here on quickstarts of untrained models or with a few training steps."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vistok.config import load_config
from vistok.pipelines import Pipeline
from vistok.quickstart.systems import config_file, find_system
from vistok.text import PromptEncoder, open_text_tokenizer
from vistok.train.config import RunConfig
from vistok.types import ConditionSpec, FeatureSpec, IdSpec, to_json

pytestmark = pytest.mark.slow

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
FOLDER = re.compile(r'folder = Path\("(.*?)"\)')


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    if FOLDER.search(first.source):
        system = re.search(r'system="(\w+)"', first.source)[1]
        write_quickstart(tmp_path / "quickstart", system)
        first.source = FOLDER.sub(f'folder = Path(r"{tmp_path / "quickstart"}")', first.source)
    else:
        assert re.search(r"_steps = \d+", first.source), "the first cell says how long the training takes"
        first.source = re.sub(r"_steps = \d+", "_steps = 4", first.source)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    pictures = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in pictures) >= 3


def test_the_first_notebook_is_saved_with_its_pictures():
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs) >= 4


def write_quickstart(folder: Path, system: str) -> None:
    """Write the files of a finished quickstart, with untrained models."""
    torch.manual_seed(0)
    text = find_system(system).text_length
    runs = {stage: RunConfig.parse(load_config(config_file(system, stage))) for stage in ("tokenizer", "generator")}
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "config.yaml").write_text(config_file(system, "tokenizer").read_text())
    tokenizer_run, generator_run = runs["tokenizer"], runs["generator"]
    tokenizer = tokenizer_run.build_model(tokenizer_run.model_entry().load().arguments_from(tokenizer_run.data))
    texts = [open_text_tokenizer("bytes", text)] if text else []
    encoder = PromptEncoder(texts)
    spec = ConditionSpec(ids=texts[0].spec) if texts else ConditionSpec(num_classes=10)
    model = generator_run.model_entry().load()
    if find_system(system).captions:  # it reads pictures, too
        spec = replace(spec, given=FeatureSpec(tokenizer.spec.dim, tokenizer.spec.length))
    arguments = model.condition_arguments(spec) | model.tokenizer_arguments(tokenizer)
    generator = generator_run.build_model({"spec": to_json(tokenizer.spec), **arguments})
    names = () if text else [str(digit) for digit in range(10)]
    pipe = Pipeline(tokenizer, generator, class_names=names, sampling=generator_run.sampling, text=encoder)
    pipe.save_pretrained(folder / "generator")
    if find_system(system).given_frames:
        run = RunConfig.parse(load_config(config_file(system, "predictor")))
        given = ConditionSpec(given=IdSpec(tokenizer.spec.num_ids, tokenizer.spec.length))
        arguments = run.model_entry().load().condition_arguments(given)
        Pipeline(tokenizer, run.build_model({"spec": to_json(tokenizer.spec), **arguments})).save_pretrained(
            folder / "predictor"
        )
    (folder / "result.json").write_text(json.dumps({}))
