// The loss of one task's predictions: those of csrc/losses.h, over the plain engine. It costs next
// to nothing beside convolutions.
#pragma once

#include "layout.h"

namespace fastmeta::conv {

// Predictions and derivatives are [examples, classes], `pitch` apart; what is behind the classes is
// set to zero. `storage` is 8 (examples classes + examples) + classes + 64 elements.
template <class T>
class TaskLoss {
 public:
  TaskLoss(const Loss& loss, int examples, int classes, int pitch, T* storage);
  ~TaskLoss();  // not inline: units of several instruction sets would share it

  // Targets [examples, classes] or labels [examples]; factors as the loss has them, or null.
  void load(const T* targets, const int64_t* labels, const T* factors);
  // The loss; keeps what its derivatives need.
  T forward(const T* predictions);
  void backward(T* derivative);
  void tangent(const T* moving, T* derivative);
  void store(T* predictions) const;  // without a pitch

 private:
  const Loss& loss_;
  int pitch_;
  T* storage_;
  Examples set_;
  Trace last_;
  View moving_, result_, scalar_;

  void take(const T* from, View to);
  void give(View from, T* to) const;
};

}  // namespace fastmeta::conv
