"""The demo: index the standard library's sources on a cluster of three nodes, and check the answers against one
process.

What it shows, from top to bottom:
- a remote function with several results, each of which goes straight to the actor that needs it,
- actors, one per node, that hold the parts of the index,
- a large object that is put once and read by all tasks out of shared memory,
- a driver that connects to a cluster started with the command line.

Run it with `make demo`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import shoal
from nodes import CommandError, LeftoverError, LocalNodes
from search_index import (
    Corpus,
    Hit,
    Postings,
    Scores,
    Shard,
    index_documents,
    rank,
    shard_of,
    standard_library,
    words_of,
)

SHARDS = 3  # one per node
BATCHES = 48  # enough that nodes of different speed finish together
QUERIES = [
    "asyncio event loop timeout",
    "parse HTTP header chunked",
    "temporary file deleted on close",
    "sqlite transaction isolation level",
    "compile regular expression cache",
]


# ------------------------------------------------------------------------------------------------------ on the cluster


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What one task did, and where. `lengths`: words per document; `busy_s`: seconds of work."""

    node_id: str
    pid: int
    size_bytes: int
    lengths: list[int]
    busy_s: float


@shoal.remote(num_returns=SHARDS + 1, scheduling_strategy="SPREAD")
def index_batch(corpus: Corpus, documents: range) -> tuple[Postings | BatchReport, ...]:
    """Index some documents. Each shard's postings are a result of their own, and the report is the last."""
    begin = time.perf_counter()
    batch = index_documents(corpus, documents, SHARDS)
    report = BatchReport(
        node_id=shoal.get_runtime_context().get_node_id(),
        pid=os.getpid(),
        size_bytes=corpus.size_bytes(documents),
        lengths=batch.lengths,
        busy_s=time.perf_counter() - begin,
    )
    return *batch.shards, report


@dataclass(frozen=True, slots=True)
class ShardReport:
    node_id: str
    pid: int
    words: int
    entries: int


@shoal.remote(num_cpus=0, resources={"shard": 1})  # each node offers one "shard", so each gets one
class IndexShard:
    """A part of the index, in a process of its own."""

    def __init__(self) -> None:
        self.shard = Shard()

    def add(self, postings: Postings) -> None:
        self.shard.add(postings)

    def score(self, words: list[str], lengths: list[int]) -> dict[str, Scores]:
        return self.shard.score(words, lengths)

    def report(self) -> ShardReport:
        return ShardReport(shoal.get_runtime_context().get_node_id(), os.getpid(), *self.shard.size())


# ------------------------------------------------------------------------------------------------------- in the driver


@dataclass(frozen=True, slots=True)
class Outcome:
    """`answers`: the hits of each query. `build_s`, `ask_s`: seconds to build the index and to answer all queries."""

    answers: list[list[Hit]]
    build_s: float
    ask_s: float
    batches: list[BatchReport]
    shards: list[ShardReport]


def run_on_cluster(corpus: Corpus, console: Console) -> Outcome:
    begin = time.perf_counter()
    shards = [IndexShard.remote() for _ in range(SHARDS)]
    shared = shoal.put(corpus)
    adding: list[shoal.ObjectRef[None]] = []
    reports: list[shoal.ObjectRef[BatchReport]] = []
    for documents in corpus.cut(BATCHES):
        results: Any = index_batch.remote(shared, documents)  # a list of references, as num_returns says
        *postings, report = results
        # The postings travel from the task's node to the shard's node; this process only passes their names on.
        adding += [shard.add.remote(part) for shard, part in zip(shards, postings, strict=True)]
        reports.append(report)
    show_progress(reports, console)
    batches: list[BatchReport] = shoal.get(reports)
    shoal.get(adding)
    build_s = time.perf_counter() - begin

    begin = time.perf_counter()
    lengths = shoal.put([length for batch in batches for length in batch.lengths])
    asked = []
    for query in QUERIES:  # all at once: the shards work on one query while the next ones are on their way
        words = words_of(query)
        asked.append([shard.score.remote(part_of(words, number), lengths) for number, shard in enumerate(shards)])
    answers = []
    for query, parts in zip(QUERIES, asked, strict=True):
        scores = {word: found for part in shoal.get(parts) for word, found in part.items()}
        answers.append(rank(words_of(query), scores, corpus.names))
    ask_s = time.perf_counter() - begin
    return Outcome(answers, build_s, ask_s, batches, shoal.get([shard.report.remote() for shard in shards]))


def part_of(words: list[str], shard: int) -> list[str]:
    """Those of the words that this shard knows about."""
    return [word for word in words if shard_of(word, SHARDS) == shard]


def show_progress(reports: list[shoal.ObjectRef[BatchReport]], console: Console) -> None:
    """Draw a bar until all tasks have ended."""
    columns = (TextColumn("indexing"), BarColumn(40), MofNCompleteColumn(), TextColumn("batches"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(reports))
        left = reports
        while left:
            done, left = shoal.wait(left)
            progress.advance(bar, len(done))


def run_in_this_process(corpus: Corpus) -> Outcome:
    """The same work by the same functions, with nothing but Python."""
    begin = time.perf_counter()
    shard = Shard()
    batch = index_documents(corpus, range(len(corpus)), shards=1)
    shard.add(batch.shards[0])
    build_s = time.perf_counter() - begin

    begin = time.perf_counter()
    answers = []
    for query in QUERIES:
        words = words_of(query)
        answers.append(rank(words, shard.score(words, batch.lengths), corpus.names))
    ask_s = time.perf_counter() - begin
    return Outcome(answers, build_s, ask_s, [], [ShardReport("", os.getpid(), *shard.size())])


# -------------------------------------------------------------------------------------------------------------- tables


def answers_table(outcome: Outcome) -> Table:
    table = Table(title="Answers", title_justify="left")
    table.add_column("query")
    table.add_column("best documents")
    table.add_column("score", justify="right")
    for query, hits in zip(QUERIES, outcome.answers, strict=True):
        table.add_row(query, "\n".join(hit.name for hit in hits), "\n".join(f"{hit.score:.3f}" for hit in hits))
    return table


def nodes_table(outcome: Outcome, nodes: list[dict[str, Any]]) -> Table:
    """Who did what: a row for each node, the driver's (the head) first."""
    batches: dict[str, list[BatchReport]] = defaultdict(list)
    for batch in outcome.batches:
        batches[batch.node_id].append(batch)
    shards = {shard.node_id: shard for shard in outcome.shards}
    table = Table(title="What ran where", title_justify="left")
    for header in ("node", "address", "CPUs"):
        table.add_column(header)
    for header in ("tasks", "processes", "MB indexed", "busy s", "MB/s", "shard: words", "entries", "process"):
        table.add_column(header, justify="right")
    for node in nodes:
        done, shard = batches[node["NodeID"]], shards.get(node["NodeID"])
        size_mb, busy_s = sum(b.size_bytes for b in done) / 1e6, sum(b.busy_s for b in done)
        table.add_row(
            f"{node['Labels'].get('role', '')} {node['NodeID'][:8]}".strip(),
            f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}",
            f"{node['Resources'].get('CPU', 0):g}",
            *(
                [str(len(done)), str(len({b.pid for b in done})), f"{size_mb:.1f}", f"{busy_s:.2f}"]
                if done
                else ["-"] * 4
            ),
            f"{size_mb / busy_s:.1f}" if done else "-",
            *([f"{shard.words:,}", f"{shard.entries:,}", str(shard.pid)] if shard else ["-"] * 3),
        )
    return table


def speed_table(corpus: Corpus, cluster: Outcome, alone: Outcome) -> Table:
    table = Table(title="How fast", title_justify="left")
    table.add_column("")
    for header in ("cluster", "one process", "times faster"):
        table.add_column(header, justify="right")
    rows = (
        (f"index {corpus.offsets[-1] / 1e6:.1f} MB", cluster.build_s, alone.build_s),
        (f"{len(QUERIES)} queries", cluster.ask_s, alone.ask_s),
    )
    for what, ours, theirs in rows:
        table.add_row(what, f"{ours:.3f} s", f"{theirs:.3f} s", f"{theirs / ours:.2f}")
    return table


# ---------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    console = Console() if sys.stdout.isatty() else Console(width=130)
    corpus = standard_library()
    console.print(f"{len(corpus):,} source files of Python's standard library, {corpus.offsets[-1] / 1e6:.1f} MB")
    with LocalNodes() as nodes:
        os.environ.update(nodes.environment)  # for the driver: where the cluster's files are, and the token
        begin = time.perf_counter()
        cpus = max(1, len(os.sched_getaffinity(0)) // 2)
        offer = '--resources={"shard": 1}'
        nodes.start_head("--num-cpus=0", offer, "--labels=role=head")
        for _ in range(2):
            nodes.start_worker(f"--num-cpus={cpus}", offer, "--labels=role=worker")
        console.print(
            f"a head and two workers started in {time.perf_counter() - begin:.2f} s; the head is {nodes.address}"
        )

        with shoal.init(address=nodes.address):
            cluster = run_on_cluster(corpus, console)
            alone = run_in_this_process(corpus)
            for table in (
                answers_table(cluster),
                nodes_table(cluster, shoal.nodes()),
                speed_table(corpus, cluster, alone),
            ):
                console.print(table)
            compare(cluster, alone)
            console.print("[green]the answers are those of a single process, to the last bit[/]")
    console.print(
        f"[green]all stopped: no process, no shared memory, no file is left, except the logs[/] in {nodes.folder}"
    )


def compare(cluster: Outcome, alone: Outcome) -> None:
    """Raises AssertionError when the cluster's index or answers are not those of the single process."""
    for query, ours, theirs in zip(QUERIES, cluster.answers, alone.answers, strict=True):
        if ours != theirs:
            raise AssertionError(f"{query!r} has other answers on the cluster: {ours}, in one process: {theirs}")
    for count in ("words", "entries"):
        ours, theirs = (sum(getattr(shard, count) for shard in outcome.shards) for outcome in (cluster, alone))
        if ours != theirs:
            raise AssertionError(f"the cluster's index has {ours} {count}, the single process's {theirs}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave through the `with` blocks, as Ctrl-C does
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; everything is stopped, and nothing but logs is left")
    except (CommandError, LeftoverError, AssertionError) as error:
        sys.exit(f"the demo failed: {error}")
