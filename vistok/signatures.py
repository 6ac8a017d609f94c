"""Values checked against the signature of what they configure.

A constructor's keyword arguments are its config: their annotations say what a value may be, and messages name the key,
the value and what was allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import logging
import math
import os
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union

from vistok.utils.files import is_utf8

if TYPE_CHECKING:
    from pydantic import TypeAdapter

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
class KeysOf:
    """Annotates a mapping with its keys, as far as they are known: ``Annotated[dict[str, Any], KeysOf(DataConfig)]``.

    Attributes:
        target: the class whose parameters they are; or a function from the mapping to the annotations of its keys.
    """

    target: type | Callable[[Mapping[str, Any]], Mapping[str, Any]]


def annotations_of(target: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of the parameters of a class or function, by name."""
    return {name: parameter.annotation for name, parameter in _parameters(target).items()}


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
        raise ConfigError(f"{mismatch(name, values)}: expected a section with the keys {', '.join(parameters)}")
    values = with_todays_names(target, values, path)
    checked, problems = {}, []
    for key, value in values.items():
        if key not in parameters:
            problems.append(_unknown_key(str(key), list(parameters), path))
            continue
        try:
            checked[key] = _check_value(parameters[key].annotation, value, dotted(path, key))
        except ConfigError as error:
            problems.extend(error.args)
    problems.extend(
        f"{dotted(path, name)}: missing; expected {describe(parameter.annotation)}"
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


def suggestion(name: Any, allowed: Sequence[str]) -> str:
    """What a message says of an unknown name: "; did you mean 'x'?", or nothing where no allowed one is near."""
    near = nearest(name, allowed) if isinstance(name, str) else None
    return f"; did you mean {near!r}?" if near else ""


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
    if inspect.isclass(annotation) and dataclasses.is_dataclass(annotation):
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
    parameters = list(inspect.signature(function).parameters.values())[inspect.isclass(target) :]
    result = {}
    for parameter in parameters:
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
                logging.WARNING if path else logging.INFO, "%s is called %s now", dotted(path, key), dotted(path, name)
            )
            key = name
        section = section_type(parameters[key].annotation) if key in parameters else None
        if section is not None and isinstance(value, Mapping):
            value = with_todays_names(section, value, dotted(path, key) if path else "")
        result[key] = value
    return result


def _check_value(annotation: Any, value: Any, path: str) -> Any:
    section = section_type(annotation)
    if section is not None and isinstance(value, section):
        return value
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
        if section_type(kind) is not None and all(isinstance(key, str) for key in value):
            return {key: _check_value(kind, each, dotted(path, key)) for key, each in value.items()}

    from pydantic import ValidationError

    if isinstance(value, str | os.PathLike) and not is_utf8(str(value)):
        raise ConfigError(
            f"{mismatch(path, value)}: a config is UTF-8, and this is not; rename it, or name a link to it"
        )
    try:
        return _adapter(annotation).validate_python(value)
    except ValidationError as error:
        choices = [choice for choice in _literals(annotation) if isinstance(choice, str)]
        hint = suggestion(value, choices)
        if isinstance(value, float) and not math.isfinite(value):
            hint = ", a finite number"
        raise ConfigError(f"{mismatch(path, value)}: expected {describe(annotation)}{hint}") from error


def section_type(annotation: Any) -> type | None:
    """The one dataclass that a mapping may stand for in this annotation, if there is one."""
    if typing.get_origin(annotation) in (Union, types.UnionType, typing.Annotated):
        found = [section_type(argument) for argument in typing.get_args(annotation)]
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
        return arguments[0] if section_type(arguments[0]) is not None else None
    return None


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    """What validates values of an annotation; making one takes longer than all of its work."""
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(_strict(annotation), config=ConfigDict(arbitrary_types_allowed=True))


def _strict(annotation: Any) -> Any:
    """Forbid conversions between scalars, wherever they stand in the annotation, but not list -> tuple."""
    from pydantic import AllowInfNan, Strict

    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is float:  # of a config no number is meant that is none
        return typing.Annotated[annotation, Strict(), AllowInfNan(False)]
    if annotation in (int, bool, str):
        return typing.Annotated[annotation, Strict()]
    if inspect.isclass(annotation) and dataclasses.is_dataclass(annotation):
        return typing.Annotated[Any, _instance_validator(annotation)]
    if origin is Literal:
        return typing.Annotated[annotation, _literal_validator(arguments)]
    if origin is None or origin is typing.Annotated or not arguments:
        return annotation
    if origin in (Union, types.UnionType):
        return Union[tuple(map(_strict, arguments))]  # noqa: UP007 - built from a tuple
    if origin in (tuple, list, set, dict, Sequence, Mapping):
        return origin[tuple(argument if argument is ... else _strict(argument) for argument in arguments)]
    return annotation


def _instance_validator(kind: type) -> Any:
    """A validator that takes what is a ``kind`` already."""
    from pydantic import PlainValidator

    def same(value: Any) -> Any:
        if not isinstance(value, kind):
            raise ValueError(f"no {kind.__name__}")
        return value

    return PlainValidator(same)


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


def dotted(path: str, key: str) -> str:
    return f"{path}.{key}" if path else str(key)


def mismatch(path: str, value: Any) -> str:
    return f"{path}: got {value!r} ({type(value).__name__})"


def _unknown_key(key: str, allowed: Sequence[str], path: str) -> str:
    guess = nearest(key, allowed)
    hint = f" did you mean {dotted(path, guess)}?" if guess else ""
    return f"{dotted(path, key)}: unknown key;{hint} allowed: {', '.join(allowed) or 'no keys'}"


def check_least(section: Any, **least: float) -> None:
    """Raise ValueError unless each of these keys of a config section has at least this value."""
    for key, bound in least.items():
        if not getattr(section, key) >= bound:  # NaN is not, either
            raise ValueError(f"{key} must be at least {bound}, got {getattr(section, key)}")
