// What cpu.cpp and hopper.cu share: the draws of an image's augmentation, and its map. augment.py explains them.

#ifdef __CUDACC__
inline float sine(float x) { return __sinf(x); }  // angles are small: errors below 1e-6
inline float cosine(float x) { return __cosf(x); }
#else
#include <cmath>
inline float sine(float x) { return std::sin(x); }
inline float cosine(float x) { return std::cos(x); }
#endif

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr int DRAWS = 9;   // of an image's augmentation, besides those of the elastic distortion
constexpr int POINTS = 5;  // of the elastic distortion, along each side
constexpr float PIXELS_MEAN = 0.1307f, PIXELS_SD = 0.3081f;

// What is drawn for an image, each uniformly: radians, pixels, factors. abi.py has the same fields.
struct Ranges {
  float rotation, angle, shear, scale_min, scale_max, translate, elastic, brightness, contrast, fill;
};

inline u32 hash(u32 x) {  // lowbias32 by Wellons
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// `uniform` of augment.py: one of so many columns of a position in the epoch.
inline float draw(u64 key, i64 position, int columns, int column) {
  const u32 counter = u32(position * columns + column + key);
  return float(hash(hash(counter) ^ u32(key >> 31)) >> 8) * 0x1p-24f;
}

inline float between(float low, float high, float drawn) { return low + (high - low) * drawn; }
inline float around(float radius, float drawn, float centre = 0) {
  return between(centre - radius, centre + radius, drawn);
}

// From output to input pixels, both as seen from the image's centre: x = xx dx + xy dy + x0, and y likewise.
struct Map {
  float xx, xy, x0, yx, yy, y0;
};

// `affine_maps` of augment.py.
inline Map find_map(const Ranges &r, const float *draws) {
  const float rotation = around(r.rotation, draws[0]), angle = around(r.angle, draws[1]);
  const float tilt = around(r.shear, draws[2]), shear = sine(tilt) / cosine(tilt);
  const float scale = between(r.scale_min, r.scale_max, draws[3]);
  const float shift_x = rintf(around(r.translate, draws[4])), shift_y = rintf(around(r.translate, draws[5]));
  const float c = cosine(angle), s = sine(angle), rc = cosine(rotation), rs = sine(rotation);
  const float m00 = (c - s * shear) / scale, m01 = (c * shear + s) / scale, m10 = -s / scale, m11 = c / scale;
  const float xx = rc * m00 - rs * m10, xy = rc * m01 - rs * m11;
  const float yx = rs * m00 + rc * m10, yy = rs * m01 + rc * m11;
  return {xx, xy, -(xx * shift_x + xy * shift_y), yx, yy, -(yx * shift_x + yy * shift_y)};
}
