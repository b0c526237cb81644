"""Fine-tuning on TRL and PEFT: on chats, and on problems whose answers can be checked.

`read_chats` reads chats, `examples` makes tokens of them by the model's own chat template and marks those of the assistant, and
`fine_tune` (in `sft.py`) trains on these alone. `reinforce` (in `grpo.py`) trains on problems by the rewards of the model's own
answers, which our engine samples. Start at either.
"""

from yoco_u.tuning.chats import Chat, Example, examples, read_chats
from yoco_u.tuning.grpo import Reward, reinforce
from yoco_u.tuning.problems import Matches, read_problems
from yoco_u.tuning.rollouts import complete, engine_rollouts
from yoco_u.tuning.settings import GRPOSettings, SFTSettings
from yoco_u.tuning.sft import fine_tune

__all__ = [
    "Chat",
    "Example",
    "GRPOSettings",
    "Matches",
    "Reward",
    "SFTSettings",
    "complete",
    "engine_rollouts",
    "examples",
    "fine_tune",
    "read_chats",
    "read_problems",
    "reinforce",
]
