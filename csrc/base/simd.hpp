// How the own loops are compiled for several instruction sets from one source.
//
// A kernel is a struct with `template <int Bytes> static void run(args...)`, Bytes being the vector width. dispatch()
// instantiates it at 16, 32 and 64 bytes inside functions that carry the matching target attribute and calls the one
// that isa() names. Unlike target_clones this needs no ifunc, lets the register tile depend on the width, and can be
// switched by an environment variable, so that one machine tests every path.
#pragma once

#include "subspan/isa.hpp"

#include <cstdint>
#include <cmath>
#include <cstring>
#include <utility>

#if defined(__GNUC__) || defined(__clang__)
#if !defined(SUBSPAN_PORTABLE) // with it, what other compilers get is compiled here
#define SUBSPAN_VECTOR_EXT 1
#endif
#define SUBSPAN_INLINE inline __attribute__((always_inline))
#define SUBSPAN_NOINLINE __attribute__((noinline))
#define SUBSPAN_LAMBDA_INLINE __attribute__((always_inline))
#else
#define SUBSPAN_INLINE inline
#define SUBSPAN_NOINLINE
#define SUBSPAN_LAMBDA_INLINE
#endif

#if defined(SUBSPAN_VECTOR_EXT) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SUBSPAN_SHUFFLE 1
#endif
#endif

#if defined(SUBSPAN_VECTOR_EXT) && defined(__x86_64__) && !defined(SUBSPAN_ONE_ISA)
#define SUBSPAN_MULTI_ISA 1
#define SUBSPAN_TARGET_AVX2 __attribute__((target("arch=x86-64-v3")))
#define SUBSPAN_TARGET_AVX512 __attribute__((target("arch=x86-64-v4")))
#endif

namespace subspan::simd {

/// A vector of Bytes / sizeof(T) lanes. Only ever a local variable of an inlined kernel.
template <class T, int Bytes> struct Vec {
    static constexpr int lanes = Bytes / int(sizeof(T));
#ifdef SUBSPAN_VECTOR_EXT
    typedef T type __attribute__((vector_size(Bytes)));
    typedef T unaligned __attribute__((vector_size(Bytes), aligned(sizeof(T)), may_alias));
    static SUBSPAN_INLINE type load(const T *p) { return *reinterpret_cast<const unaligned *>(p); }
    static SUBSPAN_INLINE void store(T *p, type v) { *reinterpret_cast<unaligned *>(p) = v; }
#ifdef SUBSPAN_SHUFFLE
    // Adds the upper half of the first 2·Half lanes to the lower one until one lane is left: log2(lanes) steps, where
    // extracting lane after lane is a chain of `lanes`.
    template <int Half, int... I> static SUBSPAN_INLINE type fold(type v, std::integer_sequence<int, I...>) {
        return v + __builtin_shufflevector(v, v, (I < Half ? I + Half : I)...);
    }
    template <int Half> static SUBSPAN_INLINE T fold_all(type v) {
        if constexpr (Half == 0)
            return v[0];
        else
            return fold_all<Half / 2>(fold<Half>(v, std::make_integer_sequence<int, lanes>{}));
    }
    static SUBSPAN_INLINE T sum(type v) { return fold_all<lanes / 2>(v); }
#endif
#else
    // Compilers without vector types get arrays, whose loops they vectorise themselves.
    struct type {
        T v[lanes] = {};
        type &operator+=(const type &o) {
            for (int i = 0; i < lanes; ++i) v[i] += o.v[i];
            return *this;
        }
        type &operator-=(const type &o) {
            for (int i = 0; i < lanes; ++i) v[i] -= o.v[i];
            return *this;
        }
        friend type operator*(T s, const type &o) {
            type r;
            for (int i = 0; i < lanes; ++i) r.v[i] = s * o.v[i];
            return r;
        }
        friend type operator*(const type &a, const type &b) {
            type r;
            for (int i = 0; i < lanes; ++i) r.v[i] = a.v[i] * b.v[i];
            return r;
        }
        friend type operator/(T s, const type &o) {
            type r;
            for (int i = 0; i < lanes; ++i) r.v[i] = s / o.v[i];
            return r;
        }
        friend type operator-(const type &a, T s) {
            type r;
            for (int i = 0; i < lanes; ++i) r.v[i] = a.v[i] - s;
            return r;
        }
        friend type operator+(type a, const type &b) { return a += b; }
        friend type operator-(type a, const type &b) { return a -= b; }
        friend type operator-(const type &a) {
            type r;
            for (int i = 0; i < lanes; ++i) r.v[i] = -a.v[i];
            return r;
        }
        T operator[](int i) const { return v[i]; }
    };
    static SUBSPAN_INLINE type load(const T *p) {
        type r;
        std::memcpy(r.v, p, Bytes);
        return r;
    }
    static SUBSPAN_INLINE void store(T *p, const type &x) { std::memcpy(p, x.v, Bytes); }
#endif
#ifndef SUBSPAN_SHUFFLE
    static SUBSPAN_INLINE T sum(const type &v) {
        T s = 0;
        for (int l = 0; l < lanes; ++l) s += v[l];
        return s;
    }
#endif
};

#ifdef __FAST_MATH__
#error "subspan relies on IEEE arithmetic: sums in the order that they are written, NaN, infinity"
#endif

// a b + c, rounded once whatever the compiler was told of contraction. Where the target has no such instruction (has_fma)
// this is a call of the C library for each lane.
#if defined(__FMA__) || defined(__aarch64__) || !(defined(__x86_64__) || defined(__i386__) || defined(_M_X64) || defined(_M_IX86))
#define SUBSPAN_BASELINE_FMA 1
#else
#define SUBSPAN_BASELINE_FMA 0
#endif
template <int Bytes> inline constexpr bool has_fma = Bytes > 16 || SUBSPAN_BASELINE_FMA;

template <class T, int Bytes>
SUBSPAN_INLINE typename Vec<T, Bytes>::type fused(typename Vec<T, Bytes>::type a, typename Vec<T, Bytes>::type b, typename Vec<T, Bytes>::type c) {
    typename Vec<T, Bytes>::type r{};
    // Lane by lane: GCC makes one vector instruction of it from -O2 on.
#pragma GCC unroll 16
    for (int l = 0; l < Vec<T, Bytes>::lanes; ++l) {
#ifdef SUBSPAN_VECTOR_EXT
        if constexpr (sizeof(T) == 8)
            r[l] = __builtin_fma(a[l], b[l], c[l]);
        else
            r[l] = __builtin_fmaf(a[l], b[l], c[l]);
#else
        r.v[l] = std::fma(a.v[l], b.v[l], c.v[l]);
#endif
    }
    return r;
}

// A product that is rounded before it is added: equal products then cancel exactly, which they do not when one of them goes
// into a fused multiply-add.
#ifdef SUBSPAN_VECTOR_EXT
template <class T> SUBSPAN_INLINE T rounded(T product) {
#if defined(__has_builtin)
#if __has_builtin(__builtin_assoc_barrier)
    return __builtin_assoc_barrier(product);
#define SUBSPAN_HAS_BARRIER
#endif
#endif
#ifndef SUBSPAN_HAS_BARRIER
    asm("" : "+m"(product)); // through memory: no compiler sees where it comes from
    return product;
#endif
}
#else
template <class T> SUBSPAN_INLINE T rounded(T product) { // MSVC does not contract without /fp:contract
    return product;
}
#endif
#define SUBSPAN_ROUNDED(x) ::subspan::simd::rounded(x)

SUBSPAN_INLINE void prefetch([[maybe_unused]] const void *p) {
#ifdef SUBSPAN_VECTOR_EXT
    __builtin_prefetch(p);
#endif
}

SUBSPAN_INLINE void prefetch_write([[maybe_unused]] const void *p) {
#ifdef SUBSPAN_VECTOR_EXT
    __builtin_prefetch(p, 1);
#endif
}

/// x · y, two chains of vectors.
template <class T, int Bytes> SUBSPAN_INLINE T dot(const T *x, const T *y, std::int64_t n) {
    using V = Vec<T, Bytes>;
    constexpr int W = V::lanes;
    typename V::type a{}, b{};
    std::int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        a += V::load(x + i) * V::load(y + i);
        b += V::load(x + i + W) * V::load(y + i + W);
    }
    a += b;
    T s = V::sum(a);
    for (; i < n; ++i) s += x[i] * y[i];
    return s;
}

#ifdef SUBSPAN_MULTI_ISA
template <class K, class... A> SUBSPAN_TARGET_AVX2 void run_avx2(A... a) { K::template run<32>(a...); }
template <class K, class... A> SUBSPAN_TARGET_AVX512 void run_avx512(A... a) { K::template run<64>(a...); }
#endif
template <class K, class... A> void run_generic(A... a) { K::template run<16>(a...); }

template <class K, class... A> void dispatch(A... a) {
#ifdef SUBSPAN_MULTI_ISA
    switch (isa()) {
    case Isa::avx512: return run_avx512<K, A...>(a...);
    case Isa::avx2: return run_avx2<K, A...>(a...);
    case Isa::generic: break;
    }
#endif
    run_generic<K, A...>(a...);
}

/// Register tile of the product kernels: mr rows broadcast against nv vectors; mr divides nr = nv * lanes.
template <class T> struct Tile {
    int mr, nr;
};
template <class T> inline Tile<T> tile() {
    switch (isa()) {
    case Isa::avx512: return {8, 3 * 64 / int(sizeof(T))};
    case Isa::avx2: return {4, 3 * 32 / int(sizeof(T))};
    case Isa::generic: break;
    }
    return {2, 3 * 16 / int(sizeof(T))};
}

} // namespace subspan::simd
