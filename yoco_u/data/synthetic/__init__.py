"""Generated documents of tasks that need depth: each question takes a known number of steps that follow from each other.

`tasks.py` has the tasks, each a pure function from a random generator and a level to a text. `documents.py` makes documents of
them, in which a token is a byte, for an entry of a corpus such as `synthetic:p-hop:levels=1-8`; it keeps the instances of
training and test apart. docs/data.md describes the tasks and the entries.
"""

from yoco_u.data.synthetic.documents import SyntheticCorpus, document_text, is_synthetic, read_entry, synthetic_documents
from yoco_u.data.synthetic.tasks import BEGIN, END, TASKS, Task

__all__ = [
    "BEGIN",
    "END",
    "TASKS",
    "SyntheticCorpus",
    "Task",
    "document_text",
    "is_synthetic",
    "read_entry",
    "synthetic_documents",
]
