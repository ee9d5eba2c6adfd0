//! What a GGUF file's architecture means in Hugging Face's terms: `config.json`, and which tensor becomes which.
//!
//! Every tensor and every setting of the file is either understood or refused by name; nothing is skipped.

use std::collections::HashMap;
use std::io::{Read, Seek};

use serde_json::{Map, Value as Json, json};

use super::gguf::{Gguf, TensorInfo};
use crate::dtype::DType;
use crate::error::Result;

/// The constants that all Llama 3 models share.
const LLAMA3_LOW_FREQUENCY_FACTOR: f64 = 1.0;
const LLAMA3_HIGH_FREQUENCY_FACTOR: f64 = 4.0;

/// A tensor of the new folder and where it comes from.
#[derive(Debug)]
pub(super) struct PlannedTensor<'a> {
    /// Its name in `model.safetensors`.
    pub name: String,
    pub source: &'a TensorInfo,
    /// Where rows (of a matrix) or elements (of a bias) must be put back in order: how many heads they belong to.
    pub interleaved_heads: Option<usize>,
}

/// The model's sizes, as the file states them.
#[derive(Debug)]
struct Sizes {
    hidden: usize,
    intermediate: usize,
    layers: usize,
    heads: usize,
    key_value_heads: usize,
    head: usize,
    vocabulary: usize,
    context: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Architecture {
    Llama,
    Qwen2,
}

impl Architecture {
    fn of<R: Read + Seek>(gguf: &Gguf<R>) -> Result<Self> {
        let key = "general.architecture";
        match gguf.string(key)? {
            Some("llama") => Ok(Self::Llama),
            Some("qwen2") => Ok(Self::Qwen2),
            Some(other) => Err(gguf
                .error_at(key, format!("architecture `{other}` is not supported"))
                .hint("import reads llama and qwen2; for others use the model's Hugging Face folder")),
            None => Err(gguf.error_at(key, "this metadata key is missing")),
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
        }
    }
}

/// `config.json` and the tensors of the folder that `gguf` becomes.
pub(super) struct Plan<'a> {
    /// The architecture's name.
    pub architecture: &'static str,
    pub config: Map<String, Json>,
    pub tensors: Vec<PlannedTensor<'a>>,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// Longest sequence the model was made for.
    pub context: usize,
}

impl<'a> Plan<'a> {
    /// Understands `gguf`, whose weights will be stored as `dtype`.
    pub fn new<R: Read + Seek>(gguf: &'a Gguf<R>, dtype: DType) -> Result<Self> {
        let architecture = Architecture::of(gguf)?;
        refuse_unknown_settings(gguf, architecture)?;
        let sizes = Sizes::read(gguf, architecture)?;
        let mut finder = Finder::new(gguf);
        let rope_theta =
            gguf.positive_number(&format!("{}.rope.freq_base", architecture.name()))?.unwrap_or(10_000.0);
        let rope_scaling = rope_scaling(gguf, architecture, &sizes, rope_theta, &mut finder)?;

        let (hidden, vocabulary) = (sizes.hidden, sizes.vocabulary);
        finder.take("token_embd.weight", "model.embed_tokens.weight", &[vocabulary, hidden], None);
        finder.take("output_norm.weight", "model.norm.weight", &[hidden], None);
        let tied = !finder.has("output.weight");
        if !tied {
            finder.take("output.weight", "lm_head.weight", &[vocabulary, hidden], None);
        }
        let biases = finder.layers(architecture, &sizes)?;
        let tensors = finder.finish()?;

        let mut config = common_config(gguf, architecture, &sizes, dtype)?;
        let specific = match architecture {
            Architecture::Llama => json!({
                "architectures": ["LlamaForCausalLM"],
                "attention_bias": biases.attention,
                "mlp_bias": biases.mlp,
                "pretraining_tp": 1,
            }),
            Architecture::Qwen2 => json!({
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": false,
                "sliding_window": null,
                "max_window_layers": sizes.layers,
            }),
        };
        if let Json::Object(specific) = specific {
            config.extend(specific);
        }
        config.insert("rope_theta".into(), json!(rope_theta));
        config.insert("rope_scaling".into(), rope_scaling);
        config.insert("tie_word_embeddings".into(), json!(tied));
        Ok(Self { architecture: architecture.name(), config, tensors, vocabulary, context: sizes.context })
    }
}

/// Settings under the architecture's name that [`Plan::new`] reads, or that say nothing about the arithmetic.
const KNOWN_SETTINGS: [&str; 21] = [
    "attention.causal",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_used_count",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "tensor_data_layout",
    "vocab_size",
];

fn refuse_unknown_settings<R: Read + Seek>(gguf: &Gguf<R>, architecture: Architecture) -> Result<()> {
    let prefix = architecture.name();
    for key in gguf.keys() {
        let setting = key.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('.'));
        if let Some(setting) = setting.filter(|setting| !KNOWN_SETTINGS.contains(setting)) {
            return Err(gguf
                .error_at(key, format!("import does not know the setting `{setting}` of {prefix} models")));
        }
    }
    for key in ["expert_count", "expert_used_count"] {
        let key = format!("{prefix}.{key}");
        if gguf.count(&key)?.is_some_and(|count| count > 0) {
            return Err(gguf.error_at(key, "mixture-of-experts models are not supported"));
        }
    }
    let causal = format!("{prefix}.attention.causal");
    if gguf.truth(&causal)? == Some(false) {
        return Err(gguf.error_at(causal, "models without causal attention are not supported"));
    }
    if gguf.count("split.count")?.is_some_and(|count| count > 1) {
        return Err(gguf
            .error_at("split.count", "this file is one part of a model that was split")
            .hint("join the parts with llama.cpp's `llama-gguf-split --merge` first"));
    }
    Ok(())
}

impl Sizes {
    fn read<R: Read + Seek>(gguf: &Gguf<R>, architecture: Architecture) -> Result<Self> {
        let key = |name: &str| format!("{}.{name}", architecture.name());
        let hidden = gguf.required_count(&key("embedding_length"))?;
        let heads = gguf.required_count(&key("attention.head_count"))?;
        let key_value_heads = gguf.count(&key("attention.head_count_kv"))?.unwrap_or(heads);
        if key_value_heads == 0 || !heads.is_multiple_of(key_value_heads) {
            let message = format!("{heads} heads cannot share {key_value_heads} key/value heads");
            return Err(gguf.error_at(key("attention.head_count_kv"), message));
        }
        let head = match gguf.count(&key("attention.key_length"))? {
            Some(length) => length,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                let message = format!("{hidden} is not a multiple of {heads} heads");
                return Err(gguf.error_at(key("embedding_length"), message));
            }
        };
        if head == 0 || !head.is_multiple_of(2) {
            return Err(gguf
                .error_at(key("attention.key_length"), format!("a head of {head} elements cannot rotate")));
        }
        for (name, meaning) in [
            ("attention.value_length", "value heads of another size"),
            ("rope.dimension_count", "partial rotation"),
        ] {
            if let Some(length) = gguf.count(&key(name))?.filter(|&length| length != head) {
                let message = format!("found {length}, heads have {head}: {meaning} is not supported");
                return Err(gguf.error_at(key(name), message));
            }
        }
        let layers = gguf.required_count(&key("block_count"))?;
        if layers > gguf.tensors.len() {
            let message = format!("{layers} layers, but the file has {} tensors", gguf.tensors.len());
            return Err(gguf.error_at(key("block_count"), message));
        }
        let embedding = gguf.tensors.iter().find(|tensor| tensor.name == "token_embd.weight");
        let vocabulary = embedding
            .filter(|tensor| tensor.shape.len() == 2)
            .map(|tensor| tensor.shape[0])
            .ok_or_else(|| gguf.error_at("tensor token_embd.weight", "missing, or not a matrix"))?;
        Ok(Self {
            hidden,
            intermediate: gguf.required_count(&key("feed_forward_length"))?,
            layers,
            heads,
            key_value_heads,
            head,
            vocabulary,
            context: gguf.required_count(&key("context_length"))?,
        })
    }
}

fn common_config<R: Read + Seek>(
    gguf: &Gguf<R>,
    architecture: Architecture,
    sizes: &Sizes,
    dtype: DType,
) -> Result<Map<String, Json>> {
    let epsilon_key = format!("{}.attention.layer_norm_rms_epsilon", architecture.name());
    let epsilon = gguf
        .positive_number(&epsilon_key)?
        .ok_or_else(|| gguf.error_at(&epsilon_key, "this metadata key is missing"))?;
    let torch_dtype = match dtype {
        DType::F32 => "float32",
        DType::F16 => "float16",
        DType::Bf16 => "bfloat16",
    };
    let config = json!({
        "model_type": architecture.name(),
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "max_position_embeddings": sizes.context,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.key_value_heads,
        "head_dim": sizes.head,
        "rms_norm_eps": epsilon,
        "torch_dtype": torch_dtype,
        "use_cache": true,
        "vocab_size": sizes.vocabulary,
    });
    match config {
        Json::Object(config) => Ok(config),
        _ => Ok(Map::new()),
    }
}

/// The `rope_scaling` entry: null, linear, yarn, or llama3 where the file holds Llama 3's frequency factors.
fn rope_scaling<R: Read + Seek>(
    gguf: &Gguf<R>,
    architecture: Architecture,
    sizes: &Sizes,
    rope_theta: f64,
    finder: &mut Finder<'_, R>,
) -> Result<Json> {
    let key = |name: &str| format!("{}.rope.{name}", architecture.name());
    let required = |name: &str| {
        gguf.positive_number(&key(name))?
            .ok_or_else(|| gguf.error_at(key(name), "this metadata key is missing"))
    };
    let legacy_linear = gguf.positive_number(&key("scale_linear"))?.filter(|&factor| factor != 1.0);
    let declared = match gguf.string(&key("scaling.type"))? {
        None | Some("none") => match legacy_linear {
            Some(factor) => json!({ "rope_type": "linear", "factor": factor }),
            None => Json::Null,
        },
        Some("linear") => json!({ "rope_type": "linear", "factor": required("scaling.factor")? }),
        Some("yarn") => json!({
            "rope_type": "yarn",
            "factor": required("scaling.factor")?,
            "original_max_position_embeddings": gguf.required_count(&key("scaling.original_context_length"))?,
        }),
        Some(other) => {
            return Err(
                gguf.error_at(key("scaling.type"), format!("RoPE scaling `{other}` is not supported"))
            );
        }
    };
    let Some(tensor) = finder.take_auxiliary("rope_freqs.weight") else { return Ok(declared) };
    let place = "tensor rope_freqs.weight";
    if !declared.is_null() || architecture != Architecture::Llama {
        return Err(
            gguf.error_at(place, "frequency factors together with another RoPE scaling are not supported")
        );
    }
    if tensor.elements() != sizes.head / 2 {
        let message = format!("found {} factors, expected {}", tensor.elements(), sizes.head / 2);
        return Err(gguf.error_at(place, message));
    }
    let mut stored = Vec::new();
    gguf.read_rows(tensor, |_, values| {
        stored.extend_from_slice(values);
        Ok(())
    })?;
    let (factor, original_context) = llama3_rule(&stored, rope_theta).ok_or_else(|| {
        gguf.error_at(place, "frequency factors that do not follow Llama 3's rule are not supported")
    })?;
    Ok(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW_FREQUENCY_FACTOR,
        "high_freq_factor": LLAMA3_HIGH_FREQUENCY_FACTOR,
        "original_max_position_embeddings": original_context,
    }))
}

/// The file holds by how much each frequency is divided; the configuration wants the rule: factor and original context, of
/// which 8192 is by far the likeliest. `None` if no rule leads to these divisors.
fn llama3_rule(divisors: &[f32], rope_theta: f64) -> Option<(f64, u64)> {
    let factor = f64::from(divisors.iter().copied().fold(1.0, f32::max));
    let explains = |original_context: u64| {
        divisors.iter().enumerate().all(|(i, &stored)| {
            let frequency = rope_theta.powf(-(i as f64) / divisors.len() as f64);
            let expected = llama3_divisor(frequency, factor, original_context as f64);
            // The file's writer computed a handful of operations in f32.
            (f64::from(stored) - expected).abs() <= 1e-5 * expected
        })
    };
    let powers_of_two = (5..=20).map(|exponent| 1 << exponent);
    std::iter::once(8192)
        .chain(powers_of_two)
        .find(|&context| explains(context))
        .map(|context| (factor, context))
}

/// By how much Llama 3 divides `frequency` (radians per position): 1 for short waves, `factor` for long ones.
fn llama3_divisor(frequency: f64, factor: f64, original_context: f64) -> f64 {
    let turns = original_context * frequency / std::f64::consts::TAU;
    if turns > LLAMA3_HIGH_FREQUENCY_FACTOR {
        return 1.0;
    }
    if turns < LLAMA3_LOW_FREQUENCY_FACTOR {
        return factor;
    }
    let smooth =
        (turns - LLAMA3_LOW_FREQUENCY_FACTOR) / (LLAMA3_HIGH_FREQUENCY_FACTOR - LLAMA3_LOW_FREQUENCY_FACTOR);
    1.0 / ((1.0 - smooth) / factor + smooth)
}

/// Which of the optional biases a model has.
struct Biases {
    attention: bool,
    mlp: bool,
}

/// Finds tensors by name, collects what is missing, and knows in the end what nobody asked for.
struct Finder<'a, R> {
    gguf: &'a Gguf<R>,
    unused: HashMap<&'a str, &'a TensorInfo>,
    planned: Vec<PlannedTensor<'a>>,
    problems: Vec<String>,
}

impl<'a, R: Read + Seek> Finder<'a, R> {
    fn new(gguf: &'a Gguf<R>) -> Self {
        let unused = gguf.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
        Self { gguf, unused, planned: Vec::new(), problems: Vec::new() }
    }

    fn has(&self, name: &str) -> bool {
        self.unused.contains_key(name)
    }

    /// A tensor that informs the configuration and is not stored.
    fn take_auxiliary(&mut self, name: &str) -> Option<&'a TensorInfo> {
        self.unused.remove(name)
    }

    /// Plans tensor `name` of the file as `new_name`; it must have `shape`.
    fn take(&mut self, name: &str, new_name: &str, shape: &[usize], interleaved_heads: Option<usize>) {
        match self.unused.remove(name) {
            None => self.problems.push(format!("`{name}` is missing")),
            Some(source) if source.shape != shape => {
                self.problems.push(format!("`{name}` has shape {:?}, expected {shape:?}", source.shape));
            }
            Some(source) => {
                self.planned.push(PlannedTensor { name: new_name.to_owned(), source, interleaved_heads });
            }
        }
    }

    fn layers(&mut self, architecture: Architecture, sizes: &Sizes) -> Result<Biases> {
        let Sizes { hidden, intermediate, heads, key_value_heads, head, .. } = *sizes;
        let (query_rows, key_rows) = (heads * head, key_value_heads * head);
        // ggml rotates neighbouring pairs in llama models, Hugging Face the two halves of a head: the rows were
        // interleaved when the file was made. qwen2 rotates halves in both.
        let interleaved = |heads| (architecture == Architecture::Llama).then_some(heads);
        let linears = [
            ("attn_q", "self_attn.q_proj", query_rows, hidden, interleaved(heads)),
            ("attn_k", "self_attn.k_proj", key_rows, hidden, interleaved(key_value_heads)),
            ("attn_v", "self_attn.v_proj", key_rows, hidden, None),
            ("attn_output", "self_attn.o_proj", hidden, query_rows, None),
            ("ffn_gate", "mlp.gate_proj", intermediate, hidden, None),
            ("ffn_up", "mlp.up_proj", intermediate, hidden, None),
            ("ffn_down", "mlp.down_proj", hidden, intermediate, None),
        ];
        let biases = match architecture {
            Architecture::Llama => {
                Biases { attention: self.has("blk.0.attn_output.bias"), mlp: self.has("blk.0.ffn_down.bias") }
            }
            Architecture::Qwen2 => Biases { attention: true, mlp: false },
        };
        for layer in 0..sizes.layers {
            for (norm, new_norm) in
                [("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")]
            {
                let new_name = format!("model.layers.{layer}.{new_norm}.weight");
                self.take(&format!("blk.{layer}.{norm}.weight"), &new_name, &[hidden], None);
            }
            for (name, new_name, rows, columns, interleaved_heads) in linears {
                let (name, new_name) =
                    (format!("blk.{layer}.{name}"), format!("model.layers.{layer}.{new_name}"));
                let shape = [rows, columns];
                self.take(
                    &format!("{name}.weight"),
                    &format!("{new_name}.weight"),
                    &shape,
                    interleaved_heads,
                );
                let has_bias = if new_name.contains(".mlp.") {
                    biases.mlp
                } else {
                    biases.attention && !(architecture == Architecture::Qwen2 && new_name.ends_with("o_proj"))
                };
                if has_bias {
                    self.take(
                        &format!("{name}.bias"),
                        &format!("{new_name}.bias"),
                        &[rows],
                        interleaved_heads,
                    );
                }
            }
            self.report()?;
        }
        Ok(biases)
    }

    /// Fails if anything is missing or misshapen.
    fn report(&self) -> Result<()> {
        if self.problems.is_empty() {
            return Ok(());
        }
        Err(self.gguf.error_at("tensors", self.problems.join("; ")))
    }

    fn finish(self) -> Result<Vec<PlannedTensor<'a>>> {
        self.report()?;
        let mut unknown: Vec<&str> = self.unused.into_keys().collect();
        unknown.sort_unstable();
        match unknown.first() {
            None => Ok(self.planned),
            Some(first) => {
                let others = match unknown.len() - 1 {
                    0 => String::new(),
                    count => format!(" and {count} more"),
                };
                let message = format!("tensor `{first}`{others}: not part of a supported model");
                Err(self.gguf.error_at("tensors", message))
            }
        }
    }
}
