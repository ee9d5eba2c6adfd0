//! The multiplications and additions that a training step cannot do without, counted from the model's shape and the batch.
//!
//! Matrix products alone: what is element-wise is bound by memory. A product `[m, k] · [k, n]` counts `2·m·k·n`; frozen
//! weights have no gradient; nothing is counted below the lowest that is trained, and the head for labelled rows alone.

use super::config::ModelConfig;
use super::lora::{LoraConfig, layer_groups};
use super::whole::{BlockNorm, WholePlace};
use crate::batch::Batch;
use crate::error::Result;

/// Operations of one step by part.
///
/// ```
/// use fastlora::batch::Batch;
/// use fastlora::config::TargetModules;
/// use fastlora::model::config::ModelConfig;
/// use fastlora::model::{LoraConfig, StepWork};
///
/// let config = ModelConfig::from_folder("tests/fixtures/tiny_qwen3")?;
/// let target_modules = TargetModules::Pattern("all-linear".into());
/// let lora = LoraConfig::new(4, 8.0, target_modules);
/// let mut batch = Batch::default();
/// batch.push(0, &[1, 2, 3], &[1, 2, 3]);
/// let work = StepWork::count(&config, &lora, &batch)?;
/// assert_eq!(work.head_forward, (2 * 2 * config.vocabulary * config.hidden_size) as f64);
/// # Ok::<(), fastlora::error::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepWork {
    /// Frozen linears, forward.
    pub linears_forward: f64,
    /// Frozen linears, gradients of their inputs.
    pub linears_backward: f64,
    /// Adapters, forward and backward.
    pub lora: f64,
    /// Scores and weighted values of the pairs that see each other.
    pub attention_forward: f64,
    /// Their gradients, the scores computed again: five products for the forward's two.
    pub attention_backward: f64,
    /// Logits.
    pub head_forward: f64,
    /// The gradient of their input.
    pub head_backward: f64,
    /// The gradient of the head itself, where it is trained.
    pub head_weight: f64,
}

impl StepWork {
    /// Counts a forward and backward of `batch` with the adapters of `lora`.
    ///
    /// # Errors
    /// Targets that match no module.
    pub fn count(config: &ModelConfig, lora: &LoraConfig, batch: &Batch) -> Result<Self> {
        let linears = lora.linears(config)?;
        let (tokens, labelled) = (batch.token_count() as f64, batch.labelled_count() as f64);
        let mut work = Self::default();
        let head = 2.0 * labelled * (config.vocabulary * config.hidden_size) as f64;
        (work.head_forward, work.head_backward) = (head, head);
        let whole: Vec<WholePlace> =
            lora.whole_modules(config)?.into_iter().map(|module| module.place).collect();
        if whole.contains(&WholePlace::Head) {
            work.head_weight = head;
        }
        // Whether something below wants the gradient that goes through here.
        let mut wanted = false;
        for (layer, groups) in layer_groups(config, &linears).enumerate() {
            let pairs = pairs_of(batch, config.windows[layer]);
            let attention = 4.0 * pairs * (config.query_heads * config.head_dim) as f64;
            work.attention_forward += attention;
            let trains = |norm| whole.contains(&WholePlace::Norm(layer, norm));
            for (place, group) in groups.into_iter().enumerate() {
                wanted |= place == 0 && trains(BlockNorm::Input);
                wanted |= place == 2 && (trains(BlockNorm::Attention) || trains(BlockNorm::Middle));
                let has_adapter = group.iter().any(|(_, lora)| lora.is_some());
                for (module, lora) in group {
                    let product = 2.0 * tokens * (module.in_features * module.out_features) as f64;
                    work.linears_forward += product;
                    work.linears_backward += if wanted { product } else { 0.0 };
                    if let Some(lora) = lora {
                        let [down, up] = [module.in_features, module.out_features]
                            .map(|width| 2.0 * tokens * (width * lora.rank) as f64);
                        // s and y; ds, dB and dA; dx.
                        work.lora += down + up + 2.0 * up + down + if wanted { down } else { 0.0 };
                    }
                }
                wanted |= has_adapter || place == 3 && trains(BlockNorm::Mlp);
                // Between q, k, v and o.
                if place == 0 && wanted {
                    work.attention_backward += 2.5 * attention;
                }
            }
        }
        Ok(work)
    }

    /// All of it.
    pub fn total(&self) -> f64 {
        self.linears_forward
            + self.linears_backward
            + self.lora
            + self.attention_forward
            + self.attention_backward
            + self.head_forward
            + self.head_backward
            + self.head_weight
    }
}

/// Pairs of a query and a key that it sees.
fn pairs_of(batch: &Batch, window: Option<usize>) -> f64 {
    let window = window.unwrap_or(usize::MAX);
    let lengths = batch.sample_starts.windows(2).map(|bounds| bounds[1] - bounds[0]);
    lengths
        .map(|length| {
            // The first positions see all before them, the others a window's.
            let (rising, length) = (length.min(window) as f64, length as f64);
            rising * (rising + 1.0) / 2.0 + (length - rising) * rising
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::TargetModules;

    fn config(
        hidden: usize,
        intermediate: usize,
        layers: usize,
        heads: [usize; 2],
        vocabulary: usize,
    ) -> ModelConfig {
        let text = json!({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden,
            "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1], "vocab_size": vocabulary, "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true, "hidden_act": "silu",
        });
        ModelConfig::from_json(&text.to_string(), "config.json").unwrap()
    }

    fn lora(targets: &str) -> LoraConfig {
        let target_modules = TargetModules::Pattern(targets.into());
        LoraConfig::new(16, 32.0, target_modules)
    }

    fn batch(length: usize) -> Batch {
        let mut batch = Batch::default();
        batch.push(0, &vec![1; length], &vec![1; length]);
        batch
    }

    /// By hand for 2048 tokens a sample, all linears at r = 16, every token labelled, in MFLOP a token.
    #[test]
    fn the_models_that_are_measured_take_what_was_counted_by_hand() {
        for (config, expected) in [
            (config(1536, 8960, 28, [12, 2], 151_936), [2620, 2614, 111, 176, 441, 467, 467]),
            (config(576, 1536, 30, [9, 3], 49_152), [212, 211, 29, 71, 177, 57, 57]),
            (config(4096, 14_336, 32, [32, 8], 128_256), [13959, 13908, 251, 537, 1343, 1050, 1050]),
        ] {
            let work = StepWork::count(&config, &lora("all-linear"), &batch(2048)).unwrap();
            let found = [
                work.linears_forward,
                work.linears_backward,
                work.lora,
                work.attention_forward,
                work.attention_backward,
                work.head_forward,
                work.head_backward,
            ];
            assert_eq!(found.map(|flops| (flops / 2048.0 / 1e6).round() as u64), expected);
            assert_eq!(work.total(), found.iter().sum::<f64>());
        }
    }

    #[test]
    fn nothing_below_the_lowest_adapter_is_counted() {
        let config = config(64, 128, 2, [4, 2], 100);
        let count = |targets| StepWork::count(&config, &lora(targets), &batch(10)).unwrap();
        let last = count(r"model\.layers\.1\.mlp\.down_proj");
        assert_eq!((last.linears_backward, last.attention_backward), (0.0, 0.0));
        // Adapters on the last gate: its own input's gradient is not needed, that of down's is.
        let gate = count(r"model\.layers\.1\.mlp\.gate_proj");
        assert_eq!(gate.linears_backward, (2 * 10 * 128 * 64) as f64);
        let query = count(r"model\.layers\.1\.self_attn\.q_proj");
        assert_eq!(query.attention_backward, 2.5 * query.attention_forward / 2.0);
        assert!(query.total() < count("all-linear").total());
    }

    #[test]
    fn a_window_cuts_the_pairs() {
        let seen =
            |length: usize, window: usize| (0..length).map(|p| (p + 1).min(window)).sum::<usize>() as f64;
        for (length, window) in [(10, 3), (10, 10), (10, 50), (1, 1)] {
            assert_eq!(pairs_of(&batch(length), Some(window)), seen(length, window), "{length} {window}");
        }
        assert_eq!(pairs_of(&batch(10), None), 55.0);
    }
}
