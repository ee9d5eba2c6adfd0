//! linear_sm90a.cu's products that go on, against the kernels that they stand for: the same bits.

use fastlora::device::Argument;

use crate::harness::*;
use crate::lora_group::*;
use crate::random_angles::RandomAngles;
use crate::shares_of_s::{Shares, check_s};

const NULL: Argument = Argument::Address(0);

/// What follows the product.
#[derive(Clone, Copy, Debug)]
enum Rest {
    /// Of gate and up; with the `s` of down's adapter, if it has a rank.
    Gated { is_gelu: bool, down_rank: usize },
    /// Of queries, keys and values with heads of so many columns.
    Rotated { head_dim: usize, rotated_heads: usize },
}
use Rest::{Gated, Rotated};

/// `A [rank, width]` of down.
fn down_a(half: Half, rank: usize, width: usize) -> Vec<u16> {
    Random(width as u64).halves(half, rank * width, 1.0)
}

/// Everything that the product wrote, by the fused kernel if `is_fused`, else by the plain one and the one behind it; at the
/// end the `s` of down where it is asked for.
fn outputs(place: &Place, half: Half, group: &Group, columns: usize, rest: Rest, is_fused: bool) -> Vec<u16> {
    let (tokens, inputs, outputs) = (group.tokens, group.in_features, group.out_features());
    let (rank, leading, suffix) = (group.rank(), group.rank_leading(), half.suffix());
    let mut random = Random(tokens as u64 + inputs as u64);
    let [x, w, bias] =
        [tokens * inputs, outputs * inputs, outputs].map(|count| random.halves(half, count, 1.0));
    let s = group.with_poisoned_padding(random.halves(half, tokens * leading, 1.0));
    let b_hat = group.b_hat(half, &random.floats(group.parameter_count(), 1.0));

    let memories = [&x, &w, &bias, &s, &b_hat].map(|values| upload(place, values));
    let tables = SlotTables::new(place, &group.slots());
    let y = poisoned::<u16>(place, tokens * outputs);
    let [x, w, bias, s, b_hat] = &memories;
    let (x, w) = (boxes(x, [tokens, inputs], inputs, 128), boxes(w, [outputs, inputs], inputs, columns / 2));
    let mut arguments = match rank {
        0 => vec![x, w, x, w],
        _ => vec![
            x,
            w,
            boxes(s, [tokens, rank], leading, 128),
            boxes(b_hat, [outputs, rank], leading, columns / 2),
        ],
    };
    let whole_y = boxes(&y, [tokens, outputs], outputs, 64);
    let (bias, slots) = (Argument::of(bias), Argument::of(&tables.slots));
    let sizes = [tokens, inputs, outputs, group.slots().len()].map(i32_of);
    let width = outputs / 2;
    let second = match rest {
        Gated { .. } => poisoned::<u16>(place, tokens * width),
        Rotated { head_dim, rotated_heads } => poisoned::<u16>(place, tokens * rotated_heads * head_dim),
    };
    let product = |name: &str, arguments: &[Argument]| {
        // Fewer blocks than tiles: each takes several. The fused kernel runs in a cluster, the plain one does not.
        let kernel = format!("linear_forward{name}_sm90a_n{columns}_{suffix}");
        let cluster_blocks = if is_fused { 2 } else { 1 };
        launch_clusters(place, &kernel, [2, 1, 1], cluster_blocks, 384, 227 << 10, arguments);
    };
    let mut s_of_down = Vec::new();
    if !is_fused {
        arguments.extend([whole_y, whole_y, bias, slots, Argument::I32(0)]);
        arguments.extend(sizes);
        product("", &arguments);
    }
    match rest {
        Gated { is_gelu, down_rank } if is_fused => {
            for (memory, first, stride) in [(&y, 0, outputs), (&y, width, outputs), (&second, 0, width)] {
                arguments.push(boxes_from(memory, first, [tokens, width], stride, 64));
            }
            let a = upload(place, &down_a(half, down_rank, width));
            let shares = Shares::new(place, width.div_ceil(columns / 2), tokens, down_rank);
            let (down, partials) = match down_rank {
                0 => (x, NULL),
                _ => (boxes(&a, [down_rank, width], width, 64), Argument::of(&shares.partials)),
            };
            arguments.extend([down, bias, slots, partials, sizes[0], sizes[1], i32_of(width), sizes[3]]);
            arguments.extend([i32_of(down_rank.next_multiple_of(8)), Argument::I32(i32::from(is_gelu))]);
            product("_gated", &arguments);
            if down_rank > 0 {
                s_of_down = shares.sum(place, half);
            }
        }
        Gated { is_gelu, .. } => {
            let name = if is_gelu { "gelu" } else { "silu" };
            let arguments = [Argument::of(&y), Argument::of(&second), i32_of(tokens), i32_of(width)];
            let blocks = (tokens * width / 8).div_ceil(256);
            launch(place, &format!("gated_{name}_forward_{suffix}"), blocks, 256, &arguments);
        }
        Rotated { head_dim, rotated_heads } => {
            let angles = RandomAngles::new(place, tokens, head_dim);
            if is_fused {
                arguments.extend([whole_y, bias, slots]);
                arguments.extend(angles.arrays());
                arguments.extend(angles.rows());
                arguments.extend([head_dim, rotated_heads * head_dim].map(i32_of));
                arguments.extend(sizes);
                product("_rotated", &arguments);
            } else {
                let key_heads = outputs / head_dim - rotated_heads;
                let heads = [rotated_heads - key_heads, key_heads, head_dim];
                let memories = [&y, &second].map(Argument::of);
                angles.rope(place, &format!("rope_forward_{suffix}"), tokens, heads, memories);
            }
        }
    }
    let (mut y, second): (Vec<u16>, Vec<u16>) = (download(place, &y), download(place, &second));
    match rest {
        Gated { .. } => {
            y.extend(second);
            y.extend(s_of_down);
        }
        // Where queries and keys stand in y.
        Rotated { head_dim, rotated_heads } if !is_fused => {
            let rotated = rotated_heads * head_dim;
            for (row, turned) in y.chunks_mut(outputs).zip(second.chunks(rotated)) {
                row[..rotated].copy_from_slice(turned);
            }
        }
        Rotated { .. } => {}
    }
    y
}

fn check(group: &Group, columns: usize, rest: Rest) {
    if !has_hopper_kernels() {
        return println!("left out: the GPU is no Hopper");
    }
    for half in HALVES {
        let name = format!("{rest:?} n{columns} {} {}", half.suffix(), group.name);
        let fused = run_everywhere(&name, |place| outputs(place, half, group, columns, rest, true));
        let separate = run_everywhere(&name, |place| outputs(place, half, group, columns, rest, false));
        let (fused, s) = fused.split_at(separate.len());
        let first = fused.iter().zip(&separate).position(|(fused, separate)| fused != separate);
        assert_eq!(first, None, "{name}: first element that differs");
        assert!(fused.iter().all(|&bits| half.decode(bits).is_finite()), "{name}: something was not written");
        if let Gated { down_rank: rank @ 1.., .. } = rest {
            let act = half.decode_all(&fused[group.tokens * group.out_features()..]);
            check_s(&name, half, rank, &act, &down_a(half, rank, group.out_features() / 2), s);
        }
    }
}

/// Widths beside the tile's, ranks that only one half has, and more tiles than blocks.
#[test]
fn gated_products_have_the_bits_of_two_kernels() {
    for columns in [128, 256] {
        for (tokens, width, ranks) in
            [(1, 8, [1, 1]), (140, 72, [0, 4]), (300, 264, [40, 3]), (70, 128, [0, 0]), (11, 200, [3, 0])]
        {
            let group = Group::new(tokens, 72, &ranks.map(|rank| (width, rank)));
            check(
                &group,
                columns,
                Gated { is_gelu: tokens % 100 == 0, down_rank: [0, 5, 64, 16][tokens % 4] },
            );
        }
    }
}

#[test]
fn rotated_products_have_the_bits_of_two_kernels() {
    for (columns, head_dim) in [(128, 64), (192, 64), (256, 64), (128, 128), (256, 128)] {
        for (tokens, heads, ranks) in
            [(1, [1, 1], [1, 0, 2]), (140, [6, 2], [4, 4, 0]), (20, [3, 1], [0, 0, 0])]
        {
            let [queries, keys] = heads.map(|heads| heads * head_dim);
            let group = Group::new(tokens, 72, &[(queries, ranks[0]), (keys, ranks[1]), (keys, ranks[2])]);
            check(&group, columns, Rotated { head_dim, rotated_heads: heads[0] + heads[1] });
        }
    }
}
