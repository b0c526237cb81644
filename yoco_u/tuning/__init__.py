"""Fine-tuning on chats: from JSON lines of messages to a model that answers, on TRL and PEFT.

`read_chats` reads chats, `examples` makes tokens of them by the model's own chat template and marks those of the assistant, and
`fine_tune` trains on these alone. Start at `sft.py`.
"""

from yoco_u.tuning.chats import Chat, Example, examples, read_chats
from yoco_u.tuning.settings import SFTSettings
from yoco_u.tuning.sft import fine_tune

__all__ = ["Chat", "Example", "SFTSettings", "examples", "fine_tune", "read_chats"]
