"""Events and resources as JSON, one object a line, for pipes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from datetime import datetime

from nst_client.events import Event


def json_line(value: object) -> str:
    """Return a dataclass of this package as one line of JSON.

    An event says its kind as `event` (`progress`, `state_change`); a picture's bytes are left out and their number
    is `bytes`; numbers that JSON has no word for (NaN, infinities) are null; times are ISO 8601.
    """
    fields = _jsonable(value)
    if isinstance(value, Event):
        kind = re.sub(r"(?<!^)(?=[A-Z])", "_", type(value).__name__).lower()
        fields = {"event": kind, **fields}  # type: ignore[dict-item]
    return json.dumps(fields, ensure_ascii=False)


def _jsonable(value: object) -> object:
    if dataclasses.is_dataclass(value):
        return dict(_field(field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value.isoformat() if isinstance(value, datetime) else value


def _field(name: str, value: object) -> tuple[str, object]:
    return ("bytes", len(value)) if isinstance(value, bytes) else (name, _jsonable(value))
