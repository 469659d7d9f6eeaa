// Two layers in a row, for blocks of rows whose values between the layers stay in the cache.

#pragma once

#include "products.h"

namespace {

constexpr int64_t kBlockRows = 128;  // at most; fewer read the weights more often, more bring nothing

// A thread's share of the channels of a layer with inputs `x`.
template <bool kUnsigned, class Layer, class Out>
void channels(const Codes& x, int64_t M, const Layer& layer, int64_t thread, int64_t threads, const Out& out) {
  const int64_t K4 = (layer.K + kCols - 1) / kCols, tiles = (layer.N + kRows - 1) / kRows, pairs = (tiles + 1) / 2;
  const int64_t t = pairs * thread / threads * 2, end = std::min(tiles, pairs * (thread + 1) / threads * 2);
  product<kUnsigned>(x, M, layer.tiles + t * K4 * kTile, K4, end - t, t * kRows, layer.N - t * kRows, out);
}

// Covers M rows with block(m, count, scratch, thread, threads, barrier), where `count` rows from row m on are computed by
// `threads` threads, which share a scratch and wait for each other at barrier(). A thread has blocks of its own where there
// are enough, of at most `most` rows; else all share the channels of all rows. resize(scratch, count, threads) comes before.
template <class Scratch, class Resize, class Block>
void in_blocks(int64_t M, int64_t most, int64_t products, const Resize& resize, const Block& block) {
  static thread_local Scratch scratch;
  int64_t threads = 1;
#ifdef _OPENMP
  if (products >= 2 * kParallel) threads = omp_get_max_threads();
#endif
  const int64_t even = ((M + threads - 1) / threads + 31) / 32 * 32;
  const int64_t rows = std::max<int64_t>(32, std::min({most / 32 * 32, kBlockRows, even}));
  const int64_t blocks = (M + rows - 1) / rows;
  const auto alone = [&](int64_t b) {
    const int64_t m = b * rows, count = std::min(rows, M - m);
    resize(scratch, count, 1);
    block(m, count, scratch, 0, 1, [] {});
  };
  if (threads == 1) {
    for (int64_t b = 0; b < blocks; b++) alone(b);
    return;
  }
#ifdef _OPENMP
  if (blocks >= threads) {
#pragma omp parallel for
    for (int64_t b = 0; b < blocks; b++) alone(b);
    return;
  }
  Scratch& shared = scratch;  // of this thread: in the others of a team the name means their own
  resize(shared, M, threads);
#pragma omp parallel num_threads(threads)
  block(0, M, shared, omp_get_thread_num(), omp_get_num_threads(), [] {
#pragma omp barrier
  });
#endif
}

}  // namespace
