//! A made-up group of linears with adapters, for the tests of linear.cu and lora.cu.

use fastlora::backend::Dropout;
use fastlora::backend::dropout;
use fastlora::device::Argument;

use crate::harness::*;

/// One projection: its output width and its adapter's rank, 0 for none.
pub type Projection = (usize, usize);

pub struct Group {
    pub tokens: usize,
    pub in_features: usize,
    pub projections: Vec<Projection>,
    pub name: String,
}

/// Where an adapter lies; see `slots` in lora.cu.
#[derive(Clone, Copy)]
pub struct Slot {
    pub out_begin: usize,
    pub out_end: usize,
    pub rank_begin: usize,
    pub rank_end: usize,
    pub b_offset: usize,
    pub scale: f32,
}

impl Group {
    pub fn new(tokens: usize, in_features: usize, projections: &[Projection]) -> Self {
        let name = format!("T={tokens} I={in_features} projections {projections:?}");
        Self { tokens, in_features, projections: projections.to_vec(), name }
    }

    pub fn out_features(&self) -> usize {
        self.projections.iter().map(|projection| projection.0).sum()
    }

    pub fn rank(&self) -> usize {
        self.projections.iter().map(|projection| projection.1).sum()
    }

    pub fn rank_leading(&self) -> usize {
        self.rank().next_multiple_of(8)
    }

    /// Adapters of projections with a rank; the `B` matrices follow the stacked `A` in the flat buffer.
    pub fn slots(&self) -> Vec<Slot> {
        let (mut out, mut rank_begin, mut slots) = (0, 0, Vec::new());
        let mut b_offset = self.rank() * self.in_features;
        for (index, &(out_features, rank)) in self.projections.iter().enumerate() {
            if rank > 0 {
                slots.push(Slot {
                    out_begin: out,
                    out_end: out + out_features,
                    rank_begin,
                    rank_end: rank_begin + rank,
                    b_offset,
                    scale: 0.5 + index as f32,
                });
                b_offset += out_features * rank;
            }
            out += out_features;
            rank_begin += rank;
        }
        slots
    }

    /// Length of the flat buffer.
    pub fn parameter_count(&self) -> usize {
        self.slots().last().map_or(0, |last| {
            last.b_offset + (last.out_end - last.out_begin) * (last.rank_end - last.rank_begin)
        })
    }

    /// `[T, R̄]` with NaN in the columns beyond R, which nobody may read.
    pub fn with_poisoned_padding(&self, mut s: Vec<u16>) -> Vec<u16> {
        if self.rank() > 0 {
            s.chunks_mut(self.rank_leading()).for_each(|row| row[self.rank()..].fill(0xFFFF));
        }
        s
    }

    /// B̂ [O][R̄] in halves, from a flat buffer.
    pub fn b_hat(&self, half: Half, parameters: &[f32]) -> Vec<u16> {
        let leading = self.rank_leading();
        let mut packed = vec![half.encode(0.0); self.out_features() * leading];
        for slot in self.slots() {
            let rank = slot.rank_end - slot.rank_begin;
            for out in slot.out_begin..slot.out_end {
                for column in 0..rank {
                    let value =
                        parameters[slot.b_offset + (out - slot.out_begin) * rank + column] * slot.scale;
                    packed[out * leading + slot.rank_begin + column] = half.encode(f64::from(value));
                }
            }
        }
        packed
    }
}

/// The slots' tables on the device.
pub struct SlotTables {
    pub slots: PlaceMemory,
    pub b_offsets: PlaceMemory,
    pub scales: PlaceMemory,
}

impl SlotTables {
    pub fn new(place: &Place, slots: &[Slot]) -> Self {
        let table: Vec<i32> = slots
            .iter()
            .flat_map(|slot| {
                [slot.out_begin, slot.out_end, slot.rank_begin, slot.rank_end].map(|value| value as i32)
            })
            .collect();
        let b_offsets: Vec<i64> = slots.iter().map(|slot| slot.b_offset as i64).collect();
        let scales: Vec<f32> = slots.iter().map(|slot| slot.scale).collect();
        Self {
            slots: upload(place, &table),
            b_offsets: upload(place, &b_offsets),
            scales: upload(place, &scales),
        }
    }
}

/// A dropout mask over tokens with made-up samples and positions.
pub struct Mask {
    pub dropout: Dropout,
    pub input_index: u32,
    pub positions: Vec<u32>,
    pub samples: Vec<u32>,
}

impl Mask {
    pub fn new(tokens: usize) -> Self {
        let dropout = Dropout { probability: 0.3, seed: 0x1234_5678_9abc_def0, epoch: 2 };
        let positions = (0..tokens as u32).map(|token| token % 7).collect();
        let samples = (0..tokens as u32).map(|token| 1000 + token / 7).collect();
        Self { dropout, input_index: 5, positions, samples }
    }

    /// 0 or 1 / (1 − p), by the crate's own definition of the mask.
    pub fn factor(&self, token: usize, feature: usize) -> f64 {
        let (sample, position) = (self.samples[token] as usize, self.positions[token] as usize);
        let kept = dropout::keep(self.dropout, sample, position, self.input_index, feature);
        if kept { f64::from(self.keep_scale()) } else { 0.0 }
    }

    fn keep_scale(&self) -> f32 {
        1.0 / (1.0 - self.dropout.probability)
    }

    /// Positions, samples and epoch on the device.
    pub fn upload(&self, place: &Place) -> [PlaceMemory; 3] {
        [&self.positions[..], &self.samples, &[self.dropout.epoch]].map(|values| upload(place, values))
    }

    /// The kernels' last arguments; null pointers for no dropout.
    pub fn arguments(&self, memories: Option<&[PlaceMemory; 3]>) -> [Argument; 8] {
        let address = |place: usize| memories.map_or(Argument::Address(0), |of| Argument::of(&of[place]));
        [
            address(0),
            address(1),
            Argument::U32(self.dropout.seed as u32),
            Argument::U32((self.dropout.seed >> 32) as u32),
            address(2),
            Argument::U32(self.input_index),
            Argument::U32(dropout::threshold(self.dropout.probability) as u32),
            Argument::F32(self.keep_scale()),
        ]
    }
}

/// Σ_k and Σ_k |…| of `terms`.
pub fn sum_and_magnitude(terms: impl Iterator<Item = f64>) -> (f64, f64) {
    terms.fold((0.0, 0.0), |(sum, magnitude), term| (sum + term, magnitude + term.abs()))
}

pub fn i32_of(value: usize) -> Argument {
    Argument::I32(value as i32)
}
