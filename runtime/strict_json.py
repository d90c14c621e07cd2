"""JSON from files that nobody vouches for: duplicate keys, NaN and overlong numbers are errors, and every field is checked by type.

fields = Fields.parse(text, "manifest.json")
version = fields.integer("format_version", low=1)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, cast

from moec.runtime.errors import MoecError

_NAMES = {dict: "an object", list: "a list", str: "a string", int: "an integer", float: "a number", bool: "true or false"}


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"number {text} is too large")
    return number


def loads(content: bytes | str, where: str) -> Any:
    """The value of a JSON text.

    Raises:
        MoecError: it is not strict JSON; the message starts with `where`.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        reason = "is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise MoecError(f"{where}: not valid JSON: {reason}") from error


class Fields:
    """The fields of a JSON object, read by name and type. `where` is the place that error messages give."""

    def __init__(self, value: Any, where: str) -> None:
        self.where = where
        if not isinstance(value, dict):
            raise MoecError(f"{where}: expected an object, got {_kind(value)}")
        self.values: dict[str, Any] = value

    @classmethod
    def parse(cls, content: bytes | str, where: str) -> Fields:
        """The fields of the object that a JSON text holds."""
        return cls(loads(content, where), where)

    def fail(self, key: str, message: str) -> NoReturn:
        """Raise the error for one field."""
        raise MoecError(f"{self.where}: {key}: {message}")

    def get(self, key: str, kind: type) -> Any:
        """A required field of a type (`bool` is no `int`, an `int` is a `float`)."""
        if key not in self.values:
            self.fail(key, f"missing; expected {_NAMES[kind]}")
        value = self.values[key]
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            self.fail(key, f"expected {_NAMES[kind]}, got {_kind(value)}")
        return value

    def text(self, key: str) -> str:
        """A required string."""
        return cast(str, self.get(key, str))

    def integer(self, key: str, low: int = 0, high: int = 2**63 - 1) -> int:
        """A required integer in a range."""
        value = cast(int, self.get(key, int))
        if not low <= value <= high:
            self.fail(key, f"expected {low} to {high}, got {value}")
        return value

    def optional_integer(self, key: str, low: int = 0) -> int | None:
        """An integer, or None where it is null or absent."""
        return None if self.values.get(key) is None else self.integer(key, low)

    def integers(self, key: str, low: int = 0, high: int = 2**63 - 1, most: int = 4096) -> tuple[int, ...]:
        """A required list of integers in a range."""
        values = self.get(key, list)
        if len(values) > most or any(not isinstance(v, int) or isinstance(v, bool) or not low <= v <= high for v in values):
            self.fail(key, f"expected at most {most} integers from {low} to {high}")
        return tuple(values)

    def texts(self, key: str) -> tuple[str, ...]:
        """A required list of strings."""
        values = self.get(key, list)
        if any(not isinstance(v, str) for v in values):
            self.fail(key, "expected a list of strings")
        return tuple(values)

    def object(self, key: str) -> Mapping[str, Any]:
        """A required object, as it is."""
        return cast(dict[str, Any], self.get(key, dict))

    def fields(self, key: str) -> Fields:
        """A required object, to read its fields."""
        return Fields(self.object(key), f"{self.where}: {key}")

    def each(self) -> Iterator[tuple[str, Fields]]:
        """All fields, each of which must be an object."""
        for key, value in self.values.items():
            yield key, Fields(value, f"{self.where}: {key}")


def _kind(value: object) -> str:
    if value is None:
        return "null"
    return f"{value!r:.40}" if not isinstance(value, (dict, list)) else _NAMES[type(value)]
