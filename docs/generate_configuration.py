"""Writes docs/configuration.md from the docstrings of the config classes; a test checks that the page is up to date.

python docs/generate_configuration.py
"""

import inspect
import re
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from yoco_u.architecture import LOOPED, SIZES, STAGES, Architecture, MixtureOfExperts, ParallelStreams, RotaryScaling, Stage
from yoco_u.data.config import DataConfig
from yoco_u.training.config import RunConfig
from yoco_u.training.loop_draw import LoopDraw
from yoco_u.training.phases import LoopPhase, WindowPhase
from yoco_u.training.settings import DistillationConfig, OptimizerConfig, TrainingConfig
from yoco_u.tuning.settings import GRPOSettings, SFTSettings

TARGET = Path(__file__).with_name("configuration.md")

SECTIONS: list[tuple[str, str, type[BaseModel]]] = [
    ("The run", "", RunConfig),
    ("The architecture", "architecture.", Architecture),
    ("A stage", "architecture.stages[i].", Stage),
    ("Mixture of experts", "architecture.experts.", MixtureOfExperts),
    ("Parallel streams", "architecture.parallel.", ParallelStreams),
    ("RoPE scaling", "architecture.rotary_scaling.", RotaryScaling),
    ("Data", "data.", DataConfig),
    ("Optimizer", "optimizer.", OptimizerConfig),
    ("Training", "training.", TrainingConfig),
    ("A phase of another loop count", "training.loop_schedule[i].", LoopPhase),
    ("Drawn loop counts", "training.loop_draw.", LoopDraw),
    ("A phase of another window", "training.window_schedule[i].", WindowPhase),
    ("A teacher", "distillation.", DistillationConfig),
    ("Fine-tuning on chats: `yoco-u sft`", "", SFTSettings),
    ("Reinforcement learning: `yoco-u grpo`", "", GRPOSettings),
]

# Keys that the docstrings do not explain, because their names say enough to a reader of the code.
PLAIN = {
    "architecture.vocab_size": "rows of the embedding and of the LM head; at least the tokenizer's vocabulary.",
    "architecture.hidden_size": "width of the residual stream.",
    "architecture.intermediate_size": "inner width of each block's SwiGLU.",
    "architecture.num_attention_heads": "query heads.",
    "architecture.num_key_value_heads": "key and value heads; divides the query heads.",
    "architecture.head_dim": "width of a head; even.",
    "architecture.stages": "the blocks, in order; see below.",
    "architecture.rms_norm_eps": "added under the root of every RMSNorm.",
}

INTRODUCTION = """\
# Configuration

Written by `python docs/generate_configuration.py`; change the classes, not this page.

`yoco-u train CONFIG` reads one YAML file. A key is written dotted on the command line, `training.steps=100`, and nested in
the file:

```yaml
name: my-run
architecture: {preset: yoco_u, size: 8m, loops: 3}
dataset: data/stdlib
data: {corpus: stdlib, vocab_size: 8192}
optimizer: {learning_rate: 2.0e-3}
training: {steps: 1000, sequence_length: 512}
```

An unknown key is refused with the nearest known one, and so is a key that is there twice. Every number is finite; sizes and
counts are below 2^31, and what becomes a number of a tensor fits into float32. Only `true` and `false` are booleans, and only
decimal numbers are numbers: `off`, `12:30`, `010` and `2026-11-28` are texts.
"""

_NO_MEANING = 2**31
"""Limits from here on only keep computing from overflowing, and are said once for all settings."""


def main() -> None:
    TARGET.write_text(page(), encoding="utf-8")


def page() -> str:
    parts = [INTRODUCTION]
    for title, prefix, cls in SECTIONS:
        parts.append(f"## {title}\n")
        if cls is Architecture:
            parts.append(_presets())
        parts.append(_table(cls, prefix))
    return "\n".join(parts)


def _presets() -> str:
    plain = ", ".join(f"`{name}`" for name in STAGES if name not in LOOPED)
    looped = ", ".join(f"`{name}`" for name in sorted(LOOPED))
    sizes = ", ".join(f"`{name}`" for name in SIZES)
    return f"""\
`{{preset: NAME, size: SIZE}}` stands for a whole architecture; any key below may be set on top of it, and `layers` (even).

- Presets without a loop: {plain}.
- Presets with a loop, which also take `loops` and `loop_gate`: {looped}.
- `parscale` also takes `streams` and `prefix_tokens`.
- Sizes: {sizes}.
"""


def _table(cls: type[BaseModel], prefix: str) -> str:
    meanings = attributes(cls)
    rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for name, field in cls.model_fields.items():
        key = prefix + name
        meaning = meanings.get(name) or PLAIN[key]
        default = "required" if field.is_required() else f"`{_value(field.default)}`"
        rows.append(f"| `{key}` | {_kind(field)} | {default} | {_cell(meaning)} |")
    return "\n".join(rows) + "\n"


def attributes(cls: type[BaseModel]) -> dict[str, str]:
    """The `Attributes:` of the docstrings of a class and of those that it inherits from, by name."""
    return {name: text for one in reversed(cls.__mro__) if one not in BaseModel.__mro__ for name, text in _own(one).items()}


def _own(cls: type[BaseModel]) -> dict[str, str]:
    doc = inspect.cleandoc(cls.__doc__ or "")
    section = re.search(r"Attributes:\n((?:    .*\n?|\n)*)", doc)
    found: dict[str, str] = {}
    for line in section[1].splitlines() if section else []:
        begin = re.match(r"    (\w+): (.*)", line)
        if begin:
            name = begin[1]
            found[name] = begin[2]
        elif line.strip():
            found[name] += " " + line.strip()
    return found


def _kind(field: FieldInfo) -> str:
    limits = {Ge: "at least {0.ge}", Gt: "more than {0.gt}", Le: "at most {0.le}", Lt: "less than {0.lt}"}
    given = [(limit, getattr(limit, type(limit).__name__.lower())) for limit in field.metadata if type(limit) in limits]
    words = [limits[type(limit)].format(limit) for limit, value in given if abs(value) < _NO_MEANING]
    return _cell(" ".join([_type(field.annotation), ", ".join(words)]).strip())


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        base, *limits = get_args(annotation)
        positive = any(isinstance(limit, Gt) for limit in limits)
        return ("positive " if positive else "") + _type(base)
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_type(inner) for inner in get_args(annotation))
    if get_origin(annotation) is tuple:
        inner = get_args(annotation)
        return f"list of {_type(inner[0])}" if inner[-1] is Ellipsis else f"{len(inner)} of {_type(inner[0])}"
    if annotation is types.NoneType:
        return "none"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "group"
    return {int: "integer", float: "number", bool: "true, false", str: "text"}[annotation]


def _value(default: Any) -> str:
    if isinstance(default, BaseModel):
        return "its defaults"
    if isinstance(default, tuple):
        return "[" + ", ".join(map(_value, default)) + "]"
    if default is None or isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").strip()


if __name__ == "__main__":
    main()
