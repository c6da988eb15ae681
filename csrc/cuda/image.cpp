// A network and its layout as bytes that are right at one address of device memory.

#include "image.h"

#include <type_traits>

namespace fastmeta::cuda {
namespace {

// The head, then one list after another.
class Writer {
 public:
  explicit Writer(uintptr_t address) : bytes_(sizeof(Image), '\0'), address_(address) {}

  template <class T>
  Sequence<T> list(const std::vector<T>& items) {
    static_assert(std::is_trivially_copyable<T>::value, "copied byte by byte");
    bytes_.resize((bytes_.size() + alignof(T) - 1) / alignof(T) * alignof(T));
    const auto at = reinterpret_cast<const T*>(address_ + bytes_.size());
    bytes_.append(reinterpret_cast<const char*>(items.data()), items.size() * sizeof(T));
    return {at, int64_t(items.size())};
  }
  std::string finish(const Image& head) {
    static_assert(std::is_trivially_copyable<Image>::value, "copied byte by byte");
    bytes_.replace(0, sizeof head, reinterpret_cast<const char*>(&head), sizeof head);
    return bytes_;
  }

 private:
  std::string bytes_;
  uintptr_t address_;
};

ExamplesIn<OnDevice> examples(Writer& write, const ExamplesIn<OnHost>& from) {
  ExamplesIn<OnDevice> to{};
  static_cast<ExampleViews&>(to) = from;
  to.traces = write.list(from.traces);
  return to;
}

}  // namespace

std::string image(const Description& network, const Layout& layout,
                  const std::vector<char>& evaluates, uintptr_t address) {
  Writer write(address);
  Image head{};
  static_cast<Options&>(head.network) = network;
  head.network.layers = write.list(network.layers);
  static_cast<Offsets&>(head.layout) = layout;
  head.layout.layers = write.list(layout.layers);
  static_cast<DualViews&>(head.layout.dual) = layout.dual;
  head.layout.dual.steps = write.list(layout.dual.steps);
  head.layout.support = examples(write, layout.support);
  head.layout.query = examples(write, layout.query);
  head.layout.tangents = write.list(layout.tangents);
  head.evaluates = write.list(evaluates);
  return write.finish(head);
}

}  // namespace fastmeta::cuda
