//! The search for NaN and infinity in weights, at the speed of memory.

use half::{bf16, f16};
use rayon::prelude::*;

use crate::dtype::DType;
use crate::tensor::WeightTensor;

/// Bytes that one task looks at; a multiple of every element size.
const TASK_BYTES: usize = 1 << 20;
/// Bytes looked at between two decisions whether to stop.
const BLOCK_BYTES: usize = 4096;

/// Looks at every element of `tensors`, in parallel. The first tensor with one that is not finite is returned as its
/// name and a message that says which, where and how many.
pub(crate) fn check_finite(tensors: &[WeightTensor]) -> Result<(), (String, String)> {
    let tasks: Vec<(&WeightTensor, &[u8])> = tensors
        .iter()
        .flat_map(|tensor| tensor.bytes().chunks(TASK_BYTES).map(move |bytes| (tensor, bytes)))
        .collect();
    let bad = tasks.par_iter().find_first(|(tensor, bytes)| !all_finite(tensor.dtype(), bytes));
    match bad {
        None => Ok(()),
        Some((tensor, _)) => Err((tensor.name().to_owned(), describe(tensor))),
    }
}

fn all_finite(dtype: DType, bytes: &[u8]) -> bool {
    bytes.chunks(BLOCK_BYTES).all(|block| match dtype {
        DType::F32 => !any_with_exponent_32(block),
        DType::F16 => !any_with_exponent_16(block, 0x7c00),
        DType::Bf16 => !any_with_exponent_16(block, 0x7f80),
    })
}

/// Whether any element has all bits of the exponent set: NaN or infinity. No early exit, so that it vectorises.
fn any_with_exponent_16(block: &[u8], exponent: u16) -> bool {
    let (elements, _) = block.as_chunks::<2>();
    elements.iter().fold(false, |found, bits| found | (u16::from_le_bytes(*bits) & exponent == exponent))
}

fn any_with_exponent_32(block: &[u8]) -> bool {
    const EXPONENT: u32 = 0x7f80_0000;
    let (elements, _) = block.as_chunks::<4>();
    elements.iter().fold(false, |found, bits| found | (u32::from_le_bytes(*bits) & EXPONENT == EXPONENT))
}

/// Which value, at which coordinate, and how many in all.
fn describe(tensor: &WeightTensor) -> String {
    let value = |bytes: &[u8]| match (tensor.dtype(), bytes) {
        (DType::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
        (DType::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
        (DType::Bf16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
        _ => 0.0,
    };
    let elements = tensor.bytes().chunks_exact(tensor.dtype().bytes()).map(value);
    let mut bad = elements.enumerate().filter(|(_, value)| !value.is_finite());
    let Some((first, value)) = bad.next() else { return "a weight is not finite".to_owned() };
    let mut coordinate = Vec::with_capacity(tensor.shape().len());
    let mut rest = first;
    for &length in tensor.shape().iter().rev() {
        coordinate.push(rest % length);
        rest /= length;
    }
    coordinate.reverse();
    format!(
        "{value} at {coordinate:?}, {} of {} weights are not finite",
        1 + bad.count(),
        tensor.element_count()
    )
}
