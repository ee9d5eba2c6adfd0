// What a warp does as one: shuffles, votes, reductions, ldmatrix and mma.sync. Each function below runs once for the
// warp, on the arguments that its 32 lanes posted.
#include <immintrin.h>

#include "block.h"
#include "checker.h"

namespace emulator {

// ---- shuffles and votes

// The lane from which `lane` reads (PTX ISA, shfl.sync): out of its segment, it keeps its own value.
static int source_lane(int lane, const ShuffleArguments& shuffle) {
    const int first = lane & ~(shuffle.width - 1), end = first + shuffle.width;
    switch (shuffle.mode) {
        case ShuffleMode::indexed: return first + (shuffle.operand & (shuffle.width - 1));
        case ShuffleMode::up: return lane - shuffle.operand < first ? lane : lane - shuffle.operand;
        case ShuffleMode::down: return lane + shuffle.operand >= end ? lane : lane + shuffle.operand;
        case ShuffleMode::exclusive_or: return (lane ^ shuffle.operand) >= end ? lane : lane ^ shuffle.operand;
    }
    return lane;
}

void shuffle(void** lane_arguments, unsigned mask) {
    for (int lane = 0; lane < 32; lane++) {
        if (!lane_arguments[lane]) continue;
        ShuffleArguments& mine = *static_cast<ShuffleArguments*>(lane_arguments[lane]);
        if (mine.width <= 0 || mine.width > 32 || mine.width & (mine.width - 1)) fail("shuffle of width %d", mine.width);
        const int source = source_lane(lane, mine);
        if (source < 0 || source > 31 || !(mask >> source & 1))
            fail("shuffle: lane %d reads lane %d, which is not in mask %08x", lane, source, mask);
        mine.result = static_cast<ShuffleArguments*>(lane_arguments[source])->value;
    }
}

struct Vote {
    bool predicate;
    unsigned result;
};
static void vote(void** lane_arguments, unsigned) {
    unsigned result = 0;
    for (int lane = 0; lane < 32; lane++)
        if (lane_arguments[lane] && static_cast<Vote*>(lane_arguments[lane])->predicate) result |= 1u << lane;
    for (int lane = 0; lane < 32; lane++)
        if (lane_arguments[lane]) static_cast<Vote*>(lane_arguments[lane])->result = result;
}
unsigned ballot(unsigned mask, bool predicate, Location where) {
    Vote arguments{predicate, 0};
    collective(Collective::vote, mask, &arguments, vote, where);
    return arguments.result;
}

struct Reduction {
    float value;
    bool maximum;
};
static void reduce(void** lane_arguments, unsigned) {
    float values[32], combined[32];
    for (int lane = 0; lane < 32; lane++) values[lane] = static_cast<Reduction*>(lane_arguments[lane])->value;
    const bool maximum = static_cast<Reduction*>(lane_arguments[0])->maximum;
    for (int offset = 16; offset; offset /= 2) {
        for (int lane = 0; lane < 32; lane++) {
            const float mine = values[lane], other = values[lane ^ offset];
            combined[lane] = maximum ? __builtin_fmaxf(mine, other) : mine + other;
        }
        memcpy(values, combined, sizeof values);
    }
    for (int lane = 0; lane < 32; lane++) static_cast<Reduction*>(lane_arguments[lane])->value = values[lane];
}
float warp_reduce(float value, bool maximum, Location where) {
    Reduction arguments{value, maximum};
    collective(Collective::reduce, ~0u, &arguments, reduce, where);
    return arguments.value;
}

// ---- ldmatrix: lane 8m + r names row r of 8×8 matrix m; lane l receives elements (l/4, 2(l%4)) and the next one of
// each matrix, or, transposed, (2(l%4), l/4) and the one below.

struct LoadMatrix {
    uint32_t* registers;
    const unsigned char* row;
    int matrices;
    bool transposed;
    Location where;
};

static void load_matrix(void** lane_arguments, unsigned) {
    LoadMatrix* lanes[32];
    for (int lane = 0; lane < 32; lane++) lanes[lane] = static_cast<LoadMatrix*>(lane_arguments[lane]);
    const Thread* threads = cluster.warp_begin(current->warp);
    for (int matrix = 0; matrix < lanes[0]->matrices; matrix++) {
        const unsigned char* rows[8];
        for (int r = 0; r < 8; r++) {
            const LoadMatrix& owner = *lanes[matrix * 8 + r];
            rows[r] = owner.row;
            if (reinterpret_cast<uintptr_t>(owner.row) % 16)
                fail("ldmatrix: lane %d's row is not 16-byte aligned at %s", matrix * 8 + r,
                     describe_location(owner.where).c_str());
            shared_offset(owner.row);
            if constexpr (checked) checker::shared_read(threads[matrix * 8 + r], owner.row, 16, owner.where);
        }
        for (int lane = 0; lane < 32; lane++) {
            const int row = lane / 4, pair = 2 * (lane % 4);
            uint16_t first, second;
            if (lanes[0]->transposed) {
                memcpy(&first, rows[pair] + 2 * row, 2);
                memcpy(&second, rows[pair + 1] + 2 * row, 2);
            } else {
                memcpy(&first, rows[row] + 2 * pair, 2);
                memcpy(&second, rows[row] + 2 * pair + 2, 2);
            }
            lanes[lane]->registers[matrix] = first | uint32_t{second} << 16;
        }
    }
}

void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transposed, Location where) {
    LoadMatrix arguments{registers, static_cast<const unsigned char*>(row), matrices, transposed, where};
    collective(Collective::ldmatrix, ~0u, &arguments, load_matrix, where);
}

// ---- mma.sync m16n8k16. With g = lane/4 and t = lane%4 a lane holds (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//   a[0..3]: A[g][2t..], A[g+8][2t..], A[g][2t+8..], A[g+8][2t+8..], two elements each
//   b[0..1]: B[2t..][g], B[2t+8..][g]
//   d[0..3]: D[g][2t], D[g][2t+1], D[g+8][2t], D[g+8][2t+1]
// The products are exact in f32; their sums round in another order than the hardware's.

struct MultiplyTile {
    float* d;
    const uint32_t *a, *b;
    int mt, nt;
    bool bf16;
};
constexpr int max_tile_columns = 256;

static __m256 widen8(const void* eight_halves, bool bf16) {
    const __m128i bits = _mm_loadu_si128(static_cast<const __m128i*>(eight_halves));
    if (!bf16) return _mm256_cvtph_ps(bits);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// c[16][columns] += a[16][16] · b[16][columns], four rows by eight columns in registers.
static void multiply_16(float* c, const float* a, const float* b, int columns) {
    for (int row = 0; row < 16; row += 4)
        for (int column = 0; column < columns; column += 8) {
            __m256 sums[4];
            for (int r = 0; r < 4; r++) sums[r] = _mm256_loadu_ps(c + (row + r) * columns + column);
            for (int k = 0; k < 16; k++) {
                const __m256 b_row = _mm256_loadu_ps(b + k * columns + column);
                for (int r = 0; r < 4; r++)
                    sums[r] = _mm256_fmadd_ps(_mm256_broadcast_ss(a + (row + r) * 16 + k), b_row, sums[r]);
            }
            for (int r = 0; r < 4; r++) _mm256_storeu_ps(c + (row + r) * columns + column, sums[r]);
        }
}

// A[16][16] from the lanes' fragments.
static void gather_a(float* a, MultiplyTile* const* lanes, int tile_row, bool bf16) {
    uint32_t pairs[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const uint32_t* fragment = lanes[lane]->a + tile_row * 4;
        const int g = lane / 4, t = lane % 4;
        pairs[g][t] = fragment[0];
        pairs[g + 8][t] = fragment[1];
        pairs[g][t + 4] = fragment[2];
        pairs[g + 8][t + 4] = fragment[3];
    }
    for (int row = 0; row < 16; row++) {
        _mm256_storeu_ps(a + row * 16, widen8(pairs[row], bf16));
        _mm256_storeu_ps(a + row * 16 + 8, widen8(pairs[row] + 4, bf16));
    }
}

// Columns 8·tile_column … of B[16][columns]; a column of B is contiguous over k in the fragments.
static void gather_b(float* b, MultiplyTile* const* lanes, int tile_column, int columns, bool bf16) {
    uint32_t pairs[8][8];
    for (int lane = 0; lane < 32; lane++) {
        const uint32_t* fragment = lanes[lane]->b + tile_column * 2;
        pairs[lane / 4][lane % 4] = fragment[0];
        pairs[lane / 4][lane % 4 + 4] = fragment[1];
    }
    for (int n = 0; n < 8; n++) {
        float column[16];
        _mm256_storeu_ps(column, widen8(pairs[n], bf16));
        _mm256_storeu_ps(column + 8, widen8(pairs[n] + 4, bf16));
        for (int k = 0; k < 16; k++) b[k * columns + tile_column * 8 + n] = column[k];
    }
}

static void multiply_tile(void** lane_arguments, unsigned) {
    MultiplyTile* lanes[32];
    for (int lane = 0; lane < 32; lane++) lanes[lane] = static_cast<MultiplyTile*>(lane_arguments[lane]);
    const int mt = lanes[0]->mt, nt = lanes[0]->nt, columns = nt * 8;
    const bool bf16 = lanes[0]->bf16;
    static float a[16 * 16], b[16 * max_tile_columns], c[16 * max_tile_columns];
    for (int j = 0; j < nt; j++) gather_b(b, lanes, j, columns, bf16);
    const auto accumulators = [&](int i, bool store) {
        for (int lane = 0; lane < 32; lane++) {
            float* d = lanes[lane]->d + i * nt * 4;
            float* upper = c + lane / 4 * columns + 2 * (lane % 4);
            float* lower = upper + 8 * columns;
            for (int j = 0; j < nt; j++) {
                memcpy(store ? d + j * 4 : upper + j * 8, store ? upper + j * 8 : d + j * 4, 8);
                memcpy(store ? d + j * 4 + 2 : lower + j * 8, store ? lower + j * 8 : d + j * 4 + 2, 8);
            }
        }
    };
    for (int i = 0; i < mt; i++) {
        accumulators(i, false);
        gather_a(a, lanes, i, bf16);
        multiply_16(c, a, b, columns);
        accumulators(i, true);
    }
}

void mma_tile(float* d, const uint32_t* a, const uint32_t* b, int mt, int nt, bool bf16, Location where) {
    if (nt * 8 > max_tile_columns) fail("mma_tile of %d columns", nt * 8);
    MultiplyTile arguments{d, a, b, mt, nt, bf16};
    collective(Collective::mma, ~0u, &arguments, multiply_tile, where);
}

}  // namespace emulator
