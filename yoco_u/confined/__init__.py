"""Work on what strangers sent, in processes that can be ended: a grammar, a chat template.

Such input can ask for unbounded time or memory, or end the process that works on it by a stack overflow, and nobody can tell so
beforehand. Bytes go to a confined process and bytes come back; it has limits of time and memory that the kernel enforces, and
whatever happens in it, its starter only sees that it ended.

Start at `nursery.py`, which is used from outside. `process.py` is what runs in the confined process, and `grammar.py` and
`template.py` are the two services that run there; they import neither torch nor the rest of this package.
"""

import struct

ANSWERED, REFUSED = b"+", b"-"
"""The first byte of an answer, which says whether the rest is the answer or why there is none."""

LENGTH = struct.Struct("!Q")
"""What stands before each message and each answer: how many bytes it has."""

FIRST = struct.Struct("d")
"""What asks for a new process: the seconds that its first answer may take, beside its connection."""
