"""Every attention backend has what the protocol has, and those who run on a backend ask it for nothing else."""

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from yoco_u.model.backend import AttentionBackend

PACKAGE = Path(__file__).parents[2] / "yoco_u"
PROTOCOL = {name: member for name, member in vars(AttentionBackend).items() if not name.startswith("_")}
METHODS = [name for name, member in PROTOCOL.items() if inspect.isfunction(member)]

BACKENDS = [
    "yoco_u.model.backend.PaddedBackend",
    "yoco_u.inference.paged_backend.PagedBackend",
    "yoco_u.inference.gpu_backend.DecodeBackend",
    "yoco_u.inference.gpu_backend.GpuBackend",
    pytest.param(
        "yoco_u.integrations.vllm.backend.VllmBackend",
        marks=pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    ),
]

CALLERS = ["model/blocks.py", "model/modeling.py", "inference/prepacking.py"]
VLLM_CALLERS = ["integrations/vllm/blocks.py"]


def test_the_protocol_is_what_backends_are_asked_for() -> None:
    assert set().union(*(asked_for(file) for file in CALLERS)) == set(PROTOCOL)
    assert set(METHODS) == set(PROTOCOL) - {"has_cache"}


@pytest.mark.parametrize("file", CALLERS + VLLM_CALLERS)
def test_nothing_but_the_protocol_is_asked_for(file: str) -> None:
    found = asked_for(file)
    assert found, f"{file} asks no backend for anything: the test does not see how it names one"
    assert found <= set(PROTOCOL)


@pytest.mark.parametrize("path", BACKENDS)
def test_backend_has_all_of_the_protocol(path: str) -> None:
    module, name = path.rsplit(".", 1)
    backend: Any = getattr(importlib.import_module(module), name)
    assert AttentionBackend in backend.__mro__
    assert not inspect.isabstract(backend)
    assert hasattr(backend, "has_cache")
    for method in METHODS:
        assert parameters(getattr(backend, method)) == parameters(PROTOCOL[method]), method


def test_nobody_asks_which_backend_it_is() -> None:
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            is_check = isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass", "type")
            if is_check or isinstance(node, ast.MatchClass):
                assert "Backend" not in ast.unparse(node), f"{file}:{node.lineno}"


def test_the_reader_of_callers_follows_backends_into_loops() -> None:
    code = """
def forward(x, backend: AttentionBackend):
    x = other.unknown(x)
    tokens, inner = backend.in_loop(1) if x else (None, backend)
    return inner.rotate(x)
"""
    assert attributes(ast.parse(code)) == {"in_loop", "rotate"}


def asked_for(file: str) -> set[str]:
    return attributes(ast.parse((PACKAGE / file).read_text(encoding="utf-8")))


def attributes(tree: ast.Module) -> set[str]:
    """Names that functions take from their backends."""
    found = set()
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        names = set(backends_of(function))
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
                found.add(node.attr)
    return found


def backends_of(function: ast.FunctionDef) -> Iterator[str]:
    """Names of a function's backends: arguments of such a type, and what `in_loop` and `kept` return as their second value."""
    for argument in function.args.args:
        if argument.annotation is not None and ast.unparse(argument.annotation) in ("AttentionBackend", "VllmBackend"):
            yield argument.arg
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            called = {inner.attr for inner in ast.walk(node.value) if isinstance(inner, ast.Attribute)}
            if called & {"in_loop", "kept"}:
                yield ast.unparse(node.targets[0].elts[1])


def parameters(method: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]
