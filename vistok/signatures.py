"""Checks of config values against the signature of what they configure.

A constructor's keyword arguments are its config. Their annotations say what a value may be; messages name the key, the
value and the allowed values.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import numbers
import operator
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
"""From names of arguments up to version 0.1 to current ones; configs and models of that version can still be read."""

UNIONS = (Union, types.UnionType)

log = logging.getLogger(__name__)
T = TypeVar("T")


class ConfigError(ValueError):
    """All problems of a config, one line per problem (``error.args`` holds the lines)."""

    def __str__(self) -> str:
        return "\n".join(self.args)


class ShellCommand:
    """A command whose output is read: the value of ``pipe:COMMAND`` on the command line, if commands are allowed.

    It has its own type, which no file can hold; a string that begins with ``pipe:`` runs nothing.
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
    """Annotates a mapping with its known keys: ``Annotated[dict[str, Any], KeysOf(DataConfig)]``.

    Attributes:
        target: a class whose parameters are the keys; or a function from the mapping to the annotations of its keys.
    """

    target: type | Callable[[Mapping[str, Any]], Mapping[str, Any]]


def annotations_of(target: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of the parameters of a class or function, by name."""
    return {name: parameter.annotation for name, parameter in _parameters(target).items()}


def check(target: Callable[..., Any], values: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Compare a config section with the signature of the class, dataclass or function that it configures.

    Where the annotation says so, lists become tuples, ints floats, and mappings nested dataclasses. Nothing else is
    converted: ``"12"`` and ``True`` are not ints.

    Args:
        target: called with the result later. Every parameter must be annotated.
        values: the section. Absent keys keep the signature's defaults and are absent from the result.
        path: the section's dotted key, for messages (``"model"``, or ``""`` at the top).

    Returns:
        keyword arguments for ``target``.

    Raises:
        ConfigError: there are unknown keys, missing keys or wrong types; the message lists all, with dotted keys.
        TypeError: ``target`` has an unannotated or variadic parameter.
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
    """Check a config section, and call ``target`` with it.

    Raises:
        ConfigError: as :func:`check`, or ``target`` raises ValueError.
    """
    arguments = check(target, values, path)
    try:
        return target(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def describe(annotation: Any) -> str:
    """A type annotation in words for messages, such as ``int | null`` or ``'center' | 'random'``."""
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

    A class is read through ``__init__``, since mixins may hide the constructor behind a variadic ``__new__``.
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
    """``values`` with old names of keys replaced if ``target`` has only the new name, in nested sections too.

    Each replacement is logged: as a warning if ``path`` names a config section, which the user can change.
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
        except (ValueError, TypeError) as error:  # from __post_init__
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
    """The members of a union, or the annotation itself, each without ``Annotated``."""
    if typing.get_origin(annotation) is typing.Annotated:
        return alternatives(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in UNIONS:
        return [choice for part in typing.get_args(annotation) for choice in alternatives(part)]
    return [annotation]


def section_type(annotation: Any) -> type | None:
    """The dataclass that a mapping becomes under this annotation; None if there is none or several."""
    found = [choice for choice in alternatives(annotation) if _is_section(choice)]
    return found[0] if len(found) == 1 else None


def _is_section(annotation: Any) -> bool:
    return inspect.isclass(annotation) and dataclasses.is_dataclass(annotation)


def _item_type(annotation: Any, container: type) -> Any:
    """``Section`` of ``tuple[Section, ...]`` or ``dict[str, Section]``, also in a union; None if there is none."""
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
    """The validator of an annotation; it is cached because building it takes longer than using it."""
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(_strict(annotation), config=ConfigDict(arbitrary_types_allowed=True))


def _strict(annotation: Any) -> Any:
    """The annotation without conversions between scalars, at any depth; lists still become tuples."""
    from pydantic import AllowInfNan, BeforeValidator, GetPydanticSchema, PlainValidator, Strict
    from pydantic_core.core_schema import is_instance_schema

    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is float:  # no config means NaN or infinity
        return typing.Annotated[annotation, Strict(), AllowInfNan(False)]
    if annotation is int:  # numbers of NumPy are numbers
        return typing.Annotated[annotation, Strict(), BeforeValidator(_python_number)]
    if annotation in (bool, str):
        return typing.Annotated[annotation, Strict()]
    if _is_section(annotation):  # mappings are checked by ``check``, for better messages
        return typing.Annotated[Any, GetPydanticSchema(lambda *_: is_instance_schema(annotation))]
    if origin is Literal:
        return typing.Annotated[Any, PlainValidator(partial(_choice, arguments))]
    if arguments and origin in (*UNIONS, typing.Annotated, tuple, list, set, dict, Sequence, Mapping):
        outer: Any = Union if origin is types.UnionType else origin
        return outer[tuple(map(_strict, arguments))]
    return annotation


def _python_number(value: Any) -> Any:
    return operator.index(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else value


def _choice(choices: tuple[Any, ...], value: Any) -> Any:
    """Return ``value`` if it is in ``choices``; ``True``, ``1`` and ``1.0`` compare equal but are different choices."""
    if value is False and "no" in choices:  # YAML reads a bare no as False
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
    """Raise ValueError unless each key of a config section has at least the value given for it."""
    for key, bound in least.items():
        if not getattr(section, key) >= bound:  # also refuses NaN
            raise ValueError(f"{key} must be at least {bound}, got {getattr(section, key)}")
