//! One of Hopper's products alone, each of its tiles on the same inputs: what `fastlora tune` measures.

use super::CudaBackend;
use super::launch::NULL;
use super::linear::{Sizes, rank_leading, upload};
use super::memory::{HALF_BYTES, Region};
use super::products::{BackwardProduct, ForwardProduct, NO_MASK};
use super::tiles::{Choice, ProductKind, ProductShape};
use super::weights::check_width;
use crate::backend::Backend;
use crate::device::Device;
use crate::error::{Error, Result};

/// Runs of a product on several inputs, recorded once for each choice of tiles.
pub struct Trial<D: Device> {
    inputs: Vec<Inputs<D>>,
    recordings: Vec<(Choice, D::Graph)>,
}

/// Inputs and output of one run, with one adapter over all of it.
struct Inputs<D: Device> {
    sizes: Sizes,
    /// `x` or `dy`.
    left: Region<D>,
    weight: Region<D>,
    /// `s` or `ds`, and `B̂` or `A`.
    adapter: [Region<D>; 2],
    slots: Region<D>,
    out: Region<D>,
}

/// Elements of the left operand, the weight, the adapter's share of both, and the output.
fn elements(shape: ProductShape, rank: usize) -> [usize; 5] {
    let ProductShape { rows, columns, depth, .. } = shape;
    let leading = rank_leading(rank);
    [rows * depth, columns * depth, rows * leading, columns * leading, rows * columns]
}

impl<D: Device> Trial<D> {
    /// Bytes of one run's inputs and output.
    pub fn bytes_of_run(shape: ProductShape, rank: usize) -> usize {
        elements(shape, rank).iter().sum::<usize>() * HALF_BYTES
    }

    /// Runs that one start of a choice makes.
    pub fn runs(&self) -> usize {
        self.inputs.len()
    }

    /// The choices.
    pub fn choices(&self) -> impl Iterator<Item = Choice> + '_ {
        self.recordings.iter().map(|&(choice, _)| choice)
    }

    /// Starts the product on each input in turn, with the tiles of choice `index`.
    ///
    /// # Errors
    /// The device's.
    pub fn start(&self, backend: &CudaBackend<D>, index: usize) -> Result<()> {
        // SAFETY: the inputs, whose addresses the recording names, live as long as it does.
        unsafe { backend.device().replay(&self.recordings[index].1) }
    }
}

impl<D: Device> CudaBackend<D> {
    /// Refuses a device, or kernels, whose products have one kind of tile.
    ///
    /// # Errors
    /// A device error.
    pub fn check_choice_of_tiles(&self) -> Result<()> {
        if self.has_choice_of_tiles() {
            return Ok(());
        }
        let message = format!("{}: its products have one kind of tile", self.description());
        Err(Error::device(message).hint(
            "there is nothing to tune: only Hopper's own kernels (compute capability 9.0) have a choice",
        ))
    }

    /// A product with adapters of `rank` on `copies` inputs of their own, which repeat `values`.
    ///
    /// # Errors
    /// A device or kernels without a choice of tiles, a width that the kernels do not take, or no memory.
    pub fn trial(&self, shape: ProductShape, rank: usize, copies: usize, values: &[f32]) -> Result<Trial<D>> {
        self.check_choice_of_tiles()?;
        for width in [shape.columns, shape.depth] {
            check_width("a linear's width", width)?;
        }
        let mut bytes = Vec::with_capacity(values.len() * HALF_BYTES);
        self.compute().encode(values, &mut bytes);
        let inputs = (0..copies).map(|_| self.trial_inputs(shape, rank, &bytes));
        let inputs = inputs.collect::<Result<Vec<_>>>()?;
        let record = |choice| {
            let work = || inputs.iter().try_for_each(|inputs| self.run_trial(shape.product, inputs, choice));
            // Once as it is: a kernel is loaded by its first launch, which a recording may not do.
            work()?;
            Ok((choice, self.device().record(work)?))
        };
        let recordings = Choice::ALL.into_iter().map(record).collect::<Result<Vec<_>>>()?;
        Ok(Trial { inputs, recordings })
    }

    fn trial_inputs(&self, shape: ProductShape, rank: usize, bytes: &[u8]) -> Result<Inputs<D>> {
        let filled = |elements: usize| {
            let region = Region::allocate(self.device(), elements * HALF_BYTES)?;
            for start in (0..region.bytes()).step_by(bytes.len().max(1)) {
                let part = &bytes[..bytes.len().min(region.bytes() - start)];
                region.upload(self.device(), part, start)?;
            }
            Ok(region)
        };
        let [left, weight, adapter_left, adapter_right, out] = elements(shape, rank);
        let ProductShape { product, rows, columns, depth } = shape;
        let (inputs, outputs) = match product {
            ProductKind::Forward => (depth, columns),
            ProductKind::BackwardInput => (columns, depth),
        };
        Ok(Inputs {
            sizes: Sizes { tokens: rows, inputs, outputs, rank, leading: rank_leading(rank) },
            left: filled(left)?,
            weight: filled(weight)?,
            adapter: [filled(adapter_left)?, filled(adapter_right)?],
            slots: upload(self.device(), &[[0, outputs as i32, 0, rank as i32]])?,
            out: Region::allocate(self.device(), out * HALF_BYTES)?,
        })
    }

    fn run_trial(&self, product: ProductKind, inputs: &Inputs<D>, choice: Choice) -> Result<()> {
        let all = |region: &Region<D>| region.first(region.bytes());
        let (sizes, has_adapter) = (inputs.sizes, inputs.sizes.rank > 0);
        let of_adapter = |region| if has_adapter { all(region) } else { Ok(NULL) };
        let [low_rank, factor] = &inputs.adapter;
        let (left, weight, out) = (all(&inputs.left)?, all(&inputs.weight)?, all(&inputs.out)?);
        let (low_rank, factor) = (of_adapter(low_rank)?, of_adapter(factor)?);
        match product {
            ProductKind::Forward => {
                let product = ForwardProduct {
                    x: left,
                    weight,
                    bias: NULL,
                    residual: NULL,
                    s: low_rank,
                    b_hat: factor,
                    slots: of_adapter(&inputs.slots)?,
                    adapters: usize::from(has_adapter),
                    y: out,
                    sizes,
                };
                // SAFETY: every part was allocated for these sizes.
                unsafe { self.kernels.hopper_forward(&product, sizes.outputs, choice) }
            }
            ProductKind::BackwardInput => {
                let (dy, ds, a, dx) = (left, low_rank, factor, out);
                let product = BackwardProduct { dy, weight, ds, a, dx, sizes, mask: NO_MASK };
                // SAFETY: as above; A [R, I] is no larger than [I, R̄].
                unsafe { self.kernels.hopper_backward_input(&product, sizes.outputs, choice) }
            }
        }
    }
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::super::ComputeType;
    use super::*;
    use crate::device::emulator::Emulator;

    /// Values of few bits, so that sums are exact in any order and the output is known without rounding.
    fn values() -> Vec<f32> {
        (0..997).map(|place| [0.5, -1.0, 0.25, 0.0, 1.0, -0.5, 2.0][place * place % 7]).collect()
    }

    #[test]
    fn every_choice_computes_the_product() {
        let backend = CudaBackend::new(Emulator::of(true, false).unwrap(), ComputeType::F16);
        let (rows, columns, depth, rank) = (130, 200, 72, 8);
        let values = values();
        let at = |place: usize| values[place % values.len()];
        for product in [ProductKind::Forward, ProductKind::BackwardInput] {
            let shape = ProductShape { product, rows, columns, depth };
            let trial = backend.trial(shape, rank, 2, &values).unwrap();
            assert_eq!(trial.choices().collect::<Vec<_>>(), Choice::ALL);
            for index in 0..Choice::ALL.len() {
                for inputs in &trial.inputs {
                    let poison = vec![0xFF; inputs.out.bytes()];
                    inputs.out.upload(backend.device(), &poison, 0).unwrap();
                }
                trial.start(&backend, index).unwrap();
                for inputs in &trial.inputs {
                    let mut found = vec![0.0; rows * columns];
                    backend.download_halves(&inputs.out, &mut found).unwrap();
                    for (place, found) in found.into_iter().enumerate() {
                        let (row, column) = (place / columns, place % columns);
                        let right = |k: usize, length: usize, is_forward: bool| {
                            if is_forward { column * length + k } else { k * columns + column }
                        };
                        let is_forward = product == ProductKind::Forward;
                        let sum = |length: usize| -> f32 {
                            (0..length).map(|k| at(row * length + k) * at(right(k, length, is_forward))).sum()
                        };
                        let expected = half::f16::from_f32(sum(depth) + sum(rank)).to_f32();
                        assert_eq!(found, expected, "{product} {:?} [{row}, {column}]", Choice::ALL[index]);
                    }
                }
            }
        }
    }

    #[test]
    fn without_a_choice_there_is_no_trial() {
        let shape = ProductShape { product: ProductKind::Forward, rows: 1, columns: 8, depth: 8 };
        let hopper = CudaBackend::new(Emulator::of(true, false).unwrap(), ComputeType::F16);
        for (backend, part) in [
            (CudaBackend::new(Emulator::of(false, false).unwrap(), ComputeType::F16), "one kind of tile"),
            (hopper.with_portable_kernels(), "one kind of tile"),
        ] {
            let error = backend.trial(shape, 0, 1, &[1.0]).err().unwrap();
            assert_eq!(error.kind().exit_code(), 5);
            assert!(error.message().contains(part), "{error}");
        }
    }
}
