// The functions of gated activations (Shazeer 2020): SiLU ("SwiGLU") and GELU by tanh ("GeGLU", Gemma), with their slopes.
//
//   SiLU       f(g) = g · σ(g),  σ(g) = 1 / (1 + e^−g),  f'(g) = σ(g) · (1 + g · (1 − σ(g)))
//   GELU       f(g) = g · (1 + tanh(y)) / 2 = g · σ(2y),  y = c · (g + a · g³),  c = sqrt(2/π), a = 0.044715 (Hendrycks &
//              Gimpel 2016),  f'(g) = σ(2y) · (1 + g · (1 − σ(2y)) · 2c · (1 + 3a · g²))
#pragma once
#include "../ptx/math.h"
#include "halves.h"

struct Activation {
    float value, slope;
};

DEVICE float sigmoid(float x) { return reciprocal_fast(1.f + exp_fast(-x)); }

struct Silu {
    static __device__ __forceinline__ Activation at(float g) {
        const float s = sigmoid(g);
        return {g * s, s * (1.f + g * (1.f - s))};
    }
};

struct GeluTanh {
    static __device__ __forceinline__ Activation at(float g) {
        constexpr float twice_c = 2.f * 0.79788456080286535588f, a = 0.044715f;
        const float s = sigmoid(twice_c * (g + a * g * g * g));
        return {g * s, s * (1.f + g * (1.f - s) * twice_c * (1.f + 3.f * a * g * g))};
    }
};

// Turns g and u of act = f(g) · u into their gradients; returns act.
template <class F>
DEVICE float gated_gradient(float& g, float& u, float dact) {
    const Activation activation = F::at(g);
    const float act = activation.value * u;
    g = dact * u * activation.slope;
    u = dact * activation.value;
    return act;
}
