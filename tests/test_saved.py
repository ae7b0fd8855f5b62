"""Pickles and saved files of released versions still load, and their objects go on as they would have.

``tests/saved/0_1.json`` holds what version 0.1 wrote, as text, and what its objects gave for given input.
"""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest

from subspan import plucker, svd

SAVED = json.loads((Path(__file__).parent / "saved" / "0_1.json").read_text())


def unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def array(x):
    return np.frombuffer(base64.b64decode(x["data"]), x["dtype"]).reshape(x["shape"])


def results(name, x):
    given = array(SAVED["inputs"][name]) if name in SAVED["inputs"] else None
    if name.startswith("StreamingSVD"):
        return [x.singular_values, x.project(given)]
    if name == "FrequentDirections":
        return [x.sketch, x.error_bound]
    if name == "IncrementalPCA":
        return [x.transform(given), x.singular_values_]
    if name == "GradientProjector":
        return [x.up(x.down(given))]
    return [x.step(np.ones(4, np.float32)) if name == "MixState" else x.to_array()]


@pytest.mark.parametrize("name", SAVED["pickles"])
@pytest.mark.filterwarnings("ignore:Trying to unpickle estimator")  # another scikit-learn made it
def test_pickles_of_0_1(name):
    x = pickle.loads(unpacked(SAVED["pickles"][name]))
    assert type(x).__name__ == name.split()[0]
    for found, wanted in zip(
        results(name, x) if name in SAVED["results"] else [], SAVED["results"].get(name, []), strict=True
    ):
        wanted = array(wanted)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=50 * np.finfo(wanted.dtype).eps * np.abs(wanted).max())


@pytest.mark.parametrize(("name", "kind"), [("StreamingSVD", svd.StreamingSVD), ("MixState", plucker.MixState)])
def test_archives_of_0_1(name, kind, tmp_path):
    path = tmp_path / "saved.npz"
    path.write_bytes(unpacked(SAVED["archives"][name]))
    for found, wanted in zip(results(name, kind.load(path)), SAVED["results"][name], strict=True):
        wanted = array(wanted)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=50 * np.finfo(wanted.dtype).eps * np.abs(wanted).max())
