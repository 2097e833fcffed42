"""Flags made from the contract: one for every field of a message, with the field's comment as help."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from rich.markup import escape

from nst_client.errors import InvalidArgumentError
from nst_client.options import REAL_NUMBERS, WHOLE_NUMBERS, choices, is_map

PANEL = "Options of the picture"

CommandT = typing.TypeVar("CommandT", bound=Callable[..., None])


def with_option_flags(
    descriptor: Descriptor, comments: Mapping[str, str], *, only: Collection[str] | None = None, panel: str = PANEL
) -> Callable[[CommandT], CommandT]:
    """Give a command, in place of its `**options`, one keyword parameter for every field of the descriptor.

    `only` names the fields, if not all are meant; `panel` is what the help calls them together.
    """

    def decorate(command: CommandT) -> CommandT:
        resolved = inspect.signature(command, eval_str=True)
        own = [parameter for parameter in resolved.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
        fields = [field for field in descriptor.fields if only is None or field.name in only]
        made = [_flag(field, comments.get(field.name, ""), panel) for field in fields]
        command.__signature__ = resolved.replace(parameters=[*own, *made])  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *made]}
        return command

    return decorate


def flag_values(descriptor: Descriptor, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that the flags' values stand for, without those that were not given.

    Raises InvalidArgumentError for a map or list that cannot be read.
    """
    return {name: _value(descriptor.fields_by_name[name], value) for name, value in values.items() if value is not None}


def _flag(field: FieldDescriptor, comment: str, panel: str) -> inspect.Parameter:
    flag = f"--{field.name.replace('_', '-')}"
    names = f"{flag}/--no-{flag[2:]}" if _type(field) is bool else flag
    option = typer.Option(
        names, help=escape(comment), metavar=_metavar(field), show_default=False, rich_help_panel=panel
    )
    annotation = Annotated[_type(field) | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _type(field: FieldDescriptor) -> type:
    if field.is_repeated:
        return str
    if field.enum_type is not None:
        members = {name.upper(): name for name in choices(field.enum_type)}
        return typing.cast("type", StrEnum(field.enum_type.name, members))
    if field.cpp_type in WHOLE_NUMBERS:
        return int
    if field.cpp_type in REAL_NUMBERS:
        return float
    return bool if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL else str


def _metavar(field: FieldDescriptor) -> str | None:
    if is_map(field):
        return "LAYER=WEIGHT,…"
    if field.is_repeated:
        return "VALUE,…"
    if field.enum_type is not None:
        return "|".join(choices(field.enum_type))
    return "N" if field.cpp_type in WHOLE_NUMBERS else "X" if field.cpp_type in REAL_NUMBERS else None


def _value(field: FieldDescriptor, value: Any) -> Any:
    if is_map(field):
        return _weights(field.name, value)
    return _list(field, value) if field.is_repeated else value


def _list(field: FieldDescriptor, text: str) -> list[Any]:
    read = int if field.cpp_type in WHOLE_NUMBERS else float if field.cpp_type in REAL_NUMBERS else str
    try:
        return [read(entry) for entry in text.split(",")]
    except ValueError as error:
        raise InvalidArgumentError(f"{field.name}: {error}", field=f"options.{field.name}") from error


def _weights(name: str, text: str) -> dict[str, float]:
    weights = {}
    for entry in text.split(","):
        layer, equals, weight = entry.partition("=")
        try:
            weights[layer.strip()] = float(weight) if equals else 1.0
        except ValueError as error:
            message = f"{name} must be like relu1_1=1,relu2_1=0.5; the weight {weight!r} is not a number"
            raise InvalidArgumentError(message, field=f"options.{name}") from error
    return weights
