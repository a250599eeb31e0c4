// A whole training step as one kernel: gather, augmentation, forward and backward pass, SGD or Muon. hopper.py compiles
// this file for one network; abi.py has the same structs.
//
// Each thread block has one image, whose activations stay in the block's shared memory from the forward to the backward
// pass; all blocks run at the same time. They meet where the batch matters: for BatchNorm's sums of each layer, forward
// and backward, and for the gradients. All is summed in a fixed order, so that the same step gives the same bits.
//
// A network is a chain of layers: convolution, ReLU or not, BatchNorm, dropout, ReLU or not, pooling or not; the last
// one is a convolution alone. Of each layer are kept what its convolution takes (with a margin of zeros) and what that
// and its ReLU give. On the way back the latter is replaced by its gradient, and the former by the gradient of what
// the layer before gives.
//
// hopper.py puts before it: NETWORK, the layers; THREADS of a block; BLOCKS, the most there are; augment.h.

enum Pool { NONE, MAX, AVERAGE };

// One layer; abi.py has the same fields as LAYER_SHAPE.
struct Layer {
  int inputs, outputs, kernel, padding, input_size;
  int normalises, relu_before, relu_after, pool, window;
  float epsilon, momentum, dropout;

  constexpr int area() const { return kernel * kernel; }
  constexpr int taps() const { return inputs * area(); }
  constexpr int weights() const { return outputs * taps(); }
  constexpr int padded() const { return input_size + 2 * padding; }
  constexpr int size() const { return padded() - kernel + 1; }
  constexpr int pixels() const { return size() * size(); }
  constexpr int pooled() const { return size() / window; }
  constexpr int cells() const { return pooled() * pooled(); }
};

constexpr Layer LAYERS[] = {NETWORK};
constexpr int COUNT = sizeof(LAYERS) / sizeof(Layer);
constexpr int SIDE = LAYERS[0].input_size;  // of an image
constexpr int MOST_CHANNELS = 64;

// Two sums of one block and the step they belong to, twice: a sum and its tag arrive together, as 8 bytes (on which the
// low-latency protocol of NCCL relies, too).
struct alignas(16) Word {
  float first;
  u32 tag;
  float second;
  u32 same_tag;
};

// images (pool, SIDE, SIDE), labels (pool) and rows (batch) of the pool, null for the pool's first ones; inputs (batch,
// SIDE, SIDE) takes the place of augmented images where it is not null; basis (SIDE, POINTS): the elastic distortion's
// interpolation. parameters, momenta, gradients: all of the network, in its order; statistics: each BatchNorm's running
// means, then variances; counters: one per BatchNorm. totals: sum of losses, right predictions, images. partial
// (BLOCKS, parameters), whose first row takes Muon's updates once it is summed, losses (BLOCKS, 2) and words
// (2 COUNT + 2, MOST_CHANNELS, BLOCKS) are memory to work in. packed: the weights as the convolutions read them, twice,
// and places (2, parameters) where each stands therein, -1 for what is no weight; `pack` writes both. Keys: of the
// epoch's draws. weight: factor of the loss; ticket: differs from launch to launch; augmented: whether images are.
struct HopperArguments {
  const unsigned char *images;
  const i64 *labels, *rows;
  const float *inputs, *basis;
  float *parameters, *momenta, *gradients, *statistics;
  i64 *counters;
  double *totals;
  float *partial, *losses, *packed;
  int *places;
  Word *words;
  u64 augment_key, elastic_key, dropout_key;
  i64 position;
  float rate, momentum, weight_decay, weight, smoothing;
  u32 ticket;
  int augmented, nesterov, muon;
  Ranges ranges;
};

#ifdef __CUDACC__
constexpr int WARP = 32;
extern __shared__ float4 shared_memory[];

__device__ inline int thread() { return threadIdx.x; }
__device__ inline int block() { return blockIdx.x; }
__device__ inline int blocks() { return gridDim.x; }
__device__ inline float *memory() { return reinterpret_cast<float *>(shared_memory); }
__device__ inline void sync_threads() { __syncthreads(); }
__device__ inline void publish() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
__device__ inline void give_up() { __trap(); }
// The compiler is to see that all lanes of a warp have the same.
__device__ inline int uniform(int value) { return __shfl_sync(~0u, value, 0); }

template <class T>
__device__ inline T add_lanes(T value) {
  for (int distance = WARP / 2; distance; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

__device__ inline void write(Word *word, Word value) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(word), "r"(__float_as_uint(value.first)),
               "r"(value.tag), "r"(__float_as_uint(value.second)), "r"(value.same_tag)
               : "memory");
}

__device__ inline Word read(const Word *word) {
  u32 first, tag, second, same_tag;
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(first), "=r"(tag), "=r"(second), "=r"(same_tag)
               : "l"(word)
               : "memory");
  return {__uint_as_float(first), tag, __uint_as_float(second), same_tag};
}

// Copies 16 bytes to shared memory in the background; `arrive` waits for what this thread has started.
__device__ inline void copy(float *to, const float *from) {
  const u32 place = u32(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(from) : "memory");
}
__device__ inline void arrive() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ inline float read_fresh(const float *value) { return __ldcg(value); }

// Sums 32 values over the lanes and calls store(index, sum) once for each: halves what each lane holds until that is
// the sum of one value.
template <class Store>
__device__ inline void reduce(float (&values)[32], Store store) {
  const int lane = threadIdx.x % WARP;
#pragma unroll
  for (int half = WARP / 2; half; half /= 2) {
    const bool upper = lane & half;
#pragma unroll
    for (int i = 0; i < WARP / 2; i++) {
      if (i < half) {
        const float given = upper ? values[i] : values[i + half], kept = upper ? values[i + half] : values[i];
        values[i] = kept + __shfl_xor_sync(~0u, given, half);
      }
    }
  }
  store(lane, values[0]);
}
#define DEVICE __device__ inline
#define FUNCTION __device__ __noinline__
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS, 1)
#define CONSTANT extern "C" __device__ const
#else  // the tests' emulation has defined them
#define DEVICE inline
#define FUNCTION inline
#define KERNEL void
#define CONSTANT const
#endif

constexpr int WARPS = THREADS / WARP;

constexpr int least(int a, int b) { return a < b ? a : b; }
constexpr int most(int a, int b) { return a > b ? a : b; }
constexpr int cut(int count, int size) { return (count + size - 1) / size; }
constexpr int four(int count) { return cut(count, 4) * 4; }  // floats that a vector load needs

// Floats from one tap's weights to the next one's; an odd number of fours, for the memory banks' sake.
constexpr int stride(int channels) { return cut(channels, 4) % 2 ? four(channels) : four(channels) + 4; }

// Where a layer's weights begin among the packed ones: first for the way forward, then for the way back.
constexpr int packed_size(Layer layer, bool flipped) {
  return layer.area() * (flipped ? layer.outputs * stride(layer.inputs) : layer.inputs * stride(layer.outputs));
}
constexpr int packed_place(int index, bool flipped) {
  int place = 0;
  for (int i = 0; i < (flipped ? COUNT : index); i++) place += packed_size(LAYERS[i], false);
  for (int i = 0; flipped && i < index; i++) place += packed_size(LAYERS[i], true);
  return place;
}
constexpr int PACKED = packed_place(COUNT, true);

// Where things lie in a block's shared memory, in floats.
constexpr int input_place(int index) {
  int place = 0;
  for (int i = 0; i < index; i++)
    place += four(LAYERS[i].inputs * LAYERS[i].padded() * LAYERS[i].padded()) +
             four(LAYERS[i].outputs * LAYERS[i].pixels());
  return place;
}
constexpr int value_place(int index) {
  const Layer layer = LAYERS[index];
  return input_place(index) + four(layer.inputs * layer.padded() * layer.padded());
}
constexpr int WEIGHTS = input_place(COUNT) + 4;
constexpr int weights_floats() {
  int floats = 0;
  for (Layer layer : LAYERS)
    floats = most(floats, most(packed_size(layer, false), packed_size(layer, true)));
  return floats;
}
// Of each layer: `factor` and `offset`, which turn values into BatchNorm's results; their mean and 1 / standard
// deviation, `centre` and `inverse`; the means of the gradient and of its product with the normalised values, `mean`
// and `slope`.
enum Fact { FACTOR, OFFSET, CENTRE, INVERSE, MEAN, SLOPE, FACTS };
constexpr int FACTS_PLACE = WEIGHTS + weights_floats();
constexpr int fact_place(int index) {
  int place = FACTS_PLACE;
  for (int i = 0; i < index; i++) place += FACTS * LAYERS[i].outputs;
  return place;
}
constexpr int SCRATCH = four(fact_place(COUNT));

// Weights' gradients are found in tiles: 8 output channels times 8 taps of the input's.
constexpr int TILE_OUTPUTS = 8, TILE_TAPS = 8;
constexpr int tiles(Layer layer) { return cut(layer.outputs, TILE_OUTPUTS) * cut(layer.taps(), TILE_TAPS); }
constexpr int splits(Layer layer) { return most(1, least(WARPS / tiles(layer), cut(layer.pixels(), WARP))); }
constexpr int COLUMNS = least(64, THREADS);   // of the last sums over blocks
constexpr int ROWS = THREADS / COLUMNS;
constexpr int scratch_floats() {
  int floats = most(SIDE * SIDE + DRAWS + WARPS + (2 * POINTS + SIDE) * POINTS, ROWS * COLUMNS);
  for (Layer layer : LAYERS)
    if (splits(layer) > 1) floats = most(floats, splits(layer) * layer.weights());
  return floats;
}

// Muon's matrices of a layer: its update, not higher than wide, and five squares.
constexpr int muon_floats() {
  int floats = 0;
  for (Layer layer : LAYERS) {
    const int rows = least(layer.outputs, layer.taps()), columns = most(layer.outputs, layer.taps());
    floats = most(floats, rows * (stride(columns) + 5 * stride(rows)));
  }
  return floats;
}
constexpr int FLOATS = most(SCRATCH + scratch_floats(), muon_floats());  // all of the shared memory

// Where a layer's parameters begin: weights, then scale and shift.
constexpr int parameter_place(int index) {
  int place = 0;
  for (int i = 0; i < index; i++) place += LAYERS[i].weights() + (LAYERS[i].normalises ? 2 * LAYERS[i].outputs : 0);
  return place;
}
constexpr int statistics_place(int index) {
  int place = 0;
  for (int i = 0; i < index; i++) place += 2 * LAYERS[i].outputs;
  return place;
}

// The same as constants, of which the GPU's code needs no function.
constexpr int PARAMETERS = parameter_place(COUNT);
template <int I>
struct Places {
  static constexpr int INPUTS = input_place(I), VALUES = value_place(I), FACTS = fact_place(I);
  static constexpr int PARAMETERS = parameter_place(I), STATISTICS = statistics_place(I);
  static constexpr int PACKED = packed_place(I, false), FLIPPED = packed_place(I, true);
};

// What one thread computes of a convolution at a time: pixels of a column, times channels. Chosen by instructions, by
// what they load from shared memory, and by how well the work fills the threads.
struct Tiling {
  int rows, channels;
};
constexpr Tiling choose(int inputs, int outputs, int kernel, int size) {
  Tiling best{1, 1};
  double least_cost = 1e30;
  for (int channels = 1; channels <= 8; channels *= 2) {
    for (int rows = 1; rows <= 7; rows++) {
      if (channels > four(outputs) || rows > size || channels * rows > 28) continue;
      const int strips = cut(size, rows) * size, warps = cut(strips * cut(outputs, channels), WARP);
      const int loads = kernel * (rows + kernel - 1) + kernel * kernel * cut(channels, 4);
      const int products = kernel * kernel * rows * channels;
      const int rounds = cut(warps, WARPS);
      const double issue = double(cut(warps, 4)) * inputs * (products + 1.5 * loads);
      const double access = double(warps) * inputs * loads;
      const double latency = double(rounds) * inputs * (40 + products + loads);
      const double cost = most(most(int(issue), int(access)), int(latency));
      if (cost < least_cost) least_cost = cost, best = {rows, channels};
    }
  }
  return best;
}

template <int N>
struct alignas(N % 4 ? N * 4 : 16) Vector {
  float values[N];
};

DEVICE float clamp(float value) { return fminf(fmaxf(value, 0.0f), 1.0f); }

struct Pair {
  float first, second;
};

// A FUNCTION stands once for all layers: the fewer instructions there are, the more of them stay in a multiprocessor's
// cache.

// Sums over the lanes.
FUNCTION Pair add_lanes(Pair pair) { return {add_lanes(pair.first), add_lanes(pair.second)}; }

// Waits for all blocks' words; their sums, the same in every lane and block.
FUNCTION Pair gather(const Word *words, u32 ticket) {
  constexpr int MOST = cut(BLOCKS, WARP);
  const int lane = thread() % WARP;
  Word found[MOST];
  bool ready = false;
#pragma unroll 1
  for (u32 tries = 0; !ready; tries++) {
    ready = true;
#pragma unroll
    for (int i = 0; i < MOST; i++)
      if (lane + i * WARP < blocks()) found[i] = read(words + lane + i * WARP);
#pragma unroll
    for (int i = 0; i < MOST; i++)
      if (lane + i * WARP < blocks()) ready = ready && found[i].tag == ticket && found[i].same_tag == ticket;
    if (tries > 1u << 24) give_up();  // some 10 s: a block is not there
  }
  Pair sums{0, 0};
#pragma unroll
  for (int i = 0; i < MOST; i++)
    if (lane + i * WARP < blocks()) sums.first += found[i].first, sums.second += found[i].second;
  return add_lanes(sums);
}

// The square left right^T (rows, rows), which must be symmetric, by one of so many parts of the threads. Rows of all
// matrices lie `stride` apart, and hold zeros behind their end.
FUNCTION void multiply(float *out, const float *left, const float *right, int rows, int length, int part, int parts) {
  const int begin = THREADS * part / parts, end = THREADS * (part + 1) / parts;
  const int half = cut(rows, 2), step = stride(length), across = stride(rows);
  // Four results at a time: (y, x), and `half` below and beside. Of y <= x, row `low` and the one as far from the end
  // make up a line of half + 1.
  for (int item = thread() - begin; item < cut(half, 2) * (half + 1); item += end - begin) {
    const int low = item / (half + 1), place = item % (half + 1);
    const bool upper = place < half - low;
    const int y = upper ? low : half - 1 - low, x = upper ? low + place : place - 1;
    const int i[2] = {y, least(y + half, rows - 1)}, j[2] = {x, least(x + half, rows - 1)};
    float sums[2][2] = {};
#pragma unroll 2
    for (int k = 0; k < length; k += 4) {
      Vector<4> a[2], b[2];
#pragma unroll
      for (int n = 0; n < 2; n++) {
        a[n] = *reinterpret_cast<const Vector<4> *>(left + i[n] * step + k);
        b[n] = *reinterpret_cast<const Vector<4> *>(right + j[n] * step + k);
      }
#pragma unroll
      for (int n = 0; n < 4; n++)
#pragma unroll
        for (int each = 0; each < 4; each++) sums[n / 2][n % 2] += a[n / 2].values[each] * b[n % 2].values[each];
    }
#pragma unroll
    for (int n = 0; n < 4; n++) {
      if ((n / 2 && y + half >= rows) || (n % 2 && x + half >= rows)) continue;
      out[i[n / 2] * across + j[n % 2]] = out[j[n % 2] * across + i[n / 2]] = sums[n / 2][n % 2];
    }
  }
}

// The factor (rows, rows), symmetric, that makes a matrix (rows, columns), not higher than wide, nearly orthogonal:
// optim.py's iterations X -> (a I + b G + c G G) X with G = X X^T. Only G and the factors' product are followed, which
// are the smaller matrices; small singular values, which G has squared, come out to some thousandths. `scratch` has space
// for five squares.
FUNCTION const float *find_orthogonal_factor(const float *matrix, int rows, int columns, float *scratch) {
  constexpr float A = 3.4445f, B = -4.7750f, C = 2.0315f;  // and 5 iterations: optim.py's
  const int across = stride(rows), size = rows * across;
  float *gram = scratch, *turn = scratch + size, *turned = scratch + 2 * size, *factor = scratch + 3 * size;
  float *spare = scratch + 4 * size;
  for (int i = thread(); i < 5 * size; i += THREADS) scratch[i] = 0;
  sync_threads();
  multiply(turned, matrix, matrix, rows, columns, 0, 1);
  sync_threads();
  float squares = 0;
#pragma unroll 8
  for (int i = 0; i < rows; i++) squares += turned[i * across + i];
  const float inverse = 1 / (sqrtf(squares) + 1e-7f);
  for (int i = thread(); i < size; i += THREADS) {
    gram[i] = turned[i] * inverse * inverse;
    factor[i] = i / across == i % across ? inverse : 0.0f;
  }
  const int upper = thread() >= THREADS / 2;
#pragma unroll 1
  for (int iteration = 0; iteration < 5; iteration++) {
    sync_threads();
    multiply(turn, gram, gram, rows, rows, 0, 1);
    sync_threads();
    for (int i = thread(); i < size; i += THREADS)
      turn[i] = B * gram[i] + C * turn[i] + (i / across == i % across ? A : 0.0f);
    sync_threads();
    multiply(upper ? spare : turned, turn, upper ? factor : gram, rows, rows, upper, 2);
    sync_threads();
    if (iteration < 4) multiply(gram, turn, turned, rows, rows, 0, 1);
    float *const last = factor;
    factor = spare, spare = last;
  }
  return factor;
}

struct Step {
  const HopperArguments &a;
  float *const shared;
  const int row;  // of the image in the pool
  const u32 seed;  // of the image's dropout
  const int own_warp;

  DEVICE int lane() const { return thread() % WARP; }
  DEVICE int warp() const { return own_warp; }

  template <int I>
  DEVICE float *inputs() const {
    return shared + Places<I>::INPUTS;
  }
  template <int I>
  DEVICE float *values() const {
    return shared + Places<I>::VALUES;
  }
  template <int I>
  DEVICE float &fact(Fact kind, int channel) const {
    constexpr Layer layer = LAYERS[I];
    return shared[Places<I>::FACTS + kind * layer.outputs + channel];
  }

  // Dropout's factor, 0 or 1 / (1 - p): a hash of key, image's position in the epoch, layer and place therein.
  template <int I>
  DEVICE float dropout(int place) const {
    constexpr Layer layer = LAYERS[I];
    if constexpr (layer.dropout > 0) {
      const u32 draw = hash(hash(seed + I) ^ u32(place) * 0x9E3779B9u);
      return draw < u32(layer.dropout * 4294967296.0f) ? 0.0f : 1 / (1 - layer.dropout);
    }
    return 1;
  }

  // ---- the image

  DEVICE float *pixel(int place) const {
    constexpr Layer layer = LAYERS[0];
    return inputs<0>() + (place / SIDE + layer.padding) * layer.padded() + place % SIDE + layer.padding;
  }

  DEVICE void read_image() const {
    if (a.inputs) {
      for (int i = thread(); i < SIDE * SIDE; i += THREADS) *pixel(i) = a.inputs[block() * SIDE * SIDE + i];
      return;
    }
    const i64 position = a.position + block();
    float *image = shared + SCRATCH, *draws = image + SIDE * SIDE;
    for (int i = thread(); i < SIDE * SIDE; i += THREADS)
      image[i] = float(a.images[i64(row) * SIDE * SIDE + i]) / 255.0f;
    for (int i = thread(); i < DRAWS; i += THREADS) draws[i] = draw(a.augment_key, position, DRAWS, i);
    float *moves = draws + DRAWS + WARPS, *basis = moves + 2 * POINTS * POINTS;
    if (a.augmented && a.ranges.elastic > 0) {
      for (int i = thread(); i < 2 * POINTS * POINTS; i += THREADS)
        moves[i] = around(a.ranges.elastic, draw(a.elastic_key, position, 2 * POINTS * POINTS, i));
      for (int i = thread(); i < SIDE * POINTS; i += THREADS) basis[i] = a.basis[i];
    }
    sync_threads();
    if (a.augmented) {
      resample(image, draws, moves, basis);
      if (a.ranges.brightness > 0 || a.ranges.contrast > 0) jitter(draws);
    }
    for (int i = thread(); i < SIDE * SIDE; i += THREADS)
      *pixel(i) = ((a.augmented ? *pixel(i) : image[i]) - PIXELS_MEAN) / PIXELS_SD;
  }

  // How far the elastic distortion moves a pixel, as augment.py's `displacements`: points (POINTS, POINTS) lead it.
  DEVICE static float displacement(const float *points, const float *basis, int x, int y) {
    float sum = 0;
    for (int row = 0; row < POINTS; row++) {
      float along = 0;
      for (int i = 0; i < POINTS; i++) along += points[row * POINTS + i] * basis[x * POINTS + i];
      sum += along * basis[y * POINTS + row];
    }
    return sum;
  }

  // Nearest resampling under an affine map, as augment.py's `warp`.
  DEVICE void resample(const float *image, const float *draws, const float *moves, const float *basis) const {
    const Map map = find_map(a.ranges, draws);
    constexpr float CENTRE = (SIDE - 1) / 2.0f;
    for (int i = thread(); i < SIDE * SIDE; i += THREADS) {
      const float dx = i % SIDE - CENTRE, dy = i / SIDE - CENTRE;
      float x = map.xx * dx + map.xy * dy + map.x0 + CENTRE, y = map.yx * dx + map.yy * dy + map.y0 + CENTRE;
      if (a.ranges.elastic > 0) {
        x += displacement(moves, basis, i % SIDE, i / SIDE);
        y += displacement(moves + POINTS * POINTS, basis, i % SIDE, i / SIDE);
      }
      const float column = rintf(x), line = rintf(y);
      const bool inside = column >= 0 && column < SIDE && line >= 0 && line < SIDE;
      *pixel(i) = inside ? image[int(line) * SIDE + int(column)] : a.ranges.fill;
    }
  }

  // Brightness and contrast in random order, as augment.py's `jitter`.
  DEVICE void jitter(const float *draws) const {
    const float brightness = around(a.ranges.brightness, draws[6], 1);
    const float contrast = around(a.ranges.contrast, draws[7], 1);
    const bool contrast_first = draws[8] < 0.5f;
    for (int turn = 0; turn < 2; turn++) {
      if (contrast_first == (turn == 0)) {
        const float mean = mean_pixel(shared + SCRATCH + SIDE * SIDE + DRAWS);
        for (int i = thread(); i < SIDE * SIDE; i += THREADS) *pixel(i) = clamp(mean + (*pixel(i) - mean) * contrast);
      } else {
        for (int i = thread(); i < SIDE * SIDE; i += THREADS) *pixel(i) = clamp(*pixel(i) * brightness);
      }
    }
  }

  DEVICE float mean_pixel(float *sums) const {
    float sum = 0, total = 0;
    for (int i = thread(); i < SIDE * SIDE; i += THREADS) sum += *pixel(i);
    sum = add_lanes(sum);
    if (lane() == 0) sums[warp()] = sum;
    sync_threads();
    for (int i = 0; i < WARPS; i++) total += sums[i];
    return total / (SIDE * SIDE);
  }

  // ---- convolutions

  // Starts to bring a layer's weights.
  template <int I, bool FLIPPED>
  DEVICE void load_weights() const {
    constexpr int SIZE = packed_size(LAYERS[I], FLIPPED);
    const float *from = a.packed + (FLIPPED ? Places<I>::FLIPPED : Places<I>::PACKED);
#pragma unroll 1
    for (int i = 4 * thread(); i < SIZE; i += 4 * THREADS) copy(shared + WEIGHTS + i, from + i);
  }

  // Convolution of (CHANNELS, WIDTH, WIDTH), which has MARGIN zeros around it that are not stored, to (outputs, SIZE,
  // SIZE); calls store(channel, y, x, sum). A strip may reach below the outputs: what it finds there is dropped.
  template <int CHANNELS, int KERNEL_SIZE, int WIDTH, int MARGIN, int OUTPUTS, int SIZE, class Store>
  DEVICE void convolve(const float *in, Store store) const {
    constexpr Tiling tiling = choose(CHANNELS, OUTPUTS, KERNEL_SIZE, SIZE);
    constexpr int HEIGHT = tiling.rows, DEPTH = tiling.channels, TALL = HEIGHT + KERNEL_SIZE - 1;
    constexpr int STRIPS = cut(SIZE, HEIGHT) * SIZE, STRIDE = stride(OUTPUTS);
    for (int item = thread(); item < STRIPS * cut(OUTPUTS, DEPTH); item += THREADS) {
      const int first = item / STRIPS * DEPTH, top = item % STRIPS / SIZE * HEIGHT, left = item % SIZE;
      const float *plane = in + (top - MARGIN) * WIDTH + left - MARGIN, *weights = shared + WEIGHTS + first;
      float sums[DEPTH][HEIGHT] = {};
#pragma unroll 1
      for (int channel = 0; channel < CHANNELS; channel++, plane += WIDTH * WIDTH) {
#pragma unroll
        for (int kx = 0; kx < KERNEL_SIZE; kx++) {
          float column[TALL];
#pragma unroll
          for (int y = 0; y < TALL; y++) {
            const int line = top - MARGIN + y;
            const bool inside = !MARGIN || (unsigned(line) < WIDTH && unsigned(left - MARGIN + kx) < WIDTH);
            column[y] = inside ? plane[y * WIDTH + kx] : 0.0f;
          }
#pragma unroll
          for (int ky = 0; ky < KERNEL_SIZE; ky++) {
            const int tap = (channel * KERNEL_SIZE + ky) * KERNEL_SIZE + kx;
            const auto w = *reinterpret_cast<const Vector<DEPTH> *>(weights + tap * STRIDE);
#pragma unroll
            for (int o = 0; o < DEPTH; o++)
#pragma unroll
              for (int y = 0; y < HEIGHT; y++) sums[o][y] += w.values[o] * column[y + ky];
          }
        }
      }
#pragma unroll
      for (int o = 0; o < DEPTH; o++)
#pragma unroll
        for (int y = 0; y < HEIGHT; y++)
          if (first + o < OUTPUTS && top + y < SIZE) store(first + o, top + y, left, sums[o][y]);
    }
  }

  // Gradient of a layer's weights, of this image. Each warp takes tiles, and of these 32 pixels at a time.
  template <int I>
  DEVICE void correlate() const {
    constexpr Layer layer = LAYERS[I];
    constexpr int AREA = layer.area(), K = layer.kernel, WIDTH = layer.padded(), TAPS = layer.taps();
    constexpr int SPLITS = splits(layer), ACROSS = cut(layer.outputs, TILE_OUTPUTS);
    float *gradients = a.partial + i64(block()) * PARAMETERS + Places<I>::PARAMETERS;
    if constexpr (layer.pixels() == 1) {
      for (int i = thread(); i < layer.weights(); i += THREADS)
        gradients[i] = values<I>()[i / TAPS] * inputs<I>()[i % TAPS];
      return;
    }
#pragma unroll 1
    for (int work = warp(); work < tiles(layer) * SPLITS; work += WARPS) {
      const int split = work % SPLITS, tile = work / SPLITS;
      const int output = tile % ACROSS * TILE_OUTPUTS, first = tile / ACROSS * TILE_TAPS;
      const float *gradient = values<I>() + output * layer.pixels();
      const float *taps[TILE_TAPS];
#pragma unroll
      for (int t = 0; t < TILE_TAPS; t++) {
        const int tap = least(first + t, TAPS - 1), at = tap % AREA;
        taps[t] = inputs<I>() + tap / AREA * WIDTH * WIDTH + at / K * WIDTH + at % K;
      }
      float products[TILE_OUTPUTS / 4][32] = {};
#pragma unroll 2
      for (int i = split * WARP + lane(); i < layer.pixels(); i += SPLITS * WARP) {
        const int at = i + i / layer.size() * (WIDTH - layer.size());
        float v[TILE_TAPS];
#pragma unroll
        for (int t = 0; t < TILE_TAPS; t++) v[t] = taps[t][at];
#pragma unroll
        for (int o = 0; o < TILE_OUTPUTS; o++) {
          const float g = gradient[o * layer.pixels() + i];
#pragma unroll
          for (int t = 0; t < TILE_TAPS; t++) products[o / 4][o % 4 * TILE_TAPS + t] += g * v[t];
        }
      }
#pragma unroll
      for (int part = 0; part < TILE_OUTPUTS / 4; part++)
        reduce(products[part], [&](int index, float total) {
          const int o = output + part * 4 + index / TILE_TAPS, tap = first + index % TILE_TAPS;
          if (o >= layer.outputs || tap >= TAPS) return;
          if constexpr (SPLITS > 1) shared[SCRATCH + (split * layer.outputs + o) * TAPS + tap] = total;
          else gradients[o * TAPS + tap] = total;
        });
    }
    if constexpr (SPLITS > 1) {
      sync_threads();
      for (int i = thread(); i < layer.weights(); i += THREADS) {
        float total = 0;
#pragma unroll
        for (int split = 0; split < SPLITS; split++) total += shared[SCRATCH + split * layer.weights() + i];
        gradients[i] = total;
      }
    }
  }

  // ---- sums over the batch

  DEVICE Word *words(int exchange, int channel) const {
    return a.words + (i64(exchange) * MOST_CHANNELS + channel) * BLOCKS;
  }

  DEVICE void post(int exchange, int channel, Pair pair) const {
    write(words(exchange, channel) + block(), {pair.first, a.ticket, pair.second, a.ticket});
  }

  // Posts two sums per channel, to which add(channel, piece, pair) contributes.
  template <int UNROLL, class Add>
  DEVICE void post_sums(int exchange, int channels, int pieces, Add add) const {
#pragma unroll 1
    for (int channel = warp(); channel < channels; channel += WARPS) {
      Pair pair{0, 0};
#pragma unroll UNROLL
      for (int piece = lane(); piece < pieces; piece += WARP) add(channel, piece, pair);
      pair = ::add_lanes(pair);
      if (lane() == 0) post(exchange, channel, pair);
    }
  }

  DEVICE Pair gather(int exchange, int channel) const { return ::gather(words(exchange, channel), a.ticket); }

  template <int I>
  DEVICE float count() const {
    constexpr Layer layer = LAYERS[I];
    return float(blocks() * layer.pixels());
  }

  // ---- forward

  template <int I>
  DEVICE void forward() const {
    constexpr Layer layer = LAYERS[I];
    arrive();
    sync_threads();
    float *out = values<I>();
    convolve<layer.inputs, layer.kernel, layer.padded(), 0, layer.outputs, layer.size()>(
        inputs<I>(), [=](int channel, int y, int x, float value) {
          out[(channel * layer.size() + y) * layer.size() + x] = layer.relu_before && value < 0 ? 0.0f : value;
        });
    sync_threads();
    if constexpr (I == COUNT - 1) {
      load_weights<I, true>();
      compare();
      backward<I>();
    } else {
      post_moments<I>();
      load_weights<I + 1, false>();
      normalise<I>();
      sync_threads();
      activate<I>();
      forward<I + 1>();
    }
  }

  template <int I>
  DEVICE void post_moments() const {
    constexpr Layer layer = LAYERS[I];
    post_sums<4>(I, layer.outputs, layer.pixels(), [=, this](int channel, int i, Pair &pair) {
      const float value = values<I>()[channel * layer.pixels() + i];
      pair.first += value, pair.second += value * value;
    });
  }

  // BatchNorm's factors from the batch; block 0 moves the running statistics.
  template <int I>
  DEVICE void normalise() const {
    constexpr Layer layer = LAYERS[I];
#pragma unroll 1
    for (int channel = warp(); channel < layer.outputs; channel += WARPS) {
      const float *learned = a.parameters + Places<I>::PARAMETERS + layer.weights() + channel;
      const float scale = learned[0], shift = learned[layer.outputs];  // on their way while others are waited for
      const auto [sum, squares] = gather(I, channel);
      const float share = 1 / count<I>(), mean = sum * share, spread = squares * share - mean * mean;
      const float variance = spread < 0 ? 0.0f : spread;  // NaN stays
      if (lane()) continue;
      if (block() == 0) {
        float *running = a.statistics + Places<I>::STATISTICS + channel;
        running[0] += layer.momentum * (mean - running[0]);
        const float unbiased = variance * (count<I>() / (count<I>() - 1));
        running[layer.outputs] += layer.momentum * (unbiased - running[layer.outputs]);
      }
      const float inverse = 1 / sqrtf(variance + layer.epsilon), factor = scale * inverse;
      fact<I>(CENTRE, channel) = mean, fact<I>(INVERSE, channel) = inverse;
      fact<I>(FACTOR, channel) = factor, fact<I>(OFFSET, channel) = shift - mean * factor;
    }
  }

  // A layer's result at a place, before pooling.
  template <int I>
  DEVICE float result(int channel, int i) const {
    constexpr Layer layer = LAYERS[I];
    const int place = channel * layer.pixels() + i;
    const float value = (values<I>()[place] * fact<I>(FACTOR, channel) + fact<I>(OFFSET, channel)) * dropout<I>(place);
    return layer.relu_after && value < 0 ? 0.0f : value;
  }

  // Where a pooled result lies in the next layer's inputs.
  template <int I>
  DEVICE float &next(int channel, int cell) const {
    constexpr Layer layer = LAYERS[I + 1];
    const int y = cell / layer.input_size + layer.padding, x = cell % layer.input_size + layer.padding;
    return inputs<I + 1>()[(channel * layer.padded() + y) * layer.padded() + x];
  }

  // The pixel of a pooling window.
  template <int I>
  DEVICE static int window_pixel(int cell, int i) {
    constexpr Layer layer = LAYERS[I];
    const int y = cell / layer.pooled() * layer.window + i / layer.window;
    return y * layer.size() + cell % layer.pooled() * layer.window + i % layer.window;
  }

  template <int I>
  DEVICE void activate() const {
    constexpr Layer layer = LAYERS[I];
    constexpr int AREA = layer.window * layer.window, CELLS = layer.outputs * layer.cells();
    if constexpr (layer.pool == AVERAGE) {
      for (int i = warp(); i < CELLS; i += WARPS) {
        float sum = 0;
        for (int w = lane(); w < AREA; w += WARP)
          sum += result<I>(i / layer.cells(), window_pixel<I>(i % layer.cells(), w));
        sum = add_lanes(sum);
        if (lane() == 0) next<I>(i / layer.cells(), i % layer.cells()) = sum / AREA;
      }
    } else {
      for (int i = thread(); i < CELLS; i += THREADS) {
        const int channel = i / layer.cells(), cell = i % layer.cells();
        float best = result<I>(channel, window_pixel<I>(cell, 0));
#pragma unroll
        for (int w = 1; w < AREA; w++) {
          const float other = result<I>(channel, window_pixel<I>(cell, w));
          best = other > best || other != other ? other : best;  // NaN stays
        }
        next<I>(channel, cell) = best;
      }
    }
  }

  // Cross entropy of the image; its gradient takes the logits' place.
  DEVICE void compare() const {
    constexpr int CLASSES = LAYERS[COUNT - 1].outputs;
    float *logits = values<COUNT - 1>(), *copy = shared + SCRATCH;
    for (int i = thread(); i < CLASSES; i += THREADS) copy[i] = logits[i];
    sync_threads();
    const int label = int(a.labels[row]);
    for (int i = thread(); i < CLASSES; i += THREADS) {
      int best = 0;
      float total = 0, sum = 0;
      for (int c = 1; c < CLASSES; c++)
        if (copy[c] > copy[best]) best = c;
      const float top = copy[best];
#pragma unroll
      for (int c = 0; c < CLASSES; c++) total += expf(copy[c] - top), sum += copy[c] - top;
      const float log_total = logf(total), even = a.smoothing / CLASSES;
      logits[i] = a.weight * (expf(copy[i] - top - log_total) - even - (i == label ? 1 - a.smoothing : 0.0f));
      if (i == 0) {
        const float own = copy[label] - top - log_total, all = sum - CLASSES * log_total;
        a.losses[2 * block()] = -(1 - a.smoothing) * own - even * all;
        a.losses[2 * block() + 1] = best == label;
      }
    }
  }

  // ---- backward

  // From the gradient of a layer's values, which stands in their place, to those of its weights and the layer before.
  template <int I>
  DEVICE void backward() const {
    constexpr Layer layer = LAYERS[I];
    arrive();
    sync_threads();
    correlate<I>();
    if constexpr (I > 0) {
      sync_threads();
      constexpr int MARGIN = layer.kernel - 1 - layer.padding;
      convolve<layer.outputs, layer.kernel, layer.size(), MARGIN, layer.inputs, layer.input_size>(
          values<I>(), [this](int channel, int y, int x, float value) {
            next<I - 1>(channel, y * layer.input_size + x) = value;
          });
      sync_threads();
      post_gradient_moments<I - 1>();
      if constexpr (I > 1) load_weights<I - 1, true>();
      sum_gradient_moments<I - 1>();
      sync_threads();
      replace_values<I - 1>();
      backward<I - 1>();
    }
  }

  // Pieces of a channel in which gradients are handed on: pooling windows of a maximum, else pixels.
  template <int I>
  static constexpr int PIECES = LAYERS[I].pool == MAX ? LAYERS[I].cells() : LAYERS[I].pixels();

  // Calls take(pixel, gradient of the loss by BatchNorm's result there) for a piece.
  template <int I, class Take>
  DEVICE void hand_back(int channel, int piece, Take take) const {
    constexpr Layer layer = LAYERS[I];
    if constexpr (layer.pool == MAX) {
      constexpr int AREA = layer.window * layer.window;
      float best = result<I>(channel, window_pixel<I>(piece, 0));
      int chosen = 0;  // the first of the greatest
#pragma unroll
      for (int w = 1; w < AREA; w++) {
        const float other = result<I>(channel, window_pixel<I>(piece, w));
        if (other > best) best = other, chosen = w;
      }
      const float gradient = next<I>(channel, piece);
#pragma unroll
      for (int w = 0; w < AREA; w++) {
        const int i = window_pixel<I>(piece, w);
        const bool blocked = w != chosen || (layer.relu_after && !(best > 0));
        take(i, blocked ? 0.0f : gradient * dropout<I>(channel * layer.pixels() + i));
      }
    } else {
      const int y = piece / layer.size() / layer.window, x = piece % layer.size() / layer.window;
      const float gradient = next<I>(channel, y * layer.pooled() + x) / (layer.window * layer.window);
      const bool blocked = layer.relu_after && !(result<I>(channel, piece) > 0);
      take(piece, blocked ? 0.0f : gradient * dropout<I>(channel * layer.pixels() + piece));
    }
  }

  template <int I>
  DEVICE float normal(int channel, int i) const {
    constexpr Layer layer = LAYERS[I];
    return (values<I>()[channel * layer.pixels() + i] - fact<I>(CENTRE, channel)) * fact<I>(INVERSE, channel);
  }

  template <int I>
  DEVICE void post_gradient_moments() const {
    constexpr Layer layer = LAYERS[I];
    post_sums<2>(COUNT + I, layer.outputs, PIECES<I>, [=, this](int channel, int piece, Pair &pair) {
      hand_back<I>(channel, piece, [&](int i, float gradient) {
        pair.first += gradient, pair.second += gradient * normal<I>(channel, i);
      });
    });
  }

  // Their sums over the batch are the gradients of shift and scale, which the first block hands in.
  template <int I>
  DEVICE void sum_gradient_moments() const {
    constexpr Layer layer = LAYERS[I];
    float *gradients = a.partial + i64(block()) * PARAMETERS + Places<I>::PARAMETERS + layer.weights();
#pragma unroll 1
    for (int channel = warp(); channel < layer.outputs; channel += WARPS) {
      const auto [total, product] = gather(COUNT + I, channel);
      if (lane()) continue;
      const float share = 1 / count<I>();
      fact<I>(MEAN, channel) = total * share, fact<I>(SLOPE, channel) = product * share;
      gradients[channel] = block() ? 0.0f : product;
      gradients[layer.outputs + channel] = block() ? 0.0f : total;
    }
  }

  // A layer's values make scratch for their gradient.
  template <int I>
  DEVICE void replace_values() const {
    constexpr Layer layer = LAYERS[I];
#pragma unroll 1
    for (int work = thread(); work < layer.outputs * PIECES<I>; work += THREADS) {
      const int channel = work / PIECES<I>;
      const float mean = fact<I>(MEAN, channel), slope = fact<I>(SLOPE, channel);
      hand_back<I>(channel, work % PIECES<I>, [&](int i, float gradient) {
        float &value = values<I>()[channel * layer.pixels() + i];
        const bool blocked = layer.relu_before && !(value > 0);
        value = blocked ? 0.0f : fact<I>(FACTOR, channel) * (gradient - mean - normal<I>(channel, i) * slope);
      });
    }
  }

  // ---- around them

  // Zeros the margins.
  template <int I>
  DEVICE void clear_margins() const {
    constexpr Layer layer = LAYERS[I];
    if constexpr (layer.padding > 0)
      for (int i = thread(); i < layer.inputs * layer.padded() * layer.padded(); i += THREADS) inputs<I>()[i] = 0;
    if constexpr (I + 1 < COUNT) clear_margins<I + 1>();
  }

  // Waits until every block has written what it had to: gradients, the first time, and Muon's updates.
  DEVICE void meet(int time) const {
    sync_threads();
    if (thread() == 0) publish(), post(2 * COUNT + time, 0, {0, 0});
    if (warp() == 0) {
      gather(2 * COUNT + time, 0);
      publish();
    }
    sync_threads();
  }

  // Sums the gradients of this block's share of the parameters over all blocks, and takes the step.
  DEVICE void update() const {
    const int share = cut(PARAMETERS, blocks()), begin = block() * share, end = least(begin + share, PARAMETERS);
    const int column = thread() % COLUMNS, line = thread() / COLUMNS;
    float *sums = shared + SCRATCH;
#pragma unroll 1
    for (int first = begin; first < end; first += COLUMNS) {
      const int i = least(first + column, end - 1);
      const float old = a.parameters[i], velocity = a.momenta[i];
      const int place = a.places[i], flipped = a.places[PARAMETERS + i];
      float sum = 0;
#pragma unroll 8
      for (int number = line; number < blocks(); number += ROWS)
        sum += read_fresh(a.partial + i64(number) * PARAMETERS + i);
      if (line < ROWS) sums[line * COLUMNS + column] = sum;
      sync_threads();
      if (line == 0 && first + column < end) {
        float gradient = 0;
#pragma unroll
        for (int other = 0; other < ROWS; other++) gradient += sums[other * COLUMNS + column];
        a.gradients[i] = gradient;
        descend(i, gradient, old, velocity, place, flipped);
      }
      sync_threads();
    }
  }

  // SGD as torch.optim's; Muon's updates of weights wait to be made orthogonal.
  DEVICE void descend(int i, float gradient, float old, float velocity, int place, int flipped) const {
    if (!a.muon) gradient += a.weight_decay * old;
    if (a.momentum > 0) {
      velocity = a.momentum * velocity + gradient;
      a.momenta[i] = velocity;
      gradient = a.nesterov ? gradient + a.momentum * velocity : velocity;
    }
    if (a.muon && place >= 0) a.partial[i] = gradient;
    else move(i, gradient, old, place, flipped);
  }

  DEVICE void move(int i, float update, float old, int place, int flipped) const {
    if (a.muon) old *= 1 - a.rate * a.weight_decay;
    const float value = old - a.rate * update;
    a.parameters[i] = value;
    if (place >= 0) a.packed[place] = a.packed[flipped] = value;
  }

  // Muon's step of a layer's weights, by one block: their update as a matrix (outputs, taps), or turned where it is
  // higher than wide.
  template <int I>
  DEVICE void move_orthogonally() const {
    constexpr Layer layer = LAYERS[I];
    constexpr int TAPS = layer.taps(), HEIGHT = least(layer.outputs, TAPS), LENGTH = most(layer.outputs, TAPS);
    constexpr int STEP = stride(LENGTH), ACROSS = stride(HEIGHT);
    constexpr bool TURNED = layer.outputs > TAPS;
    if (block() == I % blocks()) {
      const auto at = [](int row, int column) {
        return Places<I>::PARAMETERS + (TURNED ? column * TAPS + row : row * TAPS + column);
      };
      float *matrix = shared;
#pragma unroll 8
      for (int i = thread(); i < HEIGHT * STEP; i += THREADS) {
        const int column = i % STEP;
        matrix[i] = column < LENGTH ? read_fresh(a.partial + at(i / STEP, column)) : 0.0f;
      }
      const float *factor = find_orthogonal_factor(matrix, HEIGHT, LENGTH, matrix + HEIGHT * STEP);
      const float scale = sqrtf(most(layer.outputs, TAPS) / float(TAPS));
#pragma unroll 1
      for (int item = thread(); item < cut(HEIGHT, 4) * LENGTH; item += THREADS) {
        const int column = item % LENGTH, first = item / LENGTH * 4, count = least(4, HEIGHT - first);
        float sums[4] = {}, old[4];
        int place[4], flipped[4];
#pragma unroll
        for (int row = 0; row < 4; row++) {
          const int i = at(first + least(row, count - 1), column);
          old[row] = a.parameters[i], place[row] = a.places[i], flipped[row] = a.places[PARAMETERS + i];
        }
#pragma unroll 4
        for (int k = 0; k < HEIGHT; k++) {
          const auto factors = *reinterpret_cast<const Vector<4> *>(factor + k * ACROSS + first);
          const float value = matrix[k * STEP + column];
#pragma unroll
          for (int row = 0; row < 4; row++) sums[row] += factors.values[row] * value;
        }
#pragma unroll
        for (int row = 0; row < 4; row++)
          if (row < count) move(at(first + row, column), scale * sums[row], old[row], place[row], flipped[row]);
      }
      sync_threads();
    }
    if constexpr (I + 1 < COUNT) move_orthogonally<I + 1>();
  }

  DEVICE void add_totals() const {
    if (block() || warp() != WARPS - 1) return;
    float loss = 0, hits = 0;
#pragma unroll 4
    for (int number = lane(); number < blocks(); number += WARP)
      loss += read_fresh(a.losses + 2 * number), hits += read_fresh(a.losses + 2 * number + 1);
    loss = add_lanes(loss), hits = add_lanes(hits);
    if (lane()) return;
    a.totals[0] += loss, a.totals[1] += hits, a.totals[2] += blocks();
#pragma unroll 1
    for (int i = 0; i < COUNT - 1; i++) a.counters[i] += 1;
  }
};

CONSTANT int shared_bytes = FLOATS * 4, packed_floats = PACKED;

KERNEL train(const HopperArguments a) {
  const int row = int(a.rows ? a.rows[block()] : block());
  const u32 key = hash(u32(a.dropout_key) ^ hash(u32(a.dropout_key >> 32)));
  const Step step{a, memory(), row, hash(key ^ hash(u32(a.position + block()))), uniform(thread() / WARP)};
  step.clear_margins<0>();
  step.load_weights<0, false>();
  sync_threads();
  step.read_image();
  step.forward<0>();
  step.meet(0);
  step.add_totals();
  step.update();
  if (a.muon) {
    step.meet(1);
    step.move_orthogonally<0>();
  }
}

// Weights as (inputs, taps, outputs), the outputs `stride` apart, and flipped, as (outputs, taps in reverse, inputs).
template <int I>
DEVICE void pack_layer(const HopperArguments &a) {
  constexpr Layer layer = LAYERS[I];
  for (int i = thread(); i < layer.weights() + 2 * layer.outputs * layer.normalises; i += THREADS) {
    const int at = Places<I>::PARAMETERS + i;
    const int output = i / layer.taps(), tap = i % layer.taps(), input = tap / layer.area();
    const int place = Places<I>::PACKED + tap * stride(layer.outputs) + output;
    const int reverse = output * layer.area() + layer.area() - 1 - tap % layer.area();
    const int flipped = Places<I>::FLIPPED + reverse * stride(layer.inputs) + input;
    const bool packed = i < layer.weights();
    a.places[at] = packed ? place : -1, a.places[PARAMETERS + at] = packed ? flipped : -1;
    if (packed) a.packed[place] = a.packed[flipped] = a.parameters[at];
  }
  if constexpr (I + 1 < COUNT) pack_layer<I + 1>(a);
}

// For one block; packed is 0 before, and comes after every change of the parameters but `train`'s.
KERNEL pack(const HopperArguments a) { pack_layer<0>(a); }
