"""Strict JSON: what ``json`` accepts, minus everything a header must not contain.

Refused: nesting deeper than 6, more than a million lists and objects, duplicate keys at any level,
floats, NaN and Infinity, negative integers and those above 2^53, lone surrogates. Limits are
checked before anything is built.
"""

import json
import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from plyweight.errors import HeaderError

__all__ = [
    "MAX_CONTAINERS",
    "MAX_DEPTH",
    "MAX_INTEGER",
    "check_integer",
    "check_keys",
    "header_error",
    "parse_json",
    "shown",
    "to_json",
]

MAX_DEPTH = 6
MAX_CONTAINERS = 10**6  # as many tensors as are read take 600,002
MAX_INTEGER = 2**53  # what every JSON implementation represents exactly
AGAIN = "fetch or pack the file again"

# Strings, whole or cut off by the end; possessive, so that hostile input costs linear time.
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_INNERMOST = re.compile(rb"(?:\[\]|\{\})++")
# Numbers that are no integer of 0 to 2^53: a sign, a fraction, an exponent, too many digits.
_SUSPECT = re.compile(r"-|[0-9][.eE]|[0-9]{16}")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80
_short.maxlevel = 2


def shown(value: object) -> str:
    """``value`` as Python writes it, cut to what fits in a message."""
    return _short.repr(value)


def header_error(found: str, rule: str, advice: str = AGAIN) -> HeaderError:
    """What was found, the rule it breaks, and what to do, in one sentence."""
    return HeaderError(f"{found}, but {rule}; {advice}.")


def parse_json(text: str, where: str) -> Any:
    """The value of untrusted ``text``.

    Args:
        text: JSON.
        where: what a message calls it.

    Raises:
        HeaderError: If it is no JSON, or JSON of a kind that is refused.
    """
    outside = _STRING.sub("", text)  # brackets and digits inside strings are text
    _check_brackets(outside, where)
    try:
        value = _decoder(where, strict_integers=bool(_SUSPECT.search(outside))).decode(text)
    except HeaderError:
        raise
    except ValueError as error:
        raise header_error(f"{where} is no JSON ({error})", "it must be") from error
    if _SURROGATE_ESCAPE.search(text):
        _check_surrogates(value, where)
    return value


def to_json(value: object) -> str:
    """Compact, sorted by key: the same value always gives the same text."""
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


def check_integer(value: object, what: str, low: int, high: int) -> int:
    """``value`` if it is an integer (True is none) in ``low .. high``."""
    if type(value) is not int or not low <= value <= high:
        raise header_error(f"{what} is {shown(value)}", f"it must be an integer of {low} to {high}")
    return value


def check_keys(
    value: object, what: str, required: Iterable[str], optional: Iterable[str] = ()
) -> Mapping[str, Any]:
    """``value`` if it is an object with all ``required`` keys and none but ``optional`` ones."""
    if not isinstance(value, dict):
        raise header_error(f"{what} is {shown(value)}", "it must be an object")
    wanted = frozenset(required)
    if value.keys() == wanted:
        return value
    missing = sorted(wanted - value.keys())
    unknown = sorted(value.keys() - wanted - frozenset(optional))
    if missing:
        raise header_error(
            f"{what} lacks {shown(missing[0])}", f"it needs {', '.join(sorted(wanted))}"
        )
    if unknown:
        raise header_error(
            f"{what} has a field {shown(unknown[0])}", "this version knows no such field"
        )
    return value


def _check_brackets(outside: str, where: str) -> None:
    """Bound how many lists and objects there are, and how deep they nest."""
    brackets = outside.encode(errors="replace").translate(None, _NO_BRACKETS)
    if len(brackets) > 2 * MAX_CONTAINERS:
        raise header_error(
            f"{where} has {len(brackets) // 2} lists and objects", f"at most {MAX_CONTAINERS} fit"
        )
    for _ in range(MAX_DEPTH):  # every pass takes the innermost ones off
        brackets = _INNERMOST.sub(b"", brackets)
    if brackets:
        raise header_error(
            f"{where} nests deeper than {MAX_DEPTH} or leaves brackets open", "no header needs to"
        )


def _check_surrogates(value: Any, where: str) -> None:
    """JSON can escape half a character, which is no text and no name."""
    if isinstance(value, str):
        if _SURROGATE.search(value):
            raise header_error(f"{where} has {shown(value)}", "half a surrogate pair is no text")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_surrogates(key, where)
            _check_surrogates(item, where)
    elif isinstance(value, list):
        for item in value:
            _check_surrogates(item, where)


def _decoder(where: str, *, strict_integers: bool) -> json.JSONDecoder:
    """A decoder that refuses what :mod:`json` would accept.

    Args:
        where: what a message calls the text.
        strict_integers: whether to look at every integer; without, none may be out of bounds.
    """

    def integer(digits: str) -> int:
        # Length first: converting a million digits takes quadratic time.
        if len(digits) > 16 or digits.startswith("-") or int(digits) > MAX_INTEGER:
            raise header_error(
                f"{where} has the number {shown(digits)}", f"integers go from 0 to {MAX_INTEGER}"
            )
        return int(digits)

    def no_float(digits: str) -> float:
        raise header_error(
            f"{where} has the number {shown(digits)}", "fractions are written as decimal strings"
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise header_error(f"{where} has the key {shown(twice)} twice", "keys are unique")
        return value

    return json.JSONDecoder(
        object_pairs_hook=unique,
        parse_int=integer if strict_integers else int,
        parse_float=no_float,
        parse_constant=no_float,
    )
