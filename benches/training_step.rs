//! A whole training step (gradients and update, adapters of rank 16 on every linear) in tokens a second, with its
//! operations as counted from the model's shape and their share of the limit measured on the same machine: on the CPU and,
//! where there is one, on the first GPU.
//!
//!     cargo bench --bench training_step -- --quick
//!
//! SmolLM2-135M where `models/smollm2-135m-instruct` is there, else the tiny model of the tests; `FASTLORA_BENCH_MODEL` names
//! another folder. Time on a GPU is taken by its events.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use fastlora::backend::PassSettings;
use fastlora::backend::cpu::CpuBackend;
use fastlora::backend::cuda::{ComputeType, CudaBackend};
use fastlora::batch::Batch;
use fastlora::checkpoint::base::BaseModel;
use fastlora::config::TargetModules;
use fastlora::device::driver::Driver;
use fastlora::model::{LoraConfig, StepWork, Transformer};
use fastlora::optim::{AdamW, AdamWSettings};
use fastlora::selftest::Measurable;

/// Samples, tokens of each, and how many of those carry loss.
type BatchShape = (usize, usize, usize);

/// Full records, long ones, and short answers.
const CPU_BATCHES: [BatchShape; 3] = [(8, 128, 127), (4, 512, 511), (4, 30, 12)];
const GPU_BATCHES: [BatchShape; 3] = [(8, 2048, 2047), (16, 512, 511), (32, 64, 24)];

fn model_folder() -> PathBuf {
    if let Some(named) = std::env::var_os("FASTLORA_BENCH_MODEL") {
        return named.into();
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let model = root.join("models/smollm2-135m-instruct");
    if model.is_dir() { model } else { root.join("tests/fixtures/tiny_qwen3") }
}

fn batch_of((samples, length, labelled): BatchShape, vocabulary: usize) -> Batch {
    let mut batch = Batch::default();
    for sample in 0..samples {
        let ids: Vec<u32> =
            (0..length).map(|token| ((sample * 97 + token * 31) % vocabulary) as u32).collect();
        let label = |(token, &id): (usize, &u32)| if token + labelled >= length { id as i32 } else { -100 };
        let labels: Vec<i32> = ids.iter().enumerate().map(label).collect();
        batch.push(sample, &ids, &labels);
    }
    batch
}

fn training_step(criterion: &mut Criterion) {
    bench(criterion, Arc::new(CpuBackend::new(None).unwrap()), &CPU_BATCHES);
    match Driver::new(0) {
        Ok(driver) => bench(criterion, Arc::new(CudaBackend::new(driver, ComputeType::Bf16)), &GPU_BATCHES),
        Err(error) => println!("SKIPPED the GPU, nothing was timed there: {error}"),
    }
}

fn bench<B: Measurable>(criterion: &mut Criterion, backend: Arc<B>, batches: &[BatchShape]) {
    let folder = model_folder();
    let base = BaseModel::open(&folder).unwrap();
    let targets = TargetModules::Pattern(TargetModules::ALL_LINEAR.into());
    let lora = LoraConfig::new(16, 32.0, targets);
    let mut model = Transformer::load(Arc::clone(&backend), &base, Some(&lora)).unwrap();
    model.start(&base, 1).unwrap();
    let settings =
        AdamWSettings { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0, max_grad_norm: 1.0 };
    let mut optimizer = AdamW::new(&*backend, model.layout().parameter_count(), settings).unwrap();
    let best = backend.best_rates().unwrap();
    println!("{}: {:.3} TFLOP/s ({})", backend.description(), best.flops / 1e12, best.flops_of);

    let name = folder.file_name().unwrap().to_string_lossy();
    let mut group = criterion.benchmark_group(format!("training step of {name}, {}", backend.description()));
    group.sample_size(10);
    for &shape @ (samples, length, _) in batches {
        let batch = batch_of(shape, model.config().vocabulary);
        let work = StepWork::count(model.config(), &lora, &batch).unwrap();
        let gradient_scale = 1.0 / batch.labelled_count() as f32;
        let settings = PassSettings { gradient_scale, ..PassSettings::default() };
        let mut least_seconds = f64::INFINITY;
        group.throughput(Throughput::Elements(batch.token_count() as u64));
        group.bench_function(BenchmarkId::from_parameter(format!("{samples}x{length}")), |bencher| {
            bencher.iter_custom(|steps| {
                let seconds = backend.run(|| {
                    let start = backend.mark().unwrap();
                    for _ in 0..steps {
                        model.zero_gradients().unwrap();
                        model.accumulate_gradients(&batch, settings).unwrap();
                        let (backend, parameters, gradients) = model.trainable();
                        optimizer.update(backend, parameters, gradients, 1e-4).unwrap();
                    }
                    backend.seconds_between(&start, &backend.mark().unwrap()).unwrap()
                });
                least_seconds = least_seconds.min(seconds / steps as f64);
                Duration::from_secs_f64(seconds)
            });
        });
        if least_seconds.is_finite() {
            let rate = work.total() / least_seconds;
            println!(
                "{:>24}{:.3} GFLOP counted a step; at best {:.0} tokens/s, {:.3} TFLOP/s, {:.0} % of the limit",
                "",
                work.total() / 1e9,
                batch.token_count() as f64 / least_seconds,
                rate / 1e12,
                100.0 * rate / best.flops
            );
        }
    }
    group.finish();
}

criterion_group!(benches, training_step);
criterion_main!(benches);
