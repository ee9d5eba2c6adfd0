//! conformance.cu and conformance_sm90a.cu: what each primitive means, written here once more from the PTX manual.

use fastlora::device::Argument;

use crate::harness::*;

/// Two elements in a register, the first in the low half.
fn pair(first: u16, second: u16) -> u32 {
    u32::from(first) | u32::from(second) << 16
}

#[test]
fn mma_multiplies_16_by_8_by_16() {
    for half in HALVES {
        let mut random = Random(8);
        let mut integers =
            |count: usize| -> Vec<f64> { (0..count).map(|_| random.below(9) as f64 - 4.0).collect() };
        let (a, b, c) = (integers(16 * 16), integers(16 * 8), integers(16 * 8));
        let a_at = |row: usize, k: usize| half.encode(a[row * 16 + k]);
        let b_at = |k: usize, column: usize| half.encode(b[k * 8 + column]);
        let (mut a_fragments, mut b_fragments, mut c_fragments) = (Vec::new(), Vec::new(), Vec::new());
        let mut expected = Vec::new();
        for lane in 0..32 {
            let (group, k) = (lane / 4, lane % 4 * 2);
            for (row, k) in [(group, k), (group + 8, k), (group, k + 8), (group + 8, k + 8)] {
                a_fragments.push(pair(a_at(row, k), a_at(row, k + 1)));
            }
            for k in [k, k + 8] {
                b_fragments.push(pair(b_at(k, group), b_at(k + 1, group)));
            }
            for (row, column) in [(group, k), (group, k + 1), (group + 8, k), (group + 8, k + 1)] {
                let product: f64 = (0..16).map(|k| a[row * 16 + k] * b[k * 8 + column]).sum();
                c_fragments.push(c[row * 8 + column] as f32);
                expected.push((c[row * 8 + column] + product) as f32);
            }
        }
        let kernel = format!("conformance_mma_{}", half.suffix());
        let d = run_everywhere(&kernel, |device| {
            let (a, b, c) =
                (upload(device, &a_fragments), upload(device, &b_fragments), upload(device, &c_fragments));
            let d = poisoned::<f32>(device, 128);
            let arguments = [&a, &b, &c, &d].map(Argument::of);
            launch(device, &kernel, 1, 32, &arguments);
            download::<f32>(device, &d)
        });
        assert_eq!(d, expected, "{kernel}");
    }
}

#[test]
fn ldmatrix_deals_out_rows_and_columns() {
    let elements: Vec<u16> = (0..256).collect();
    let at = |matrix: usize, row: usize, column: usize| elements[matrix * 64 + row * 8 + column];
    let (mut plain, mut transposed) = (Vec::new(), Vec::new());
    for lane in 0..32 {
        let (outer, inner) = (lane / 4, lane % 4 * 2);
        for matrix in 0..4 {
            plain.push(pair(at(matrix, outer, inner), at(matrix, outer, inner + 1)));
            transposed.push(pair(at(matrix, inner, outer), at(matrix, inner + 1, outer)));
        }
    }
    let registers = run_everywhere("conformance_ldmatrix", |device| {
        let input = upload(device, &elements);
        let (plain, transposed) = (poisoned::<u32>(device, 128), poisoned::<u32>(device, 128));
        launch(device, "conformance_ldmatrix", 1, 32, &[&input, &plain, &transposed].map(Argument::of));
        [download::<u32>(device, &plain), download::<u32>(device, &transposed)].concat()
    });
    assert_eq!(registers, [plain, transposed].concat());
}

#[test]
fn cp_async_copies_what_it_is_told_and_zeroes_the_rest() {
    let bytes: Vec<u8> = (0..512).map(|i| (i % 251 + 1) as u8).collect();
    let copied = run_everywhere("conformance_cp_async", |device| {
        let (input, out) = (upload(device, &bytes), poisoned::<u8>(device, 1024));
        launch(device, "conformance_cp_async", 1, 32, &[&input, &out].map(Argument::of));
        download::<u8>(device, &out)
    });
    for lane in 0..32 {
        let source = 31 - lane;
        let mut expected = [0; 16];
        let count = source / 4 * 2;
        expected[..count].copy_from_slice(&bytes[source * 16..][..count]);
        assert_eq!(copied[lane * 16..][..16], expected, "lane {lane}, {count} bytes");
        assert_eq!(copied[512 + lane * 16..][..16], bytes[source * 16..][..16], "lane {lane}, all bytes");
    }
}

#[test]
fn a_warp_adds_compares_and_raises_two() {
    let values: Vec<f32> = (0..32).map(|lane| ((lane * 7) % 32) as f32 - 12.0).collect();
    let results = run_everywhere("conformance_warp", |device| {
        let (input, out) = (upload(device, &values), poisoned::<f32>(device, 96));
        launch(device, "conformance_warp", 1, 32, &[&input, &out].map(Argument::of));
        download::<f32>(device, &out)
    });
    let (sum, maximum) = (values.iter().sum::<f32>(), values.iter().copied().fold(f32::MIN, f32::max));
    let expected: Vec<f32> = values.iter().flat_map(|&value| [sum, maximum, value.exp2()]).collect();
    assert_eq!(results, expected);
}

#[test]
fn the_tma_swizzles_boxes_and_stays_inside_the_matrix() {
    if !has_hopper_kernels() {
        return println!("left out: the GPU is no Hopper");
    }
    let (rows, columns, stride) = (70, 100, 104);
    let elements: Vec<u16> = (0..rows * stride).map(|i| i as u16 + 1).collect();
    // Inside; over the right edge; over the lower right corner; over the upper left one.
    for (row, column) in [(3, 8), (3, 64), (40, 64), (-5, -16)] {
        let results = run_everywhere("conformance_tma", |device| {
            let (input, out) = (upload(device, &elements), poisoned::<u16>(device, rows * stride));
            let raw = poisoned::<u16>(device, 64 * 64);
            let maps = [&input, &out].map(|memory| boxes(memory, [rows, columns], stride, 64));
            let place = [row, column].map(Argument::I32);
            let arguments: Vec<_> = maps.into_iter().chain([Argument::of(&raw)]).chain(place).collect();
            launch_grid(device, "conformance_tma", [1, 1, 1], 128, 9 << 10, &arguments);
            [download::<u16>(device, &raw), download::<u16>(device, &out)].concat()
        });
        let (raw, out) = results.split_at(64 * 64);
        let mut expected_out = vec![u16::MAX; rows * stride];
        for (box_row, stored) in raw.chunks(64).enumerate() {
            for box_column in 0..64 {
                let (at_row, at_column) = (row + box_row as i32, column + box_column as i32);
                let inside = (0..rows as i32).contains(&at_row) && (0..columns as i32).contains(&at_column);
                let place = (at_row * stride as i32 + at_column) as usize;
                let expected = if inside { elements[place] } else { 0 };
                let chunk = (box_column / 8) ^ (box_row % 8);
                assert_eq!(stored[chunk * 8 + box_column % 8], expected, "({box_row}, {box_column})");
                if inside {
                    expected_out[place] = expected;
                }
            }
        }
        assert_eq!(out, expected_out, "box at ({row}, {column})");
    }
}

#[test]
fn the_tma_writes_into_both_blocks_of_a_cluster() {
    if !has_hopper_kernels() {
        return println!("left out: the GPU is no Hopper");
    }
    let (rows, columns, stride) = (70, 100, 104);
    let (blocks, turns, box_elements) = (4, 3, 64 * 64);
    let elements: Vec<u16> = (0..rows * stride).map(|i| i as u16 + 1).collect();
    // Inside; over the lower right corner.
    for (row, column) in [(1, 8), (40, 64)] {
        let results = run_everywhere("conformance_cluster", |device| {
            let input = upload(device, &elements);
            let (raw, places) =
                (poisoned::<u16>(device, blocks * turns * box_elements), poisoned::<u32>(device, blocks * 2));
            let map = boxes(&input, [rows, columns], stride, 32);
            let [raw_argument, places_argument] = [&raw, &places].map(Argument::of);
            let place = [row, column].map(|place: usize| Argument::I32(place as i32));
            let arguments = [map, raw_argument, places_argument, place[0], place[1]];
            let grid = [blocks as u32, 1, 1];
            launch_clusters(device, "conformance_cluster", grid, 2, 128, 9 << 10, &arguments);
            assert_eq!(download::<u32>(device, &places), [0, 2, 1, 2, 0, 2, 1, 2]);
            download::<u16>(device, &raw)
        });
        for (index, &stored) in results.iter().enumerate() {
            let (block, turn) = (index / box_elements / turns, index / box_elements % turns);
            let (box_row, place) = (index % box_elements / 64, index % 64);
            let box_column = ((place / 8) ^ (box_row % 8)) * 8 + place % 8;
            let sender = if turn == 2 { 1 - block % 2 } else { 0 };
            let (at_row, at_column) = (row + turn + sender + box_row, column + box_column);
            let inside = at_row < rows && at_column < columns;
            let expected = if inside { elements[at_row * stride + at_column] } else { 0 };
            assert_eq!(stored, expected, "block {block}, turn {turn}, ({box_row}, {box_column})");
        }
    }
}

#[test]
fn wgmma_multiplies_operands_of_either_order() {
    if !has_hopper_kernels() {
        return println!("left out: the GPU is no Hopper");
    }
    for (half, n) in HALVES.into_iter().flat_map(|half| [64, 128, 192, 256].map(|n| (half, n))) {
        let mut random = Random(90);
        let mut integers =
            |count: usize| -> Vec<f64> { (0..count).map(|_| random.below(9) as f64 - 4.0).collect() };
        let (a, b_by_k, b_by_n) = (integers(64 * 64), integers(n * 64), integers(64 * n));
        let encoded = |values: &[f64]| values.iter().map(|&value| half.encode(value)).collect::<Vec<u16>>();
        let kernel = format!("conformance_wgmma_n{n}_{}", half.suffix());
        // With A in shared memory, and up to a width in registers.
        let turns = if n <= 128 { 2 } else { 1 };
        let d = run_everywhere(&kernel, |device| {
            let memories = [&a, &b_by_k, &b_by_n].map(|values| upload(device, &encoded(values)));
            let d = poisoned::<f32>(device, turns * 2 * 64 * n);
            let arguments = [
                boxes(&memories[0], [64, 64], 64, 64),
                boxes(&memories[1], [n, 64], 64, n),
                boxes(&memories[2], [64, n], n, 64),
                Argument::of(&d),
            ];
            launch_grid(device, &kernel, [1, 1, 1], 128, 100 << 10, &arguments);
            download::<f32>(device, &d)
        });
        for row in 0..64 {
            for column in 0..n {
                let product = |b: &dyn Fn(usize) -> f64| (0..64).map(|k| a[row * 64 + k] * b(k)).sum::<f64>();
                let added = 1.0 + product(&|k| b_by_k[column * 64 + k]);
                let replaced = product(&|k| b_by_n[k * n + column]);
                for d in d.chunks(2 * 64 * n) {
                    let found = [d[row * n + column], d[(64 + row) * n + column]];
                    assert_eq!(found, [added as f32, replaced as f32], "{kernel}, ({row}, {column})");
                }
            }
        }
    }
}
