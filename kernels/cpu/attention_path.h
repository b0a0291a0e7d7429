// The items of work of one SIMD path: what each thread does to a block. Included after attention_tile.h, in the same namespace.
//
// Scores are kept transposed, S^T = K Q^T [keys x queries]: the softmax then runs down the columns, in every lane by itself, and two rows of
// P^T or dS^T, rounded and interleaved, are the packed right operand of O^T = V^T P^T and dQ^T = K^T dS^T; as they are, they are the left
// operand of dV = P^T dO and dK = dS^T Q.

constexpr int64_t SQUARE = BLOCK * BLOCK;
constexpr float SLACK = 8.0f;       // so probabilities stay below e^8, which costs no precision

template <typename X> inline X *at(char *base, int64_t offset) { return reinterpret_cast<X *>(base) + offset; }

struct Place { int64_t b, head, i; };    // of a block of queries; `head` is one of H
inline Place place(const Task &t, int64_t item) {
    const int64_t h = item / t.blocks, unit = t.unit0 + h / t.G;
    return {unit / t.HK, unit % t.HK * t.G + h % t.G, t.block0 + item % t.blocks};
}

// Items are (unit, key block): K and V for the left side of products.
TARGET static void pack_keys(const void *task, int64_t first, int64_t last) {
    const Task &t = *static_cast<const Task *>(task);
    const int64_t block = BLOCK * t.wide;
    alignas(64) Element local[BLOCK * WIDEST];
    for (int64_t item = first; item < last; ++item) {
        const int64_t unit = t.unit0 + item / t.key_blocks, j = item % t.key_blocks, rows = smaller(BLOCK, t.S - j * BLOCK);
        for (int which = 0; which < 2; ++which) {
            const View &view = which ? t.v : t.k;
            int64_t step;
            const Element *x = staged(t, row(t, view, unit / t.HK, j * BLOCK, unit % t.HK), view.position, rows, local, &step);
            if (char *to = which ? t.v_rows : t.k_rows)
                for (int64_t r = 0; r < BLOCK; ++r) std::memcpy(at<Element>(to, item * block + r * t.wide), x + r * step, size_t(t.wide) * sizeof(Element));
            if (char *to = which ? t.v_columns : t.k_columns) turn(x, step, t.wide, at<Element>(to, item * block));
        }
    }
}

// ---- forward

// Scores [rows][64] -> P^T in pairs = power(scale S - top), scale > 0. top: what stands in for the running maximum: it follows only when that
// is SLACK above it, which hardly happens twice, all in UNITs; total: running sum; factor: what earlier sums and products have to be multiplied with.
// Returns whether any factor is not 1.
TARGET static bool softmax(const float *s, int64_t rows, float unit_scale, float *top, float *total, float *factor, Element *p) {
    constexpr int SIDE = 4;    // vectors side by side
    bool changed = false;
    const Floats scale = all(unit_scale), zero{};
    for (int64_t c = 0; c < BLOCK; c += SIDE * WIDTH) {
        Floats high[SIDE], sum[SIDE];
        for (int v = 0; v < SIDE; ++v) high[v] = all(-INFINITY);
        for (int64_t r = 0; r < rows; ++r)
            for (int v = 0; v < SIDE; ++v) high[v] = most(high[v], loaded(s + r * BLOCK + c + v * WIDTH));
        for (int v = 0; v < SIDE; ++v) {
            const Floats before = loaded(top + c + v * WIDTH), now = high[v] * scale, limit = before + all(SLACK);
            const Floats kept = where_above(now, limit, now, before), safe = where_lowest(kept, zero, kept), one = all(1.0f);
            const Floats f = where_lowest(before, one, where_above(now, limit, power(before - safe), one));    // before it saw any, sums are 0
            store(top + c + v * WIDTH, kept);
            store(factor + c + v * WIDTH, f);
            sum[v] = loaded(total + c + v * WIDTH) * f;
            high[v] = safe;
        }
        for (int64_t r = 0; r < rows; r += 2)
            for (int v = 0; v < SIDE; v += 2) {
                const float *here = s + r * BLOCK + c + v * WIDTH;
                const Floats a0 = power(madd(loaded(here), scale, -high[v])), a1 = power(madd(loaded(here + WIDTH), scale, -high[v + 1]));
                here += BLOCK;
                const Floats b0 = power(madd(loaded(here), scale, -high[v])), b1 = power(madd(loaded(here + WIDTH), scale, -high[v + 1]));
                sum[v] += a0 + b0;
                sum[v + 1] += a1 + b1;
                put_pairs(p + r * BLOCK + (c + v * WIDTH) * PAIR, row_of(a0, a1), row_of(b0, b1));
            }
        for (int v = 0; v < SIDE; ++v) store(total + c + v * WIDTH, sum[v]);
    }
    for (int64_t q = 0; q < BLOCK; ++q) changed |= factor[q] != 1.0f;
    return changed;
}

TARGET static void hide(float *s, const uint64_t *words) {
    for (int64_t r = 0; r < BLOCK; ++r)
        for (int64_t c = 0; c < BLOCK; c += WIDTH) store(s + r * BLOCK + c, choose(words[r] >> c, loaded(s + r * BLOCK + c), all(-INFINITY)));
}

// Items are (head, query block), the last block, which has most to do if causal, first.
TARGET static void forward(const void *task, int64_t first, int64_t last) {
    const Task &t = *static_cast<const Task *>(task);
    const int64_t block = BLOCK * t.wide;
    alignas(64) float o[BLOCK * WIDEST], turned[BLOCK * WIDEST], s[CHUNK * SQUARE], top[BLOCK], total[BLOCK], factor[BLOCK];
    alignas(64) Element p[CHUNK * SQUARE], q[BLOCK * WIDEST];
    const float unit_scale = std::fmax(std::fabs(t.scale) * UNIT, 1e-30f);    // not 0, which makes NaN of the -inf of a hidden score
    begin();
    for (int64_t item = first; item < last; ++item) {
        const int64_t h = item / t.blocks;
        const Place at_ = place(t, h * t.blocks + t.blocks - 1 - item % t.blocks);
        const int64_t i = at_.i, rows = smaller(BLOCK, t.T - i * BLOCK), unit = h / t.G;
        int64_t step;
        const Element *x = staged(t, row(t, t.q, at_.b, i * BLOCK, at_.head), t.q.position, rows, reinterpret_cast<Element *>(turned), &step);
        pack_columns(x, step, t.wide, q);
        for (int64_t c = 0; c < BLOCK; ++c) top[c] = -INFINITY, total[c] = 0.0f;
        bool fresh = true;
        for (int64_t j = 0; j < t.key_blocks;) {
            int64_t found[CHUNK], n = 0;
            for (; j < t.key_blocks && n < CHUNK; ++j) {
                const Visible state = visible(t, at_.b, i, j);
                if (state == NOTHING) continue;
                found[n] = j;
                product(BLOCK, BLOCK, t.wide, 1, at<Element>(t.k_rows, (unit * t.key_blocks + j) * block), t.wide, 0, q, 0, s + n * SQUARE, false);
                if (t.scale < 0)    // so that the largest score stays the largest
                    for (int64_t e = 0; e < SQUARE; e += WIDTH) store(s + n * SQUARE + e, -loaded(s + n * SQUARE + e));
                if (state == SOME) {
                    uint64_t words[BLOCK];
                    visible_bits(t, at_.b, i, j, words);
                    hide(s + n * SQUARE, words);
                }
                ++n;
            }
            if (!n) break;
            if (softmax(s, n * BLOCK, unit_scale, top, total, factor, p) && !fresh)
                for (int64_t d = 0; d < t.wide; ++d)
                    for (int64_t c = 0; c < BLOCK; c += WIDTH) store(o + d * BLOCK + c, loaded(o + d * BLOCK + c) * loaded(factor + c));
            for (int64_t m = 0, run; m < n; m += run, fresh = false) {
                for (run = 1; m + run < n && found[m + run] == found[m] + run;) ++run;
                product(t.wide, BLOCK, BLOCK, run, at<Element>(t.v_columns, (unit * t.key_blocks + found[m]) * block), BLOCK, block, p + m * SQUARE, SQUARE, o, !fresh);
            }
        }
        for (int64_t c = 0; c < BLOCK; c += WIDTH) {    // a query that saw nothing has total 0 and maximum -inf; one of NaN has total NaN
            const Floats high = loaded(top + c) + loaded(total + c) * Floats{}, sum = where_lowest(high, all(1.0f), loaded(total + c));
            store(top + c, high);
            store(factor + c, where_lowest(high, Floats{}, all(1.0f) / sum));
            store(total + c, where_lowest(high, high, madd(logarithm2(sum), all(LN2), high * all(1.0f / UNIT))));
        }
        if (fresh) std::memset(o, 0, sizeof(float) * size_t(block));
        for (int64_t d = 0; d < t.wide; ++d)
            for (int64_t c = 0; c < BLOCK; c += WIDTH) store(o + d * BLOCK + c, where_lowest(loaded(top + c), Floats{}, loaded(o + d * BLOCK + c) * loaded(factor + c)));
        transpose(o, BLOCK, t.wide, BLOCK, turned);
        const int64_t size = t.dtype == F32 ? 4 : 2;
        write_rows(t, turned, 1.0f, static_cast<char *>(t.out) + ((at_.b * t.T + i * BLOCK) * t.H + at_.head) * t.D * size, t.H * t.D, rows);
        std::memcpy(t.lse + (at_.b * t.H + at_.head) * t.T + i * BLOCK, total, size_t(rows) * 4);
    }
    end();
}

// ---- backward

// Items are (head, query block) of the wave: Q and dO for the right side of products, delta and lse.
TARGET static void pack_queries(const void *task, int64_t first, int64_t last) {
    const Task &t = *static_cast<const Task *>(task);
    const int64_t block = BLOCK * t.wide;
    alignas(64) Element local[BLOCK * WIDEST], local_o[BLOCK * WIDEST];
    for (int64_t item = first; item < last; ++item) {
        const Place here = place(t, item);
        const int64_t begin_row = here.i * BLOCK, rows = smaller(BLOCK, t.T - begin_row);
        int64_t step, step_o;
        const Element *x = staged(t, row(t, t.q, here.b, begin_row, here.head), t.q.position, rows, local, &step);
        pack_columns(x, step, t.wide, at<Element>(t.q_packed, item * block));
        pack_pairs(x, step, t.wide, at<Element>(t.q_pairs, item * block));
        x = staged(t, row(t, t.dout, here.b, begin_row, here.head), t.dout.position, rows, local, &step);
        pack_columns(x, step, t.wide, at<Element>(t.do_packed, item * block));
        pack_pairs(x, step, t.wide, at<Element>(t.do_pairs, item * block));
        const View out = {t.o, t.T * t.H * t.D, t.H * t.D, t.D};
        const Element *y = staged(t, row(t, out, here.b, begin_row, here.head), out.position, rows, local_o, &step_o);
        for (int64_t r = 0; r < BLOCK; ++r) {
            Floats sum0{}, sum1{};
            for (int64_t d = 0; d < t.wide; d += 2 * WIDTH) {
                sum0 = madd(element(x + r * step + d), element(y + r * step_o + d), sum0);
                sum1 = madd(element(x + r * step + d + WIDTH), element(y + r * step_o + d + WIDTH), sum1);
            }
            float total = 0.0f;
            sum0 += sum1;
            for (int v = 0; v < WIDTH; ++v) total += sum0[v];
            t.delta[item * BLOCK + r] = total;
            const float lse = r < rows ? t.lse[(here.b * t.H + here.head) * t.T + begin_row + r] : INFINITY;
            t.own_lse[item * BLOCK + r] = lse == -INFINITY ? INFINITY : lse * UNIT;    // so that what sees nothing has P = 0
        }
    }
}

// S^T, dP^T [64 keys][64 queries] -> P^T, dS^T = P^T (dP^T - delta), as left operands, and dS^T as a right one. words: what is visible, if not all.
TARGET static void gradient_of_scores(const float *s, const float *dp, const float *lse, const float *delta, float unit_scale, const uint64_t *words,
                                      Element *p, Element *ds, Element *ds_pairs) {
    const Floats scale = all(unit_scale), zero{};
    for (int64_t c = 0; c < BLOCK; c += 2 * WIDTH) {
        const Floats lse0 = -loaded(lse + c), lse1 = -loaded(lse + c + WIDTH), delta0 = loaded(delta + c), delta1 = loaded(delta + c + WIDTH);
        for (int64_t r = 0; r < BLOCK; r += 2) {
            Row gradient[2];
            for (int64_t k = 0; k < 2; ++k) {
                const int64_t here = (r + k) * BLOCK + c;
                Floats p0 = power(madd(loaded(s + here), scale, lse0)), p1 = power(madd(loaded(s + here + WIDTH), scale, lse1));
                if (words) {
                    p0 = choose(words[r + k] >> c, p0, zero);
                    p1 = choose(words[r + k] >> c >> WIDTH, p1, zero);
                }
                put_row(p + here, row_of(p0, p1));
                gradient[k] = row_of(p0 * (loaded(dp + here) - delta0), p1 * (loaded(dp + here + WIDTH) - delta1));
                put_row(ds + here, gradient[k]);
            }
            put_pairs(ds_pairs + r * BLOCK + c * PAIR, gradient[0], gradient[1]);
        }
    }
}

// Items are (unit, key block): dK and dV over all heads of the unit and all blocks of queries of the wave; dS is left for dQ.
TARGET static void keys_backward(const void *task, int64_t first, int64_t last) {
    const Task &t = *static_cast<const Task *>(task);
    const int64_t block = BLOCK * t.wide;
    alignas(64) float dk_here[BLOCK * WIDEST], dv_here[BLOCK * WIDEST], s[SQUARE], dp[SQUARE];
    alignas(64) Element p[CHUNK * SQUARE], ds[CHUNK * SQUARE];
    begin();
    for (int64_t item = first; item < last; ++item) {
        const int64_t slot = item, u = item / t.key_blocks, j = item % t.key_blocks;
        const int64_t unit = t.unit0 + u, b = unit / t.HK, rows = smaller(BLOCK, t.S - j * BLOCK);
        const bool whole = t.wave_blocks == t.query_blocks, ends = t.block0 + t.blocks == t.query_blocks;
        float *dk = whole ? dk_here : t.dk_sum + slot * block, *dv = whole ? dv_here : t.dv_sum + slot * block;
        if (t.block0 == 0) {
            std::memset(dk, 0, sizeof(float) * size_t(block));
            std::memset(dv, 0, sizeof(float) * size_t(block));
        }
        const Element *k = at<Element>(t.k_rows, slot * block), *v = at<Element>(t.v_rows, slot * block);
        for (int64_t from = 0; from < t.blocks; from += CHUNK)    // some blocks of all heads, then the next: waves do not change the order
            for (int64_t g = 0; g < t.G; ++g) {
                const int64_t to = smaller(from + CHUNK, t.blocks), heads_first = (u * t.G + g) * t.blocks;
                for (int64_t n = from, ready = 0; n < to; ++n) {    // blocks n - ready .. n - 1 wait in p and ds
                    const Visible state = visible(t, b, t.block0 + n, j);
                    const int64_t query = heads_first + n;
                    if (state != NOTHING) {
                        uint64_t words[BLOCK];
                        if (state == SOME) visible_bits(t, b, t.block0 + n, j, words);
                        product(BLOCK, BLOCK, t.wide, 1, k, t.wide, 0, at<Element>(t.q_packed, query * block), 0, s, false);
                        product(BLOCK, BLOCK, t.wide, 1, v, t.wide, 0, at<Element>(t.do_packed, query * block), 0, dp, false);
                        gradient_of_scores(s, dp, t.own_lse + query * BLOCK, t.delta + query * BLOCK, t.scale * UNIT, state == SOME ? words : nullptr,
                                           p + ready * SQUARE, ds + ready * SQUARE, at<Element>(t.ds, (query * t.key_blocks + j) * SQUARE));
                        ++ready;
                    }
                    if (!ready || (state != NOTHING && n + 1 < to)) continue;
                    const int64_t start = query + (state != NOTHING) - ready;
                    product(BLOCK, t.wide, BLOCK, ready, p, BLOCK, SQUARE, at<Element>(t.do_pairs, start * block), block, dv, true);
                    product(BLOCK, t.wide, BLOCK, ready, ds, BLOCK, SQUARE, at<Element>(t.q_pairs, start * block), block, dk, true);
                    ready = 0;
                }
            }
        if (!ends) continue;
        const int64_t size = t.dtype == F32 ? 4 : 2, offset = ((b * t.S + j * BLOCK) * t.HK + unit % t.HK) * t.D * size;
        write_rows(t, dk, t.scale, static_cast<char *>(t.dk) + offset, t.HK * t.D, rows);
        write_rows(t, dv, 1.0f, static_cast<char *>(t.dv) + offset, t.HK * t.D, rows);
    }
    end();
}

// Items are (head, query block): dQ^T = K^T dS^T over all key blocks.
TARGET static void queries_backward(const void *task, int64_t first, int64_t last) {
    const Task &t = *static_cast<const Task *>(task);
    const int64_t block = BLOCK * t.wide;
    alignas(64) float dq[BLOCK * WIDEST], turned[BLOCK * WIDEST];
    begin();
    for (int64_t item = first; item < last; ++item) {
        const Place here = place(t, item);
        const int64_t unit = item / t.blocks / t.G, rows = smaller(BLOCK, t.T - here.i * BLOCK);
        bool fresh = true;
        for (int64_t j = 0, run; j < t.key_blocks; j += run) {
            for (run = 0; j + run < t.key_blocks && visible(t, here.b, here.i, j + run) != NOTHING;) ++run;
            if (run) {
                product(t.wide, BLOCK, BLOCK, run, at<Element>(t.k_columns, (unit * t.key_blocks + j) * block), BLOCK, block,
                        at<Element>(t.ds, (item * t.key_blocks + j) * SQUARE), SQUARE, dq, !fresh);
                fresh = false;
            } else {
                run = 1;
            }
        }
        if (fresh) std::memset(dq, 0, sizeof(float) * size_t(block));
        transpose(dq, BLOCK, t.wide, BLOCK, turned);
        const int64_t size = t.dtype == F32 ? 4 : 2;
        write_rows(t, turned, t.scale, static_cast<char *>(t.dq) + ((here.b * t.T + here.i * BLOCK) * t.H + here.head) * t.D * size, t.H * t.D, rows);
    }
    end();
}

const Path PATH = {pack_keys, forward, pack_queries, keys_backward, queries_backward, sizeof(Element)};
