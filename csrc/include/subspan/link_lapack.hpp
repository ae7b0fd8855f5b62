// Fills the LAPACK table from routines that the program is linked with (any LP64 LAPACK: OpenBLAS, MKL, Accelerate,
// the reference). A library that renames its symbols (scipy-openblas32: scipy_dsyevd_) is taken by defining
// SUBSPAN_LAPACK_NAME(symbol) before the include. Include it in one file of a C++ program and call subspan::link_lapack() before the first operation.
#pragma once

#include "subspan/blas.hpp"

#ifndef SUBSPAN_LAPACK_NAME
#define SUBSPAN_LAPACK_NAME(symbol) symbol##_
#endif

extern "C" {
#define SUBSPAN_DECLARE(T, p)                                                                                          \
    void SUBSPAN_LAPACK_NAME(p##gesdd)(char *, int *, int *, T *, int *, T *, T *, int *, T *, int *, T *, int *, int *, int *);           \
    void SUBSPAN_LAPACK_NAME(p##geqrf)(int *, int *, T *, int *, T *, T *, int *, int *);                                                  \
    void SUBSPAN_LAPACK_NAME(p##orgqr)(int *, int *, int *, T *, int *, T *, T *, int *, int *);
SUBSPAN_DECLARE(float, s)
SUBSPAN_DECLARE(double, d)
#undef SUBSPAN_DECLARE
}

namespace subspan {

inline void link_lapack() {
    set_lapack<float>({SUBSPAN_LAPACK_NAME(sgesdd),
                       SUBSPAN_LAPACK_NAME(sgeqrf), SUBSPAN_LAPACK_NAME(sorgqr)});
    set_lapack<double>({SUBSPAN_LAPACK_NAME(dgesdd),
                        SUBSPAN_LAPACK_NAME(dgeqrf), SUBSPAN_LAPACK_NAME(dorgqr)});
}

} // namespace subspan
