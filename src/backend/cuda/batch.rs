//! A batch on the device: ids, the keys of dropout masks, labelled rows, and attention's tiles.

use std::cmp::Reverse;

use super::CudaBackend;
use super::memory::{FLOAT_BYTES, Growing, Region};
use super::recordings::bucket_of_tiles;
use crate::backend::{Dropout, EmbeddingNoise, PassSettings, check_id};
use crate::batch::{Batch, NO_ROW};
use crate::device::{Argument, Device};
use crate::error::{Error, Result};

/// Queries or keys of one tile: `outer_rows` in attention_tile.h, `hopper_rows` in hopper_attention.h.
const TILE_ROWS: usize = 64;
const HOPPER_TILE_ROWS: usize = 128;

/// What stands before the arrays: the gradient's scale and the epochs, which recorded work reads from memory.
const HEADER: usize = 4;
const GRADIENT_SCALE: usize = 0;
const EPOCH: usize = 1;
const NOISE_EPOCH: usize = 2;

/// Places of the arrays inside one stretch of 32-bit elements.
#[derive(Clone, Copy, Debug, Default)]
struct Places {
    positions: usize,
    samples: usize,
    labelled_rows: usize,
    targets: usize,
    tiles: usize,
    hopper_tiles: usize,
    lengths: usize,
}

/// A [`Batch`] on the device.
pub struct CudaBatch<D: Device> {
    memory: Growing<D>,
    host: Vec<u32>,
    places: Places,
    pub(super) dropout: Option<Dropout>,
    pub(super) embedding_noise: Option<EmbeddingNoise>,
    pub(super) tokens: usize,
    pub(super) labelled: usize,
    pub(super) tiles: usize,
    pub(super) hopper_tiles: usize,
    pub(super) longest_sample: usize,
    /// The largest id and target with their places: checked against each table, since no kernel does.
    largest_token: Option<(u32, usize)>,
    largest_target: Option<(u32, usize)>,
}

/// An element's bytes: ids, positions and places are 32 bits wide, as floats are.
const BYTES: usize = FLOAT_BYTES;

fn largest<'a>(ids: impl IntoIterator<Item = &'a u32>) -> Option<(u32, usize)> {
    ids.into_iter()
        .enumerate()
        .map(|(place, &id)| (id, place))
        .max_by_key(|&(id, place)| (id, usize::MAX - place))
}

/// First row of the sample, its end and the first row owned, of every tile of the samples (start, end). What sees most keys
/// comes first, so that the last blocks to finish are short.
fn tiles_of(samples: impl Iterator<Item = (u32, u32)>, rows: usize) -> Vec<[u32; 3]> {
    let tiles_of_sample =
        |(start, end): (u32, u32)| (start..end).step_by(rows).map(move |first| [start, end, first]);
    let mut tiles: Vec<_> = samples.flat_map(tiles_of_sample).collect();
    tiles.sort_by_key(|&[start, _, first]| (Reverse(first - start), start));
    tiles
}

/// Appends the tiles, and empty ones, which cost little, so that fewer numbers of tiles come up. Returns their number.
fn append_tiles(host: &mut Vec<u32>, samples: impl Iterator<Item = (u32, u32)>, rows: usize) -> usize {
    let tiles = tiles_of(samples, rows);
    let count = bucket_of_tiles(tiles.len());
    let end = host.len() + 3 * count;
    host.extend(tiles.iter().flatten());
    host.resize(end, 0);
    count
}

/// Bytes of a batch at most, when every token is a sample of its own and so a tile.
pub(super) fn most_bytes(tokens: usize, labelled_rows: usize) -> usize {
    (HEADER + 4 * tokens + 2 * labelled_rows + 2 * 3 * bucket_of_tiles(tokens)) * BYTES
}

impl<D: Device> CudaBatch<D> {
    pub(super) fn new() -> Self {
        Self {
            memory: Growing::default(),
            host: Vec::new(),
            places: Places::default(),
            dropout: None,
            embedding_noise: None,
            tokens: 0,
            labelled: 0,
            tiles: 0,
            hopper_tiles: 0,
            longest_sample: 0,
            largest_token: None,
            largest_target: None,
        }
    }

    /// Replaces what is there, in the order of the work. The bytes cross the bus beside the work so far, the backward or the
    /// update of the step before; what the work waits for is their copy inside the device, to the address that recordings
    /// name. Counted: six words a token and three a tile, 0.4 MB for 16 384 tokens.
    pub(super) fn load(
        &mut self,
        backend: &CudaBackend<D>,
        batch: &Batch,
        settings: PassSettings,
    ) -> Result<()> {
        let (tokens, labelled) = (batch.token_count(), batch.labelled_count());
        self.host.clear();
        self.host.resize(HEADER, 0);
        self.host[GRADIENT_SCALE] = settings.gradient_scale.to_bits();
        self.host[EPOCH] = settings.dropout.map_or(0, |dropout| dropout.epoch);
        self.host[NOISE_EPOCH] = settings.embedding_noise.map_or(0, |noise| noise.epoch);
        self.dropout = settings.dropout;
        self.embedding_noise = settings.embedding_noise;
        self.host.extend_from_slice(&batch.token_ids);
        self.places.positions = self.host.len();
        let samples = || batch.sample_starts.windows(2).map(|pair| (pair[0] as u32, pair[1] as u32));
        self.host.extend(samples().flat_map(|(start, end)| 0..end - start));
        self.places.samples = self.host.len();
        for ((start, end), &id) in samples().zip(&batch.sample_ids) {
            // The masks are keyed by the index's low 32 bits.
            self.host.resize(self.host.len() + (end - start) as usize, id as u32);
        }
        self.places.labelled_rows = self.host.len();
        self.host.extend_from_slice(&batch.labelled_rows);
        self.places.targets = self.host.len();
        self.host.extend_from_slice(&batch.targets);
        self.places.tiles = self.host.len();
        self.tiles = append_tiles(&mut self.host, samples(), TILE_ROWS);
        self.places.hopper_tiles = self.host.len();
        self.hopper_tiles = append_tiles(&mut self.host, samples(), HOPPER_TILE_ROWS);
        self.places.lengths = self.host.len();
        for (start, end) in samples() {
            self.host.resize(self.host.len() + (end - start) as usize, end - start);
        }
        self.tokens = tokens;
        self.labelled = labelled;
        self.longest_sample = samples().map(|(start, end)| (end - start) as usize).max().unwrap_or(0);
        self.largest_token = largest(&batch.token_ids);
        self.largest_target = largest(batch.targets.iter().filter(|&&target| target != NO_ROW));
        let (device, bytes) = (backend.device(), bytemuck::cast_slice(&self.host));
        let mut scratch = super::lock(&backend.scratch);
        let buffer = scratch.upload_buffer(device, bytes.len())?;
        device.start_upload(bytes, buffer)?;
        self.memory.reserve(device, bytes.len())?.finish_upload(device, buffer)
    }

    /// What recorded work over it depends on.
    pub(super) fn shape(&self) -> [u64; 6] {
        let (probability, seed) =
            self.dropout.map_or((0, 0), |dropout| (dropout.probability.to_bits(), dropout.seed));
        let (alpha, noise_seed) =
            self.embedding_noise.map_or((0, 0), |noise| (noise.alpha.to_bits(), noise.seed));
        let strengths = u64::from(probability) | u64::from(alpha) << 32;
        let tiles = self.tiles as u64 | (self.hopper_tiles as u64) << 32;
        [self.tokens as u64, self.labelled as u64, tiles, strengths, seed, noise_seed]
    }

    fn array(&self, start: usize, count: usize) -> Result<Argument> {
        match self.memory.region() {
            Some(region) => region.at(start * BYTES, count * BYTES),
            None => Err(Error::internal("no batch was loaded")),
        }
    }

    /// The factor on the gradient.
    pub(super) fn gradient_scale(&self) -> Result<Argument> {
        self.array(GRADIENT_SCALE, 1)
    }

    /// The epoch of the dropout masks.
    pub(super) fn epoch(&self) -> Result<Argument> {
        self.array(EPOCH, 1)
    }

    /// The epoch of the noise on the embeddings.
    pub(super) fn noise_epoch(&self) -> Result<Argument> {
        self.array(NOISE_EPOCH, 1)
    }

    /// `[T]` tokens of each token's sample.
    pub(super) fn lengths(&self) -> Result<Argument> {
        self.array(self.places.lengths, self.tokens)
    }

    /// `[T]` token ids, all below `rows`.
    ///
    /// # Errors
    /// One that is not.
    pub(super) fn token_ids(&self, rows: usize) -> Result<Argument> {
        check_largest("token", self.largest_token, rows)?;
        self.array(HEADER, self.tokens)
    }

    /// `[T]` of each token inside its sample.
    pub(super) fn positions(&self) -> Result<Argument> {
        self.array(self.places.positions, self.tokens)
    }

    /// `[T]` low 32 bits of each token's sample index.
    pub(super) fn samples(&self) -> Result<Argument> {
        self.array(self.places.samples, self.tokens)
    }

    /// Tokens of each sample: whatever ends before a position 0 or the last token.
    pub(super) fn sample_lengths(&self) -> impl Iterator<Item = usize> + '_ {
        let positions = &self.host[self.places.positions..][..self.tokens];
        let is_last = |token: usize| positions.get(token + 1).is_none_or(|&next| next == 0);
        (0..self.tokens).filter(move |&token| is_last(token)).map(|token| positions[token] as usize + 1)
    }

    /// `[L]` rows that carry loss.
    pub(super) fn labelled_rows(&self) -> Result<Argument> {
        self.array(self.places.labelled_rows, self.labelled)
    }

    /// Targets of `count` labelled rows from `start` on, all below `rows`.
    ///
    /// # Errors
    /// One that is not.
    pub(super) fn targets(&self, start: usize, count: usize, rows: usize) -> Result<Argument> {
        check_largest("target", self.largest_target, rows)?;
        self.array(self.places.targets + start, count)
    }

    /// `[tiles][3]`: see `SampleTile` in attention_tile.h.
    pub(super) fn sample_tiles(&self) -> Result<Argument> {
        self.array(self.places.tiles, 3 * self.tiles)
    }

    /// The same of Hopper's kernels.
    pub(super) fn hopper_sample_tiles(&self) -> Result<Argument> {
        self.array(self.places.hopper_tiles, 3 * self.hopper_tiles)
    }
}

impl<D: Device> CudaBackend<D> {
    /// The numbers 0, 1, … as positions of `rows` new tokens.
    pub(super) fn counting(&self, rows: usize) -> Result<Region<D>> {
        let mut scratch = super::lock(&self.scratch);
        if scratch.counting.region().is_none_or(|region| region.bytes() < rows * BYTES) {
            let numbers: Vec<u32> = (0..rows.next_power_of_two() as u32).collect();
            let bytes = bytemuck::cast_slice(&numbers);
            scratch.counting.reserve(self.device(), bytes.len())?.upload(self.device(), bytes, 0)?;
        }
        Ok(scratch.counting.region().expect("just made").clone())
    }
}

fn check_largest(kind: &str, largest: Option<(u32, usize)>, rows: usize) -> Result<()> {
    largest.map_or(Ok(()), |(id, place)| check_id(kind, id, place, rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_that_see_most_keys_come_first() {
        let tiles = tiles_of([(0, 130), (130, 140), (140, 205)].into_iter(), 64);
        let expected =
            [[0, 130, 128], [0, 130, 64], [140, 205, 204], [0, 130, 0], [130, 140, 130], [140, 205, 140]];
        assert_eq!(tiles, expected);
    }

    #[test]
    #[cfg(feature = "emulator")]
    fn no_batch_is_larger_than_the_most_that_is_planned() {
        use super::super::ComputeType;
        use crate::device::emulator::Emulator;

        let backend = CudaBackend::new(Emulator::of(false, false).unwrap(), ComputeType::Bf16);
        let mut resident = CudaBatch::new();
        for lengths in [&[1; 300][..], &[300], &[129, 1, 1, 64, 65], &[1]] {
            let mut batch = Batch::default();
            for (sample, &length) in lengths.iter().enumerate() {
                batch.push(sample, &vec![5; length], &vec![5; length]);
            }
            resident.load(&backend, &batch, PassSettings::default()).unwrap();
            let (bytes, most) = (resident.host.len() * BYTES, most_bytes(resident.tokens, resident.labelled));
            assert!(bytes <= most, "{lengths:?}: {bytes} of {most}");
        }
    }
}
