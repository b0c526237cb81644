"""The architecture that a source becomes, from the settings that users give."""

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
            `Architecture` that does not change the shape of the source's layers. A source with cross stages keeps its stages
            and the number of its global KVs unless they are given; another becomes a `yoco_u` with one. The window is 512
            unless given or known, T is 1, and loops beyond the first have closed gates.

    Raises:
        UserError: for an unknown setting, or one that the source's weights do not fit.
    """
    settings = dict(settings)
    for key in ("preset", "layers", "loops", "loop_gate"):
        if "stages" in settings and key in settings:
            raise UserError(f"{key} has no effect beside stages, which say everything; drop one of the two")
    if "loop_gate" in settings and not _gated(source, settings):
        raise UserError(
            "loop_gate is for loops that the source has not, but loops adds none; set loops above 1, or drop loop_gate"
        )
    if source.has_global_kv and not {"preset", "layers", "stages"} & settings.keys():
        settings["stages"] = [stage.model_dump() for stage in _with_loops(source, settings)]
        settings = {"window": source.window} | settings
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
        made = source.stages if stays else _stages(name, layers, settings)
        shape["stages"] = [stage.model_dump() for stage in made]
        if stays:
            settings = {"window": source.window} | settings
    for key in ("loops", "loop_gate"):
        settings.pop(key, None)
    shape |= settings
    stages = shape["stages"] if isinstance(shape["stages"], (list, tuple)) else []
    slides = any(isinstance(stage, dict) and stage.get("attention") == "sliding" for stage in stages)
    if slides and "window" not in settings:
        shape["window"] = min(WINDOW, source.window or WINDOW)
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


def _stages(name: str, layers: int, settings: dict[str, Any]) -> tuple[Stage, ...]:
    if name not in LOOPED:
        if looping := [key for key in ("loops", "loop_gate") if key in settings]:
            raise UserError(f"{name} has no loop, so {' and '.join(looping)} cannot be set")
        return STAGES[name](layers)
    loops = _loops(settings.get("loops", 1))
    try:
        return STAGES[name](layers, loops=loops, **({"loop_gate": settings.get("loop_gate", 0.0)} if loops > 1 else {}))
    except ValidationError as error:
        raise UserError(describe(Stage, error)) from None


def _gated(source: Architecture, settings: dict[str, Any]) -> bool:
    """Whether the settings make a loop that the source does not have, whose gates have an initial value."""
    keeps_stages = source.has_global_kv and not {"preset", "layers"} & settings.keys()
    return _loops(settings.get("loops", 1)) > 1 and not (keeps_stages and source.num_loops > 1)


def _with_loops(source: Architecture, settings: dict[str, Any]) -> tuple[Stage, ...]:
    """The source's stages; with another loop count, where one is set, and closed gates if it had none."""
    if "loops" not in settings:
        return source.stages
    loops = _loops(settings["loops"])
    stages = list(source.with_loops(loops).stages)
    for number, stage in enumerate(stages):
        if stage.loops > 1 and source.stages[number].loops == 1:
            stages[number] = stage.model_copy(update={"loop_gate": settings.get("loop_gate", 0.0)})
    return tuple(stages)


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
