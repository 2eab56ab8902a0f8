#pragma once
#include "freemerge/dtype.h"
#include "freemerge/isa.h"

// tau_t = experts[t][i] - base[i]; a_t = clip(|tau_t|, lows[t], highs[t]); n_t = (a_t - lows[t]) / (highs[t] - lows[t]), of equal ones 0;
// scores B_t = exp(T n_t^2) tanh(tau_t S), S = sum_s tau_s, or normalized: sum_s sgn(tau_s) n_s
FREEMERGE_OP(void, balance_scores,
             // inputs
             const Source& base,          // [n]
             const Source* experts,       // [T] arrays of [n]
             const float* lows,           // [T]
             const float* highs,          // [T]
             int T, std::size_t n, bool normalized,
             // output
             float* out)                  // [T, n]

// W_t = (clip(B_t, floors[t], tops[t]) - floors[t]) / (tops[t] - floors[t]), of equal ones 0;
// out[i] = round( base[i] + sum_t weights[t] sgn(tau_t) a_t W_t / max(sum_t W_t, least) )
FREEMERGE_OP(void, add_balanced,
             // inputs
             const Source& base,          // [n]
             const Source* experts,       // [T] arrays of [n]
             const float* lows,           // [T]
             const float* highs,          // [T]
             const float* floors,         // [T]
             const float* tops,           // [T]
             const float* weights,        // [T]
             int T, std::size_t n, bool normalized, float least,
             // output
             const Target& out)           // [n], may be base itself
