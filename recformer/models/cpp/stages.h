// Where the time goes.

#pragma once

#include <immintrin.h>

#include <atomic>
#include <cstdint>
#include <utility>

namespace {

// What a thread does; compiled with RECFORMER_TIMES the time of each is added up.
enum Stage {
    REST, EMBEDDINGS, PRODUCTS, COPIES, GELU, NORM, SCORES, SOFTMAX, FIRSTS, WAITING, STAGES
};

#ifdef RECFORMER_TIMES
std::atomic<uint64_t> spent[STAGES];
thread_local uint64_t ticks[STAGES], since = 0;
thread_local Stage stage = REST;

inline Stage enter(Stage next) {
    const uint64_t now = __rdtsc();
    ticks[stage] += now - since;
    since = now;
    return std::exchange(stage, next);
}
// Counts for this stage until the end of the block; products of `<s>` stay with it.
struct Counted {
    Stage before;
    explicit Counted(Stage next)
        : before(enter(next == PRODUCTS && stage == FIRSTS ? FIRSTS : next)) {}
    ~Counted() { enter(before); }
};
#define COUNTED(stage) const Counted counted(stage)
#else
#define COUNTED(stage)
#endif

}  // namespace
