"""Data: from a corpus to the batches that training reads.

`prepare` takes a `DataConfig` and makes a dataset: a folder with a tokenizer, shards of token ids and an index. `PackedDataset`
cuts a split of that folder into rows of tokens, and `BatchLoader` makes a `Batch` of rows for every training step.

Start at `prepare.py` for the way in, and at `dataset.py` for the way out. On the way in, `corpus.py` and `paths.py` find files,
`formats.py` and `compression.py` read documents from them, `synthetic/` generates documents, and `tokenizer.py` makes tokens.
docs/data.md describes the folder.
"""

from yoco_u.data.batches import Batch, BatchLoader, as_batch
from yoco_u.data.config import DataConfig
from yoco_u.data.corpus import Corpus
from yoco_u.data.dataset import PackedDataset
from yoco_u.data.formats import Document
from yoco_u.data.index import DatasetIndex, Shard, Split, check_vocabulary
from yoco_u.data.prepare import prepare, split_of
from yoco_u.data.split import SplitDocuments
from yoco_u.data.tokenizer import (
    END_OF_TEXT,
    PADDING,
    DocumentEncoder,
    begin_with,
    begin_with_end_of_text,
    end_of_text_id,
    load_tokenizer,
    train_tokenizer,
    vocabulary_size,
)

__all__ = [
    "END_OF_TEXT",
    "PADDING",
    "Batch",
    "BatchLoader",
    "Corpus",
    "DataConfig",
    "DatasetIndex",
    "Document",
    "DocumentEncoder",
    "PackedDataset",
    "Shard",
    "Split",
    "SplitDocuments",
    "as_batch",
    "begin_with",
    "begin_with_end_of_text",
    "check_vocabulary",
    "end_of_text_id",
    "load_tokenizer",
    "prepare",
    "split_of",
    "train_tokenizer",
    "vocabulary_size",
]
