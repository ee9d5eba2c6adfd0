//! A whole training step (gradients and update, adapters on every linear) in tokens a second: SmolLM2-135M where
//! `models/smollm2-135m-instruct` is there, else the tiny model of the tests.
//!
//! `cargo bench --bench training_step -- --quick`

use std::path::{Path, PathBuf};
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use fastlora::backend::Backend;
use fastlora::backend::cpu::CpuBackend;
use fastlora::batch::Batch;
use fastlora::checkpoint::base::BaseModel;
use fastlora::config::TargetModules;
use fastlora::model::{LoraConfig, Transformer};
use fastlora::optim::{AdamW, AdamWSettings};

/// Samples, tokens of each, and how many of those carry loss: full records, long ones, and short answers.
const BATCHES: [(usize, usize, usize); 3] = [(8, 128, 127), (4, 512, 511), (4, 30, 12)];

fn model_folder() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let model = root.join("models/smollm2-135m-instruct");
    if model.is_dir() { model } else { root.join("tests/fixtures/tiny_qwen3") }
}

fn batch_of(samples: usize, length: usize, labelled: usize, vocabulary: usize) -> Batch {
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
    let folder = model_folder();
    let base = BaseModel::open(&folder).unwrap();
    let lora = LoraConfig {
        rank: 16,
        alpha: 32.0,
        use_rslora: false,
        target_modules: TargetModules::Pattern(TargetModules::ALL_LINEAR.into()),
    };
    let backend = Arc::new(CpuBackend::new(None).unwrap());
    let mut model = Transformer::load(Arc::clone(&backend), &base, Some(&lora)).unwrap();
    let parameters = model.layout().initial_parameters(1);
    model.set_parameters(&parameters).unwrap();
    let settings =
        AdamWSettings { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0, max_grad_norm: 1.0 };
    let mut optimizer = AdamW::new(&*backend, parameters.len(), settings).unwrap();

    let name = folder.file_name().unwrap().to_string_lossy();
    let mut group = criterion.benchmark_group(format!("training step of {name}"));
    group.sample_size(10);
    for (samples, length, labelled) in BATCHES {
        let batch = batch_of(samples, length, labelled, model.config().vocabulary);
        let scale = 1.0 / batch.labelled_count() as f32;
        group.throughput(Throughput::Elements(batch.token_count() as u64));
        group.bench_function(BenchmarkId::from_parameter(format!("{samples}x{length}")), |bencher| {
            bencher.iter(|| {
                backend.run(|| {
                    model.zero_gradients().unwrap();
                    model.accumulate_gradients(&batch, scale, None).unwrap();
                    let (backend, parameters, gradients) = model.trainable();
                    optimizer.update(backend, parameters, gradients, 1e-4).unwrap();
                });
            });
        });
    }
    group.finish();
}

criterion_group!(benches, training_step);
criterion_main!(benches);
