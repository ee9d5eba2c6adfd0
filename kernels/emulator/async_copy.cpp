// cp.async: the destination is poisoned when the copy is issued and filled as late as the hardware may: at the wait for
// its group. A kernel that reads too early, or waits for the wrong group, reads NaN.
#include "block.h"
#include "checker.h"

namespace emulator {

constexpr int copy_bytes = 16;

void cp_async16(void* shared, const void* global, int bytes, Location where) {
    shared_offset(shared);
    if (bytes < 0 || bytes > copy_bytes) fail("cp.async of %d bytes at %s", bytes, describe_location(where).c_str());
    if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % copy_bytes)
        fail("cp.async with an address that is not 16-byte aligned at %s", describe_location(where).c_str());
    if constexpr (checked) checker::async_copy_issued(shared, global, bytes, where);
    if (bytes) {  // touch the source now, so that a wild address faults at this line and not at the wait
        const volatile char* source = static_cast<const volatile char*>(global);
        (void)source[0];
        (void)source[bytes - 1];
    }
    memset(shared, 0xFF, copy_bytes);
    self()->async_copies.copies.push_back({static_cast<unsigned char*>(shared), global, bytes, where});
}

void cp_async_commit() {
    AsyncCopies& async = self()->async_copies;
    async.group_ends.push_back(async.copies.size());
}

void cp_async_wait(int groups_in_flight) {
    maybe_yield(4);
    AsyncCopies& async = self()->async_copies;
    while (async.group_ends.size() - async.groups_landed > static_cast<size_t>(groups_in_flight)) {
        const size_t end = async.group_ends[async.groups_landed++];
        for (; async.copies_landed < end; async.copies_landed++) {
            const AsyncCopies::Copy& copy = async.copies[async.copies_landed];
            memcpy(copy.shared, copy.global, copy.bytes);
            memset(copy.shared + copy.bytes, 0, copy_bytes - copy.bytes);
            if constexpr (checked) checker::async_copy_landed(copy.shared, copy_bytes, copy.where);
        }
    }
    if (async.groups_landed == async.group_ends.size() && async.copies_landed == async.copies.size()) async.clear();
}

void check_copies_at_exit(const Thread& thread) {
    const AsyncCopies& async = thread.async_copies;
    if (async.copies_landed == async.copies.size()) return;
    report("%zu cp.async still in flight when the thread exited, the first from %s",
           async.copies.size() - async.copies_landed,
           describe_location(async.copies[async.copies_landed].where).c_str());
}

}  // namespace emulator
