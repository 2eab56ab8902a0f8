#include "freemerge/fft.h"

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstring>
#include <map>
#include <mutex>

#include "freemerge/butterfly.h"

namespace freemerge {
namespace FREEMERGE_ISA {

// Forward is decimation in frequency (butterfly, then twiddles), inverse decimation in time (twiddles, then butterfly): neither permutes.
// An inverse transform is a forward one with the roles of real and imaginary part exchanged, so there is one set of twiddles.
template <int RADIX, bool INVERSE, bool TWIDDLES>
static void pass(float* x, std::size_t blocks, std::size_t m, const float* twiddles, int runtime_radix) {
  constexpr int MOST = RADIX ? RADIX : LARGEST_RADIX;
  constexpr std::size_t RE = INVERSE ? LANES : 0, IM = INVERSE ? 0 : LANES;
  constexpr bool ODD = RADIX == 0 || RADIX % 2 == 1;
  const int radix = RADIX ? RADIX : runtime_radix;
  const float* roots = ODD ? twiddles + (TWIDDLES ? 2 * m * (radix - 1) : 0) : nullptr;
  for (std::size_t block = 0; block < blocks; ++block, x += radix * m * POINT) {
    const float* w = twiddles;
    for (std::size_t j = 0; j < m; ++j, w += 2 * (radix - 1)) {
      for (std::size_t lane = 0; lane < LANES; lane += WIDTH) {
        float* point = x + j * POINT + lane;
        Complex y[MOST] = {};
#pragma GCC unroll 13
        for (int k = 0; k < radix; ++k) {
          y[k] = {load(point + k * m * POINT + RE), load(point + k * m * POINT + IM)};
          if (INVERSE && TWIDDLES && k > 0) y[k] = times(y[k], w + 2 * (k - 1));
        }
        if constexpr (ODD)
          odd_butterfly<RADIX>(y, roots, radix, InPlace{y});
        else
          butterfly<RADIX>(y);
#pragma GCC unroll 13
        for (int k = 0; k < radix; ++k) {
          if (!INVERSE && TWIDDLES && k > 0) y[k] = times(y[k], w + 2 * (k - 1));
          store(point + k * m * POINT + RE, y[k].re);
          store(point + k * m * POINT + IM, y[k].im);
        }
      }
    }
  }
}

// ---- any length, as a convolution with a chirp of a power of two of points (Bluestein) ----

static void simple_fft(std::vector<std::complex<double>>& x) {   // radix 2, in double: for tables
  const std::size_t n = x.size();
  if (n == 1) return;
  std::vector<std::complex<double>> even(n / 2), odd(n / 2);
  for (std::size_t i = 0; i < n / 2; ++i) even[i] = x[2 * i], odd[i] = x[2 * i + 1];
  simple_fft(even);
  simple_fft(odd);
  for (std::size_t i = 0; i < n / 2; ++i) {
    const auto turned = std::polar(1.0, -2 * M_PI * i / n) * odd[i];
    x[i] = even[i] + turned;
    x[i + n / 2] = even[i] - turned;
  }
}

static std::size_t padded(std::size_t n) {
  std::size_t power = 1;
  while (power < 2 * n - 1) power *= 2;
  return power;
}

class Bluestein {
 public:
  explicit Bluestein(std::size_t n) : n_(n), transform_(padded(n)), chirp_(2 * n), filter_(2 * transform_.size()) {
    const std::size_t size = transform_.size();
    std::vector<std::complex<double>> filter(size);
    for (std::size_t j = 0; j < n; ++j) {
      const auto turn = std::polar(1.0, -M_PI * static_cast<double>(j * j % (2 * n)) / n);
      chirp_[2 * j] = static_cast<float>(turn.real());
      chirp_[2 * j + 1] = static_cast<float>(turn.imag());
      filter[j] = filter[(size - j) % size] = std::conj(turn) / static_cast<double>(size);
    }
    simple_fft(filter);
    for (std::size_t f = 0; f < size; ++f) {
      const std::size_t at = transform_.position()[f];
      filter_[2 * at] = static_cast<float>(filter[f].real());
      filter_[2 * at + 1] = static_cast<float>(filter[f].imag());
    }
  }

  std::size_t scratch_floats() const { return transform_.size() * POINT; }

  // In natural order. RE, IM: where in a point its real and imaginary parts lie
  template <std::size_t RE, std::size_t IM>
  void run(float* x, float* scratch) const {
    multiply<RE, IM, 0, LANES>(x, chirp_.data(), n_, scratch);
    std::memset(scratch + n_ * POINT, 0, (transform_.size() - n_) * POINT * sizeof(float));
    transform_.forward(scratch, nullptr);
    multiply<0, LANES, 0, LANES>(scratch, filter_.data(), transform_.size(), scratch);
    transform_.inverse(scratch, nullptr);
    multiply<0, LANES, RE, IM>(scratch, chirp_.data(), n_, x);
  }

 private:
  template <std::size_t RE, std::size_t IM, std::size_t OUT_RE, std::size_t OUT_IM>
  static void multiply(const float* x, const float* factors, std::size_t n, float* out) {
    for (std::size_t j = 0; j < n; ++j)
      for (std::size_t lane = 0; lane < LANES; lane += WIDTH) {
        const float* point = x + j * POINT + lane;
        const Complex y = times({load(point + RE), load(point + IM)}, factors + 2 * j);
        store(out + j * POINT + lane + OUT_RE, y.re);
        store(out + j * POINT + lane + OUT_IM, y.im);
      }
  }

  std::size_t n_;
  Transform transform_;
  std::vector<float> chirp_, filter_;
};

// ---- decomposition ----

template <int RADIX, bool INVERSE>
static auto pass_of(bool twiddles) {
  return twiddles ? &pass<RADIX, INVERSE, true> : &pass<RADIX, INVERSE, false>;
}

template <bool INVERSE>
static auto choose_pass(int radix, bool twiddles) {
  switch (radix) {
    case 2: return pass_of<2, INVERSE>(twiddles);
    case 3: return pass_of<3, INVERSE>(twiddles);
    case 4: return pass_of<4, INVERSE>(twiddles);
    case 5: return pass_of<5, INVERSE>(twiddles);
    case 7: return pass_of<7, INVERSE>(twiddles);
    case 8: return pass_of<8, INVERSE>(twiddles);
    case 11: return pass_of<11, INVERSE>(twiddles);
    case 13: return pass_of<13, INVERSE>(twiddles);
    default: return pass_of<0, INVERSE>(twiddles);
  }
}

// Powers of two first: their butterflies reach far apart; odd radices last, where the points of a butterfly are neighbours
// (eleven streams a power of two apart would share one set of the cache).
static std::vector<int> radices(std::size_t& n) {
  std::vector<int> found;
  int twos = 0;
  for (; n % 2 == 0; n /= 2) ++twos;
  if (twos % 3 == 1 && twos >= 4) found.insert(found.end(), {4, 4}), twos -= 4;
  if (twos % 3 == 2) found.push_back(4), twos -= 2;
  for (; twos >= 3; twos -= 3) found.insert(found.begin(), 8);
  if (twos == 1) found.push_back(2);
  for (int radix = 3; radix <= LARGEST_RADIX; radix += 2)
    for (; n % radix == 0; n /= radix) found.push_back(radix);
  return found;
}

Transform::Transform(std::size_t n) : n_(n), leaf_(n), position_(n) {
  const auto factors = radices(leaf_);
  if (leaf_ > 1) bluestein_ = std::make_unique<Bluestein>(leaf_);
  std::size_t rest = n;
  for (const int radix : factors) {
    const std::size_t m = rest / radix;
    Level level{radix, rest, m, {}, choose_pass<false>(radix, m > 1), choose_pass<true>(radix, m > 1)};
    for (std::size_t j = 0; j < m && m > 1; ++j)
      for (int k = 1; k < radix; ++k) {
        const double angle = -2 * M_PI * static_cast<double>(j * k) / rest;
        level.twiddles.push_back(static_cast<float>(std::cos(angle)));
        level.twiddles.push_back(static_cast<float>(std::sin(angle)));
      }
    for (int j = 0; j < radix && radix % 2 == 1; ++j) {
      level.twiddles.push_back(static_cast<float>(std::cos(2 * M_PI * j / radix)));
      level.twiddles.push_back(static_cast<float>(std::sin(2 * M_PI * j / radix)));
    }
    levels_.push_back(std::move(level));
    rest = m;
  }
  for (std::size_t f = 0; f < n; ++f) {
    std::size_t quotient = f, at = 0;
    for (const Level& level : levels_) {
      at += quotient % level.radix * level.m;
      quotient /= level.radix;
    }
    position_[f] = static_cast<std::uint32_t>(at + quotient);
  }
}

Transform::~Transform() = default;

std::size_t Transform::scratch_floats() const { return bluestein_ ? bluestein_->scratch_floats() : 0; }

const Transform& Transform::of(std::size_t n) {
  static std::mutex mutex;
  static std::map<std::size_t, std::unique_ptr<Transform>> made;
  std::lock_guard<std::mutex> lock(mutex);
  auto& transform = made[n];
  if (!transform) transform = std::make_unique<Transform>(n);
  return *transform;
}

constexpr std::size_t CACHED = 192;   // points that fit the first-level cache with their twiddles: from there on, pass by pass

void Transform::forward_level(float* x, std::size_t level, float* scratch) const {
  const std::size_t n = level < levels_.size() ? levels_[level].n : leaf_;
  if (n > CACHED && level < levels_.size()) {
    const Level& here = levels_[level];
    here.forward(x, 1, here.m, here.twiddles.data(), here.radix);
    for (int k = 0; k < here.radix; ++k) forward_level(x + k * here.m * POINT, level + 1, scratch);
    return;
  }
  for (; level < levels_.size(); ++level) {
    const Level& here = levels_[level];
    here.forward(x, n / here.n, here.m, here.twiddles.data(), here.radix);
  }
  if (bluestein_)
    for (std::size_t start = 0; start < n; start += leaf_) bluestein_->run<0, LANES>(x + start * POINT, scratch);
}

void Transform::inverse_level(float* x, std::size_t level, float* scratch) const {
  const std::size_t n = level < levels_.size() ? levels_[level].n : leaf_;
  if (n > CACHED && level < levels_.size()) {
    const Level& here = levels_[level];
    for (int k = 0; k < here.radix; ++k) inverse_level(x + k * here.m * POINT, level + 1, scratch);
    here.inverse(x, 1, here.m, here.twiddles.data(), here.radix);
    return;
  }
  if (bluestein_)
    for (std::size_t start = 0; start < n; start += leaf_) bluestein_->run<LANES, 0>(x + start * POINT, scratch);
  for (std::size_t below = levels_.size(); below > level; --below) {
    const Level& here = levels_[below - 1];
    here.inverse(x, n / here.n, here.m, here.twiddles.data(), here.radix);
  }
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
