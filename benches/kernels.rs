//! Every operation of a training step at the shapes of SmolLM2-135M, Qwen2.5-1.5B and Llama-3-8B, on a GPU, timed by its
//! events over inputs that its caches do not hold; each with its share of the limit measured on the same GPU.
//!
//!     cargo bench --bench kernels                              # cuda:0; FASTLORA_BENCH_DEVICE=cuda:1 for another
//!     cargo bench --bench kernels -- --save-baseline before    # then, after a change: -- --baseline before
//!     cargo bench --bench kernels -- 'Qwen2.5-1.5B bf16/linear'
//!
//! The throughput column is in floating-point operations (`elem/s`) where arithmetic is the limit, else in bytes.
//! `FASTLORA_BENCH_DEVICE=cpu` times the CPU backend over 256 tokens instead.

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};
use fastlora::backend::cpu::CpuBackend;
use fastlora::backend::cuda::{ComputeType, CudaBackend};
use fastlora::device::driver::Driver;
use fastlora::selftest::{
    LLAMA_3_8B, Measurable, ModelShape, Operation, Prepared, QWEN2_5_1_5B, Rates, SMOLLM2_135M, copies_of,
    seconds_of_passes, seconds_of_run,
};

const MODELS: [ModelShape; 3] = [SMOLLM2_135M, QWEN2_5_1_5B, LLAMA_3_8B];
const RANK: usize = 16;
/// Four samples of 2048 tokens.
const GPU_LENGTHS: &[usize] = &[2048; 4];
const CPU_LENGTHS: &[usize] = &[128; 2];

fn main() {
    let mut criterion = Criterion::default().sample_size(20).configure_from_args();
    let device = std::env::var("FASTLORA_BENCH_DEVICE").unwrap_or_else(|_| "cuda:0".into());
    if device == "cpu" {
        bench(&mut criterion, &CpuBackend::new(None).unwrap(), CPU_LENGTHS);
    } else {
        let index = device.strip_prefix("cuda:").and_then(|index| index.parse().ok());
        match Driver::new(index.expect("FASTLORA_BENCH_DEVICE is cpu or cuda:N")) {
            Ok(driver) => {
                for compute in [ComputeType::Bf16, ComputeType::F16] {
                    bench(&mut criterion, &CudaBackend::new(driver.clone(), compute), GPU_LENGTHS);
                }
            }
            Err(error) => println!("SKIPPED, nothing was timed: {device}: {error}"),
        }
    }
    criterion.final_summary();
}

fn bench<B: Measurable>(criterion: &mut Criterion, backend: &B, lengths: &'static [usize]) {
    let best = backend.best_rates().unwrap();
    let dtype = backend.precision().compute;
    println!("{}", backend.description());
    println!(
        "limits: {:.3} TFLOP/s ({}), {:.1} GB/s (a copy)",
        best.flops / 1e12,
        best.flops_of,
        best.bytes / 1e9
    );
    for model in MODELS {
        let mut group = criterion.benchmark_group(format!("{} {dtype}", model.name));
        for case in model.cases(lengths, RANK) {
            // Host memory for one case at a time: a head of Llama's takes gigabytes.
            for operation in case.operations::<B>(backend.precision()) {
                let work = operation.work();
                let is_arithmetic = work.flops / best.flops > work.bytes / best.bytes;
                group.throughput(match is_arithmetic {
                    true => Throughput::Elements(work.flops as u64),
                    false => Throughput::Bytes(work.bytes as u64),
                });
                let id = BenchmarkId::new(operation.name(), operation.shape());
                let mut copies: Vec<Box<dyn Prepared<B> + '_>> = Vec::new();
                group.bench_function(id, |bencher| {
                    if copies.is_empty() {
                        copies = prepare(backend, &*operation);
                    }
                    bencher.iter_custom(|runs| {
                        let passes = runs.div_ceil(copies.len() as u64);
                        let seconds = seconds_of_passes(backend, &mut copies, passes as usize).unwrap();
                        Duration::from_secs_f64(seconds * runs as f64)
                    });
                });
                report(backend, &*operation, &mut copies, best);
            }
        }
        group.finish();
    }
}

fn prepare<'a, B: Measurable>(
    backend: &B,
    operation: &'a dyn Operation<B>,
) -> Vec<Box<dyn Prepared<B> + 'a>> {
    (0..copies_of(operation)).map(|_| operation.prepare(backend).unwrap()).collect()
}

/// The share of the limit, unless a filter left the operation out.
fn report<B: Measurable>(
    backend: &B,
    operation: &dyn Operation<B>,
    copies: &mut [Box<dyn Prepared<B> + '_>],
    best: Rates,
) {
    if copies.is_empty() {
        return;
    }
    let work = operation.work();
    let least = (work.flops / best.flops).max(work.bytes / best.bytes);
    let seconds = seconds_of_run(backend, copies, 0.2).unwrap();
    println!("{:>24}{:.0} % of the limit, {:.1} µs", "", 100.0 * least / seconds, 1e6 * seconds);
}
