"""The rooms of the sources: what a file may take from where."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("svd", "orth", "grassmann", "plucker")


def includes(path):
    """Rooms that a file includes private headers of, and public headers."""
    names = re.findall(r'#include "([\w/]+)/([\w.]+)"', path.read_text())
    return [room for room, _ in names if "/" not in room and room != "subspan"], [
        f"{folder}/{name}" for folder, name in names if folder.startswith("subspan")
    ]


def owners(side):
    """The room of each public header: that of the files whose first include it is, as they define what it declares."""
    found = {}
    for room in ("base", "linalg", *ROOMS):
        for path in (ROOT / side / room).glob("*.c*"):
            first = re.search(r'#include "([\w/.]+)"', path.read_text())
            if first and first[1].startswith("subspan") and path.suffix in (".cpp", ".cu"):
                found.setdefault(first[1], set()).add(room)
    return found


@pytest.mark.parametrize("side", ["csrc", "cuda"])
def test_no_room_takes_from_a_sibling(side):
    """What two rooms need lies in base or linalg; these take from each other in that order alone."""
    allowed = {"base": {"base"}, "linalg": {"base", "linalg"}, **{room: {"base", "linalg", room} for room in ROOMS}}
    wrong, seen, owned = [], 0, owners(side)
    assert all(len(rooms) == 1 for rooms in owned.values()), {h: r for h, r in owned.items() if len(r) > 1}
    for room, those in allowed.items():
        for path in sorted((ROOT / side / room).iterdir()):
            seen += 1
            private, public = includes(path)
            taken = [*private, *(next(iter(owned[name])) for name in public if name in owned)]
            wrong += [f"{path.relative_to(ROOT)} takes from {x}" for x in taken if x in allowed and x not in those]
    assert seen > 20
    assert len(owned) > 10
    assert not wrong, wrong


@pytest.mark.parametrize("side", ["csrc", "cuda"])
def test_there_are_no_other_rooms(side):
    found = {p.name for p in (ROOT / side).iterdir() if p.is_dir()}
    assert found == {"base", "linalg", *ROOMS, "bind", "include"}
    assert not [p for p in (ROOT / side).iterdir() if p.is_file()]


def test_an_operation_has_one_stem_on_both_sides():
    """A file of the device's side is called as that of the CPU's that does the same, or it says what part of it is."""
    for room in ROOMS:
        host = [p.stem for p in (ROOT / "csrc" / room).glob("*.cpp")]
        for path in (ROOT / "cuda" / room).glob("*.cu"):
            assert any(path.stem == stem or path.stem.startswith(stem + "_") for stem in host), path
    for stem in ("householder_qr", "orthonormalize"):  # what two families need
        assert (ROOT / "csrc/linalg" / f"{stem}.cpp").exists()
        assert (ROOT / "cuda/linalg" / f"{stem}.cu").exists()


PACKAGE = ROOT / "python" / "subspan"


def imported(path):
    """Modules of the package that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield "subspan.relative"  # which hides where it leads
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "subspan":
            yield from ([f"subspan.{x.name}" for x in node.names] if node.module == "subspan" else [node.module])
        elif isinstance(node, ast.Import):
            yield from (x.name for x in node.names if x.name.startswith("subspan."))


@pytest.mark.parametrize("room", ["_lib", *ROOMS])
def test_no_room_of_python_imports_a_sibling(room):
    """What two families need lies in _lib, which imports no family."""
    allowed = {"_core", "_cuda", "_lib", room}
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in sorted((PACKAGE / room).glob("*.py"))
        for name in imported(path)
        if name.split(".")[1] not in allowed
    ]
    assert not wrong, wrong


def test_a_new_operation_touches_ten_files():
    """CONTRIBUTING.md walks through one with both sides; the files that it names are all that mention its kernel."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    listed = re.findall(r"^\d+\. `([\w/.]+)`", text, re.MULTILINE)
    assert 8 <= len(listed) <= 10
    assert not [name for name in listed if "CMake" in name]
    for name in listed:
        assert re.search(r"\blog\b|grassmann_log", (ROOT / name).read_text()), name
    mention = {
        str(path.relative_to(ROOT))
        for side in ("csrc", "cuda")
        for path in (ROOT / side).rglob("*.*")
        if re.search(r"\bgrassmann_log\b", path.read_text())
    }
    assert mention - {"cuda/grassmann/mean.cu"} <= set(listed)  # the mean is another operation, which takes logarithms
