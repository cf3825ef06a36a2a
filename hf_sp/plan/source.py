"""Whether a module is written like a form: the normalised syntax tree of its forward's source.

Docstrings and annotations go, local names and attributes of self are numbered, global names become
the object they mean, casts are spelled alike. No code of the model is run.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import textwrap
from collections.abc import Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import generic, import_utils

Match = tuple[str, dict[str, str]]
"""Name of a form and, for each attribute of self in it, what the class calls that."""


def known(module: nn.Module, forms: Mapping[str, str], *, bound: bool = False) -> Match | None:
    """The form of a module on which nothing is put over what its class says.

    Forms are texts of a forward, and of the methods that it calls on self, by name. With ``bound``
    a method that is bound to the module is taken as its class's forward.
    """
    cls, own = type(module), module.__dict__.get("forward")
    if bound and isinstance(own, MethodType) and own.__self__ is module:
        own = own.__func__
    elif own is not None:
        return None
    found = known_class(cls, forms, own)
    for name in found[1].values() if found else ():
        of_class = inspect.getattr_static(cls, name, None)
        if of_class is not None and (name in module.__dict__ or type(of_class) is not FunctionType):
            return None  # a method put on the instance, or a property
    return found


def known_class(
    cls: type[nn.Module], forms: Mapping[str, str], forward: Any = None
) -> Match | None:
    """The form of a class's forward, or of another one, and of the methods it calls on self."""
    todo, trees, names = [_unwrapped(forward or cls.forward)], [], []
    for method in todo:  # grows
        normal = _of_function(method)
        if normal is None:
            return None
        trees.append(normal[0])
        names += normal[1]
        called = [inspect.getattr_static(cls, name, None) for name in normal[1]]
        todo += [m for m in called if type(m) is FunctionType and m not in todo]
    for form, source in forms.items():
        wanted, roles = _of_form(source)
        if wanted == trees and len(roles) == len(names):
            pairs = set(zip(roles, names, strict=True))
            if len(pairs) == len(set(roles)) == len(set(names)):
                return form, dict(pairs)
    return None


@functools.cache
def _of_form(source: str) -> tuple[list[str], list[str]]:
    meaning: dict[str, Any] = {"torch": torch, "nn": nn, "F": F}
    meaning["maybe_autocast"] = getattr(generic, "maybe_autocast", None)
    meaning["is_torch_greater_or_equal"] = import_utils.is_torch_greater_or_equal
    normal = [_normalised(tree, meaning) for tree in ast.parse(source).body]
    return [tree for tree, _ in normal], [name for _, names in normal for name in names]


def _unwrapped(function: Any) -> Any:
    """Without transformers' choice of an experts implementation, all of which compute the same."""
    wrapped = getattr(function, "__wrapped__", None)
    of = getattr(function, "__globals__", {}).get("__name__", "")
    return wrapped if wrapped is not None and of == "transformers.integrations.moe" else function


@functools.cache
def _of_function(function: Any) -> tuple[str, list[str]] | None:
    # What decorates a function or is closed over is not in its text.
    plain = type(function) is FunctionType and not hasattr(function, "__wrapped__")
    # ``super()`` closes over its class; only the form of an embedding has it.
    if not plain or {*function.__code__.co_freevars} - {"__class__"}:
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, SyntaxError):
        return None
    method = isinstance(tree, ast.FunctionDef) and tree.args.args
    return _normalised(tree, function.__globals__) if method else None


def _normalised(tree: Any, meaning: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The tree of a method as text, and its attributes of self in the order of first use."""
    normaliser = _Normaliser(tree, meaning)
    tree.name, tree.returns = "f", None
    normaliser.visit(tree)
    return ast.dump(tree), list(normaliser.attributes)


class _Normaliser(ast.NodeTransformer):
    def __init__(self, tree: ast.FunctionDef, meaning: Mapping[str, Any]) -> None:
        self.me, self.meaning = tree.args.args[0].arg, meaning
        nodes = list(ast.walk(tree))
        names = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self.local = names | {n.arg for n in nodes if isinstance(n, ast.arg)}
        self.numbers: dict[str, str] = {}
        self.attributes: dict[str, str] = {}

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(self._number(node.arg))

    def visit_Name(self, node: ast.Name) -> Any:
        if node.id in self.local:
            return ast.Name(self._number(node.id), node.ctx)
        return self._object(node) or node

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        if isinstance(node.value, ast.Name) and node.value.id == self.me:
            if node.attr != "training":
                number = f"a{len(self.attributes)}"
                node.attr = self.attributes.setdefault(node.attr, number)
            return self.generic_visit(node)
        return self._object(node) or self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> Any:
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        return node.value and self.visit(ast.Assign([node.target], node.value))

    def visit_Call(self, node: ast.Call) -> Any:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute):
            match node.func.attr, node.args, node.keywords:
                case "float", [], []:
                    node.args = [ast.Name(f"@{id(torch.float32)}", ast.Load())]
                case "type_as", [other], []:
                    node.args = [ast.Attribute(other, "dtype", ast.Load())]
                case "type", [_], []:
                    pass
                case _:
                    return node
            node.func.attr = "to"
        return node

    def _number(self, name: str) -> str:
        return self.numbers.setdefault(name, f"v{len(self.numbers)}")

    def _object(self, node: ast.expr) -> ast.Name | None:
        """What a global name, or a name in a module, means."""
        first, *rest = ast.unparse(node).split(".")
        if not first.isidentifier() or first in self.local:
            return None
        found = self.meaning.get(first, getattr(builtins, first, None))
        for name in rest:
            found = getattr(found, name, None) if isinstance(found, ModuleType) else None
        return None if found is None else ast.Name(f"@{id(found)}", ast.Load())
