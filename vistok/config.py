"""Configs: YAML files with ``key=value`` overrides, checked against the signature of what they configure.

A constructor's keyword arguments are its config. :func:`load_config` reads plain containers, :func:`check` compares
them with a signature before any work starts, and :func:`save_config` writes what a run really used.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import logging
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from vistok.utils.files import atomic_file
from vistok.utils.omega import calls_resolver, check_size, escape, escaped

RENAMED = {
    "stage": "task",
    "heads": "num_heads",
    "layers": "num_layers",
    "depth": "num_layers",
    "encoder_layers": "num_encoder_layers",
    "decoder_layers": "num_decoder_layers",
    "decoder_heads": "num_decoder_heads",
    "head_layers": "num_head_layers",
    "attention_dropout": "attn_drop",
    "residual_dropout": "proj_drop",
    "dropout": "proj_drop",
    "token_dropout": "token_drop",
    "ffn_dropout": "ffn_drop",
}
"""Names of arguments up to version 0.1, and today's: configs and saved models of that version are still read."""

log = logging.getLogger(__name__)
T = TypeVar("T")


class ConfigError(ValueError):
    """Everything that is wrong with a config, one line per problem (``error.args`` holds the lines)."""

    def __str__(self) -> str:
        return "\n".join(self.args)


class ShellCommand:
    """A command whose output is read: what ``pipe:COMMAND`` on the command line stands for, if it is allowed.

    A type of its own, which no file can hold: a text that begins with ``pipe:`` runs nothing.
    """

    PREFIX = "pipe:"

    def __init__(self, command: str) -> None:
        self.command = command

    def __str__(self) -> str:
        return self.PREFIX + self.command

    def __repr__(self) -> str:
        return f"ShellCommand({self.command!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShellCommand) and other.command == self.command

    def __hash__(self) -> int:
        return hash(self.command)


@dataclasses.dataclass(frozen=True)
class Allowed:
    """What the values on a command line may do beyond being values. A file may never do it.

    Attributes:
        commands: ``pipe:COMMAND`` runs a command where data are read.
        environment: ``${oc.env:NAME}`` is the value of an environment variable.
    """

    commands: bool = False
    environment: bool = False


NOTHING = Allowed()


@dataclasses.dataclass(frozen=True)
class KeysOf:
    """Annotates a mapping with its keys, as far as they are known: ``Annotated[dict[str, Any], KeysOf(DataConfig)]``.

    Attributes:
        target: the class whose parameters they are; or a function from the mapping to the annotations of its keys.
    """

    target: type | Callable[[Mapping[str, Any]], Mapping[str, Any]]


def load_config(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    target: Callable[..., Any] | None = None,
    allowed: Allowed = NOTHING,
) -> dict[str, Any]:
    """Read a YAML file, apply ``key.sub=value`` overrides, resolve ``${a.b}`` references.

    Returns plain dicts, lists and scalars. The file may refer to its own keys alone: a resolver such as
    ``${oc.env:HOME}`` is refused.

    Args:
        overrides: values are YAML (``a=[1,2]``, ``b=null``, ``lr=1e-4``), but where ``target`` takes a text, the text
            after ``=`` is the value as it stands, except ``null`` where there may be none.
        target: what the config is checked against later.
        allowed: what overrides may do.

    Raises:
        ConfigError: a missing or malformed file, a malformed override, a reference to nothing, a resolver, or a value
            left as ``???``.
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
    return _apply(config, overrides, source=str(path), target=target, allowed=allowed)


def override(
    values: Mapping[str, Any],
    overrides: Sequence[str],
    *,
    source: str = "config",
    target: Callable[..., Any] | None = None,
    allowed: Allowed = NOTHING,
) -> dict[str, Any]:
    """Apply ``key.sub=value`` overrides to plain values; arguments and errors are those of :func:`load_config`.

    ``source`` names the values in messages.
    """
    from omegaconf import OmegaConf

    return _apply(OmegaConf.create(escaped(values)), overrides, source=source, target=target, allowed=allowed)


def _apply(
    config: Any, overrides: Sequence[str], *, source: str, target: Callable[..., Any] | None, allowed: Allowed
) -> dict[str, Any]:
    """The overridden, resolved config as plain values."""
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    malformed = [_malformed_override(text) for text in overrides if not _is_override(text)]
    if malformed:
        raise ConfigError(*malformed)
    commands: dict[str, ShellCommand] = {}
    texts = _with_texts(OmegaConf.to_container(config, resolve=False), overrides)
    for text in overrides:
        key, _, value = text.partition("=")
        parts = key.split(".")
        commands.pop(key, None)
        if value.startswith(ShellCommand.PREFIX):
            if not allowed.commands:
                raise ConfigError(f"override {text!r}: this runs a command; if you mean it, add --allow-commands")
            commands[key] = ShellCommand(value.removeprefix(ShellCommand.PREFIX))
            value = None
        else:
            value = _override_value(text, _annotation_at(target, parts, texts), allowed)
        for part in reversed(parts):
            value = {part: value}
        try:
            config = OmegaConf.merge(config, value)
        except OmegaConfBaseException as error:
            raise ConfigError(f"override {text!r}: {_one_line(error)}") from error
    _refuse_resolvers(OmegaConf.to_container(config, resolve=False), "", source)
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except RecursionError as error:
        raise ConfigError(f"{source}: a reference leads back to itself") from error
    except MissingMandatoryValue as error:
        raise ConfigError(f"{source}: {error.full_key} is left open (???); give it: {error.full_key}=…") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {error.full_key}: {str(error).splitlines()[0]}") from error
    for key, command in commands.items():
        *sections, last = key.split(".")
        section = values
        for part in sections:
            section = section[part]
        section[last] = command
    return values


def _override_value(text: str, annotation: Any, allowed: Allowed) -> Any:
    """The value of an override, in the terms of OmegaConf: references are still texts."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    value = text.partition("=")[2]
    if "${oc.env:" in value:
        value = _with_environment(text, value, allowed)
    choices = _alternatives(annotation)
    if type(None) in choices and value in ("", "null"):
        return None
    texts = [choice for choice in choices if typing.get_origin(choice) in (tuple, list, Sequence)]
    if any(typing.get_args(choice)[:1] == (str,) for choice in texts):
        try:
            items = yaml.load(value, Loader=yaml.BaseLoader)  # which leaves every scalar as it is written
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
    """``values`` changed in place: the texts of ``overrides`` in their places, as far as sections lead there."""
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
    """The annotation of the key that ``parts`` lead to in the signature of ``target``; None if it does not tell.

    Args:
        values: the config, whose own values may decide which keys a section has.
    """
    known, annotation = {} if target is None else annotations(target), None
    for part in parts:
        if part not in known:
            return None
        annotation, values = known[part], values.get(part)
        values = values if isinstance(values, Mapping) else {}
        known = _key_annotations(annotation, values)
    return annotation


def _key_annotations(annotation: Any, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The annotations of the keys of a section, as far as they are known."""
    notes = getattr(annotation, "__metadata__", ())
    target = next((note.target for note in notes if isinstance(note, KeysOf)), None) or _section_type(annotation)
    if target is None:
        return {}
    return annotations(target) if inspect.isclass(target) else target(values)


def annotations(target: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of the parameters of a class or function, by name."""
    return {name: parameter.annotation for name, parameter in _parameters(target).items()}


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union, or the one annotation."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return [choice for part in typing.get_args(annotation) for choice in _alternatives(part)]
    return [annotation]


def _refuse_resolvers(value: Any, path: str, source: str) -> None:
    """Raise ConfigError if a text calls one of OmegaConf's resolvers, which read the environment or run functions."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_resolvers(item, _join(path, key), source)
    elif isinstance(value, list):
        for position, item in enumerate(value):
            _refuse_resolvers(item, f"{path}[{position}]", source)
    elif isinstance(value, str) and "${" in value and calls_resolver(value):
        raise ConfigError(
            f"{source}: {path}: got {value!r}: a config refers to its own keys alone, as in ${{model.dim}}; the "
            "environment is for the command line: KEY='${oc.env:NAME}' with --allow-environment"
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys of two configs whose values differ, as "optimizer.lr: 0.001 -> 0.0001"; old names are today's."""
    before, after = (_leaves(_plain(values, "")) for values in (old, new))
    return [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Everything in nested mappings by its dotted key."""
    if not isinstance(value, Mapping) or not value:
        return {path: value}
    return {
        key: leaf
        for name, part in value.items()
        for key, leaf in _leaves(part, _join(path, RENAMED.get(name, name))).items()
    }


def save_config(values: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write ``values`` as YAML, so that :func:`load_config` gives them back (tuples as lists, paths as strings).

    The file appears whole or not at all. Raises :class:`ConfigError` for a value that YAML cannot hold.
    """
    from omegaconf import OmegaConf

    text = OmegaConf.to_yaml(OmegaConf.create(escaped(_plain(values, ""))))
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check(target: Callable[..., Any], values: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Compare a config section with the signature of the class, dataclass or function that it configures.

    Lists become tuples where the annotation says so, ints become floats, mappings become nested dataclasses. Nothing
    else is converted: ``"12"`` and ``True`` are not ints.

    Args:
        target: what will be called with the section. Every parameter must be annotated.
        values: the section. Keys that it lacks keep the signature's defaults and are absent from the result.
        path: the section's dotted key, for messages (``"model"``, or ``""`` at the top).

    Returns:
        keyword arguments for ``target``.

    Raises:
        ConfigError: unknown keys, missing keys and wrong types, all of them, with full dotted keys.
        TypeError: ``target`` cannot be checked: an unannotated or variadic parameter.
    """
    parameters = _parameters(target)
    if not isinstance(values, Mapping):
        name = path or "config"
        raise ConfigError(f"{_mismatch(name, values)}: expected a section with the keys {', '.join(parameters)}")
    values = with_todays_names(target, values, path)
    checked, problems = {}, []
    for key, value in values.items():
        if key not in parameters:
            problems.append(_unknown_key(str(key), list(parameters), path))
            continue
        try:
            checked[key] = _check_value(parameters[key].annotation, value, _join(path, key))
        except ConfigError as error:
            problems.extend(error.args)
    problems.extend(
        f"{_join(path, name)}: missing; expected {describe(parameter.annotation)}"
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and name not in values
    )
    if problems:
        raise ConfigError(*problems)
    return checked


def build(target: Callable[..., T], values: Mapping[str, Any], path: str) -> T:
    """What a checked config section configures.

    Raises:
        ConfigError: as :func:`check`; also where the target itself refuses a value.
    """
    arguments = check(target, values, path)
    try:
        return target(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def nearest(name: str, allowed: Sequence[str]) -> str | None:
    """Return the allowed name that ``name`` is most likely a misspelling of, or None."""
    lowered = {candidate.lower(): candidate for candidate in allowed}
    matches = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    return lowered[matches[0]] if matches else None


def describe(annotation: Any) -> str:
    """Write a type annotation the way a config's author thinks of it: ``int | None``, ``"center" | "random"``."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None or annotation is type(None):
        return "null"
    if origin is typing.Annotated:
        return describe(arguments[0])
    if origin is Literal:
        return " | ".join("null" if choice is None else repr(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(describe(choice) for choice in arguments if choice is not ShellCommand)
    if dataclasses.is_dataclass(annotation):
        return f"a section {{{', '.join(_parameters(annotation))}}}"
    if origin is not None and arguments:
        inner = ", ".join("..." if argument is ... else describe(argument) for argument in arguments)
        return f"{getattr(origin, '__name__', origin)}[{inner}]"
    return getattr(annotation, "__name__", str(annotation))


def _parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of ``target`` by name, with resolved annotations.

    A class is read through ``__init__``: mixins that define a variadic ``__new__`` hide the constructor otherwise.
    """
    function = target.__init__ if inspect.isclass(target) else target
    hints = typing.get_type_hints(target if dataclasses.is_dataclass(target) else function, include_extras=True)
    parameters = list(inspect.signature(function).parameters.values())
    result = {}
    for parameter in parameters[1:] if inspect.isclass(target) else parameters:
        variadic = parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        if variadic or parameter.name not in hints:
            reason = "is variadic" if variadic else "has no annotation"
            raise TypeError(f"{target.__qualname__} cannot be checked: parameter {parameter.name!r} {reason}")
        result[parameter.name] = parameter.replace(annotation=hints[parameter.name])
    return result


def with_todays_names(target: Callable[..., Any], values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """``values`` with old names of keys replaced where ``target`` knows the new name only, in nested sections too.

    Each is logged, as a warning where ``path`` names the section of a config that its author can change.
    """
    parameters, result = _parameters(target), {}
    for key, value in values.items():
        name = RENAMED.get(key, key)
        if key not in parameters and name in parameters and name not in values:
            log.log(
                logging.WARNING if path else logging.INFO, "%s is called %s now", _join(path, key), _join(path, name)
            )
            key = name
        section = _section_type(parameters[key].annotation) if key in parameters else None
        if section is not None and isinstance(value, Mapping):
            value = with_todays_names(section, value, _join(path, key) if path else "")
        result[key] = value
    return result


def _check_value(annotation: Any, value: Any, path: str) -> Any:
    section = _section_type(annotation)
    if section is not None and isinstance(value, Mapping):
        arguments = check(section, value, path)
        try:
            return section(**arguments)
        except (ValueError, TypeError) as error:  # the dataclass' own rules, in __post_init__
            raise ConfigError(f"{path}: {error}") from error
    item = _item_section(annotation)
    if item is not None and isinstance(value, (list, tuple)):
        return tuple(_check_value(item, each, f"{path}[{position}]") for position, each in enumerate(value))
    if typing.get_origin(annotation) is dict and isinstance(value, Mapping):
        _, kind = typing.get_args(annotation)
        if _section_type(kind) is not None and all(isinstance(key, str) for key in value):
            return {key: _check_value(kind, each, _join(path, key)) for key, each in value.items()}

    from pydantic import ConfigDict, ValidationError, create_model

    settings = ConfigDict(arbitrary_types_allowed=True)
    model = create_model("Parameter", __config__=settings, value=(_strict(annotation), ...))
    try:
        return model(value=value).value
    except ValidationError as error:
        choices = [choice for choice in _literals(annotation) if isinstance(choice, str)]
        guess = nearest(value, choices) if isinstance(value, str) else None
        hint = f"; did you mean {guess!r}?" if guess else ""
        raise ConfigError(f"{_mismatch(path, value)}: expected {describe(annotation)}{hint}") from error


def _section_type(annotation: Any) -> type | None:
    """The one dataclass that a mapping may stand for in this annotation, if there is one."""
    if typing.get_origin(annotation) in (Union, types.UnionType, typing.Annotated):
        found = [_section_type(argument) for argument in typing.get_args(annotation)]
        found = [section for section in found if section is not None]
        return found[0] if len(found) == 1 else None
    return annotation if inspect.isclass(annotation) and dataclasses.is_dataclass(annotation) else None


def _item_section(annotation: Any) -> Any:
    """The annotation of the items of ``tuple[Section, ...]``, also beside other types; None if none is a section."""
    if typing.get_origin(annotation) in (Union, types.UnionType, typing.Annotated):
        found = [_item_section(argument) for argument in typing.get_args(annotation)]
        return next((section for section in found if section is not None), None)
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple and len(arguments) == 2 and arguments[1] is ...:
        return arguments[0] if _section_type(arguments[0]) is not None else None
    return None


def _strict(annotation: Any) -> Any:
    """Forbid conversions between scalars, wherever they stand in the annotation, but not list -> tuple."""
    from pydantic import InstanceOf, Strict

    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (int, float, bool, str):
        return typing.Annotated[annotation, Strict()]
    if inspect.isclass(annotation) and dataclasses.is_dataclass(annotation):
        return InstanceOf[annotation]
    if origin is Literal:
        return typing.Annotated[annotation, _literal_validator(arguments)]
    if origin is None or origin is typing.Annotated or not arguments:
        return annotation
    if origin in (Union, types.UnionType):
        return Union[tuple(map(_strict, arguments))]  # noqa: UP007 - built from a tuple
    if origin in (tuple, list, set, dict, Sequence, Mapping):
        return origin[tuple(argument if argument is ... else _strict(argument) for argument in arguments)]
    return annotation


def _literal_validator(choices: tuple[Any, ...]) -> Any:
    """A validator that tells ``True`` from ``1`` and ``1.0``, which compare equal."""
    from pydantic import BeforeValidator

    def same_type(value: Any) -> Any:
        if value is False and "no" in choices:  # how YAML reads a bare no
            return "no"
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise ValueError("not one of the choices")
        return value

    return BeforeValidator(same_type)


def _literals(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) is Literal:
        yield from typing.get_args(annotation)
    for argument in typing.get_args(annotation):
        yield from _literals(argument)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else str(key)


def _mismatch(path: str, value: Any) -> str:
    return f"{path}: got {value!r} ({type(value).__name__})"


def _unknown_key(key: str, allowed: Sequence[str], path: str) -> str:
    guess = nearest(key, allowed)
    hint = f" did you mean {_join(path, guess)}?" if guess else ""
    return f"{_join(path, key)}: unknown key;{hint} allowed: {', '.join(allowed) or 'no keys'}"


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
        return {str(key): _plain(item, _join(path, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{path}[{position}]") for position, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, ShellCommand):  # as a text, which runs nothing when it is read again
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(
        f"{_mismatch(path, value)}: only mappings, lists, numbers, strings, booleans and null can be saved"
    )


def check_least(section: Any, **least: float) -> None:
    """Raise ValueError unless each of these keys of a config section has at least this value."""
    for key, bound in least.items():
        if getattr(section, key) < bound:
            raise ValueError(f"{key} must be at least {bound}, got {getattr(section, key)}")
