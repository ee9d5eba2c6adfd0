// Findings and how a cluster ends on one: by our own checks, by a fault of the processor (guard pages, stack overflow) or
// by the watchdog. The process never dies of a kernel's mistake.
#include <csignal>
#include <cstdarg>
#include <ctime>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "block.h"
#include "checker.h"

namespace emulator {

constexpr int reported_messages = 12, findings_before_abandoning = 40;
static std::string all_messages;
static int message_count = 0;

void clear_messages() {
    all_messages.clear();
    message_count = 0;
}
bool any_message() { return message_count > 0; }
const char* messages() { return all_messages.c_str(); }
void add_message(const std::string& message) {
    if (message_count++ < reported_messages) all_messages += message + "\n";
}

std::string describe_location(Location where) {
    const char* slash = strrchr(where.file, '/');
    return std::string(slash ? slash + 1 : where.file) + ":" + std::to_string(where.line);
}

std::string describe_block(int block) {
    const uint3 at = cluster.threads[block * cluster.warps_of_block * 32].block_index;
    char text[60];
    snprintf(text, sizeof text, "block (%u,%u,%u)", at.x, at.y, at.z);
    return text;
}

static int thread_in_block(int thread) { return thread % (cluster.warps_of_block * 32); }

std::string describe_thread(int thread) {
    const std::string text = "thread " + std::to_string(thread_in_block(thread));
    return cluster.block_count > 1 ? text + " of " + describe_block(cluster.block_of(thread)) : text;
}

static std::string describe_running_thread() {
    if (!current) return "";
    const int thread = thread_in_block(current->linear);
    char text[200];
    snprintf(text, sizeof text, " [%s, %s, thread %d, warp %d, lane %d]", cluster.launch->kernel->name,
             describe_block(current->block).c_str(), thread, thread / 32, current->lane);
    return text;
}

static std::string formatted(const char* format, va_list arguments) {
    char text[1024];
    vsnprintf(text, sizeof text, format, arguments);
    return text;
}

void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    add_message(formatted(format, arguments) + describe_running_thread());
    va_end(arguments);
    abandon_cluster();
}

void report(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    add_message(formatted(format, arguments) + describe_running_thread());
    va_end(arguments);
    if (message_count > findings_before_abandoning) abandon_cluster();
}

// ---- faults. The handler runs on its own stack, notes what happened and rewrites the interrupted context so that
// returning from the signal lands in end_faulted_cluster.

static pid_t launching_thread = 0;
static char signal_stack[64 << 10] __attribute__((aligned(64)));
static char fault_stack[256 << 10] __attribute__((aligned(64)));
static struct sigaction previous_actions[65];
// The fast and the checker library may live in one process: each needs a signal of its own.
static const int watchdog_signal = SIGRTMIN + 4 + checked;
static struct {
    int signal_number;
    uintptr_t address, program_counter;
} fault;

static bool kernel_is_running() { return cluster.running && syscall(SYS_gettid) == launching_thread; }

static void end_faulted_cluster();

static void leave_kernel(int signal_number, const siginfo_t* info, void* interrupted) {
    auto* context = static_cast<ucontext_t*>(interrupted);
    fault.signal_number = signal_number;
    fault.address = reinterpret_cast<uintptr_t>(info->si_addr);
    fault.program_counter = context->uc_mcontext.gregs[REG_RIP];
    context->uc_mcontext.gregs[REG_RIP] = reinterpret_cast<greg_t>(end_faulted_cluster);
    // 8 below a 16-byte boundary, as if a call had pushed its return address.
    context->uc_mcontext.gregs[REG_RSP] = reinterpret_cast<greg_t>(fault_stack + sizeof fault_stack - 64 - 8);
}

static std::string describe_fault(int signal_number, uintptr_t address) {
    char text[300];
    if (signal_number == watchdog_signal) return "watchdog: seconds without a barrier or collective; the kernel spins";
    if (is_global(address)) {
        const Allocation* near = find_allocation(address);
        snprintf(text, sizeof text, "global access out of bounds: byte %lld of an allocation of %zu bytes%s",
                 near ? static_cast<long long>(address - near->address) : -1LL, near ? near->bytes : 0,
                 near && near->freed ? ", already freed" : "");
    } else if (is_shared(address)) {
        const size_t in_arenas = address - reinterpret_cast<uintptr_t>(shared_arena);
        const long long offset = static_cast<long long>(shared_place(in_arenas));
        const uint32_t dynamic_shared_offset = cluster.blocks[shared_owner(in_arenas)].dynamic_shared_offset;
        snprintf(text, sizeof text, "shared access out of bounds: byte %lld of the dynamic shared memory of %u bytes",
                 offset - (dynamic_shared_offset ? dynamic_shared_offset : static_shared_begin),
                 cluster.launch->dynamic_shared_bytes);
    } else if (is_stack(address)) {
        snprintf(text, sizeof text, "a thread's stack overflowed: its local variables are too large");
    } else {
        snprintf(text, sizeof text, "signal %d at address %#zx: a wild pointer or a misaligned vector access",
                 signal_number, address);
    }
    return text;
}

// Outside the signal handler, where allocating and starting addr2line are allowed.
static void end_faulted_cluster() {
    add_message(describe_fault(fault.signal_number, fault.address) + " at " +
                checker::describe_code(fault.program_counter) + describe_running_thread());
    abandon_cluster();
}

static void on_fault(int signal_number, siginfo_t* info, void* context) {
    if (kernel_is_running()) return leave_kernel(signal_number, info, context);
    // Not ours: whoever was installed before decides (the other library, or Rust's stack-overflow message).
    const struct sigaction& previous = previous_actions[signal_number];
    if (previous.sa_flags & SA_SIGINFO) return previous.sa_sigaction(signal_number, info, context);
    sigaction(signal_number, &previous, nullptr);
}

// A cluster that burns CPU time without one switch between threads spins on something that nobody else can set.
static uint64_t switches_at_last_tick = 0;
static int idle_ticks = 0;
constexpr int idle_ticks_allowed = 6;
static void on_tick(int signal_number, siginfo_t* info, void* context) {
    if (!kernel_is_running()) return;
    if (cluster.switches != switches_at_last_tick) {
        switches_at_last_tick = cluster.switches;
        idle_ticks = 0;
    } else if (++idle_ticks >= idle_ticks_allowed) {
        leave_kernel(signal_number, info, context);
    }
}

void install_signal_handlers() {
    static bool installed = false;
    if (installed) return;
    installed = true;
    struct sigaction action = {};
    // SA_NODEFER: the handler does not return normally, so the signal must not stay blocked.
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    action.sa_sigaction = on_fault;
    for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigaction(fault, &action, &previous_actions[fault]);
    action.sa_sigaction = on_tick;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART | SA_NODEFER;
    sigaction(watchdog_signal, &action, nullptr);
}

// The timer counts the launching thread's CPU time and signals that thread alone; it lives for one launch.
static timer_t watchdog_timer;
static stack_t previous_signal_stack;
void start_watchdog() {
    launching_thread = static_cast<pid_t>(syscall(SYS_gettid));
    stack_t stack = {};
    stack.ss_sp = signal_stack;
    stack.ss_size = sizeof signal_stack;
    sigaltstack(&stack, &previous_signal_stack);
    idle_ticks = 0;
    sigevent event = {};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = watchdog_signal;
    event._sigev_un._tid = launching_thread;
    timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &watchdog_timer);
    const itimerspec half_a_second = {{0, 500'000'000}, {0, 500'000'000}};
    timer_settime(watchdog_timer, 0, &half_a_second, nullptr);
}
void stop_watchdog() {
    timer_delete(watchdog_timer);
    sigaltstack(&previous_signal_stack, nullptr);
}

}  // namespace emulator
