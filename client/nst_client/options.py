"""Options by name, into the message and out of it.

The names, types and choices come from the contract's descriptor; defaults and bounds stay on the server.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, cast

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from nst.v1 import options_pb2
from nst_client.errors import InvalidArgumentError, UnknownOptionError
from nst_client.resources import OptionValue

OPTIONS: Descriptor = options_pb2.StylizeOptions.DESCRIPTOR

WHOLE_NUMBERS = frozenset(
    {
        FieldDescriptor.CPPTYPE_INT32,
        FieldDescriptor.CPPTYPE_INT64,
        FieldDescriptor.CPPTYPE_UINT32,
        FieldDescriptor.CPPTYPE_UINT64,
    }
)
REAL_NUMBERS = frozenset({FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE})


def options_message(options: Mapping[str, object]) -> options_pb2.StylizeOptions:
    """Return the message that holds these options; None leaves an option out.

    Raises UnknownOptionError, and InvalidArgumentError for a value of the wrong kind. Bounds are the server's.
    """
    message = options_pb2.StylizeOptions()
    for name, value in options.items():
        if value is not None:
            set_field(message, name, value)
    return message


def set_field(message: Message, name: str, value: object) -> None:
    """Set one option of a message with `StylizeOptions`' kinds of fields. Raises as `options_message` does."""
    field = _field_named(message.DESCRIPTOR, name)
    try:
        _assign(message, field, value)
    except InvalidArgumentError:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        path = f"options.{name}"
        raise InvalidArgumentError(f"{name} must be {_noun(field)}, not {value!r}", field=path) from error


def read_fields(message: Message) -> dict[str, OptionValue]:
    """Return the options that a message holds, by name; choices in lower case."""
    return {field.name: _value_of(field, value) for field, value in message.ListFields()}


def is_map(field: FieldDescriptor) -> bool:
    """Whether the field holds layer names with weights."""
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def choice_name(enum: EnumDescriptor, number: int) -> str:
    """Return the choice's name in lower case, without the enum's prefix; `unknown` if it has none here."""
    value = enum.values_by_number.get(number)
    return value.name.removeprefix(_prefix(enum)).lower() if value is not None and number != 0 else "unknown"


def choices(enum: EnumDescriptor) -> list[str]:
    """Return the names of an enum's choices, in the order of the contract, without the unspecified one."""
    return [choice_name(enum, value.number) for value in enum.values if value.number != 0]


def choice_number(enum: EnumDescriptor, value: object, *, field: str) -> int:
    """Return the number of the choice with this name; raise InvalidArgumentError, listing them, if there is none."""
    chosen = enum.values_by_name.get(f"{_prefix(enum)}{str(value).upper()}")
    if chosen is None or chosen.number == 0:
        names = ", ".join(choices(enum))
        raise InvalidArgumentError(f"{_short(field)} must be one of {names}, not {value!r}", field=field)
    return int(chosen.number)


def _prefix(enum: EnumDescriptor) -> str:
    return str(enum.values_by_number[0].name).removesuffix("UNSPECIFIED")


def _short(field: str) -> str:
    return field.removeprefix("options.")


def _field_named(descriptor: Descriptor, name: str) -> FieldDescriptor:
    field = descriptor.fields_by_name.get(name)
    if field is not None:
        return field
    closest = next(iter(difflib.get_close_matches(name, list(descriptor.fields_by_name), n=1)), None)
    hint = f"did you mean {closest!r}?" if closest else f"there are {', '.join(descriptor.fields_by_name)}"
    raise UnknownOptionError(f"there is no option {name!r}: {hint}", field=f"options.{name}", closest=closest)


def _assign(message: Message, field: FieldDescriptor, value: Any) -> None:
    if is_map(field):
        weight = field.message_type.fields_by_name["value"]
        getattr(message, field.name).update({key: _scalar(weight, item) for key, item in value.items()})
    elif field.is_repeated:
        getattr(message, field.name).extend(_scalar(field, item) for item in value)
    else:
        setattr(message, field.name, _scalar(field, value))


def _scalar(field: FieldDescriptor, value: object) -> Any:
    if field.enum_type is not None:
        return choice_number(field.enum_type, value, field=f"options.{field.name}")
    # protobuf takes True for 1; a caller who writes it has mixed something up.
    if isinstance(value, bool) and field.cpp_type != FieldDescriptor.CPPTYPE_BOOL:
        raise TypeError(f"{field.name} is a number")
    return value


def _noun(field: FieldDescriptor) -> str:
    if is_map(field):
        return "a dict from layer name to weight"
    kind = _kind_noun(field)
    return f"a list, each {kind}" if field.is_repeated else kind


def _kind_noun(field: FieldDescriptor) -> str:
    if field.cpp_type == FieldDescriptor.CPPTYPE_UINT32:
        return "a whole number from 0 to 4294967295"
    if field.cpp_type in WHOLE_NUMBERS:
        return "a whole number"
    if field.cpp_type in REAL_NUMBERS:
        return "a number"
    return "true or false" if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL else "a text"


def _value_of(field: FieldDescriptor, value: Any) -> OptionValue:
    if is_map(field):
        # Maps travel in no particular order.
        return dict(sorted(value.items()))
    if field.enum_type is not None:
        return choice_name(field.enum_type, value)
    return list(value) if field.is_repeated else cast("OptionValue", value)
