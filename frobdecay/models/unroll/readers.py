"""Who reads attributes of a layer, by the bytecode of what a forward pass can run.

A chain of layers lacks attributes that the layer had, such as its weight. Nobody may read those.
Looked at are the ``forward`` of every module, its hooks, and the functions, methods and properties
that these name, and so on:

    self.fc.weight                           a read of a module that is known
    layer.weight, getattr(…, "weight")       a read of a module that is not: any that got about
    helper(self.fc), for f in self.fcs       how one gets about: it is a value, not called at once
    isinstance(layer, nn.Linear)             asks one that got about whether it is a chain

What got about and may be read is taken for read. Code that is not Python is not looked at.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import operator
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from frobdecay.models.unroll.bytecode import Load, loads
from frobdecay.models.unroll.chains import lacking

# Ways of a module to those inside that are no attributes of it.
_INSIDE = {"children", "modules", "named_children", "named_modules", "get_submodule"}
_INSIDE |= {"get_parameter", "_modules", "__dict__", "apply", "__getattr__"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FOREIGN = {"builtins", "torch", "numpy", *sys.stdlib_module_names}  # their functions see no layers
_OF_EVERY_MODULE = {*dir(nn.Module)} - {"forward", "__call__"}
_COMPUTED = (property, functools.cached_property)
_UNKNOWN = object()


class _Code:
    """What the code of a model loads, followed from the forward methods and hooks on.

    Attributes:
        own: type of modules -> loads from ``self``.
        fixed: id of a module -> loads from it as a global or enclosing variable.
        loose: attribute -> where it is read of what is not known, and the name of that, if any.
        asked: types of modules that are named, and where.
        computed: names of properties.
    """

    def __init__(self, modules: Iterable[nn.Module], hooks: Iterable[Any]) -> None:
        self.own: dict[type, list[Load]] = defaultdict(list)
        self.fixed: dict[int, list[Load]] = defaultdict(list)
        self.loose: dict[str, list[tuple[str, str]]] = defaultdict(list)
        self.asked: dict[type, str] = {}
        # What instances and classes have, until somebody names it.
        self._values: dict[str, list[Any]] = defaultdict(list)
        self._named: dict[str, list[type]] = defaultdict(list)
        self.computed: set[str] = set()
        self._met = {"forward", "__call__"}
        self._seen: set[object] = set()
        self._waiting: list[tuple[FunctionType, type | None]] = []
        for hook in hooks:
            self._follow(hook, None)
        for module in modules:
            self._add(type(module))
            for name, value in vars(module).items():
                self._values[name].append(value)
                if name in self._met:
                    self._meet(name)
                if not _foreign(type(value)):
                    self._add(type(value))
        while self._waiting:
            function, kind = self._waiting.pop()
            self.strings((function.__defaults__, function.__kwdefaults__), function.__qualname__)
            for load in loads(function.__code__):
                self._take(load, function, kind)

    def _add(self, kind: type) -> None:
        """Take in a type: its methods are followed once they are named."""
        if kind in self._seen:
            return
        self._seen.add(kind)
        for name in {*dir(kind)} - _OF_EVERY_MODULE:
            if isinstance(inspect.getattr_static(kind, name), _COMPUTED):
                self.computed.add(name)
            self._named[name].append(kind)
            if name in self._met or (name == "__init__" and not issubclass(kind, nn.Module)):
                self._meet(name)

    def _meet(self, name: str) -> None:
        self._met.add(name)
        for value in self._values.pop(name, ()):
            self._follow(value, None)
        for kind in self._named.pop(name, ()):
            for base in kind.__mro__:
                if base is not nn.Module:
                    self._follow(vars(base).get(name), kind)

    def _follow(self, found: Any, kind: type | None) -> None:
        """Look at the Python functions that an attribute runs, those of a type if given."""
        match found:
            case FunctionType():
                own = found.__module__ == parametrize.__name__  # its property's, of other weights
                if own or (found.__code__, kind) in self._seen:
                    return
                if kind is None and _foreign(found):
                    return
                self._seen.add((found.__code__, kind))
                self._waiting.append((found, kind))
                for inside in (getattr(found, "__wrapped__", None), *_enclosed(found).values()):
                    if isinstance(inside, FunctionType):
                        method = inside.__code__.co_varnames[:1] == found.__code__.co_varnames[:1]
                        wraps = inside is getattr(found, "__wrapped__", None)
                        self._follow(inside, kind if method or wraps else None)
                    else:
                        self._follow(inside, None)
            case MethodType() | staticmethod() | classmethod():
                self._follow(found.__func__, None)
            case functools.partial() | functools.cached_property() | functools.partialmethod():
                self.strings(found, "a partial")
                self._follow(found.func, kind if not isinstance(found, functools.partial) else None)
            case property():
                self._follow(found.fget, kind)
            case operator.attrgetter():
                self.strings(found, "an attrgetter")

    def _take(self, load: Load, function: FunctionType, kind: type | None) -> None:
        for name in {*load.names[1:]} - self._met:
            self._meet(name)
        of_self = load.names[0] in function.__code__.co_varnames[:1] and load.local
        if of_self and kind is not None and issubclass(kind, nn.Module):
            self.own[kind].append(load)
            return
        found = _UNKNOWN if load.local else _global(function, load.names)
        if not load.local:
            self.fixed[id(_global(function, load.names[:1]))].append(load)
        self.strings(found, load.where)
        if found is _UNKNOWN:
            self.note(load.names, load.where)
        elif not isinstance(found, type):
            self._follow(found, None)
        elif issubclass(found, nn.Module):
            self.asked.setdefault(found, load.where)
        elif not _foreign(found):
            self._add(found)

    def note(self, names: tuple[str, ...], where: str) -> None:
        """Note a read of what is not known."""
        if len(names) > 1:
            self.loose[names[-1]].append((names[-2] if len(names) > 2 else "", where))

    def strings(self, value: Any, where: str) -> None:
        """Note strings, which may name attributes."""
        for each in _inside(value):
            if isinstance(each, str):
                self.note(("", *each.split(".")), where)


class Readers:
    """The readers of all modules of a model.

    Args:
        model: its root; each of its modules and their types is looked at once.
        layers: those in question, which go away with all inside of them; their hooks stay.
    """

    def __init__(self, model: nn.Module, layers: Iterable[nn.Module]) -> None:
        gone = {id(inside) for layer in layers for inside in layer.modules()}
        walk = model.named_modules()
        modules = {p: m for p, m in walk if not isinstance(m, torch.jit.ScriptModule)}
        hooks = [hook for module in modules.values() for hook in _hooks(module)]
        self._code = _Code([m for m in modules.values() if id(m) not in gone], hooks)
        self._names: dict[int, set[str]] = defaultdict(set)  # in the modules around it
        self._reads: dict[int, list[tuple[str, str]]] = defaultdict(list)
        self._kept: dict[int, str] = {}
        self._about: set[int] = set()
        self._held = {name for module in modules.values() for name in module._modules}
        for path, module in modules.items():
            for name, child in module._modules.items():
                self._names[id(child)].add(name)
            if any(True for _ in _hooks(module)):
                self._about.add(id(module))
            for one in self._look_at(path, module, id(module) in gone):
                if id(one) not in self._about:
                    self._about |= {id(below) for below in one.modules()}

    def reason(self, layer: nn.Module) -> str | None:
        """Say who may read an attribute that a layer's chain is going to lack, if anybody."""
        lacks = lacking(layer)
        for attribute, said in self._reads[id(layer)]:
            if attribute in lacks:
                return said
        if id(layer) in self._kept or id(layer) not in self._about:
            return self._kept.get(id(layer))
        for attribute in filter(lacks.__contains__, self._code.loose):
            for name, where in self._code.loose[attribute]:
                # The name of a property says nothing of where a layer is held.
                known = name in self._held and name not in self._code.computed
                if not known or name in self._names[id(layer)]:
                    return f"{where} may read its {attribute}"
        asked = (where for kind, where in self._code.asked.items() if isinstance(layer, kind))
        return next((f"{where} may ask for its type" for where in asked), None)

    def _look_at(self, path: str, module: nn.Module, gone: bool) -> Iterator[nn.Module]:
        """Note what code reads from a module, its own too if it stays; give what gets about."""
        own = () if gone else self._code.own[type(module)]
        for load in (*own, *self._code.fixed[id(module)]):
            if len(load.names) == 1:
                yield module
                continue
            *way, last = load.names[1:]
            target = _found(module, way)
            if target is _UNKNOWN:
                self._code.note(("", *way, last), load.where)
            elif isinstance(target, nn.Module):
                said = f"its {type(module).__name__} reads {'.'.join(load.names[1:])} itself"
                said = said if load in own else f"{load.where} reads {'.'.join(load.names)}"
                self._reads[id(target)].append((last, said))
                if last in _INSIDE:
                    yield target
            if load.value:
                found = _found(module, load.names[1:])
                self._code.strings(found, load.where)
                yield from _held(found)
        if not gone and "_orig_mod" not in module._modules:  # torch.compile's wrapper is made anew
            for name, value in vars(module).items():
                for held in _held(value) if name != "_modules" else ():
                    at = f"{path}.{name}".lstrip(".")
                    self._kept[id(held)] = f"{at} holds it, too, and would go on with it"


def _foreign(found: Any) -> bool:
    return (getattr(found, "__module__", None) or "builtins").partition(".")[0] in _FOREIGN


def _hooks(module: nn.Module) -> Iterator[Any]:
    for name in _HOOKS:
        yield from vars(module).get(name, {}).values()


def _enclosed(function: FunctionType) -> dict[str, Any]:
    """The variables of enclosing functions."""
    held: dict[str, Any] = dict(inspect.getclosurevars(function).nonlocals)
    return held


def _global(function: FunctionType, names: tuple[str, ...]) -> Any:
    """What global or enclosing variables hold."""
    tables: list[Mapping[str, Any]] = [function.__globals__, vars(builtins)]
    if names[0] in function.__code__.co_freevars:
        tables.insert(0, _enclosed(function))
    found = next((table[names[0]] for table in tables if names[0] in table), _UNKNOWN)
    return _found(found, names[1:])


def _found(holder: Any, names: Iterable[str]) -> Any:
    """What attributes in turn lead to."""
    return functools.reduce(_attribute, names, holder)


def _attribute(holder: Any, name: str) -> Any:
    """What an attribute is, without running anything; None for what holds no modules."""
    if isinstance(holder, ModuleType | type):
        return inspect.getattr_static(holder, name, None)
    tables = [vars(holder) if hasattr(holder, "__dict__") else {}]
    if isinstance(holder, nn.Module):
        if name in holder._parameters or name in holder._buffers:
            return None
        tables.insert(0, holder._modules)
    elif holder is _UNKNOWN or not tables[0]:
        return holder if holder is _UNKNOWN else None
    for table in tables:
        if name in table:
            return table[name]
    found = inspect.getattr_static(type(holder), name, _UNKNOWN)
    unknown = isinstance(found, _COMPUTED)
    return _UNKNOWN if unknown or found is _UNKNOWN else (None if callable(found) else found)


def _held(value: Any) -> Iterator[nn.Module]:
    """The modules that a value gives access to."""
    return (each for each in _inside(value) if isinstance(each, nn.Module))


def _inside(value: Any) -> Iterator[Any]:
    """What a value holds that is no container, at any depth; itself if it is none."""
    waiting, met = [value], set[int]()
    for each in waiting:
        match each:
            case list() | tuple() | set() | frozenset():
                inside: Iterable[Any] = each
            case dict():
                inside = (*each, *each.values())
            case functools.partial() | functools.partialmethod():
                inside = (each.func, each.args, each.keywords)
            case operator.attrgetter():
                inside = each.__reduce__()[1]
            case MethodType():
                inside = (each.__self__,)
            case _:
                yield each
                continue
        if id(each) not in met:
            met.add(id(each))
            waiting += inside
