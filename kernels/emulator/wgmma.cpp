// wgmma: a warp's instructions run in order when it waits for their group, on what shared memory then holds; until then the
// accumulators read NaN. Each warp of the warpgroup computes its own 16 rows.
#include <immintrin.h>

#include "block.h"
#include "checker.h"

namespace emulator {

constexpr int rows_of_a_warp = 16, k_of_an_instruction = 16, most_columns = 256;

struct PendingWgmma {
    int columns;
    bool a_in_registers;
    uint64_t a, b;
    bool b_is_mn, accumulate, bf16;
    Location where;
    float* lanes[32];             // each lane's accumulators
    uint32_t a_registers[32][4];  // each lane's fragment of A
};

// A set of accumulators that wgmma owns.
struct InFlight {
    float* of_first_lane;
    int instructions;
    std::vector<float> sums;  // what they hold in truth, [16][columns]
};

struct WarpgroupState {
    std::vector<PendingWgmma> pending;
    std::vector<size_t> group_ends;  // instructions of each committed group, counted from the first pending one
    std::vector<InFlight> in_flight;
    bool fenced;
    int issued;
};
static WarpgroupState states[max_warps];

void begin_wgmma() {
    for (WarpgroupState& state : states) {
        state.pending.clear();
        state.group_ends.clear();
        state.in_flight.clear();
        state.fenced = false;
        state.issued = 0;
    }
}

// ---- operands

struct Descriptor {
    uint32_t address, next_columns, eight_rows;
};
static Descriptor decode(uint64_t bits, Location where) {
    const auto field = [&](int shift) { return static_cast<uint32_t>(bits >> shift & 0x3fff) << 4; };
    if (bits >> 62 != 1 || (bits >> 49 & 7))
        fail("wgmma: an operand that is not swizzled by 128 bytes at %s", describe_location(where).c_str());
    return {field(0), field(16), field(32)};
}

// Byte offset in shared memory of 16-byte chunk `c` of an operand's row `r`: eight of k for row r of m or n, or eight of m or
// n for row r of k. The exclusive or works on address bits.
static uint32_t chunk_offset(const Descriptor& operand, bool is_mn, int r, int c) {
    const uint32_t begin = is_mn ? operand.address + c / 8 * operand.next_columns + c % 8 * 16 : operand.address + c * 16;
    const uint32_t offset = begin + r / 8 * operand.eight_rows + r % 8 * 128;
    return offset ^ (offset >> 7 & 7) << 4;
}

static __m256 widen8(const void* halves, bool bf16) {
    const __m128i packed = _mm_loadu_si128(static_cast<const __m128i*>(halves));
    if (!bf16) return _mm256_cvtph_ps(packed);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(packed), 16));
}

// Calls visit(offset of 16 bytes) for all that the warp's part of an instruction reads.
template <class Visit>
static void for_each_chunk(const PendingWgmma& instruction, int warp, const Visit& visit) {
    const Descriptor b = decode(instruction.b, instruction.where);
    if (!instruction.a_in_registers) {
        const Descriptor a = decode(instruction.a, instruction.where);
        const int first_row = warp % 4 * rows_of_a_warp;
        for (int r = 0; r < rows_of_a_warp; r++)
            for (int c = 0; c < 2; c++) visit(chunk_offset(a, false, first_row + r, c));
    }
    const int b_rows = instruction.b_is_mn ? k_of_an_instruction : instruction.columns;
    const int b_chunks = instruction.b_is_mn ? instruction.columns / 8 : 2;
    for (int r = 0; r < b_rows; r++)
        for (int c = 0; c < b_chunks; c++) visit(chunk_offset(b, instruction.b_is_mn, r, c));
}

// ---- execution

// Moves the accumulators between the lanes' registers and true_sums.
static void exchange(const PendingWgmma& instruction, float* sums, bool to_lanes) {
    for (int lane = 0; lane < 32; lane++)
        for (int j = 0; j < instruction.columns / 8; j++)
            for (int half = 0; half < 2; half++) {
                float* mine = instruction.lanes[lane] + j * 4 + half * 2;
                float* shared = sums + (lane / 4 + half * 8) * instruction.columns + j * 8 + lane % 4 * 2;
                memcpy(to_lanes ? mine : shared, to_lanes ? shared : mine, 8);
            }
}

// The warp's 16 rows of A as [16][16] halves.
static void gather_a(const PendingWgmma& instruction, int warp, uint16_t (*rows)[k_of_an_instruction]) {
    if (instruction.a_in_registers) {
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++)
                memcpy(&rows[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8], &instruction.a_registers[lane][i], 4);
        return;
    }
    const Descriptor a = decode(instruction.a, instruction.where);
    for (int r = 0; r < rows_of_a_warp; r++)
        for (int c = 0; c < 2; c++)
            memcpy(&rows[r][c * 8], own_shared() + chunk_offset(a, false, warp % 4 * rows_of_a_warp + r, c), 16);
}

static void multiply(const PendingWgmma& instruction, int warp, float* sums) {
    const Descriptor b = decode(instruction.b, instruction.where);
    static uint16_t a_halves[rows_of_a_warp][k_of_an_instruction];
    static float a_values[rows_of_a_warp][k_of_an_instruction], b_values[k_of_an_instruction][most_columns];
    const int columns = instruction.columns;
    gather_a(instruction, warp, a_halves);
    for (int r = 0; r < rows_of_a_warp; r++)
        for (int c = 0; c < 2; c++) _mm256_storeu_ps(&a_values[r][c * 8], widen8(&a_halves[r][c * 8], instruction.bf16));
    if (instruction.b_is_mn) {
        for (int k = 0; k < k_of_an_instruction; k++)
            for (int c = 0; c < columns / 8; c++)
                _mm256_storeu_ps(&b_values[k][c * 8], widen8(own_shared() + chunk_offset(b, true, k, c), instruction.bf16));
    } else {
        for (int n = 0; n < columns; n++) {
            float column[k_of_an_instruction];
            for (int c = 0; c < 2; c++)
                _mm256_storeu_ps(column + c * 8, widen8(own_shared() + chunk_offset(b, false, n, c), instruction.bf16));
            for (int k = 0; k < k_of_an_instruction; k++) b_values[k][n] = column[k];
        }
    }
    for (int r = 0; r < rows_of_a_warp; r++)
        for (int n = 0; n < columns; n += 8) {
            __m256 sum = instruction.accumulate ? _mm256_loadu_ps(sums + r * columns + n) : _mm256_setzero_ps();
            for (int k = 0; k < k_of_an_instruction; k++)
                sum = _mm256_fmadd_ps(_mm256_broadcast_ss(&a_values[r][k]), _mm256_loadu_ps(&b_values[k][n]), sum);
            _mm256_storeu_ps(sums + r * columns + n, sum);
        }
}

struct WgmmaArguments {
    float* d;
    const uint32_t* a_registers;
    PendingWgmma* instruction;
};

// The accumulators become wgmma's: the lanes see NaN.
static InFlight& take_accumulators(WarpgroupState& state, const PendingWgmma& instruction) {
    for (InFlight& set : state.in_flight)
        if (set.of_first_lane == instruction.lanes[0]) return set;
    state.in_flight.push_back({instruction.lanes[0], 0, std::vector<float>(rows_of_a_warp * instruction.columns)});
    exchange(instruction, state.in_flight.back().sums.data(), false);
    for (float* accumulators : instruction.lanes) memset(accumulators, 0xFF, instruction.columns / 2 * sizeof(float));
    return state.in_flight.back();
}

static void issue(void** lane_arguments, unsigned) {
    const int warp = current->warp;
    WarpgroupState& state = states[warp];
    PendingWgmma instruction = *static_cast<WgmmaArguments*>(lane_arguments[0])->instruction;
    for (int lane = 0; lane < 32; lane++) {
        const WgmmaArguments& posted = *static_cast<WgmmaArguments*>(lane_arguments[lane]);
        instruction.lanes[lane] = posted.d;
        if (posted.a_registers) memcpy(instruction.a_registers[lane], posted.a_registers, 16);
        if (posted.instruction->a != instruction.a || posted.instruction->b != instruction.b)
            fail("wgmma: the lanes of a warp name different operands at %s", describe_location(instruction.where).c_str());
    }
    if (!state.fenced)
        report("wgmma at %s without wgmma_fence since registers were last touched",
               describe_location(instruction.where).c_str());
    if constexpr (checked)
        for_each_chunk(instruction, warp, [&](uint32_t offset) {
            checker::async_read(*cluster.warp_begin(warp), own_shared() + offset, 16, instruction.where);
        });
    take_accumulators(state, instruction).instructions++;
    state.pending.push_back(instruction);
    state.issued++;
}

void wgmma(float* d, int columns, const uint32_t* a_registers, uint64_t a, uint64_t b, bool b_is_mn, bool accumulate, bool bf16,
           Location where) {
    PendingWgmma instruction;
    instruction.columns = columns;
    instruction.a_in_registers = a_registers != nullptr;
    instruction.a = a;
    instruction.b = b;
    instruction.b_is_mn = b_is_mn;
    instruction.accumulate = accumulate;
    instruction.bf16 = bf16;
    instruction.where = where;
    WgmmaArguments arguments{d, a_registers, &instruction};
    collective(Collective::wgmma, ~0u, &arguments, issue, where);
}

static void fence(void**, unsigned) { states[current->warp].fenced = true; }
void wgmma_fence(Location where) { collective(Collective::wgmma_fence, ~0u, nullptr, fence, where); }

static void commit(void**, unsigned) {
    WarpgroupState& state = states[current->warp];
    state.group_ends.push_back(state.pending.size());
}
void wgmma_commit(Location where) { collective(Collective::wgmma_commit, ~0u, nullptr, commit, where); }

static void wait(void** lane_arguments, unsigned) {
    const int warp = current->warp, groups_in_flight = *static_cast<int*>(lane_arguments[0]);
    WarpgroupState& state = states[warp];
    if (static_cast<int>(state.group_ends.size()) <= groups_in_flight) return;
    const size_t landing = state.group_ends.size() - groups_in_flight, end = state.group_ends[landing - 1];
    for (size_t i = 0; i < end; i++) {
        const PendingWgmma& instruction = state.pending[i];
        if constexpr (checked)
            for_each_chunk(instruction, warp, [&](uint32_t offset) {
                checker::async_read(*cluster.warp_begin(warp), own_shared() + offset, 16, instruction.where);
            });
        for (size_t set = 0; set < state.in_flight.size(); set++) {
            InFlight& accumulators = state.in_flight[set];
            if (accumulators.of_first_lane != instruction.lanes[0]) continue;
            multiply(instruction, warp, accumulators.sums.data());
            if (--accumulators.instructions) continue;
            exchange(instruction, accumulators.sums.data(), true);  // the lanes have them back
            state.in_flight.erase(state.in_flight.begin() + static_cast<std::ptrdiff_t>(set--));
            state.fenced = false;
        }
    }
    state.pending.erase(state.pending.begin(), state.pending.begin() + static_cast<std::ptrdiff_t>(end));
    state.group_ends.erase(state.group_ends.begin(), state.group_ends.begin() + static_cast<std::ptrdiff_t>(landing));
    for (size_t& group_end : state.group_ends) group_end -= end;
}
void wgmma_wait(int groups_in_flight, Location where) {
    maybe_yield(4);
    collective(Collective::wgmma_wait, ~0u, &groups_in_flight, wait, where);
}

void check_wgmma_at_end(int block) {
    for (int i = 0; i < cluster.warps_of_block; i++) {
        const int warp = block * cluster.warps_of_block + i;
        if (!states[warp].pending.empty()) return report("wgmma of warp %d still in flight when the block ended", i);
        const int first = warp / 4 * 4;
        if (states[warp].issued != states[first].issued)
            return report("the warps of a warpgroup issued different numbers of wgmma: %d and %d", states[first].issued,
                          states[warp].issued);
    }
}

}  // namespace emulator
