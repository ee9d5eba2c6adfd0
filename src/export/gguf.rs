//! An adapter as a GGUF file, as llama.cpp's `--lora` reads it (its `convert_lora_to_gguf.py` writes the same).

use std::path::Path;

use crate::checkpoint::adapter::Adapter;
use crate::checkpoint::atomic::replace_file;
use crate::error::{Error, Result};
use crate::model::LoraConfig;
use crate::model::config::{Family, ModelConfig};
use crate::tensor::NamedTensor;

/// Tensor data begin at multiples of this.
const ALIGNMENT: usize = 32;
/// GGUF's version.
const VERSION: u32 = 3;
/// Code of text values.
const TEXT: u32 = 8;
/// Code of f32 values.
const F32: u32 = 6;
/// Code of f32 tensors.
const F32_TENSOR: u32 = 0;

/// PEFT's and llama.cpp's names of the linears of a block.
const MODULES: [(&str, &str); 9] = [
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    // Phi-3's: what llama.cpp calls up has the gate in front.
    ("self_attn.qkv_proj", "attn_qkv"),
    ("mlp.gate_up_proj", "ffn_up"),
];

/// Writes `adapter`, which belongs to a base of this shape, in f32. llama.cpp scales by α/r with one α for all modules:
/// that of the file is such that the scale is the adapter's, with rsLoRA too; where a module needs another α, its B has the
/// ratio.
///
/// # Errors
/// An adapter of another base (fault 61) or beyond plain LoRA, or a file that cannot be written; what was there stays.
pub fn write_gguf(adapter: &Adapter, base: &ModelConfig, path: &Path) -> Result<()> {
    if let Some((key, what)) = adapter.config.beyond_lora() {
        return Err(Error::model(format!("llama.cpp's adapters hold no {what}"))
            .at(key)
            .hint("merge it into its base instead: fastlora merge"));
    }
    adapter.check_base(base)?;
    let scales = LoraConfig::from(&adapter.config).scales()?;
    let alphas = adapter
        .tensors
        .iter()
        .map(|tensor| scales.plain_alpha(Adapter::module_of(&tensor.name).unwrap_or_default()))
        .collect::<Result<Vec<f64>>>()?;
    // llama.cpp takes 0 for a scale of 1: a module that adds nothing has a B of zeros instead.
    let file_alpha = alphas.iter().copied().find(|alpha| *alpha != 0.0).unwrap_or(1.0);
    let architecture = architecture(base.family);
    let metadata = [
        text_pair("general.architecture", architecture),
        text_pair("general.type", "adapter"),
        text_pair("adapter.type", "lora"),
        [
            string("adapter.lora.alpha"),
            F32.to_le_bytes().to_vec(),
            (file_alpha as f32).to_le_bytes().to_vec(),
        ]
        .concat(),
    ];
    let tensors: Vec<(String, &NamedTensor, Vec<f32>)> = adapter
        .tensors
        .iter()
        .zip(&alphas)
        .map(|(tensor, alpha)| {
            let (name, heads) = place(&tensor.name, base)
                .ok_or_else(|| Error::model("llama.cpp has no such linear").at(tensor.name.clone()))?;
            let mut values = rows_in_order(tensor, heads);
            let ratio = (alpha / file_alpha) as f32;
            if ratio != 1.0 && tensor.name.ends_with(".lora_B.weight") {
                // Not a product with zero, which would leave signs.
                values.iter_mut().for_each(|value| *value = if ratio == 0.0 { 0.0 } else { *value * ratio });
            }
            Ok((name, tensor, values))
        })
        .collect::<Result<_>>()?;

    let mut bytes = b"GGUF".to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((metadata.len() as u64).to_le_bytes());
    metadata.iter().for_each(|pair| bytes.extend(pair));
    let mut offset = 0;
    for (name, tensor, values) in &tensors {
        bytes.extend(string(name));
        bytes.extend((tensor.shape.len() as u32).to_le_bytes());
        // The fastest axis first.
        tensor.shape.iter().rev().for_each(|length| bytes.extend((*length as u64).to_le_bytes()));
        bytes.extend(F32_TENSOR.to_le_bytes());
        bytes.extend((offset as u64).to_le_bytes());
        offset += size_of_val(&values[..]).next_multiple_of(ALIGNMENT);
    }
    for (_, _, values) in &tensors {
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }
    replace_file(path, &bytes)
}

const fn architecture(family: Family) -> &'static str {
    match family {
        Family::Llama | Family::Mistral => "llama",
        Family::Gemma3 => "gemma3",
        other => other.model_type(),
    }
}

/// llama.cpp's name of a PEFT tensor, and the heads whose rows it wants interleaved.
fn place(name: &str, base: &ModelConfig) -> Option<(String, Option<usize>)> {
    let rest = name.strip_prefix("base_model.model.model.layers.")?.strip_suffix(".weight")?;
    let (layer, rest) = rest.split_once('.')?;
    let (module, letter) = rest.rsplit_once(".lora_")?;
    let (_, target) = MODULES.iter().find(|(peft, _)| *peft == module)?;
    // llama.cpp rotates neighbours where Hugging Face rotates halves, so Llama's rows are put in another order.
    let is_interleaved = letter == "B" && architecture(base.family) == "llama";
    let heads = match *target {
        "attn_q" if is_interleaved => Some(base.query_heads),
        "attn_k" if is_interleaved => Some(base.key_value_heads),
        _ => None,
    };
    Some((format!("blk.{layer}.{target}.weight.lora_{}", letter.to_lowercase()), heads))
}

/// The values, each head's rows as 0, half, 1, half + 1 … where heads are given.
fn rows_in_order(tensor: &NamedTensor, heads: Option<usize>) -> Vec<f32> {
    let Some(heads) = heads else { return tensor.values.clone() };
    let (rows, columns) = (tensor.shape[0], tensor.shape[1]);
    let head_length = rows / heads;
    (0..rows)
        .flat_map(|row| {
            let (head, within) = (row / head_length, row % head_length);
            let source = head * head_length + within % 2 * (head_length / 2) + within / 2;
            tensor.values[source * columns..(source + 1) * columns].iter().copied()
        })
        .collect()
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

fn text_pair(key: &str, value: &str) -> Vec<u8> {
    [string(key), TEXT.to_le_bytes().to_vec(), string(value)].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::adapter::read_adapter;
    use crate::checkpoint::base::BaseModel;

    #[test]
    fn rows_of_a_head_are_interleaved() {
        let values = (0..16).map(|value| value as f32).collect();
        let tensor = NamedTensor { name: "b".into(), shape: vec![8, 2], values };
        let rows: Vec<f32> = rows_in_order(&tensor, Some(2)).chunks(2).map(|row| row[0] / 2.0).collect();
        assert_eq!(rows, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
        assert_eq!(rows_in_order(&tensor, None), tensor.values);
    }

    #[test]
    fn a_module_that_adds_nothing_has_zeros_and_no_number_is_lost() {
        let mut adapter = read_adapter("tests/fixtures/tiny_qwen2/adapter_final_b0".as_ref()).unwrap();
        let base = BaseModel::open("tests/fixtures/tiny_qwen2").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let written = |adapter: &Adapter| {
            let path = folder.path().join("adapter.gguf");
            write_gguf(adapter, base.config(), &path).unwrap();
            std::fs::read(path).unwrap()
        };
        let key =
            |value: f32| [&b"adapter.lora.alpha"[..], &F32.to_le_bytes(), &value.to_le_bytes()].concat();
        let holds = |bytes: &[u8], part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
        // B stands right behind its A, whose length asks for no padding.
        let (a, b) = (adapter.tensors[0].clone(), adapter.tensors[1].clone());
        assert!(b.name.ends_with("layers.0.mlp.down_proj.lora_B.weight"));
        let a: Vec<u8> = a.values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let zeros = vec![0; size_of_val(&b.values[..])];
        assert!(!holds(&written(&adapter), &[&a[..], &zeros].concat()));
        adapter.config.alpha_pattern = "layers.0.mlp.down_proj=0".parse().unwrap();
        let bytes = written(&adapter);
        assert!(holds(&bytes, &key(adapter.config.alpha as f32)));
        assert!(holds(&bytes, &[&a[..], &zeros].concat()));
        adapter.config.alpha = 0.0;
        assert!(holds(&written(&adapter), &key(1.0)));
    }
}
