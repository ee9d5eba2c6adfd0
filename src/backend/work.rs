//! What an operation takes at least, from its shape: the measure that its time is held to.

/// The least that one run of an operation takes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Multiplications and additions.
    pub flops: f64,
    /// Bytes read and written, each input and output once.
    pub bytes: f64,
}

impl std::ops::Add for Work {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { flops: self.flops + other.flops, bytes: self.bytes + other.bytes }
    }
}

/// A group of linears with adapters on some rows.
#[derive(Clone, Copy, Debug)]
pub struct LinearShape {
    /// `T`.
    pub rows: usize,
    /// `I`.
    pub inputs: usize,
    /// `O`.
    pub outputs: usize,
    /// `R`, summed over the adapters.
    pub rank: usize,
    /// Elements of all `B`s.
    pub b_elements: usize,
    /// Bytes of the frozen weight as it is stored.
    pub weight_bytes: usize,
    /// Whether adapters have magnitudes.
    pub has_magnitudes: bool,
    /// Products with the frozen weight: 1, or 2 where adapters with magnitudes see another input than it does.
    pub frozen_products: usize,
}

impl LinearShape {
    /// The same where the adapters' input passes through dropout, or not.
    pub fn with_dropout(self, has_dropout: bool) -> Self {
        Self { frozen_products: if self.has_magnitudes && has_dropout { 2 } else { 1 }, ..self }
    }

    /// Elements of `v`, which adapters with magnitudes leave for the backward.
    fn v_elements(&self) -> usize {
        if self.has_magnitudes { self.rows * self.outputs } else { 0 }
    }
}

/// Which gradients of a linear are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearGradients {
    /// Of every `A`.
    pub a: bool,
    /// Of every `B`, and `ds` on the way.
    pub b: bool,
    /// Of the input.
    pub dx: bool,
}

impl LinearGradients {
    /// Of the adapters, and of the input where it is wanted.
    pub fn with_dx(dx: bool) -> Self {
        Self { a: true, b: true, dx }
    }
}

impl Work {
    /// `y = x · Wᵀ + s · Bᵀ`, `s = x · Aᵀ`, with activations of `element` bytes. With magnitudes `y = y + g∘v`.
    pub fn of_linear(shape: LinearShape, element: usize) -> Self {
        let LinearShape { rows, inputs, outputs, rank, b_elements, weight_bytes, frozen_products, .. } =
            shape;
        let adapters = rank * inputs + b_elements;
        let products = 2.0 * rows as f64 * (frozen_products * inputs * outputs + adapters) as f64;
        Self {
            flops: products + 2.0 * shape.v_elements() as f64,
            bytes: (weight_bytes + element * (rows * (inputs + outputs + rank) + shape.v_elements())) as f64,
        }
    }

    /// [`of_linear`](Self::of_linear) where `s` is there already.
    pub fn of_linear_given_s(shape: LinearShape, element: usize) -> Self {
        let (linear, LinearShape { rows, inputs, rank, .. }) = (Self::of_linear(shape, element), shape);
        Self { flops: linear.flops - 2.0 * (rows * rank) as f64 * inputs as f64, ..linear }
    }

    /// [`of_linear_given_s`](Self::of_linear_given_s) for gate and up, the activation of what it gives, and the `s` of an adapter
    /// of `down_rank` that reads it.
    pub fn of_gated_linear(shape: LinearShape, down_rank: usize, element: usize) -> Self {
        let (linear, LinearShape { rows, outputs, .. }) = (Self::of_linear_given_s(shape, element), shape);
        let gated = Self::of_gated_with_s(rows, outputs / 2, down_rank, element);
        // Gate and up are not read again.
        let bytes = linear.bytes + gated.bytes - (element * rows * outputs) as f64;
        Self { flops: linear.flops + gated.flops, bytes }
    }

    /// The gradients of `A` and `B`, f32, and `dx`, or some of them. With magnitudes `g∘dy` and theirs.
    pub fn of_linear_backward(shape: LinearShape, element: usize, wanted: LinearGradients) -> Self {
        let LinearShape { rows, inputs, outputs, rank, b_elements, weight_bytes, frozen_products, .. } =
            shape;
        let only = |wanted: bool, size: usize| if wanted { size } else { 0 };
        let (a_elements, b_elements) = (only(wanted.a, rank * inputs), only(wanted.b, b_elements));
        let dx = only(wanted.dx, inputs * (frozen_products * outputs + rank));
        // x, dy and s or ds are read; dx is written; gradients are added to.
        let activations = only(wanted.a, inputs) + only(wanted.b || wanted.dx, outputs) + rank;
        let (dx_width, weight_bytes) = (only(wanted.dx, inputs), only(wanted.dx, weight_bytes));
        let gradients = 8 * (a_elements + b_elements + only(shape.has_magnitudes, outputs));
        let products = 2.0 * rows as f64 * (dx + a_elements + 2 * b_elements) as f64;
        let activation_elements = rows * (activations + dx_width) + shape.v_elements();
        Self {
            flops: products + 3.0 * shape.v_elements() as f64,
            bytes: (weight_bytes + element * activation_elements + gradients) as f64,
        }
    }

    /// Causal attention of queries of `query_width` over `pairs` of a query and a key that it sees, on rows of
    /// `qkv_width`.
    pub fn of_attention(
        rows: usize,
        query_width: usize,
        qkv_width: usize,
        pairs: usize,
        element: usize,
        is_backward: bool,
    ) -> Self {
        let forward = 4.0 * query_width as f64 * pairs as f64;
        let bytes = (element * rows * (qkv_width + query_width)) as f64;
        match is_backward {
            false => Self { flops: forward, bytes },
            // The scores again, and four products more.
            true => Self { flops: 2.5 * forward, bytes: 2.0 * bytes },
        }
    }

    /// RMSNorm over `elements`. Backward: `x`, `dy`, and `dx` to and fro.
    pub fn of_rms_norm(elements: usize, element: usize, is_backward: bool) -> Self {
        let (passes, flops) = if is_backward { (4, 9) } else { (2, 4) };
        Self { flops: (flops * elements) as f64, bytes: (passes * elements * element) as f64 }
    }

    /// A gated activation with `elements` results.
    pub fn of_gated(elements: usize, element: usize, is_backward: bool) -> Self {
        let (passes, flops) = if is_backward { (5, 12) } else { (3, 6) };
        Self { flops: (flops * elements) as f64, bytes: (passes * elements * element) as f64 }
    }

    /// A gated activation of `rows` rows of `width` with `s = act · Aᵀ` of an adapter of `rank` that reads it.
    pub fn of_gated_with_s(rows: usize, width: usize, rank: usize, element: usize) -> Self {
        Self::of_gated(rows * width, element, false) + Self::of_s(rows, width, rank, element)
    }

    /// RMSNorm of `rows` rows of `width` with `s = y · Aᵀ` of adapters of `rank` together that read it.
    pub fn of_rms_norm_with_s(rows: usize, width: usize, rank: usize, element: usize) -> Self {
        Self::of_rms_norm(rows * width, element, false) + Self::of_s(rows, width, rank, element)
    }

    /// `s = x · Aᵀ` of adapters of `rank` together that read `rows` rows of `width`, where these are made.
    pub fn of_s(rows: usize, width: usize, rank: usize, element: usize) -> Self {
        Self {
            flops: 2.0 * (rows * rank) as f64 * width as f64,
            bytes: (element * rank * (rows + width)) as f64,
        }
    }

    /// The way back through the gates of `rows` rows of `width`, with what the adapters take from it: `ds` and the gradients
    /// of the `B`s of gate and up, whose ranks are `ranks[0]` together, and that of the `A` of down, of rank `ranks[1]`.
    pub fn of_mlp_middle_backward(rows: usize, width: usize, ranks: [usize; 2], element: usize) -> Self {
        let [gate_up, down] = ranks;
        let gates = Self::of_gated(rows * width, element, true);
        // s and ds of gate and up, ds of down.
        let narrow = element * rows * (2 * gate_up + down);
        Self {
            flops: gates.flops + 2.0 * (rows * width) as f64 * (2 * gate_up + down) as f64,
            bytes: gates.bytes + (narrow + 8 * width * (gate_up + down)) as f64,
        }
    }

    /// Rows that are read or written, `elements` in all.
    pub fn of_moving(elements: usize, element: usize) -> Self {
        Self { flops: 0.0, bytes: (elements * element) as f64 }
    }

    /// The output head on labelled rows of `width`, with the gradients of its input and of its weight where they are wanted.
    pub fn of_head(
        rows: usize,
        width: usize,
        vocabulary: usize,
        weight_bytes: usize,
        element: usize,
        gradients: [bool; 2],
    ) -> Self {
        let products = 1.0 + gradients.map(|wanted| f64::from(u8::from(wanted))).iter().sum::<f64>();
        Self {
            flops: products * 2.0 * (rows * width) as f64 * vocabulary as f64,
            bytes: products * (weight_bytes + element * rows * width) as f64,
        }
    }

    /// AdamW and clipping over `count` parameters, with copies in a type of `copy` bytes (0: none).
    pub fn of_adamw(count: usize, copy: usize) -> Self {
        // Parameters and moments to and fro, the gradients twice.
        Self { flops: 18.0 * count as f64, bytes: ((6 + 2) * 4 * count + copy * count) as f64 }
    }
}

/// Queries and the keys that each sees, over samples of these lengths.
pub fn attention_pairs(lengths: impl IntoIterator<Item = usize>, window: Option<usize>) -> usize {
    let seen = |position: usize| window.map_or(position + 1, |window| window.min(position + 1));
    lengths.into_iter().flat_map(|length| (0..length).map(seen)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn magnitudes_take_a_pass_over_the_output_and_with_dropout_a_product() {
        let plain = LinearShape {
            rows: 5,
            inputs: 24,
            outputs: 16,
            rank: 4,
            b_elements: 64,
            weight_bytes: 2 * 24 * 16,
            has_magnitudes: false,
            frozen_products: 1,
        };
        let (product, elements) = ((2 * 5 * 24 * 16) as f64, (5 * 16) as f64);
        assert_eq!(plain.with_dropout(true).frozen_products, 1);
        let linear = |shape| Work::of_linear(shape, 2);
        let backward = |shape| Work::of_linear_backward(shape, 2, LinearGradients::with_dx(true));
        let with = LinearShape { has_magnitudes: true, ..plain };
        for has_dropout in [false, true] {
            let with = with.with_dropout(has_dropout);
            let more = if has_dropout { product } else { 0.0 };
            let added = Work { flops: more + 2.0 * elements, bytes: 2.0 * elements };
            assert_eq!(linear(with), linear(plain) + added);
            let added = Work { flops: more + 3.0 * elements, bytes: 2.0 * elements + 8.0 * 16.0 };
            assert_eq!(backward(with), backward(plain) + added);
        }
    }
}
