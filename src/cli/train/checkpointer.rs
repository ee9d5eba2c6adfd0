//! When a checkpoint is saved, and what `state.json` holds.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::output::{AdapterWriter, checkpoints_folder};
use crate::backend::Backend;
use crate::checkpoint::run::{Checkpoint, Checkpoints, Contents};
use crate::cli::signals::Interrupts;
use crate::config::SaveEvery;
use crate::error::{Error, Result};
use crate::training::{Flow, Pause, TrainingState, TrainingSummary};

/// Layout of `state.json`.
const FORMAT: u32 = 1;

/// `state.json`: a [`TrainingState`] without its tensors.
#[derive(Debug, Deserialize, Serialize)]
struct SavedState {
    format: u32,
    optimizer_steps: u64,
    /// The factor, and updates since it last changed.
    loss_scale: Option<(f64, u64)>,
    summary: TrainingSummary,
}

/// The state that a checkpoint holds.
///
/// # Errors
/// A `state.json` of another version.
pub(super) fn restore(checkpoint: Checkpoint) -> Result<TrainingState> {
    let other_version = || {
        Error::config(format!("its state has format {}, expected {FORMAT}", checkpoint.state["format"]))
            .hint("resume it with the version of fastlora that wrote it")
    };
    if checkpoint.state["format"] != FORMAT {
        return Err(other_version());
    }
    let SavedState { optimizer_steps, loss_scale, summary, .. } =
        serde_json::from_value(checkpoint.state.clone())
            .map_err(|source| Error::corrupt("its state is incomplete").caused_by(source))?;
    let (adapter, moments) = (checkpoint.adapter.tensors, checkpoint.moments);
    Ok(TrainingState { adapter, moments, optimizer_steps, loss_scale, summary })
}

/// Saves checkpoints of one run.
pub(super) struct Checkpointer<'a> {
    writer: &'a AdapterWriter<'a>,
    interrupts: &'a Interrupts,
    checkpoints: Checkpoints,
    last_saved: Instant,
    last_saved_step: u64,
    is_stopped: bool,
}

impl<'a> Checkpointer<'a> {
    /// For a run that begins after `steps` steps, of which there is a checkpoint unless there are none.
    pub(super) fn new(writer: &'a AdapterWriter<'a>, interrupts: &'a Interrupts, steps: u64) -> Self {
        Self {
            writer,
            interrupts,
            checkpoints: Checkpoints::new(checkpoints_folder(writer.config)),
            last_saved: Instant::now(),
            last_saved_step: steps,
            is_stopped: false,
        }
    }

    /// Asks for an end, as a signal does.
    pub(super) fn stop(&self) {
        self.interrupts.request();
    }

    /// Whether a signal asked for an end.
    pub(super) fn wants_to_stop(&self) -> bool {
        self.interrupts.is_requested()
    }

    /// Whether the run was ended before its last step.
    pub(super) fn is_stopped(&self) -> bool {
        self.is_stopped
    }

    /// Saves where it is time to, and stops where that is wanted. `sync_figures` forces the figures so far to the disk.
    pub(super) fn between_steps<B: Backend>(
        &mut self,
        pause: &Pause<'_, B>,
        sync_figures: impl FnOnce() -> Result<()>,
    ) -> Result<Flow> {
        let step = pause.summary.steps;
        if step != self.last_saved_step && (self.wants_to_stop() || self.is_due(step)) {
            // A checkpoint never knows of steps that the metrics might lose.
            sync_figures()?;
            self.save(pause)?;
            self.checkpoints.keep(self.writer.config.keep_checkpoints)?;
            self.last_saved = Instant::now();
            self.last_saved_step = step;
        }
        // A request that came while the checkpoint was saved has it already.
        self.is_stopped = self.wants_to_stop() && step == self.last_saved_step;
        Ok(if self.is_stopped { Flow::Stop } else { Flow::Continue })
    }

    fn is_due(&self, step: u64) -> bool {
        match self.writer.config.save_every {
            SaveEvery::Never => false,
            SaveEvery::Steps(steps) => step.is_multiple_of(steps),
            SaveEvery::Minutes(minutes) => {
                self.last_saved.elapsed() >= Duration::from_secs(minutes.saturating_mul(60))
            }
        }
    }

    fn save<B: Backend>(&self, pause: &Pause<'_, B>) -> Result<()> {
        let TrainingState { adapter, moments, optimizer_steps, loss_scale, summary } = pause.state()?;
        let step = summary.steps;
        let (mut provenance, card) = self.writer.describe(&summary)?;
        provenance["computed_by"] = json!(self.writer.computed_by(&**pause.model.backend()));
        let state = json!(SavedState { format: FORMAT, optimizer_steps, loss_scale, summary });
        let contents = Contents {
            config: &self.writer.adapter,
            adapter: &adapter,
            companions: self.writer.companions(&provenance, &card),
            moments: &moments,
            state: &state,
        };
        self.checkpoints.save(step, contents)?;
        tracing::debug!("checkpoint: {}", self.checkpoints.path(step).display());
        Ok(())
    }
}
