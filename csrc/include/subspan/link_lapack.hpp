// Fills the LAPACK table from routines that the program is linked with (any LP64 LAPACK: OpenBLAS, MKL, Accelerate,
// the reference). A library that renames its symbols, as scipy-openblas32 does (scipy_dgesdd_), is taken by defining
// SUBSPAN_LAPACK_PREFIX (there: scipy_). Include this in one file and call subspan::link_lapack() before anything else.
#pragma once

#include "subspan/blas.hpp"

#define SUBSPAN_PASTE(a, b, c) a##b##c
#define SUBSPAN_EXPAND(a, b, c) SUBSPAN_PASTE(a, b, c)
#ifdef SUBSPAN_LAPACK_PREFIX
#define SUBSPAN_LAPACK_NAME(symbol) SUBSPAN_EXPAND(SUBSPAN_LAPACK_PREFIX, symbol, _)
#else
#define SUBSPAN_LAPACK_NAME(symbol) SUBSPAN_EXPAND(, symbol, _)
#endif

extern "C" {
#define SUBSPAN_DECLARE(T, p)                                                                                                                                  \
    void SUBSPAN_LAPACK_NAME(p##gesdd)(char *, int *, int *, T *, int *, T *, T *, int *, T *, int *, T *, int *, int *, int *);                               \
    void SUBSPAN_LAPACK_NAME(p##geqrf)(int *, int *, T *, int *, T *, T *, int *, int *);                                                                      \
    void SUBSPAN_LAPACK_NAME(p##orgqr)(int *, int *, int *, T *, int *, T *, T *, int *, int *);                                                               \
    void SUBSPAN_LAPACK_NAME(p##geqp3)(int *, int *, T *, int *, int *, T *, T *, int *, int *);
SUBSPAN_DECLARE(float, s)
SUBSPAN_DECLARE(double, d)
#undef SUBSPAN_DECLARE
}

namespace subspan {

inline void link_lapack() {
    set_lapack<float>({SUBSPAN_LAPACK_NAME(sgesdd), SUBSPAN_LAPACK_NAME(sgeqrf), SUBSPAN_LAPACK_NAME(sorgqr), SUBSPAN_LAPACK_NAME(sgeqp3)});
    set_lapack<double>({SUBSPAN_LAPACK_NAME(dgesdd), SUBSPAN_LAPACK_NAME(dgeqrf), SUBSPAN_LAPACK_NAME(dorgqr), SUBSPAN_LAPACK_NAME(dgeqp3)});
}

} // namespace subspan

#undef SUBSPAN_LAPACK_NAME
#undef SUBSPAN_EXPAND
#undef SUBSPAN_PASTE
