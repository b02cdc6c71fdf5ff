"""What others wrote: JSON, of which nothing is used before its type and range are known; values, errors in a line."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

Name = TypeVar("Name", bound=str)


class Options:
    """A JSON object, whose entries are read each with its type and range.

    Every method raises ValueError, in one line that names the file and the option, where it is missing or wrong.

    Args:
      values: the object.
      where: what an error puts before the name of an option, such as "folder/config.json: ".
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where

    @classmethod
    def read(cls, file: Path) -> "Options":
        """The object that a file holds.

        Raises:
          OSError: the file cannot be read.
          ValueError: it is not JSON in UTF-8, or no object.
        """
        try:
            values = json.loads(file.read_bytes())
        except FileNotFoundError:
            raise OSError(f"{file} does not exist: {file.parent} is not a complete Hugging Face model folder") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not valid JSON ({error}): download it again") from None
        if not isinstance(values, dict):
            raise ValueError(f"{file} must hold a JSON object, not {shown(values)}")
        return cls(values, f"{file}: ")

    def with_defaults(self, defaults: Mapping[str, Any]) -> "Options":
        """The same with values for what it does not say."""
        return Options({**defaults, **self.values}, self.where)

    def section(self, name: str) -> "Options":
        """An option that is an object itself; one that is null or not there is an empty one."""
        values = self.values.get(name)
        if values is not None and not isinstance(values, dict):
            raise self._wrong(name, "a JSON object")
        return Options(values or {}, f"{self.where}{name}.")

    def whole(self, name: str, low: int, high: int) -> int:
        """An integer from `low` to `high`."""
        value = self._value(name)
        if type(value) is not int or not low <= value <= high:
            raise self._wrong(name, f"a whole number between {low} and {high}")
        return value

    def side(self, name: str, high: int) -> int:
        """A length of a square from 1 to `high`, which may be given twice."""
        value = self._value(name)
        if isinstance(value, list) and len(value) == 2:
            if value[0] != value[1]:
                raise ValueError(f"{self.where}{name}={shown(value)} is not supported, only squares")
            return Options({name: value[0]}, self.where).whole(name, 1, high)
        return self.whole(name, 1, high)

    def number(self, name: str, low: float, high: float) -> float:
        """A number from `low` to `high`."""
        if not _is_number(value := self._value(name), low, high):
            raise self._wrong(name, f"a number between {low:g} and {high:g}")
        return float(value)

    def pair(self, name: str, low: int, high: int) -> tuple[int, int]:
        """A list of two integers from `low` to `high`."""
        value = self._value(name)
        if not isinstance(value, list) or len(value) != 2 or not all(
                type(entry) is int and low <= entry <= high for entry in value):
            raise self._wrong(name, f"a list of 2 whole numbers between {low} and {high}")
        return value[0], value[1]

    def triple(self, name: str, low: float, high: float) -> tuple[float, float, float]:
        """A list of three numbers from `low` to `high`."""
        value = self._value(name)
        if not isinstance(value, list) or len(value) != 3 or not all(_is_number(x, low, high) for x in value):
            raise self._wrong(name, f"a list of 3 numbers between {low:g} and {high:g}")
        return float(value[0]), float(value[1]), float(value[2])

    def one_of(self, name: str, among: Collection[Name]) -> Name:
        """A name of several."""
        value = self._value(name)
        if not isinstance(value, str) or value not in among:
            raise ValueError(f"{self.where}{name}={shown(value)} is not supported, only {', '.join(among)}")
        return next(name for name in among if name == value)

    def text(self, name: str) -> str:
        """A string."""
        if not isinstance(value := self._value(name), str):
            raise self._wrong(name, "a string")
        return value

    def boolean(self, name: str) -> bool:
        """True or false."""
        if not isinstance(value := self._value(name), bool):
            raise self._wrong(name, "true or false")
        return value

    def require(self, name: str, value: Any) -> None:
        """Refuses every other value than the one."""
        if type(found := self._value(name)) is not type(value) or found != value:
            raise ValueError(f"{self.where}{name}={shown(found)} is not supported, only {value!r}")

    def _value(self, name: str) -> Any:
        if name not in self.values:
            raise ValueError(f"{self.where}option {name} is missing")
        return self.values[name]

    def _wrong(self, name: str, expected: str) -> ValueError:
        return ValueError(f"{self.where}{name} must be {expected}, not {shown(self.values[name])}")


def _is_number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high


def shown(value: Any) -> str:
    """A value as Python writes it, in one line of at most 60 characters."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # of more digits, or lists in each other, than Python writes
        return f"a {type(value).__name__} too long to be shown"
    return text if len(text) <= 60 else text[:57] + "..."


def one_line(error: BaseException) -> str:
    """What an error says, or its type if it says nothing, in at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__
