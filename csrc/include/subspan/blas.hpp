// The LAPACK routines that the library calls, as a table of function pointers with Fortran calling conventions.
// Python fills it from SciPy's capsules; a C++ program installs its own (see link_lapack.hpp for one that is linked).
// Dense products are the library's own: no BLAS level-3 routine is needed.
#pragma once

namespace subspan {

/// LP64 Fortran signatures; characters are passed without their hidden lengths, as SciPy's capsules do.
template <class T> struct LapackTable {
    void (*gesdd)(char *jobz, int *m, int *n, T *a, int *lda, T *s, T *u, int *ldu, T *vt, int *ldvt, T *work, int *lwork, int *iwork, int *info) = nullptr;
    void (*geqrf)(int *m, int *n, T *a, int *lda, T *tau, T *work, int *lwork, int *info) = nullptr;
    void (*orgqr)(int *m, int *n, int *k, T *a, int *lda, T *tau, T *work, int *lwork, int *info) = nullptr;
    void (*geqp3)(int *m, int *n, T *a, int *lda, int *jpvt, T *tau, T *work, int *lwork, int *info) = nullptr;
};

/// Installs a table for T. Every pointer must be set; throws ValueError otherwise. Thread-safe.
template <class T> void set_lapack(const LapackTable<T> &table);
/// Whether there is one.
bool has_lapack();
/// The table in use; throws BackendError when none was installed.
template <class T> const LapackTable<T> &lapack();

} // namespace subspan
