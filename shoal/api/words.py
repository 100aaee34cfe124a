"""The wording of complaints about names: what was meant, and what there is."""

from __future__ import annotations

from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?" for the closest of `known`, "" when none is close."""
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def no_graphs(what: str) -> AttributeError:
    """For `bind`, which is looked up like any attribute, so that `hasattr` says the truth."""
    return AttributeError(f"{what}.bind(): graphs of calls (ray.dag) are not supported yet; call .remote(...) directly")


def not_supported(what: str, instead: str = "") -> NotImplementedError:
    """The error for something that Ray has and shoal does not have yet."""
    return NotImplementedError(f"{what} is not supported yet" + (f"; {instead}" if instead else ""))
