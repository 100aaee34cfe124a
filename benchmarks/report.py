"""The table: medians beside each other, how many times better shoal is, and whether it reaches its goals."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table as RichTable

from workloads import BY_NAME, TITLES, YARDSTICKS, Workload

Key = tuple[str, str]  # (peer, workload)
README_ROWS = (
    "start to first result",
    "single client tasks sync",
    "single client tasks async",
    "1:1 actor calls sync",
    "1:1 actor calls async",
    "new actors (own process)",
    "single client put calls",
    "put vs memcpy",
    "idle worker private memory",
    "idle cluster total memory",
)


@dataclass(frozen=True, slots=True)
class Facts:
    """About the run: `versions` is per peer, `took_s` the time of all rounds."""

    versions: Mapping[str, str]
    rounds: int
    quick: bool
    took_s: float


@dataclass(frozen=True, slots=True)
class Goal:
    """One thing that a row asks of shoal: what it says, and whether it holds (None: there is nothing to compare
    with)."""

    text: str
    met: bool | None


class Table:
    def __init__(
        self, medians: Mapping[Key, float], failures: Mapping[Key, str], peers: Sequence[str], names: Sequence[str]
    ) -> None:
        self._medians = medians
        self._failures = failures
        self._peers = list(peers)
        self._names = list(names)

    def for_terminal(self) -> RichTable:
        table = RichTable(title="median of the rounds; (x) how many times better shoal is", title_justify="left")
        table.add_column("workload")
        table.add_column("unit")
        for peer in self._peers:
            table.add_column(TITLES[peer], justify="right", style="bold" if peer == "shoal" else "", no_wrap=True)
        table.add_column("goal")
        for name in self._names:
            if not any((peer, name) in seen for seen in (self._medians, self._failures) for peer in self._peers):
                continue
            goals = self.goals(BY_NAME[name])
            marks = {True: "[green]yes[/]", False: "[red]no[/]", None: "[dim]?[/]"}
            wanted = "\n".join(f"{marks[goal.met]} {goal.text}" for goal in goals)
            table.add_row(name, BY_NAME[name].unit, *(self._cell(peer, name) for peer in self._peers), wanted)
        for yardstick in YARDSTICKS:
            if value := self._medians.get(("machine", yardstick.name)):
                table.add_row(f"[dim]{yardstick.name}[/]", yardstick.unit, f"[dim]{number(value)}[/]")
        return table

    def for_docs(self, facts: Facts) -> str:
        """The page docs/benchmarks.md."""
        return "\n".join(self._page(facts)) + "\n"

    def for_readme(self) -> str:
        names = [name for name in README_ROWS if name in self._names]
        return "\n".join(self._markdown(names, with_goals=False))

    def failure_lines(self) -> Iterator[str]:
        for (peer, name), reason in sorted(self._failures.items()):
            yield f"{TITLES.get(peer, peer)}, {name}: failed: {reason}"

    def goals(self, workload: Workload) -> list[Goal]:
        """What DESIGN asks of this row, and whether this run reached it."""
        ours = self._medians.get(("shoal", workload.name))
        goals = []
        if workload.goal is not None:
            sign = ">=" if workload.more_is_better else "<="
            met = None if ours is None else ours >= workload.goal if workload.more_is_better else ours <= workload.goal
            goals.append(Goal(f"{sign} {workload.goal:,g}", met))
        if workload.versus is not None:
            peer, factor = workload.versus
            ratio = self.ratio(peer, workload.name)
            text = f">= {factor:g}x {TITLES[peer]}" if factor != 1 else f"ahead of {TITLES[peer]}"
            goals.append(Goal(text, None if ratio is None else ratio >= factor))
        if workload.yardstick is not None:
            name, fraction = workload.yardstick
            bare = self._medians.get(("machine", name))
            reached = None if ours is None or bare is None else ours >= fraction * bare
            share = "" if ours is None or bare is None else f" (is {ours / bare:.0%})"
            goals.append(Goal(f">= {fraction:.0%} of the {name}{share}", reached))
        return goals

    def ratio(self, peer: str, name: str) -> float | None:
        """How many times better shoal is than `peer`; below 1 it is worse."""
        ours, theirs = self._medians.get(("shoal", name)), self._medians.get((peer, name))
        if not ours or not theirs:
            return None
        return ours / theirs if BY_NAME[name].more_is_better else theirs / ours

    # ---------------------------------------------------------------------------------------------------------- parts

    def _cell(self, peer: str, name: str) -> str:
        if (value := self._medians.get((peer, name))) is None:
            return "failed" if (peer, name) in self._failures else "-"
        ratio = None if peer == "shoal" else self.ratio(peer, name)
        return number(value) if ratio is None else f"{number(value)} ({number(ratio)}x)"

    def _page(self, facts: Facts) -> Iterator[str]:
        kind = (
            "a quick run: rough numbers"
            if facts.quick
            else f"medians of {facts.rounds} rounds in which the peers took turns"
        )
        yield "# Benchmarks\n"
        yield "<!-- Written by `make bench`. -->\n"
        yield f"{kind[0].upper()}{kind[1:]}, {facts.took_s / 60:.0f} minutes in all, on {machine()}.\n"
        versions = (
            f"{TITLES[peer]} {version}" for peer, version in facts.versions.items() if peer in ("shoal", "ray", "dask")
        )
        yield f"{', '.join(versions)}, Python {platform.python_version()}, each with its defaults.\n"
        yield "In brackets: how many times better shoal is. A dash: the peer has no such thing.\n"
        yield from self._markdown(self._names, with_goals=True)
        yield "\n## What the bare machine does\n"
        yield "| yardstick | unit | value | |\n|---|---|---:|---|"
        for yardstick in YARDSTICKS:
            value = self._medians.get(("machine", yardstick.name))
            shown = "-" if value is None else number(value)
            yield f"| {yardstick.name} | {yardstick.unit} | {shown} | {yardstick.about} |"
        yield "\n## What the rows measure\n"
        yield from (f"- **{name}**: {BY_NAME[name].about}." for name in self._names if BY_NAME[name].about)
        if self._failures:
            yield "\n## What failed\n"
            yield from (f"- {line}" for line in self.failure_lines())

    def _markdown(self, names: Sequence[str], *, with_goals: bool) -> Iterator[str]:
        yield (
            "| workload | unit | "
            + " | ".join(TITLES[peer] for peer in self._peers)
            + (" | goal |" if with_goals else " |")
        )
        yield "|---|---|" + "---:|" * len(self._peers) + ("---|" if with_goals else "")
        for name in names:
            cells = [f"**{c}**" if p == "shoal" and c != "-" else c for p in self._peers for c in [self._cell(p, name)]]
            marks = {True: "reached", False: "**not reached**", None: "?"}
            wanted = "; ".join(f"{goal.text}: {marks[goal.met]}" for goal in self.goals(BY_NAME[name]))
            yield f"| {name} | {BY_NAME[name].unit} | {' | '.join(cells)} |" + (f" {wanted} |" if with_goals else "")


def number(value: float) -> str:
    """Three digits that matter, thousands apart: 0.0123, 1.23, 12.3, 123, 1,230."""
    if value == 0:
        return "0"
    digits = max(0, 2 - int(f"{abs(value):e}".rpartition("e")[2]))
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.{digits}f}"


def machine() -> str:
    """The machine in words, without its name."""
    model = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    kernel = ".".join(platform.release().split(".")[:2])
    cores = len(os.sched_getaffinity(0))
    name = model[1] if model else platform.machine()
    return f"{cores} cores ({name}), {memory:.0f} GiB of memory, {platform.system()} {kernel}"


def refresh_readme(path: Path, table: Table) -> None:
    """Put the short table between the marks in the README."""
    marks = re.compile(r"(<!-- benchmarks -->\n).*?(\n<!-- /benchmarks -->)", re.DOTALL)
    text = path.read_text()
    path.write_text(marks.sub(lambda found: found[1] + table.for_readme() + found[2], text))
