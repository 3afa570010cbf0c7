// Products of few rows for decoding, out = x B or out = x Bᵀ, as a `cblas_sgemm` in front of OpenBLAS's.
//
// OpenBLAS copies both operands of a product first. For few rows the copies take longer than the product, so here B is
// read once, in place, by all cores: each takes the next share of B's columns until none is left, so that a core that
// is busy elsewhere delays nobody.

#include <algorithm>
#include <atomic>
#include <functional>
#include <mutex>
#include <thread>

extern "C" {
int mlxchat_threads = 1;
}

namespace {

#ifdef __AVX512F__
constexpr int width = 16;
#else
constexpr int width = 8;
#endif
typedef float Vector __attribute__((vector_size(4 * width), aligned(4), may_alias));
typedef int Lanes __attribute__((vector_size(4 * width)));

struct Product {
    long inner;
    const float *x;
    long x_step;
    const float *b;
    long b_step;
    float *out;
    long out_step;
};

inline Vector load(const float *at) { return *reinterpret_cast<const Vector *>(at); }

inline float total(Vector parts) {
    for (int half = width / 2; half > 0; half /= 2) {
        Lanes other;
        for (int lane = 0; lane < width; ++lane) other[lane] = lane ^ half;
        parts += __builtin_shuffle(parts, other);
    }
    return parts[0];
}

// x Bᵀ with B (outer, inner): dot products.
struct Transposed {
    static constexpr int unit = 1;

    template <int rows, int columns>
    static void tile(const Product &p, long row, long column) {
        const float *x = p.x + row * p.x_step, *b = p.b + column * p.b_step;
        float *out = p.out + row * p.out_step + column;
        Vector sums[rows][columns] = {};
        long k = 0;
        for (; k + width <= p.inner; k += width) {
            Vector numbers[columns];
            for (int j = 0; j < columns; ++j) numbers[j] = load(b + j * p.b_step + k);
            for (int i = 0; i < rows; ++i) {
                Vector factor = load(x + i * p.x_step + k);
                for (int j = 0; j < columns; ++j) sums[i][j] += factor * numbers[j];
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
            for (int j = 0; j < columns; ++j) out[i * p.out_step + j] = total(sums[i][j]);
        for (; k < p.inner; ++k)
            for (int i = 0; i < rows; ++i)
                for (int j = 0; j < columns; ++j) {
                    float &sum = out[i * p.out_step + j];
                    sum = __builtin_fmaf(x[i * p.x_step + k], b[j * p.b_step + k], sum);
                }
    }

    static void rest(const Product &, long, long, long) {}
};

// x B with B (inner, outer): sums of rows of B.
struct AsItLies {
    static constexpr int unit = width;

    template <int rows, int vectors>
    static void tile(const Product &p, long row, long column) {
        const float *x = p.x + row * p.x_step, *b = p.b + column;
        float *out = p.out + row * p.out_step + column;
        Vector sums[rows][vectors] = {};
        for (long k = 0; k < p.inner; ++k)
            for (int j = 0; j < vectors; ++j) {
                Vector numbers = load(b + k * p.b_step + j * width);
                for (int i = 0; i < rows; ++i) sums[i][j] += x[i * p.x_step + k] * numbers;
            }
        for (int i = 0; i < rows; ++i)
            for (int j = 0; j < vectors; ++j)
                *reinterpret_cast<Vector *>(out + i * p.out_step + j * width) = sums[i][j];
    }

    static void rest(const Product &p, long rows, long column, long outer) {
        for (; column < outer; ++column)
            for (long row = 0; row < rows; ++row) {
                float sum = 0;
                for (long k = 0; k < p.inner; ++k)
                    sum = __builtin_fmaf(p.x[row * p.x_step + k], p.b[k * p.b_step + column], sum);
                p.out[row * p.out_step + column] = sum;
            }
    }
};

template <class Kind, int rows, int columns>
void multiply_rows(const Product &p, long row, long end, long column) {
    for (; row + rows <= end; row += rows) Kind::template tile<rows, columns>(p, row, column);
    if constexpr (rows > 1) multiply_rows<Kind, rows - 1, columns>(p, row, end, column);
}

// In tiles whose sums fit into registers; all rows use a part of B before the next part.
template <class Kind, int rows, int columns>
void multiply(const Product &p, long end, long outer) {
    long column = 0;
    for (; column + columns * Kind::unit <= outer; column += columns * Kind::unit)
        multiply_rows<Kind, rows, columns>(p, 0, end, column);
    for (; column + Kind::unit <= outer; column += Kind::unit) multiply_rows<Kind, rows, 1>(p, 0, end, column);
    Kind::rest(p, end, column, outer);
}

constexpr int share_numbers = 1 << 15;  // of B; smaller shares cost more than they save
constexpr int patience = 1000;          // looks for the next product before a thread sleeps
using Share = std::function<void(long)>;

struct Team {
    std::atomic<unsigned long> state{0};  // number of the product << 16 | its shares that nobody has taken
    std::atomic<long> done{0};
    const Share *share = nullptr;
    std::mutex busy;

    static long left(unsigned long state) { return state & 0xffff; }

    void work() {
        unsigned long now = state.load();
        while (left(now)) {
            if (!state.compare_exchange_weak(now, now - 1)) continue;
            (*share)(left(now) - 1);
            ++done;
            now = state.load();
        }
    }

    void help() {
        for (;;) {
            unsigned long now = state.load();
            for (int look = 0; look < patience && !left(now); ++look) {
                std::this_thread::yield();
                now = state.load();
            }
            if (!left(now)) state.wait(now);
            work();
        }
    }

    void run(long shares, const Share &given) {
        static const bool has_helpers = [this] {
            for (int helper = 1; helper < mlxchat_threads; ++helper) std::thread([this] { help(); }).detach();
            return true;
        }();
        (void)has_helpers;
        share = &given;
        done = 0;
        state = ((state.load() >> 16) + 1) << 16 | shares;
        state.notify_all();
        work();
        while (done.load() < shares) std::this_thread::yield();
    }
};

Team team;

// Calls work(first column, columns) for parts of B (inner, outer) on the team, or for all of it if the team is busy.
template <class Work>
void distribute(long outer, long inner, Work work) {
    const long unit = 64, units = (outer + unit - 1) / unit, shares = std::min(units, outer * inner / share_numbers);
    std::unique_lock<std::mutex> alone(team.busy, std::defer_lock);
    if (mlxchat_threads < 2 || shares < 2 || !alone.try_lock()) return work(0, outer);
    team.run(shares, [&](long share) {
        const long first = units * share / shares * unit, last = std::min(outer, units * (share + 1) / shares * unit);
        work(first, last - first);
    });
}

constexpr int most_rows = 64, least_columns = 16;  // otherwise OpenBLAS is faster or more exact
constexpr int row_major = 101, as_it_lies = 111, transposed = 112;
typedef void Sgemm(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *, int);

}  // namespace

extern "C" {

Sgemm *mlxchat_openblas;

void cblas_sgemm(int order, int x_kind, int b_kind, int rows, int outer, int inner, float alpha, const float *x,
                 int x_step, const float *b, int b_step, float beta, float *out, int out_step) {
    if (rows > most_rows || outer < least_columns || order != row_major || x_kind != as_it_lies || alpha != 1 || beta != 0)
        return mlxchat_openblas(order, x_kind, b_kind, rows, outer, inner, alpha, x, x_step, b, b_step, beta, out,
                                out_step);
    const bool dots = b_kind == transposed;
    distribute(outer, inner, [&](long first, long columns) {
        Product p{inner, x, x_step, b + first * (dots ? b_step : 1), b_step, out + first, out_step};
        if (dots)
            rows == 1 ? multiply<Transposed, 1, 8>(p, rows, columns) : multiply<Transposed, 3, 4>(p, rows, columns);
        else
            rows == 1 ? multiply<AsItLies, 1, 64 / width>(p, rows, columns) : multiply<AsItLies, 4, 2>(p, rows, columns);
    });
}
}
