// Kernels with one mistake each: the emulator's own test (tests/emulator.rs). Each must be found, by a message or, where
// the table there says so, by NaN or a wrong value in what it writes. Compiled for the emulator only.
#include "../ptx/cp_async.h"
#include "../ptx/ldmatrix.h"
#include "../ptx/mma.h"
#include "../ptx/warp.h"

#define PLANTED(name, PARAMETERS) \
    extern "C" __global__ void planted_##name PARAMETERS; \
    REGISTER_KERNEL(planted_##name); \
    extern "C" __global__ void planted_##name PARAMETERS

// ---- one thread against another. All are launched with 128 threads.

// Lanes read what lane 0 wrote without __syncwarp.
PLANTED(missing_syncwarp, (float* out)) {
    SHARED_ARRAY(float, value, [4]);
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) value[warp] = 1.f + warp;
    out[threadIdx.x] = value[warp];
}

// A thread leaves before the barrier for which the others wait.
PLANTED(exit_before_barrier, (float* out)) {
    if (threadIdx.x == 5) return;
    __syncthreads();
    out[threadIdx.x] = 1.f;
}

PLANTED(barrier_in_branch, (float* out)) {
    if (threadIdx.x < 64) __syncthreads();
    else __syncwarp();
    out[threadIdx.x] = 1.f;
}

// Odd lanes alone enter a shuffle that names the whole warp.
PLANTED(shuffle_in_branch, (float* out)) {
    float value = 1.f;
    if (threadIdx.x & 1) value = __shfl_xor_sync(whole_warp, value, 2);
    out[threadIdx.x] = value;
}

PLANTED(mma_in_branch, (float* out)) {
    float d[1][1][4] = {};
    uint32_t a[1][4] = {}, b[1][2] = {};
    if (threadIdx.x & 16) mma_tile<f16, 1, 1>(d, a, b);
    out[threadIdx.x] = d[0][0][0];
}

// The last tree levels of a reduction rely on lanes running in step.
PLANTED(lockstep_reduction, (const float* in, float* out)) {
    SHARED_ARRAY(float, partial, [128]);
    const int t = threadIdx.x;
    partial[t] = in[t];
    __syncthreads();
    if (t < 32) {
        volatile float* sums = partial;
        sums[t] += sums[t + 64] + sums[t + 32] + sums[t + 96];
        for (int offset = 16; offset; offset /= 2) sums[t] += sums[t + offset];
    }
    __syncthreads();
    out[t] = partial[0];
}

// The buffer of a block-wide sum is used again while others still read it.
PLANTED(buffer_reused_too_early, (const float* in, float* out)) {
    SHARED_ARRAY(float, partial, [4]);
    float sum = in[threadIdx.x];
    for (int round = 0; round < 2; round++) {
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
        __syncthreads();
        sum = partial[0] + partial[1] + partial[2] + partial[3];
    }
    out[threadIdx.x] = sum;
}

// One partial sum too many: shared memory that nobody wrote.
PLANTED(uninitialised_partial, (const float* in, float* out)) {
    SHARED_ARRAY(float, partial, [32]);
    const float sum = warp_sum(in[threadIdx.x]);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    out[threadIdx.x] = partial[0] + partial[1] + partial[2] + partial[3] + partial[4];
}

// Every block adds to the same word without an atomic.
PLANTED(unsynchronised_sum, (float* out)) {
    if (threadIdx.x == 0) *out = *out + 1.f;
}

// Blocks write overlapping ranges.
PLANTED(overlapping_blocks, (float* out)) { out[blockIdx.x * 100 + threadIdx.x] = static_cast<float>(blockIdx.x); }

PLANTED(spin, (float* out)) {
    volatile float* flag = out;
    while (*flag != 7.f) {}
}

// ---- addresses

PLANTED(shared_out_of_bounds, (float* out)) {
    SHARED_ARRAY(float, first, [128]);
    SHARED_ARRAY(float, second, [128]);
    second[threadIdx.x] = 0.f;
    first[threadIdx.x + 1] = 1.f;
    __syncthreads();
    out[threadIdx.x] = first[max(threadIdx.x, 1u)] + second[threadIdx.x];
}

// Launched with 256 bytes of dynamic shared memory.
PLANTED(dynamic_shared_too_small, (float* out)) {
    DYNAMIC_SHARED(bytes, 16);
    float* values = reinterpret_cast<float*>(bytes);
    values[threadIdx.x] = 1.f;
    __syncthreads();
    out[threadIdx.x] = values[127 - threadIdx.x];
}

// `out` has 512 elements.
PLANTED(global_write_past_end, (float* out)) { out[threadIdx.x + 512 - 127] = 1.f; }
PLANTED(global_read_past_end, (float* out)) { out[threadIdx.x] = out[threadIdx.x + 512 - 127]; }
PLANTED(misaligned_vector, (float* out)) { *reinterpret_cast<float4*>(out + 1) = make_float4(1.f, 2.f, 3.f, 4.f); }

// Launched on memory that nobody wrote.
PLANTED(uninitialised_global, (float* out)) { out[threadIdx.x] = out[threadIdx.x] > 0.f ? 1.f : 2.f; }

PLANTED(stack_overflow, (float* out)) {
    volatile float large[60000];
    for (int i = 0; i < 60000; i++) large[i] = i;
    out[threadIdx.x] = large[threadIdx.x];
}

// ---- asynchronous copies

// The wait counts committed groups, and nothing was committed.
PLANTED(copy_without_commit, (const float* in, float* out)) {
    SHARED_ARRAY(float4, tile, [128]);
    cp_async16(&tile[threadIdx.x], in + threadIdx.x * 4, 16);
    cp_async_wait<0>();
    __syncthreads();
    out[threadIdx.x] = tile[127 - threadIdx.x].x;
}

PLANTED(copy_without_barrier, (const float* in, float* out)) {
    SHARED_ARRAY(float4, tile, [128]);
    cp_async16(&tile[threadIdx.x], in + threadIdx.x * 4, 16);
    cp_async_commit();
    cp_async_wait<0>();
    out[threadIdx.x] = tile[127 - threadIdx.x].x;
}

PLANTED(copy_misaligned, (const float* in, float* out)) {
    SHARED_ARRAY(float4, tile, [128]);
    cp_async16(&tile[threadIdx.x], in + threadIdx.x, 16);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x].x;
}

// ---- a multistage matmul, C[rows][64] = A[rows][depth] · B[64][depth]ᵀ in f16, four warps of 16 rows: the pipeline of
// matmul.cu in small, with one mistake at a time.

enum class Fault {
    none,
    no_barrier,             // the main loop's barrier is missing
    waits_for_too_few,      // one group fewer than needed
    no_wait,                // never waits
    overwrites_read_stage,  // prefetches into the stage that is being read
    swapped_fragment,       // the two k halves of B exchanged
    reads_row_too_many,     // off by one in the guard of A's rows
    writes_row_too_many,    // no guard on C's rows
    copies_left_at_exit,    // prefetches past the last step and never waits for it
};

template <Fault fault>
DEVICE void pipeline(const f16* a, const f16* b, float* c, int rows, int depth) {
    constexpr int stages = 3, tile_k = 16, tile_rows = 64, tile_columns = 64;
    SHARED_ARRAY(f16, a_tiles, [stages][tile_rows][tile_k]);
    SHARED_ARRAY(f16, b_tiles, [stages][tile_columns][tile_k]);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first_row = blockIdx.x * tile_rows;
    const int steps = depth / tile_k;

    const auto load = [&](int step, int stage) {  // a thread copies one 16-byte half of a row of each
        const int row = threadIdx.x / 2, half = threadIdx.x % 2 * 8;
        const int limit = fault == Fault::reads_row_too_many ? rows + 1 : rows;
        const bool inside = first_row + row < limit;
        cp_async16(&a_tiles[stage][row][half],
                   a + (inside ? (first_row + row) * depth + step * tile_k + half : 0), inside ? 16 : 0);
        cp_async16(&b_tiles[stage][row][half], b + row * depth + step * tile_k + half, 16);
    };
    for (int step = 0; step < stages - 1; step++) {
        if (step < steps) load(step, step);
        cp_async_commit();
    }

    float sums[1][8][4] = {};
    for (int step = 0; step < steps; step++) {
        if (fault == Fault::waits_for_too_few) cp_async_wait<stages - 1>();
        else if (fault != Fault::no_wait) cp_async_wait<stages - 2>();
        if (fault != Fault::no_barrier) __syncthreads();
        const int ahead = step + (fault == Fault::overwrites_read_stage ? stages : stages - 1);
        if (ahead < steps || fault == Fault::copies_left_at_exit) load(min(ahead, steps - 1), ahead % stages);
        cp_async_commit();
        uint32_t a_fragment[1][4], b_fragments[8][2];
        ldmatrix_x4(a_fragment[0], &a_tiles[step % stages][warp * 16 + lane % 16][lane / 16 * 8]);
        for (int pair = 0; pair < 4; pair++) {
            uint32_t loaded[4];
            ldmatrix_x4(loaded, &b_tiles[step % stages][pair * 16 + lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8]);
            const int first = fault == Fault::swapped_fragment ? 1 : 0;
            b_fragments[2 * pair][0] = loaded[first];
            b_fragments[2 * pair][1] = loaded[1 - first];
            b_fragments[2 * pair + 1][0] = loaded[2];
            b_fragments[2 * pair + 1][1] = loaded[3];
        }
        mma_tile<f16>(sums, a_fragment, b_fragments);
    }
    if (fault != Fault::copies_left_at_exit && fault != Fault::no_wait) cp_async_wait<0>();
    for (int j = 0; j < 8; j++)
        for (int q = 0; q < 4; q++) {
            const int row = first_row + warp * 16 + lane / 4 + q / 2 * 8, column = j * 8 + lane % 4 * 2 + q % 2;
            if (row < rows || fault == Fault::writes_row_too_many) c[row * tile_columns + column] = sums[0][j][q];
        }
}

#define PLANTED_PIPELINE(fault) \
    PLANTED(pipeline_##fault, (const f16* a, const f16* b, float* c, int rows, int depth)) { \
        pipeline<Fault::fault>(a, b, c, rows, depth); \
    }
PLANTED_PIPELINE(none)
PLANTED_PIPELINE(no_barrier)
PLANTED_PIPELINE(waits_for_too_few)
PLANTED_PIPELINE(no_wait)
PLANTED_PIPELINE(overwrites_read_stage)
PLANTED_PIPELINE(swapped_fragment)
PLANTED_PIPELINE(reads_row_too_many)
PLANTED_PIPELINE(writes_row_too_many)
PLANTED_PIPELINE(copies_left_at_exit)
