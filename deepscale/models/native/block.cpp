// One ConvNeXt block (arXiv:2201.03545) forward and backward on a CPU, for deepscale/models/block.py, which describes it:
//
//     y = dwconv(x); xhat = standardise(y); h = W1 xhat + b1; a = f(h); out = x + mask * (W2 a + b2)
//
// Plain C++ and OpenMP, no header of torch: vectors are the compiler's own, of this processor's width, so that the same lines serve x86 and ARM.
// Tensors are channels-last: an image is H * W rows of C channels. A thread takes whole images, so a call has one barrier instead of one per
// operator, and goes through their rows in tiles that stay in cache. Sums over threads are taken in the order of the threads: results
// repeat bit for bit for a given number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__AVX512F__)
constexpr int BYTES = 64, ROWS = 8;
#elif defined(__AVX__)
constexpr int BYTES = 32, ROWS = 4;
#elif defined(__aarch64__)
constexpr int BYTES = 16, ROWS = 8;
#else
constexpr int BYTES = 16, ROWS = 4;
#endif
// ROWS x 2 vectors of a product are held in registers.

enum Activation { GELU, RELU, SILU, TANH, SIGMOID };
enum Norm { LAYERNORM, RMSNORM, NONE };

extern "C" {
// A stack of equal blocks; mirrored by native/__init__.py. Weights carry a leading block axis.
struct Stack {
    int64_t channels, kernel, activation, norm, skip, images, height, width, threads, float64;
    double eps;
    const void *dw, *dw_bias, *w1, *b1, *w2, *b2;  // (n, C, k, k), (n, C), (n, 4C, C), (n, 4C), (n, C, 4C), (n, C)
    const void *masks;                             // (n, M) or null
    void *g_dw, *g_dw_bias, *g_w1, *g_b1, *g_w2, *g_b2;  // gradients; g_w1 is (n, C, 4C)
};
}

namespace {

// ------------------------------------------------------------------------------------------------------------- vectors

template <class T, int V>
struct Vector {
    typedef T type __attribute__((vector_size(V * sizeof(T))));
    typedef T memory __attribute__((vector_size(V * sizeof(T)), aligned(sizeof(T)), may_alias));
};
template <class T, int V>
using Vec = typename Vector<T, V>::type;

template <class T, int V>
inline Vec<T, V> load(const T* p) {
    return *reinterpret_cast<const typename Vector<T, V>::memory*>(p);
}
template <class T, int V>
inline void store(T* p, Vec<T, V> v) {
    *reinterpret_cast<typename Vector<T, V>::memory*>(p) = v;
}
template <class T, int V>
inline Vec<T, V> splat(T value) {
    return value - Vec<T, V>{};
}

// Memory of a thread that grows as needed and is kept from call to call.
class Scratch {
  public:
    ~Scratch() { std::free(data_); }
    void begin(size_t bytes) {
        if (bytes > size_) {
            std::free(data_);
            size_ = (bytes + 4095) / 4096 * 4096;
            data_ = static_cast<char*>(std::aligned_alloc(4096, size_));
            if (!data_) { size_ = 0; throw std::bad_alloc(); }
        }
        used_ = 0;
    }
    template <class T>
    T* take(size_t count) {
        T* p = reinterpret_cast<T*>(data_ + used_);
        used_ += bytes<T>(count);
        return p;
    }
    template <class T>
    static size_t bytes(size_t count) { return (count * sizeof(T) + 63) / 64 * 64; }

  private:
    char* data_ = nullptr;
    size_t size_ = 0, used_ = 0;
};

// ------------------------------------------------------------------------------------------------------------ functions

template <int V>
inline Vec<float, V> exponential(Vec<float, V> x) {
    typedef int32_t I __attribute__((vector_size(V * 4)));
    typedef Vec<float, V> F;
    const F low = splat<float, V>(-87.0f), high = splat<float, V>(88.0f);
    x = x < low ? low : x;
    x = x > high ? high : x;
    const F magic = splat<float, V>(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number, in the low bits
    F shifted = x * 1.44269504088896341f + magic;
    F n = shifted - magic;
    F r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    F p = splat<float, V>(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    I power = ((I)shifted << 23) + (127 << 23);
    return p * (F)power;
}

// f(h) and f'(h).
template <int A, int V>
inline void activate(Vec<float, V> h, Vec<float, V>& a, Vec<float, V>& d) {
    typedef Vec<float, V> F;
    typedef int32_t I __attribute__((vector_size(V * 4)));
    const F zero = F{};
    if (A == GELU) {
        // erf by Abramowitz and Stegun 7.1.26, as torch's vectors have it (1.5e-7); its exponential is the density's.
        I sign = (I)h & INT32_MIN;
        F z = (F)((I)h & INT32_MAX) * 0.70710678118654752f;
        F t = 1.0f / (z * 0.3275911f + 1.0f);
        F e = exponential<V>(-z * z);
        F p = t * 1.061405429f - 1.453152027f;
        p = p * t + 1.421413741f;
        p = p * t - 0.284496736f;
        p = p * t + 0.254829592f;
        F erf = 1.0f - p * t * e;
        F cdf = 0.5f + 0.5f * (F)((I)erf | sign);
        a = h * cdf;
        d = cdf + h * e * 0.39894228040143268f;
    } else if (A == RELU) {
        a = h > zero ? h : zero;
        d = h > zero ? zero + 1.0f : zero;
    } else if (A == TANH) {
        F z = (F)((I)h & INT32_MAX);
        F e = exponential<V>(-2.0f * z);
        F large = (1.0f - e) / (1.0f + e);
        F s = h * h;  // near 0 that cancels: a polynomial of Cephes
        F p = s * -5.70498872745e-3f + 2.06390887954e-2f;
        p = p * s - 5.37397155531e-2f;
        p = p * s + 1.33314422036e-1f;
        p = p * s - 3.33332819422e-1f;
        a = z < 0.625f ? p * s * h + h : (F)((I)large | ((I)h & INT32_MIN));
        d = 1.0f - a * a;
    } else {
        F e = exponential<V>(-h);
        F s = 1.0f / (1.0f + e);
        a = A == SILU ? h * s : s;
        d = A == SILU ? s + a * (e * s) : s * (e * s);  // e s is 1 - s without its cancellation
    }
}

template <int A, int V>
inline void activate(Vec<double, V> h, Vec<double, V>& a, Vec<double, V>& d) {
    for (int l = 0; l < V; ++l) {
        const double x = h[l];
        if (A == GELU) {
            const double cdf = 0.5 * (1.0 + std::erf(x * M_SQRT1_2));
            a[l] = x * cdf;
            d[l] = cdf + x * std::exp(-0.5 * x * x) * (0.5 * M_2_SQRTPI * M_SQRT1_2);
        } else if (A == RELU) {
            a[l] = x > 0 ? x : 0;
            d[l] = x > 0 ? 1 : 0;
        } else if (A == TANH) {
            a[l] = std::tanh(x);
            d[l] = 1 - a[l] * a[l];
        } else {
            const double s = 1.0 / (1.0 + std::exp(-x));
            a[l] = A == SILU ? x * s : s;
            d[l] = A == SILU ? s + a[l] * (1 - s) : s * (1 - s);
        }
    }
}

// `a` may be `h`; `d` may be null.
template <class T, int V, int A>
void activate_all(int64_t count, const T* h, T* a, T* d) {
    for (int64_t j = 0; j < count; j += V) {
        Vec<T, V> value, slope;
        activate<A, V>(load<T, V>(h + j), value, slope);
        store<T, V>(a + j, value);
        if (d) store<T, V>(d + j, slope);
    }
}

// -------------------------------------------------------------------------------------------------------- matrix products

// R x (P * V) of C = [C +] [bias +] A B, held in registers. A long sum is added up in parts: shorter chains of rounding. A(r, k) = a[r * ar + k * ak]; B(k, j) = b[k * bk + j].
template <class T, int V, int R, int P>
inline void product_tile(int64_t K, const T* a, int64_t ar, int64_t ak, const T* b, int64_t bk, T* c, int64_t ldc, const T* bias, bool add) {
    Vec<T, V> sum[R][P];
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) sum[r][p] = bias ? load<T, V>(bias + p * V) : Vec<T, V>{};
    for (int64_t k = 0; k < K; ++k) {
        Vec<T, V> row[P];
        for (int p = 0; p < P; ++p) row[p] = load<T, V>(b + k * bk + p * V);
        for (int r = 0; r < R; ++r) {
            const T left = a[r * ar + k * ak];
            for (int p = 0; p < P; ++p) sum[r][p] += left * row[p];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) store<T, V>(c + r * ldc + p * V, add ? load<T, V>(c + r * ldc + p * V) + sum[r][p] : sum[r][p]);
}

template <class T, int V, int P>
void product_panel(int64_t M, int64_t K, const T* a, int64_t ar, int64_t ak, const T* b, int64_t bk, T* c, int64_t ldc, const T* bias, bool add) {
    int64_t i = 0;
    for (; i + ROWS <= M; i += ROWS) product_tile<T, V, ROWS, P>(K, a + i * ar, ar, ak, b, bk, c + i * ldc, ldc, bias, add);
    for (; i < M; ++i) product_tile<T, V, 1, P>(K, a + i * ar, ar, ak, b, bk, c + i * ldc, ldc, bias, add);
}

// C (M, N) = [C +] [bias +] A B, in panels of 2 V columns. `step` is how far B's panels lie apart.
template <class T, int V>
void product(int64_t M, int64_t N, int64_t K, const T* a, int64_t ar, int64_t ak, const T* b, int64_t bk, bool packed, T* c, int64_t ldc,
             const T* bias, bool add) {
    int64_t j = 0;
    for (; j + 2 * V <= N; j += 2 * V)
        product_panel<T, V, 2>(M, K, a, ar, ak, packed ? b + j * K : b + j, packed ? 2 * V : bk, c + j, ldc, bias ? bias + j : bias, add);
    for (; j < N; j += V)
        product_panel<T, V, 1>(M, K, a, ar, ak, packed ? b + j * K : b + j, packed ? V : bk, c + j, ldc, bias ? bias + j : bias, add);
}

// B(k, j) = b[k * bk + j * bj] in the panels that `product` goes through, each contiguous.
template <class T, int V>
void pack(int64_t K, int64_t N, const T* b, int64_t bk, int64_t bj, T* into) {
    for (int64_t j = 0; j < N;) {
        const int64_t wide = j + 2 * V <= N ? 2 * V : V;
        if (bj == 1) {
            for (int64_t k = 0; k < K; ++k)
                for (int64_t l = 0; l < wide; l += V) store<T, V>(into + k * wide + l, load<T, V>(b + k * bk + j + l));
        } else {
            for (int64_t k0 = 0; k0 < K; k0 += 16)
                for (int64_t l = 0; l < wide; ++l)
                    for (int64_t k = k0; k < std::min(K, k0 + 16); ++k) into[k * wide + l] = b[k * bk + (j + l) * bj];
        }
        into += K * wide;
        j += wide;
    }
}

// sums (N) += columns of rows (M, N).
template <class T, int V>
void add_columns(int64_t M, int64_t N, const T* rows, T* sums) {
    for (int64_t j = 0; j < N; j += V) {
        Vec<T, V> sum{};
        for (int64_t m = 0; m < M; ++m) sum += load<T, V>(rows + m * N + j);
        store<T, V>(sums + j, load<T, V>(sums + j) + sum);
    }
}

// --------------------------------------------------------------------------------------------------- depthwise convolution

// An image (H, W, C) with a border of zeros, (H + k - 1, W + k - 1, C).
template <class T>
void pad(int64_t H, int64_t W, int64_t C, int64_t k, const T* image, T* into) {
    const int64_t p = k / 2, line = (W + 2 * p) * C;
    std::memset(into, 0, p * line * sizeof(T));
    std::memset(into + (H + p) * line, 0, p * line * sizeof(T));
    for (int64_t y = 0; y < H; ++y) {
        T* row = into + (y + p) * line;
        std::memset(row, 0, p * C * sizeof(T));
        std::memcpy(row + p * C, image + y * W * C, W * C * sizeof(T));
        std::memset(row + (p + W) * C, 0, p * C * sizeof(T));
    }
}

// out (H * W, C) = [bias] + [add] + sum over taps of weights (k * k, C) times the padded image.
template <class T, int V, int FIXED>
void convolve(int64_t H, int64_t W, int64_t C, int64_t kernel, const T* padded, const T* weights, const T* bias, const T* add, T* out) {
    const int64_t k = FIXED ? FIXED : kernel, line = (W + k - 1) * C;
    for (int64_t c = 0; c < C; c += V) {
        Vec<T, V> w[FIXED ? FIXED * FIXED : 1];
        if (FIXED)
            for (int64_t t = 0; t < k * k; ++t) w[t] = load<T, V>(weights + t * C + c);
        const Vec<T, V> first = bias ? load<T, V>(bias + c) : Vec<T, V>{};
        for (int64_t y = 0; y < H; ++y)
            for (int64_t x = 0; x < W; ++x) {
                Vec<T, V> sum = first;
                const T* corner = padded + y * line + x * C + c;
                for (int64_t i = 0; i < k; ++i)
                    for (int64_t j = 0; j < k; ++j)
                        sum += load<T, V>(corner + i * line + j * C) * (FIXED ? w[i * k + j] : load<T, V>(weights + (i * k + j) * C + c));
                if (add) sum += load<T, V>(add + (y * W + x) * C + c);
                store<T, V>(out + (y * W + x) * C + c, sum);
            }
    }
}

// sums (k * k, C) += the weights' gradient of one image, from the padded input and the gradient (H * W, C) on the output.
template <class T, int V, int FIXED>
void convolve_weights(int64_t H, int64_t W, int64_t C, int64_t kernel, const T* padded, const T* g, T* sums) {
    const int64_t k = FIXED ? FIXED : kernel, line = (W + k - 1) * C;
    for (int64_t c = 0; c < C; c += V) {
        if (FIXED) {
            Vec<T, V> sum[FIXED ? FIXED * FIXED : 1];
            for (int64_t t = 0; t < k * k; ++t) sum[t] = Vec<T, V>{};
            for (int64_t y = 0; y < H; ++y)
                for (int64_t x = 0; x < W; ++x) {
                    const Vec<T, V> right = load<T, V>(g + (y * W + x) * C + c);
                    const T* corner = padded + y * line + x * C + c;
                    for (int64_t t = 0; t < k * k; ++t) sum[t] += load<T, V>(corner + t / k * line + t % k * C) * right;
                }
            for (int64_t t = 0; t < k * k; ++t) store<T, V>(sums + t * C + c, load<T, V>(sums + t * C + c) + sum[t]);
        } else {
            for (int64_t t = 0; t < k * k; ++t) {
                Vec<T, V> sum{};
                for (int64_t y = 0; y < H; ++y)
                    for (int64_t x = 0; x < W; ++x)
                        sum += load<T, V>(padded + (y + t / k) * line + (x + t % k) * C + c) * load<T, V>(g + (y * W + x) * C + c);
                store<T, V>(sums + t * C + c, load<T, V>(sums + t * C + c) + sum);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------- norms

template <class T, int V>
inline T total(Vec<T, V> v) {
    T lanes[V];
    store<T, V>(lanes, v);
    for (int half = V / 2; half; half /= 2)
        for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    return lanes[0];
}

// Rows (M, C) standardised in place; one inverse deviation each.
template <class T, int V>
void standardise(int64_t M, int64_t C, int64_t norm, T eps, T* rows, T* inverse) {
    for (int64_t m = 0; m < M; ++m) {
        T* row = rows + m * C;
        if (norm == LAYERNORM) {
            Vec<T, V> sum{};
            for (int64_t c = 0; c < C; c += V) sum += load<T, V>(row + c);
            const T mean = total<T, V>(sum) / C;
            for (int64_t c = 0; c < C; c += V) store<T, V>(row + c, load<T, V>(row + c) - mean);
        }
        Vec<T, V> square{};
        for (int64_t c = 0; c < C; c += V) square += load<T, V>(row + c) * load<T, V>(row + c);
        const T factor = 1 / std::sqrt(total<T, V>(square) / C + eps);
        for (int64_t c = 0; c < C; c += V) store<T, V>(row + c, load<T, V>(row + c) * factor);
        inverse[m] = factor;
    }
}

// The gradient on standardised rows -> on the rows before.
template <class T, int V>
void standardise_backward(int64_t M, int64_t C, int64_t norm, const T* g, const T* xhat, const T* inverse, T* out) {
    for (int64_t m = 0; m < M; ++m, g += C, xhat += C, out += C) {
        Vec<T, V> sum{}, projection{};
        for (int64_t c = 0; c < C; c += V) {
            sum += load<T, V>(g + c);
            projection += load<T, V>(g + c) * load<T, V>(xhat + c);
        }
        const T mean = norm == LAYERNORM ? total<T, V>(sum) / C : 0, slope = total<T, V>(projection) / C, factor = inverse[m];
        for (int64_t c = 0; c < C; c += V) store<T, V>(out + c, (load<T, V>(g + c) - mean - load<T, V>(xhat + c) * slope) * factor);
    }
}

// ---------------------------------------------------------------------------------------------------------------- block

thread_local Scratch scratch;

template <class T, int V>
struct Block {
    static constexpr int W = std::min<int>(4 * V, BYTES / sizeof(T));  // a vector of the 4C hidden channels
    const Stack& s;
    const int64_t i, C, H, N, k, pixels, padded;
    int64_t group, tile;  // images whose rows are gone through together, rows of a tile

    Block(const Stack& stack, int64_t index)
        : s(stack), i(index), C(s.channels), H(4 * C), N(s.images), k(s.kernel), pixels(s.height * s.width),
          padded((s.height + k - 1) * (s.width + k - 1) * C) {
        tile = std::max<int64_t>(64, std::min<int64_t>(512, 16384 / H));
        group = std::max<int64_t>(1, tile / pixels);
    }
    const T* weight(const void* p, int64_t size) const { return static_cast<const T*>(p) + i * size; }
    T* gradient(void* p, int64_t size) const { return static_cast<T*>(p) + i * size; }
    int64_t threads() const { return std::max<int64_t>(1, std::min(s.threads, N)); }

    // An exception that left a thread of OpenMP would end the process: it is thrown again behind the threads.
    template <class Work>
    void parallel(Work work) const {
        const int64_t n = threads();
        if (n == 1) return work(0, int64_t{0}, N);
        bool enough = true;
#pragma omp parallel for num_threads(n) schedule(static, 1) reduction(&& : enough)
        for (int64_t t = 0; t < n; ++t) {
            try {
                work(t, N * t / n, N * (t + 1) / n);
            } catch (const std::bad_alloc&) {
                enough = false;
            }
        }
        if (!enough) throw std::bad_alloc();
    }

    // (C, k, k) -> (k * k, C)
    void taps(T* into, bool flipped) const {
        const T* w = weight(s.dw, C * k * k);
        for (int64_t c = 0; c < C; ++c)
            for (int64_t t = 0; t < k * k; ++t) into[(flipped ? k * k - 1 - t : t) * C + c] = w[c * k * k + t];
    }

    void activation(int64_t count, T* h, T* d) const {
        switch (s.activation) {
            case GELU: return activate_all<T, W, GELU>(count, h, h, d);
            case RELU: return activate_all<T, W, RELU>(count, h, h, d);
            case SILU: return activate_all<T, W, SILU>(count, h, h, d);
            case TANH: return activate_all<T, W, TANH>(count, h, h, d);
            default: return activate_all<T, W, SIGMOID>(count, h, h, d);
        }
    }

    // out = [x +] [mask *] (W2 a + b2), for rows from `row` on.
    void output(int64_t rows, int64_t row, const T* a, const T* w2, const T* x, T* out) const {
        product<T, V>(rows, C, H, a, H, 1, w2, 0, true, out, C, weight(s.b2, C), false);
        const T* masks = s.masks ? weight(s.masks, N * pixels) + row : nullptr;
        if (!masks && !s.skip) return;
        for (int64_t m = 0; m < rows; ++m) {
            const T mask = masks ? masks[m] : 1;
            for (int64_t c = 0; c < C; c += V) {
                Vec<T, V> value = load<T, V>(out + m * C + c) * mask;
                if (s.skip) value += load<T, V>(x + m * C + c);
                store<T, V>(out + m * C + c, value);
            }
        }
    }

    // Any of out, xhat, inverse, d = f'(h), a may be null: then it is not kept. Without x, xhat is given.
    void forward(const T* x, T* out, T* xhat, T* inverse, T* d, T* a) const {
        parallel([&](int64_t, int64_t begin, int64_t end) {
            const int64_t rows = group * pixels;
            scratch.begin(Scratch::bytes<T>(padded) + Scratch::bytes<T>(k * k * C) + 2 * Scratch::bytes<T>(H * C) + Scratch::bytes<T>(rows * C) +
                          Scratch::bytes<T>(rows) + Scratch::bytes<T>(tile * H));
            T *border = scratch.take<T>(padded), *w = scratch.take<T>(k * k * C), *w1 = scratch.take<T>(H * C), *w2 = scratch.take<T>(H * C);
            T *own_y = scratch.take<T>(rows * C), *own_inverse = scratch.take<T>(rows), *own_a = scratch.take<T>(tile * H);
            taps(w, false);
            pack<T, W>(C, H, weight(s.w1, H * C), 1, C, w1);
            if (out) pack<T, V>(H, C, weight(s.w2, H * C), 1, H, w2);
            for (int64_t image = begin; image < end; image += group) {
                const int64_t last = std::min(end, image + group), row = image * pixels, many = (last - image) * pixels;
                T *y = xhat ? xhat + row * C : own_y, *deviations = inverse ? inverse + row : own_inverse;
                for (int64_t n = image; n < last && x; ++n) {
                    pad(s.height, s.width, C, k, x + n * pixels * C, border);
                    auto conv = k == 3 ? convolve<T, V, 3> : convolve<T, V, 0>;
                    conv(s.height, s.width, C, k, border, w, weight(s.dw_bias, C), nullptr, y + (n - image) * pixels * C);
                }
                for (int64_t r = 0; r < many; r += tile) {
                    const int64_t m = std::min(tile, many - r);
                    if (s.norm != NONE && x) standardise<T, V>(m, C, s.norm, s.eps, y + r * C, deviations + r);
                    T* hidden = a ? a + (row + r) * H : own_a;
                    product<T, W>(m, H, C, y + r * C, C, 1, w1, 0, true, hidden, H, weight(s.b1, H), false);
                    activation(m * H, hidden, d ? d + (row + r) * H : nullptr);
                    if (out) output(m, row + r, hidden, w2, x + (row + r) * C, out + (row + r) * C);
                }
            }
        });
    }

    // Gradient g on the output -> dx on the input; d becomes the gradient on h.
    void backward(const T* g, const T* x, const T* xhat, const T* inverse, T* d, const T* a, T* dx) const {
        const int64_t n = threads(), sizes[6] = {k * k * C, C, C * H, H, C * H, C};
        int64_t all = 0;
        for (int64_t size : sizes) all += size;
        static thread_local Scratch partial;
        partial.begin(Scratch::bytes<T>(n * all));
        T* sums = partial.take<T>(n * all);
        parallel([&](int64_t t, int64_t begin, int64_t end) {
            const int64_t rows = group * pixels;
            scratch.begin(Scratch::bytes<T>(padded) + Scratch::bytes<T>(k * k * C) + 2 * Scratch::bytes<T>(H * C) + Scratch::bytes<T>(rows * C) +
                          2 * Scratch::bytes<T>(tile * C) + Scratch::bytes<T>(tile * H));
            T *border = scratch.take<T>(padded), *w = scratch.take<T>(k * k * C), *w1 = scratch.take<T>(H * C), *w2 = scratch.take<T>(H * C);
            T *dy = scratch.take<T>(rows * C), *own_g = scratch.take<T>(tile * C), *dxhat = scratch.take<T>(tile * C), *da = scratch.take<T>(tile * H);
            T *g_dw = sums + t * all, *g_dw_bias = g_dw + sizes[0], *g_w1 = g_dw_bias + sizes[1], *g_b1 = g_w1 + sizes[2], *g_w2 = g_b1 + sizes[3],
              *g_b2 = g_w2 + sizes[4];
            std::memset(g_dw, 0, all * sizeof(T));
            taps(w, true);
            pack<T, W>(C, H, weight(s.w2, H * C), H, 1, w2);
            pack<T, V>(H, C, weight(s.w1, H * C), C, 1, w1);
            for (int64_t image = begin; image < end; image += group) {
                const int64_t last = std::min(end, image + group), first = image * pixels, many = (last - image) * pixels;
                for (int64_t r = 0; r < many; r += tile) {
                    const int64_t m = std::min(tile, many - r), row = first + r;
                    const T* gradient = g + row * C;
                    if (s.masks) {
                        const T* masks = weight(s.masks, N * pixels) + row;
                        for (int64_t q = 0; q < m; ++q)
                            for (int64_t c = 0; c < C; c += V) store<T, V>(own_g + q * C + c, load<T, V>(gradient + q * C + c) * masks[q]);
                        gradient = own_g;
                    }
                    add_columns<T, V>(m, C, gradient, g_b2);
                    product<T, W>(m, H, C, gradient, C, 1, w2, 0, true, da, H, nullptr, false);
                    T* dh = d + row * H;
                    for (int64_t j = 0; j < m * H; j += W) store<T, W>(dh + j, load<T, W>(dh + j) * load<T, W>(da + j));
                    add_columns<T, W>(m, H, dh, g_b1);
                    T* on_y = s.norm == NONE ? dy + r * C : dxhat;
                    product<T, V>(m, C, H, dh, H, 1, w1, 0, true, on_y, C, nullptr, false);
                    if (s.norm != NONE) standardise_backward<T, V>(m, C, s.norm, dxhat, xhat + row * C, inverse + row, dy + r * C);
                    product<T, W>(C, H, m, gradient, 1, C, a + row * H, H, false, g_w2, H, nullptr, true);
                    product<T, W>(C, H, m, xhat + row * C, 1, C, dh, H, false, g_w1, H, nullptr, true);
                }
                for (int64_t image_ = image; image_ < last; ++image_) {
                    const int64_t at = image_ * pixels * C;
                    const T* own = dy + (image_ - image) * pixels * C;
                    add_columns<T, V>(pixels, C, own, g_dw_bias);
                    pad(s.height, s.width, C, k, x + at, border);
                    (k == 3 ? convolve_weights<T, V, 3> : convolve_weights<T, V, 0>)(s.height, s.width, C, k, border, own, g_dw);
                    pad(s.height, s.width, C, k, own, border);
                    (k == 3 ? convolve<T, V, 3> : convolve<T, V, 0>)(s.height, s.width, C, k, border, w, nullptr, s.skip ? g + at : nullptr, dx + at);
                }
            }
        });
        for (int64_t t = 1; t < n; ++t)
            for (int64_t j = 0; j < all; ++j) sums[j] += sums[t * all + j];
        T* into = gradient(s.g_dw, C * k * k);
        for (int64_t c = 0; c < C; ++c)
            for (int64_t t = 0; t < k * k; ++t) into[c * k * k + t] = sums[t * C + c];
        void* const targets[6] = {nullptr, s.g_dw_bias, s.g_w1, s.g_b1, s.g_w2, s.g_b2};
        for (int q = 0, at = 0; q < 6; at += sizes[q++])
            if (targets[q]) std::memcpy(gradient(targets[q], sizes[q]), sums + at, sizes[q] * sizeof(T));
    }
};

// ------------------------------------------------------------------------------------------------------------ observer

// Sum of f(value) in double precision: a vanishing gradient's squares leave float's range long before it does.
template <class T, class Function>
double sum_of(int64_t count, const T* values, Function f) {
    double sums[16] = {}, sum = 0;
    int64_t j = 0;
    for (; j + 16 <= count; j += 16)
        for (int l = 0; l < 16; ++l) sums[l] += f(double(values[j + l]));
    for (; j < count; ++j) sum += f(double(values[j]));
    for (double part : sums) sum += part;
    return sum;
}

// out: the norm of g; mean and root mean square deviation of x; for each of 4C units the rows whose |d| is below the limit. x, d may be null.
template <class T>
void observe(const Stack& s, const T* g, const T* x, const T* d, T limit, double* out) {
    const int64_t rows = s.images * s.height * s.width, count = rows * s.channels, units = 4 * s.channels;
    out[0] = std::sqrt(sum_of(count, g, [](double v) { return v * v; }));
    if (x) {
        const double mean = out[1] = sum_of(count, x, [](double v) { return v; }) / count;
        out[2] = std::sqrt(sum_of(count, x, [mean](double v) { return (v - mean) * (v - mean); }) / count);
    }
    if (!d) return;
    T* counts = (scratch.begin(Scratch::bytes<T>(units)), scratch.take<T>(units));
    for (double* unit = out + 3; unit < out + 3 + units; ++unit) *unit = 0;
    for (int64_t first = 0; first < rows; first += 4096) {  // float counts exactly to 2^24
        std::memset(counts, 0, units * sizeof(T));
        for (const T* row = d + first * units; row < d + std::min(rows, first + 4096) * units; row += units)
            for (int64_t u = 0; u < units; ++u) counts[u] += std::abs(row[u]) < limit ? T(1) : T(0);
        for (int64_t u = 0; u < units; ++u) out[3 + u] += counts[u];
    }
}

// half += sign * out, which is rounded first where `shift` is not 0; copy = half. Each thread takes whole images.
template <class T, class Half>
void couple(const Stack& s, int64_t sign, double shift, Half* half, const T* out, T* copy) {
    const int64_t count = s.images * s.height * s.width * s.channels, threads = std::max<int64_t>(1, std::min(s.threads, s.images));
#pragma omp parallel for num_threads(threads) if (threads > 1 && count > 16384)
    for (int64_t j = 0; j < count; ++j) {
        half[j] += Half(sign) * (Half(out[j]) + Half(shift) - Half(shift));
        copy[j] = T(half[j]);
    }
}

template <class T, class Work>
void with_width(int64_t channels, Work work) {
    constexpr int MOST = BYTES / sizeof(T);
    if (channels % MOST == 0) return work(std::integral_constant<int, MOST>());
    if (MOST > 8 && channels % 8 == 0) return work(std::integral_constant<int, 8>());
    if (MOST > 4 && channels % 4 == 0) return work(std::integral_constant<int, 4>());
    return work(std::integral_constant<int, 1>());
}

template <class Work>
void with_type(const Stack& s, Work work) {
    if (s.float64) with_width<double>(s.channels, [&](auto v) { work(double{}, v); });
    else with_width<float>(s.channels, [&](auto v) { work(float{}, v); });
}

// 0, or 1 where there was not enough memory: no exception leaves the library.
template <class Work>
int code_of(Work work) {
    try {
        work();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace

extern "C" {

int deepscale_forward(const Stack* s, int64_t i, const void* x, void* out, void* xhat, void* inverse, void* d, void* a) {
    return code_of([&] {
        with_type(*s, [&](auto zero, auto v) {
            using T = decltype(zero);
            Block<T, decltype(v)::value>(*s, i).forward((const T*)x, (T*)out, (T*)xhat, (T*)inverse, (T*)d, (T*)a);
        });
    });
}

int deepscale_observe(const Stack* s, const void* g, const void* x, const void* d, double limit, double* out) {
    return code_of([&] {
        if (s->float64) observe(*s, (const double*)g, (const double*)x, (const double*)d, limit, out);
        else observe(*s, (const float*)g, (const float*)x, (const float*)d, float(limit), out);
    });
}

int deepscale_couple(const Stack* s, int64_t sign, int64_t wide, double shift, void* half, const void* out, void* copy) {
    if (s->float64) couple(*s, sign, 0.0, (double*)half, (const double*)out, (double*)copy);
    else if (wide) couple(*s, sign, shift, (double*)half, (const float*)out, (float*)copy);
    else couple(*s, sign, 0.0, (float*)half, (const float*)out, (float*)copy);
    return 0;
}

int deepscale_backward(const Stack* s, int64_t i, const void* g, const void* x, const void* xhat, const void* inverse, void* d, const void* a,
                       void* dx) {
    return code_of([&] {
        with_type(*s, [&](auto zero, auto v) {
            using T = decltype(zero);
            Block<T, decltype(v)::value>(*s, i).backward((const T*)g, (const T*)x, (const T*)xhat, (const T*)inverse, (T*)d, (const T*)a, (T*)dx);
        });
    });
}
}
