// The parts of one task's chunks, shared by threads.
#pragma once

namespace fastmeta::cpu {

// Calls run(context, 0) ... run(context, count - 1), each once, on the threads that a lone task has for
// itself.
void share(int count, void (*run)(void* context, int part), void* context);

template <class Use>
void share(int count, Use& use) {
  share(count, [](void* context, int part) { (*static_cast<Use*>(context))(part); }, &use);
}

}  // namespace fastmeta::cpu
