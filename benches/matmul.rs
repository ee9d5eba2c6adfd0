//! The CPU backend's matrix products at the shapes of SmolLM2-135M, with the `gemm` crate as peer (its frozen weight
//! unpacked to f32 scratch first, as it reads no halves by rows).
//!
//! `cargo bench --bench matmul -- [FILTER]`, on all cores (`RAYON_NUM_THREADS` for fewer). The throughput column is
//! multiply-adds a second (two operations each); `peak` is what the cores do on registers alone.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use fastlora::backend::cpu::matmul::{
    Elements, Linear, LinearBackward, LowRank, LowRankBlock, Rows, RowsMut, Weight, decode, linear,
    linear_backward,
};
use fastlora::backend::cpu::simd::Simd;
use fastlora::backend::cpu::team::Team;
use fastlora::selftest::MultiplyAddChains;
use half::f16;
use half::slice::HalfFloatSliceExt;

/// (inputs, outputs) of q|k|v, o, gate|up and down.
const LINEARS: [(usize, usize); 4] = [(576, 960), (576, 576), (576, 3072), (1536, 576)];
const RANK: usize = 16;

fn peak(criterion: &mut Criterion) {
    const STEPS: usize = 100_000;
    let simd = Simd::detect();
    let (lanes, _) = simd.run(MultiplyAddChains { steps: 1 });
    let mut group = criterion.benchmark_group("peak");
    let multiply_adds = STEPS * MultiplyAddChains::COUNT * lanes * rayon::current_num_threads();
    group.throughput(Throughput::Elements(multiply_adds as u64));
    group.bench_function(simd.name(), |bencher| {
        bencher.iter(|| rayon::broadcast(|_| simd.run(MultiplyAddChains { steps: STEPS })));
    });
}

fn values(elements: usize) -> Vec<f32> {
    (0..elements).map(|element| (element * 7 % 13) as f32 / 13.0 - 0.5).collect()
}

fn halves(elements: usize) -> Vec<f16> {
    (0..elements).map(|element| f16::from_f32((element * 5 % 11) as f32 / 11.0 - 0.5)).collect()
}

fn training(criterion: &mut Criterion) {
    for rows in [128, 1024] {
        for (inputs, outputs) in LINEARS {
            let shape = format!("{rows}x{inputs}x{outputs}");
            let (x, dy, s) = (values(rows * inputs), values(rows * outputs), values(rows * RANK));
            let b = values(outputs * RANK);
            let stored = halves(inputs * outputs);
            let weight = Weight::new(inputs, [Elements::F16(&stored)]);
            let mut unpacked = vec![0.0; inputs * outputs];
            let (mut y, mut dx) = (vec![0.0; rows * outputs], vec![0.0; rows * inputs]);
            let (x_rows, dy_rows) =
                (Rows { values: &x, stride: inputs }, Rows { values: &dy, stride: outputs });
            let s_rows = Rows { values: &s, stride: RANK };
            let (x_stride, y_stride) = (inputs as isize, outputs as isize);
            let parallelism = gemm::Parallelism::Rayon(0);

            let mut group = criterion.benchmark_group("forward");
            group.throughput(Throughput::Elements((rows * inputs * outputs) as u64));
            group.bench_function(BenchmarkId::new("ours", &shape), |bencher| {
                let y = &mut y;
                bencher.iter(|| {
                    linear(Linear::new(rows, x_rows, weight), RowsMut { values: &mut *y, stride: outputs });
                });
            });
            group.bench_function(BenchmarkId::new("ours with low rank", &shape), |bencher| {
                let blocks = [LowRankBlock { factor: &b, scale: 2.0, columns: 0..outputs, ranks: 0..RANK }];
                let low_rank = Some(LowRank { s: s_rows, blocks: &blocks });
                let y = &mut y;
                bencher.iter(|| {
                    let arguments = Linear { low_rank, ..Linear::new(rows, x_rows, weight) };
                    linear(arguments, RowsMut { values: &mut *y, stride: outputs });
                });
            });
            group.bench_function(BenchmarkId::new("gemm crate", &shape), |bencher| {
                bencher.iter(|| {
                    stored.convert_to_f32_slice(&mut unpacked);
                    // SAFETY: the buffers have the shapes [rows, outputs], [rows, inputs] and [outputs, inputs].
                    unsafe {
                        gemm::gemm(
                            rows,
                            outputs,
                            inputs,
                            y.as_mut_ptr(),
                            1,
                            y_stride,
                            false,
                            x.as_ptr(),
                            1,
                            x_stride,
                            unpacked.as_ptr(),
                            x_stride,
                            1,
                            0.0,
                            1.0,
                            false,
                            false,
                            false,
                            parallelism,
                        );
                    }
                });
            });
            group.finish();

            let mut group = criterion.benchmark_group("backward");
            group.throughput(Throughput::Elements((rows * inputs * outputs) as u64));
            group.bench_function(BenchmarkId::new("ours", &shape), |bencher| {
                let dx = &mut dx;
                bencher.iter(|| {
                    let arguments = LinearBackward::new(rows, dy_rows, weight);
                    linear_backward(arguments, RowsMut { values: &mut *dx, stride: inputs });
                });
            });
            group.bench_function(BenchmarkId::new("gemm crate", &shape), |bencher| {
                bencher.iter(|| {
                    stored.convert_to_f32_slice(&mut unpacked);
                    // SAFETY: the buffers have the shapes [rows, inputs], [rows, outputs] and [outputs, inputs].
                    unsafe {
                        gemm::gemm(
                            rows,
                            inputs,
                            outputs,
                            dx.as_mut_ptr(),
                            1,
                            x_stride,
                            false,
                            dy.as_ptr(),
                            1,
                            y_stride,
                            unpacked.as_ptr(),
                            1,
                            x_stride,
                            0.0,
                            1.0,
                            false,
                            false,
                            false,
                            parallelism,
                        );
                    }
                });
            });
            group.finish();
        }
    }
}

/// Decoding reads each weight once a token: bytes a second, from memory (the copies exceed every cache).
fn decoding(criterion: &mut Criterion) {
    const BYTES: usize = 256 << 20;
    let team = Team::new(rayon::current_num_threads()).unwrap();
    let mut group = criterion.benchmark_group("decode");
    group.sample_size(20);
    for (inputs, outputs) in LINEARS.into_iter().chain([(576, 49152)]) {
        let elements = inputs * outputs;
        let stored = halves(BYTES / size_of::<f16>() / elements * elements);
        group.throughput(Throughput::Bytes(size_of_val(&stored[..]) as u64));
        for rows in [1, 4, 8] {
            let (x, mut y) = (values(rows * inputs), vec![0.0; rows * outputs]);
            group.bench_function(
                BenchmarkId::from_parameter(format!("{rows}x{inputs}x{outputs}")),
                |bencher| {
                    bencher.iter(|| {
                        for weight in stored.chunks_exact(elements) {
                            let weight = Weight::new(inputs, [Elements::F16(weight)]);
                            let arguments = Linear::new(rows, Rows { values: &x, stride: inputs }, weight);
                            decode(&team, arguments, RowsMut { values: &mut y, stride: outputs });
                        }
                    });
                },
            );
        }
    }
}

criterion_group!(benches, peak, training, decoding);
criterion_main!(benches);
