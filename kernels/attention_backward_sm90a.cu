// attention_backward.cu for Hopper, heads of 64 and 128: TMA and wgmma, p and dr kept in registers between the products.
//
// Equations, shapes and types as there, but that dr leaves out the factor `scale`, which dq and dk receive at their end. One
// kernel owns 128 queries of a head (dq), the other 128 keys of a key head (dk, dv); a warpgroup owns 64 of them. Sums over
// the other side go by tiles in ascending order, and over the heads of a group in ascending order.
//
// Why two kernels and seven products, where one kernel with five would do: counted for each visible pair of a query and a
// key at D = 128, the two products more are 2 · 2 · 128 = 512 operations, 0.8 ps of an H200 at 650 TFLOP/s. In one kernel
// that owns keys the sum of dq crosses blocks. By atomics its bits depend on the schedule; in turn, blocks wait for each
// other. As partial sums in f32, one from each 128 keys, 4 bytes a pair are written and 4 read, 1.9 ps at 4.3 TB/s; as dr in
// halves for a plain product later, 2 and 2, 0.9 ps; and either buffer grows with the square of the length, to 1 GiB or more
// for 16 heads of 8192 tokens. To compute p and dp again is as fast as the best of these and needs no memory.
//
// Registers at D = 128, of 240: dk and dv 128 and two tiles of 64×64 in 64, so that 64 queries pass by; dq 64 and two tiles
// of 64×128 in 128, so that 128 keys do. p is computed under the product dp, dr under that of dv; what remains uncovered
// runs under the products of the other warpgroup.
//
// Given angles, dq and dk are rotated back before they leave, to the bits of rope.cu's kernel over what would leave without: it
// would read and write 2·(Q + K)·D bytes a token each.
#include <type_traits>

#include "common/hopper_attention.h"
#include "common/rotated_sums.h"

// Turns a tile of scores (score_tile) into p · dz/d(scale · q·k) and hands each two neighbouring p to use_p(i, first, second),
// i being the first's accumulator. log_sum(i): of the accumulator's query, in base two.
template <int COUNT, class LogSum, class UseP>
DEVICE void weigh_tile(float (&tile)[COUNT], const Score& score, const LogSum& log_sum, const UseP& use_p) {
    const float factor = exponent_factor(score);
    const auto weigh = [&](auto is_capped) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 2) {
            float p[2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float z = tile[i + e];
                p[e] = exp2_fast(fmaf(z, factor, -log_sum(i + e)));
                tile[i + e] = decltype(is_capped)::value ? p[e] * score.cap.slope(z) : p[e];
            }
            use_p(i, p[0], p[1]);
        }
    };
    if (score.cap.cap > 0.f) weigh(std::true_type());
    else weigh(std::false_type());
}

// What both kernels read besides their matrices.
struct HopperBackward {
    const float *log_sum, *delta;
    const int* tiles;
    int query_heads, key_value_heads;
    Score score;
    int window;
    Angles angles;  // without a table: dq and dk leave as they are
};

// Stores a lane's sums of one row (half 0 or 1), times `scale` and rotated back.
template <class T, int D>
DEVICE void store_gradient(T* out, float (&sums)[D / 2], int half, float scale, const Angles& angles, int row) {
    float* own = sums + 2 * half;
#pragma unroll
    for (int j = 0; j < D / 8; j++)
        for (int e = 0; e < 2; e++) own[4 * j + e] *= scale;
    if (angles.table)
        for_each_angle<D>(angles.of(row), [&](int j, float2 cosines, float2 sines) {
            rotate_two_pairs<T, D>(own + 4 * j, cosines, make_float2(-sines.x, -sines.y));
        });
#pragma unroll
    for (int j = 0; j < D / 8; j++) store2(out + j * 8, own[4 * j], own[4 * j + 1]);
}

// ---- dq. Grid: tiles of 128 rows in x, query heads in y.
template <class T, int D>
struct BackwardQueries {
    static constexpr int keys = 128, stages = 2, own_bytes = hopper_tile_bytes<D, hopper_rows>;
    static constexpr int tile_bytes = hopper_tile_bytes<D, keys>;
    struct Shared {
        unsigned char queries[own_bytes], douts[own_bytes];
        unsigned char keys[stages][tile_bytes], values[stages][tile_bytes];
        Mbarrier own_full, full[stages], empty[stages];
    };
};

template <class T, int D>
DEVICE void attention_backward_queries_sm90a(const TensorMap& q, const TensorMap& k, const TensorMap& v, const TensorMap& dout,
                                             const HopperBackward& in, T* __restrict__ dq, int dq_leading) {
    using Layout = BackwardQueries<T, D>;
    constexpr int keys = Layout::keys;
    DYNAMIC_SHARED(bytes, 1024);
    auto& shared = *reinterpret_cast<typename Layout::Shared*>(bytes);
    const SampleTile tile = find_sample_tile(in.tiles);
    const int rows = hopper_tile_rows(tile);
    if (rows == 0) return;  // fills up the number of tiles
    const int head = blockIdx.y, key_head = key_head_of(head, in.query_heads, in.key_value_heads);
    const int first_key = in.window ? max(tile.begin, tile.first - in.window + 1) : tile.begin;
    const int end_row = tile.first + rows, blocks = (end_row - first_key + keys - 1) / keys;

    if (threadIdx.x == 0) {
        mbarrier_init(&shared.own_full, 1);
        for (int i = 0; i < Layout::stages; i++) {
            mbarrier_init(&shared.full[i], 1);
            mbarrier_init(&shared.empty[i], hopper_consumers * hopper_warpgroup / 32);
        }
        fence_mbarrier_init();
    }
    __syncthreads();

    if (threadIdx.x < hopper_warpgroup) {
        give_registers<24>();
        if (threadIdx.x > 0) return;
        mbarrier_arrive_expecting(&shared.own_full, 2 * Layout::own_bytes);
        load_hopper_tile<D, hopper_rows>(shared.queries, q, tile.first, head * D, &shared.own_full);
        load_hopper_tile<D, hopper_rows>(shared.douts, dout, tile.first, head * D, &shared.own_full);
        for (int block = 0; block < blocks; block++) {
            const int stage = block % Layout::stages, row = first_key + block * keys;
            mbarrier_wait(&shared.empty[stage], (block / Layout::stages & 1) ^ 1);
            mbarrier_arrive_expecting(&shared.full[stage], 2 * Layout::tile_bytes);
            load_hopper_tile<D, keys>(shared.keys[stage], k, row, key_head * D, &shared.full[stage]);
            load_hopper_tile<D, keys>(shared.values[stage], v, row, key_head * D, &shared.full[stage]);
        }
        return;
    }

    take_registers<240>();
    const int consumer = consumer_index(), first_own = tile.first + consumer * consumer_rows;
    const int own_row = first_own + accumulator_row();
    const unsigned char* own_queries = shared.queries + consumer * consumer_rows * box_row_bytes;
    const unsigned char* own_douts = shared.douts + consumer * consumer_rows * box_row_bytes;
    float log_sums[2], deltas[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = own_row + half * 8;
        const long long at = static_cast<long long>(row) * in.query_heads + head;
        log_sums[half] = row < end_row ? in.log_sum[at] * log2_of_e : 0.f;
        deltas[half] = row < end_row ? in.delta[at] : 0.f;
    }

    float sums[D / 2], weights[keys / 2], dp[keys / 2];
#pragma unroll
    for (int i = 0; i < D / 2; i++) sums[i] = 0.f;
    mbarrier_wait(&shared.own_full, 0);
    for (int block = 0; block < blocks; block++) {
        const int stage = block % Layout::stages, key = first_key + block * keys;
        mbarrier_wait(&shared.full[stage], block / Layout::stages & 1);
        if (!is_wholly_hidden(first_own, consumer_rows, key, keys, in.window)) {
            start_scores<T, D, keys>(weights, own_queries, shared.keys[stage]);
            start_scores<T, D, keys>(dp, own_douts, shared.values[stage]);
            wgmma_wait<1>(weights);
            score_tile(weights, in.score, !is_wholly_visible(first_own, consumer_rows, key, keys, in.window),
                       [&](int row, int column) { return is_visible(own_row + row, key + column, in.window); });
            weigh_tile(weights, in.score, [&](int i) { return log_sums[i / 2 % 2]; }, [](int, float, float) {});
            wgmma_wait<0>(dp);
            uint32_t dr[keys / 16][4];
#pragma unroll
            for (int i = 0; i < keys / 2; i++) weights[i] *= dp[i] - deltas[i / 2 % 2];
            round_weights<T, keys>(dr, weights);
            start_weighted_sum<T, D, keys>(sums, dr, shared.keys[stage]);
            wgmma_wait<0>(sums);
        }
        if (threadIdx.x % 32 == 0) mbarrier_arrive(&shared.empty[stage]);
    }

#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = own_row + half * 8;
        if (row >= end_row) continue;
        T* out = dq + row * static_cast<long long>(dq_leading) + head * D + threadIdx.x % 4 * 2;
        store_gradient<T, D>(out, sums, half, in.score.scale, in.angles, row);
    }
}

// ---- dk and dv: everything is transposed, so that pᵀ and drᵀ come out of their products as the left operands of the next. Grid:
// tiles of 128 rows in x, key heads in y.
template <class T, int D>
struct BackwardKeys {
    static constexpr int queries = 64, stages = 3, own_bytes = hopper_tile_bytes<D, hopper_rows>;
    static constexpr int tile_bytes = hopper_tile_bytes<D, queries>;
    struct Shared {
        unsigned char keys[own_bytes], values[own_bytes];
        unsigned char queries[stages][tile_bytes], douts[stages][tile_bytes];
        float log_sums[stages][BackwardKeys::queries], deltas[stages][BackwardKeys::queries];  // log_sums in base two
        Mbarrier own_full, full[stages], empty[stages];
    };
};

template <class T, int D>
DEVICE void attention_backward_keys_sm90a(const TensorMap& q, const TensorMap& k, const TensorMap& v, const TensorMap& dout,
                                          const HopperBackward& in, T* __restrict__ dk, T* __restrict__ dv, int leading) {
    using Layout = BackwardKeys<T, D>;
    constexpr int queries = Layout::queries;
    DYNAMIC_SHARED(bytes, 1024);
    auto& shared = *reinterpret_cast<typename Layout::Shared*>(bytes);
    const SampleTile tile = find_sample_tile(in.tiles).mirrored(hopper_rows);
    const int rows = hopper_tile_rows(tile);
    if (rows == 0) return;  // fills up the number of tiles
    const int key_head = blockIdx.y, heads_per_group = in.query_heads / in.key_value_heads;
    // Behind the last query that sees the last key.
    const int end_query = in.window ? min(tile.end, tile.first + rows - 1 + in.window) : tile.end;
    const int tiles_of_head = (end_query - tile.first + queries - 1) / queries, blocks = heads_per_group * tiles_of_head;

    if (threadIdx.x == 0) {
        mbarrier_init(&shared.own_full, 1);
        for (int i = 0; i < Layout::stages; i++) {
            mbarrier_init(&shared.full[i], 1 + 32);
            mbarrier_init(&shared.empty[i], hopper_consumers * hopper_warpgroup / 32);
        }
        fence_mbarrier_init();
    }
    __syncthreads();

    if (threadIdx.x < hopper_warpgroup) {
        give_registers<24>();
        if (threadIdx.x >= 32) return;
        if (threadIdx.x == 0) {
            mbarrier_arrive_expecting(&shared.own_full, 2 * Layout::own_bytes);
            load_hopper_tile<D, hopper_rows>(shared.keys, k, tile.first, key_head * D, &shared.own_full);
            load_hopper_tile<D, hopper_rows>(shared.values, v, tile.first, key_head * D, &shared.own_full);
        }
        for (int block = 0; block < blocks; block++) {
            const int head = key_head * heads_per_group + block / tiles_of_head;
            const int query = tile.first + block % tiles_of_head * queries, stage = block % Layout::stages;
            Mbarrier* full = &shared.full[stage];
            mbarrier_wait(&shared.empty[stage], (block / Layout::stages & 1) ^ 1);
            if (threadIdx.x == 0) {
                mbarrier_arrive_expecting(full, 2 * Layout::tile_bytes);
                load_hopper_tile<D, queries>(shared.queries[stage], q, query, head * D, full);
                load_hopper_tile<D, queries>(shared.douts[stage], dout, query, head * D, full);
            }
            for (int row = threadIdx.x; row < queries; row += 32) {
                const bool inside = query + row < end_query;
                const long long at = static_cast<long long>(query + row) * in.query_heads + head;
                // What lies behind the last query weighs nothing.
                shared.log_sums[stage][row] = inside ? in.log_sum[at] * log2_of_e : INFINITY;
                shared.deltas[stage][row] = inside ? in.delta[at] : 0.f;
            }
            mbarrier_arrive(full);
        }
        return;
    }

    take_registers<240>();
    const int consumer = consumer_index(), first_own = tile.first + consumer * consumer_rows;
    const int own_row = first_own + accumulator_row();
    const unsigned char* own_keys = shared.keys + consumer * consumer_rows * box_row_bytes;
    const unsigned char* own_values = shared.values + consumer * consumer_rows * box_row_bytes;
    float dk_sums[D / 2], dv_sums[D / 2], weights[queries / 2], dp[queries / 2];
#pragma unroll
    for (int i = 0; i < D / 2; i++) dk_sums[i] = dv_sums[i] = 0.f;
    mbarrier_wait(&shared.own_full, 0);
    for (int block = 0; block < blocks; block++) {
        const int query = tile.first + block % tiles_of_head * queries, stage = block % Layout::stages;
        mbarrier_wait(&shared.full[stage], block / Layout::stages & 1);
        if (!is_wholly_hidden(query, queries, first_own, consumer_rows, in.window)) {
            start_scores<T, D, queries>(weights, own_keys, shared.queries[stage]);
            start_scores<T, D, queries>(dp, own_values, shared.douts[stage]);
            wgmma_wait<1>(weights);
            score_tile(weights, in.score, !is_wholly_visible(query, queries, first_own, consumer_rows, in.window),
                       [&](int row, int column) { return is_visible(query + column, own_row + row, in.window); });
            uint32_t p[queries / 16][4], dr[queries / 16][4];
            weigh_tile(weights, in.score, [&](int i) { return shared.log_sums[stage][accumulator_column_of(i)]; },
                       [&](int i, float first, float second) { p[i / 8][i / 2 % 4] = pack2<T>(first, second); });
            start_weighted_sum<T, D, queries>(dv_sums, p, shared.douts[stage]);
            wgmma_wait<1>(dp);
#pragma unroll
            for (int i = 0; i < queries / 2; i++) weights[i] *= dp[i] - shared.deltas[stage][accumulator_column_of(i)];
            round_weights<T, queries>(dr, weights);
            start_weighted_sum<T, D, queries>(dk_sums, dr, shared.queries[stage]);
            wgmma_wait<0>(dv_sums);
            wgmma_wait<0>(dk_sums);
        }
        __syncwarp();  // all lanes have read their log sums and deltas
        if (threadIdx.x % 32 == 0) mbarrier_arrive(&shared.empty[stage]);
    }

#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = own_row + half * 8;
        if (row >= tile.first + rows) continue;
        const long long at = row * static_cast<long long>(leading) + key_head * D + threadIdx.x % 4 * 2;
        store_gradient<T, D>(dk + at, dk_sums, half, in.score.scale, in.angles, row);
#pragma unroll
        for (int j = 0; j < D / 8; j++) store2(dv + at + j * 8, dv_sums[4 * j + 2 * half], dv_sums[4 * j + 2 * half + 1]);
    }
}

// Boxes have 64 rows. dq, dk and dv are slices of one buffer and share its row length. Dynamic shared memory: sizeof(Shared).
#define HOPPER_BACKWARD_PARAMETERS \
    const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, \
        const __grid_constant__ TensorMap dout, const float *log_sum, const float *delta, const int *tiles, int query_heads, \
        int key_value_heads, float scale, float soft_cap, int window, const float *table, const unsigned *positions, \
        const unsigned *lengths, int first_row, int longer_than, int long_first_row
#define HOPPER_BACKWARD_INPUTS(D) \
    q, k, v, dout, HopperBackward { \
        log_sum, delta, tiles, query_heads, key_value_heads, Score{scale, {soft_cap}}, window, \
            Angles{table, positions, lengths, first_row, longer_than, long_first_row, D / 2} \
    }
#define EXPORT_HOPPER_BACKWARD(D, type) \
    EXPORT_KERNEL_AS(attention_backward_queries_sm90a_d##D##_##type, type, (hopper_attention_threads, 1), \
                     (HOPPER_BACKWARD_PARAMETERS, type* dq, int leading), \
                     (attention_backward_queries_sm90a<T, D>(HOPPER_BACKWARD_INPUTS(D), dq, leading))) \
    EXPORT_KERNEL_AS(attention_backward_keys_sm90a_d##D##_##type, type, (hopper_attention_threads, 1), \
                     (HOPPER_BACKWARD_PARAMETERS, type* dk, type* dv, int leading), \
                     (attention_backward_keys_sm90a<T, D>(HOPPER_BACKWARD_INPUTS(D), dk, dv, leading)))
EXPORT_HOPPER_BACKWARD(64, f16)
EXPORT_HOPPER_BACKWARD(128, f16)
EXPORT_HOPPER_BACKWARD(64, bf16)
EXPORT_HOPPER_BACKWARD(128, bf16)
