//! The golden runs (`tests/fixtures/README.md`): what they start from, ten steps of them, what they expect.

use std::path::PathBuf;
use std::sync::Arc;

use fastlora::backend::{Backend, PassSettings};
use fastlora::batch::Batch;
use fastlora::checkpoint::adapter::{Adapter, read_adapter};
use fastlora::checkpoint::base::BaseModel;
use fastlora::model::Transformer;
use fastlora::optim::{AdamW, AdamWSettings};
use serde_json::Value;

use super::{Tensors, fixture};

/// One set of golden values: a model, where it lies, and the tolerances that its README derives.
pub struct Golden {
    pub folder: std::path::PathBuf,
    pub values: Value,
    pub variant: &'static str,
}

impl Golden {
    pub fn new(name: &str, variant: &'static str) -> Self {
        let folder = fixture(name);
        let text = std::fs::read_to_string(folder.join("golden.json")).unwrap();
        Self { folder, values: serde_json::from_str(&text).unwrap(), variant }
    }

    pub fn run(&self, dtype: &str) -> &Value {
        &self.values["runs"][format!("{}_{dtype}", self.variant)]
    }

    pub fn numbers(&self, dtype: &str, key: &str) -> Vec<f64> {
        self.run(dtype)[key].as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect()
    }

    pub fn learning_rate(&self) -> f64 {
        self.values["optim"]["lr"].as_f64().unwrap()
    }

    /// `base` on `backend` with the adapter that the run starts from.
    pub fn model<B: Backend>(&self, backend: Arc<B>, base: &BaseModel) -> Transformer<B> {
        let adapter = read_adapter(&self.folder.join(format!("adapter_init_{}", self.variant))).unwrap();
        Transformer::load_with_adapter(backend, base, &adapter).unwrap()
    }

    /// The model's batch.
    pub fn batch(&self) -> Batch {
        batch_of(&self.folder)
    }
}

/// One folder of `tests/fixtures/trained`: what goes beyond plain LoRA.
pub struct BeyondLora {
    pub name: &'static str,
    pub folder: PathBuf,
    pub values: Value,
    pub base: BaseModel,
}

impl BeyondLora {
    pub fn new(name: &'static str) -> Self {
        let folder = fixture("trained").join(name);
        let text = std::fs::read_to_string(folder.join("golden.json")).unwrap();
        let values: Value = serde_json::from_str(&text).unwrap();
        let base = BaseModel::open(fixture(values["base"].as_str().unwrap())).unwrap();
        Self { name, folder, values, base }
    }

    /// The adapter that the run starts from.
    pub fn start(&self) -> Adapter {
        read_adapter(&self.folder.join("adapter_init")).unwrap()
    }

    /// Ten steps from there.
    pub fn train<B: Backend>(&self, backend: Arc<B>, learning_rate: f64, ratio: f64) -> Trained<B> {
        let model = Transformer::load_with_adapter(backend, &self.base, &self.start()).unwrap();
        train_on(model, &batch_of(self.base.folder()), learning_rate, ratio)
    }
}

/// The right-padded rows of a model's `forward.safetensors` without their padding.
pub fn batch_of(model: &std::path::Path) -> Batch {
    let forward = Tensors::open(model.join("forward.safetensors"));
    let (shape, ids) = forward.get("input_ids");
    let (_, mask) = forward.get("attention_mask");
    let (_, labels) = forward.get("labels");
    let mut batch = Batch::default();
    for row in 0..shape[0] {
        let range = row * shape[1]..(row + 1) * shape[1];
        let length = mask[range.clone()].iter().filter(|&&kept| kept == 1.0).count();
        let range = range.start..range.start + length;
        let ids: Vec<u32> = ids[range.clone()].iter().map(|&id| id as u32).collect();
        let labels: Vec<i32> = labels[range].iter().map(|&label| label as i32).collect();
        batch.push(row, &ids, &labels);
    }
    batch
}

/// Ten steps; returns the losses before each and after the last, the norms, and the first gradients.
pub struct Trained<B: Backend> {
    pub losses: Vec<f64>,
    pub norms: Vec<f64>,
    pub first_gradients: Vec<f32>,
    pub model: Transformer<B>,
}

pub fn train<B: Backend>(golden: &Golden, backend: Arc<B>, base: &BaseModel) -> Trained<B> {
    train_at(golden, backend, base, golden.learning_rate(), 1.0)
}

/// The same at another rate, with that of every B `ratio` times as high (LoRA+).
pub fn train_at<B: Backend>(
    golden: &Golden,
    backend: Arc<B>,
    base: &BaseModel,
    learning_rate: f64,
    ratio: f64,
) -> Trained<B> {
    train_on(golden.model(backend, base), &golden.batch(), learning_rate, ratio)
}

/// Ten steps of any model on any batch.
pub fn train_on<B: Backend>(
    mut model: Transformer<B>,
    batch: &Batch,
    learning_rate: f64,
    ratio: f64,
) -> Trained<B> {
    let settings =
        AdamWSettings { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01, max_grad_norm: 1.0 };
    let parameter_count = model.layout().parameter_count();
    let backend = Arc::clone(model.backend());
    let mut optimizer = AdamW::new(&*backend, parameter_count, settings).unwrap();
    optimizer.set_b_rate(&*backend, model.layout(), ratio).unwrap();
    let scale = 1.0 / batch.labelled_count() as f64;
    let (mut losses, mut norms, mut first_gradients) = (Vec::new(), Vec::new(), Vec::new());
    for step in 0..10 {
        model.zero_gradients().unwrap();
        let loss_scale = optimizer.loss_scale().factor();
        let settings =
            PassSettings { gradient_scale: (scale * loss_scale) as f32, ..PassSettings::default() };
        losses.push(model.accumulate_gradients(batch, settings).unwrap().loss_sum() * scale);
        if step == 0 {
            let unscaled = |gradient: f32| gradient / loss_scale as f32;
            first_gradients = model.gradients().unwrap().into_iter().map(unscaled).collect();
        }
        let (backend, parameters, gradients) = model.trainable();
        norms.push(optimizer.update(backend, parameters, gradients, learning_rate).unwrap());
    }
    losses.push(model.evaluate(batch).unwrap().loss_sum() * scale);
    Trained { losses, norms, first_gradients, model }
}

pub fn expected_losses(golden: &Golden, dtype: &str) -> Vec<f64> {
    let mut losses = golden.numbers(dtype, "losses");
    losses.push(golden.run(dtype)["loss_after_10"].as_f64().unwrap());
    losses
}
