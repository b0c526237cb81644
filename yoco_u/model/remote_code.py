"""The modelling files: the model as source code that lies beside its weights, for programs without this package.

transformers runs such files with `trust_remote_code=True`. They lie in one folder, import one another by relative imports, and
here need nothing but torch and transformers. They are cut from the package's own modules: of each module whatever the classes
of `AUTO_MAP` need, unchanged but for the imports. Our own loading never runs them.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from sys import stdlib_module_names

from yoco_u.version import __version__

AUTO_MAP = {
    "AutoConfig": "yoco_u_model_configuration.YocoUConfig",
    "AutoModel": "yoco_u_model_modeling.YocoUModel",
    "AutoModelForCausalLM": "yoco_u_model_modeling.YocoUForCausalLM",
}
"""In `config.json`: which class of which file each Auto class of transformers takes."""

_ENTRIES = (
    ("yoco_u.model.configuration", "YocoUConfig"),
    ("yoco_u.model.modeling", "YocoUModel"),
    ("yoco_u.model.modeling", "YocoUForCausalLM"),
)
_THERE = frozenset({"torch", "transformers", "safetensors", "huggingface_hub", *stdlib_module_names})
"""What may be imported; huggingface_hub comes with transformers."""

_STAND_INS = "yoco_u.model.stand_ins"
_REPLACED = ("pydantic", "yoco_u.config")
"""Modules whose names are taken from `_STAND_INS` where that has them."""

_LEFT_OUT = frozenset({"_expand_preset", "register_for_auto_class", "save_pretrained"})
"""Methods for the package alone: presets in config files, and the writing of modelling files, which transformers copies."""

_HEAD = """\
# Of yoco-u {version}, the open implementation of Universal YOCO (arXiv 2604.01220): from {source}
# what a model needs. Made by `yoco-u convert --remote-code` for programs without the package, and not meant to be edited.
# Copyright (c) 2026 The yoco-u developers. SPDX-License-Identifier: MIT
"""


@cache
def modelling_files() -> dict[str, str]:
    """The text of each modelling file by its name.

    Raises:
        RuntimeError: if the model has come to need another package than torch and transformers.
    """
    parts: dict[str, _Part] = {}
    waiting = list(_ENTRIES)
    while waiting:
        module, name = waiting.pop()
        part = parts.setdefault(module, _Part(_read(module)))
        waiting += part.need(name)
    files = {f"{_file(part.module.name)}.py": part.text() for part in parts.values()}
    for name, text in files.items():
        if foreign := set(_imported(ast.parse(text))) - _THERE:
            raise RuntimeError(f"{name} imports {', '.join(sorted(foreign))}, which programs without yoco-u may not have")
    return files


def write_modelling_files(folder: Path) -> None:
    """Write the modelling files into a folder with a model."""
    for name, text in modelling_files().items():
        (folder / name).write_text(text, encoding="utf-8")


@dataclass
class _Statement:
    """A statement of a module, with the comments before it and a docstring behind it.

    Attributes:
        first, last: its lines, from 0, `last` exclusive.
        names: what it defines.
        registers: what it belongs to, which it changes or is called by, such as an operator whose gradient it gives.
    """

    node: ast.stmt
    first: int
    last: int
    names: set[str]
    registers: str | None = None


@dataclass(frozen=True)
class _Module:
    """A module of the package: its text, its top-level statements without imports, and where its imported names come from."""

    name: str
    lines: list[str]
    docstring: ast.Constant | None
    statements: list[_Statement]
    imports: dict[str, tuple[str, str | None]]
    """Module and name by the name here; the name is None for `import module`."""


@dataclass
class _Part:
    """The part of a module that is needed."""

    module: _Module
    kept: set[int] = field(default_factory=set)
    imported: set[str] = field(default_factory=set)
    known: set[str] = field(default_factory=set)

    def need(self, name: str) -> Iterator[tuple[str, str]]:
        """Keep what defines a name and what that uses in this module; yield what it uses in others: module and name."""
        if name in self.known:
            return
        self.known.add(name)
        if name in self.module.imports:
            self.imported.add(name)
            home = _home(*self.module.imports[name])
            if home is not None:
                yield home
            return
        found = [n for n, one in enumerate(self.module.statements) if name in one.names or name == one.registers]
        if not any(name in self.module.statements[n].names for n in found):
            return  # a builtin or a local name
        for number in found:
            self.kept.add(number)
            for used in _uses(self.module.statements[number].node):
                yield from self.need(used)

    def text(self) -> str:
        module = self.module
        paragraphs = [_HEAD.format(version=__version__, source=module.name.replace(".", "/") + ".py")]
        if module.docstring is not None:
            paragraphs.append("\n".join(module.lines[: module.docstring.end_lineno]) + "\n")
        paragraphs += ["\n".join(lines) + "\n" for lines in self._imports() if lines]
        after_block = False
        for number in sorted(self.kept):
            statement = module.statements[number]
            gone = set(_left_out(statement.node))
            lines = [module.lines[at] for at in range(statement.first, statement.last) if at not in gone]
            is_block = isinstance(statement.node, (ast.FunctionDef, ast.ClassDef))
            space = "\n" if is_block or after_block else ""
            paragraphs.append(space + "\n".join(lines).strip("\n") + "\n")
            after_block = is_block
        return "\n".join(paragraphs)

    def _imports(self) -> tuple[list[str], list[str]]:
        """The lines that import from other packages, and from other files: one line each, as transformers, which looks for the
        files, expects it."""
        modules: list[str] = []
        theirs: dict[str, list[str]] = {}
        ours: dict[str, list[str]] = {}
        for name in sorted(self.imported):
            module, original = self.module.imports[name]
            home = _home(module, original)
            if original is None:
                modules.append(f"import {_aliased(module, name)}")
            elif home is None:
                theirs.setdefault(module, []).append(_aliased(original, name))
            else:
                ours.setdefault(f".{_file(home[0])}", []).append(_aliased(home[1], name))
        lines = [[f"from {file} import {', '.join(names)}" for file, names in sorted(d.items())] for d in (theirs, ours)]
        return sorted(modules) + lines[0], lines[1]


@cache
def _read(name: str) -> _Module:
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None
    text = Path(spec.origin).read_text(encoding="utf-8")
    body = ast.parse(text).body
    module = _Module(name, text.splitlines(), None, [], {})
    end = 0
    for node in body:
        assert node.end_lineno is not None
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                source = (alias.name, None) if isinstance(node, ast.Import) else (str(node.module), alias.name)
                module.imports[alias.asname or alias.name.split(".")[0]] = source
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if module.statements:
                module.statements[-1].last = node.end_lineno
            else:
                module = _Module(name, module.lines, node.value, module.statements, module.imports)
        else:
            names, registers = _defines(node)
            module.statements.append(_Statement(node, end, node.end_lineno, names, registers))
        end = node.end_lineno
    return module


def _defines(node: ast.stmt) -> tuple[set[str], str | None]:
    """The names that a statement defines, and what it registers, or registers itself with.

    It does so by a decorator `@operator.register_fake`, by a call, or by `REGISTRY[...] = it.__name__`.
    """
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        for decorator in node.decorator_list:
            if node.name == "_":
                return set(), _root(decorator)
        return {node.name}, None
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return set(), _root(node.value)
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
        return set(), _root(node.value)
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)}, None


def _root(node: ast.expr) -> str | None:
    """`operator` of `operator.register(...)`."""
    while isinstance(node, (ast.Call, ast.Attribute)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def _uses(node: ast.stmt) -> set[str]:
    """Every name in a statement, those in annotations that are texts included, but not those of methods that are left out."""
    found: set[str] = set()
    waiting: list[ast.AST] = [node]
    while waiting:
        one = waiting.pop()
        if isinstance(one, ast.FunctionDef) and one.name in _LEFT_OUT:
            continue
        if isinstance(one, ast.Name):
            found.add(one.id)
        for annotation in (getattr(one, "annotation", None), getattr(one, "returns", None)):
            for text in ast.walk(annotation) if annotation is not None else ():
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    waiting.append(ast.parse(text.value, mode="eval"))
        waiting += ast.iter_child_nodes(one)
    return found


def _left_out(node: ast.stmt) -> Iterator[int]:
    """The lines, from 0, of a class's methods that are left out, each with the blank line before it."""
    for method in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(method, ast.FunctionDef) and method.name in _LEFT_OUT:
            first = min([method.lineno, *(one.lineno for one in method.decorator_list)])
            yield from range(first - 2, method.end_lineno or first)


def _home(module: str, name: str | None) -> tuple[str, str] | None:
    """The module that defines a name which `module` has, perhaps by an import; None for one of another package."""
    if name is None:
        return None
    replaced = module.startswith(_REPLACED)
    if replaced and any(name in one.names for one in _read(_STAND_INS).statements):
        return _STAND_INS, name
    if not module.startswith("yoco_u"):
        return None
    imports = _read(module).imports
    return _home(*imports[name]) if name in imports else (module, name)


def _imported(tree: ast.AST) -> Iterator[str]:
    """The packages that a module imports, wherever in it, but not by relative imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).split(".")[0]


def _aliased(name: str, here: str) -> str:
    return name if name == here else f"{name} as {here}"


def _file(module: str) -> str:
    return module.replace(".", "_")
