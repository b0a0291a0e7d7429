// What one attention call is, and how its scratch memory is laid out: independent of the SIMD path.
//
// Everything is cut into blocks of 64 queries and 64 keys; the head dimension is padded with zeros to a multiple of 32. A `head` is a pair
// (batch, query head), a `unit` is a pair (batch, key/value head) and has G = H / HK heads. The backward works in waves of some units and
// some blocks of queries, so that its scratch (packed operands, dS) keeps to a budget; in which waves
// they come does not change what is added to what, and in which order.
#pragma once
#include <cmath>
#include <initializer_list>
#include <type_traits>

namespace {

constexpr int64_t BLOCK = 64;            // queries, or keys, of a block: the bits of a word of visibility
constexpr int64_t CHUNK = 2;             // blocks that wait for the next product together
constexpr int64_t WIDEST = 256;          // of a head
constexpr int64_t BUDGET = 24 << 20;     // bytes of scratch that a wave of the backward aims for, if all threads share it
constexpr int64_t OWN_BUDGET = 2 << 20;  // and if each has its own: what its cache holds
constexpr float LOG2E = 1.44269504088896340736f, LN2 = 0.69314718055994530942f;
enum Visible : uint8_t { NOTHING = 0, ALL = 1, SOME = 2 };

struct View {                            // [batch, position, head, D], the last stride is 1; strides in elements
    const void *data;
    int64_t batch, position, head;
};

struct Task {
    View q, k, v, dout;
    const void *o;                       // the forward's result, for the backward; contiguous as all results
    void *out, *dq, *dk, *dv;
    float *lse;
    const uint8_t *mask;
    int64_t mask_batch, mask_query, mask_key;    // strides of the mask
    int64_t B, T, S, H, HK, D;
    int dtype;
    bool causal;
    float scale;

    int64_t G, wide, query_blocks, key_blocks;   // wide: D padded
    int64_t masks;                               // 1 where all batches share one
    bool alone;                                  // each thread does whole units, with scratch of its own, of `own` bytes
    int64_t own;
    int64_t wave_units, wave_blocks;             // most units and most blocks of queries of a wave
    int64_t unit0, units, block0, blocks;        // the wave at work

    uint64_t *bits;      // [masks, query block, key block, 64 keys]: bit q of word k tells whether query q sees key k
    uint8_t *visible;    // [masks, query block, key block]: what that says of the block
    char *k_rows, *v_rows, *k_columns, *v_columns;       // [unit, key block][64][wide], or [wide][64]
    char *q_packed, *do_packed, *q_pairs, *do_pairs;     // [head, query block][wide / pair][64][pair], or [64 / pair][wide][pair]
    char *ds;            // [head, query block, key block][64 / pair][64][pair]
    float *own_lse, *delta; // [head, query block][64]: lse in the path's UNIT (+inf where nothing is seen), rowsum(dout * out)
    float *dk_sum, *dv_sum;      // [unit, key block][64][wide], where a unit takes several waves
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Address of row `position` of a head.
inline const char *row(const Task &t, const View &view, int64_t b, int64_t position, int64_t head) {
    const int64_t offset = b * view.batch + position * view.position + head * view.head;
    return static_cast<const char *>(view.data) + offset * (t.dtype == F32 ? 4 : 2);
}

// Sizes, waves and addresses that follow from the arguments; returns the bytes of scratch. `size`: bytes of an operand's element.
inline int64_t plan(Task &t, bool backward, int64_t size, int64_t threads, char *scratch) {
    t.G = t.H / t.HK;
    t.wide = ceil_div(t.D, 32) * 32;
    t.query_blocks = ceil_div(t.T, BLOCK);
    t.key_blocks = ceil_div(t.S, BLOCK);
    t.masks = !t.mask ? 0 : t.mask_batch ? t.B : 1;
    const int64_t all_units = t.B * t.HK, rounds = ceil_div(all_units, threads);
    t.alone = backward && rounds * threads * 4 <= all_units * 5;
    t.wave_units = all_units;
    t.wave_blocks = t.query_blocks;
    if (backward) {
        const int64_t budget = t.alone ? OWN_BUDGET : BUDGET;
        const int64_t bytes = t.G * BLOCK * (4 * t.wide * size + 8 + t.key_blocks * BLOCK * size);   // of a unit's block of queries
        t.wave_units = t.alone ? 1 : larger(1, smaller(all_units, budget / (bytes * t.query_blocks)));
        t.wave_units = ceil_div(all_units, ceil_div(all_units, t.wave_units));
        if (t.wave_units == 1) t.wave_blocks = larger(1, smaller(t.query_blocks, budget / bytes));
        t.wave_blocks = ceil_div(t.query_blocks, ceil_div(t.query_blocks, t.wave_blocks));
        t.wave_blocks = smaller(t.query_blocks, ceil_div(t.wave_blocks, CHUNK) * CHUNK);
    }
    int64_t used = 0;
    auto take = [&](auto *&where, int64_t bytes) {
        where = reinterpret_cast<typename std::remove_reference<decltype(where)>::type>(scratch + used);
        used += ceil_div(bytes, 64) * 64;
    };
    const int64_t keys = t.wave_units * t.key_blocks * BLOCK, queries = t.wave_units * t.G * t.wave_blocks * BLOCK;
    const int64_t states = t.masks * t.query_blocks * t.key_blocks;
    take(t.bits, states * BLOCK * 8);
    take(t.visible, states);
    const int64_t shared = used;
    take(t.k_rows, keys * t.wide * size);
    if (!backward) {
        take(t.v_columns, keys * t.wide * size);
        return used;
    }
    take(t.v_rows, keys * t.wide * size);
    take(t.k_columns, keys * t.wide * size);
    take(t.q_packed, queries * t.wide * size);
    take(t.do_packed, queries * t.wide * size);
    take(t.q_pairs, queries * t.wide * size);
    take(t.do_pairs, queries * t.wide * size);
    take(t.ds, queries * t.key_blocks * BLOCK * size);
    take(t.own_lse, queries * 4);
    take(t.delta, queries * 4);
    const int64_t sums = t.wave_blocks < t.query_blocks ? keys * t.wide * 4 : 0;
    take(t.dk_sum, sums);
    take(t.dv_sum, sums);
    t.own = used - shared;
    return t.alone ? shared + t.own * threads : used;
}

// The same task with the scratch of thread number `thread`.
inline Task with_scratch_of(const Task &task, int64_t thread) {
    Task t = task;
    for (char **place : {&t.k_rows, &t.v_rows, &t.k_columns, &t.q_packed, &t.do_packed, &t.q_pairs, &t.do_pairs, &t.ds}) *place += thread * t.own;
    for (float **place : {&t.own_lse, &t.delta, &t.dk_sum, &t.dv_sum}) *place += thread * t.own / 4;
    return t;
}

// ---- who sees whom

inline int64_t mask_block(const Task &t, int64_t b, int64_t i, int64_t j) {
    return ((t.masks > 1 ? b : 0) * t.query_blocks + i) * t.key_blocks + j;
}

// The first query of block i that sees key `key`, by causality; may lie outside of the block.
inline int64_t first_query(const Task &t, int64_t i, int64_t key) { return key - (t.S - t.T) - i * BLOCK; }

// What query block i sees of key block j. Queries beyond T do not matter, keys beyond S are hidden.
inline Visible visible(const Task &t, int64_t b, int64_t i, int64_t j) {
    Visible state = t.mask ? Visible(t.visible[mask_block(t, b, i, j)]) : ALL;
    if (t.causal) {
        if (first_query(t, i, j * BLOCK) >= smaller(BLOCK, t.T - i * BLOCK)) return NOTHING;
        if (state == ALL && first_query(t, i, (j + 1) * BLOCK - 1) > 0) state = SOME;
    }
    return state == ALL && (j + 1) * BLOCK > t.S ? SOME : state;
}

// Words of a block of which SOME is visible: bit q of word k.
inline void visible_bits(const Task &t, int64_t b, int64_t i, int64_t j, uint64_t *words) {
    for (int64_t k = 0; k < BLOCK; ++k) {
        uint64_t word = t.mask ? t.bits[mask_block(t, b, i, j) * BLOCK + k] : ~uint64_t(0);
        if (t.causal) {
            const int64_t first = first_query(t, i, j * BLOCK + k);
            word = first >= BLOCK ? 0 : first > 0 ? word & ~uint64_t(0) << first : word;
        }
        words[k] = j * BLOCK + k < t.S ? word : 0;
    }
}

inline void transpose_bits(uint64_t *w) {    // 64 x 64, Hacker's Delight 7-3
    uint64_t low = 0x00000000ffffffffull;
    for (int step = 32; step; step >>= 1, low ^= low << step)
        for (int k = 0; k < 64; k = ((k | step) + 1) & ~step) {
            const uint64_t swap = (w[k] >> step ^ w[k | step]) & low;
            w[k] ^= swap << step;
            w[k | step] ^= swap;
        }
}

// Items are (mask, query block): the mask's bytes become bits, and every block's state.
inline void read_mask(const void *task, int64_t first, int64_t last) {
    const Task &t = *static_cast<const Task *>(task);
    for (int64_t item = first; item < last; ++item) {
        const int64_t m = item / t.query_blocks, i = item % t.query_blocks, queries = smaller(BLOCK, t.T - i * BLOCK);
        for (int64_t j = 0; j < t.key_blocks; ++j) {
            uint64_t *words = t.bits + (item * t.key_blocks + j) * BLOCK, any = 0, every = ~uint64_t(0);
            const int64_t keys = smaller(BLOCK, t.S - j * BLOCK);
            for (int64_t q = 0; q < BLOCK; ++q) {
                words[q] = 0;
                if (q >= queries) continue;
                const uint8_t *from = t.mask + m * t.mask_batch + (i * BLOCK + q) * t.mask_query + j * BLOCK * t.mask_key;
                int64_t k = 0;
                for (; t.mask_key == 1 && k + 8 <= keys; k += 8) {
                    uint64_t eight;
                    std::memcpy(&eight, from + k, 8);
                    words[q] |= (eight * 0x0102040810204080ull >> 56) << k;    // bytes are 0 or 1; little endian
                }
                for (; k < keys; ++k) words[q] |= uint64_t(from[k * t.mask_key] != 0) << k;
                any |= words[q];
                every &= words[q] | (keys < BLOCK ? ~uint64_t(0) << keys : 0);
            }
            t.visible[item * t.key_blocks + j] = !any ? NOTHING : !~every ? ALL : SOME;
            if (any) transpose_bits(words);
        }
    }
}

}  // namespace
