"""How bundles of placement groups appear among a node's resources.

A committed bundle is resources set aside, and the node shows them under names of their own, as Ray's nodes do: for
bundle 0 of group G with 2 CPU these are `CPU_group_0_G` (this bundle), `CPU_group_G` (any bundle of G on this node) and
`bundle_group_...`, of which there is plenty, so that work without resources has a place too. Everybody who knows what
nodes have, and what is free there, thereby knows where the bundles are and how full they are: a demand of a group is a
demand for these names, and the choice of a node needs no knowledge of groups.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from shoal.scheduling.views import UNIT, Amounts

MARK: Final = "bundle"
_MARKS: Final = 1000 * UNIT
_ONE_MARK: Final = UNIT // 1000
_NAME: Final = re.compile(r"(.+)_group_(?:(\d+)_)?([0-9a-f]{36})", re.DOTALL)


class BundleName(NamedTuple):
    """A name taken apart. `bundle` -1: any."""

    resource: str
    bundle: int
    group: str


def join_name(resource: str, group: bytes, index: int = -1) -> str:
    """`index` -1: any bundle of the group."""
    return f"{resource}_group_{group.hex()}" if index < 0 else f"{resource}_group_{index}_{group.hex()}"


def parse_name(name: str) -> BundleName | None:
    """None: an ordinary resource."""
    found = _NAME.fullmatch(name) if "_group_" in name else None
    if found is None:
        return None
    resource, index, group = found.groups()
    return BundleName(resource, -1 if index is None else int(index), group)


def amounts_in(group: bytes, index: int, amounts: Amounts) -> Amounts:
    """`amounts` of one bundle, under both of its names."""
    named: Amounts = {}
    for name, amount in amounts.items():
        if amount:
            named[join_name(name, group)] = named[join_name(name, group, index)] = amount
    return named


def shown_of(group: bytes, index: int, resources: Amounts) -> Amounts:
    """What a bundle adds to what its node shows."""
    return amounts_in(group, index, {**resources, MARK: _MARKS})


def demand_on(group: bytes, index: int, asked: Amounts) -> Amounts:
    """What work that asks for `asked` needs of a node. `index` -1: of any one bundle."""
    asked = {**asked, MARK: _ONE_MARK}
    if index >= 0:
        return amounts_in(group, index, asked)
    return {join_name(name, group): amount for name, amount in asked.items() if amount}


def asked_of(demand: Amounts) -> Amounts:
    """What was asked for, as a person would say it: `demand_on` undone; other demands are as they are."""
    asked: Amounts = {}
    for name, amount in demand.items():
        part = parse_name(name)
        if part is None:
            asked[name] = amount
        elif part.resource != MARK:
            asked[part.resource] = amount
    return asked


def could_hold(demand: Amounts, total: Amounts) -> bool:
    """Whether one bundle that a node shows in `total` is as large as `demand` (from `demand_on`).

    Two bundles of one CPU show two CPU together, and still neither holds what needs two.
    """
    if not all(amount <= total.get(name, 0) for name, amount in demand.items()):
        return False
    asked: Amounts = {}
    group = ""
    for name, amount in demand.items():
        part = parse_name(name)
        if part is None or part.bundle >= 0:
            return True  # of one bundle, which the totals above are about
        asked[part.resource], group = amount, part.group
    binary = bytes.fromhex(group)
    for shown in [name for name in total if name.startswith(MARK) and name.endswith(group)]:
        part = parse_name(shown)
        if part is not None and part.bundle >= 0:
            index = part.bundle
            if all(amount <= total.get(join_name(name, binary, index), 0) for name, amount in asked.items()):
                return True
    return False
