// Augmentation, training and inference of the networks on CPUs. cpu.py compiles this file; abi.py has the same
// structs.
//
// A vector holds the same value of LANES images, so that each loop reads like that of one image and every lane works,
// however few channels there are. Activations are (group of LANES images, channel, row, column, lane). A network is a
// chain of layers: convolution, ReLU or not, BatchNorm or not, dropout, ReLU or not, pooling or not. What a
// convolution takes, and what it and its ReLU give, is kept for the backward pass; the rest is computed again.
//
// Sums over images are made group by group, and then over the groups in their order: the number of threads changes
// no bit of the result.

#include <algorithm>
#include <barrier>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "augment.h"

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int BLOCK = 4;        // output channels that a kernel works on at a time
constexpr int STRIP = 3;        // pixels, or weights, likewise: 12 sums and what feeds them fill AVX2's 16 registers
constexpr int MOST_WINDOW = 16;  // side of a pooling window
constexpr int SIDE = 28;         // of an image

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t Mask __attribute__((vector_size(LANES * 4)));
typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));

enum Pool { NONE, MAX, AVERAGE };

// One layer; abi.py has the same fields. Weights are (outputs, inputs, kernel, kernel), sizes in pixels.
struct Layer {
  int32_t inputs, outputs, kernel, padding, input_size;
  int32_t normalises, relu_before, relu_after, pool, window;
  float epsilon, momentum, dropout;
  const float *weight, *scale, *shift;
  float *weight_gradient, *scale_gradient, *shift_gradient, *running_mean, *running_variance;

  int padded() const { return input_size + 2 * padding; }
  int size() const { return padded() - kernel + 1; }
  int pooled() const { return size() / window; }
  int taps() const { return inputs * kernel * kernel; }
  size_t padded_inputs() const { return size_t(inputs) * padded() * padded(); }
  size_t values() const { return size_t(outputs) * size() * size(); }
  size_t results() const { return size_t(outputs) * pooled() * pooled(); }
};

namespace {

int blocks(int channels) { return (channels + BLOCK - 1) / BLOCK; }

Vec all(float value) { return Vec{} + value; }

// Comparisons stand so that a NaN stays one.
Vec relu(Vec v) { return v < 0 ? Vec{} : v; }

// In a register: GCC would read it from memory for each product again, and loads are what products wait for.
Vec load(const Vec *from) {
  Vec value = *from;
#ifdef __AVX__
  asm("" : "+x"(value));
#endif
  return value;
}

double sum(Vec v) {
  double total = 0;
  for (int lane = 0; lane < LANES; lane++) total += v[lane];
  return total;
}

// Calls work(thread) in so many threads, of which this one is the first.
template <class Work>
void in_parallel(int threads, Work work) {
  std::vector<std::jthread> others;
  for (int thread = 1; thread < threads; thread++) others.emplace_back(work, thread);
  work(0);
}

// Memory that keeps its size from call to call, as fresh pages cost as much as a convolution.
class Buffer {
 public:
  Vec *get(size_t count) {
    if (count > count_) {
      data_.reset(static_cast<Vec *>(std::aligned_alloc(alignof(Vec), count * sizeof(Vec))));
      if (!data_) throw std::bad_alloc();
      count_ = count;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(Vec *data) const { std::free(data); }
  };
  std::unique_ptr<Vec[], Free> data_;
  size_t count_ = 0;
};

// Dropout's factors, 0 or 1 / (1 - p), for one channel of a group. Random numbers are xorshift32's (Marsaglia 2003) in
// each lane, from a hash of key, layer, channel and the image's position in the epoch, so that they depend neither on
// batches nor on processes; the backward pass draws them again.
class Dropout {
 public:
  Dropout(float p, u64 key, int layer, int channel, u64 position)
      : below_(Bits{} + u32(p * 4294967296.0)), keep_(all(1 / (1 - p))) {
    const u32 place = hash(hash(u32(key) ^ hash(u32(key >> 32))) + u32(layer * 4096 + channel));
    for (int lane = 0; lane < LANES; lane++) state_[lane] = hash(place ^ hash(u32(position + lane))) | 1;
  }
  Vec next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 17;
    state_ ^= state_ << 5;
    return state_ < below_ ? Vec{} : keep_;
  }

 private:
  Bits state_, below_;
  Vec keep_;
};

// COUNT neighbouring pixels of BLOCK channels. weights: (taps, BLOCK).
template <int KERNEL, int COUNT>
inline void strip(const Vec *in, int inputs, int width, const float *weights, Vec (&sums)[BLOCK][STRIP]) {
  Vec local[BLOCK][COUNT] = {};
  for (int channel = 0; channel < inputs; channel++, in += width * width) {
#pragma GCC unroll 3
    for (int ky = 0; ky < KERNEL; ky++) {
#pragma GCC unroll 3
      for (int kx = 0; kx < KERNEL; kx++, weights += BLOCK) {
#pragma GCC unroll 4
        for (int j = 0; j < BLOCK; j++) {
#pragma GCC unroll 3
          for (int b = 0; b < COUNT; b++) local[j][b] += in[ky * width + kx + b] * weights[j];
        }
      }
    }
  }
  for (int j = 0; j < BLOCK; j++)
    for (int b = 0; b < COUNT; b++) sums[j][b] = local[j][b];
}

// Convolution of one group: in (inputs, width, width), weights (blocks, taps, BLOCK); calls store(channel, pixel, sum).
template <int KERNEL, class Store>
void convolve(const Vec *in, int inputs, int width, const float *weights, int outputs, Store store) {
  const int size = width - KERNEL + 1, taps = inputs * KERNEL * KERNEL;
  for (int y = 0; y < size; y++) {
    for (int x = 0; x < size; x += STRIP) {
      const Vec *corner = in + y * width + x;
      const int count = std::min(STRIP, size - x);
      for (int first = 0; first < outputs; first += BLOCK) {  // innermost: what a strip reads stays in the first cache
        Vec sums[BLOCK][STRIP];
        const float *block = weights + first * taps;
        if (count == 3) strip<KERNEL, 3>(corner, inputs, width, block, sums);
        else if (count == 2) strip<KERNEL, 2>(corner, inputs, width, block, sums);
        else strip<KERNEL, 1>(corner, inputs, width, block, sums);
        for (int j = 0; j < std::min(BLOCK, outputs - first); j++)
          for (int b = 0; b < count; b++) store(first + j, y * size + x + b, sums[j][b]);
      }
    }
  }
}

template <class Store>
void convolve(int kernel, const Vec *in, int inputs, int width, const float *weights, int outputs, Store store) {
  if (kernel == 3) convolve<3>(in, inputs, width, weights, outputs, store);
  else if (kernel == 1) convolve<1>(in, inputs, width, weights, outputs, store);
  else std::abort();  // abi.py does not ask for it
}

// Gradients of COUNT weights in each of BLOCK channels; in: where the input of the first one begins, `step` before the
// next; BESIDE: `step` is 1, so that only the last one's input is new at the next pixel.
template <int COUNT, bool BESIDE = false>
inline void correlate(const Vec *in, int step, int in_width, const Vec *out, int out_width, int size,
                      double (&sums)[BLOCK][STRIP]) {
  Vec local[BLOCK][COUNT] = {};
  const int plane = out_width * out_width;
  for (int y = 0; y < size; y++, in += in_width, out += out_width) {
    Vec inputs[COUNT];
    for (int t = 1; t < COUNT; t++) inputs[t] = in[t - 1];
    for (int x = 0; x < size; x++) {
#pragma GCC unroll 3
      for (int t = 0; t < COUNT; t++) inputs[t] = BESIDE && t + 1 < COUNT ? inputs[t + 1] : in[t * step + x];
#pragma GCC unroll 4
      for (int j = 0; j < BLOCK; j++) {
        const Vec value = load(out + j * plane + x);
#pragma GCC unroll 3
        for (int t = 0; t < COUNT; t++) local[j][t] += value * inputs[t];
      }
    }
  }
  for (int j = 0; j < BLOCK; j++)
    for (int t = 0; t < COUNT; t++) sums[j][t] = sum(local[j][t]);
}

// Gradient of a layer's weights from one group: in (inputs, padded, padded), out (blocks * BLOCK, out_width,
// out_width).
void correlate(const Layer &layer, const Vec *in, const Vec *out, int out_width, float *gradient) {
  const int width = layer.padded(), k = layer.kernel, taps = layer.taps(), size = layer.size();
  for (int first = 0; first < layer.outputs; first += BLOCK, out += BLOCK * out_width * out_width) {
    for (int tap = 0; tap < taps; tap += STRIP) {
      const int count = std::min(STRIP, taps - tap);
      const Vec *start = in + tap / (k * k) * width * width + tap / k % k * width;  // of a row of taps: k is 1 or 3
      double sums[BLOCK][STRIP];
      if (k == 3) correlate<3, true>(start, 1, width, out, out_width, size, sums);
      else if (count == 3) correlate<3>(start, width * width, width, out, out_width, size, sums);
      else if (count == 2) correlate<2>(start, width * width, width, out, out_width, size, sums);
      else correlate<1>(start, width * width, width, out, out_width, size, sums);
      for (int j = 0; j < std::min(BLOCK, layer.outputs - first); j++)
        for (int t = 0; t < count; t++) gradient[(first + j) * taps + tap + t] = float(sums[j][t]);
    }
  }
}

// Weights as `convolve` reads them, those of missing channels 0.
std::vector<float> pack(const Layer &layer) {
  const int taps = layer.taps();
  std::vector<float> packed(size_t(blocks(layer.outputs)) * BLOCK * taps);
  for (int o = 0; o < layer.outputs; o++)
    for (int t = 0; t < taps; t++) packed[(o / BLOCK * taps + t) * BLOCK + o % BLOCK] = layer.weight[o * taps + t];
  return packed;
}

// Those of the convolution that carries gradients from a layer's outputs to its inputs.
std::vector<float> pack_flipped(const Layer &layer) {
  const int area = layer.kernel * layer.kernel, taps = layer.outputs * area;
  std::vector<float> packed(size_t(blocks(layer.inputs)) * BLOCK * taps);
  for (int o = 0; o < layer.outputs; o++)
    for (int i = 0; i < layer.inputs; i++)
      for (int a = 0; a < area; a++)
        packed[(i / BLOCK * taps + o * area + area - 1 - a) * BLOCK + i % BLOCK] =
            layer.weight[(o * layer.inputs + i) * area + a];
  return packed;
}

// What a layer needs in one step. A value times `factor` plus `offset` is BatchNorm's result; `centre` and `inverse`
// are mean and 1 / standard deviation of the values; `mean` and `slope` the means of the gradient and of its product
// with the normalised values.
struct State {
  std::vector<float> packed, flipped, weight_gradients;  // of each group
  std::vector<double> sums, moments;                     // (group, channel, 2), of the values and of their gradients
  std::vector<float> factor, offset, centre, inverse, mean, slope;
  Vec *inputs;     // with their margins: (group, channel, padded, padded)
  Vec *values;     // (group, channel, size, size)
  Vec *gradients;  // of what the layer gives: (group, channel, pooled, pooled)
};

class Pass {
 public:
  Pass(const Layer *layers, int count, const float *images, int number, u64 key, u64 position, bool training);

  void run(int threads, int phases);
  float logit(int image, int index) const {
    return states_.back().values[size_t(image / LANES) * layers_[count_ - 1].outputs + index][image % LANES];
  }

  // Of a training pass: what is learned, and what was found.
  const i64 *labels;
  float weight, smoothing;
  std::vector<double> losses;
  std::vector<i64> hits;

 private:
  void work(int phase, int group, Vec *out);
  void settle(int phase) noexcept;
  void forward(int index, int group);
  void backward(int index, int group, Vec *out);
  void compare(int group);
  template <class Work>
  void specialise(const Layer &layer, Work work) const;
  void prepare_input(int index, int group, Vec *in) const;
  template <int WINDOW, bool DROPS>
  void activate(int index, int group, Vec *out, int width) const;
  void add_moments(int index, int group);
  template <int WINDOW, bool DROPS, class Take>
  void activation_gradients(int index, int group, int channel, Take take) const;
  template <class Take>
  void activation_gradients(int index, int group, int channel, Take take) const;
  void normalise(int index);
  void finish_gradients(int index);

  const Layer *layers_;
  const int count_, groups_;
  const float *images_;
  const u64 key_, position_;
  const bool training_;
  std::vector<State> states_;
};

thread_local std::vector<Buffer> buffers;  // of the thread that calls

Pass::Pass(const Layer *layers, int count, const float *images, int number, u64 key, u64 position,
           bool training)
    : losses(number / LANES), hits(number / LANES), layers_(layers), count_(count), groups_(number / LANES),
      images_(images), key_(key), position_(position), training_(training), states_(count) {
  if (buffers.size() < size_t(3 * count)) buffers.resize(3 * count);
  for (int index = 0; index < count; index++) {
    const Layer &layer = layers[index];
    State &state = states_[index];
    state.packed = pack(layer);
    state.inputs = buffers[3 * index].get(groups_ * layer.padded_inputs());
    state.values = buffers[3 * index + 1].get(groups_ * layer.values());
    state.sums.resize(size_t(groups_) * layer.outputs * 2);
    for (auto *one : {&state.factor, &state.inverse}) one->assign(layer.outputs, 1);
    for (auto *zero : {&state.offset, &state.centre, &state.mean, &state.slope}) zero->assign(layer.outputs, 0);
    if (training) {
      state.gradients = buffers[3 * index + 2].get(groups_ * layer.results());
      state.flipped = pack_flipped(layer);
      state.moments.resize(size_t(groups_) * layer.outputs * 2);
      state.weight_gradients.resize(size_t(groups_) * layer.outputs * layer.taps());
    } else if (layer.normalises) {
      normalise(index);
    }
  }
}

// Phases 0 to count - 1 are the layers forward, the next ones the layers backward; all groups go through one before
// the next begins, and `settle` stands between them.
void Pass::run(int threads, int phases) {
  threads = std::max(1, std::min(threads, groups_));
  int phase = 0;
  auto between = [&]() noexcept { settle(phase++); };
  std::barrier barrier(threads, between);
  size_t most = 0;
  for (int index = 0; index < count_; index++) {
    const Layer &layer = layers_[index];
    const int width = layer.size() + 2 * (layer.kernel - 1 - layer.padding);
    most = std::max(most, size_t(blocks(layer.outputs)) * BLOCK * width * width);
  }
  const size_t first = 3 * count_;  // behind the layers' buffers stands one of each thread
  if (buffers.size() < first + threads) buffers.resize(first + threads);
  std::vector<Vec *> out;
  for (int thread = 0; thread < threads; thread++) out.push_back(buffers[first + thread].get(most));
  in_parallel(threads, [&](int thread) {
    for (int now = 0; now < phases; now++) {
      for (int group = groups_ * thread / threads; group < groups_ * (thread + 1) / threads; group++)
        work(now, group, out[thread]);
      barrier.arrive_and_wait();
    }
  });
}

void Pass::work(int phase, int group, Vec *out) {
  if (phase < count_) forward(phase, group);
  else backward(2 * count_ - 1 - phase, group, out);
}

void Pass::settle(int phase) noexcept {
  if (phase >= count_) finish_gradients(2 * count_ - 1 - phase);
  else if (training_ && layers_[phase].normalises) normalise(phase);
}

void Pass::forward(int index, int group) {
  const Layer &layer = layers_[index];
  State &state = states_[index];
  Vec *in = state.inputs + group * layer.padded_inputs();
  prepare_input(index, group, in);
  Vec *values = state.values + group * layer.values();
  std::vector<Vec> sums(layer.outputs), squares(layer.outputs);
  const int pixels = layer.size() * layer.size();
  convolve(layer.kernel, in, layer.inputs, layer.padded(), state.packed.data(), layer.outputs,
           [&](int channel, int pixel, Vec value) {
             if (layer.relu_before) value = relu(value);
             values[channel * pixels + pixel] = value;
             sums[channel] += value;
             squares[channel] += value * value;
           });
  for (int channel = 0; channel < layer.outputs; channel++) {
    double *pair = &state.sums[(size_t(group) * layer.outputs + channel) * 2];
    pair[0] = sum(sums[channel]), pair[1] = sum(squares[channel]);
  }
  if (training_ && index == count_ - 1) compare(group);
}

// Cross entropy of a group, and its gradient.
void Pass::compare(int group) {
  const State &state = states_.back();
  const int classes = layers_[count_ - 1].outputs;
  Vec *gradients = state.gradients + group * classes;
  for (int lane = 0; lane < LANES; lane++) {
    const int image = group * LANES + lane;
    int best = 0;
    for (int c = 1; c < classes; c++)
      if (logit(image, c) > logit(image, best)) best = c;
    const float top = logit(image, best);
    double total = 0;
    for (int c = 0; c < classes; c++) total += std::exp(double(logit(image, c) - top));
    for (int c = 0; c < classes; c++) {
      const double log_probability = logit(image, c) - top - std::log(total);
      const float target = (c == labels[image]) * (1 - smoothing) + smoothing / float(classes);
      losses[group] -= target * log_probability;
      gradients[c][lane] = weight * float(std::exp(log_probability) - target);
    }
    hits[group] += best == labels[image];
  }
}

// Calls work<WINDOW, DROPS>(): the side of the pooling window where it is small, or 0, and whether dropout is at work,
// as constants for the compiler.
template <class Work>
void Pass::specialise(const Layer &layer, Work work) const {
  const bool drops = training_ && layer.dropout > 0;
  auto choose = [&]<int WINDOW>() {
    drops ? work.template operator()<WINDOW, true>() : work.template operator()<WINDOW, false>();
  };
  if (layer.window == 1) choose.template operator()<1>();
  else if (layer.window == 2) choose.template operator()<2>();
  else choose.template operator()<0>();
}

// The input of a layer for one group, with its margin of zeros: the images, or what the layer before gives.
void Pass::prepare_input(int index, int group, Vec *in) const {
  const Layer &layer = layers_[index];
  const int width = layer.padded(), size = layer.input_size;
  if (layer.padding) std::fill_n(in, size_t(layer.inputs) * width * width, Vec{});
  in += layer.padding * width + layer.padding;
  if (index == 0) {
    const float *images = images_ + size_t(group) * LANES * size * size;
    for (int y = 0; y < size; y++)
      for (int x = 0; x < size; x++)
        for (int lane = 0; lane < LANES; lane++) in[y * width + x][lane] = images[(lane * size + y) * size + x];
  } else {
    specialise(layers_[index - 1],
               [&]<int WINDOW, bool DROPS>() { activate<WINDOW, DROPS>(index - 1, group, in, width); });
  }
}

// What a layer gives for one group, to `out` with rows of `width`. WINDOW: the layer's window where the compiler knows
// it, or 0.
template <int WINDOW, bool DROPS>
void Pass::activate(int index, int group, Vec *out, int width) const {
  const Layer &layer = layers_[index];
  const State &state = states_[index];
  const int side = layer.size(), window = WINDOW ? WINDOW : layer.window, pooled = layer.pooled();
  const bool max = WINDOW != 1 && layer.pool == MAX, clips = layer.relu_after;
  const float share = layer.pool == AVERAGE ? 1.0f / float(window * window) : 1;
  const Vec *values = state.values + group * layer.values();
  for (int channel = 0; channel < layer.outputs; channel++, values += side * side, out += width * width) {
    const Vec factor = all(state.factor[channel]), offset = all(state.offset[channel]);
    Dropout dropout(layer.dropout, key_, index, channel, position_ + u64(group) * LANES);
    for (int py = 0; py < pooled; py++) {
      for (int px = 0; px < pooled; px++) {
        Vec result = all(max ? -INFINITY : 0);
        for (int y = 0; y < window; y++) {
          for (int x = 0; x < window; x++) {
            Vec value = values[(py * window + y) * side + px * window + x] * factor + offset;
            if constexpr (DROPS) value *= dropout.next();
            if (clips) value = relu(value);
            result = !max ? result + value : value < result ? result : value;
          }
        }
        out[py * width + px] = result * share;
      }
    }
  }
}

// Calls take(y, x, value, gradient of the loss by BatchNorm's result there) for one channel of a group.
// WINDOW: the layer's window where it is known to the compiler, or 0.
template <int WINDOW, bool DROPS, class Take>
inline void Pass::activation_gradients(int index, int group, int channel, Take take) const {
  const Layer &layer = layers_[index];
  const State &state = states_[index];
  const int side = layer.size(), window = WINDOW ? WINDOW : layer.window, pooled = layer.pooled();
  const bool max = WINDOW != 1 && layer.pool == MAX, clips = layer.relu_after;
  const float share = layer.pool == AVERAGE ? 1.0f / float(window * window) : 1;
  const Vec *values = state.values + group * layer.values() + channel * side * side;
  const Vec *gradients = state.gradients + group * layer.results() + channel * pooled * pooled;
  const Vec factor = all(state.factor[channel]), offset = all(state.offset[channel]);
  Dropout dropout(layer.dropout, key_, index, channel, position_ + u64(group) * LANES);
  constexpr int MOST = WINDOW ? WINDOW * WINDOW : MOST_WINDOW * MOST_WINDOW;
  Vec results[MOST], factors[MOST];
  for (int py = 0; py < pooled; py++) {
    for (int px = 0; px < pooled; px++) {
      const Vec *corner = values + py * window * side + px * window;
      const Vec given = *gradients++ * share;
      Vec best = all(-INFINITY);
      for (int y = 0, w = 0; y < window; y++) {
        for (int x = 0; x < window; x++, w++) {
          results[w] = corner[y * side + x] * factor + offset;
          if constexpr (DROPS) results[w] *= factors[w] = dropout.next();
          best = results[w] < best ? best : results[w];
        }
      }
      Mask free = Mask{} - 1;  // lanes whose greatest value was not met yet: only the first one gets the gradient
      for (int y = 0, w = 0; y < window; y++) {
        for (int x = 0; x < window; x++, w++) {
          Vec gradient = given;
          if constexpr (DROPS) gradient *= factors[w];
          if (max) {
            const Mask chosen = free & (results[w] == best);
            gradient = chosen ? gradient : Vec{};
            free &= ~chosen;
          }
          if (clips) gradient = results[w] > 0 ? gradient : Vec{};
          take(py * window + y, px * window + x, corner[y * side + x], gradient);
        }
      }
    }
  }
}

template <class Take>
void Pass::activation_gradients(int index, int group, int channel, Take take) const {
  specialise(layers_[index],
             [&]<int WINDOW, bool DROPS>() { activation_gradients<WINDOW, DROPS>(index, group, channel, take); });
}

void Pass::add_moments(int index, int group) {
  const Layer &layer = layers_[index];
  State &state = states_[index];
  for (int channel = 0; channel < layer.outputs; channel++) {
    const Vec centre = all(state.centre[channel]), inverse = all(state.inverse[channel]);
    Vec total = {}, product = {};
    activation_gradients(index, group, channel, [&](int, int, Vec value, Vec gradient) {
      total += gradient;
      product += gradient * ((value - centre) * inverse);
    });
    double *pair = &state.moments[(size_t(group) * layer.outputs + channel) * 2];
    pair[0] = sum(total), pair[1] = sum(product);
  }
}

// From the gradients of what a layer gives to those of its weights and of what the layer before gives.
void Pass::backward(int index, int group, Vec *out) {
  const Layer &layer = layers_[index];
  State &state = states_[index];
  const int margin = layer.kernel - 1 - layer.padding, width = layer.size() + 2 * margin;
  std::fill_n(out, size_t(blocks(layer.outputs)) * BLOCK * width * width, Vec{});
  Vec *inner = out + margin * width + margin;
  for (int channel = 0; channel < layer.outputs; channel++) {
    const Vec factor = all(state.factor[channel]), mean = all(state.mean[channel]), slope = all(state.slope[channel]);
    const Vec centre = all(state.centre[channel]), inverse = all(state.inverse[channel]);
    activation_gradients(index, group, channel, [&](int y, int x, Vec value, Vec gradient) {
      gradient = factor * (gradient - mean - (value - centre) * inverse * slope);
      if (layer.relu_before) gradient = value > 0 ? gradient : Vec{};
      inner[(channel * width + y) * width + x] = gradient;
    });
  }
  const Vec *in = state.inputs + group * layer.padded_inputs();
  correlate(layer, in, inner, width, &state.weight_gradients[size_t(group) * layer.outputs * layer.taps()]);
  if (!index) return;
  Vec *gradients = states_[index - 1].gradients + group * layers_[index - 1].results();
  const int pixels = layer.input_size * layer.input_size;
  convolve(layer.kernel, out, layer.outputs, width, state.flipped.data(), layer.inputs,
           [&](int channel, int pixel, Vec value) { gradients[channel * pixels + pixel] = value; });
  if (layers_[index - 1].normalises) add_moments(index - 1, group);
}

// BatchNorm's factors: from the batch in training, which also moves the running statistics, else from these.
void Pass::normalise(int index) {
  const Layer &layer = layers_[index];
  State &state = states_[index];
  const double count = double(groups_) * LANES * layer.size() * layer.size();
  for (int channel = 0; channel < layer.outputs; channel++) {
    double mean = layer.running_mean[channel], variance = layer.running_variance[channel];
    if (training_) {
      double total = 0, squares = 0;
      for (int group = 0; group < groups_; group++) {
        const double *pair = &state.sums[(size_t(group) * layer.outputs + channel) * 2];
        total += pair[0], squares += pair[1];
      }
      mean = total / count, variance = std::max(0.0, squares / count - mean * mean);
      if (squares != squares) variance = squares;  // NaN
      float &moving_mean = layer.running_mean[channel], &moving_variance = layer.running_variance[channel];
      moving_mean += layer.momentum * float(mean - moving_mean);
      moving_variance += layer.momentum * float(variance * count / (count - 1) - moving_variance);
    }
    state.centre[channel] = float(mean);
    state.inverse[channel] = float(1 / std::sqrt(variance + layer.epsilon));
    state.factor[channel] = layer.scale[channel] * state.inverse[channel];
    state.offset[channel] = layer.shift[channel] - float(mean) * state.factor[channel];
  }
}

// After a layer's backward phase: its weights' gradient, and what the layer before needs for its own phase.
void Pass::finish_gradients(int index) {
  const Layer &layer = layers_[index];
  const int weights = layer.outputs * layer.taps();
  std::fill_n(layer.weight_gradient, weights, 0.0f);
  for (int group = 0; group < groups_; group++)
    for (int w = 0; w < weights; w++)
      layer.weight_gradient[w] += states_[index].weight_gradients[size_t(group) * weights + w];
  if (!index || !layers_[index - 1].normalises) return;
  const Layer &before = layers_[index - 1];
  State &state = states_[index - 1];
  const double count = double(groups_) * LANES * before.size() * before.size();
  for (int channel = 0; channel < before.outputs; channel++) {
    double total = 0, product = 0;
    for (int group = 0; group < groups_; group++) {
      const double *pair = &state.moments[(size_t(group) * before.outputs + channel) * 2];
      total += pair[0], product += pair[1];
    }
    before.shift_gradient[channel] = float(total), before.scale_gradient[channel] = float(product);
    state.mean[channel] = float(total / count), state.slope[channel] = float(product / count);
  }
}

// Brightness and contrast in random order, as augment.py's `jitter`.
void jitter(const Ranges &ranges, const float *draws, float *image) {
  constexpr int PIXELS = SIDE * SIDE;
  const float brightness = around(ranges.brightness, draws[6], 1), contrast = around(ranges.contrast, draws[7], 1);
  const bool contrast_first = draws[8] < 0.5f;
  for (int turn = 0; turn < 2; turn++) {
    const bool stretches = contrast_first == (turn == 0);
    float mean = 0;
    for (int i = 0; i < PIXELS && stretches; i++) mean += image[i] / PIXELS;
    const float factor = stretches ? contrast : brightness;
    for (int i = 0; i < PIXELS; i++) image[i] = std::clamp(mean + (image[i] - mean) * factor, 0.0f, 1.0f);
  }
}

// One image: its pixels (SIDE, SIDE) to what augment.py's `augment` makes of them. See `augment` below.
void augment_image(const uint8_t *pixels, const Ranges &ranges, u64 key, u64 elastic_key, i64 position,
                   const float *basis, float *results) {
  constexpr float CENTRE = (SIDE - 1) / 2.0f;
  float draws[DRAWS], along[2][POINTS][SIDE];
  for (int i = 0; i < DRAWS; i++) draws[i] = draw(key, position, DRAWS, i);
  const Map map = find_map(ranges, draws);
  for (int i = 0; i < 2 * POINTS && ranges.elastic > 0; i++) {  // rows of control points, interpolated along x
    float moves[POINTS];
    for (int k = 0; k < POINTS; k++)
      moves[k] = around(ranges.elastic, draw(elastic_key, position, 2 * POINTS * POINTS, i * POINTS + k));
    for (int x = 0; x < SIDE; x++) {
      float &sum = along[i / POINTS][i % POINTS][x] = 0;
      for (int k = 0; k < POINTS; k++) sum += moves[k] * basis[x * POINTS + k];
    }
  }
  for (int y = 0; y < SIDE; y++) {
    float columns[SIDE], rows[SIDE];
    for (int x = 0; x < SIDE; x++) {
      const float dx = x - CENTRE, dy = y - CENTRE;
      columns[x] = map.xx * dx + map.xy * dy + map.x0 + CENTRE;
      rows[x] = map.yx * dx + map.yy * dy + map.y0 + CENTRE;
    }
    for (int k = 0; k < POINTS && ranges.elastic > 0; k++) {
      const float share = basis[y * POINTS + k];
      for (int x = 0; x < SIDE; x++) columns[x] += along[0][k][x] * share, rows[x] += along[1][k][x] * share;
    }
    for (int x = 0; x < SIDE; x++) {
      const float column = std::nearbyint(columns[x]), row = std::nearbyint(rows[x]);
      const bool inside = (column >= 0) & (column < SIDE) & (row >= 0) & (row < SIDE);
      const float pixel = pixels[inside ? int(row) * SIDE + int(column) : 0];  // read in any case: no branch
      results[y * SIDE + x] = inside ? pixel / 255 : ranges.fill;
    }
  }
  if (ranges.brightness > 0 || ranges.contrast > 0) jitter(ranges, draws, results);
  for (int i = 0; i < SIDE * SIDE; i++) results[i] = (results[i] - PIXELS_MEAN) / PIXELS_SD;
}

}  // namespace

extern "C" {

// images (batch, SIDE, SIDE), batch a multiple of LANES; labels (batch); weight: factor of the loss; smoothing: of the
// labels; dropout_key, position: of dropout, the latter the first image's in the epoch; totals: sum of losses without
// the factor, and of right predictions.
struct TrainArguments {
  const Layer *layers;
  const float *images;
  const i64 *labels;
  double *totals;
  u64 dropout_key;
  i64 position;
  int32_t layer_count, batch, threads;
  float weight, smoothing;
};

// logits (batch, classes).
struct PredictArguments {
  const Layer *layers;
  const float *images;
  float *logits;
  int32_t layer_count, batch, threads;
};

// rows (batch) of images (pool, SIDE, SIDE), null for the first ones; basis (SIDE, POINTS): what each control point
// along a side gives to each pixel; results (batch, SIDE, SIDE); keys, position: of the draws, the last the first
// image's in the epoch.
struct AugmentArguments {
  const uint8_t *images;
  const i64 *rows;
  const float *basis;
  float *results;
  u64 augment_key, elastic_key;
  i64 position;
  int32_t batch, threads;
  Ranges ranges;
};

int lanes() { return LANES; }

// Forward and backward pass; gradients are written, running statistics moved.
void train(const TrainArguments &a) {
  Pass pass(a.layers, a.layer_count, a.images, a.batch, a.dropout_key, a.position, true);
  pass.labels = a.labels, pass.weight = a.weight, pass.smoothing = a.smoothing;
  pass.run(a.threads, 2 * a.layer_count);
  a.totals[0] = a.totals[1] = 0;
  for (double loss : pass.losses) a.totals[0] += loss;
  for (i64 hits : pass.hits) a.totals[1] += double(hits);
}

// Logits with running statistics and without dropout.
void predict(const PredictArguments &a) {
  Pass pass(a.layers, a.layer_count, a.images, a.batch, 0, 0, false);
  pass.run(a.threads, a.layer_count);
  const int classes = a.layers[a.layer_count - 1].outputs;
  for (int image = 0; image < a.batch; image++)
    for (int c = 0; c < classes; c++) a.logits[image * classes + c] = pass.logit(image, c);
}

// Augmented and normalised images, by nearest resampling.
void augment(const AugmentArguments &a) {
  const int threads = std::max(1, std::min(a.threads, a.batch / 16));  // to start one takes as long as a few images
  in_parallel(threads, [&](int thread) {
    for (int i = i64(a.batch) * thread / threads; i < i64(a.batch) * (thread + 1) / threads; i++)
      augment_image(a.images + (a.rows ? a.rows[i] : i) * SIDE * SIDE, a.ranges, a.augment_key, a.elastic_key,
                    a.position + i, a.basis, a.results + i * SIDE * SIDE);
  });
}
}
