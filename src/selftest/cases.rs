//! The one table of cases: small awkward shapes for every backend, and the shapes of real models.

use super::operations::{AttentionCase, CachedCase, Case, LinearCase, MlpCase};
use crate::backend::Activation;

/// How much a backend is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Small shapes with ragged ends: seconds, also on the emulator.
    Quick,
    /// And the shapes of small models over a few hundred tokens: minutes on a CPU.
    Cpu,
    /// And over thousands.
    Gpu,
}

/// One row, tails in every dimension, several tiles and stretches of a sum, ranks 1 to 256, groups of heads 1 to 8.
const QUICK: &[Case] = &[
    Case::RmsNorm { rows: 1, width: 64 },
    Case::RmsNorm { rows: 7, width: 576 },
    Case::RmsNorm { rows: 33, width: 1536 },
    Case::Gated { activation: Activation::Silu, rows: 1, width: 64 },
    Case::Gated { activation: Activation::Silu, rows: 37, width: 1544 },
    Case::Gated { activation: Activation::GeluTanh, rows: 37, width: 1544 },
    Case::Rows { lengths: &[4, 1, 60, 2], width: 576, vocabulary: 1000 },
    linear(&[1], 64, [(72, 1), (0, 0), (0, 0)]),
    linear(&[1], 576, [(576, 8), (192, 8), (192, 8)]),
    Case::Linear(LinearCase {
        lengths: &[100, 1, 29],
        in_features: 200,
        projections: [(136, 16), (64, 0), (64, 3)],
        bias: true,
        dropout: 0.3,
    }),
    linear(&[65], 1536, [(264, 256), (0, 0), (0, 0)]),
    linear(&[520], 64, [(64, 16), (0, 0), (0, 0)]),
    mlp(&[1], 64, 72, [1, 1, 1]),
    Case::Mlp(MlpCase { dropout: 0.3, ..plain_mlp(&[100, 1, 29], 64, 200, [16, 3, 8]) }),
    Case::Mlp(MlpCase { activation: Activation::GeluTanh, ..plain_mlp(&[70], 136, 264, [0, 33, 20]) }),
    // More ranks than CUDA's fused kernels hold.
    mlp(&[40], 64, 72, [80, 4, 0]),
    attention(&[1], [1, 1, 64]),
    attention(&[70, 3, 49], [4, 2, 64]),
    Case::Attention(AttentionCase { window: Some(5), ..AttentionCase::plain(&[66, 64], [3, 3, 80]) }),
    Case::Attention(AttentionCase { norms: true, ..AttentionCase::plain(&[97], [8, 1, 128]) }),
    Case::Attention(AttentionCase {
        soft_cap: Some(2.0),
        rotated: Some(72),
        ..AttentionCase::plain(&[70, 3], [2, 1, 96])
    }),
    Case::Cached(CachedCase { position: 0, rows: 1, heads: [4, 2, 64] }),
    Case::Cached(CachedCase { position: 100, rows: 3, heads: [6, 1, 80] }),
    Case::Head { tokens: 3, vocabulary: 50, width: 64, soft_cap: None },
    Case::Head { tokens: 60, vocabulary: 1031, width: 136, soft_cap: None },
    Case::Head { tokens: 60, vocabulary: 1031, width: 136, soft_cap: Some(3.0) },
    Case::AdamW { count: 1 },
    Case::AdamW { count: 40_003 },
];

/// What the models' own shapes leave out.
const LARGE: &[Case] = &[
    linear(&[8192], 576, [(1536, 1), (1536, 1), (0, 0)]),
    linear(&[1500, 548], 576, [(1536, 256), (1536, 256), (0, 0)]),
    attention(&[1500, 548], [8, 8, 80]),
    Case::Attention(AttentionCase {
        window: Some(512),
        norms: true,
        ..AttentionCase::plain(&[2048], [32, 8, 128])
    }),
    attention(&[8192], [9, 3, 64]),
    Case::Cached(CachedCase { position: 8000, rows: 1, heads: [32, 8, 128] }),
];

const fn linear(lengths: &'static [usize], in_features: usize, projections: [(usize, usize); 3]) -> Case {
    Case::Linear(LinearCase { lengths, in_features, projections, bias: false, dropout: 0.0 })
}

const fn plain_mlp(lengths: &'static [usize], hidden: usize, width: usize, ranks: [usize; 3]) -> MlpCase {
    MlpCase { lengths, hidden, width, ranks, activation: Activation::Silu, dropout: 0.0 }
}

const fn mlp(lengths: &'static [usize], hidden: usize, width: usize, ranks: [usize; 3]) -> Case {
    Case::Mlp(plain_mlp(lengths, hidden, width, ranks))
}

const fn attention(lengths: &'static [usize], heads: [usize; 3]) -> Case {
    Case::Attention(AttentionCase::plain(lengths, heads))
}

/// The cases of a scale.
pub fn cases(scale: Scale) -> Vec<Case> {
    let mut cases = QUICK.to_vec();
    let rank = 16;
    match scale {
        Scale::Quick => {}
        Scale::Cpu => cases.extend(SMOLLM2_135M.cases(&[400, 112], rank)),
        Scale::Gpu => {
            cases.extend(SMOLLM2_135M.cases(&[2048, 1500, 548], rank));
            cases.extend(QWEN2_5_1_5B.cases(&[2048], rank));
            cases.extend(QWEN2_5_1_5B.linears(&[1], rank));
            cases.extend(LARGE);
        }
    }
    cases
}

/// The sizes of a model's operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelShape {
    /// The model's name.
    pub name: &'static str,
    /// `H`.
    pub hidden: usize,
    /// `F`.
    pub intermediate: usize,
    /// Query heads, key-value heads, head width.
    pub heads: [usize; 3],
    /// `V`.
    pub vocabulary: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
}

/// HuggingFaceTB/SmolLM2-135M.
pub const SMOLLM2_135M: ModelShape = ModelShape {
    name: "SmolLM2-135M",
    hidden: 576,
    intermediate: 1536,
    heads: [9, 3, 64],
    vocabulary: 49_152,
    layers: 30,
    qkv_bias: false,
};

/// Qwen/Qwen2.5-1.5B.
pub const QWEN2_5_1_5B: ModelShape = ModelShape {
    name: "Qwen2.5-1.5B",
    hidden: 1536,
    intermediate: 8960,
    heads: [12, 2, 128],
    vocabulary: 151_936,
    layers: 28,
    qkv_bias: true,
};

/// meta-llama/Meta-Llama-3-8B.
pub const LLAMA_3_8B: ModelShape = ModelShape {
    name: "Llama-3-8B",
    hidden: 4096,
    intermediate: 14_336,
    heads: [32, 8, 128],
    vocabulary: 128_256,
    layers: 32,
    qkv_bias: false,
};

impl ModelShape {
    /// Every operation of a training step, and one of decoding, over samples of these lengths with adapters on every linear.
    pub fn cases(&self, lengths: &'static [usize], rank: usize) -> Vec<Case> {
        let tokens: usize = lengths.iter().sum();
        let Self { hidden, intermediate, heads, vocabulary, .. } = *self;
        let mut cases = vec![
            Case::Rows { lengths, width: hidden, vocabulary },
            Case::RmsNorm { rows: tokens, width: hidden },
            Case::Gated { activation: Activation::Silu, rows: tokens, width: intermediate },
            mlp(lengths, hidden, intermediate, [rank; 3]),
            attention(lengths, heads),
            Case::Cached(CachedCase { position: tokens - 1, rows: 1, heads }),
            Case::Head { tokens, vocabulary, width: hidden, soft_cap: None },
            Case::AdamW { count: self.adapter_parameters(rank) },
        ];
        cases.extend(self.linears(lengths, rank));
        cases
    }

    /// q|k|v, o, gate|up and down.
    pub fn linears(&self, lengths: &'static [usize], rank: usize) -> Vec<Case> {
        let Self { hidden, intermediate, heads: [queries, keys, dim], qkv_bias, .. } = *self;
        let group = |in_features, projections: [usize; 3], bias| {
            let projections = projections.map(|out| (out, if out > 0 { rank } else { 0 }));
            Case::Linear(LinearCase { lengths, in_features, projections, bias, dropout: 0.0 })
        };
        vec![
            group(hidden, [queries * dim, keys * dim, keys * dim], qkv_bias),
            group(queries * dim, [hidden, 0, 0], false),
            group(hidden, [intermediate, intermediate, 0], false),
            group(intermediate, [hidden, 0, 0], false),
        ]
    }

    fn adapter_parameters(&self, rank: usize) -> usize {
        let widths = self.linears(&[1], rank).into_iter().map(|case| match case {
            Case::Linear(LinearCase { in_features, projections, .. }) => {
                projections.iter().filter(|(out, _)| *out > 0).map(|(out, _)| in_features + out).sum()
            }
            _ => 0,
        });
        self.layers * rank * widths.sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_have_as_many_parameters_as_peft_counts() {
        // PEFT's print_trainable_parameters, all linears, r = 16.
        for (shape, count) in
            [(SMOLLM2_135M, 4_884_480), (QWEN2_5_1_5B, 18_464_768), (LLAMA_3_8B, 41_943_040)]
        {
            assert_eq!(shape.adapter_parameters(16), count, "{}", shape.name);
        }
    }
}
