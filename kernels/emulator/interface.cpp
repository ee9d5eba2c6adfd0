// The C interface through which the host program (src/device/emulator.rs) drives the emulator: shaped like the driver's,
// one launch at a time.
#include <mutex>

#include "block.h"
#include "checker.h"

namespace emulator {

static std::mutex one_at_a_time;
static Kernel* kernels = nullptr;
static uint32_t launch_count = 0;

void register_kernel(Kernel* kernel) {
    kernel->next = kernels;
    kernels = kernel;
}

static bool is_valid(const Launch& launch) {
    const uint64_t threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
    return threads && threads <= max_threads && launch.grid.x && launch.grid.y && launch.grid.z &&
           launch.grid.x <= 0x7fffffffu && launch.grid.y <= 65535 && launch.grid.z <= 65535 &&
           launch.dynamic_shared_bytes <= max_shared_bytes;
}

static bool has_whole_clusters(const Launch& launch) {
    return launch.cluster_blocks && launch.cluster_blocks <= unsigned(max_cluster_blocks) &&
           launch.grid.x % launch.cluster_blocks == 0 &&
           launch.cluster_blocks * warps_of_block(launch) <= unsigned(max_warps);
}

}  // namespace emulator

using namespace emulator;
#define INTERFACE extern "C" __attribute__((visibility("default")))

// Null when the address range is used up.
INTERFACE void* emulator_allocate(size_t bytes) {
    std::lock_guard lock(one_at_a_time);
    reserve_memory();
    return allocate(bytes);
}

INTERFACE bool emulator_release(void* address) {
    std::lock_guard lock(one_at_a_time);
    return release(address);
}

INTERFACE bool emulator_upload(void* to, const void* from, size_t bytes) {
    std::lock_guard lock(one_at_a_time);
    if (!is_inside_allocation(to, bytes)) return false;
    memcpy(to, from, bytes);
    if constexpr (checked) checker::initialised_by_host(to, bytes);
    return true;
}

INTERFACE bool emulator_download(void* to, const void* from, size_t bytes) {
    std::lock_guard lock(one_at_a_time);
    if (!is_inside_allocation(from, bytes)) return false;
    memcpy(to, from, bytes);
    return true;
}

INTERFACE bool emulator_fill(void* to, int value, size_t bytes) {
    std::lock_guard lock(one_at_a_time);
    if (!is_inside_allocation(to, bytes)) return false;
    memset(to, value, bytes);
    if constexpr (checked) checker::initialised_by_host(to, bytes);
    return true;
}

INTERFACE bool emulator_copy(void* to, const void* from, size_t bytes) {
    std::lock_guard lock(one_at_a_time);
    if (!is_inside_allocation(to, bytes) || !is_inside_allocation(from, bytes)) return false;
    memmove(to, from, bytes);
    if constexpr (checked) checker::initialised_by_host(to, bytes);
    return true;
}

// A kernel by name, or null.
INTERFACE const Kernel* emulator_kernel(const char* name) {
    for (const Kernel* kernel = kernels; kernel; kernel = kernel->next)
        if (!strcmp(kernel->name, name)) return kernel;
    return nullptr;
}

// One letter a parameter: see parameter_kind in runtime.h.
INTERFACE const char* emulator_kernel_signature(const Kernel* kernel) { return kernel->signature; }

// The i-th registered kernel's name, or null.
INTERFACE const char* emulator_kernel_name(size_t index) {
    const Kernel* kernel = kernels;
    while (kernel && index--) kernel = kernel->next;
    return kernel ? kernel->name : nullptr;
}

// Fills a kernel's TensorMap of 16 words. False: the matrix lies outside its memory, or the TMA cannot take it.
INTERFACE bool emulator_encode_boxes(uint64_t* map, uint64_t address, uint64_t rows, uint64_t columns, uint64_t row_bytes,
                                     uint32_t box_rows) {
    std::lock_guard lock(one_at_a_time);
    return encode_boxes(map, address, rows, columns, row_bytes, box_rows);
}

// Runs every cluster of the grid, one after the other, in an order that depends on the seed. False: `message` holds what
// was found, cut to its length.
INTERFACE bool emulator_launch(const Kernel* kernel, const unsigned* grid, const unsigned* block_dim,
                               unsigned cluster_blocks, unsigned dynamic_shared_bytes, uint64_t seed, void** arguments, char* message,
                               size_t message_bytes) {
    std::lock_guard lock(one_at_a_time);
    reserve_memory();
    clear_messages();
    const Launch launch{kernel, arguments, dim3(grid[0], grid[1], grid[2]),
                        dim3(block_dim[0], block_dim[1], block_dim[2]), cluster_blocks, dynamic_shared_bytes, ++launch_count,
                        seed};
    if (!is_valid(launch)) {
        add_message("invalid launch: grid, block or shared memory out of the hardware's limits");
    } else if (!has_whole_clusters(launch)) {
        add_message("invalid launch: the grid in x is no multiple of a cluster, or the cluster larger than 8 blocks or 64 warps");
    } else {
        install_signal_handlers();
        start_watchdog();
        const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
        const uint64_t clusters = blocks / cluster_blocks;
        for (uint64_t i = 0; i < clusters && !any_message(); i++)
            run_cluster(launch, (i + seed) % clusters * cluster_blocks);
        stop_watchdog();
    }
    snprintf(message, message_bytes, "%s", messages());
    return !any_message();
}
