// What a norm's weight does to a normalised value: rounded to T before × w, as Hugging Face's LlamaRMSNorm, or, where the
// weight is stored as its distance from an offset, × (offset + w) without that rounding, as its GemmaRMSNorm.
#pragma once
#include "halves.h"

template <class T>
DEVICE float weighted(float normalised, float weight, float offset) {
    return offset == 0.f ? rounded<T>(normalised) * weight : normalised * (offset + weight);
}
