"""Values checked against the signature of what they configure.

A constructor's keyword arguments are its config: their annotations say what a value may be, and messages name the key,
the value and what was allowed.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import os
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union

from vistok.utils.files import is_utf8
from vistok.utils.spelling import nearest, suggestion

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

UNIONS = (Union, types.UnionType)

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


def describe(annotation: Any) -> str:
    """Write a type annotation the way a config's author thinks of it: ``int | None``, ``"center" | "random"``."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None or annotation is type(None):
        return "null"
    if origin is typing.Annotated:
        return describe(arguments[0])
    if origin is Literal:
        return " | ".join("null" if choice is None else repr(choice) for choice in arguments)
    if origin in UNIONS:
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
    section, item, entry = section_type(annotation), _item_type(annotation, tuple), _item_type(annotation, dict)
    if section is not None and isinstance(value, Mapping):
        arguments = check(section, value, path)
        try:
            return section(**arguments)
        except (ValueError, TypeError) as error:  # the dataclass' own rules, in __post_init__
            raise ConfigError(f"{path}: {error}") from error
    if item is not None and isinstance(value, (list, tuple)):
        return tuple(_check_value(item, each, f"{path}[{position}]") for position, each in enumerate(value))
    if entry is not None and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _check_value(entry, each, dotted(path, key)) for key, each in value.items()}

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


def alternatives(annotation: Any) -> list[Any]:
    """The members of a union, or the one annotation, without what ``Annotated`` adds."""
    if typing.get_origin(annotation) is typing.Annotated:
        return alternatives(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in UNIONS:
        return [choice for part in typing.get_args(annotation) for choice in alternatives(part)]
    return [annotation]


def section_type(annotation: Any) -> type | None:
    """The one dataclass that a mapping may stand for in this annotation, if there is one."""
    found = [choice for choice in alternatives(annotation) if _is_section(choice)]
    return found[0] if len(found) == 1 else None


def _is_section(annotation: Any) -> bool:
    return inspect.isclass(annotation) and dataclasses.is_dataclass(annotation)


def _item_type(annotation: Any, container: type) -> Any:
    """What ``tuple[Section, ...]`` or ``dict[str, Section]`` holds, also beside other types; None if no section."""
    held = [typing.get_args(choice) for choice in alternatives(annotation) if typing.get_origin(choice) is container]
    found = [kind for kinds in held if container is dict or ... in kinds for kind in kinds if section_type(kind)]
    return found[0] if found else None


def _literals(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) is Literal:
        yield from typing.get_args(annotation)
    for argument in typing.get_args(annotation):
        yield from _literals(argument)


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    """What validates values of an annotation; making one takes longer than all of its work."""
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(_strict(annotation), config=ConfigDict(arbitrary_types_allowed=True))


def _strict(annotation: Any) -> Any:
    """Forbid conversions between scalars, wherever they stand in the annotation, but not list -> tuple."""
    from pydantic import AllowInfNan, GetPydanticSchema, PlainValidator, Strict
    from pydantic_core.core_schema import is_instance_schema

    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is float:  # of a config no number is meant that is none
        return typing.Annotated[annotation, Strict(), AllowInfNan(False)]
    if annotation in (int, bool, str):
        return typing.Annotated[annotation, Strict()]
    if _is_section(annotation):  # a mapping that stands for it is checked apart, for the sake of its messages
        return typing.Annotated[Any, GetPydanticSchema(lambda *_: is_instance_schema(annotation))]
    if origin is Literal:
        return typing.Annotated[Any, PlainValidator(partial(_choice, arguments))]
    if arguments and origin in (*UNIONS, typing.Annotated, tuple, list, set, dict, Sequence, Mapping):
        outer: Any = Union if origin is types.UnionType else origin
        return outer[tuple(map(_strict, arguments))]
    return annotation


def _choice(choices: tuple[Any, ...], value: Any) -> Any:
    """``value``, which is one of ``choices``; ``True``, ``1`` and ``1.0``, which compare equal, are three."""
    if value is False and "no" in choices:  # how YAML reads a bare no
        return "no"
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError("not one of the choices")
    return value


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
