"""Ctrl-C in long calls: it is heard soon, and what was being changed is whole. No test has a time limit of its own: a
call that does not listen would simply finish, which each test notices."""

import signal
import sys
import threading

import numpy as np
import pytest
from scipy import sparse

from subspan import grassmann, orth, plucker
from subspan.sklearn import IncrementalPCA
from subspan.svd import FrequentDirections, StreamingSVD, product_svd, truncated_svd

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs an alarm signal")


class StopError(Exception):
    pass


@pytest.fixture
def stopped():
    """Runs a call that takes seconds and stops it after a tenth of one."""

    def alarm(*_):
        raise StopError

    before = signal.signal(signal.SIGALRM, alarm)

    def run(call, after=0.1):
        signal.setitimer(signal.ITIMER_REAL, after)
        try:
            with pytest.raises(StopError):
                call()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    yield run
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def big():
    return np.random.default_rng(0).standard_normal((4000, 4000), dtype=np.float32)


CALLS = {
    "truncated_svd": lambda a: truncated_svd(a, 600),
    "update": lambda a: StreamingSVD(300).update(np.vstack([a] * 2)),
    "fit": lambda a: IncrementalPCA(30).fit(np.vstack([a] * 2)),
    "product_svd": lambda a: product_svd(a[:, :2500], a[:2500]),
    "sketch": lambda a: FrequentDirections(400, 4000).update(a),
    "householder_qr": lambda a: orth.householder_qr(a),
    "range_basis": lambda a: orth.range_basis(a[:, :2500]),
    "from_projector": lambda a: grassmann.from_projector(np.eye(3000, dtype=np.float32), 3000, check=False),
    "pivoting": lambda a: orth.householder_qr(a, pivoting=True),
    "orthonormalize": lambda a: orth.orthonormalize(a),
    "householder": lambda a: orth.orthonormalize(a, method="householder"),
    "polar": lambda a: orth.orthonormalize(a[:, :2500], method="polar"),
    "householder_product": lambda a: orth.householder_product(a),
    "householder_apply": lambda a: orth.householder_apply(a[:, :3000], a),
    "random_orthogonal": lambda a: orth.random_orthogonal(4000, rng=0),
    "apply_core": lambda a: orth.apply_core(a, a[:, :2000], 1e-9),
    "mix_project": lambda a: plucker.mix_project(a[:, :128], np.resize(a, (600, 8128)), None, [1, 2, 4]),
    "exp": lambda a: grassmann.exp(np.eye(4000, 900, dtype=np.float32), a[:, :900], check=False),
    "relations": lambda a: plucker.relations(np.resize(a, 12870), 16, 8),
}


@pytest.mark.parametrize("call", CALLS)
def test_long_calls_listen(stopped, big, call):
    stopped(lambda: CALLS[call](big))


def test_long_sparse_calls_listen(stopped, big):
    """Of 8 million entries in 20,000 rows."""
    columns = np.sort(np.random.default_rng(0).integers(0, 20000, (20000, 400), dtype=np.int32), axis=1).ravel()
    starts = np.arange(0, 8_000_001, 400, dtype=np.int32)
    entries = sparse.csr_array((big.ravel()[:8_000_000], columns, starts))
    entries.sum_duplicates()
    stopped(lambda: truncated_svd(entries, 300))


def test_an_interrupted_stream_is_whole(stopped, rng):
    x = rng.standard_normal((3000, 2000))
    for rows in (x, sparse.csr_array(np.where(np.abs(x) > 2, x, 0))):
        svd = StreamingSVD(200, center=True).update(rows[:500])
        twin = svd.copy()
        for after in (0.02, 0.1, 0.3):
            stopped(lambda s=svd, r=rows: [s.update(r[500:]) for _ in range(50)], after)
            blocks = round((svd.rows_seen - 500) / 2500)  # each as a whole, or not at all
            assert svd.rows_seen == 500 + 2500 * blocks
            for _ in range(blocks - round((twin.rows_seen - 500) / 2500)):
                twin.update(rows[500:])
            np.testing.assert_array_equal(svd.components, twin.components)
            np.testing.assert_array_equal(svd.singular_values, twin.singular_values)
            np.testing.assert_array_equal(svd.mean, twin.mean)


def test_interrupted_sketches_and_states_are_whole(stopped, rng):
    x = rng.standard_normal((4000, 1000))
    fd = FrequentDirections(200, 1000).update(x[:300])
    before = fd.__getstate__()
    stopped(lambda: [fd.update(x) for _ in range(100)])
    times = round((fd.rows_seen - 300) / 4000)
    twin = FrequentDirections.__new__(FrequentDirections)
    twin.__setstate__(before)
    for _ in range(times):
        twin.update(x)
    np.testing.assert_array_equal(fd.sketch, twin.sketch)

    z = rng.standard_normal((8, 20000, 64))
    state = plucker.MixState([20000], 64).prefill(z[:, :100])
    kept = state.__getstate__()
    stopped(lambda: [state.prefill(z) for _ in range(1000)], 0.05)
    times = round((state.position - 100) / 20000)
    other = plucker.MixState.__new__(plucker.MixState)
    other.__setstate__(kept)
    for _ in range(times):
        other.prefill(z)
    np.testing.assert_array_equal(state.__getstate__()["tokens"], other.__getstate__()["tokens"])


def test_interrupted_calls_in_place_are_whole(stopped, big, rng):
    """As before, or as after so many calls."""
    u = orth.random_orthogonal(4000, 1500, rng=0, dtype=np.float32)
    q, _ = orth.householder_qr(big[:, :1500])
    points = grassmann.random(3000, 400, batch=3, rng=0)
    grad = 1e-3 * rng.standard_normal(points.shape)
    for start, step in (
        (big, lambda c: orth.project_out(c, u, strength=0.1, out=c, check=True)),
        (big, lambda c: q.apply(c, out=c)),
        (big, lambda c: orth.householder_apply(big[:, :1500], c, out=c)),
        (big[:, :1500], lambda c: orth.orthonormalize(c, out=c)),
        (points, lambda c: grassmann.sgd_step(c, grad, lr=0.1)),
        (points, lambda c: grassmann.retract(c, grad, project=True, out=c)),
    ):
        c = start.copy()
        stopped(lambda c=c, step=step: [step(c) for _ in range(200)], 0.15)
        twin = start.copy()
        for _ in range(20):
            if np.array_equal(c, twin):
                break
            step(twin)
        else:
            pytest.fail("neither as before nor as after any call")


def test_other_threads_finish(stopped, big):
    """Only the thread that hears signals is stopped."""
    found = []
    thread = threading.Thread(target=lambda: found.append(orth.orthonormalize(big[:, :800])))
    thread.start()
    stopped(lambda: truncated_svd(big, 600))
    thread.join()
    assert found[0].shape == (4000, 800)


def test_a_handler_that_uses_what_it_stopped_gets_an_error(rng):
    x = rng.standard_normal((6000, 2000))
    svd = StreamingSVD(100).update(x[:100])
    errors = []

    def handler(*_):
        try:
            _ = svd.components
        except RuntimeError as e:
            errors.append(str(e))

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
        while not errors and svd.rows_seen < 600_000:
            svd.update(x)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert all("same thread" in e for e in errors)


MADE = {
    "stream": lambda: StreamingSVD(300),
    "exact stream": lambda: StreamingSVD(100, exact_blocks=True),
    "sketch": lambda: FrequentDirections(200, 600),
    "mixing": lambda: plucker.MixState([1, 64], 96),
}


@pytest.mark.parametrize("later", [False, True], ids=["the first call", "a later one"])
@pytest.mark.parametrize("kind", MADE)
def test_a_handler_that_changes_what_it_stopped_gets_an_error(kind, later, rng):
    """Not a deadlock, and the call that was stopped ends as if it had been alone."""
    x = rng.standard_normal((100_000, 96) if kind == "mixing" else (4_000, 600))
    errors, thing = [], None

    def call():
        return thing.prefill(x) if kind == "mixing" else thing.update(x)

    def handler(*_):
        try:
            call()
        except RuntimeError as e:
            errors.append(str(e))

    before = signal.signal(signal.SIGALRM, handler)
    try:
        for i in range(100):
            thing = MADE[kind]()
            if later:
                call()
            signal.setitimer(signal.ITIMER_REAL, 0.001 * (1 + i))
            call()
            signal.setitimer(signal.ITIMER_REAL, 0)
            if errors:
                break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert errors, "no call was stopped"
    assert all("same thread" in e for e in errors)
    assert (thing.position if kind == "mixing" else thing.rows_seen) == (2 if later else 1) * len(x)


def test_exits_after_an_interrupt_are_clean():
    import subprocess

    code = (
        "import signal, numpy as np\nfrom subspan import orth\n"
        "class StopError(Exception): pass\n"
        "def alarm(*_): raise StopError\n"
        "signal.signal(signal.SIGALRM, alarm)\na = np.ones((3000, 3000), np.float32)\n"
        "a += np.random.default_rng(0).standard_normal((3000, 3000), dtype=np.float32)\n"
        "for method in ('householder', 'cholesky'):\n"
        "    signal.setitimer(signal.ITIMER_REAL, 0.1)\n"
        "    try:\n        orth.orthonormalize(a, method=method)\n    except StopError:\n        print('stopped')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "stopped\nstopped\n"), done.stderr


# -- threads that share one object -------------------------------------------------------------------------------------


def test_readers_of_a_stream_that_grows(rng):
    """Sizes and values are of one moment, however the rank grows meanwhile."""
    x = rng.standard_normal((60, 80))
    for _ in range(10):
        svd, failed, done = StreamingSVD(40), [], threading.Event()
        svd.update(x[:1])

        def read(svd=svd, failed=failed, done=done):
            while not done.is_set():
                try:
                    v, z = svd.components, svd.project(x)
                    assert v.shape[1] == 80
                    assert z.shape[0] == 60
                    assert svd.residual(x).shape == (60,)
                    assert svd.singular_values.ndim == 1
                    assert svd.__getstate__()["components"].shape[1] == 80
                    _ = svd.explained_variance_ratio
                    _ = svd.column_variances
                except Exception as e:
                    failed.append(e)

        readers = [threading.Thread(target=read) for _ in range(3)]
        for r in readers:
            r.start()
        for row in x[1:]:
            svd.update(row[None])
        done.set()
        for r in readers:
            r.join()
        assert not failed


def test_first_rows_from_many_threads(rng):
    x = rng.standard_normal((40, 6))
    for _ in range(20):
        fd, svd = FrequentDirections(3, 6), StreamingSVD(3)
        threads = [threading.Thread(target=lambda r=r, fd=fd, svd=svd: (fd.update(r), svd.update(r))) for r in x]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert fd.rows_seen == svd.rows_seen == 40
