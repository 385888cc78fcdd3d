"""What code loads: variables, attributes of them, and strings, from its bytecode.

Bytecode is there where source is not, and says of an attribute whether it is called at once.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

_METHOD_FLAG = sys.version_info >= (3, 12)  # of LOAD_ATTR; before, there is LOAD_METHOD
_GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME")
_SUPER = "LOAD_SUPER_ATTR"  # of what super() gives, of which self before it is a part
_NO_USE = ("STORE_ATTR", "DELETE_ATTR")  # of a variable before them
_CONSTANT = ("LOAD_CONST", "RETURN_CONST")
_SKIPPED = ("CACHE", "EXTENDED_ARG", "KW_NAMES")  # the last holds a call's keywords
_KEYWORDS = ("CALL_KW", "CALL_FUNCTION_KW")  # of calls, which a tuple of strings before them names


@dataclass(frozen=True)
class Load:
    """A variable and attributes of it in turn, or a string that may name an attribute.

    Attributes:
        names: the variable's name ("" for what has none) and the attributes'; the parts of a string
            likewise.
        local: whether the variable belongs to the function, and is neither global nor enclosing.
        value: whether the last is used as a value: neither called at once nor read further.
        where: the function, for a message.
    """

    names: tuple[str, ...]
    local: bool
    value: bool
    where: str


def loads(code: CodeType, outer: tuple[str, ...] | None = None) -> Iterator[Load]:
    """All loads of a function, and of functions and comprehensions inside of it."""
    outer = code.co_freevars if outer is None else outer
    where = f"{getattr(code, 'co_qualname', code.co_name)} ({code.co_filename.rpartition('/')[2]})"
    names: tuple[str, ...] = ()
    local = called = False
    instructions = [i for i in dis.get_instructions(code) if i.opname not in _SKIPPED]
    for i, instruction in enumerate(instructions):
        op, argument = instruction.opname, instruction.argval
        if op in ("LOAD_ATTR", "LOAD_METHOD", _SUPER):
            if len(names) > 1:
                yield Load(names, local, False, where)
            names = () if op == _SUPER else names
            names, local = (*(names or ("",)), argument), local or not names
            called = op == "LOAD_METHOD" or (_METHOD_FLAG and bool((instruction.arg or 0) & 1))
            continue
        if len(names) > 1 or (names and op not in _NO_USE):
            yield Load(names, local, not called, where)
        names, local, called = (), False, False
        if op in _CONSTANT:
            following = instructions[i + 1].opname if i + 1 < len(instructions) else ""
            yield from _strings(argument, following, where)
            if isinstance(argument, CodeType):
                yield from loads(argument, outer)
        elif isinstance(argument, tuple):  # two variables in one instruction
            if op.startswith("LOAD"):
                yield Load(argument[:1], True, True, where)
            names, local = argument[1:], True
        elif op.startswith("LOAD_") and op != "LOAD_CLOSURE" and isinstance(argument, str):
            names, local = (argument,), op not in _GLOBAL and argument not in outer


def _strings(constant: Any, following: str, where: str) -> Iterator[Load]:
    several = isinstance(constant, tuple | frozenset) and following not in _KEYWORDS
    for text in constant if several else (constant,):
        if isinstance(text, str) and all(part.isidentifier() for part in text.split(".")):
            yield Load(("", *text.split(".")), True, False, where)
