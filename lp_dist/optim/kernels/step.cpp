// The step of LpAdamW, LpSGD and LpLion on a CPU, in one pass over memory; built and called by cpu.py.
//
// A thread walks over blocks of 256 weights. A block fits in the first cache together with its buffers, and each phase
// is a short loop over it: short loops keep a core's units busy where one long chain of a logarithm and an exponential
// would wait for itself. While a block is computed, the next one is fetched. All loops have a constant length, so the
// compiler makes vectors of them, and no value depends on where in a tensor (or shard) its weight lies: contraction is
// off, every fma is written out, and the rest of a tensor goes through a padded block.
//
// Denormals are zero in here, in and out, since a model in the middle of its collapse is full of them and they are
// slow: a weight below 1.2e-38 counts as dead.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace {

constexpr int B = 256;
constexpr float SMALLEST = 1.17549435e-38f, LARGEST = 3.40282347e38f;    // normal numbers
constexpr double LEAST_PULL = 1e-12;

#define FMA __builtin_fmaf

inline float as_float(int32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; }
inline int32_t as_int(float f) { int32_t bits; std::memcpy(&bits, &f, 4); return bits; }
inline float magnitude(float f) { return as_float(as_int(f) & 0x7fffffff); }

// Runs body(i) for a whole block, and meanwhile fetches another one.
template <class Body> inline __attribute__((always_inline)) void sweep(const float* next, Body body) {
    for (int start = 0; start < B; start += 32) {
        __builtin_prefetch(next + start);
        __builtin_prefetch(next + start + 16);
#pragma GCC ivdep
        for (int i = start; i < start + 32; i++) body(i);
    }
}

template <class Body> inline __attribute__((always_inline)) void sweep(Body body) {
#pragma GCC ivdep
    for (int i = 0; i < B; i++) body(i);
}

// -- what cpu.py hands over: these orders are its own ------------------------

enum Type { F32, BF16, F16 };
enum Base { ADAMW, SGD, LION };

struct Row {
    int64_t w, g, m, v;         // addresses; m and v are 0 where the base has none
    int64_t elements;
    int64_t type, grad_type;    // of the weights and the state; of the gradient
    int64_t values;             // which Values
    int64_t step;
};

struct Values {
    double lr, beta1, beta2, eps, momentum, nesterov, maximize, weight_decay, p, l2, gamma, cutoff, regrowth_below,
        snap, latent;
    double kept, of, ranked; // the pattern's N and M, or 0; ranked: not a step, but what it would rank by goes into w
};

// -- what a row needs, in single precision -----------------------------------

enum Power { NONE, FROZEN, HALVES, ANY };

struct Plan {
    Base base_optimizer;
    float sign, lerp1, lerp2, beta2, one_minus_beta2, bc2, inv_bc2, eps, step, plain,
        momentum; // plain: the step without momentum
    bool nesterov, latent;
    Power power;
    int halves, gamma_halves;                           // 2·(2−p) if power is HALVES; 2γ, or OTHER_GAMMA
    float k;                                            // (αλ)^(1/(2−p))
    float L_hi, L_lo, c, c_hi, c_lo, y, y_hi, y_lo;     // log2(αλ), 2−p and γ: see power_any
    float least, most; // αλ/x at the cutoff, below which it counts as 0, and at regrowth_below, where it stays
    float at_zero, base, inv_base;
    int kept, of; // of each block of so many weights the ones with the smallest αλ/x have none; of = 0: no blocks
    bool ranked;
    int32_t snap; // bits of the largest magnitude that becomes zero; −1: none does
};

constexpr int OTHER_GAMMA = -1;                         // γ is no multiple of ½ up to 2

// x = high + low, with high a multiple of 2^-9, so that its products with whole numbers are exact.
void split(double x, float& high, float& low) {
    high = static_cast<float>(std::nearbyint(x * 512) / 512);
    low = static_cast<float>(x - high);
}

float clamped(double x, double low, double high) { return static_cast<float>(x < low ? low : x > high ? high : x); }

Plan plan_of(const Values& a, Base base, int64_t step) {
    Plan s{};
    s.base_optimizer = base;
    s.sign = a.maximize ? -1.f : 1.f;
    s.nesterov = a.nesterov != 0;
    s.momentum = static_cast<float>(a.momentum);
    s.lerp1 = static_cast<float>(1 - a.beta1);
    s.lerp2 = static_cast<float>(1 - a.beta2);
    s.beta2 = static_cast<float>(a.beta2);
    s.one_minus_beta2 = static_cast<float>(1 - a.beta2);
    const double bc2 = std::sqrt(1 - std::pow(a.beta2, double(step)));
    s.bc2 = static_cast<float>(bc2);
    s.inv_bc2 = static_cast<float>(1 / bc2);
    s.eps = static_cast<float>(a.eps);
    s.plain = static_cast<float>(-a.lr);
    s.step = static_cast<float>(-a.lr / (base == ADAMW ? 1 - std::pow(a.beta1, double(step)) : 1));

    s.kept = static_cast<int>(a.kept);
    s.of = static_cast<int>(a.of);
    s.ranked = a.ranked != 0;
    s.latent = base == ADAMW && a.latent != 0 && a.weight_decay > 0 && a.cutoff > 0;
    // Its pull tells whether a weight is latent, so where α = 0 there is one that changes no weight.
    const double strength = std::max(a.lr * a.weight_decay, s.latent ? a.cutoff * LEAST_PULL : 0), exponent = 2 - a.p;
    const bool active = strength > 0;
    s.base = clamped(1 + a.lr * a.l2, 1, LARGEST);
    s.inv_base = 1 / s.base;
    s.snap = active && exponent > 0 ? as_int(static_cast<float>(a.snap)) : -1;
    s.power = !active || (a.cutoff == 0 && exponent <= 0) ? NONE : a.cutoff == 0 ? FROZEN : ANY;
    if (s.power != ANY) return s;

    const double bounded = clamped(strength, SMALLEST, LARGEST);
    s.least = static_cast<float>(bounded / a.cutoff);
    s.most = a.regrowth_below > 0 ? clamped(bounded / a.regrowth_below, 0, LARGEST) : INFINITY;
    s.at_zero = exponent > 0 ? INFINITY : exponent < 0 ? 0 : static_cast<float>(bounded);
    const bool in_halves = a.gamma * 2 == std::floor(a.gamma * 2) && a.gamma <= 2;
    s.gamma_halves = in_halves ? static_cast<int>(a.gamma * 2) : OTHER_GAMMA;
    const double k = exponent == 0 ? bounded : std::pow(bounded, 1 / exponent);
    if (exponent >= 0 && exponent <= 3.5 && exponent * 2 == std::floor(exponent * 2) && in_halves && k >= SMALLEST &&
        k <= LARGEST) {
        s.power = HALVES;
        s.halves = static_cast<int>(exponent * 2);
        s.k = static_cast<float>(k);
    }
    s.c = static_cast<float>(exponent);
    s.y = static_cast<float>(a.gamma);
    split(std::log2(bounded), s.L_hi, s.L_lo);
    split(exponent, s.c_hi, s.c_lo);
    split(a.gamma, s.y_hi, s.y_lo);
    return s;
}

// -- phases ------------------------------------------------------------------
// Buffers of a block: N and D, the stepped weight as a fraction; S, the decay's αλ/x. L, the weights or what is latent
// of them. Two more in between.

struct Buffers { alignas(64) float w[B], g[B], m[B], v[B], N[B], D[B], S[B], E[B], Z[B], E2[B], Z2[B], L[B]; };

void moments_adam(const Plan& s, const float* w, const float* g, float* m, float* v, Buffers& b, const float* next) {
    const float sign = s.sign, lerp = s.lerp1, beta2 = s.beta2, rest = s.one_minus_beta2, step = s.step, eps = s.eps;
    const float bc2 = s.bc2, inv_bc2 = s.inv_bc2, plain = s.plain;
    float *N = b.N, *D = b.D, *L = b.L;
    const auto moments = [=](int i, float& mi, float& vi) __attribute__((always_inline)) {
        const float gi = sign * g[i];
        mi = FMA(lerp, gi - m[i], m[i]);
        vi = FMA(rest * gi, gi, beta2 * v[i]);
        m[i] = mi;
        v[i] = vi;
    };
    if (s.power == NONE || s.power == FROZEN) sweep(next, [=](int i) {      // as torch's fused AdamW rounds it
        float mi, vi;
        moments(i, mi, vi);
        N[i] = w[i] + step * mi / (std::sqrt(vi) / bc2 + eps);
    });
    else if (s.latent)
        sweep(next, [=](int i) { // where w = 0 the latent weight is in m, and has no momentum
            const bool latent_now = magnitude(w[i]) == 0;
            const float now = latent_now ? m[i] : w[i];
            float mi, vi;
            moments(i, mi, vi);
            const float d = FMA(std::sqrt(vi), inv_bc2, eps);
            D[i] = d;
            L[i] = now;
            N[i] = FMA(now, d, latent_now ? plain * sign * g[i] : step * mi);
        });
    else sweep(next, [=](int i) {                                           // one division in all, the last phase's
        float mi, vi;
        moments(i, mi, vi);
        const float d = FMA(std::sqrt(vi), inv_bc2, eps);
        D[i] = d;
        N[i] = FMA(w[i], d, step * mi);
    });
}

void step_sgd(const Plan& s, const float* w, const float* g, float* m, Buffers& b, const float* next) {
    const float sign = s.sign, step = s.step, momentum = s.momentum;
    float* N = b.N;
    if (!m) sweep(next, [=](int i) { N[i] = FMA(step, sign * g[i], w[i]); });
    else if (!s.nesterov)
        sweep(next, [=](int i) {
            m[i] = momentum * m[i] + sign * g[i];
            N[i] = FMA(step, m[i], w[i]);
        });
    else sweep(next, [=](int i) {
        const float gi = sign * g[i];
        m[i] = momentum * m[i] + gi;
        N[i] = FMA(step, FMA(momentum, m[i], gi), w[i]);
    });
}

void step_lion(const Plan& s, const float* w, const float* g, float* m, Buffers& b, const float* next) {
    const float sign = s.sign, step = s.step, lerp1 = s.lerp1, lerp2 = s.lerp2;
    float* N = b.N;
    sweep(next, [=](int i) {
        const float gi = sign * g[i];
        const float c = FMA(lerp1, gi - m[i], m[i]);
        const float mi = FMA(lerp2, gi - m[i], m[i]);
        m[i] = mi;
        const float move = c > 0 ? step : c < 0 ? -step : 0.f;
        N[i] = w[i] + move + 0.f * mi;              // a nan shows: it has no sign
    });
}

// log2 of magnitudes as E + log2(1 + Z), E whole and 1 + Z in [√½, √2). For 0, something finite.
void exponents(const float* x, float* E, float* Z, const float* next) {
    sweep(next, [=](int i) {
        const int32_t bits = as_int(x[i]) & 0x7fffffff, off = bits - 0x3f3504f3;
        E[i] = static_cast<float>(off >> 23);
        Z[i] = as_float(bits - (off & ~0x7fffff)) - 1.f;
    });
}

// log2(1 + z), |error| < 5e-8 before rounding (minimax of degree 8 on [√½, √2) − 1)
void fraction(float* Z, const float* next) {
    sweep(next, [=](int i) {
        const float z = Z[i], z2 = z * z;
        const float even = FMA(FMA(FMA(0.23689046502113342f, z2, 0.28670743107795715f), z2, 0.48093944787979126f), z2,
                               1.4426947832107544f);
        const float odd = FMA(FMA(FMA(-0.14574451744556427f, z2, -0.2500690519809723f), z2, -0.36008721590042114f), z2,
                              -0.7213571667671204f);
        Z[i] = z * FMA(odd, z, even);
    });
}

// S = αλ·|w|^(p−2)·D^(−γ), as a power of two. Its exponent goes to hundreds, where single precision has no digits left
// for the fraction. So it is carried in two parts: a whole number of 1/512ths, which is exact, and a small rest.
void power_any(const Plan& s, const float* w, Buffers& b, const float* const next[4]) {
    float *S = b.S, *E = b.E, *Z = b.Z;
    const float L_hi = s.L_hi, L_lo = s.L_lo, c = s.c, c_hi = s.c_hi, c_lo = s.c_lo;
    exponents(w, E, Z, next[0]);
    fraction(Z, next[1]);
    // E + R = n + r, n whole and |r| <= 1/2; 2^n is made of the last bits of a sum with 1.5·2^23
    const auto reduce = [=](int i, float e, float r) __attribute__((always_inline)) {
        const float shifted = e + r + 12582912.f;
        const int32_t n = as_int(shifted), low = 0x4b400000 - 126, high = 0x4b400000 + 127;
        const int32_t at_least = n > low ? n : low;
        Z[i] = (e - (shifted - 12582912.f)) + r;
        E[i] = as_float((at_least < high ? at_least : high) << 23);
    };
    if (s.gamma_halves == OTHER_GAMMA) {
        const float y = s.y, y_hi = s.y_hi, y_lo = s.y_lo;
        float *E2 = b.E2, *Z2 = b.Z2;
        exponents(b.D, E2, Z2, next[2]);
        fraction(Z2, next[3]);
        sweep([=](int i) {
            reduce(i, FMA(-c_hi, E[i], FMA(-y_hi, E2[i], L_hi)),
                   FMA(-c_lo, E[i], FMA(-c, Z[i], FMA(-y_lo, E2[i], FMA(-y, Z2[i], L_lo)))));
        });
    } else {
        sweep(next[2], [=](int i) { reduce(i, FMA(-c_hi, E[i], L_hi), FMA(-c, Z[i], FMA(-c_lo, E[i], L_lo))); });
    }
    const float at_zero = s.at_zero, zero = c == 0 ? NAN : 0;   // for p = 2 nothing is special about zero
    sweep(next[3], [=](int i) {     // 2^r, relative error < 1e-7 before rounding
        const float r = Z[i], r2 = r * r;
        const float p01 = FMA(0.6931470036506653f, r, 1.f), p23 = FMA(0.05550733581185341f, r, 0.24022242426872253f);
        const float p45 = FMA(0.001326472731307149f, r, 0.009671512991189957f);
        const int32_t bits = as_int(FMA(FMA(p45, r2, p23), r2, p01)) + as_int(E[i]);
        S[i] = magnitude(w[i]) == zero ? at_zero : as_float(bits);
    });
}

// S = αλ·|w|^(p−2) for 2−p = HALVES/2, with nothing approximated: products of q = k/|w| and its root
template <int HALVES_> void power_halves(const Plan& s, const float* w, float* S, const float* next) {
    const float k = s.k, at_zero = s.at_zero;
    sweep(next, [=](int i) {
        const float a = magnitude(w[i]), q = HALVES_ ? k / a : k;
        float power = HALVES_ % 2 ? std::sqrt(q) : HALVES_ ? q : k;
        for (int n = HALVES_ % 2 ? 1 : 3; n < HALVES_; n += 2) power *= q;
        S[i] = a == 0 ? at_zero : power;
    });
}

// w_new = u/(1 + αλ2 + S/D^γ), or without S where it is below the cap, with u = N/D. D is 1 for bases without second
// moments. It goes into `to`.
template <bool ADAM, int GAMMA_HALVES> void decay(const Plan& s, float* to, const Buffers& b, const float* next) {
    const float *N = b.N, *D = b.D, *S = b.S;
    const float base = s.base, least = s.least, most = s.most;
    const int32_t snap = s.snap;
    sweep(next, [=](int i) {
        const float d = ADAM ? D[i] : 1.f, root = GAMMA_HALVES % 2 ? std::sqrt(d) : 1.f;
        const float power = GAMMA_HALVES == 0   ? 1.f
                            : GAMMA_HALVES == 1 ? root
                            : GAMMA_HALVES == 2 ? d
                            : GAMMA_HALVES == 3 ? d * root
                                                : d * d;
        const float limit = most * power, limited = S[i] < limit ? S[i] : limit;
        const float pull = S[i] < least * power ? 0.f : limited;
        float divisor = d * (base + pull);                  // D·(1 + αλ2 + S/D^γ)
        if (GAMMA_HALVES == 1) divisor = FMA(pull, root, base * d);
        if (GAMMA_HALVES == 2) divisor = FMA(base, d, pull);
        if (GAMMA_HALVES > 2) divisor = FMA(base, d, pull / (GAMMA_HALVES == 3 ? root : d));
        const float u = N[i] / divisor;
        to[i] = as_float((as_int(u) & 0x7fffffff) > snap ? as_int(u) : 0);
    });
}

// What is not beyond the cap after the step is zero in w, and itself in m. L: the decayed weights; S: their αλ/x.
template <int GAMMA_HALVES> void make_latent(const Plan& s, float* w, float* m, const Buffers& b, const float* next) {
    const float *D = b.D, *S = b.S, *L = b.L, least = s.least;
    sweep(next, [=](int i) {
        const float d = D[i], root = GAMMA_HALVES % 2 ? std::sqrt(d) : 1.f;
        const float power = GAMMA_HALVES == 0   ? 1.f
                            : GAMMA_HALVES == 1 ? root
                            : GAMMA_HALVES == 2 ? d
                            : GAMMA_HALVES == 3 ? d * root
                                                : d * d;
        const bool under = !(S[i] < least * power);
        m[i] = under ? L[i] : magnitude(w[i]) == 0 ? 0.f : m[i];
        w[i] = under ? L[i] * 0.f + 0.f : L[i];     // a nan shows
    });
}

template <bool FREEZE> void undecayed(const Plan& s, float* w, const Buffers& b, const float* next) {
    const float *N = b.N, inv_base = s.inv_base;
    const int32_t snap = s.snap;
    sweep(next, [=](int i) {
        const float u = N[i] * inv_base;
        const float kept = FREEZE && magnitude(w[i]) == 0 ? 0.f * u : u;   // a nan shows
        w[i] = FREEZE && (as_int(kept) & 0x7fffffff) <= snap ? 0.f : kept;
    });
}

void decay_adam(const Plan& s, float* to, const Buffers& b, const float* next) {
    switch (s.gamma_halves) {
        case 1: return decay<true, 1>(s, to, b, next);
        case 2: return decay<true, 2>(s, to, b, next);
        case 3: return decay<true, 3>(s, to, b, next);
        case 4: return decay<true, 4>(s, to, b, next);
        default: return decay<true, 0>(s, to, b, next);     // γ = 0, or S has it already
    }
}

void powers(const Plan& s, const float* w, Buffers& b, const float* const next[4]) {
    switch (s.power == HALVES ? s.halves : -1) {
        case 0: return power_halves<0>(s, w, b.S, next[1]);
        case 1: return power_halves<1>(s, w, b.S, next[1]);
        case 2: return power_halves<2>(s, w, b.S, next[1]);
        case 3: return power_halves<3>(s, w, b.S, next[1]);
        case 4: return power_halves<4>(s, w, b.S, next[1]);
        case 5: return power_halves<5>(s, w, b.S, next[1]);
        case 6: return power_halves<6>(s, w, b.S, next[1]);
        case 7: return power_halves<7>(s, w, b.S, next[1]);
        default: power_any(s, w, b, next);
    }
}

// Z = αλ/x, where D^γ is not in S yet; what a block is ranked by.
template <int GAMMA_HALVES> void rank(Buffers& b) {
    const float *D = b.D, *S = b.S;
    float* Z = b.Z;
    sweep([=](int i) {
        const float d = D[i], root = GAMMA_HALVES % 2 ? std::sqrt(d) : 1.f;
        const float power = GAMMA_HALVES == 0   ? 1.f
                            : GAMMA_HALVES == 1 ? root
                            : GAMMA_HALVES == 2 ? d
                            : GAMMA_HALVES == 3 ? d * root
                                                : d * d;
        Z[i] = S[i] / power;
    });
}

// S = 0 for the `kept` smallest Z of each M weights; of equal ones the earlier. The buffers are turned, so that each
// comparison is one over all blocks.
template <int M> void keep_smallest(int kept, Buffers& b) {
    constexpr int BLOCKS = B / M;
    float *S = b.S, *Z = b.Z;
    alignas(64) float turned[M][BLOCKS], ahead[M][BLOCKS];
    for (int k = 0; k < BLOCKS; k++) for (int j = 0; j < M; j++) turned[j][k] = Z[k * M + j];
    for (int j = 0; j < M; j++) for (int k = 0; k < BLOCKS; k++) ahead[j][k] = static_cast<float>(M - 1 - j);
    for (int j = 1; j < M; j++) for (int i = 0; i < j; i++) for (int k = 0; k < BLOCKS; k++) {
        const float one = turned[i][k] <= turned[j][k] ? 1.f : 0.f;     // the earlier goes ahead
        ahead[j][k] += one;
        ahead[i][k] -= one;
    }
    for (int k = 0; k < BLOCKS; k++)
        for (int j = 0; j < M; j++) S[k * M + j] = ahead[j][k] < kept ? 0.f : S[k * M + j];
}

void pattern(const Plan& s, float* w, Buffers& b) {
    switch (s.base_optimizer == ADAMW ? s.gamma_halves : 0) {
        case 1: rank<1>(b); break;
        case 2: rank<2>(b); break;
        case 3: rank<3>(b); break;
        case 4: rank<4>(b); break;
        default: rank<0>(b);
    }
    if (s.ranked) std::memcpy(w, b.Z, sizeof b.Z);
    else if (s.of == 1) std::memset(b.S, 0, sizeof b.S);
    else if (s.of == 4) keep_smallest<4>(s.kept, b);
    else if (s.of == 8) keep_smallest<8>(s.kept, b);
}

void block(const Plan& s, float* w, const float* g, float* m, float* v, Buffers& b, const float* const next[4]) {
    const bool adam = s.base_optimizer == ADAMW;
    if (adam) moments_adam(s, w, g, m, v, b, next[3]);
    else if (s.base_optimizer == LION) step_lion(s, w, g, m, b, next[2]);
    else step_sgd(s, w, g, m, b, next[2]);
    if (s.power == NONE) return undecayed<false>(s, w, b, next[0]);
    if (s.power == FROZEN) return undecayed<true>(s, w, b, next[0]);
    powers(s, s.latent ? b.L : w, b, next);
    if (s.of) pattern(s, w, b);
    if (s.ranked) return;
    if (!adam) return decay<false, 0>(s, w, b, next[0]);
    if (!s.latent) return decay_adam(s, w, b, next[0]);
    decay_adam(s, b.L, b, next[0]);
    powers(s, b.L, b, next);
    switch (s.gamma_halves) {
        case 1: return make_latent<1>(s, w, m, b, next[0]);
        case 2: return make_latent<2>(s, w, m, b, next[0]);
        case 3: return make_latent<3>(s, w, m, b, next[0]);
        case 4: return make_latent<4>(s, w, m, b, next[0]);
        default: return make_latent<0>(s, w, m, b, next[0]);
    }
}

// -- blocks that are not 256 floats: 16-bit tensors, and the rest of a tensor ---

void load(float* to, int64_t from, int64_t start, int n, int64_t type) {
    if (type == F32) {
        std::memcpy(to, reinterpret_cast<const float*>(from) + start, n * 4);
    } else {
        const uint16_t* half = reinterpret_cast<const uint16_t*>(from) + start;
        if (type == BF16) for (int i = 0; i < n; i++) to[i] = as_float(int32_t(half[i]) << 16);
        else for (int i = 0; i < n; i++) {
            const int32_t bits = half[i] & 0x7fff, sign = int32_t(half[i] & 0x8000) << 16;
            const int32_t normal = (bits << 13) + (112 << 23), infinite = (bits << 13) + (224 << 23);
            const int32_t small =
                as_int(static_cast<float>(bits) * 5.9604644775390625e-8f); // a denormal is a whole number of 2^-24
            to[i] = as_float((bits < 0x0400 ? small : bits < 0x7c00 ? normal : infinite) | sign);
        }
    }
    for (int i = n; i < B; i++) to[i] = 0;
}

void save(const float* from, int64_t to, int64_t start, int n, int64_t type) {
    if (type == F32) {
        std::memcpy(reinterpret_cast<float*>(to) + start, from, n * 4);
        return;
    }
    uint16_t* half = reinterpret_cast<uint16_t*>(to) + start;      // bf16: no other 16-bit weights come here
    for (int i = 0; i < n; i++) {
        const uint32_t bits = as_int(from[i]);
        const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        half[i] = (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded;
    }
}

void piece(const Row& row, const Plan& plan, int64_t start, Buffers& b) {
    const int n = row.elements - start < B ? row.elements - start : B;
    const bool whole = n == B && row.type == F32, grads = n == B && row.grad_type == F32;
    float* w = whole ? reinterpret_cast<float*>(row.w) + start : b.w;
    float* m = !row.m ? nullptr : whole ? reinterpret_cast<float*>(row.m) + start : b.m;
    float* v = !row.v ? nullptr : whole ? reinterpret_cast<float*>(row.v) + start : b.v;
    const float* g = grads ? reinterpret_cast<const float*>(row.g) + start : b.g;
    if (!whole) {
        load(b.w, row.w, start, n, row.type);
        if (row.m) load(b.m, row.m, start, n, row.type);
        if (row.v) load(b.v, row.v, start, n, row.type);
    }
    if (!grads) load(b.g, row.g, start, n, row.grad_type);
    const float* const next[4] = {w + B, g + B, m + B, v + B};
    block(plan, w, g, m, v, b, next);
    if (!whole) {
        save(b.w, row.w, start, n, row.type);
        if (row.m) save(b.m, row.m, start, n, row.type);
        if (row.v) save(b.v, row.v, start, n, row.type);
    }
}

// Flush-to-zero of this thread, for as long as one of these lives
struct Flush {
#if defined(__SSE2__)
    unsigned before = _mm_getcsr();
    Flush() { _mm_setcsr(before | 0x8040); }
    ~Flush() { _mm_setcsr(before); }
#elif defined(__aarch64__)
    uint64_t before;
    Flush() { asm volatile("mrs %0, fpcr" : "=r"(before)); asm volatile("msr fpcr, %0" ::"r"(before | (1u << 24))); }
    ~Flush() { asm volatile("msr fpcr, %0" ::"r"(before)); }
#endif
};

}  // namespace

extern "C" void lp_dist_step(int64_t base, int64_t count, const Row* rows, const Values* values, int64_t threads) {
    int64_t blocks = 0;
    for (int64_t r = 0; r < count; r++) blocks += (rows[r].elements + B - 1) / B;
    if (threads > blocks / 16 + 1) threads = blocks / 16 + 1;   // 4,096 weights are not worth a thread
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        Flush flush;
        Buffers buffers;
        int64_t at = blocks * omp_get_thread_num() / omp_get_num_threads();
        const int64_t end = blocks * (omp_get_thread_num() + 1) / omp_get_num_threads();
        int64_t first = 0;      // block with which the row starts
        for (int64_t r = 0; r < count && at < end; r++) {
            const int64_t last = first + (rows[r].elements + B - 1) / B;
            if (at < last) {
                const Plan plan = plan_of(values[rows[r].values], static_cast<Base>(base), rows[r].step);
                for (; at < last && at < end; at++) piece(rows[r], plan, (at - first) * B, buffers);
            }
            first = last;
        }
    }
}
