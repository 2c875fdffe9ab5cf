// Threads that wait for work. They start once, at the first product that wants them; starting one at
// each call would take longer than most products.
#pragma once

#include <cstddef>

namespace plyweight {

// Work in units that may be done in any order and by any thread. `slot` is 0 for the thread that
// called and below the number of threads: no two threads at work have the same.
class Work {
public:
    virtual void run(std::size_t begin, std::size_t end, int slot) noexcept = 0;

protected:
    ~Work() = default;
};

// Does units 0 to num_units with up to num_threads threads, the calling one included, and returns
// when all are done. Who does which is left to chance, so results must not depend on it. Where
// another product has the threads, or the system gives none, the calling thread does all.
void run_parallel(Work& work, std::size_t num_units, int num_threads);

}  // namespace plyweight
