// Counter-based random numbers: the value at an index depends on the key and the index alone, so that a stream is the
// same for any number of threads and on any device. Philox4x32-10 (Salmon et al., SC 2011).
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define SUBSPAN_ON_BOTH __host__ __device__
#else
#define SUBSPAN_ON_BOTH
#endif

namespace subspan {

struct Philox {
    std::uint64_t key = 0;

    struct Block {
        std::uint32_t v[4];
    };
    SUBSPAN_ON_BOTH Block operator()(std::uint64_t index) const {
        std::uint32_t c0 = std::uint32_t(index), c1 = std::uint32_t(index >> 32), c2 = 0, c3 = 0;
        std::uint32_t k0 = std::uint32_t(key), k1 = std::uint32_t(key >> 32);
        for (int round = 0; round < 10; ++round) {
            const std::uint64_t p0 = std::uint64_t(0xD2511F53u) * c0, p1 = std::uint64_t(0xCD9E8D57u) * c2;
            const std::uint32_t n0 = std::uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = std::uint32_t(p0 >> 32) ^ c3 ^ k1;
            c1 = std::uint32_t(p1);
            c3 = std::uint32_t(p0);
            c0 = n0;
            c2 = n2;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        return {{c0, c1, c2, c3}};
    }
    /// Four values in (-1, 1), uniform on a grid of 2^-23 that never holds zero.
    void uniform4(std::uint64_t index, double *out) const {
        const Block b = (*this)(index);
        for (int i = 0; i < 4; ++i) out[i] = uniform(b.v[i]);
    }
    /// One of the four.
    SUBSPAN_ON_BOTH double uniform(std::uint64_t index, int i) const {
        const Block b = (*this)(index);
        return uniform(i == 0 ? b.v[0] : (i == 1 ? b.v[1] : (i == 2 ? b.v[2] : b.v[3])));
    }
    /// Four standard normal values, by the method of Box and Muller (Ann. Math. Stat. 29, 1958), of 32 bits each.
    void normal4(std::uint64_t index, double *out) const {
        const Block b = (*this)(index);
        for (int i = 0; i < 4; i += 2) {
            const double r = std::sqrt(-2.0 * std::log((double(b.v[i]) + 0.5) * 0x1p-32));
            const double phase = (double(b.v[i + 1]) + 0.5) * 0x1p-32 * 6.283185307179586476925;
            out[i] = r * std::cos(phase);
            out[i + 1] = r * std::sin(phase);
        }
    }

  private:
    SUBSPAN_ON_BOTH static double uniform(std::uint32_t bits) { return (double(bits >> 8) + 0.5) * 0x1p-23 - 1.0; }
};

} // namespace subspan
