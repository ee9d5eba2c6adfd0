//! Nothing is allocated in a training step once its largest shapes were seen.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use fastlora::backend::cpu::CpuBackend;
use fastlora::backend::{Dropout, EmbeddingNoise, PassSettings};
use fastlora::batch::Batch;
use fastlora::checkpoint::base::BaseModel;
use fastlora::config::TargetModules;
use fastlora::model::{LoraConfig, Transformer};
use fastlora::optim::{AdamW, AdamWSettings};

/// Bytes asked for since the start.
static ALLOCATED_BYTES: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: every call goes to the system's allocator unchanged; counting touches no memory that it manages.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED_BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Handing work to the thread pool takes a block of its queue (about 1.5 KB) for every 63 operations; the smallest
/// activation of these batches has 21 KB.
const QUEUE_BYTES_A_STEP: usize = 4 * 1024;

#[test]
fn a_step_allocates_nothing() {
    for model in ["tiny_qwen3", "tiny_gemma2"] {
        check(model);
    }
}

fn check(model: &str) {
    let folder = format!("{}/tests/fixtures/{model}", env!("CARGO_MANIFEST_DIR"));
    let base = BaseModel::open(folder).unwrap();
    let targets = TargetModules::Pattern(TargetModules::ALL_LINEAR.into());
    let lora = LoraConfig::new(4, 8.0, targets);
    let mut model = Transformer::load(Arc::new(CpuBackend::new(None).unwrap()), &base, Some(&lora)).unwrap();
    model.start(&base, 1).unwrap();
    let settings =
        AdamWSettings { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0, max_grad_norm: 1.0 };
    let mut optimizer = AdamW::new(&**model.backend(), model.layout().parameter_count(), settings).unwrap();
    let settings = PassSettings {
        gradient_scale: 0.01,
        dropout: Some(Dropout { probability: 0.1, seed: 1, epoch: 0 }),
        embedding_noise: Some(EmbeddingNoise { alpha: 5.0, seed: 1, epoch: 0 }),
    };

    let batch = |lengths: &[u32]| {
        let mut batch = Batch::default();
        for (sample, &length) in lengths.iter().enumerate() {
            let ids: Vec<u32> = (0..length).map(|place| 3 + place % 60).collect();
            let labels: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
            batch.push(sample, &ids, &labels);
        }
        batch
    };
    let (largest, smaller) = (batch(&[64, 100]), batch(&[50, 1, 33]));
    let mut step = |batch: &Batch| {
        model.zero_gradients().unwrap();
        model.accumulate_gradients(batch, settings).unwrap();
        let (backend, parameters, gradients) = model.trainable();
        optimizer.update(backend, parameters, gradients, 1e-3).unwrap();
    };
    // Both threads must have met the largest of everything, which thread meets what is not fixed.
    for _ in 0..20 {
        step(&largest);
        step(&smaller);
    }
    let before = ALLOCATED_BYTES.load(Ordering::Relaxed);
    for _ in 0..5 {
        step(&largest);
        step(&smaller);
    }
    let allocated = ALLOCATED_BYTES.load(Ordering::Relaxed) - before;
    assert!(allocated < 10 * QUEUE_BYTES_A_STEP, "{allocated} bytes in ten steps");
}
