// Products of a block, by either kind of tiles, and where in shared memory a warp's tiles read.

#define FASTMETA_NAMESPACE cuda_block

#include <algorithm>
#include <array>
#include <vector>

#include "cuda/product.h"

namespace fastmeta::cuda {
namespace {

using namespace cuda_block;

using Reads = std::vector<std::array<int, 2>>;  // where, and how many numbers

struct Case {
  const float* numbers;
  int count;
  View left, right, second_left, second_right;
  bool tf32;
  float* out;    // [rows, cols], which sums are added to
  Reads* reads;  // of each thread
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
    product<float>(
        storage, rows, cols, factors, given.tf32,
        [&](float sum, int i, int j) { given.out[i * cols + j] += sum; },
        [&](const Float4& sums, int i, int j) {
          for (int n = 0; n < 4 && j + n < cols; ++n) given.out[i * cols + j + n] += sums.of[n];
        });
  });
}

struct Witness {
  Reads& reads;
  float operator[](int place) const {
    reads.push_back({place, 1});
    return 0;
  }
};
Float4 float4_at(const Witness& witness, int place) {
  witness.reads.push_back({place, 4});
  return {};
}

void watch(Case given) {
  const Factors factors[] = {{given.left, given.right}};
  const Witness witness{given.reads[thread()]};
  const int rows = given.left.rows, cols = given.right.cols;
  const auto nothing = [](auto, int, int) {};
  product<float>(witness, rows, cols, factors, given.tf32, nothing, nothing);
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

// Fills `reads` [threads, most, 2], read by read, with where a block's threads read and how many numbers.
// How many each did at most; -1 where that is above `most`.
extern "C" __attribute__((visibility("default"))) int fastmeta_reads(const int* views, int tf32,
                                                                     int threads, int most,
                                                                     int* reads) {
  using namespace fastmeta::cuda;
  std::vector<Reads> of(threads);
  const Case given{nullptr, 0, view(views), view(views + 5), {}, {}, tf32 != 0, nullptr, of.data()};
  launch(&watch, 1, threads, 0, nullptr, given);
  std::size_t count = 0;
  for (int each = 0; each < threads; ++each) {
    count = std::max(count, of[each].size());
    if (count > std::size_t(most)) return -1;
    for (std::size_t i = 0; i < of[each].size(); ++i) {
      std::copy(of[each][i].begin(), of[each][i].end(), reads + (each * most + i) * 2);
    }
  }
  return int(count);
}
