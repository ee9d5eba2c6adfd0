//! lora_back.cu

use fastlora::device::Argument;

use crate::harness::*;
use crate::lora::without_padding;
use crate::lora_group::*;

/// Tokens of a stretch, by the ranks of a block.
fn stretch(block_ranks: usize) -> usize {
    128 * 64 / block_ranks
}

/// The group and the ranks of a block: one token; ragged tiles; ranks that begin at no multiple of 8; several stretches,
/// blocks of outputs (1024 each) and blocks of ranks.
fn groups() -> Vec<(Group, usize)> {
    vec![
        (Group::new(1, 8, &[(8, 1)]), 16),
        (Group::new(67, 8, &[(48, 3), (24, 5), (24, 3)]), 16),
        (Group::new(530, 8, &[(1096, 4), (8, 9)]), 16),
        (Group::new(280, 8, &[(40, 20)]), 32),
        (Group::new(130, 8, &[(64, 40), (32, 0), (40, 30)]), 64),
        (Group::new(140, 8, &[(72, 3), (136, 70)]), 64),
    ]
}

/// What passes over gradients leave for the adapters of a group, in partial sums.
pub struct Partials {
    /// Elements from one row of ds's to the next: the largest rank.
    pub rank_width: usize,
    /// Outputs that a block sums over.
    pub block_outputs: usize,
    pub stretches: usize,
    /// Elements of all B.
    pub b_elements: usize,
    ds_blocks: usize,
}

impl Partials {
    pub fn new(group: &Group, stretches: usize, block_outputs: usize) -> Self {
        let slots = group.slots();
        let of = |size: &dyn Fn(&Slot, usize) -> usize| -> Vec<usize> {
            slots.iter().map(|slot| size(slot, slot.rank_end - slot.rank_begin)).collect()
        };
        Self {
            rank_width: of(&|_, rank| rank).into_iter().max().unwrap_or(0),
            block_outputs,
            stretches,
            b_elements: of(&|slot, rank| (slot.out_end - slot.out_begin) * rank).iter().sum(),
            ds_blocks: of(&|slot, _| (slot.out_end - slot.out_begin).div_ceil(block_outputs)).iter().sum(),
        }
    }

    /// Room for those of ds and of dB.
    pub fn poisoned(&self, place: &Place, tokens: usize) -> [PlaceMemory; 2] {
        [self.ds_blocks * tokens * self.rank_width, self.stretches * self.b_elements]
            .map(|elements| poisoned::<f32>(place, elements))
    }

    /// ds [T, R̄] in bytes, then `before` with dB added.
    pub fn add_up(
        &self,
        place: &Place,
        half: Half,
        group: &Group,
        tables: &SlotTables,
        [ds_partials, b_partials]: &[PlaceMemory; 2],
        before: &[f32],
    ) -> Vec<u8> {
        let (tokens, rank, leading) = (group.tokens, group.rank(), group.rank_leading());
        let adapters = group.slots().len();
        let ds = poisoned::<u16>(place, tokens * leading);
        let mut arguments = [ds_partials, &tables.slots, &ds].map(Argument::of).to_vec();
        let sizes = [tokens, adapters, rank, leading, self.rank_width, self.block_outputs];
        arguments.extend(sizes.map(i32_of));
        let blocks = (tokens * rank).div_ceil(256);
        launch(place, &format!("lora_sum_ds_{}", half.suffix()), blocks, 256, &arguments);

        let gradients = upload(place, before);
        let mut arguments = [b_partials, &tables.slots, &tables.b_offsets, &tables.scales, &gradients]
            .map(Argument::of)
            .to_vec();
        arguments.extend([self.stretches, adapters].map(i32_of));
        arguments.push(Argument::I64(self.b_elements as i64));
        launch(place, "lora_add_b_gradient", self.b_elements.div_ceil(256), 256, &arguments);
        let mut bytes: Vec<u8> = download(place, &ds);
        bytes.extend(download::<u8>(place, &gradients));
        bytes
    }

    /// Compares these bytes with ds and dB of `dy [T, O]`; `s` is [T, R̄].
    pub fn check(
        &self,
        name: &str,
        half: Half,
        group: &Group,
        bytes: &[u8],
        [dy, s, b_hat]: [&[f64]; 3],
        before: &[f32],
    ) {
        let (tokens, outputs) = (group.tokens, group.out_features());
        let (rank, leading) = (group.rank(), group.rank_leading());
        let (ds, gradients) = bytes.split_at(tokens * leading * 2);
        let element = |i: usize| {
            let terms = (0..outputs).map(|k| dy[i / rank * outputs + k] * b_hat[k * leading + i % rank]);
            let (sum, magnitude) = sum_and_magnitude(terms);
            Expected::rounded_sum(half, sum, magnitude, outputs)
        };
        let expected: Vec<Expected> = (0..tokens * rank).map(element).collect();
        let ds = half.decode_all(&without_padding(&values_of(ds), rank, leading));
        assert_close(&format!("{name} ds"), rank, &ds, &expected);

        let gradients: Vec<f32> = values_of(gradients);
        let a_elements = rank * group.in_features;
        assert!(gradients[..a_elements] == before[..a_elements], "{name}: the gradients of A were touched");
        let mut expected = Vec::new();
        for slot in &group.slots() {
            for out in slot.out_begin..slot.out_end {
                for column in slot.rank_begin..slot.rank_end {
                    let terms = (0..tokens).map(|t| dy[t * outputs + out] * s[t * leading + column]);
                    let (sum, magnitude) = sum_and_magnitude(terms);
                    let (already, scale) =
                        (f64::from(before[a_elements + expected.len()]), f64::from(slot.scale));
                    let magnitude = already.abs() + scale * magnitude;
                    let terms = tokens + self.stretches;
                    expected.push(Expected::float_sum(already + scale * sum, magnitude, terms));
                }
            }
        }
        let found: Vec<f64> = gradients[a_elements..].iter().map(|&value| f64::from(value)).collect();
        assert_close(&format!("{name} dB"), rank, &found, &expected);
    }
}

/// ds, and dB added to gradients that are already there.
fn back(half: Half, group: &Group, block_ranks: usize) {
    let name = format!("lora_back_{block_ranks}_{} {}", half.suffix(), group.name);
    let (tokens, outputs, leading) = (group.tokens, group.out_features(), group.rank_leading());
    let mut random = Random(tokens as u64 + 1);
    let dy = random.halves(half, tokens * outputs, 1.0);
    let s = group.with_poisoned_padding(random.halves(half, tokens * leading, 1.0));
    let parameters = random.floats(group.parameter_count(), 1.0);
    let before = random.floats(group.parameter_count(), 1.0);
    let expected_b_hat = group.b_hat(half, &parameters);
    let slots = group.slots();
    let widest = slots.iter().map(|slot| slot.rank_end - slot.rank_begin / 8 * 8).max().unwrap();
    let partials = Partials::new(group, tokens.div_ceil(stretch(block_ranks)), 1024);
    let bytes = run_everywhere(&name, |device| {
        let tables = SlotTables::new(device, &slots);
        let memory = |values: &[u16]| upload(device, values);
        let (dy, s, parameters) = (memory(&dy), memory(&s), upload(device, &parameters));
        let b_hat = poisoned::<u16>(device, outputs * leading);
        let mut arguments = [&parameters, &tables.slots, &tables.b_offsets, &tables.scales, &b_hat]
            .map(Argument::of)
            .to_vec();
        arguments.extend([slots.len(), outputs, leading].map(i32_of));
        let blocks = (outputs * leading).div_ceil(256);
        launch(device, &format!("lora_pack_{}", half.suffix()), blocks, 256, &arguments);

        let sums @ [ds_partials, b_partials] = &partials.poisoned(device, tokens);
        let mut arguments =
            [&dy, &b_hat, &s, &tables.slots, ds_partials, b_partials].map(Argument::of).to_vec();
        arguments.extend([tokens, outputs, slots.len(), leading, partials.rank_width].map(i32_of));
        arguments.push(Argument::I64(partials.b_elements as i64));
        let grid = [partials.stretches, partials.ds_blocks, widest.div_ceil(block_ranks)];
        let shared = 2 * (4 * 64 * 64 + 128 * 64 + 4 * 64 * block_ranks);
        let kernel = format!("lora_back_{block_ranks}_{}", half.suffix());
        launch_grid(device, &kernel, grid.map(|blocks| blocks as u32), 256, shared as u32, &arguments);
        let mut bytes: Vec<u8> = download(device, &b_hat);
        bytes.extend(partials.add_up(device, half, group, &tables, sums, &before));
        bytes
    });
    let (b_hat, sums) = bytes.split_at(outputs * leading * 2);
    let b_hat: Vec<u16> = values_of(b_hat);
    assert!(b_hat == expected_b_hat, "{name}: packed B");
    let [dy, s, b_hat] = [&dy, &s, &b_hat].map(|bits| half.decode_all(bits));
    partials.check(&name, half, group, sums, [&dy, &s, &b_hat], &before);
}

#[test]
fn one_pass_over_dy_gives_ds_and_the_gradients_of_b() {
    for half in HALVES {
        for (group, block_ranks) in groups() {
            back(half, &group, block_ranks);
        }
    }
}
