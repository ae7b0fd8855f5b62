// Orthonormal bases of column spaces: the QR factor, the polar factor, and Haar-random ones.
#pragma once

#include "subspan/errors.hpp"
#include "subspan/options.hpp"
#include "subspan/views.hpp"

#include <cstdint>
#include <string>

namespace subspan {

/// Columns of `q` (m x k, contiguous rows) become an orthonormal basis of the columns of `a` (m x k, k <= m), for every
/// matrix of a stack; `q` may be `a`. A column is dependent when what it has outside of the columns before it is within
/// m eps of its own length: then `complete` decides between any orthonormal completion and LinAlgError.
/// cholesky: shifted Cholesky QR on columns of unit length (Fukaya et al., SIAM J. Sci. Comput. 42, 2020), repeated until
/// the measured loss of orthogonality is at working precision, LinAlgError where Cholesky cannot separate columns;
/// automatic: the same, then Householder QR; polar: the nearest orthonormal matrix, by QR and the dynamically weighted
/// Halley iteration on the small factor in double (Nakatsukasa, Bai and Gygi, SIAM J. Matrix Anal. Appl. 31, 2010).
/// `ranks`, where it is not null, gets for each matrix how many columns are not dependent.
/// Cost 3 m k² flops (cholesky, well conditioned), 4 m k² (householder), 6 m k² + 40 k³ (polar).
template <class T>
void orthonormalize(const StackView<const T> &a, const StackView<T> &q, Orthonormalization method, bool complete, std::int64_t *ranks = nullptr);

[[noreturn]] inline void dependent_column(std::int64_t column) {
    throw LinAlgError("orthonormalize: column " + std::to_string(column) +
                      " of A depends on the columns before it; rank_deficient='complete' puts any orthonormal one there");
}

/// Fills q (n x k, contiguous rows) with Haar-distributed orthonormal columns: QR of counter-based normals with the
/// diagonal of R made positive (Mezzadri, Notices AMS 54, 2007).
template <class T> void random_orthogonal(std::uint64_t key, const StackView<T> &q);

/// How far the columns of u are from orthonormal: ||(UᵀU - I) z|| / ||z|| for two fixed sign vectors z, the larger one,
/// over all matrices of the stack. Cost 4 n k flops each, where UᵀU would be n k².
template <class T> double orthonormality_defect(const StackView<const T> &u);

/// Whether a stack holds neither NaN nor infinity.
template <class T> bool all_finite(const StackView<const T> &x);

} // namespace subspan
