"""Stubs of the compiled modules, from what the bindings say of themselves.

``python tests/stubs.py`` writes ``python/subspan/_core.pyi``, and ``_cuda.pyi`` where the module can be loaded (or the
emulated one, whose path is given); a test holds that they are up to date.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "python" / "subspan"
_PLAIN = {"int", "float", "bool", "str", "bytes", "None", "tuple", "list", "dict"}


def _type(text: str) -> str:
    text = text.strip()
    if text in _PLAIN:
        return {"tuple": "tuple[Any, ...]", "list": "list[Any]", "dict": "dict[str, Any]"}.get(text, text)
    if re.fullmatch(r"typing\.SupportsInt( \| typing\.SupportsIndex)?", text):
        return "int"
    if re.fullmatch(r"typing\.SupportsFloat( \| typing\.SupportsIndex)?", text):
        return "float"
    sequence = re.fullmatch(r"(?:collections\.abc\.Sequence|list)\[(.*)\]", text)
    if sequence:
        return f"Sequence[{_type(sequence[1])}]" if text.startswith("coll") else f"list[{_type(sequence[1])}]"
    return "Any"


def _signature(doc: str, method: bool = False) -> str:
    """``(a: int, b: Any) -> Any`` from the first line of a docstring of pybind11."""
    line = doc.splitlines()[0]
    inside, result = re.fullmatch(r"\w+\((.*)\)(?: -> (.*))?", line).groups()
    parts, depth, start = [], 0, 0
    for i, c in enumerate(inside + ","):
        depth += (c in "[(" and 1) or (c in "])" and -1) or 0
        if c == "," and depth == 0:
            if inside[start:i].strip():
                parts.append(inside[start:i].strip())
            start = i + 1
    out = []
    for i, part in enumerate(parts):
        name, _, rest = part.partition(":")
        kind, equals, default = rest.partition(" = ")
        if method and i == 0:
            out.append("self")
        elif part in ("*", "/"):
            out.append(part)
        else:
            out.append(f"{name.strip()}: {_type(kind)}" + (f" = {default.strip()}" if equals else ""))
    return f"({', '.join(out)}) -> {_type(result or 'None')}"


def stub(module) -> str:
    """The text of a stub: functions by name, then classes."""
    lines = [f'"""{module.__doc__.splitlines()[0]} Written by tests/stubs.py."""', ""]
    lines += ["from collections.abc import Sequence", "from typing import Any", ""]
    members = {name: x for name, x in vars(module).items() if not name.startswith("_") and name != "emulated"}
    for name in sorted(name for name, x in members.items() if inspect.isroutine(x)):
        lines.append(f"def {name}{_signature(members[name].__doc__)}: ...")
    for name in sorted(name for name, x in members.items() if inspect.isclass(x)):
        lines += ["", f"class {name}:"]
        for method, x in sorted(vars(members[name]).items()):
            if (
                inspect.isroutine(x)
                and (method in ("__init__", "__enter__", "__exit__") or not method.startswith("_"))
                and x.__doc__
            ):
                lines.append(f"    def {method}{_signature(x.__doc__, method=True)}: ...")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write both."""
    from subspan import _core

    (PACKAGE / "_core.pyi").write_text(stub(_core))
    if len(sys.argv) > 1:
        spec = importlib.util.spec_from_file_location("_cuda_emulated", sys.argv[1])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        from subspan import _cuda as module
    (PACKAGE / "_cuda.pyi").write_text(stub(module))


if __name__ == "__main__":
    main()
