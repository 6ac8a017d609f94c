"""Runner of the ADM centre crop."""

from __future__ import annotations

import numpy as np
from PIL import Image

from vistok.data.transforms import center_crop_adm

from ..harness import Case, Step, runner


@runner("eval/crop", "crop")
def crop(case: Case, step: Step) -> dict[str, np.ndarray]:
    images = {name: Image.fromarray(case.tensor(settings["of"]).numpy()) for name, settings in step.args.items()}
    return {name: np.asarray(center_crop_adm(image, step.args[name]["size"])) for name, image in images.items()}
