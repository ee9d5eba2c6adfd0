//! The shape of a model, read from `config.json` as transformers 4 and 5 write it, and every tensor it implies.
//!
//! What the file asks for and this crate does not implement is refused by name, never ignored. Nothing is allocated in
//! proportion to a value before it is checked.

mod family;
mod reading;

use std::path::Path;

pub use family::Family;

use super::fields::Fields;
use super::rope::Rope;
use crate::backend::Activation;
use crate::dtype::DType;
use crate::error::{Error, Result};
use reading::{parse, read_optional};

/// The shape of a model.
///
/// ```
/// use fastlora::model::config::{Family, ModelConfig};
///
/// let config = ModelConfig::from_folder("tests/fixtures/tiny_qwen3")?;
/// assert_eq!(config.family, Family::Qwen3);
/// assert_eq!((config.query_heads, config.key_value_heads, config.head_dim), (4, 2, 32));
/// assert_eq!(config.rope_table(3).len(), 3 * 32);
/// # Ok::<(), fastlora::error::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Architecture family.
    pub family: Family,
    /// Width of the residual stream, `H`.
    pub hidden_size: usize,
    /// Width of the gated activation, `F`.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub layer_count: usize,
    /// `Q`, `num_attention_heads`.
    pub query_heads: usize,
    /// `K`, `num_key_value_heads`; divides `query_heads`.
    pub key_value_heads: usize,
    /// `D`, even; need not be `hidden_size / query_heads`.
    pub head_dim: usize,
    /// `V`, rows of the embedding; may exceed the tokenizer's count.
    pub vocabulary: usize,
    /// ε of every RMSNorm.
    pub rms_norm_epsilon: f32,
    /// Positions the model was made for.
    pub max_positions: usize,
    /// Whether the output head is the embedding.
    pub tied_embeddings: bool,
    /// Whether q, k and v are one linear, and gate and up another (Phi-3).
    pub fused_linears: bool,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub output_bias: bool,
    /// Whether gate, up and down have biases.
    pub mlp_bias: bool,
    /// Whether each head of q and k is normalised before RoPE.
    pub qk_norm: bool,
    /// Activation of the gate.
    pub activation: Activation,
    /// Factor on the embeddings: 1, or √`hidden_size` (Gemma).
    pub embedding_scale: f32,
    /// Added to the weight of every norm: 0 or 1 (Gemma).
    pub norm_weight_offset: f32,
    /// Whether the outputs of attention and MLP are normalised before they are added to the residual stream (Gemma 2, 3).
    pub post_norms: bool,
    /// Factor on the products of queries and keys.
    pub softmax_scale: f32,
    /// Soft cap of attention's scores (Gemma 2).
    pub attention_soft_cap: Option<f32>,
    /// Soft cap of the logits (Gemma 2).
    pub logit_soft_cap: Option<f32>,
    /// `[layer_count]` sliding window of each layer: a query at `p` sees keys at positions `> p - window`.
    pub windows: Vec<Option<usize>>,
    /// Rotary embedding.
    pub rope: Rope,
    /// Another for the layers with a window (Gemma 3).
    pub local_rope: Option<Rope>,
    /// Columns of a head that are rotated, even: `head_dim` or fewer (Phi-4-mini).
    pub rotary_width: usize,
    /// Tokens that end a text: those of `generation_config.json` first, then those of `config.json`.
    pub eos_token_ids: Vec<u32>,
    /// Token that begins a text.
    pub bos_token_id: Option<u32>,
    /// Token for padding.
    pub pad_token_id: Option<u32>,
    /// Element type that the configuration announces.
    pub stored_dtype: Option<DType>,
}

/// A linear layer that LoRA can target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearModule {
    /// Full module name, `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Width of its input.
    pub in_features: usize,
    /// Width of its output.
    pub out_features: usize,
    /// Whether it has a bias.
    pub bias: bool,
}

/// Places in a layer that linears read from: the normed input (q, k, v), attention's output (o), the normed middle (gate, up),
/// the activation's output (down).
pub const GROUP_COUNT: usize = 4;

/// Bounds that no model of these families comes near; they keep every product of sizes far from overflow.
mod limits {
    pub(super) const LAYERS: u64 = 10_000;
    pub(super) const WIDTH: u64 = 1 << 24;
    pub(super) const HEADS: u64 = 1 << 16;
    pub(super) const HEAD_DIM: u64 = 1 << 14;
    pub(super) const VOCABULARY: u64 = 1 << 28;
    pub(super) const POSITIONS: u64 = 1 << 40;
    pub(super) const PARAMETERS: u64 = 1 << 46;
}

impl ModelConfig {
    /// Reads `config.json` of a model folder, and the EOS tokens of its `generation_config.json` if there is one.
    ///
    /// # Errors
    /// Model errors that name the file and the field.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let path = folder.join("config.json");
        let Some(text) = read_optional(&path)? else {
            let missing =
                if folder.is_dir() { "`config.json` is missing" } else { "there is no such folder" };
            return Err(Error::model(missing)
                .at(folder.display().to_string())
                .hint("name a Hugging Face model folder, or a hub id such as org/name"));
        };
        let mut config = Self::from_json(&text, &path.display().to_string())?;
        let path = folder.join("generation_config.json");
        if let Some(text) = read_optional(&path)? {
            config.read_generation_config(&text, &path.display().to_string())?;
        }
        Ok(config)
    }

    /// Reads the text of a `config.json`; `place` names it in errors.
    ///
    /// # Errors
    /// Model errors: broken JSON, a field missing, of the wrong type or absurd, an architecture or option that is not
    /// supported.
    pub fn from_json(text: &str, place: &str) -> Result<Self> {
        let root = parse(text, place)?;
        let fields = Fields::of(&root, place)?;
        let config = reading::config(fields)?;
        config.check_size(fields)?;
        Ok(config)
    }

    /// Adds the EOS tokens of a `generation_config.json`, in front.
    pub(crate) fn read_generation_config(&mut self, text: &str, place: &str) -> Result<()> {
        let root = parse(text, place)?;
        let mut ids = Fields::of(&root, place)?.token_ids("eos_token_id")?;
        ids.append(&mut self.eos_token_ids);
        for id in ids {
            if !self.eos_token_ids.contains(&id) {
                self.eos_token_ids.push(id);
            }
        }
        Ok(())
    }

    /// The rotary embeddings that [`rope_table`](Self::rope_table) has, in its order: that of most layers, its form for long
    /// texts, that of layers with a window; the last two where the model has them.
    fn ropes(&self) -> impl Iterator<Item = Rope> {
        let local = self.local_rope.clone();
        std::iter::once(self.rope.clone()).chain(self.rope.of_long_texts()).chain(local)
    }

    /// `[ropes, positions, 2, rotary_width / 2]`: for each rotary embedding cosines, then sines, of each position's angles
    /// (see [`Rope::table`]).
    pub fn rope_table(&self, positions: usize) -> Vec<f32> {
        self.ropes().flat_map(|rope| rope.table(self.rotary_width, positions)).collect()
    }

    /// Elements of [`rope_table`](Self::rope_table).
    pub fn rope_table_length(&self, positions: usize) -> usize {
        self.ropes().count() * positions * self.rotary_width
    }

    /// Width of all query heads side by side.
    pub fn query_width(&self) -> usize {
        self.query_heads * self.head_dim
    }

    /// Width of all key (or value) heads side by side.
    pub fn key_value_width(&self) -> usize {
        self.key_value_heads * self.head_dim
    }

    /// The linear layers of one decoder layer by what they read, as `(name within the layer, input width, output width, has a
    /// bias)`.
    fn layer_linears(&self) -> [Vec<(&'static str, usize, usize, bool)>; GROUP_COUNT] {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let (query, key_value) = (self.query_width(), self.key_value_width());
        let qkv = if self.fused_linears {
            vec![("self_attn.qkv_proj", hidden, query + 2 * key_value, self.qkv_bias)]
        } else {
            vec![
                ("self_attn.q_proj", hidden, query, self.qkv_bias),
                ("self_attn.k_proj", hidden, key_value, self.qkv_bias),
                ("self_attn.v_proj", hidden, key_value, self.qkv_bias),
            ]
        };
        let gate_up = if self.fused_linears {
            vec![("mlp.gate_up_proj", hidden, 2 * inner, self.mlp_bias)]
        } else {
            vec![
                ("mlp.gate_proj", hidden, inner, self.mlp_bias),
                ("mlp.up_proj", hidden, inner, self.mlp_bias),
            ]
        };
        [
            qkv,
            vec![("self_attn.o_proj", query, hidden, self.output_bias)],
            gate_up,
            vec![("mlp.down_proj", inner, hidden, self.mlp_bias)],
        ]
    }

    /// How many linears of a layer read each of the [`GROUP_COUNT`] places.
    pub fn group_sizes(&self) -> [usize; GROUP_COUNT] {
        self.layer_linears().map(|group| group.len())
    }

    /// Every linear layer that LoRA can target, in the order of the forward pass: all but the output head.
    pub fn linear_modules(&self) -> impl Iterator<Item = LinearModule> + '_ {
        let linears = self.layer_linears().concat();
        (0..self.layer_count).flat_map(move |layer| {
            let module = |&(name, in_features, out_features, bias): &_| LinearModule {
                name: format!("model.layers.{layer}.{name}"),
                in_features,
                out_features,
                bias,
            };
            linears.iter().map(module).collect::<Vec<_>>()
        })
    }

    /// Name and shape of every tensor that the model's files must hold.
    pub fn expected_tensors(&self) -> impl Iterator<Item = (String, Vec<usize>)> + '_ {
        let hidden = self.hidden_size;
        let table = || vec![self.vocabulary, hidden];
        let first = std::iter::once(("model.embed_tokens.weight".to_owned(), table()));
        let layers = (0..self.layer_count).flat_map(move |layer| {
            self.layer_tensors()
                .into_iter()
                .map(move |(name, shape)| (format!("model.layers.{layer}.{name}"), shape))
        });
        let last = std::iter::once(("model.norm.weight".to_owned(), vec![hidden]));
        let head = (!self.tied_embeddings).then(|| ("lm_head.weight".to_owned(), table()));
        first.chain(layers).chain(last).chain(head)
    }

    /// Name within the layer and shape of the tensors of one decoder layer.
    fn layer_tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut tensors = Vec::with_capacity(20);
        for (name, in_features, out_features, bias) in self.layer_linears().concat() {
            tensors.push((format!("{name}.weight"), vec![out_features, in_features]));
            if bias {
                tensors.push((format!("{name}.bias"), vec![out_features]));
            }
        }
        if self.qk_norm {
            tensors.push(("self_attn.q_norm.weight".to_owned(), vec![self.head_dim]));
            tensors.push(("self_attn.k_norm.weight".to_owned(), vec![self.head_dim]));
        }
        let norms: &[_] = if self.post_norms {
            &[
                "input_layernorm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            ]
        } else {
            &["input_layernorm", "post_attention_layernorm"]
        };
        tensors.extend(norms.iter().map(|norm| (format!("{norm}.weight"), vec![self.hidden_size])));
        tensors
    }

    /// Number of parameters of the model; a tied head counts once.
    pub fn parameter_count(&self) -> u64 {
        let product = |shape: &[usize]| shape.iter().map(|&length| length as u64).product::<u64>();
        let layer: u64 = self.layer_tensors().iter().map(|(_, shape)| product(shape)).sum();
        let table = product(&[self.vocabulary, self.hidden_size]);
        let tables = if self.tied_embeddings { table } else { 2 * table };
        tables + self.hidden_size as u64 + self.layer_count as u64 * layer
    }

    /// Bounds the largest tensor first, so that `parameter_count` cannot overflow.
    fn check_size(&self, fields: Fields<'_>) -> Result<()> {
        let widest =
            self.hidden_size.max(self.intermediate_size).max(self.query_width()).max(self.vocabulary) as u64;
        let largest_tensor = widest * self.hidden_size.max(self.query_width()) as u64;
        if largest_tensor > limits::PARAMETERS || self.parameter_count() > limits::PARAMETERS {
            return Err(fields.error(format!(
                "the sizes given make more than {} parameters (hidden_size {}, intermediate_size {}, {} layers, {} heads \
                 of {}, vocab_size {})",
                limits::PARAMETERS,
                self.hidden_size,
                self.intermediate_size,
                self.layer_count,
                self.query_heads,
                self.head_dim,
                self.vocabulary
            )));
        }
        Ok(())
    }
}
