"""Checks of the keywords of a pipeline's calls; errors list what the call takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from vistok.signatures import ConfigError, with_todays_names
from vistok.utils.spelling import did_you_mean, nearest

SYNONYMS = {
    "labels": "class_labels",
    "label": "class_labels",
    "classes": "class_labels",
    "class_ids": "class_labels",
    "prompts": "prompt",
    "text": "prompt",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "guidance": "guidance_scale",
    "num_samples": "num_images",
    "n": "num_images",
    "num_inference_steps": "num_steps",
    "callback": "callback_on_step_end",
}
"""Keywords of other codebases, and ours."""


def check_keywords(call: Callable[..., Any], options_type: type, given: Mapping[str, Any]) -> None:
    """Raise ConfigError for keywords of ``call`` that are neither its own nor sampling options of a generator.

    Args:
        call: a method of a pipeline that takes sampling options as ``**sampling``.
        given: the keywords that arrived in ``**sampling``.
    """
    options = [field.name for field in fields(options_type)]
    wrong = [name for name in with_todays_names(options_type, given) if name not in options]
    if not wrong:
        return
    kinds = inspect.signature(call).parameters.values()
    own = [p.name for p in kinds if p.kind is not inspect.Parameter.VAR_KEYWORD and p.name != "self"]
    name, known = wrong[0], [*own, *options]
    guess = SYNONYMS.get(name) if SYNONYMS.get(name) in known else nearest(name, known)
    hint = did_you_mean(guess) if guess else did_you_mean()
    raise ConfigError(
        f"there is no keyword {name!r} here{hint} The call takes {', '.join(own)}; and as sampling options of this "
        f"generator {', '.join(options)}"
    )
