//! The memory that a plan tells is the memory that a run takes, byte for byte up to alignment.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use fastlora::backend::cpu::CpuBackend;
use fastlora::checkpoint::base::BaseModel;
use fastlora::config::TargetModules;
use fastlora::dtype::DType;
use fastlora::model::{CHOICES, Limits, LoraConfig, ModelShape, Needs, Purpose, Transformer};
use fastlora::optim::{AdamW, AdamWSettings};

thread_local! {
    /// Bytes that this thread has allocated and not freed: those of the test's own threads are not the model's.
    static LIVE_BYTES: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // While a thread ends there is nothing left to count with, or for.
    let _ = LIVE_BYTES.try_with(|live| live.set(live.get() + bytes));
}

struct Counting;

// SAFETY: every call goes to the system's allocator unchanged; counting touches no memory that it manages.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Each of at most 60 buffers is rounded up to a cache line, and has its place in a list.
const ROUNDING: u64 = 60 * (64 + 64);

#[test]
fn what_is_planned_is_what_is_allocated() {
    for ((name, targets), choice) in [
        ("tiny_qwen2", TargetModules::ALL_LINEAR),
        ("tiny_qwen3", r".*layers\.1\.mlp\.(gate|down)_proj"),
        ("tiny_llama3rope", r".*self_attn\..*"),
    ]
    .into_iter()
    .zip(CHOICES)
    {
        let folder = format!("{}/tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"));
        let base = BaseModel::open(folder).unwrap();
        let target_modules = TargetModules::Pattern(targets.into());
        let lora = LoraConfig::new(5, 8.0, target_modules);
        let limits = Limits { tokens: 333, labelled_rows: 77, positions: 99 };
        let backend = Arc::new(CpuBackend::new(Some(1)).unwrap());
        let shape = ModelShape::new(base.config(), Some(&lora)).unwrap();
        let needs = Needs { purpose: Purpose::Training, limits, has_dropout: false };
        let (choice, recompute) = choice;
        let plan = shape.plan(&*backend, DType::F32, needs, recompute).unwrap();

        let mut model = Transformer::load(backend, &base, Some(&lora)).unwrap();
        let live = || LIVE_BYTES.get();
        let before = live();
        model.reserve_training(limits, choice, false).unwrap();
        let activations = (live() - before) as u64;
        assert!(
            (plan.activations..plan.activations + ROUNDING).contains(&activations),
            "{name}: {activations} {plan:?}"
        );

        let parameters = model.layout().parameter_count();
        let settings =
            AdamWSettings { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0, max_grad_norm: 1.0 };
        let before = live();
        let optimizer = AdamW::new(&**model.backend(), parameters, settings).unwrap();
        let moments = (live() - before) as u64;
        assert!((plan.optimizer..plan.optimizer + ROUNDING).contains(&moments), "{name}: {moments} {plan:?}");
        assert_eq!(plan.adapters, 2 * 4 * parameters as u64);
        drop(optimizer);
    }
}
