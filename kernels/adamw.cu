// AdamW with decoupled decay and bias correction (Loshchilov & Hutter 2019; as in PyTorch), gradient norm and clip, all on
// the device and over one flat f32 buffer of n elements.
//
//   g' = g · unscale                                         unscale = 1 / loss scale, 1 without loss scaling
//   norm = sqrt(Σ g'²),  clip = min(1, max_norm / (norm + 1e-6))
//   m = β₁ m + (1 − β₁) clip g',   v = β₂ v + (1 − β₂) (clip g')²
//   p = p (1 − rate · decay) − rate / c₁ · m / (sqrt(v) / sqrt(c₂) + ε),      c₁ = 1 − β₁ᵗ, c₂ = 1 − β₂ᵗ
//
// LoRA+ (Hayou et al. 2024): the parameters of Bs have b_ratio times the rate. As and Bs take turns in the buffer: run_ends
// holds the end of each such run, the first of As; run_count 0: one rate for all.
//
// The norm takes two stages in a fixed order: grad_norm_partials leaves one f32 sum a block, each thread adding strided
// elements in order; grad_norm_finish adds those in f64. What changes from step to step lies in device memory (`scalars`),
// so that a whole step can be one CUDA graph. A norm that is not finite changes nothing and sets *flag.
#include "common/block_sum.h"
#include "common/halves.h"

constexpr int adamw_threads = 256;

// Layout of `scalars`; the host writes the first four, grad_norm_finish the last two.
namespace scalar {
enum { learning_rate, first_correction, second_correction, unscale, norm, clip_factor };
}

// Grid: as many blocks as `partials` has elements; the result depends on that number, not on the schedule.
extern "C" __global__ void __launch_bounds__(adamw_threads)
    grad_norm_partials(const float* __restrict__ gradients, const float* __restrict__ scalars,
                       float* __restrict__ partials, long long count) {
    SHARED_ARRAY(float, warp_partials, [max_warps_per_block]);
    const long long stride = static_cast<long long>(gridDim.x) * adamw_threads;
    const float scale = scalars[scalar::unscale];
    float sum = 0.f;
    for (long long i = static_cast<long long>(blockIdx.x) * adamw_threads + threadIdx.x; i < count; i += stride) {
        const float gradient = gradients[i] * scale;
        sum += gradient * gradient;
    }
    sum = block_sum(sum, warp_partials);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}
REGISTER_KERNEL(grad_norm_partials);

// One thread of one block: a few hundred additions. max_norm may be infinite: never clips.
extern "C" __global__ void __launch_bounds__(32)
    grad_norm_finish(const float* __restrict__ partials, float* __restrict__ scalars, unsigned* flag, int partial_count,
                     float max_norm) {
    if (threadIdx.x != 0) return;
    double sum = 0.;
    for (int i = 0; i < partial_count; i++) sum += partials[i];
    const float total_norm = static_cast<float>(sqrt(sum));
    const bool finite = total_norm <= 3.402823466e+38f;  // false for NaN too
    scalars[scalar::norm] = total_norm;
    scalars[scalar::clip_factor] = fminf(1.f, max_norm / (total_norm + 1e-6f));
    if (!finite) *flag = 1u;
}
REGISTER_KERNEL(grad_norm_finish);

// Whether i lies in a run of Bs. All threads of a warp look at the same ends, but for those where a run ends.
DEVICE bool is_in_b(const long long* __restrict__ run_ends, int run_count, long long i) {
    int first = 0, last = run_count;  // the number of ends at or before i is in [first, last]
    while (first < last) {
        const int middle = (first + last) / 2;
        if (run_ends[middle] <= i) {
            first = middle + 1;
        } else {
            last = middle;
        }
    }
    return first & 1;
}

template <class T>
DEVICE void adamw(float* __restrict__ parameters, float* __restrict__ first_moment, float* __restrict__ second_moment,
                  T* __restrict__ half_parameters, const float* __restrict__ gradients,
                  const float* __restrict__ scalars, long long count, float beta1, float one_minus_beta1,
                  float beta2, float one_minus_beta2, float epsilon, float weight_decay,
                  const long long* __restrict__ run_ends, int run_count, float b_ratio) {
    if (!(scalars[scalar::norm] <= 3.402823466e+38f)) return;
    const long long i = static_cast<long long>(blockIdx.x) * adamw_threads + threadIdx.x;
    if (i >= count) return;
    const float rate = scalars[scalar::learning_rate] * (is_in_b(run_ends, run_count, i) ? b_ratio : 1.f);
    const float gradient = gradients[i] * (scalars[scalar::unscale] * scalars[scalar::clip_factor]);
    const float m = beta1 * first_moment[i] + one_minus_beta1 * gradient;
    const float v = beta2 * second_moment[i] + one_minus_beta2 * gradient * gradient;
    const float root = sqrtf(v) / sqrtf(scalars[scalar::second_correction]) + epsilon;
    const float decayed = parameters[i] * (1.f - rate * weight_decay);
    const float parameter = decayed - rate / scalars[scalar::first_correction] * (m / root);
    first_moment[i] = m;
    second_moment[i] = v;
    parameters[i] = parameter;
    half_parameters[i] = from_float<T>(parameter);
}
// 1 − β comes from the host: in f32 0.999 is off by 1e-8, and 1 − 0.999 by 1e-5 of itself. Grid: ceil(count / 256) blocks.
EXPORT_HALF_KERNELS(adamw, adamw_threads,
                    (float* parameters, float* first_moment, float* second_moment, T* half_parameters,
                     const float* gradients, const float* scalars, long long count, float beta1, float one_minus_beta1,
                     float beta2, float one_minus_beta2, float epsilon, float weight_decay, const long long* run_ends,
                     int run_count, float b_ratio),
                    (parameters, first_moment, second_moment, half_parameters, gradients, scalars, count, beta1,
                     one_minus_beta1, beta2, one_minus_beta2, epsilon, weight_decay, run_ends, run_count, b_ratio))
