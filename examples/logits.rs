//! Writes the logits and losses of a base model with an adapter, for `tests/interop/check_adapter.py`.
//!
//! ```text
//! cargo run --release --example logits -- BASE ADAPTER OUT.safetensors
//! ```
//!
//! `input_ids` i32 `[rows, tokens]` are made up; `logits` f32 `[rows, tokens, vocabulary]` come one token at a time
//! through the KV cache, as in generation; `losses` f32 `[rows, tokens - 1]` of the same ids as one batch, as in training.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use fastlora::backend::cpu::CpuBackend;
use fastlora::batch::Batch;
use fastlora::checkpoint::adapter::read_adapter;
use fastlora::checkpoint::base::BaseModel;
use fastlora::error::{Error, Result};
use fastlora::inference::{NextTokenLogits, Session};
use fastlora::model::Transformer;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

const ROWS: usize = 2;
const TOKENS: usize = 24;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [base, adapter, out] = arguments.as_slice() else {
        return Err(Error::config("expected three arguments: BASE ADAPTER OUT.safetensors"));
    };
    let base = BaseModel::open(base)?;
    let adapter = read_adapter(Path::new(adapter))?;
    let mut model = Transformer::load_with_adapter(Arc::new(CpuBackend::new(None)?), &base, &adapter)?;
    let vocabulary = base.config().vocabulary;
    let rows: Vec<Vec<u32>> = (0..ROWS)
        .map(|row| {
            (0..TOKENS).map(|token| ((row * 7919 + token * 104_729 + 3) % vocabulary) as u32).collect()
        })
        .collect();

    let mut batch = Batch::default();
    for (row, ids) in rows.iter().enumerate() {
        let labels: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
        batch.push(row, ids, &labels);
    }
    let losses = model.evaluate(&batch)?.losses.clone();

    let mut session = Session::new(&mut model, TOKENS)?;
    let (mut all_logits, mut logits) = (Vec::with_capacity(ROWS * TOKENS * vocabulary), Vec::new());
    for ids in &rows {
        session.clear();
        for id in ids {
            session.next_token_logits(&[*id], &mut logits)?;
            all_logits.extend_from_slice(&logits);
        }
    }

    let ids: Vec<i32> = rows.iter().flatten().map(|id| *id as i32).collect();
    let view = |dtype, shape: &[usize], bytes| {
        TensorView::new(dtype, shape.to_vec(), bytes).map_err(|error| Error::internal(error.to_string()))
    };
    let tensors = BTreeMap::from([
        ("input_ids", view(Dtype::I32, &[ROWS, TOKENS], bytemuck::cast_slice(&ids))?),
        ("logits", view(Dtype::F32, &[ROWS, TOKENS, vocabulary], bytemuck::cast_slice(&all_logits))?),
        ("losses", view(Dtype::F32, &[ROWS, TOKENS - 1], bytemuck::cast_slice(&losses))?),
    ]);
    safetensors::serialize_to_file(tensors, None, Path::new(out))
        .map_err(|error| Error::io(error.to_string()).at(out))
}
