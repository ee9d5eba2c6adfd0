//! conformance.cu: what each primitive means, written here once more from the PTX manual.

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
