"""4-bit codes in CUDA device memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from subspan._lib.arguments import detached, finish
from subspan._lib.arrays import Array
from subspan._lib.device import Place, check_dtype, matrix, need_blas, wide_dtype

if TYPE_CHECKING:
    from subspan.orth.int4 import Int4Basis


def quantize(U: Array, group: int) -> tuple[Any, Any, Any, str]:
    """Codes, scales, zeros and the library."""
    place = Place(U=U)
    n, k = (int(x) for x in U.shape)
    wide = wide_dtype(check_dtype(U, "U"))
    groups = -(-n * k // group)
    codes = place.empty(((n * k + 1) // 2,), "uint8")
    scale, zero = place.empty((groups,), wide), place.empty((groups,), wide)
    place.module.quantize_int4(place.call(), detached(U), group, (codes, scale, zero, n, k, group))
    return codes, scale, zero, place.library


def to_array(basis: Int4Basis) -> Array:
    place = Place(codes=basis.codes)
    out = place.empty(basis.shape, check_dtype(basis.scale, "scale"))
    place.module.unpack_int4(place.call(), basis._parts(), out)
    return out


def gram_core(basis: Int4Basis) -> Array:
    need_blas()
    place = Place(codes=basis.codes)
    dense = to_array(basis)
    core = place.empty((basis.shape[1], basis.shape[1]), check_dtype(basis.scale, "scale"))
    place.module.gram_core(place.call(), dense, core)
    return core


def product(
    basis: Int4Basis,
    X: Array,
    left: bool,
    transpose: bool,
    shape: tuple[int, ...],
    alpha: float,
    out: Array | None,
    name: str = "X",
) -> Array:
    """``alpha`` times the product with the dense matrix, which the work memory holds for as long as the call takes."""
    place = Place(**{name: X}, codes=basis.codes, out=out)
    dtype = check_dtype(matrix(X, name), name)
    if check_dtype(basis.scale, "scale") != wide_dtype(dtype):
        raise TypeError(f"{name} is {dtype} and the codes stand for {check_dtype(basis.scale, 'scale')}")
    need_blas()
    result = place.output(out, shape, dtype)
    args = (basis._parts(), place.for_blas(detached(X)), left, transpose, alpha, detached(result))
    place.module.int4_product(place.call(), *args)
    return finish(result, False, place.library)
