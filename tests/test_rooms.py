"""The rooms of the sources: what a file may take from where."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("svd", "orth", "grassmann", "plucker")


def includes(path):
    return re.findall(r'#include "(\w+)/[\w.]+"', path.read_text())


@pytest.mark.parametrize("side", ["csrc", "cuda"])
def test_no_room_takes_from_a_sibling(side):
    """What two rooms need lies in base or linalg; these take from each other in that order alone."""
    allowed = {"base": {"base"}, "linalg": {"base", "linalg"}, **{room: {"base", "linalg", room} for room in ROOMS}}
    wrong, seen = [], 0
    for room, those in allowed.items():
        for path in sorted((ROOT / side / room).iterdir()):
            seen += 1
            wrong += [
                f"{path.relative_to(ROOT)} takes from {x}" for x in includes(path) if x in allowed and x not in those
            ]
    assert seen > 20
    assert not wrong, wrong


@pytest.mark.parametrize("side", ["csrc", "cuda"])
def test_there_are_no_other_rooms(side):
    found = {p.name for p in (ROOT / side).iterdir() if p.is_dir()}
    assert found == {"base", "linalg", *ROOMS, "bind", "include"}
    assert not [p for p in (ROOT / side).iterdir() if p.is_file()]


def test_an_operation_has_one_stem_on_both_sides():
    """A file of the device's side is called as that of the CPU's that does the same, or it says what part of it is."""
    for room in ROOMS:
        host = {p.stem for p in (ROOT / "csrc" / room).glob("*.cpp")} | {
            p.stem for p in (ROOT / "csrc/linalg").glob("*.cpp")
        }
        for path in (ROOT / "cuda" / room).glob("*.cu"):
            assert any(path.stem == stem or path.stem.startswith(stem + "_") for stem in host) or path.stem in ALONE, (
                path
            )


# Files of the device's side that are no operation of their own there: a kernel that others launch, or a step that the
# CPU has in the file of all steps.
ALONE = {"adam_step", "transport", "gather"}
