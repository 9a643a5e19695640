"""What serving frameworks look like to a plug-in: recorded shapes of their classes, or the classes of a wheel.

A wheel is one that is unpacked in the folder that `LITE_ATTENTION_SGLANG` or `LITE_ATTENTION_VLLM_OMNI` names. Of it
the modules that plug-ins meet are real; what these import besides, and no CPU has, is a stub.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

__all__ = ["Module", "folder", "install", "kinds", "logger", "parameters", "source_parameters", "stub"]

Module = ModuleType


def folder(variable: str) -> Path | None:
    """Return the folder that an environment variable names."""
    return Path(os.environ[variable]) if variable in os.environ else None


def kinds(variable: str) -> list[str]:
    """Return which hosts there are to test against."""
    return ["recorded"] if folder(variable) is None else ["recorded", "wheel"]


def stub(name: str, **content: Any) -> Module:
    """Return a module of that name that holds this."""
    module = ModuleType(name)
    module.__dict__.update(content)
    return module


def install(
    patch: pytest.MonkeyPatch,
    package: str,
    root: Path | None,
    modules: Iterable[Module],
    adapter: str,
    bare: Iterable[str] = (),
) -> None:
    """Put a host on `sys.modules`, until the test ends.

    Args:
        patch: of the test.
        package: the host's name.
        root: where its wheel is; None = `modules` are all there is.
        modules: recorded ones, or stubs.
        adapter: the module that is to be imported anew, since it holds the host's classes.
        bare: packages of the wheel that find their files, but whose `__init__`, and all that it imports, is left out.
    """
    for name in [name for name in sys.modules if name.partition(".")[0] == package or name.startswith(adapter)]:
        patch.delitem(sys.modules, name)
    importlib.import_module(adapter.rpartition(".")[0])
    for name in bare:
        _put_package(patch, name, root)
    for module in modules:
        _put_package(patch, module.__name__.rpartition(".")[0], root)
        patch.setitem(sys.modules, module.__name__, module)
        _tell_parent(module.__name__)


def _put_package(patch: pytest.MonkeyPatch, name: str, root: Path | None) -> None:
    """Put a bare package there, and those above it."""
    if not name or name in sys.modules:
        return
    _put_package(patch, name.rpartition(".")[0], root)
    package = ModuleType(name)
    package.__path__ = [] if root is None else [str(root.joinpath(*name.split(".")))]
    patch.setitem(sys.modules, name, package)
    _tell_parent(name)


def _tell_parent(name: str) -> None:
    parent, _, child = name.rpartition(".")
    if parent and not hasattr(sys.modules[parent], child):
        setattr(sys.modules[parent], child, sys.modules[name])


class _Logger(logging.LoggerAdapter):  # type: ignore[type-arg]
    def info_once(self, *args: object) -> None:
        """Say nothing."""

    warning_once = info_once


def logger(name: str) -> logging.LoggerAdapter[Any]:
    """Return a logger as hosts have them."""
    return _Logger(logging.getLogger(name), {})


# ---- signatures ----------------------------------------------------------------------------------------------------


def parameters(function: Callable[..., Any]) -> list[str]:
    """Return the names of a function's parameters, with * before those of any number."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    function = inspect.unwrap(getattr(function, "__func__", function))
    return [stars.get(p.kind, "") + p.name for p in inspect.signature(function).parameters.values()]


def source_parameters(root: Path, path: str, name: str) -> list[str]:
    """Return the same of a function, or of Class.method, in the source of a wheel."""
    body: list[ast.stmt] = ast.parse((root / path).read_text(encoding="utf-8")).body
    found: ast.stmt | None = None
    for part in name.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef)
        found = next((node for node in body if isinstance(node, kinds) and node.name == part), None)
        assert found is not None, f"{path} has no {name}"
        body = found.body
    assert isinstance(found, ast.FunctionDef)
    args = found.args
    names = [arg.arg for arg in (*args.posonlyargs, *args.args)]
    names += [f"*{args.vararg.arg}"] if args.vararg else []
    names += [arg.arg for arg in args.kwonlyargs]
    return names + ([f"**{args.kwarg.arg}"] if args.kwarg else [])
