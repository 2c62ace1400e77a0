// Threads that compute at once: those that torch computes with.
//
// They spin for milliseconds after each of torch's parallel parts, waiting for the next. Threads of our
// own would share the cores with them meanwhile, and half of a core's work would be waiting; given our
// work they do it without being made or woken.

#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#include "crews.h"

namespace {

// Of the OpenMP library that torch is linked with; null where threads are made at every call: where there
// is none, after a fork, which leaves the new process without its threads, and in services.
struct OpenMp {
    void (*parallel)(void (*work)(void *), void *data, unsigned threads, unsigned flags) = nullptr;
    int (*size)() = nullptr;  // threads of the parallel part that asks
    int (*own)() = nullptr;   // number of the thread that asks, from 0
};
OpenMp open_mp;

// Calls work(n) for n = 0..count-1, each by a thread of its own and all at once. False, and no call, if
// so many threads are not to be had: by the limits of OpenMP or, of our own, of the system. (Where the
// system gives OpenMP none, libgomp ends the process, as it would in torch's parallel parts.) `threads`,
// at least `count`, is what torch computes with: asked for fewer, OpenMP would end the others and make
// them anew for torch.
template <class Work>
bool at_once(int64_t count, int64_t threads, Work work) {
    if (count == 1) {
        work(0);
        return true;
    }
    std::atomic<bool> enough{true};
    if (open_mp.parallel) {
        auto part = [&] {
            if (open_mp.size() < count)
                enough = false;
            else if (open_mp.own() < count)
                work(open_mp.own());
        };
        open_mp.parallel([](void *data) { (*static_cast<decltype(part) *>(data))(); }, &part,
                         unsigned(threads), 0);
        return enough;
    }
    std::atomic<int> start{0};  // 1: go, -1: leave
    std::vector<std::thread> others;
    others.reserve(count);
    try {
        for (int64_t n = 1; n < count; ++n)
            others.emplace_back([&, n] {
                Crew::wait([&] { return start != 0; });
                if (start > 0) work(n);
            });
        start = 1;
    } catch (const std::exception &) {
        start = -1;
        enough = false;
    }
    if (enough) work(0);
    for (auto &other : others) other.join();
    return enough;
}

}  // namespace
