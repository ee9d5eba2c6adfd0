//! Architecture families, and what `config.json` leaves to them.

/// Architecture families; each is a decoder of RMSNorm, RoPE attention with grouped heads, and a gated MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// Llama 2 and 3, SmolLM2 and others of that shape.
    Llama,
    /// Mistral 7B and its like: Llama with a sliding window in every layer.
    Mistral,
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3: RMSNorm on each head of q and k.
    Qwen3,
    /// Gemma: embeddings times √H, norms by 1 + w, GELU.
    Gemma,
    /// Gemma 2: also norms behind attention and MLP, soft caps, every other layer with a sliding window.
    Gemma2,
    /// The text models of Gemma 3: norms on the heads of q and k instead of soft caps, a RoPE of their own for the layers
    /// with a window.
    Gemma3,
    /// Phi-3, 3.5, 4 and 4-mini: Llama with fused linears, long-context RoPE, heads that are rotated in part.
    Phi3,
}

/// Which layers have the sliding window where `layer_types` does not say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WindowPattern {
    /// None, whatever `sliding_window` says.
    Never,
    /// All.
    Always,
    /// With `use_sliding_window`, those from `max_window_layers` on.
    FromMaxWindowLayers,
    /// All but one in so many (Gemma 3: in `sliding_window_pattern`, where that is given).
    AllBut(usize),
}

impl Family {
    pub(super) const ALL: [Family; 8] = [
        Family::Llama,
        Family::Mistral,
        Family::Qwen2,
        Family::Qwen3,
        Family::Gemma,
        Family::Gemma2,
        Family::Gemma3,
        Family::Phi3,
    ];

    /// The family's `model_type` in `config.json`.
    pub const fn model_type(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
            Family::Gemma => "gemma",
            Family::Gemma2 => "gemma2",
            Family::Gemma3 => "gemma3_text",
            Family::Phi3 => "phi3",
        }
    }

    pub(super) fn is_gemma(self) -> bool {
        matches!(self, Family::Gemma | Family::Gemma2 | Family::Gemma3)
    }

    /// Whether scores are scaled by `query_pre_attn_scalar`, and there are norms behind attention and MLP.
    pub(super) fn is_gemma_2_or_3(self) -> bool {
        matches!(self, Family::Gemma2 | Family::Gemma3)
    }

    /// The head width where `head_dim` is not given; none: hidden_size / num_attention_heads.
    pub(super) fn default_head_dim(self) -> Option<usize> {
        match self {
            Family::Qwen3 => Some(128),
            family if family.is_gemma() => Some(256),
            _ => None,
        }
    }

    /// θ of RoPE where it is not given.
    pub(in crate::model) fn default_theta(self) -> f64 {
        if self == Family::Gemma3 { 1e6 } else { 1e4 }
    }

    /// The soft caps on scores and on logits where they are not given.
    pub(super) fn default_soft_caps(self) -> [Option<f64>; 2] {
        if self == Family::Gemma2 { [Some(50.0), Some(30.0)] } else { [None; 2] }
    }

    /// The window where `sliding_window` is not given.
    pub(super) fn default_window(self) -> Option<usize> {
        if self == Family::Phi3 { None } else { Some(4096) }
    }

    pub(super) fn window_pattern(self) -> WindowPattern {
        match self {
            Family::Llama | Family::Gemma => WindowPattern::Never,
            Family::Mistral | Family::Phi3 => WindowPattern::Always,
            Family::Qwen2 | Family::Qwen3 => WindowPattern::FromMaxWindowLayers,
            Family::Gemma2 => WindowPattern::AllBut(2),
            Family::Gemma3 => WindowPattern::AllBut(6),
        }
    }
}
