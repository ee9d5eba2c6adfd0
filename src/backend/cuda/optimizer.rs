//! Gradient norm, clip and AdamW on the device (adamw.cu).

use super::launch::{NULL, Shape, int};
use super::linear::upload;
use super::memory::{FLOAT_BYTES, Region, take};
use super::{CudaBackend, Scratch};
use crate::backend::{AdamWStep, OptimizerState};
use crate::device::{Argument, Device};
use crate::error::Result;

const THREADS: usize = 256;
/// Partial sums of the norm: a matter of the length alone, so that every GPU adds in the same order.
const MAX_PARTIALS: usize = 512;
/// Elements of the kernels' `scalars`: rate, two corrections, 1 / loss scale; then norm and clip factor.
const SCALARS: usize = 6;
const NORM: usize = 4;

/// Ends of the runs of `A`s and `B`s.
pub struct CudaRuns<D: Device> {
    ends: Region<D>,
    count: usize,
}

impl<D: Device> CudaBackend<D> {
    pub(super) fn upload_runs(&self, ends: &[usize]) -> Result<CudaRuns<D>> {
        let values: Vec<i64> = ends.iter().map(|&end| end as i64).collect();
        Ok(CudaRuns { ends: upload(self.device(), &values)?, count: ends.len() })
    }

    /// Returns when the norm is known, while the update still runs: the next step can be enqueued behind it in time.
    pub(super) fn adamw_update(&self, state: OptimizerState<'_, Self>, step: AdamWStep) -> Result<f64> {
        let count = state.parameters.elements();
        let gradients = state.gradients.first(count)?;
        let exponent = i32::try_from(step.step).unwrap_or(i32::MAX);
        let known = [
            step.learning_rate,
            1.0 - step.beta1.powi(exponent),
            1.0 - step.beta2.powi(exponent),
            1.0 / step.loss_scale,
        ]
        .map(|value| value as f32);
        let partial_count = count.div_ceil(4 * THREADS).clamp(1, MAX_PARTIALS);
        // The half copy is written with the update; it must exist, and be what the parameters were.
        let half = self.half_copy(state.parameters)?;

        let (run_ends, run_count, ratio) = match &state.b_rate {
            Some(rate) => {
                (rate.runs.ends.first(rate.runs.count * size_of::<i64>())?, rate.runs.count, rate.ratio)
            }
            None => (NULL, 0, 1.0),
        };

        let mut scratch = super::lock(&self.scratch);
        let Scratch { norm, norm_landing, .. } = &mut *scratch;
        let bytes = (SCALARS + 1 + partial_count) * FLOAT_BYTES;
        let region = norm.reserve(self.device(), bytes)?;
        region.upload(self.device(), bytemuck::cast_slice(&known), 0)?;
        let scalars = region.first(SCALARS * FLOAT_BYTES)?;
        let flag = region.at(SCALARS * FLOAT_BYTES, FLOAT_BYTES)?;
        let partials = region.at((SCALARS + 1) * FLOAT_BYTES, partial_count * FLOAT_BYTES)?;
        let elements = Argument::I64(count as i64);
        let clip = Argument::F32(step.max_grad_norm as f32);
        // SAFETY: gradients, parameters and moments hold `count` values, the partials one a block, the ends one a run.
        unsafe {
            let shape = Shape::blocks(partial_count, THREADS as u32);
            self.kernels.launch("grad_norm_partials", shape, &[gradients, scalars, partials, elements])?;
            let arguments = [partials, scalars, flag, int(partial_count)?, clip];
            self.kernels.launch("grad_norm_finish", Shape::blocks(1, 32), &arguments)?;
            region.start_download(self.device(), size_of::<[f32; NORM + 1]>(), norm_landing)?;
            let arguments = [
                state.parameters.first(count)?,
                state.first_moment.first(count)?,
                state.second_moment.first(count)?,
                half.first(count)?,
                gradients,
                scalars,
                elements,
                Argument::F32(step.beta1 as f32),
                Argument::F32((1.0 - step.beta1) as f32),
                Argument::F32(step.beta2 as f32),
                Argument::F32((1.0 - step.beta2) as f32),
                Argument::F32(step.epsilon as f32),
                Argument::F32(step.weight_decay as f32),
                run_ends,
                int(run_count)?,
                Argument::F32(ratio as f32),
            ];
            self.kernels.launch_half(
                "adamw",
                Shape::blocks(count.div_ceil(THREADS), THREADS as u32),
                &arguments,
            )?;
        }
        let mut found = [0.0f32; NORM + 1];
        take(self.device().finish_download(norm_landing)?, bytemuck::cast_slice_mut(&mut found))?;
        Ok(f64::from(found[NORM]))
    }
}
