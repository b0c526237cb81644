"""The classes that the modelling files have in the place of pydantic's build and check configs as the package does."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from models import EVERYTHING, EXPERTS, PRESETS, architecture

from yoco_u.architecture import SIZES, Architecture, preset
from yoco_u.config import parse
from yoco_u.errors import UserError
from yoco_u.model.remote_code import write_modelling_files

CASES = {
    **{f"{name} {size}": preset(name, size) for name in PRESETS for size in SIZES},
    "everything": architecture("yoco_u", **EVERYTHING),
    "experts": architecture("yoco_u", experts=EXPERTS),
    "llama3": architecture("transformer", rotary_scaling={"type": "llama3", "factor": 8.0, "original_length": 64}),
}
WRONG: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2, 1.5, 3.0, 2**31, 2**64, 1e39, float("inf"), float("nan"), "x", [], {}, [1], {"layers": 1},
    {"type": "linear"}, {"type": "linear", "factor": 2}, {"type": "yarn", "factor": 2.0, "original_length": 8, "low_turns": 9},
    {"streams": 1}, {"streams": 2, "smoothing": 1}, {"intermediate_size": 8, "num_experts": 2}, EXPERTS | {"shared_experts": 0},
    EXPERTS | {"shared_experts": -1}, [{"attention": "full", "layers": 2}], [{"attention": "full", "layers": 2, "loops": 2.0}],
    [{"attention": "other", "layers": 2}], [{"attention": "full", "layers": 2, "loop_gate": 0.5}],
    [{"attention": "full", "layers": 2, "loops": True}], ({"attention": "full", "layers": 2, "loops": 2, "loop_gate": 0},),
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The modelling files as a package."""
    place = tmp_path_factory.mktemp("files")
    (place / "modelling_files").mkdir()
    write_modelling_files(place / "modelling_files")
    sys.path.insert(0, str(place))
    yield lambda name: importlib.import_module(f"modelling_files.{name}")
    sys.path.remove(str(place))
    for name in [name for name in sys.modules if name.startswith("modelling_files")]:
        del sys.modules[name]


def built(stages: ModuleType, stand_ins: ModuleType, data: dict[str, Any]) -> Any:
    try:
        return stand_ins.parse(stages.Architecture, data, "x").model_dump()
    except ValueError as error:
        assert type(error).__name__ == "UserError" and "\n" not in str(error)
        return "refused"


def test_every_architecture_is_the_same(files: Any) -> None:
    stages, stand_ins = files("yoco_u_architecture_stages"), files("yoco_u_model_stand_ins")
    assert "pydantic" not in Path(stages.__file__).read_text()
    for name, arch in CASES.items():
        plain = arch.model_dump(mode="json")
        made = stand_ins.parse(stages.Architecture, plain, "x")
        assert made.model_dump() == plain, name
        assert made == stand_ins.parse(stages.Architecture, made.model_dump(), "x")
        assert made.slots() == arch.slots() and made.unrolled_layers == arch.unrolled_layers
        for loops in (1, 2, 256):
            assert made.with_loops(loops).model_dump() == arch.with_loops(loops).model_dump(mode="json"), name
        with pytest.raises(AttributeError):
            made.window = 3
        for other in PRESETS:
            assert files("yoco_u_architecture_presets").preset(other, "test").model_dump() == preset(other, "test").model_dump(
                mode="json"
            )


@pytest.mark.parametrize("field", [*Architecture.model_fields, "hidden_sizes", "preset"])
def test_what_the_package_refuses_is_refused(files: Any, field: str) -> None:
    stages, stand_ins = files("yoco_u_architecture_stages"), files("yoco_u_model_stand_ins")
    good = architecture("transformer").model_dump(mode="json")
    for value in WRONG:
        data = good | {field: value}
        try:
            expected = parse(Architecture, data, "x").model_dump(mode="json")
        except UserError:
            expected = "refused"
        if field in ("rope_cross", "attention_bias", "qk_norm", "tie_word_embeddings") and not isinstance(value, bool):
            expected = "refused"  # pydantic reads 0, 1 and some texts as well, which nothing of ours writes
        assert built(stages, stand_ins, data) == expected, value
    del data[field]
    if field in good:
        without = built(stages, stand_ins, data)
        assert (without == "refused") == Architecture.model_fields[field].is_required()
