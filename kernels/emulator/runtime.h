// What kernels and primitives need from the emulator's runtime. See README.md for the whole picture.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

// The line of the kernel that called: a default argument is evaluated at the call, so every message can name it.
struct Location {
    const char* file;
    int line;
    static constexpr Location here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

// Where the running CUDA thread stands.
struct Indices {
    uint3 thread_index, block_index;
    dim3 block_dim, grid_dim;
    int block;               // in its cluster
    int lane, warp, linear;  // warp and thread are counted through the cluster: see Cluster::threads
};
// One launch runs at a time, on one OS thread, so a plain global is enough.
extern Indices* current;

// Ends the block and the launch with a message that names kernel, block and thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2), cold));

// ---- memory
void* static_shared(const void* key, size_t bytes, size_t alignment);
unsigned char* dynamic_shared(size_t alignment);
float atomic_add(float* address, float value, Location where);
unsigned atomic_add(unsigned* address, unsigned value, Location where);
unsigned atomic_max(unsigned* address, unsigned value, Location where);
unsigned atomic_or(unsigned* address, unsigned value, Location where);

// ---- barriers
// `thread_count` 0 means the whole block.
void barrier_sync(int id, int thread_count, Location where);
void barrier_arrive(int id, int thread_count, Location where);

// ---- clusters
unsigned cluster_block();
unsigned cluster_block_count();
void cluster_barrier_arrive(Location where);
void cluster_barrier_wait(Location where);

// ---- warp collectives: every lane of `mask` posts its arguments and the last to arrive runs the operation for all.
enum class Collective : uint8_t {
    none, syncwarp, shuffle, vote, reduce, ldmatrix, mma, wgmma, wgmma_fence, wgmma_commit, wgmma_wait
};
using Operation = void (*)(void** lane_arguments, unsigned mask);
void collective(Collective kind, unsigned mask, void* arguments, Operation operation, Location where);

enum class ShuffleMode : uint8_t { indexed, up, down, exclusive_or };
struct ShuffleArguments {
    uint64_t value, result;
    ShuffleMode mode;
    int operand, width;
};
void shuffle(void** lane_arguments, unsigned mask);
unsigned ballot(unsigned mask, bool predicate, Location where);
// Butterfly over the whole warp: at each of offsets 16, 8, 4, 2, 1 a lane combines its value with lane ^ offset.
float warp_reduce(float value, bool maximum, Location where);

template <class T>
T shuffle(unsigned mask, T value, ShuffleMode mode, int operand, int width, Location where) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most 8 bytes");
    ShuffleArguments arguments{0, 0, mode, operand, width};
    memcpy(&arguments.value, &value, sizeof(T));
    collective(Collective::shuffle, mask, &arguments, static_cast<Operation>(shuffle), where);
    memcpy(&value, &arguments.result, sizeof(T));
    return value;
}

// ---- tensor-core instructions (their meaning stands beside the PTX in ../ptx)
void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transposed, Location where);
// d[mt][nt][4] += a[mt][4] · b[nt][2], fragments of m16n8k16.
void mma_tile(float* d, const uint32_t* a, const uint32_t* b, int mt, int nt, bool bf16, Location where);

// ---- cp.async
void cp_async16(void* shared, const void* global, int bytes, Location where);
void cp_async_commit();
void cp_async_wait(int groups_in_flight);

// ---- Hopper: mbarriers, the TMA and wgmma (mbarrier.cpp, tma.cpp, wgmma.cpp)
void mbarrier_init(uint64_t* barrier, unsigned arrivals, Location where);
void fence_mbarrier_init();
void mbarrier_arrive(uint64_t* barrier, unsigned bytes, Location where);
// At the same place of another block of the cluster; orders the copies that the waiting thread starts, and nothing else.
void mbarrier_arrive_at(unsigned block, uint64_t* barrier, Location where);
void mbarrier_wait(uint64_t* barrier, unsigned parity, Location where);
void tma_load(void* shared, const uint64_t* map, int row, int column, uint64_t* barrier, Location where);
// To the same place of each block of the mask, counted on the barrier at the same place there.
void tma_load_multicast(void* shared, const uint64_t* map, int row, int column, uint64_t* barrier, unsigned block_mask,
                        Location where);
void tma_store(const uint64_t* map, const void* shared, int row, int column, Location where);
void tma_store_commit();
void tma_store_wait_read();
void fence_async_proxy();
uint32_t shared_offset(const void* address);  // fails outside shared memory
// A's fragment where it is in registers; else null, and `a` says where in shared memory.
void wgmma(float* d, int columns, const uint32_t* a_registers, uint64_t a, uint64_t b, bool b_is_mn, bool accumulate, bool bf16,
           Location where);
void wgmma_fence(Location where);
void wgmma_commit(Location where);
void wgmma_wait(int groups_in_flight, Location where);

// ---- registry: each exported kernel, its parameters' kinds and a function that unpacks an argument array.
struct Kernel {
    const char* name;
    const char* signature;
    void (*call)(void** arguments);
    Kernel* next;
};
void register_kernel(Kernel* kernel);

// One letter a parameter, so that the host's argument list can be checked: p(ointer), i(nt32), u(int32), l(int64), f(loat),
// b(oxes of a matrix: a TensorMap).
template <class T>
constexpr char parameter_kind() {
    if constexpr (std::is_pointer_v<T>) return 'p';
    else if constexpr (std::is_same_v<T, float>) return 'f';
    else if constexpr (std::is_same_v<T, int>) return 'i';
    else if constexpr (std::is_same_v<T, unsigned>) return 'u';
    else if constexpr (std::is_same_v<T, long long> || std::is_same_v<T, int64_t>) return 'l';
    else if constexpr (sizeof(T) == 128) return 'b';
    else static_assert(!sizeof(T), "parameters are pointers, float, int, unsigned, long long or TensorMap");
}

template <auto function>
struct Trampoline;
template <class... Parameters, void (*function)(Parameters...)>
struct Trampoline<function> {
    static constexpr char signature[] = {parameter_kind<Parameters>()..., '\0'};
    template <size_t... index>
    static void unpack(void** arguments, std::index_sequence<index...>) {
        function(*reinterpret_cast<Parameters*>(arguments[index])...);
    }
    static void call(void** arguments) { unpack(arguments, std::index_sequence_for<Parameters...>{}); }
};

struct Registration {
    Kernel kernel;
    template <class T>
    Registration(const char* name, T) : kernel{name, T::signature, T::call, nullptr} {
        register_kernel(&kernel);
    }
};

}  // namespace emulator
