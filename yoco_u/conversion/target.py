"""The architecture that a source becomes, from the settings that users give."""

from itertools import accumulate
from typing import Any

from pydantic import ValidationError

from yoco_u.architecture import LOOPED, STAGES, Architecture, Stage
from yoco_u.config import describe, did_you_mean, parse, shown
from yoco_u.errors import UserError

WINDOW = 512
PRESETS = tuple(name for name in STAGES if name not in ("yoco_retention", "deep", "deeper", "parscale"))
"""The presets whose blocks a Transformer's layers can become."""


def target_architecture(source: Architecture, settings: dict[str, Any]) -> Architecture:
    """The architecture that a source is converted to: its shapes in the stages of a preset.

    Args:
        source: the architecture of the source.
        settings: `preset`, `layers`, `loops` and `loop_gate` as of `yoco_u.architecture.preset`, and any field of
            `Architecture` that does not change the shape of the source's layers. A source that is no family's Transformer
            keeps its stages, window and number of global KVs unless they are given; another becomes a `yoco_u` with one global
            KV and a window of at most 512. T is the source's unless given. Layers that loop as they do in the source keep
            what gates their loops, or that nothing does; other loops have closed gates.

    Raises:
        UserError: for an unknown setting, or one that the source's weights do not fit.
    """
    settings = dict(settings)
    for key in ("preset", "layers", "loops", "loop_gate"):
        if "stages" in settings and key in settings:
            raise UserError(f"{key} has no effect beside stages, which say everything; drop one of the two")
    ours = source.has_global_kv or source.num_loops > 1 or len(source.stages) > 1
    if ours and not {"preset", "layers", "stages"} & settings.keys():
        made = source.with_loops(_loops(settings["loops"])).stages if "loops" in settings else source.stages
        settings["stages"] = [stage.model_dump() for stage in _with_gates(source, made, settings)]
    name = settings.pop("preset", "yoco_u")
    if not isinstance(name, str) or name not in PRESETS:
        raise UserError(f"unknown preset {shown(name)}: {did_you_mean(str(name), PRESETS)}")
    free = ("stages", "window", "global_kvs", "rope_cross")
    for key in settings.keys() - {*free, "layers", "loops", "loop_gate"}:
        raise UserError(f"{key} cannot be set in a conversion: {did_you_mean(key, (*free, 'preset', 'layers', 'loops'))}")
    layers = settings.pop("layers", sum(stage.layers for stage in source.stages))
    shape = source.model_dump() | ({} if source.has_global_kv else {"rope_cross": True, "global_kvs": 1})
    if "stages" not in settings:
        if not isinstance(layers, int) or not 2 <= layers < 2**31:
            raise UserError(f"layers is {shown(layers)}; expected a whole number of at least 2")
        stays = name == "transformer" and layers == sum(stage.layers for stage in source.stages) and _slides_alone(source)
        made = source.stages if stays else _with_gates(source, _stages(source, name, layers, settings), settings)
        shape["stages"] = [stage.model_dump() for stage in made]
        if stays:
            settings = {"window": source.window} | settings
    for key in ("loops", "loop_gate"):
        settings.pop(key, None)
    shape |= settings
    stages = shape["stages"] if isinstance(shape["stages"], (list, tuple)) else []
    slides = any(isinstance(stage, dict) and stage.get("attention") == "sliding" for stage in stages)
    if slides and "window" not in settings:
        shape["window"] = source.window if ours and source.window else min(WINDOW, source.window or WINDOW)
    elif not slides:
        shape["window"] = settings.get("window")
    if "rope_cross" not in settings and not any(isinstance(one, dict) and one.get("attention") == "cross" for one in stages):
        shape["rope_cross"] = False
    target = parse(Architecture, shape, "conversion")
    _check(source, target)
    return target


def _slides_alone(source: Architecture) -> bool:
    """Whether a source is the Transformer of a family whose layers all have a window."""
    return len(source.stages) == 1 and source.stages[0].attention == "sliding"


def _stages(source: Architecture, name: str, layers: int, settings: dict[str, Any]) -> tuple[Stage, ...]:
    if name not in LOOPED:
        if looping := [key for key in ("loops", "loop_gate") if key in settings]:
            raise UserError(f"{name} has no loop, so {' and '.join(looping)} cannot be set")
        return STAGES[name](layers)
    try:
        return STAGES[name](layers, loops=_loops(settings.get("loops", source.num_loops)))
    except ValidationError as error:
        raise UserError(describe(Stage, error)) from None


def _with_gates(source: Architecture, stages: tuple[Stage, ...], settings: dict[str, Any]) -> tuple[Stage, ...]:
    """The stages with the source's gates of loops over the same layers, and closed ones for loops that it does not have."""
    known = {span: one.loop_gate for span, number in spans(source.stages).items() if (one := source.stages[number]).loops > 1}
    looped = {number: span for span, number in spans(stages).items() if stages[number].loops > 1}
    if "loop_gate" in settings and known.keys() >= set(looped.values()):
        raise UserError(
            "loop_gate is for loops that the source has not, but loops adds none; set loops above 1, or drop loop_gate"
        )
    gates = {number: known.get(span, settings.get("loop_gate", 0.0)) for number, span in looped.items()}
    return tuple(
        stage.model_copy(update={"loop_gate": gates[number]}) if number in gates else stage
        for number, stage in enumerate(stages)
    )


def spans(stages: tuple[Stage, ...]) -> dict[range, int]:
    """The number of each stage, by its layers among all layers."""
    ends = list(accumulate(stage.layers for stage in stages))
    return {range(end - stage.layers, end): number for number, (stage, end) in enumerate(zip(stages, ends, strict=True))}


def _loops(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise UserError(f"loops is {shown(value)}; expected a whole number of at least 1")
    return value


def _check(source: Architecture, target: Architecture) -> None:
    """Raise a UserError unless every block of the target can take the place of one of the source."""
    theirs = [stage.attention for stage in source.stages for _ in range(stage.layers)]
    ours = [stage.attention for stage in target.stages for _ in range(stage.layers)]
    if source.parallel:
        raise UserError("parallel streams cannot be converted: their prefixes belong to full layers of one model")
    if len(ours) != len(theirs):
        raise UserError(f"the target has {len(ours)} layers, the source {len(theirs)}; each takes the place of one")
    for number, (before, after) in enumerate(zip(theirs, ours, strict=True)):
        softmax = ("full", "sliding")
        if not (before == after or (after == "cross" and before in softmax) or (after in softmax and before in softmax)):
            raise UserError(f"layer {number} is {before} in the source and {after} in the target; that cannot be converted")
    if "cross" in theirs and ours.index("cross") != theirs.index("cross"):
        raise UserError("the global KV must be written after the same layer as in the source")
