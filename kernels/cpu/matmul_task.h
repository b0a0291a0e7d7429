// What a product of matmul.cpp is, how it is cut into items of work, and where its scratch lies. Included once, after simd.h.
#pragma once

namespace {

constexpr int64_t TILE = 32;              // rows and columns of a step's block: two tiles each; and values of a step of the reduction
constexpr int64_t PANEL = 1 << 20;        // bytes of W that an item holds unpacked: half of an L2
constexpr int64_t CHUNK = 2048;           // length of reduction between loads and stores of sums; shorter ones, to keep x in L1, were slower
constexpr int64_t WIDEST = 10;            // pairs of tiles of a panel whose reduction goes in parts: its 320 columns read x once
constexpr int64_t TALLEST = 2048;         // rows whose sums an item keeps when it goes over the reduction several times

enum Form { BLOCKWISE4 = 0, DENSE = 1, INT8 = 2 };

struct Weight {     // [height, width]
    int form; int64_t height, width, block;
    const void *codes, *absmax; const float *map, *nested, *offset, *values;
};

// y[M, C] = x[M, R] W^T, or with transpose x W; plus inner[M, rank] factor^T (factor [C, rank]), or inner factor (factor [rank, C]).
struct Task {
    Weight w, factor;
    const uint16_t *x, *inner;
    uint16_t *y;
    const float *scales;              // of the columns of y, or null
    int64_t M, R, C, rank;
    bool transpose;
    int64_t pairs, groups, segment, tall, talls, tail, own, sums_at, rows_at;    // see plan
    char *scratch;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t rounded_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Pairs of tiles of a panel: as many as fit with their whole reduction.
inline int64_t widest_of(const Task &t) { return larger(WIDEST, PANEL / (rounded_up(t.R, TILE) * 2 * TILE)); }

// Items are (rows, group of columns). Sums are exact in every order of this plan, so results depend on the shapes alone, not on threads.
inline int64_t plan(Task &t, int threads) {
    t.pairs = ceil_div(t.C, TILE);
    t.groups = smaller(t.pairs, rounded_up(ceil_div(t.pairs, widest_of(t)), threads));
    const int64_t widest = ceil_div(t.pairs, t.groups), length = rounded_up(t.R, TILE);
    t.tail = rounded_up(t.rank, TILE);
    const int64_t segments = ceil_div(length * widest * 2 * TILE, PANEL);
    t.segment = rounded_up(ceil_div(length, segments), TILE);
    t.talls = t.groups < threads ? smaller(ceil_div(t.M, TILE), ceil_div(threads, t.groups)) : 1;
    if (t.segment < length) t.talls = larger(t.talls, ceil_div(t.M, TALLEST));
    t.tall = rounded_up(ceil_div(t.M, t.talls), TILE);
    t.talls = ceil_div(t.M, t.tall);
    t.sums_at = widest * 2 * TILE * (t.segment + t.tail);
    t.rows_at = t.sums_at + (t.segment < length ? t.tall : TILE) * widest * TILE * 4;
    t.own = rounded_up(t.rows_at + larger(CHUNK, t.tail) * TILE * 2, 4096) + 64 * 5;    // threads' scratch starts in different sets of L1
    return t.own * threads;
}

inline float scale_of(const Weight &w, int64_t block) {
    if (!w.map) return static_cast<const float *>(w.absmax)[block];
    const float product = w.map[static_cast<const uint8_t *>(w.absmax)[block]] * w.nested[block / 256];
    return product + *w.offset;
}

}  // namespace
