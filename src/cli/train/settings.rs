//! The training loop's settings from the configuration.

use crate::config::TrainingConfig;
use crate::error::Result;
use crate::optim::{AdamWSettings, Schedule};
use crate::tokens::BatchPlan;
use crate::training::TrainingSettings;

/// What the configuration says of every step, and how many there are.
///
/// # Errors
/// More epochs than can be counted.
pub(super) fn training_settings(config: &TrainingConfig, plan: &BatchPlan<'_>) -> Result<TrainingSettings> {
    let total_steps = config.max_steps.map_or_else(|| plan.steps_of(config.num_epochs), Ok)?;
    Ok(TrainingSettings {
        optimizer: AdamWSettings {
            beta1: config.adam_beta1,
            beta2: config.adam_beta2,
            epsilon: config.adam_epsilon,
            weight_decay: config.weight_decay,
            max_grad_norm: config.max_grad_norm,
        },
        b_rate_ratio: config.loraplus_lr_ratio,
        schedule: Schedule {
            scheduler: config.lr_scheduler,
            peak_learning_rate: config.learning_rate,
            warmup_steps: config.warmup_steps,
            total_steps,
        },
        dropout_probability: config.lora_dropout as f32,
        embedding_noise_alpha: config.neftune_noise_alpha as f32,
        seed: config.seed,
        activation_memory: config.activation_memory,
        val_every: config.val_every,
        early_stopping_patience: config.early_stopping_patience,
        on_nan: config.on_nan,
    })
}
