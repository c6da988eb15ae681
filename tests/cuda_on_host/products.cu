// Products of a block, by either kind of tiles, and where in shared memory a warp's tiles read.

#define FASTMETA_NAMESPACE cuda_block

#include <algorithm>
#include <vector>

#include "cuda/product.h"

namespace fastmeta::cuda {
namespace {

using namespace cuda_block;

struct Case {
  const float* numbers;
  int count;
  View left, right, second_left, second_right;
  bool tf32;
  float* out;  // [rows, cols], which sums are added to
  std::vector<int>* reads;  // of each thread
};

template <bool two, class Multiply>
void multiply(const Case& given, Multiply multiply) {
  if constexpr (two) {
    const Factors factors[] = {{given.left, given.right}, {given.second_left, given.second_right}};
    multiply(factors);
  } else {
    const Factors factors[] = {{given.left, given.right}};
    multiply(factors);
  }
}

template <bool two>
void operate(Case given) {
  float* const storage = shared<float>();
  for (int i = thread(); i < given.count; i += threads()) storage[i] = given.numbers[i];
  barrier(0);
  const int rows = given.left.rows, cols = given.right.cols;
  multiply<two>(given, [&](const auto& factors) {
    product(storage, rows, cols, factors, given.tf32,
            [&](float sum, int i, int j) { given.out[i * cols + j] += sum; });
  });
}

struct Witness {
  std::vector<int>& reads;
  float operator[](int place) const {
    reads.push_back(place);
    return 0;
  }
};

void watch(Case given) {
  const Factors factors[] = {{given.left, given.right}};
  for_warp_tiles(Witness{given.reads[thread()]}, given.left.rows, given.right.cols, factors,
                 [](float, int, int) {});
}

View view(const int* five) { return {five[0], five[1], five[2], five[3], five[4]}; }

}  // namespace
}  // namespace fastmeta::cuda

// Adds the product, or the sum of two, to `out`. `views` [parts * 2, 5]: offset, rows, cols, strides.
extern "C" __attribute__((visibility("default"))) void fastmeta_product(const float* numbers,
                                                                        int count, const int* views,
                                                                        int parts, int threads,
                                                                        int tf32, float* out) {
  using namespace fastmeta::cuda;
  Case given{numbers, count, view(views), view(views + 5), {}, {}, tf32 != 0, out, nullptr};
  if (parts == 2) given.second_left = view(views + 10), given.second_right = view(views + 15);
  launch(parts == 2 ? &operate<true> : &operate<false>, 1, threads, count * sizeof(float), nullptr,
         given);
}

// Fills `places` [32, most], read by read, with where the lanes of a warp read; how many each did that
// did any, or -1 where not all of those did as many.
extern "C" __attribute__((visibility("default"))) int fastmeta_reads(const int* views, int most,
                                                                     int* places) {
  using namespace fastmeta::cuda;
  std::vector<std::vector<int>> reads(32);
  const Case given{nullptr, 0, view(views), view(views + 5), {}, {}, true, nullptr, reads.data()};
  launch(&watch, 1, 32, 0, nullptr, given);
  const std::size_t count = reads[0].size();
  for (int lane = 0; lane < 32; ++lane) {
    const std::size_t own = reads[lane].size();
    if ((own != count && own != 0) || own > std::size_t(most)) return -1;
    std::copy(reads[lane].begin(), reads[lane].end(), places + lane * most);
  }
  return int(count);
}
