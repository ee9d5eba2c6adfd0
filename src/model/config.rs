//! The shape of a model, read from `config.json` as transformers 4 and 5 write it, and every tensor it implies.
//!
//! Supported are Llama (SmolLM2, Llama 3.x), Mistral, Qwen2 (2.5) and Qwen3. What the file asks for and this crate does
//! not implement is refused by name, never ignored. Nothing is allocated in proportion to a value before it is checked.

use std::io::ErrorKind;
use std::path::Path;

use serde_json::Value;

use super::fields::Fields;
use super::rope::Rope;
use crate::dtype::DType;
use crate::error::{Error, Result, shorten};

/// Architecture families; each is a decoder of RMSNorm, RoPE attention with grouped heads, and a SiLU-gated MLP.
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
}

impl Family {
    /// The family's `model_type` in `config.json`.
    pub const fn model_type(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
        }
    }

    const ALL: [Family; 4] = [Family::Llama, Family::Mistral, Family::Qwen2, Family::Qwen3];
}

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
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub output_bias: bool,
    /// Whether gate, up and down have biases.
    pub mlp_bias: bool,
    /// Whether each head of q and k is normalised before RoPE.
    pub qk_norm: bool,
    /// `[layer_count]` sliding window of each layer: a query at `p` sees keys at positions `> p - window`.
    pub windows: Vec<Option<usize>>,
    /// Rotary embedding.
    pub rope: Rope,
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

/// Characters of a value from the file in a message.
const SHOWN_CHARACTERS: usize = 60;

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
        let family = family(fields)?;
        refuse_unsupported(fields)?;

        let hidden_size = fields.required_count("hidden_size", limits::WIDTH)?;
        let layer_count = fields.required_count("num_hidden_layers", limits::LAYERS)?;
        let query_heads = fields.required_count("num_attention_heads", limits::HEADS)?;
        let key_value_heads = match fields.count("num_key_value_heads", limits::HEADS)? {
            Some(heads) => heads,
            // Llama before grouped heads had no such field; the other families always write it.
            None if family == Family::Llama || fields.mentions("num_key_value_heads") => query_heads,
            None => return Err(fields.missing("num_key_value_heads")),
        };
        if !query_heads.is_multiple_of(key_value_heads) {
            return Err(fields.error(format!(
                "`num_attention_heads` is {query_heads}, expected a multiple of `num_key_value_heads`, {key_value_heads}"
            )));
        }
        let head_dim = head_dim(fields, family, hidden_size, query_heads)?;
        let max_positions = fields.required_count("max_position_embeddings", limits::POSITIONS)?;
        let attention_bias = fields.flag("attention_bias")?.unwrap_or(false);
        let config = Self {
            family,
            hidden_size,
            intermediate_size: fields.required_count("intermediate_size", limits::WIDTH)?,
            layer_count,
            query_heads,
            key_value_heads,
            head_dim,
            vocabulary: fields.required_count("vocab_size", limits::VOCABULARY)?,
            rms_norm_epsilon: fields.positive("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            max_positions,
            tied_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: match family {
                Family::Llama | Family::Qwen3 => attention_bias,
                Family::Mistral => false,
                Family::Qwen2 => true,
            },
            output_bias: matches!(family, Family::Llama | Family::Qwen3) && attention_bias,
            mlp_bias: family == Family::Llama && fields.flag("mlp_bias")?.unwrap_or(false),
            qk_norm: family == Family::Qwen3,
            windows: windows(fields, family, layer_count)?,
            rope: Rope::from_fields(fields, max_positions)?,
            eos_token_ids: fields.token_ids("eos_token_id")?,
            bos_token_id: fields.token_ids("bos_token_id")?.first().copied(),
            pad_token_id: fields.token_ids("pad_token_id")?.first().copied(),
            stored_dtype: stored_dtype(fields)?,
        };
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

    /// `[positions, 2, head_dim / 2]`: cosines, then sines, of each position's angles (see [`Rope::table`]).
    pub fn rope_table(&self, positions: usize) -> Vec<f32> {
        self.rope.table(self.head_dim, positions)
    }

    /// Width of all query heads side by side.
    pub fn query_width(&self) -> usize {
        self.query_heads * self.head_dim
    }

    /// Width of all key (or value) heads side by side.
    pub fn key_value_width(&self) -> usize {
        self.key_value_heads * self.head_dim
    }

    /// The linear layers of one decoder layer, as `(name within the layer, input width, output width, has a bias)`.
    fn layer_linears(&self) -> [(&'static str, usize, usize, bool); 7] {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let (query, key_value) = (self.query_width(), self.key_value_width());
        [
            ("self_attn.q_proj", hidden, query, self.qkv_bias),
            ("self_attn.k_proj", hidden, key_value, self.qkv_bias),
            ("self_attn.v_proj", hidden, key_value, self.qkv_bias),
            ("self_attn.o_proj", query, hidden, self.output_bias),
            ("mlp.gate_proj", hidden, inner, self.mlp_bias),
            ("mlp.up_proj", hidden, inner, self.mlp_bias),
            ("mlp.down_proj", inner, hidden, self.mlp_bias),
        ]
    }

    /// Every linear layer that LoRA can target, in the order of the forward pass: all but the output head.
    pub fn linear_modules(&self) -> impl Iterator<Item = LinearModule> + '_ {
        let linears = self.layer_linears();
        (0..self.layer_count).flat_map(move |layer| {
            linears.map(|(name, in_features, out_features, bias)| LinearModule {
                name: format!("model.layers.{layer}.{name}"),
                in_features,
                out_features,
                bias,
            })
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
        let mut tensors = Vec::with_capacity(18);
        for (name, in_features, out_features, bias) in self.layer_linears() {
            tensors.push((format!("{name}.weight"), vec![out_features, in_features]));
            if bias {
                tensors.push((format!("{name}.bias"), vec![out_features]));
            }
        }
        if self.qk_norm {
            tensors.push(("self_attn.q_norm.weight".to_owned(), vec![self.head_dim]));
            tensors.push(("self_attn.k_norm.weight".to_owned(), vec![self.head_dim]));
        }
        tensors.push(("input_layernorm.weight".to_owned(), vec![self.hidden_size]));
        tensors.push(("post_attention_layernorm.weight".to_owned(), vec![self.hidden_size]));
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

/// The text of a file, or none where there is no such file.
fn read_optional(path: &Path) -> Result<Option<String>> {
    const LARGEST_CONFIG_BYTES: u64 = 16 << 20;
    let read = || -> std::io::Result<Option<Vec<u8>>> {
        if std::fs::metadata(path)?.len() > LARGEST_CONFIG_BYTES {
            return Ok(None);
        }
        std::fs::read(path).map(Some)
    };
    let place = path.display().to_string();
    match read() {
        Ok(Some(bytes)) => match String::from_utf8(bytes) {
            Ok(text) => Ok(Some(text)),
            Err(error) => {
                let at = error.utf8_error().valid_up_to();
                Err(Error::model(format!("not UTF-8 at byte {at}, expected JSON")).at(place))
            }
        },
        Ok(None) => {
            Err(Error::model(format!("larger than {LARGEST_CONFIG_BYTES} bytes, expected a short file"))
                .at(place))
        }
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(Error::file("read", path, error)),
    }
}

fn parse(text: &str, place: &str) -> Result<Value> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    serde_json::from_str(text).map_err(|error| Error::model("not valid JSON").at(place).caused_by(error))
}

fn family(fields: Fields<'_>) -> Result<Family> {
    let model_type = fields.text("model_type")?.ok_or_else(|| fields.missing("model_type"))?;
    Family::ALL.into_iter().find(|family| family.model_type() == model_type).ok_or_else(|| {
        fields
            .error(format!("`model_type` \"{}\" is not supported", shorten(model_type, SHOWN_CHARACTERS)))
            .hint(format!("supported are {}", Family::ALL.map(Family::model_type).join(", ")))
    })
}

/// Refuses what would change the arithmetic and is not implemented.
fn refuse_unsupported(fields: Fields<'_>) -> Result<()> {
    if let Some(quantization) = fields.get("quantization_config") {
        let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unnamed");
        let method = shorten(method, SHOWN_CHARACTERS);
        return Err(fields
            .error(format!("weights quantized with `{method}` (`quantization_config`) are not supported"))
            .hint("use the model's f32, f16 or bf16 weights"));
    }
    let activation = fields.text("hidden_act")?.unwrap_or("silu");
    if !["silu", "swish"].contains(&activation) {
        return Err(fields.error(format!(
            "`hidden_act` \"{}\" is not supported, expected \"silu\"",
            shorten(activation, SHOWN_CHARACTERS)
        )));
    }
    for experts in ["num_experts", "num_local_experts", "n_routed_experts"] {
        if fields.get(experts).is_some_and(|count| count.as_u64() != Some(0)) {
            return Err(fields.error(format!("mixtures of experts (`{experts}`) are not supported")));
        }
    }
    if fields.flag("use_mrope")? == Some(true) {
        return Err(fields.error("multimodal RoPE (`use_mrope`) is not supported"));
    }
    if let Some(probability) = fields.number("attention_dropout")?.filter(|probability| *probability != 0.0) {
        tracing::warn!("{}: `attention_dropout` {probability} is not applied in training", fields.place());
    }
    Ok(())
}

fn head_dim(fields: Fields<'_>, family: Family, hidden_size: usize, query_heads: usize) -> Result<usize> {
    const QWEN3_HEAD_DIM: usize = 128;
    let head_dim = match fields.count("head_dim", limits::HEAD_DIM)? {
        Some(head_dim) => head_dim,
        None if family == Family::Qwen3 && !fields.mentions("head_dim") => QWEN3_HEAD_DIM,
        None if !hidden_size.is_multiple_of(query_heads) => {
            return Err(fields.error(format!(
                "`hidden_size` is {hidden_size}, expected a multiple of `num_attention_heads`, {query_heads}, as there is no \
                 `head_dim`"
            )));
        }
        None => hidden_size / query_heads,
    };
    if !head_dim.is_multiple_of(2) || head_dim as u64 > limits::HEAD_DIM {
        return Err(fields.error(format!(
            "the head width (`head_dim`, else hidden_size / num_attention_heads) is {head_dim}, expected an even number up to \
             {}: RoPE turns pairs",
            limits::HEAD_DIM
        )));
    }
    Ok(head_dim)
}

/// The window of each layer. `layer_types`, where present, says which layers slide.
fn windows(fields: Fields<'_>, family: Family, layer_count: usize) -> Result<Vec<Option<usize>>> {
    const DEFAULT_WINDOW: usize = 4096;
    const DEFAULT_FULL_LAYERS: u64 = 28;
    let window = match fields.count("sliding_window", u64::MAX)? {
        None if !fields.mentions("sliding_window") => Some(DEFAULT_WINDOW),
        given => given,
    };
    let window = match family {
        Family::Llama => None,
        Family::Mistral => window,
        Family::Qwen2 | Family::Qwen3 => {
            if fields.flag("use_sliding_window")?.unwrap_or(false) {
                window
            } else {
                None
            }
        }
    };
    if let Some(value) = fields.get("layer_types") {
        let expected = format!("a list of {layer_count} layer types");
        let types = value.as_array().filter(|types| types.len() == layer_count);
        let types = types.ok_or_else(|| fields.wrong("layer_types", value, &expected))?;
        return types
            .iter()
            .map(|layer_type| match (layer_type.as_str(), window) {
                (Some("full_attention"), _) => Ok(None),
                (Some("sliding_attention"), Some(window)) => Ok(Some(window)),
                (Some("sliding_attention"), None) => Err(fields.error(
                    "`layer_types` has sliding_attention, but no `sliding_window` is in force for this model type",
                )),
                _ => Err(fields
                    .wrong("layer_types", layer_type, "full_attention or sliding_attention")
                    .hint("other kinds of attention are not supported")),
            })
            .collect();
    }
    let first_sliding = match family {
        Family::Llama | Family::Mistral => 0,
        // 0 is a legal value here: every layer slides.
        Family::Qwen2 | Family::Qwen3 => match fields.get("max_window_layers") {
            None => DEFAULT_FULL_LAYERS,
            Some(value) => value
                .as_u64()
                .ok_or_else(|| fields.wrong("max_window_layers", value, "a number of layers"))?,
        },
    };
    Ok((0..layer_count).map(|layer| window.filter(|_| layer as u64 >= first_sliding)).collect())
}

/// `dtype` (transformers 5) or `torch_dtype` (4), with or without the prefix `torch.`.
fn stored_dtype(fields: Fields<'_>) -> Result<Option<DType>> {
    let name = match fields.text("dtype")? {
        Some(name) => Some(name),
        None => fields.text("torch_dtype")?,
    };
    Ok(name.and_then(|name| match name.trim_start_matches("torch.") {
        "float32" => Some(DType::F32),
        "float16" => Some(DType::F16),
        "bfloat16" => Some(DType::Bf16),
        // The weights' own headers decide; they are checked when the files are opened.
        _ => None,
    }))
}
