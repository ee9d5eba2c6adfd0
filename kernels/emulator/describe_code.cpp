// "file:line" of a code address, for messages.
#include <dlfcn.h>

#include <cstdio>

#include "checker.h"

namespace emulator::checker {

std::string describe_code(uintptr_t program_counter) {
    Dl_info library;
    if (!dladdr(reinterpret_cast<void*>(program_counter), &library)) return "?";
    const size_t offset = program_counter - reinterpret_cast<uintptr_t>(library.dli_fbase);
    char command[1100], line[400];
    snprintf(command, sizeof command, "addr2line -s -e '%s' %#zx 2>/dev/null", library.dli_fname, offset);
    std::string found;
    if (FILE* pipe = popen(command, "r")) {
        if (fgets(line, sizeof line, pipe)) found = line;
        pclose(pipe);
    }
    found = found.substr(0, found.find_first_of(" \n"));
    if (!found.empty() && found[0] != '?') return found;
    snprintf(line, sizeof line, "code offset %#zx", offset);  // no addr2line on this machine
    return line;
}

}  // namespace emulator::checker
