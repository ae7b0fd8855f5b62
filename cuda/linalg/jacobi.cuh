// Jacobi rotations in kernels.
#pragma once

#include "subspan/cuda/launch.cuh"

namespace subspan::cuda {

/// The rotation that makes two vectors orthogonal, from their squares and their product.
struct Rotation {
    double cosine, sine;
    /// Of one entry of each vector; small angles lose nothing to a cosine near one.
    SUBSPAN_DEVICE void rotate(double &x, double &y) const {
        const double a = x, b = y, tau = sine / (1.0 + cosine);
        x = a - sine * (b + tau * a);
        y = b + sine * (a - tau * b);
    }
};
SUBSPAN_DEVICE Rotation rotation(double xx, double yy, double xy) {
    // By the cosine of twice the angle: two inverse roots, no division. Squares of what is far from one are kept in range.
    const double way = 0.5 * (yy - xx), far = most(way < 0 ? -way : way, xy < 0 ? -xy : xy);
    const double unit = far < 1e-140 ? 0x1p500 : (far > 1e140 ? 0x1p-500 : 1.0), half = unit * way, off = unit * xy;
    const double inverse = inverse_root(fma(half, half, off * off)), square = 0.5 + 0.5 * ((half < 0 ? -half : half) * inverse);
    const double over = inverse_root(square), sine = 0.5 * (off * inverse) * over;
    return {square * over, half < 0 ? -sine : sine};
}
/// Whether they are orthogonal already.
SUBSPAN_DEVICE bool apart(double xx, double yy, double xy, double tolerance) { return !(xy * xy > tolerance * tolerance * (xx * yy)); }

/// Seats of a round robin tournament, two at least: seat 0 stays, the others move on by one each round. Pair p of a round are seats p and
/// seats - 1 - p.
SUBSPAN_DEVICE int at_seat(int seat, int round, int seats) {
    return seat == 0 ? 0 : 1 + (seat - 1 + round) % (seats - 1); // NOLINT(clang-analyzer-core.DivideZero)
}

/// The n x n products of vectors after the rotations of a round, from both sides: 2 x 2 entries a thread, rows of one pair and columns of another.
/// A seat past n is empty, and the rotation of its pair the identity.
SUBSPAN_DEVICE void rotate_products(double *g, int ld, int n, int seats, int round, const double *cosine, const double *sine, int thread, int threads) {
    const int pairs = seats / 2;
    for (int e = thread; e < pairs * pairs; e += threads) {
        const int a = e / pairs, b = e % pairs;
        const int i[2] = {at_seat(a, round, seats), at_seat(seats - 1 - a, round, seats)},
                  j[2] = {at_seat(b, round, seats), at_seat(seats - 1 - b, round, seats)};
        double x[2][2];
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int c = 0; c < 2; ++c) x[r][c] = i[r] < n && j[c] < n ? g[i[r] * ld + j[c]] : 0.0;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const double low = x[0][c], high = x[1][c];
            x[0][c] = cosine[a] * low - sine[a] * high;
            x[1][c] = sine[a] * low + cosine[a] * high;
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const double low = x[r][0], high = x[r][1];
            x[r][0] = cosine[b] * low - sine[b] * high;
            x[r][1] = sine[b] * low + cosine[b] * high;
        }
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int c = 0; c < 2; ++c)
                if (i[r] < n && j[c] < n) g[i[r] * ld + j[c]] = x[r][c];
    }
}

} // namespace subspan::cuda
