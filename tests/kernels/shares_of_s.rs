//! `s = x · Aᵀ` of an adapter, where the kernel that makes `x` leaves shares of it: lora.cu's `lora_sum_s`.

use fastlora::device::Argument;

use crate::harness::*;
use crate::lora::expected_s;
use crate::lora_group::*;

/// Room for the shares, `[parts, T, R̄]`, one of each stretch of the columns of `x`.
pub struct Shares {
    pub partials: PlaceMemory,
    parts: usize,
    elements: usize,
}

impl Shares {
    pub fn new(place: &Place, parts: usize, tokens: usize, rank: usize) -> Self {
        let elements = tokens * rank.next_multiple_of(8);
        Self { partials: poisoned::<f32>(place, parts * elements), parts, elements }
    }

    /// `s [T, R̄]`.
    pub fn sum(&self, place: &Place, half: Half) -> Vec<u16> {
        let s = poisoned::<u16>(place, self.elements);
        let mut arguments = [&self.partials, &s].map(Argument::of).to_vec();
        arguments.extend([i32_of(self.parts), Argument::I64(self.elements as i64)]);
        let blocks = (self.elements / 4).div_ceil(256);
        launch(place, &format!("lora_sum_s_{}", half.suffix()), blocks, 256, &arguments);
        download(place, &s)
    }
}

/// Compares `s` with `x · Aᵀ`; behind its ranks it is zero. `x [T, width]` as the adapter sees it, `a [rank, width]`.
pub fn check_s(name: &str, half: Half, rank: usize, x: &[f64], a: &[u16], s: &[u16]) {
    let (width, leading) = (a.len() / rank, rank.next_multiple_of(8));
    let expected = expected_s(half, x, &half.decode_all(a), width);
    assert!(s.chunks(leading).all(|row| row[rank..].iter().all(|&bits| bits == 0)), "{name}: padding of s");
    let s: Vec<u16> = s.chunks(leading).flat_map(|row| &row[..rank]).copied().collect();
    assert_close(&format!("{name}, s"), rank, &half.decode_all(&s), &expected);
}
