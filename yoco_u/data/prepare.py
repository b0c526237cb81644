"""From a corpus to a dataset: split the documents, train a tokenizer, encode, write shards.

`prepare` builds in a folder beside the dataset's and renames it when it is complete, so that no half-made dataset is ever read.
"""

import hashlib
import heapq
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from yoco_u.checksums import write_checksums
from yoco_u.data.compression import Advance
from yoco_u.data.config import MINIMUM_VOCABULARY, DataConfig
from yoco_u.data.corpus import Corpus
from yoco_u.data.formats import Document
from yoco_u.data.index import INDEX, TOKENIZER, DatasetIndex, SplitName
from yoco_u.data.places import absolute, changes, seen_from
from yoco_u.data.shards import ShardWriter
from yoco_u.data.synthetic import is_synthetic
from yoco_u.data.tokenizer import (
    DocumentEncoder,
    answer_marks,
    load_tokenizer,
    name_end_of_text,
    train_tokenizer,
    vocabulary_size,
)
from yoco_u.device import environment_variables
from yoco_u.errors import UserError, naming
from yoco_u.folders import NewFolder, check_place
from yoco_u.formatting import short_bytes

SAMPLE_CHARACTERS = 20_000_000
"""The most text that a tokenizer is trained on; more takes time and memory and hardly changes the tokenizer."""

_BATCH_CHARACTERS = 1 << 20

_Item = tuple[SplitName, Document]
_Encoded = tuple[SplitName, Document, NDArray[np.uint32]]


def prepare(config: DataConfig, out: str | os.PathLike[str], progress: bool = True, workers: int | None = None) -> DatasetIndex:
    """Make the dataset of `config` in the folder `out`, unless it is there already.

    The result depends on the config and on the contents of the files, not on `workers`. A complete dataset of an equal config
    is used as it is, without a look at the corpus. Two processes may prepare the same folder: the second waits for the first.

    Args:
        progress: whether to show progress bars on stderr, and a line if the dataset was there already.
        workers: number of threads that encode; one for each processor by default.

    Raises:
        UserError: if the corpus cannot be read, a split comes out empty, or `out` holds anything else.
    """
    out = Path(os.path.realpath(out))
    console = Console(stderr=True, quiet=not progress, markup=False)
    found = _existing(config, out, console)
    if found:
        return found
    check_place(out)
    with naming(out), closing(NewFolder(out)) as new:
        if found := _existing(config, out, console):  # this one has waited for another process that prepared it
            return found
        with _bars(console) as bars:
            _build(config, new.folder, bars, workers or os.cpu_count() or 1)
        new.publish()
    return DatasetIndex.load(out)


def split_of(source: str, fraction: float, seed: int) -> SplitName:
    """The split of a document, chosen by a hash of its name alone, so that adding or removing others does not change it."""
    return "validation" if _hash(source, f"split {seed}") < fraction else "train"


def _existing(config: DataConfig, out: Path, console: Console) -> DatasetIndex | None:
    if not (out / INDEX).exists():
        if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out}: exists and is no prepared dataset; choose another folder")
        return None
    index = DatasetIndex.load(out)
    begin = out / (index.working_folder or absolute(os.curdir))
    if found := list(changes(index.config, config, lambda path: [absolute(path, begin)])):
        differ = "; ".join(f"{key} {old!r}, now {new!r}" for key, old, new in found)
        raise UserError(f"{out}: holds a dataset of another config ({differ}); choose another folder or remove it")
    near = os.path.relpath(out) if out.is_relative_to(Path.cwd()) else out
    reused = f"Using the dataset in {near}; remove it to read the corpus anew."
    console.print(reused, soft_wrap=True)
    return index


def _build(config: DataConfig, folder: Path, bars: Progress, workers: int) -> None:
    items = _Items(config)
    if items.synthetic:
        tokenizer = train_tokenizer(["a"], MINIMUM_VOCABULARY)  # nothing is merged: a token is a byte
    elif config.tokenizer is None:
        with _bar(bars, "sampling text", items.size) as advance:
            sample = _sample(items.read(advance), config)
        with _bar(bars, "training the tokenizer", None):
            tokenizer = train_tokenizer(sample, config.vocab_size)
        del sample
    else:
        tokenizer = load_tokenizer(config.tokenizer)
        name_end_of_text(tokenizer)
    tokenizer.save_pretrained(folder / TOKENIZER)

    vocab_size = vocabulary_size(tokenizer)
    dtype: Literal["uint16", "uint32"] = "uint16" if vocab_size <= 1 << 16 else "uint32"
    encoder = DocumentEncoder(tokenizer, config.special_tokens)
    with ExitStack() as stack:
        names: tuple[SplitName, ...] = ("train", "validation")
        writers = {name: stack.enter_context(ShardWriter(folder, name, dtype, config.shard_tokens)) for name in names}
        advance = stack.enter_context(_bar(bars, "encoding", items.size))
        for split, document, tokens in _encode(encoder, items.read(advance), workers):
            writers[split].add(tokens, len(document.text.encode()))
        splits = {name: writer.finish() for name, writer in writers.items()}
    _check_splits(config, {name: split.documents for name, split in splits.items()})
    DatasetIndex(
        dtype=dtype,
        eot_id=encoder.eot_id,
        vocab_size=vocab_size,
        config=config,
        working_folder=seen_from(folder),
        answers=answer_marks(tokenizer) if items.synthetic else None,
        splits={name: split for name, split in splits.items() if split.shards},
        folder=folder,
    ).save(folder)
    write_checksums(folder)


class _Items:
    """The documents of all splits, each with its split. They can be read twice: for the tokenizer, and for the shards.

    Attributes:
        synthetic: whether the documents are generated.
    """

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self.synthetic = _all_synthetic(config)
        self._corpus = Corpus(config.corpus, config.text_field, held_out=lambda name: self._split(name) == "validation")
        self._held_out = Corpus(config.validation_corpus, config.text_field) if config.validation_corpus else None
        if self._held_out:
            both = self._corpus.names.keys() & self._held_out.names.keys()
            if both:
                name = self._held_out.names[min(both)]
                raise UserError(f"{name}: in both corpus and validation_corpus; take it out of one of them")

    @property
    def size(self) -> int | None:
        sizes = [corpus.size for corpus in (self._corpus, self._held_out) if corpus]
        return None if None in sizes else sum(size or 0 for size in sizes)

    def read(self, advance: Advance) -> Iterator[_Item]:
        for document in self._corpus.documents(advance):
            yield self._split(document.source), document
        if self._held_out:
            for document in self._held_out.documents(advance):
                yield "validation", document

    def _split(self, name: str) -> SplitName:
        """The split of a document of `corpus`."""
        config = self._config
        return "train" if config.validation_corpus else split_of(name, config.validation_fraction, config.seed)


def _all_synthetic(config: DataConfig) -> bool:
    """Whether all entries ask for generated documents.

    Raises:
        UserError: if only some do, or if there is a tokenizer, since generated documents have their own.
    """
    entries = [*config.corpus, *(config.validation_corpus or ())]
    generated = [entry for entry in entries if is_synthetic(entry)]
    if not generated:
        return False
    if len(generated) < len(entries):
        other = next(entry for entry in entries if not is_synthetic(entry))
        raise UserError(f"{generated[0]} and {other}: generated documents and others do not mix; prepare a dataset of each")
    if config.tokenizer is not None:
        raise UserError(f"{generated[0]}: the tokens of generated documents are bytes; leave data.tokenizer out")
    return True


def _sample(items: Iterator[_Item], config: DataConfig) -> list[str]:
    """A pseudo-random sample of the training documents, of at most SAMPLE_CHARACTERS: those of the smallest hashes.

    The documents come in the order of the corpus. A single document is kept even if it is as long as the whole sample.
    """
    kept: list[tuple[float, int, str, int]] = []  # a heap of (-hash, number, text, length): the largest hash comes first
    size = 0
    counts: dict[SplitName, int] = {"train": 0, "validation": 0}
    for number, (split, document) in enumerate(items):
        counts[split] += 1
        if split != "train":
            continue
        rank = _hash(document.source, f"sample {config.seed}")
        text = document.text[:SAMPLE_CHARACTERS]
        if size + len(text) > SAMPLE_CHARACTERS and kept and -kept[0][0] < rank:
            continue
        heapq.heappush(kept, (-rank, number, text, len(text)))
        size += len(text)
        while size > SAMPLE_CHARACTERS and len(kept) > 1:
            size -= heapq.heappop(kept)[3]
    _check_splits(config, counts)
    return [text for _, _, text, _ in sorted(kept, key=lambda entry: entry[1])]


def _check_splits(config: DataConfig, documents: dict[SplitName, int]) -> None:
    corpus = ", ".join(config.corpus)
    if not any(documents.values()):
        raise UserError(f"{corpus}: the corpus is empty, no document has any text; check the corpus setting")
    if not documents["train"]:
        raise UserError(f"{corpus}: no document is left for training; give more documents or less validation_fraction")
    if documents["validation"]:
        return
    if config.validation_corpus:
        raise UserError(f"{', '.join(config.validation_corpus)}: the validation corpus is empty; check the setting")
    if config.validation_fraction > 0:
        raise UserError(
            f"{corpus}: none of the {documents['train']} documents fell to the validation split (validation_fraction "
            f"{config.validation_fraction}); give more documents or a validation_corpus, or set validation_fraction 0"
        )


def _encode(encoder: DocumentEncoder, items: Iterator[_Item], workers: int) -> Iterator[_Encoded]:
    """Encode batches of documents on several threads (tokenizers releases the interpreter lock), in the order of the items."""

    def encode(batch: list[_Item]) -> list[_Encoded]:
        tokens = encoder.encode_documents([document for _, document in batch])
        return [(split, document, ids) for (split, document), ids in zip(batch, tokens, strict=True)]

    pending: deque[Future[list[_Encoded]]] = deque()
    # The tokenizers library would start threads of its own beside ours.
    with environment_variables(TOKENIZERS_PARALLELISM="false"), ThreadPoolExecutor(workers) as pool:
        try:
            for batch in _batches(items):
                pending.append(pool.submit(encode, batch))
                if len(pending) > 2 * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _batches(items: Iterator[_Item]) -> Iterator[list[_Item]]:
    batch: list[_Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(item[1].text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _hash(source: str, purpose: str) -> float:
    """A number in [0, 1) that depends on the arguments alone, on every machine."""
    digest = hashlib.blake2b(f"{purpose}\0{source}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]}"), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=console.quiet or not console.is_terminal)


@contextmanager
def _bar(bars: Progress, description: str, total: int | None) -> Iterator[Advance]:
    """A bar that counts bytes, or a line where there is no terminal.

    Without a total it only shows that something is going on.
    """
    task = bars.add_task(description, total=total, done="")
    if not bars.console.is_terminal:
        bars.console.print(description)

    def advance(amount: int) -> None:
        bars.advance(task, amount)
        bars.update(task, done=short_bytes(bars.tasks[task].completed))

    yield advance
    bars.update(task, total=1, completed=1)
