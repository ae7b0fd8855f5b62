// What a token has with those that its offsets reach: rejections, lengths, and the vector u that they add up to.
#pragma once

#include "plucker/tile.hpp"

namespace subspan::plucker {

/// In: offsets, weights. Out, of each token: zz = z·z and u; of each offset and token: c, k, g, ww and the rejections w. What
/// they mean: see Tile::backward.
struct OffsetArguments {
    const Offsets *offsets;
    int64_t r, m, count;
    MixNorm norm;
    double eps, sign;
    const double *alpha;
    const unsigned char *valid;
    double *zz, *c, *k, *g, *ww, *w, *u;
    int64_t keep; // distance of the rejections of two offsets: zero where they are not kept
};

void offset_forward(const OffsetArguments &a);

/// The gradient of z and of what offsets reach, from that of u: in the columns of the window `into`, and da.
struct OffsetBackward {
    int64_t r, m, count, columns;
    const int64_t *column;
    const double *z, *zz, *c, *k, *g, *ww, *w; // z: own columns
    MixNorm norm;
    double eps, sign;
    const double *power, *const *w_power;
    const double *du; // r x kTokens
    double *dz;       // r x kTokens: what comes through z in the wedge; changed
    double *into, *da;
};

void offset_backward(const OffsetBackward &a);

} // namespace subspan::plucker
