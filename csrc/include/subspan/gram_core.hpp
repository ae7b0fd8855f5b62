// The core that makes a projector of any basis: M = (VᵀV)⁺.
#pragma once

#include "subspan/apply_core.hpp"

namespace subspan {

/// m (k x k) such that V M Vᵀ is the orthogonal projector onto the columns of V, orthonormal or not, for one matrix of
/// the basis. VᵀV is formed in double on columns of unit length.
/// Returns the condition number of what was kept: rounding in V M (VᵀC) grows with it, so beyond about 100 an
/// orthonormal basis is the better choice; infinite, with m left alone, where columns are dependent or lengths of them are
/// below 1e-6 or above 1e6. Cost n k² flops in double.
template <class T> double gram_core(const Basis<T> &v, std::int64_t item, MatrixView<T> m);

} // namespace subspan
