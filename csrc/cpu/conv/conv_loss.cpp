// The loss of one task's predictions.

#define FASTMETA_NAMESPACE conv_loss

#include "conv_loss.h"

// Before the losses, which are written over its values.
#include "../plain.h"

#include "../../losses.h"

namespace fastmeta::conv {

template <class T>
TaskLoss<T>::TaskLoss(const Loss& loss, int examples, int classes, int pitch, T* storage)
    : loss_(loss), pitch_(pitch), storage_(storage), set_{}, last_{} {
  int64_t at = 0;
  const auto matrix = [&](int rows, int cols) {
    const View view{at, rows, cols, cols, 1};
    at += int64_t(rows) * cols;
    return view;
  };
  set_.targets = matrix(examples, classes);
  set_.weights = matrix(examples, 1);
  set_.row = matrix(examples, 1);
  set_.second_row = matrix(examples, 1);
  set_.mass = matrix(1, 1);
  set_.loss_weights =
      loss.kind == LossKind::cross_entropy ? matrix(1, classes) : matrix(examples, classes);
  last_.value = matrix(examples, classes);
  last_.softmax = matrix(examples, classes);
  last_.delta = matrix(examples, classes);
  moving_ = matrix(examples, classes);
  result_ = matrix(examples, classes);
  scalar_ = matrix(1, 1);
}

namespace {

// The plain engine over these values alone, which it reads and writes through views only.
template <class T>
conv_loss::Plain<T> engine(T* storage) {
  static const fastmeta::Layout layout{};
  static const Data<T> data{};
  return {storage, layout, 0, data, nullptr};
}

}  // namespace

template <class T>
TaskLoss<T>::~TaskLoss() = default;

template <class T>
void TaskLoss<T>::take(const T* from, View to) {
  for (int i = 0; i < to.rows; ++i) {
    for (int j = 0; j < to.cols; ++j) {
      storage_[to.offset + i * to.cols + j] = from[int64_t(i) * pitch_ + j];
    }
  }
}

template <class T>
void TaskLoss<T>::give(View from, T* to) const {
  for (int i = 0; i < from.rows; ++i) {
    for (int j = 0; j < pitch_; ++j) {
      to[int64_t(i) * pitch_ + j] = j < from.cols ? storage_[from.offset + i * from.cols + j] : T(0);
    }
  }
}

template <class T>
void TaskLoss<T>::load(const T* targets, const int64_t* labels, const T* factors) {
  for (int i = 0; i < set_.weights.rows; ++i) {
    storage_[set_.weights.offset + i] = T(1) / T(set_.weights.rows);
  }
  auto e = engine(storage_);
  conv_loss::load_targets(e, loss_, set_, {targets, 0}, {labels, 0}, {factors, 0});
}

template <class T>
T TaskLoss<T>::forward(const T* predictions) {
  take(predictions, last_.value);
  auto e = engine(storage_);
  conv_loss::loss_forward(e, loss_, set_, last_, scalar_, true);
  return storage_[scalar_.offset];
}

template <class T>
void TaskLoss<T>::backward(T* derivative) {
  auto e = engine(storage_);
  conv_loss::loss_backward(e, loss_, set_, last_);
  give(last_.delta, derivative);
}

template <class T>
void TaskLoss<T>::tangent(const T* moving, T* derivative) {
  take(moving, moving_);
  auto e = engine(storage_);
  conv_loss::loss_tangent(e, loss_, set_, last_, moving_, result_);
  give(result_, derivative);
}

template <class T>
void TaskLoss<T>::store(T* predictions) const {
  for (int i = 0; i < last_.value.rows * last_.value.cols; ++i) {
    predictions[i] = storage_[last_.value.offset + i];
  }
}

template class TaskLoss<float>;
template class TaskLoss<double>;

}  // namespace fastmeta::conv
