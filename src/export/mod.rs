//! What becomes of an adapter after training: merged into its base, or in another program's format.

mod gguf;
mod merge;

pub use gguf::write_gguf;
pub use merge::{MergeReport, merge};

use crate::checkpoint::adapter::{Adapter, AdapterConfig};
use crate::error::Result;
use crate::model::LoraConfig;

/// The same adapter with its scale inside `B`: α = r and no rsLoRA, for tools that know
/// α/r alone, one α for all modules, or no scale at all.
///
/// ```
/// use fastlora::checkpoint::adapter::read_adapter;
/// use fastlora::export::bake_scale;
///
/// let adapter = read_adapter("tests/fixtures/tiny_qwen2/adapter_final_b0".as_ref())?;
/// let baked = bake_scale(adapter.clone())?;
/// assert_eq!(baked.config.alpha, baked.config.rank as f64);
/// // α = 2r before: every B has doubled.
/// let b = |adapter: &fastlora::checkpoint::adapter::Adapter| adapter.tensors[1].values[0];
/// assert_eq!(b(&baked), 2.0 * b(&adapter));
/// # Ok::<(), fastlora::error::Error>(())
/// ```
///
/// # Errors
/// A pattern of ranks or scales that is no regular expression.
pub fn bake_scale(mut adapter: Adapter) -> Result<Adapter> {
    let scales = LoraConfig::from(&adapter.config).scales()?;
    for tensor in adapter.tensors.iter_mut().filter(|tensor| tensor.name.ends_with(".lora_B.weight")) {
        let scale = scales.of(Adapter::module_of(&tensor.name).unwrap_or_default())?.scale;
        for value in &mut tensor.values {
            *value *= scale;
        }
    }
    let config = AdapterConfig {
        alpha: adapter.config.rank as f64,
        use_rslora: false,
        alpha_pattern: adapter.config.rank_pattern.map(|rank| *rank as f64),
        ..adapter.config
    };
    Ok(Adapter { config, ..adapter })
}
