//! Operations of the CPU backend besides the frozen products, at the shapes of SmolLM2-135M; throughput in
//! floating-point operations of the visible part of attention, and in elements elsewhere.
//!
//! `cargo bench --bench cpu_operations -- --quick`

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use fastlora::backend::cpu::{AlignedFloats, CpuBackend, CpuBatch};
use fastlora::backend::{
    Activation, AdamWStep, Attention, Backend, Dropout, Head, KvCache, LinearGroup, LinearInput, LoraSlot,
    OptimizerState, PassSettings, Projection, RmsNorm, Rotations, Weight,
};
use fastlora::batch::Batch;
use fastlora::dtype::DType;
use fastlora::tensor::WeightTensor;

const HIDDEN: usize = 576;

fn batch_of(backend: &CpuBackend, samples: usize, length: usize, dropout: Option<Dropout>) -> CpuBatch {
    let mut batch = Batch::default();
    for sample in 0..samples {
        batch.push(sample, &vec![1; length], &vec![1; length]);
    }
    let mut resident = backend.new_batch().unwrap();
    backend
        .load_batch(
            &mut resident,
            &batch,
            PassSettings { gradient_scale: 0.1, dropout, embedding_noise: None },
        )
        .unwrap();
    resident
}

fn floats(count: usize) -> AlignedFloats {
    let values: Vec<f32> = (0..count).map(|i| ((i * 7919) % 1009) as f32 / 504.5 - 1.0).collect();
    AlignedFloats::copy_of(&values)
}

fn attention(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention");
    for (threads, samples, length, [query_heads, key_value_heads, head_dim]) in [
        (1, 4, 512, [9, 3, 64]),
        (2, 8, 128, [9, 3, 64]),
        (2, 4, 512, [9, 3, 64]),
        (2, 1, 2048, [9, 3, 64]),
        (2, 32, 30, [9, 3, 64]),
        (1, 1, 1024, [8, 2, 128]),
    ] {
        let backend = CpuBackend::new(Some(threads)).unwrap();
        let batch = batch_of(&backend, samples, length, None);
        let rows = batch.token_count();
        let qkv = floats(rows * (query_heads + 2 * key_value_heads) * head_dim);
        let dout = floats(rows * query_heads * head_dim);
        let rope = floats(length * head_dim);
        let operation = Attention {
            query_heads,
            key_value_heads,
            head_dim,
            softmax_scale: 0.125,
            soft_cap: None,
            window: None,
            query_norm: None,
            key_norm: None,
            rotations: Rotations { table: &rope, width: head_dim, first_row: 0, long: None },
        };
        let mut log_sum = floats(rows * query_heads);
        let (mut out, mut dqkv) = (dout.clone(), qkv.clone());
        let flops = (samples * query_heads * 2 * head_dim * length * (length + 1)) as u64;
        let shape = format!("{samples}x{length} D={head_dim}, {threads} threads");
        group.throughput(Throughput::Elements(flops));
        group.bench_function(BenchmarkId::new("forward", &shape), |bencher| {
            bencher.iter(|| backend.attention(&operation, &batch, &qkv, &mut log_sum, &mut out).unwrap());
        });
        group.throughput(Throughput::Elements(flops * 5 / 2));
        group.bench_function(BenchmarkId::new("backward", &shape), |bencher| {
            bencher.iter(|| {
                backend
                    .attention_backward(&operation, &batch, &qkv, &log_sum, &out, &dout, &mut dqkv)
                    .unwrap();
            });
        });
    }
    let backend = CpuBackend::new(Some(2)).unwrap();
    let (capacity, rope) = (1024, floats(1024 * 64));
    let operation = Attention {
        query_heads: 9,
        key_value_heads: 3,
        head_dim: 64,
        softmax_scale: 0.125,
        soft_cap: None,
        window: None,
        query_norm: None,
        key_norm: None,
        rotations: Rotations { table: &rope, width: 64, first_row: 0, long: None },
    };
    let mut cache = KvCache { keys: floats(capacity * 192), values: floats(capacity * 192), capacity };
    let (qkv, mut out) = (floats(15 * 64), floats(HIDDEN));
    for position in [100, 1000] {
        group.throughput(Throughput::Elements(4 * 9 * 64 * position as u64));
        group.bench_function(BenchmarkId::new("decode", position), |bencher| {
            bencher.iter(|| {
                backend.attention_cached(&operation, 1, position, &qkv, &mut cache, &mut out).unwrap();
            });
        });
    }
    group.finish();
}

fn rows(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("rows");
    let backend = CpuBackend::new(Some(2)).unwrap();
    let (rows, width) = (1024, HIDDEN);
    let weight = floats(width);
    let norm = RmsNorm { weight: Weight::Frozen(&weight), weight_offset: 0.0, epsilon: 1e-5, width };
    let (x, dy, mut y) = (floats(rows * width), floats(rows * width), floats(rows * width));
    group.throughput(Throughput::Elements((rows * width) as u64));
    group.bench_function("rms_norm 1024x576", |bencher| {
        bencher.iter(|| backend.rms_norm(norm, rows, &x, None, &mut y).unwrap());
    });
    group.bench_function("rms_norm_backward 1024x576", |bencher| {
        bencher.iter(|| backend.rms_norm_backward(norm, rows, &x, &dy, &mut y).unwrap());
    });
    let (gate_up, mut act) = (floats(rows * 3072), floats(rows * 1536));
    group.throughput(Throughput::Elements((rows * 1536) as u64));
    group.bench_function("gated_silu 1024x1536", |bencher| {
        bencher.iter(|| backend.gated(Activation::Silu, rows, 1536, &gate_up, &mut act).unwrap());
    });
    let mut gradient = gate_up.clone();
    group.bench_function("gated_silu_backward 1024x1536", |bencher| {
        bencher.iter(|| backend.gated_backward(Activation::Silu, rows, 1536, &act, &mut gradient).unwrap());
    });

    let data = floats(HIDDEN * 1536);
    let tensor = WeightTensor::from_f32("w", vec![HIDDEN, 1536], &data);
    let lora = LoraSlot { rank: 16, scale: 1.0, a_offset: 0, b_offset: 16 * 1536, magnitude_offset: None };
    let matrix = backend.matrix(&[tensor]).unwrap();
    let projections = vec![Projection { out_features: HIDDEN, lora: Some(lora) }];
    let linear = LinearGroup::new(&backend, 1, matrix, None, 1536, projections).unwrap();
    let adapters = floats(16 * (1536 + HIDDEN));
    let mut s = floats(rows * 16);
    group.throughput(Throughput::Elements((2 * rows * 1536 * HIDDEN) as u64));
    for (name, dropout) in [("", None), (" dropout", Some(Dropout { probability: 0.05, seed: 1, epoch: 0 }))]
    {
        let batch = batch_of(&backend, 8, 128, dropout);
        group.bench_function(format!("linear 1024x1536x576{name}"), |bencher| {
            bencher.iter(|| {
                let input = LinearInput { x: &act, rows, batch: &batch };
                backend.linear(&linear, &adapters, input, None, &mut s, &mut y).unwrap();
            });
        });
    }
    group.finish();
}

fn head(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("head");
    let backend = CpuBackend::new(Some(2)).unwrap();
    let vocabulary = 49_152;
    let bytes: Vec<u8> =
        floats(vocabulary * HIDDEN).iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect();
    let range = 0..bytes.len();
    let shape = vec![vocabulary, HIDDEN];
    let tensor = WeightTensor::new("head", DType::F16, shape, std::sync::Arc::new(bytes), range);
    let weight = backend.matrix(&[tensor]).unwrap();
    for rows in [32, 170, 1020] {
        let batch = batch_of(&backend, 1, rows + 1, None);
        let (x, mut dx, mut losses) = (floats(rows * HIDDEN), floats(rows * HIDDEN), floats(2 * rows));
        group.throughput(Throughput::Elements((4 * rows * vocabulary * HIDDEN) as u64));
        group.bench_function(BenchmarkId::new("loss with gradient", rows), |bencher| {
            bencher.iter(|| {
                let head =
                    Head { weight: Weight::Frozen(&weight), vocabulary, width: HIDDEN, soft_cap: None };
                backend.head_loss(head, &batch, &x, &mut losses, Some(&mut dx), None).unwrap();
            });
        });
    }
    group.finish();
}

fn optimizer(criterion: &mut Criterion) {
    let backend = CpuBackend::new(Some(2)).unwrap();
    let count = 4_884_480;
    let (mut p, g, mut m, mut v) = (floats(count), floats(count), floats(count), floats(count));
    v.iter_mut().for_each(|v| *v = v.abs());
    let step = AdamWStep {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.01,
        step: 10,
        max_grad_norm: 1.0,
        loss_scale: 1.0,
    };
    let mut group = criterion.benchmark_group("optimizer");
    group.throughput(Throughput::Elements(count as u64));
    group.bench_function("adamw", |bencher| {
        bencher.iter(|| {
            let state = OptimizerState {
                parameters: &mut p,
                gradients: &g,
                first_moment: &mut m,
                second_moment: &mut v,
                b_rate: None,
            };
            backend.adamw(state, step).unwrap()
        });
    });
    group.finish();
}

criterion_group!(operations, attention, rows, head, optimizer);
criterion_main!(operations);
