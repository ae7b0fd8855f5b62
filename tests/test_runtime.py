"""Threads, instruction sets, fork, the stub and the memory that an update takes."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import subspan
import subspan.orth
import subspan.plucker
import subspan.svd
from subspan import _core
from subspan.svd import StreamingSVD

ROOT = Path(__file__).parent.parent


def test_one_version_everywhere():
    """pyproject.toml says it; the citation and the changelog follow, and CMake reads it."""
    import re
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] in (version, "Unreleased")
    assert not re.search(r"VERSION \d+\.\d+\.\d+", (ROOT / "CMakeLists.txt").read_text())


@pytest.fixture
def threads():
    before = subspan.get_num_threads()
    yield subspan.set_num_threads
    subspan.set_num_threads(before)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("method", ["gram", "robust", "auto"])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("kind", ["dense", "csr"])
def test_bit_identical_for_any_number_of_threads(rng, threads, dtype, method, center, kind):
    """n is beyond one slice of the Gram kernel. LAPACK (first blocks, double cores) is held to one thread."""
    from scipy import sparse
    from threadpoolctl import threadpool_limits

    if kind == "csr":
        rows = sparse.random_array((150, 5000), density=0.02, format="csr", dtype=dtype, rng=rng)
    else:
        rows = rng.standard_normal((150, 5000)).astype(dtype)
    results = []
    with threadpool_limits(1):
        for n in (1, 2, 3, 5):
            threads(n)
            svd = StreamingSVD(50, method=method, center=center)
            for i in range(0, 150, 50):
                svd.update(rows[i : i + 50])
            results.append((svd.singular_values, svd.components, svd.project(rows), svd.residual(rows)))
    for r in results[1:]:
        for x, y in zip(results[0], r, strict=True):
            np.testing.assert_array_equal(x, y)


def test_set_num_threads(threads):
    threads(3)
    assert subspan.get_num_threads() == 3
    for number in (0, 4097, 2**31 - 1):
        with pytest.raises(ValueError, match=r"n must be at (least 1|most 4096)"):
            threads(number)


def test_one_stream_from_many_threads(rng):
    """Calls take turns; every row counts."""
    rows = rng.standard_normal((400, 130))
    svd = StreamingSVD(130, center=True)
    workers = [
        threading.Thread(target=lambda i=i: [svd.update(rows[j : j + 5]) for j in range(50 * i, 50 * i + 50, 5)])
        for i in range(8)
    ]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert svd.rows_seen == 400
    want = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
    np.testing.assert_allclose(svd.singular_values, want[: svd.singular_values.size], rtol=1e-8)


def test_many_streams_in_many_threads(rng):
    rows = rng.standard_normal((100, 3000)).astype(np.float32)
    want = StreamingSVD(20).update(rows).singular_values
    got = [None] * 6

    def work(i):
        for _ in range(5):
            got[i] = StreamingSVD(20).update(rows).singular_values

    workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    for g in got:
        np.testing.assert_allclose(g, want, rtol=1e-5)


def run(code: str, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_with_a_running_pool():
    code = """
import os, warnings, numpy as np, subspan
warnings.simplefilter("ignore")
from subspan.svd import StreamingSVD
subspan.set_num_threads(2)
rows = np.random.default_rng(0).standard_normal((128, 20000)).astype(np.float32)
want = StreamingSVD(16, method="gram").update(rows).singular_values
pid = os.fork()
same = bool(np.array_equal(StreamingSVD(16, method="gram").update(rows).singular_values, want))
if pid == 0:
    os._exit(0 if same else 1)
assert same and os.waitpid(pid, 0)[1] == 0
print("ok")
"""
    assert run(code).strip() == "ok"


FUZZ = """
import numpy as np, subspan
from subspan import _core
from subspan.svd import StreamingSVD, truncated_svd
rng = np.random.default_rng(0)
assert _core.isa() == {isa!r}
for dtype, tol in ((np.float32, 3e-5), (np.float64, 1e-12)):
    for n in (1, 5, 15, 16, 17, 47, 48, 49, 97, 131, 300):
        for k in (1, 7, 8, 9, 24, 33):
            for b in (1, 8, 31, 50):
                k_ = min(k, n)
                a = (rng.standard_normal((b + 20, k_)) @ rng.standard_normal((k_, n))).astype(dtype)
                for method in ("gram", "robust"):
                    svd = StreamingSVD(k_, method=method, center=True).update(a[:20]).update(a[20:])
                    wide = a.astype(float) - a.mean(0, dtype=float)
                    want = np.linalg.svd(wide, compute_uv=False)[:svd.singular_values.size]
                    slack = tol if method == "robust" else tol ** 0.5
                    worst = np.abs(svd.singular_values - want).max(initial=0)
                    assert worst <= slack * max(want.max(initial=0), 1e-300), (n, k, b, method)
                    v = svd.components.astype(float)
                    drift = np.abs(v @ v.T - np.eye(len(v))).max(initial=0)
                    assert drift <= 10 * np.finfo(dtype).eps * max(len(v), 1) ** 0.5, (n, k, b, method)
                d = truncated_svd(a, min(k_, b + 20), rng=0)
                want = np.linalg.svd(a.astype(float), compute_uv=False)[:d.S.size]
                assert np.abs(d.S - want).max() <= tol * d.S[0] + 1e-300
from subspan import orth
for dtype, tol in ((np.float32, 1e-5), (np.float64, 1e-14)):
    for m, n in ((1, 1), (7, 5), (15, 17), (33, 16), (49, 48), (130, 97), (300, 31)):
        a = rng.standard_normal((m, n)).astype(dtype)
        q, r = orth.householder_qr(a)
        assert np.abs(q.to_array(full=True)[:, :min(m, n)].astype(float) @ r - a).max() <= 3 * tol, (m, n)
        assert np.abs(q.apply(q.apply(a), transpose=True) - a).max() <= 3 * tol, (m, n)
        for k in (1, 4, 9, 33, 70):
            for left in (True, False):
                v = (rng.standard_normal((m if left else n, k)) / (m if left else n) ** 0.5).astype(dtype)
                c = rng.standard_normal((k, k)).astype(dtype) / k
                want = a + (v @ c @ (v.T @ a) if left else a @ v @ c @ v.T).astype(float)
                for out in (None, a.copy()):
                    x = a if out is None else out
                    got = orth.apply_core(x, v, c, side="left" if left else "right", out=out)
                    assert np.abs(got - want).max() <= 30 * tol, (m, n, k, left)
                h = orth.householder_product(v)
                assert np.abs(h.T.astype(float) @ h - np.eye(h.shape[1])).max() <= 3 * tol
        if n <= m:
            u = orth.orthonormalize(a)
            assert np.abs(u.T.astype(float) @ u - np.eye(n)).max() <= tol * n ** 0.5
        b = orth.quantize_int4(a, 9)
        y = rng.standard_normal((n, 5)).astype(dtype)
        assert np.abs(b.apply(y) - b.to_array().astype(float) @ y).max() <= 3 * tol * n
    for n in (1, 2, 8, 12, 16, 24, 32, 64, 80, 256, 448, 4096, 32768):
        x = rng.standard_normal((2, n)).astype(dtype)
        assert np.abs(orth.hadamard(orth.hadamard(x), transpose=True) - x).max() <= tol, n
        if n <= 448:
            assert np.abs(orth.hadamard(x) - x @ orth.hadamard_matrix(n).T / n ** 0.5).max() <= tol, n
from subspan import plucker
for dtype, tol in ((np.float32, 1e-5), (np.float64, 1e-13)):
    for r in (2, 3, 8, 15, 17, 33):
        for t, d in ((1, 1), (5, 7), (47, 16), (64, 33), (100, 50)):
            i, j = np.triu_indices(r, 1)
            z = rng.standard_normal((t, r)).astype(dtype)
            w = (rng.standard_normal((d, len(i))) / len(i) ** 0.5).astype(dtype)
            p, x = np.zeros((t, len(i))), z.astype(float)
            for o in (1, 3):
                q = x[o:, i] * x[:-o, j] - x[o:, j] * x[:-o, i]
                p[o:] += q / np.linalg.norm(q, axis=1, keepdims=True)
            p[3:] /= 2
            assert np.abs(plucker.mix(z, [1, 3]) - p).max() <= tol, (r, t)
            assert np.abs(plucker.mix_project(z, w, None, [1, 3]) - p @ w.T).max() <= tol, (r, t, d)
            g = rng.standard_normal((t, d)).astype(dtype)
            dz, dw, _ = plucker.mix_project_backward(g, z, w, None, [1, 3])
            assert np.abs(dw - g.T.astype(float) @ p).max() <= 30 * tol, (r, t, d)
            dp = (g.astype(float) @ w).astype(dtype)
            close = plucker.mix_backward(dp, z, [1, 3])
            assert np.abs(dz - close).max() <= 100 * tol * max(1, np.abs(close).max()), (r, t, d)
            if dtype == np.float64 and r > 2 and t > 1:
                e = rng.standard_normal(z.shape)
                f = [(plucker.mix_project(z + s * 1e-6 * e, w, None, [1, 3]) * g).sum() for s in (1, -1)]
                assert abs((f[0] - f[1]) / 2e-6 - (dz * e).sum()) <= 1e-5 * np.abs(dz * e).sum(), (r, t, d)
        n = min(r, 8)
        a = rng.standard_normal((20, n, 2)).astype(dtype)
        p = plucker.coordinates(a)
        assert np.abs(p - plucker.wedge(a[..., 0], a[..., 1])).max() == 0
        back = plucker.coordinates(plucker.basis(p, n, 2)) * np.linalg.norm(p, axis=1)[:, None]
        assert np.abs(back - p).max() <= 30 * tol
print("ok")
"""


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    order = ["generic", "avx2", "avx512"]
    if order.index(isa) > order.index(_core.isa_available()):
        pytest.skip(f"this machine or build stops at {_core.isa_available()}")
    assert run(FUZZ.format(isa=isa), SUBSPAN_ISA=isa).strip() == "ok"


BLOCKS = """
import numpy as np
from subspan import _core, grassmann, orth, plucker
from subspan.svd import StreamingSVD
print(_core.build_info()["caches"])
rng = np.random.default_rng(0)
for dtype, tolerance in ((np.float32, 2e-5), (np.float64, 1e-13)):
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)
    near = lambda a, b: np.abs(np.asarray(a, float) - b).max() <= tolerance * np.abs(b).max()
    U, C = orth.random_orthogonal(700, 90, rng=0, dtype=dtype), draw(700, 333)
    wide = C.astype(float)
    for k in (3, 20, 64, 90):
        u = U[:, :k]
        assert near(orth.project_out(C, u), wide - u @ (u.T.astype(float) @ wide)), k
        assert near(orth.project_out(C.T.copy(), u, side="right").T, wide - u @ (u.T.astype(float) @ wide)), k
    packed = orth.quantize_int4(U)
    assert near(packed.apply(C[:90]), packed.to_array().astype(float) @ C[:90].astype(float))
    x = draw(5, 8192)
    assert near(orth.hadamard(orth.hadamard(x)), x)
    P, f = grassmann.random(600, 3, batch=40, rng=0, dtype=dtype), draw(33, 600)
    unit = f / np.linalg.norm(f.astype(float), axis=1, keepdims=True)
    along = np.einsum("bn,cnk->bck", unit, P.astype(float))
    assert near(grassmann.logits(f, P, scale=1.0), np.linalg.norm(along, axis=2))
    rows = draw(900, 300)
    stream = StreamingSVD(20)
    for i in range(0, 900, 300):
        stream.update(rows[i : i + 300])
    assert near(stream.singular_values, np.linalg.svd(rows.astype(float), compute_uv=False)[:20])
    z, w = draw(2, 60, 12), draw(300, 66)
    mixed = plucker.mix(z, [1, 2])
    assert near(plucker.mix_project(z, w, None, [1, 2]), mixed.astype(float) @ w.T.astype(float))
"""


@pytest.mark.parametrize("caches", ["16K,256K", "32K,1M", "128K,2M"])
def test_blocks_for_other_caches(caches):
    first, second = (int(x[:-1]) << (10 if x[-1] == "K" else 20) for x in caches.split(","))
    assert run(BLOCKS, SUBSPAN_CACHE=caches).strip() == str((first, second))


def test_unknown_settings_are_errors():
    for code, name, value in [
        ("_core.isa()", "SUBSPAN_ISA", "sse9"),
        ("_core.build_info()", "SUBSPAN_CACHE", "big"),
        ("_core.build_info()", "SUBSPAN_CACHE", "48K"),
        ("_core.build_info()", "SUBSPAN_CACHE", "-1,5"),
        ("_core.num_threads()", "SUBSPAN_NUM_THREADS", "many"),
    ]:
        out = run(
            f"from subspan import _core\ntry:\n    {code}\nexcept ValueError as e:\n    print(e)", **{name: value}
        )
        assert name in out
        assert value in out


@pytest.mark.parametrize("family", ["svd", "orth", "grassmann", "plucker"])
def test_every_public_name_is_documented(family):
    """A docstring, and an entry on the docs page of the family."""
    page = ROOT / "docs" / f"{family}.md"
    if not page.exists():
        pytest.skip("not in a source checkout")
    text = page.read_text()
    module = getattr(subspan, family)
    for name in module.__all__:
        thing = getattr(module, name)
        assert inspect.getdoc(thing)
        assert f"`{name}" in text, f"docs/{family}.md says nothing of {name}"
        if inspect.isclass(thing) and name != "TruncatedSVD":
            for method, f in inspect.getmembers(thing):
                if not method.startswith("_") and (callable(f) or isinstance(f, property)):
                    assert inspect.getdoc(f), f"{name}.{method} has no docstring"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak-memory counter")
@pytest.mark.parametrize("method", ["gram", "robust"])
def test_peak_memory_of_an_update(method):
    """Under 3 (k + b) n items beyond the state, whatever the number of columns."""
    code = f"""
import numpy as np, subspan
from subspan.svd import StreamingSVD
def status(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))
n, k, b = 100_000, 64, 64
rows = np.random.default_rng(0).standard_normal((3 * b, n), dtype=np.float32)
svd = StreamingSVD(k, method={method!r})
svd.update(rows[:b]); svd.update(rows[b:2 * b])
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")
before = status("VmRSS")
svd.update(rows[2 * b:])
print((status("VmHWM") - before) / ((k + b) * n * 4))
"""
    assert float(run(code)) < 3.0


@pytest.mark.parametrize("family", ["svd", "orth", "grassmann", "plucker"])
def test_doctests(family):
    import doctest

    public = getattr(subspan, family)
    finder = doctest.DocTestFinder(recurse=True)
    runner = doctest.DocTestRunner()
    for name in (None, *public.__all__):  # the parts may live in modules of their own
        thing = public if name is None else getattr(public, name)
        for test in finder.find(thing, name or family, module=False, globs={}):
            if name is not None or test.name == family:
                runner.run(test)
    failed, tried = runner.failures, runner.tries
    assert (failed, tried > 10) == (0, True)
