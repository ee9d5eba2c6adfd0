//! gated_activation.cu, rows.cu, convert.cu, embedding_noise.cu

use fastlora::backend::EmbeddingNoise;
use fastlora::device::Argument;

use crate::activation::Activation;
use crate::harness::*;

/// (rows, width): one vector, several blocks, a ragged last block.
const SHAPES: [(usize, usize); 3] = [(1, 8), (5, 104), (33, 256)];

fn gated(half: Half, activation: Activation, rows: usize, width: usize) {
    let name = format!("{}_{} {rows}×{width}", activation.kernel(), half.suffix());
    let mut random = Random(width as u64);
    let gate_up = random.halves(half, rows * 2 * width, 8.0);
    let dact = random.halves(half, rows * width, 1.0);
    let blocks = (rows * width / 8).div_ceil(256);
    let kernel = |direction| format!("{}_{direction}_{}", activation.kernel(), half.suffix());
    let outputs = run_everywhere(&name, |device| {
        let (gate_up, dact) = (upload(device, &gate_up), upload(device, &dact));
        let act = poisoned::<u16>(device, rows * width);
        let shape = [Argument::I32(rows as i32), Argument::I32(width as i32)];
        let arguments = [Argument::of(&gate_up), Argument::of(&act), shape[0], shape[1]];
        launch(device, &kernel("forward"), blocks, 256, &arguments);
        let arguments = [Argument::of(&dact), Argument::of(&gate_up), shape[0], shape[1]];
        launch(device, &kernel("backward"), blocks, 256, &arguments);
        let mut outputs: Vec<u16> = download(device, &act);
        outputs.extend(download::<u16>(device, &gate_up));
        outputs
    });
    let (gate_up, dact) = (half.decode_all(&gate_up), half.decode_all(&dact));
    let mut act = Vec::new();
    let mut gradient = vec![Expected { value: 0.0, tolerance: 0.0 }; rows * 2 * width];
    for row in 0..rows {
        for column in 0..width {
            let (g_place, u_place) = (row * 2 * width + column, row * 2 * width + width + column);
            let (g, u, d) = (gate_up[g_place], gate_up[u_place], dact[row * width + column]);
            act.push(activation.act(half, g, u));
            [gradient[g_place], gradient[u_place]] = activation.gradient(half, g, u, d);
        }
    }
    assert_close(&name, width, &half.decode_all(&outputs[..rows * width]), &act);
    let backward = half.decode_all(&outputs[rows * width..]);
    assert_close(&format!("{name}, gradient"), 2 * width, &backward, &gradient);
}

#[test]
fn gated_activations_match_float64() {
    for half in HALVES {
        for (rows, width) in SHAPES {
            gated(half, Activation::Silu, rows, width);
            gated(half, Activation::GeluTanh, rows, width);
        }
    }
}

#[test]
fn rows_are_gathered_and_scattered_bit_for_bit() {
    let (table_rows, width) = (23, 72);
    let table: Vec<u16> = (0..table_rows * width).map(|i| i as u16).collect();
    // A gather may repeat rows; a scatter may not.
    let index: Vec<u32> = vec![22, 0, 7, 7, 3, 19, 11];
    let blocks = (index.len() * width / 8).div_ceil(256);
    let shape = [Argument::I32(index.len() as i32), Argument::I32(width as i32)];
    let gathered = run_everywhere("gather_rows", |device| {
        let (table, index_memory) = (upload(device, &table), upload(device, &index));
        let out = poisoned::<u16>(device, index.len() * width);
        let arguments =
            [Argument::of(&table), Argument::of(&index_memory), Argument::of(&out), shape[0], shape[1]];
        launch(device, "gather_rows", blocks, 256, &arguments);
        download::<u16>(device, &out)
    });
    for (i, &row) in index.iter().enumerate() {
        assert_eq!(gathered[i * width..][..width], table[row as usize * width..][..width], "gather, row {i}");
    }

    let targets: Vec<u32> = vec![22, 0, 7, 8, 3, 19, 11];
    let scattered = run_everywhere("scatter_rows", |device| {
        let (packed, index_memory) = (upload(device, &gathered), upload(device, &targets));
        let out = upload(device, &vec![0u16; table_rows * width]);
        let arguments =
            [Argument::of(&packed), Argument::of(&index_memory), Argument::of(&out), shape[0], shape[1]];
        launch(device, "scatter_rows", blocks, 256, &arguments);
        download::<u16>(device, &out)
    });
    for row in 0..table_rows {
        let expected = match targets.iter().position(|&target| target as usize == row) {
            Some(i) => &gathered[i * width..][..width],
            None => &vec![0; width],
        };
        assert_eq!(scattered[row * width..][..width], *expected, "scatter, row {row}");
    }
}

#[test]
fn columns_are_copied_between_rows_of_other_lengths() {
    let (rows, width, in_leading, out_leading) = (37, 24, 72, 40);
    let input: Vec<u16> = (0..rows * in_leading).map(|i| i as u16).collect();
    let before = vec![0xABCD_u16; rows * out_leading];
    let copied = run_everywhere("copy_columns", |device| {
        let (input, out) = (upload(device, &input), upload(device, &before));
        let mut arguments = vec![Argument::of(&input), Argument::of(&out)];
        arguments.extend([rows, width, in_leading, out_leading].map(|size| Argument::I32(size as i32)));
        launch(device, "copy_columns", (rows * width / 8).div_ceil(256), 256, &arguments);
        download::<u16>(device, &out)
    });
    for row in 0..rows {
        let (out, input) = (&copied[row * out_leading..][..out_leading], &input[row * in_leading..]);
        assert_eq!(out[..width], input[..width], "row {row}");
        assert_eq!(out[width..], before[width..out_leading], "behind row {row}");
    }
}

#[test]
fn conversions_round_to_nearest_even() {
    let mut random = Random(5);
    let mut floats = random.floats(1000, 300.0);
    floats.extend([
        0.0,
        -0.0,
        65504.0,
        65520.0,
        1e-8,
        6e-8,
        2f32.powi(-14),
        1e38,
        f32::INFINITY,
        1.0 + 2f32.powi(-11),
    ]);
    let count = [Argument::I64(floats.len() as i64)];
    for half in HALVES {
        let kernel = format!("convert_f32_to_{}", half.suffix());
        let halves = run_everywhere(&kernel, |device| {
            let (input, out) = (upload(device, &floats), poisoned::<u16>(device, floats.len()));
            launch(device, &kernel, 2, 256, &[Argument::of(&input), Argument::of(&out), count[0]]);
            download::<u16>(device, &out)
        });
        let expected: Vec<u16> = floats.iter().map(|&value| half.encode(f64::from(value))).collect();
        assert_eq!(halves, expected, "{kernel}");
        let kernel = format!("convert_{}_to_f32", half.suffix());
        let back = run_everywhere(&kernel, |device| {
            let (input, out) = (upload(device, &halves), poisoned::<f32>(device, floats.len()));
            launch(device, &kernel, 2, 256, &[Argument::of(&input), Argument::of(&out), count[0]]);
            download::<f32>(device, &out)
        });
        assert!(back.iter().zip(&halves).all(|(&f, &h)| f64::from(f) == half.decode(h)), "{kernel}");
    }
    for (from, to) in [(Half::F16, Half::Bf16), (Half::Bf16, Half::F16)] {
        let input: Vec<u16> = floats.iter().map(|&value| from.encode(f64::from(value))).collect();
        let kernel = format!("convert_{}_to_{}", from.suffix(), to.suffix());
        let converted = run_everywhere(&kernel, |device| {
            let (input, out) = (upload(device, &input), poisoned::<u16>(device, input.len()));
            launch(device, &kernel, 3, 256, &[Argument::of(&input), Argument::of(&out), count[0]]);
            download::<u16>(device, &out)
        });
        let expected: Vec<u16> = input.iter().map(|&bits| to.encode(from.decode(bits))).collect();
        assert_eq!(converted, expected, "{kernel}");
    }
}

#[test]
fn fill_writes_every_element() {
    let filled = run_everywhere("fill_f32", |device| {
        let out = poisoned::<f32>(device, 1037);
        launch(device, "fill_f32", 2, 256, &[Argument::of(&out), Argument::F32(0.25), Argument::I64(1037)]);
        download::<f32>(device, &out)
    });
    assert!(filled.iter().all(|&value| value == 0.25));
}

#[test]
fn a_single_number_that_is_not_finite_is_found_anywhere() {
    for half in HALVES {
        let kernel = format!("find_non_finite_{}", half.suffix());
        let plain: Vec<u16> = Random(9).halves(half, 1300, 100.0);
        for (place, bad) in
            [(None, 0.0), (Some(0), f64::NAN), (Some(1299), f64::INFINITY), (Some(700), f64::NEG_INFINITY)]
        {
            let mut values = plain.clone();
            if let Some(place) = place {
                values[place] = half.encode(bad);
            }
            let flag = run_everywhere(&kernel, |device| {
                let (input, flag) = (upload(device, &values), upload(device, &[0u32]));
                let arguments =
                    [Argument::of(&input), Argument::of(&flag), Argument::I64(values.len() as i64)];
                launch(device, &kernel, 2, 256, &arguments);
                download::<u32>(device, &flag)
            });
            assert_eq!(flag, [u32::from(place.is_some())], "{kernel}, {bad} at {place:?}");
        }
    }
}

#[test]
fn embedding_noise_is_that_of_the_cpu() {
    let noise = EmbeddingNoise { alpha: 6.0, seed: 0x1234_5678_9ABC_DEF0, epoch: 3 };
    for half in [Half::F16, Half::Bf16] {
        for (rows, width) in SHAPES {
            let name = format!("embedding_noise_{}", half.suffix());
            let x = Random(width as u64).halves(half, rows * width, 1.0);
            let positions: Vec<u32> = (0..rows as u32).collect();
            let (samples, lengths) = (vec![77u32; rows], vec![rows as u32; rows]);
            let blocks = (rows * width / 8).div_ceil(256);
            let found = run_everywhere(&name, |device| {
                let memory = upload(device, &x);
                let keys = [&positions, &samples, &lengths].map(|values| upload(device, values));
                let epoch = upload(device, &[noise.epoch]);
                let arguments = [
                    Argument::of(&memory),
                    Argument::of(&keys[0]),
                    Argument::of(&keys[1]),
                    Argument::of(&keys[2]),
                    Argument::U32(noise.seed as u32),
                    Argument::U32((noise.seed >> 32) as u32),
                    Argument::of(&epoch),
                    Argument::F32(noise.alpha),
                    Argument::I32(rows as i32),
                    Argument::I32(width as i32),
                ];
                launch(device, &name, blocks, 256, &arguments);
                download::<u16>(device, &memory)
            });
            for (row, (x, found)) in x.chunks(width).zip(found.chunks(width)).enumerate() {
                let before: Vec<f64> = x.iter().map(|&bits| half.decode(bits)).collect();
                let mut expected: Vec<f32> = before.iter().map(|&value| value as f32).collect();
                noise.add(77, row, rows, &mut expected);
                for (feature, (&found, &expected)) in found.iter().zip(&expected).enumerate() {
                    let (found, expected) = (half.decode(found), f64::from(expected));
                    // One rounding to the half type, of a sum that differs by roundings of its parts, which are below 4.
                    let in_f32 = 16.0 * F32_ROUNDOFF;
                    let allowed = half.unit_roundoff() * expected.abs() + half.underflow() + in_f32;
                    assert!(
                        (found - expected).abs() <= allowed,
                        "{name} [{row}, {feature}]: {found} {expected}"
                    );
                }
            }
        }
    }
}
