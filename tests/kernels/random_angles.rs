//! Made-up angles, one stretch of the table for short texts and one for long ones: `Angles` of rope_angles.h.

use fastlora::device::Argument;

use crate::harness::*;
use crate::lora_group::i32_of;

/// Rows of the table: where those of short texts begin, then of long ones, which have more than `LONGER_THAN` tokens.
const FIRST_ROW: usize = 1;
const LONG_FIRST_ROW: usize = 9;
const LONGER_THAN: u32 = 20;
const ROWS: usize = 17;

/// Angles of every token at random positions; every other token is of a long text.
pub struct RandomAngles {
    table: PlaceMemory,
    positions: PlaceMemory,
    lengths: PlaceMemory,
}

impl RandomAngles {
    pub fn new(place: &Place, tokens: usize, head_dim: usize) -> Self {
        let mut random = Random(tokens as u64);
        let positions: Vec<u32> = (0..tokens).map(|_| random.below(ROWS - LONG_FIRST_ROW) as u32).collect();
        let lengths: Vec<u32> = (0..tokens as u32).map(|token| LONGER_THAN + token % 2).collect();
        Self {
            table: upload(place, &random.floats(ROWS * head_dim, 1.0)),
            positions: upload(place, &positions),
            lengths: upload(place, &lengths),
        }
    }

    /// The table, positions and lengths.
    pub fn arrays(&self) -> [Argument; 3] {
        [&self.table, &self.positions, &self.lengths].map(Argument::of)
    }

    /// The first row, what long texts are longer than, and their first row.
    pub fn rows(&self) -> [Argument; 3] {
        [i32_of(FIRST_ROW), Argument::I32(LONGER_THAN as i32), i32_of(LONG_FIRST_ROW)]
    }

    /// Rotates heads by rope.cu, without norms: `rope_forward` or `rope_backward` from `[input, output]`.
    pub fn rope(
        &self,
        place: &Place,
        kernel: &str,
        tokens: usize,
        [query_heads, key_heads, head_dim]: [usize; 3],
        [input, output]: [Argument; 2],
    ) {
        let no_norm = Argument::Address(0);
        let mut arguments = vec![input, no_norm, no_norm];
        arguments.extend(self.arrays());
        arguments.push(output);
        arguments.extend([tokens, query_heads, key_heads, head_dim, head_dim].map(i32_of));
        arguments.extend(self.rows());
        arguments.extend([Argument::F32(0.0); 2]);
        let blocks = (tokens * (query_heads + key_heads)).div_ceil(4);
        launch(place, kernel, blocks, 128, &arguments);
    }
}
