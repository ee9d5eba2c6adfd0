//! A writer of small GGUF files.

pub(super) fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// A metadata pair; `value` starts with its type code.
pub(super) fn pair(key: &str, value: impl AsRef<[u8]>) -> Vec<u8> {
    [string(key), value.as_ref().to_vec()].concat()
}

pub(super) fn text_value(text: &str) -> Vec<u8> {
    [8_u32.to_le_bytes().to_vec(), string(text)].concat()
}

pub(super) fn u32_value(value: u32) -> Vec<u8> {
    [4_u32, value].map(u32::to_le_bytes).concat()
}

pub(super) fn f32_value(value: f32) -> Vec<u8> {
    [6_u32.to_le_bytes(), value.to_le_bytes()].concat()
}

pub(super) fn strings_value(strings: &[&str]) -> Vec<u8> {
    let mut value =
        [[9_u32, 8].map(u32::to_le_bytes).concat(), (strings.len() as u64).to_le_bytes().to_vec()].concat();
    strings.iter().for_each(|text| value.extend(string(text)));
    value
}

pub(super) fn i32s_value(numbers: &[i32]) -> Vec<u8> {
    let mut value =
        [[9_u32, 5].map(u32::to_le_bytes).concat(), (numbers.len() as u64).to_le_bytes().to_vec()].concat();
    numbers.iter().for_each(|number| value.extend(number.to_le_bytes()));
    value
}

/// A row of the tensor table with the fastest axis first, and the tensor's data.
pub(super) struct Stored {
    pub name: String,
    pub axes: Vec<u64>,
    pub type_code: u32,
    pub data: Vec<u8>,
}

impl Stored {
    pub fn f32(name: &str, axes: &[u64], value: f32) -> Self {
        let data = vec![value; axes.iter().product::<u64>() as usize];
        Self {
            name: name.to_owned(),
            axes: axes.to_vec(),
            type_code: 0,
            data: data.iter().flat_map(|value| value.to_le_bytes()).collect(),
        }
    }
}

pub(super) fn file(metadata: &[Vec<u8>], tensors: &[Stored]) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3_u32.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((metadata.len() as u64).to_le_bytes());
    metadata.iter().for_each(|pair| bytes.extend(pair));
    let mut offset = 0;
    for tensor in tensors {
        bytes.extend(string(&tensor.name));
        bytes.extend((tensor.axes.len() as u32).to_le_bytes());
        tensor.axes.iter().for_each(|length| bytes.extend(length.to_le_bytes()));
        bytes.extend(tensor.type_code.to_le_bytes());
        bytes.extend((offset as u64).to_le_bytes());
        offset += tensor.data.len().next_multiple_of(32);
    }
    for tensor in tensors {
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.extend(&tensor.data);
    }
    bytes
}

/// Metadata of a model with hidden size 4, one layer, one head, three tokens.
pub(super) fn small_metadata(architecture: &str) -> Vec<Vec<u8>> {
    let key = |name: &str| format!("{architecture}.{name}");
    vec![
        pair("general.architecture", text_value(architecture)),
        pair(&key("block_count"), u32_value(1)),
        pair(&key("context_length"), u32_value(16)),
        pair(&key("embedding_length"), u32_value(4)),
        pair(&key("feed_forward_length"), u32_value(8)),
        pair(&key("attention.head_count"), u32_value(1)),
        pair(&key("attention.layer_norm_rms_epsilon"), f32_value(1e-5)),
        pair("tokenizer.ggml.model", text_value("gpt2")),
        pair("tokenizer.ggml.pre", text_value("gpt-2")),
        pair("tokenizer.ggml.tokens", strings_value(&["<|end|>", "a", "b", "ab"])),
        pair("tokenizer.ggml.token_type", i32s_value(&[3, 1, 1, 1])),
        pair("tokenizer.ggml.merges", strings_value(&["a b"])),
        pair("tokenizer.ggml.eos_token_id", u32_value(0)),
    ]
}

pub(super) fn small_tensors() -> Vec<Stored> {
    let mut tensors = vec![
        Stored::f32("token_embd.weight", &[4, 4], 0.5),
        Stored::f32("output_norm.weight", &[4], 1.0),
        Stored::f32("blk.0.attn_norm.weight", &[4], 1.0),
        Stored::f32("blk.0.ffn_norm.weight", &[4], 1.0),
        Stored::f32("blk.0.ffn_gate.weight", &[4, 8], 0.5),
        Stored::f32("blk.0.ffn_up.weight", &[4, 8], 0.5),
        Stored::f32("blk.0.ffn_down.weight", &[8, 4], 0.5),
    ];
    tensors.extend(
        ["q", "k", "v", "output"]
            .map(|name| Stored::f32(&format!("blk.0.attn_{name}.weight"), &[4, 4], 0.25)),
    );
    tensors
}

pub(super) fn small_file() -> Vec<u8> {
    file(&small_metadata("llama"), &small_tensors())
}
