//! Stored element types and how each turns into f32.
//!
//! A quantised row is a sequence of blocks; a block holds a scale d (f16), sometimes a minimum m, and small integers q.
//! `w = d·q` or `w = d·q + m`, every product rounded to f32 in the order below, so that the result is the reference's bit
//! for bit. Source: the block layouts of ggml's `ggml-common.h`.

use std::fmt;

use half::{bf16, f16};

/// Element types that import reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BlockType {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

impl BlockType {
    const ALL: [Self; 11] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// The type with this number in the file; `Err` names what it is instead.
    pub fn from_code(code: u32) -> Result<Self, String> {
        let unsupported = match code {
            0 => return Ok(Self::F32),
            1 => return Ok(Self::F16),
            2 => return Ok(Self::Q4_0),
            3 => return Ok(Self::Q4_1),
            6 => return Ok(Self::Q5_0),
            7 => return Ok(Self::Q5_1),
            8 => return Ok(Self::Q8_0),
            12 => return Ok(Self::Q4K),
            13 => return Ok(Self::Q5K),
            14 => return Ok(Self::Q6K),
            30 => return Ok(Self::Bf16),
            9 => "Q8_1",
            10 => "Q2_K",
            11 => "Q3_K",
            15 => "Q8_K",
            16 => "IQ2_XXS",
            17 => "IQ2_XS",
            18 => "IQ3_XXS",
            19 => "IQ1_S",
            20 => "IQ4_NL",
            21 => "IQ3_S",
            22 => "IQ2_S",
            23 => "IQ4_XS",
            24 => "I8",
            25 => "I16",
            26 => "I32",
            27 => "I64",
            28 => "F64",
            29 => "IQ1_M",
            34 => "TQ1_0",
            35 => "TQ2_0",
            39 => "MXFP4",
            _ => return Err(format!("unknown type {code}")),
        };
        Err(unsupported.to_owned())
    }

    /// Names for an error message.
    pub fn supported_names() -> String {
        Self::ALL.map(|block_type| block_type.to_string()).join(", ")
    }

    /// Elements of one block.
    pub const fn elements(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of one block.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q4_0 => 2 + 16,
            Self::Q4_1 => 2 + 2 + 16,
            Self::Q5_0 => 2 + 4 + 16,
            Self::Q5_1 => 2 + 2 + 4 + 16,
            Self::Q8_0 => 2 + 32,
            Self::Q4K => 2 + 2 + 12 + 128,
            Self::Q5K => 2 + 2 + 12 + 32 + 128,
            Self::Q6K => 128 + 64 + 16 + 2,
        }
    }

    /// Bytes of `elements` elements, a multiple of the block.
    pub const fn bytes_of(self, elements: usize) -> usize {
        elements / self.elements() * self.bytes()
    }

    /// Turns whole blocks into as many values. `bytes` and `values` must describe the same number of blocks.
    pub fn dequantize(self, bytes: &[u8], values: &mut [f32]) {
        debug_assert_eq!(bytes.len(), self.bytes_of(values.len()));
        let block = match self {
            Self::F32 => |block: &[u8], w: &mut [f32]| {
                w[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]])
            },
            Self::F16 => |block: &[u8], w: &mut [f32]| w[0] = half_at(block, 0),
            Self::Bf16 => {
                |block: &[u8], w: &mut [f32]| w[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32()
            }
            Self::Q4_0 => q4_0,
            Self::Q4_1 => q4_1,
            Self::Q5_0 => q5_0,
            Self::Q5_1 => q5_1,
            Self::Q8_0 => q8_0,
            Self::Q4K => q4_k,
            Self::Q5K => q5_k,
            Self::Q6K => q6_k,
        };
        for (bytes, values) in bytes.chunks_exact(self.bytes()).zip(values.chunks_exact_mut(self.elements()))
        {
            block(bytes, values);
        }
    }
}

impl fmt::Display for BlockType {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        })
    }
}

/// The f16 at byte `start`.
fn half_at(block: &[u8], start: usize) -> f32 {
    f16::from_le_bytes([block[start], block[start + 1]]).to_f32()
}

/// Element i of 32 four-bit integers: low halves of the 16 bytes are elements 0–15, high halves 16–31.
fn nibble(nibbles: &[u8], i: usize) -> u8 {
    if i < 16 { nibbles[i] & 15 } else { nibbles[i - 16] >> 4 }
}

/// Fifth bit of element i, in place (16 or 0).
fn fifth_bit(high_bits: &[u8], i: usize) -> u8 {
    (high_bits[i / 8] >> (i % 8) & 1) << 4
}

/// d, 16 bytes of nibbles: `w = d·(q − 8)`.
fn q4_0(block: &[u8], values: &mut [f32]) {
    let scale = half_at(block, 0);
    for (i, value) in values.iter_mut().enumerate() {
        *value = scale * (f32::from(nibble(&block[2..], i)) - 8.0);
    }
}

/// d, m, 16 bytes of nibbles: `w = d·q + m`.
fn q4_1(block: &[u8], values: &mut [f32]) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    for (i, value) in values.iter_mut().enumerate() {
        *value = scale * f32::from(nibble(&block[4..], i)) + minimum;
    }
}

/// d, 32 fifth bits, 16 bytes of nibbles: `w = d·(q − 16)`.
fn q5_0(block: &[u8], values: &mut [f32]) {
    let scale = half_at(block, 0);
    for (i, value) in values.iter_mut().enumerate() {
        let q = nibble(&block[6..], i) | fifth_bit(&block[2..6], i);
        *value = scale * (f32::from(q) - 16.0);
    }
}

/// d, m, 32 fifth bits, 16 bytes of nibbles: `w = d·q + m`.
fn q5_1(block: &[u8], values: &mut [f32]) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    for (i, value) in values.iter_mut().enumerate() {
        let q = nibble(&block[8..], i) | fifth_bit(&block[4..8], i);
        *value = scale * f32::from(q) + minimum;
    }
}

/// d, 32 signed bytes: `w = d·q`.
fn q8_0(block: &[u8], values: &mut [f32]) {
    let scale = half_at(block, 0);
    for (value, &q) in values.iter_mut().zip(&block[2..]) {
        *value = scale * f32::from(q as i8);
    }
}

/// Six-bit scale and minimum of sub-block `group` (0–7): the first four lie in the low six bits of bytes 0–3 and 4–7, the
/// others have four bits in bytes 8–11 and their upper two in the top of bytes 0–7.
fn scale_and_minimum(packed: &[u8], group: usize) -> (f32, f32) {
    let (scale, minimum) = if group < 4 {
        (packed[group] & 63, packed[group + 4] & 63)
    } else {
        (
            packed[group + 4] & 15 | packed[group - 4] >> 6 << 4,
            packed[group + 4] >> 4 | packed[group] >> 6 << 4,
        )
    };
    (f32::from(scale), f32::from(minimum))
}

/// d, m, 12 bytes of packed scales, 128 bytes of nibbles: eight groups of 32, `w = (d·scale)·q − (m·minimum)`. Groups 2k
/// and 2k + 1 are the low and high halves of nibble bytes 32k to 32k + 31.
fn q4_k(block: &[u8], values: &mut [f32]) {
    k_quant_groups(block, &block[16..], values, |_, _| 0);
}

/// As Q4_K with 32 bytes of fifth bits in front of the nibbles: bit `group` of byte i belongs to element i of the group.
fn q5_k(block: &[u8], values: &mut [f32]) {
    k_quant_groups(block, &block[48..], values, |group, i| (block[16 + i] >> group & 1) << 4);
}

fn k_quant_groups(block: &[u8], nibbles: &[u8], values: &mut [f32], high: impl Fn(usize, usize) -> u8) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    for (group, values) in values.chunks_exact_mut(32).enumerate() {
        let (group_scale, group_minimum) = scale_and_minimum(&block[4..16], group);
        let (d, m) = (scale * group_scale, minimum * group_minimum);
        for (i, value) in values.iter_mut().enumerate() {
            let byte = nibbles[group / 2 * 32 + i];
            let low = if group % 2 == 0 { byte & 15 } else { byte >> 4 };
            *value = d * f32::from(low | high(group, i)) - m;
        }
    }
}

/// 128 bytes of nibbles, 64 bytes of upper bit pairs, 16 signed scales, d: `w = (d·scale)·(q − 32)`. Half h (128 elements)
/// has four groups of 32: group g takes nibble bytes 64h + 32(g mod 2), low halves for g < 2, and bits 2g of the pair bytes.
fn q6_k(block: &[u8], values: &mut [f32]) {
    let (nibbles, pairs, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let scale = half_at(block, 208);
    for (group, values) in values.chunks_exact_mut(32).enumerate() {
        let (half, g) = (group / 4, group % 4);
        for (i, value) in values.iter_mut().enumerate() {
            let byte = nibbles[half * 64 + g % 2 * 32 + i];
            let low = if g < 2 { byte & 15 } else { byte >> 4 };
            let high = pairs[half * 32 + i] >> (2 * g) & 3;
            let group_scale = f32::from(scales[group * 2 + i / 16] as i8);
            *value = (scale * group_scale) * (f32::from(low | high << 4) - 32.0);
        }
    }
}
