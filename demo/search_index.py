"""A small full-text search engine: an inverted index, ranked by BM25. Plain Python, nothing about clusters in here.

The index maps each word to the documents that it occurs in and how often. It is cut into shards by word, so that each
shard knows all documents of its words and can score them alone. To answer a query, the scores of its words are added
up, in the order of the query: the sum of the same numbers in the same order is the same to the last bit, on one
machine or on many.

Source: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009.
"""

from __future__ import annotations

import math
import pickle
import re
import sysconfig
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Final

WORD: Final = re.compile(r"[A-Z]?[a-z]+|[A-Z]{2,}(?![a-z])")  # names are words put together: HTTPServer, max_len
K1: Final = 1.2  # how soon more of the same word counts for nothing
B: Final = 0.75  # how much a long document is marked down

Postings = dict[str, list[int]]
"""word -> document number, count, document number, count, ... (flat lists of small numbers travel fast)"""

Scores = dict[int, float]
"""document number -> what one word adds to its score"""


class Corpus:
    """Many documents in one block of memory.

    The text is one buffer that is shared, not copied, when the corpus is passed to tasks: pickle's protocol 5 takes it
    out of band, and what comes out at the other end is a view into the node's shared memory.
    """

    def __init__(self, names: Sequence[str], text: pickle.PickleBuffer | bytes, offsets: Sequence[int]) -> None:
        self.names = names
        self.text = memoryview(text)
        self.offsets = offsets  # document i is text[offsets[i]:offsets[i + 1]]

    def __reduce__(self) -> tuple[Any, ...]:
        return Corpus, (self.names, pickle.PickleBuffer(self.text), self.offsets)

    def __len__(self) -> int:
        return len(self.names)

    def document(self, number: int) -> str:
        return str(self.text[self.offsets[number] : self.offsets[number + 1]], "utf-8", "replace")

    def size_bytes(self, documents: range) -> int:
        return self.offsets[documents.stop] - self.offsets[documents.start]

    def cut(self, pieces: int) -> list[range]:
        """Ranges of documents, in order, of about equally much text; fewer than `pieces` when there are few
        documents."""
        share = self.offsets[-1] / pieces
        starts = sorted({min(range(len(self)), key=lambda i: abs(self.offsets[i] - share * n)) for n in range(pieces)})
        return [range(start, stop) for start, stop in pairwise([*starts, len(self)])]


def standard_library() -> Corpus:
    """The sources of the Python that runs this, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    foreign = {"site-packages", "dist-packages", "__pycache__"}
    files = sorted(path for path in root.rglob("*.py") if not foreign & set(path.relative_to(root).parts))
    documents = [path.read_bytes() for path in files]
    names = [path.relative_to(root).as_posix() for path in files]
    return Corpus(names, b"".join(documents), [0, *accumulate(map(len, documents))])


# ------------------------------------------------------------------------------------------------------------ building


@dataclass(frozen=True, slots=True)
class Batch:
    """What came out of indexing a range of documents: postings per shard, and the number of words in each document."""

    shards: list[Postings]
    lengths: list[int]


def index_documents(corpus: Corpus, documents: range, shards: int) -> Batch:
    """Read documents and note which words they contain, sorted by the shard that each word belongs to."""
    postings: list[defaultdict[str, list[int]]] = [defaultdict(list) for _ in range(shards)]
    lengths = []
    for number in documents:
        words = WORD.findall(corpus.document(number))
        lengths.append(len(words))
        for word, count in Counter(map(str.lower, words)).items():
            postings[shard_of(word, shards)][word] += (number, count)
    return Batch([dict(shard) for shard in postings], lengths)


def shard_of(word: str, shards: int) -> int:
    """The same in every process, which `hash(word)` is not."""
    return zlib.crc32(word.encode()) % shards


class Shard:
    """The postings of some of the words. First `add` everything, then `score`."""

    def __init__(self) -> None:
        self.postings: defaultdict[str, list[int]] = defaultdict(list)

    def add(self, postings: Postings) -> None:
        for word, entries in postings.items():
            self.postings[word] += entries

    def size(self) -> tuple[int, int]:
        """(how many words, how many pairs of word and document)"""
        return len(self.postings), sum(map(len, self.postings.values())) // 2

    def score(self, words: Iterable[str], lengths: Sequence[int]) -> dict[str, Scores]:
        """What each word adds to the score of each document that has it. `lengths`: words per document, of all
        documents."""
        average = sum(lengths) / len(lengths)
        scores = {}
        for word in words:
            entries = self.postings.get(word, [])
            found = len(entries) // 2
            rarity = math.log(1 + (len(lengths) - found + 0.5) / (found + 0.5))
            scores[word] = {
                document: rarity * count * (K1 + 1) / (count + K1 * (1 - B + B * lengths[document] / average))
                for document, count in zip(entries[::2], entries[1::2], strict=True)
            }
        return scores


# ----------------------------------------------------------------------------------------------------------- answering


@dataclass(frozen=True, slots=True)
class Hit:
    name: str
    score: float


def words_of(query: str) -> list[str]:
    return list(dict.fromkeys(map(str.lower, WORD.findall(query))))


def rank(words: Sequence[str], scores: dict[str, Scores], names: Sequence[str], best: int = 3) -> list[Hit]:
    """The best documents, by the sum of what the words add; documents with equal sums in the order of their names."""
    total: defaultdict[int, float] = defaultdict(float)
    for word in words:
        for document, score in scores[word].items():
            total[document] += score
    ranked = sorted(total, key=lambda document: (-total[document], names[document]))
    return [Hit(names[document], total[document]) for document in ranked[:best]]
