// Threads that compute together, and memory that is kept between calls.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "model.h"
#include "stages.h"

namespace {

// Threads that compute one chunk together; alone it waits for nobody.
struct Crew {
    int64_t size = 1;
    std::atomic<int64_t> arrived{0}, meetings{0};

    // Goes on when all have come.
    void meet() {
        if (size == 1) return;
        COUNTED(WAITING);
        const int64_t before = meetings.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < size)
            return wait([&] { return meetings.load(std::memory_order_acquire) != before; });
        arrived.store(0, std::memory_order_relaxed);
        meetings.store(before + 1, std::memory_order_release);
    }

    // Spins for some microseconds, then leaves the core to others.
    template <class Done>
    static void wait(Done done) {
        for (int64_t turns = 0; !done(); ++turns)
            if (turns < 2000)
                _mm_pause();
            else
                std::this_thread::yield();
    }
};

// A block of memory. Freed ones are kept for the next call, which so fetches no pages anew.
class Memory {
  public:
    explicit Memory(size_t needed) : bytes((needed / ROUND + 1) * ROUND) {
        std::unique_lock lock(mutex, std::try_to_lock);  // a fork may have left it locked for ever
        Block *other = nullptr;
        for (Block &block : kept) {
            if (!lock || block.at == nullptr) continue;
            if (block.bytes >= bytes) {
                bytes = block.bytes;
                std::swap(at, block.at);
                return;
            }
            other = &block;
        }
        if (other) std::free(std::exchange(other->at, nullptr));  // too small: this one replaces it
        at = static_cast<char *>(std::aligned_alloc(64, bytes));
        if (at == nullptr) throw std::bad_alloc();
    }
    ~Memory() {
        std::unique_lock lock(mutex, std::try_to_lock);
        for (Block &block : kept)
            if (lock && bytes <= LARGEST && block.at == nullptr) {
                block = {at, bytes};
                return;
            }
        std::free(at);
    }
    Memory(const Memory &) = delete;

    char *get() const { return at; }

  private:
    static constexpr size_t ROUND = 1 << 18, LARGEST = 64 << 20;
    struct Block {
        char *at;
        size_t bytes;
    };
    static inline std::mutex mutex;
    static inline Block kept[64];

    char *at = nullptr;
    size_t bytes;
};

// Cuts a block into arrays; of no block it finds the size.
class Cutter {
  public:
    explicit Cutter(char *memory) : memory(memory) {}
    template <class N>
    void operator()(N *&array, int64_t count) {
        array = memory ? reinterpret_cast<N *>(memory + bytes) : nullptr;
        bytes += (count * sizeof(N) + 127) / 64 * 64;
    }
    size_t bytes = 0;

  private:
    char *memory;
};

// Chunks of whole sequences.
struct Chunks {
    std::vector<int64_t> first;  // sequence of each chunk, and their number
    int64_t tokens = 0, sequences = 0, longest = 0;  // at most, of a chunk; tokens of a sequence

    // Of about so many tokens.
    Chunks(const Batch &batch, int64_t size) : first{0} {
        const int64_t *starts = batch.starts;
        for (int64_t s = 1; s < batch.sequences; ++s)
            if (starts[s] / size != starts[s - 1] / size) first.push_back(s);
        first.push_back(batch.sequences);
        for (int64_t c = 0; c < number(); ++c) {
            tokens = std::max(tokens, starts[first[c + 1]] - starts[first[c]]);
            sequences = std::max(sequences, first[c + 1] - first[c]);
        }
        for (int64_t s = 0; s < batch.sequences; ++s)
            longest = std::max(longest, starts[s + 1] - starts[s]);
    }

    int64_t number() const { return first.size() - 1; }

    // Tokens of the thread with most of them, if each takes the next chunk when it is free.
    int64_t most(const Batch &batch, int64_t threads) const {
        std::vector<int64_t> load(threads);
        for (int64_t c = 0; c < number(); ++c)
            *std::min_element(load.begin(), load.end()) +=
                batch.starts[first[c + 1]] - batch.starts[first[c]];
        return *std::max_element(load.begin(), load.end());
    }
};

}  // namespace
