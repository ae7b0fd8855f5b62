"""Nothing is read or written past the ends of arrays: each lies against a page that may not be touched.

Sanitizers see loads that the compiler made of several, and rows that are read whole, only where they look at every
access; the processor looks at all of them. In processes of their own, since a fault ends them.
"""

from __future__ import annotations

import sys

import pytest

from subspan import _core
from test_runtime import run

PROGRAM = '''
import ctypes, sys
import numpy as np
import subspan
from subspan import grassmann, orth, plucker
from subspan.svd import StreamingSVD, truncated_svd

PAGE, SIZE, READ_WRITE, PRIVATE_ANONYMOUS = 65536, 1 << 20, 3, 0x22
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
free = []
for _ in range(10):
    start = libc.mmap(None, SIZE + 2 * PAGE, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0)
    assert libc.mprotect(start, PAGE, 0) == 0 and libc.mprotect(start + PAGE + SIZE, PAGE, 0) == 0
    free.append(start + PAGE)

rng = np.random.default_rng({seed})
subspan.set_num_threads(1)


def size(least, most):
    return int(np.exp(rng.uniform(np.log(least), np.log(most + 1))))


class Places:
    def __init__(self):
        self.used = 0

    def put(self, a, order=None):
        """A copy at the end, or at the start, of memory; by rows or by columns."""
        a = np.asarray(a)
        columns = rng.integers(2) == 1 if order is None and a.ndim > 1 else order == "F"
        turned = np.ascontiguousarray(a.swapaxes(-1, -2) if columns else a)
        if turned.nbytes > SIZE:
            raise MemoryError
        at = free[self.used] + (SIZE - turned.nbytes if rng.integers(4) else 0)
        self.used += 1
        buffer = (ctypes.c_char * max(turned.nbytes, 1)).from_address(at)
        found = np.frombuffer(buffer, turned.dtype, turned.size).reshape(turned.shape)
        found[...] = turned
        return found.swapaxes(-1, -2) if columns else found


def case(dtype, near):
    put = Places().put
    draw = lambda *shape: put(rng.standard_normal(shape).astype(dtype))
    stack = ((), (), (size(1, 40),))[rng.integers(3)]
    m, n = size(1, 300), size(1, 300)
    k = size(1, min(m, 40))
    V = put(orth.random_orthogonal(m, k, batch=stack, rng=1, dtype=dtype))
    C = draw(*stack, m, n)
    which = rng.integers(9)
    wide, v = C.astype(float), V.astype(float)
    if which == 0:
        want = wide - v @ (v.swapaxes(-1, -2) @ wide)
        out = put(np.zeros_like(C), "C")
        near(orth.project_out(C, V, out=out), want)
        near(orth.project_out(C.swapaxes(-1, -2), V, side="right").swapaxes(-1, -2), want)
        near(orth.project_out(C, V, out=C), want)
        R = put(orth.random_orthogonal(n, size(1, min(n, 20)), rng=1, dtype=dtype))
        near(orth.swap(draw(*stack, m, n), C, R), None)
    elif which == 1:
        R = draw(*stack, m, k)
        q = orth.householder_product(R)
        near(q.swapaxes(-1, -2) @ q, np.broadcast_to(np.eye(min(m, k)), q.shape[:-2] + (min(m, k),) * 2))
        near(orth.householder_apply(R, C), orth.householder_apply(R.astype(float), wide))
        orth.householder_product_backward(draw(*q.shape), R)
    elif which == 2:
        near(orth.householder_qr(C)[1], orth.householder_qr(wide)[1])
        if n <= m:
            orth.orthonormalize(C)
            orth.orthonormalize(C, method="polar")
    elif which == 3:
        H = draw(*stack, m, k)
        grassmann.retract(V, H, project=True)
        tangent = put(grassmann.tangent(V, H))
        grassmann.exp(V, tangent, 0.1)
        grassmann.principal_angles(V, put(orth.random_orthogonal(m, k, batch=stack, rng=2, dtype=dtype)))
        grassmann.sgd_step(V, H, put(np.zeros_like(V)), lr=0.01, momentum=0.9)
    elif which == 4:
        classes, batch = size(1, 60), size(1, 60)
        U = put(orth.random_orthogonal(m, min(k, 12), batch=(classes,), rng=1, dtype=dtype))
        x, kept = draw(batch, m), put(np.zeros((batch, classes, U.shape[2]), dtype), "C")
        unit = x / np.linalg.norm(x.astype(float), axis=1, keepdims=True)
        y = np.einsum("bn,cnk->bck", unit, U.astype(float))
        near(grassmann.logits(x, U, scale=1.0, projections=kept), np.linalg.norm(y, axis=2))
        near(kept, y)
        g = draw(batch, classes)
        for a, b in zip(grassmann.logits_backward(g, x, U, projections=kept), grassmann.logits_backward(g, x, U)):
            near(a, b)
    elif which == 5:
        X = put(rng.standard_normal((m, n)).astype(dtype))
        r = min(m, n, 12)
        s = StreamingSVD(r, center=bool(rng.integers(2))).update(X)
        s.project(draw(3, n))
        s.residual(draw(n))
        s.update(draw(n))
        s.components
        near(truncated_svd(X, r, rng=0).S, None)
    elif which == 6:
        packed = orth.quantize_int4(draw(m, k), group=size(1, 40))
        near(packed.apply(draw(k, n)), None)
        orth.hadamard(draw(size(1, 9), 2 ** size(1, 9)))
    elif which == 7:
        tokens, r = size(1, 200), size(2, 40)
        z = put(rng.standard_normal((tokens, r)).astype(dtype))
        d = size(1, 80)
        mixed = plucker.mix(z, [1, 3])
        near(plucker.mix_project(z, draw(d, r * (r - 1) // 2), draw(d), [1, 3]), None)
        plucker.mix_project_backward(draw(tokens, d), z, draw(d, r * (r - 1) // 2), draw(d), [1, 3])
    else:
        a, b = size(2, 12), size(1, 3)
        plucker.coordinates(draw(*stack, max(a, b), b))
        plucker.wedge(draw(*stack, a), draw(*stack, a))


done = 0
for i in range({count}):
    dtype = (np.float32, np.float64)[i % 2]

    def near(found, want):
        if want is None:
            want = found
        most = max(1.0, float(np.abs(want).max())) if np.size(want) else 1.0
        assert found.shape == np.shape(want)
        assert np.size(want) == 0 or np.abs(found - want).max() <= 2000 * np.finfo(dtype).eps * most

    try:
        case(dtype, near)
        done += 1
    except MemoryError:
        continue
print("done" if done > {count} / 3 else done)
'''


@pytest.mark.skipif(sys.platform != "linux", reason="needs pages that may not be touched")
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_nothing_is_touched_past_the_ends(isa):
    order = ["generic", "avx2", "avx512"]
    if order.index(isa) > order.index(_core.isa_available()):
        pytest.skip(f"this machine or build stops at {_core.isa_available()}")
    program = PROGRAM.replace("{seed}", "1").replace("{count}", "400")
    assert run(program, SUBSPAN_ISA=isa).strip() == "done"
