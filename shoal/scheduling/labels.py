"""Labels of nodes, and what work asks of them. Pure.

Keys and values follow Kubernetes, whose node pools they usually come from. A selector maps a key to a condition:

    "v"  "!v"  "in(a,b)"  "!in(a,b)"        what users write
    "exists()"  "!exists()"                 what `Exists()` and `DoesNotExist()` become
    "in(a,b)&!b"                            several conditions of one key, all of which must hold

A label that is absent satisfies the negated forms only, as in Kubernetes. The reserved labels have the names that
programs know (`ray.io/...`); written as `shoal.io/...` in a selector they are the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

RESERVED_PREFIX: Final = "ray.io/"
OWN_PREFIX: Final = "shoal.io/"
NODE_ID: Final = RESERVED_PREFIX + "node-id"
ACCELERATOR_TYPE: Final = RESERVED_PREFIX + "accelerator-type"

MAX_NAME: Final = 63
MAX_PREFIX: Final = 253
EXISTS: Final = "exists()"

_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_PREFIX: Final = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_WORD: Final = "letters and digits with '-', '_' or '.' in between, at most 63"


def check_labels(labels: Mapping[Any, Any]) -> dict[str, str]:
    """Labels of a node.

    Raises:
        TypeError: something is no string. ValueError: a key or value that Kubernetes would not take either.
    """
    for key, value in labels.items():
        _check_key(key)
        if not isinstance(value, str):
            raise TypeError(f"the value of label {key!r} is a string, not {value!r}")
        if value:
            _check_value(key, value)
    return dict(labels)


def check_selector(selector: Mapping[Any, Any]) -> dict[str, str]:
    """What a user asks of labels, in the form that `matches` reads. Raises: as `check_labels`."""
    settled: dict[str, str] = {}
    for key, condition in selector.items():
        _check_key(key)
        if not isinstance(condition, str):
            raise TypeError(f"the condition on label {key!r} is a string, not {condition!r}")
        text = condition.strip()
        negation = "!" if text.startswith("!") else ""
        text = text.removeprefix("!").strip()
        if text.startswith("in(") and text.endswith(")"):
            values = [value.strip() for value in text[3:-1].split(",")]
            for value in values:
                _check_value(key, value, condition)
            text = in_condition(values)
        else:
            _check_value(key, text, condition)
        name = RESERVED_PREFIX + key.removeprefix(OWN_PREFIX) if key.startswith(OWN_PREFIX) else key
        settled = both(settled, {name: negation + text})
    return settled


def in_condition(values: list[str]) -> str:
    return f"in({','.join(values)})"


def both(left: Mapping[str, str], right: Mapping[str, str]) -> dict[str, str]:
    """A selector that is satisfied where both are."""
    joined = dict(left)
    for key, condition in right.items():
        joined[key] = f"{joined[key]}&{condition}" if joined.get(key, condition) != condition else condition
    return joined


def matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether `labels` satisfy every condition of `selector`, a checked one."""
    for key, condition in selector.items():
        value = labels.get(key)
        for negated, accepted in _parse(condition):
            holds = value is not None and (accepted is None or value in accepted)
            if holds == negated:
                return False
    return True


def describe(selector: Mapping[str, str]) -> str:
    """For people: "disk=ssd, zone in(a,b)"."""
    parts = []
    for key, condition in sorted(selector.items()):
        plain = not condition.startswith(("!", "in(", EXISTS)) and "&" not in condition
        parts.append(f"{key}={condition}" if plain else f"{key} {condition}")
    return ", ".join(parts)


@lru_cache(maxsize=4096)
def _parse(condition: str) -> tuple[tuple[bool, frozenset[str] | None], ...]:
    """(negated, accepted values or None for any) of each part."""
    parts: list[tuple[bool, frozenset[str] | None]] = []
    for text in condition.split("&"):
        negated = text.startswith("!")
        text = text.removeprefix("!")
        if text == EXISTS:
            parts.append((negated, None))
        elif text.startswith("in(") and text.endswith(")"):
            parts.append((negated, frozenset(text[3:-1].split(","))))
        else:
            parts.append((negated, frozenset((text,))))
    return tuple(parts)


def _check_key(key: object) -> None:
    if not isinstance(key, str):
        raise TypeError(f"the name of a label is a string, not {key!r}")
    prefix, slash, name = key.rpartition("/")
    if slash and not (len(prefix) <= MAX_PREFIX and _PREFIX.fullmatch(prefix)):
        raise ValueError(f"label {key!r}: what stands before '/' is a DNS name in lower case, such as 'example.com'")
    if not (len(name) <= MAX_NAME and _NAME.fullmatch(name)):
        raise ValueError(f"label {key!r}: its name is {_WORD}")


def _check_value(key: str, value: str, condition: str | None = None) -> None:
    if len(value) <= MAX_NAME and _NAME.fullmatch(value):
        return
    if condition is None:
        raise ValueError(f"label {key!r}: its value is {_WORD}, not {value!r}")
    raise ValueError(
        f"label {key!r}: the condition {condition!r} is none of 'value', '!value', 'in(a,b)' and '!in(a,b)', "
        f"where a value is {_WORD}"
    )
