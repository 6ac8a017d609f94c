"""Configs: YAML files with ``key=value`` overrides, checked against the signature of what they configure.

:func:`load_config` reads plain containers, ``vistok.signatures`` compares them with a signature before any work starts,
and :func:`save_config` writes the values that a run used.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vistok.signatures import (
    RENAMED,
    ConfigError,
    KeysOf,
    ShellCommand,
    alternatives,
    annotations_of,
    dotted,
    mismatch,
    section_type,
)
from vistok.utils.files import atomic_file
from vistok.utils.omega import calls_resolver, check_size, escape, escaped

__all__ = ["NOTHING", "Allowed", "differences", "load_config", "override", "save_config"]


@dataclasses.dataclass(frozen=True)
class Allowed:
    """What overrides on a command line may do besides setting values. Config files may never do it.

    Attributes:
        commands: whether ``pipe:COMMAND`` may run a command to read data.
        environment: whether ``${oc.env:NAME}`` may read an environment variable.
    """

    commands: bool = False
    environment: bool = False


NOTHING = Allowed()


def load_config(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    target: Callable[..., Any] | None = None,
    allowed: Allowed = NOTHING,
) -> dict[str, Any]:
    """Read a YAML file, apply ``key.sub=value`` overrides, resolve ``${a.b}`` references.

    Returns plain dicts, lists and scalars. The file may only refer to its own keys; a resolver such as
    ``${oc.env:HOME}`` is refused.

    Args:
        overrides: values are YAML (``a=[1,2]``, ``b=null``, ``lr=1e-4``). If ``target`` takes a string at the key, the
            text after ``=`` is the value, except that ``null`` is None if ``target`` takes None.
        target: the class or function that the config is checked against later.
        allowed: what overrides may do.

    Raises:
        ConfigError: the file is missing or malformed, an override is malformed, a reference leads nowhere, a resolver
            is called, or a value is left as ``???``.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = Path(path)
    if not path.is_file():
        raise ConfigError(_missing_file(path))
    try:
        check_size(yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader))
        config = OmegaConf.load(path)
    except RecursionError as error:
        raise ConfigError(f"{path}: not a readable YAML mapping: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError, TypeError, OSError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not a readable YAML mapping: {_one_line(error)}") from error
    if not OmegaConf.is_dict(config):
        raise ConfigError(f"{path}: expected `key: value` lines at the top, found a list")
    return override(config, overrides, source=str(path), target=target, allowed=allowed)


def override(
    values: Mapping[str, Any],
    overrides: Sequence[str],
    *,
    source: str = "config",
    target: Callable[..., Any] | None = None,
    allowed: Allowed = NOTHING,
) -> dict[str, Any]:
    """Apply ``key.sub=value`` overrides to plain values; arguments and errors are those of :func:`load_config`.

    Args:
        values: plain values, in which ``${`` is text; or a config of OmegaConf, in which it is a reference.
        source: name of ``values`` in messages.
    """
    from omegaconf import MISSING, OmegaConf
    from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

    malformed = [_malformed_override(text) for text in overrides if not _is_override(text)]
    if malformed:
        raise ConfigError(*malformed)
    config = OmegaConf.create(values if OmegaConf.is_config(values) else escaped(values), flags={"allow_objects": True})
    texts = _with_texts(OmegaConf.to_container(config, resolve=False), overrides)
    for text in overrides:
        parts = text.partition("=")[0].split(".")
        value = _override_value(text, _annotation_at(target, parts, texts), allowed)
        if value == MISSING:  # which OmegaConf would leave as it was
            raise ConfigError(f"override {text!r}: ??? stands for a value that is left open; give one")
        for part in reversed(parts):
            value = {part: value}
        try:
            config = OmegaConf.merge(config, value)
        except TypeError as error:
            raise ConfigError(f"override {text!r}: a list changes as a whole, as in key=[1,2]") from error
        except OmegaConfBaseException as error:
            raise ConfigError(f"override {text!r}: {_one_line(error)}") from error
    _refuse_resolvers(OmegaConf.to_container(config, resolve=False), "", source)
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except RecursionError as error:
        raise ConfigError(f"{source}: a reference leads back to itself") from error
    except MissingMandatoryValue as error:
        raise ConfigError(f"{source}: {error.full_key} is left open (???); give it: {error.full_key}=…") from error
    except InterpolationKeyError as error:
        raise ConfigError(
            f"{source}: {error.full_key}: {str(error).splitlines()[0]}; if ${{ is part of a text, write \\${{"
        ) from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {error.full_key}: {str(error).splitlines()[0]}") from error


def _override_value(text: str, annotation: Any, allowed: Allowed) -> Any:
    """The value of an override for OmegaConf; references are not resolved yet."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    value = text.partition("=")[2]
    if value.startswith(ShellCommand.PREFIX):
        if not allowed.commands:
            raise ConfigError(f"override {text!r}: this runs a command; if you mean it, add --allow-commands")
        return ShellCommand(value.removeprefix(ShellCommand.PREFIX))
    if "${oc.env:" in value:
        value = _with_environment(text, value, allowed)
    choices = alternatives(annotation)
    if type(None) in choices and value in ("", "null"):
        return None
    texts = [choice for choice in choices if typing.get_origin(choice) in (tuple, list, Sequence)]
    if any(typing.get_args(choice)[:1] == (str,) for choice in texts):
        try:
            items = yaml.load(value, Loader=yaml.BaseLoader)  # it leaves every scalar a string
        except yaml.YAMLError:
            items = None
        if isinstance(items, list) and all(isinstance(item, str) for item in items):
            return items
    if str in choices:
        return value
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)["value"]
    except (yaml.YAMLError, ValueError, RecursionError, OmegaConfBaseException) as error:
        raise ConfigError(f"override {text!r}: the value is not valid YAML: {_one_line(error)}") from error


_ENVIRONMENT = re.compile(r"\$\{oc\.env:([A-Za-z_]\w*)(?:,([^{}]*))?\}")


def _with_environment(text: str, value: str, allowed: Allowed) -> str:
    """``value`` of the override ``text`` with ``${oc.env:NAME}`` and ``${oc.env:NAME,default}`` filled in."""
    if not allowed.environment:
        raise ConfigError(f"override {text!r}: this reads the environment; if you mean it, add --allow-environment")

    def of_variable(match: re.Match[str]) -> str:
        found = os.environ.get(match[1], match[2])
        if found is None:
            raise ConfigError(f"override {text!r}: there is no environment variable {match[1]}")
        return escape(found)

    return _ENVIRONMENT.sub(of_variable, value)


def _with_texts(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set the unparsed values of ``overrides`` in ``values``, in place; returns ``values``."""
    for text in overrides:
        key, _, value = text.partition("=")
        *sections, last = key.split(".")
        section = values
        for part in sections:
            if not isinstance(section.get(part), dict):
                section[part] = {}
            section = section[part]
        section[last] = value
    return values


def _annotation_at(target: Callable[..., Any] | None, parts: Sequence[str], values: Mapping[str, Any]) -> Any:
    """The annotation of the dotted key ``parts`` in the signature of ``target``; None if it is unknown.

    Args:
        values: the config; its values may decide which keys a section has.
    """
    known: Mapping[str, Any] = {} if target is None else annotations_of(target)
    annotation: Any = None
    for part in parts:
        if part not in known:
            return None
        annotation, inner = known[part], values.get(part)
        values = inner if isinstance(inner, Mapping) else {}
        known = _key_annotations(annotation, values)
    return annotation


def _key_annotations(annotation: Any, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The annotations of the keys of a section; empty if they are unknown."""
    notes = getattr(annotation, "__metadata__", ())
    target = next((note.target for note in notes if isinstance(note, KeysOf)), None) or section_type(annotation)
    if target is None:
        return {}
    return annotations_of(target) if inspect.isclass(target) else target(values)


def _refuse_resolvers(value: Any, path: str, source: str) -> None:
    """Raise ConfigError if a text calls a resolver of OmegaConf, which reads the environment or runs a function."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_resolvers(item, dotted(path, key), source)
    elif isinstance(value, list):
        for position, item in enumerate(value):
            _refuse_resolvers(item, f"{path}[{position}]", source)
    elif isinstance(value, str) and "${" in value and calls_resolver(value):
        raise ConfigError(
            f"{source}: {path}: got {value!r}: a config refers to its own keys alone, as in ${{model.dim}}; the "
            "environment is for the command line: KEY='${oc.env:NAME}' with --allow-environment"
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The differences of two configs, such as "optimizer.lr: 0.001 -> 0.0001"; renamed keys count as equal."""
    before, after = (_leaves(_plain(values, "")) for values in (old, new))
    return [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """The values in nested mappings by dotted key, with old names of keys replaced."""
    if not isinstance(value, Mapping) or not value:
        return {path: value}
    return {
        key: leaf
        for name, part in value.items()
        for key, leaf in _leaves(part, dotted(path, RENAMED.get(str(name), str(name)))).items()
    }


def save_config(values: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write ``values`` as YAML, atomically, for :func:`load_config` (tuples become lists, paths become strings).

    Raises:
        ConfigError: YAML cannot hold a value.
    """
    from omegaconf import OmegaConf

    text = OmegaConf.to_yaml(OmegaConf.create(escaped(_plain(values, ""))))
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _is_override(text: str) -> bool:
    key, separator, _ = text.partition("=")
    return bool(separator) and all(part.isidentifier() or part.isdigit() for part in key.split("."))


def _malformed_override(text: str) -> str:
    return f"override {text!r}: expected key=value, for example optimizer.lr=2e-4 (no dashes, no spaces around '=')"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _missing_file(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder; name one of its config files: {_listing(path) or 'it holds no *.yaml'}"
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    near = _listing(folder)
    return f"config {path} does not exist; " + (f"near it: {near}" if near else f"{folder} holds no *.yaml")


def _listing(folder: Path, most: int = 20) -> str:
    names = sorted(str(file.relative_to(folder)) for file in folder.glob("*.y*ml"))
    names += sorted(str(file.relative_to(folder)) for file in folder.glob("*/*.y*ml"))
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _plain(value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item, dotted(path, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{path}[{position}]") for position, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, ShellCommand):  # saved as a string, which runs nothing when it is read
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(
        f"{mismatch(path, value)}: only mappings, lists, numbers, strings, booleans and null can be saved"
    )
