//! What the kernel tests share: half types, random data, runs over schedules, comparison.

use std::sync::OnceLock;

use bytemuck::Pod;
use fastlora::device::driver::{Driver, DriverMemory};
use fastlora::device::emulator::{Emulator, EmulatorMemory, Flavour};
use fastlora::device::{Argument, Boxes, Device, Launch, Memory};
use fastlora::error::Result;

/// A 16-bit float type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    F16,
    Bf16,
}

pub const HALVES: [Half; 2] = [Half::F16, Half::Bf16];

impl Half {
    /// The suffix of its kernels.
    pub fn suffix(self) -> &'static str {
        match self {
            Half::F16 => "f16",
            Half::Bf16 => "bf16",
        }
    }

    /// Largest relative error of one rounding.
    pub fn unit_roundoff(self) -> f64 {
        match self {
            Half::F16 => 2f64.powi(-11),
            Half::Bf16 => 2f64.powi(-8),
        }
    }

    /// Largest absolute error of one rounding where numbers are subnormal.
    pub fn underflow(self) -> f64 {
        match self {
            Half::F16 => 2f64.powi(-25),
            Half::Bf16 => 2f64.powi(-126),
        }
    }

    /// Rounded to f32 and then to the half type, as the kernels do. (`from_f64` would drop low bits and miss ties.)
    pub fn encode(self, value: f64) -> u16 {
        match self {
            Half::F16 => half::f16::from_f32(value as f32).to_bits(),
            Half::Bf16 => half::bf16::from_f32(value as f32).to_bits(),
        }
    }

    pub fn decode(self, bits: u16) -> f64 {
        match self {
            Half::F16 => half::f16::from_bits(bits).to_f64(),
            Half::Bf16 => half::bf16::from_bits(bits).to_f64(),
        }
    }

    pub fn decode_all(self, bits: &[u16]) -> Vec<f64> {
        bits.iter().map(|&bits| self.decode(bits)).collect()
    }
}

/// Error of one f32 rounding.
pub const F32_ROUNDOFF: f64 = 5.96e-8;

/// Reproducible random numbers (SplitMix64).
pub struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in `low … high`.
    pub fn uniform(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    pub fn halves(&mut self, half: Half, count: usize, limit: f64) -> Vec<u16> {
        (0..count).map(|_| half.encode(self.uniform(-limit, limit))).collect()
    }

    pub fn floats(&mut self, count: usize, limit: f64) -> Vec<f32> {
        (0..count).map(|_| self.uniform(-limit, limit) as f32).collect()
    }
}

/// Where a test's kernels run.
pub enum Place {
    Emulator(Emulator),
    Gpu(Driver),
}

/// Memory of a [`Place`].
#[derive(Debug)]
pub enum PlaceMemory {
    Emulator(EmulatorMemory),
    Gpu(DriverMemory),
}

impl Memory for PlaceMemory {
    fn address(&self) -> u64 {
        match self {
            PlaceMemory::Emulator(memory) => memory.address(),
            PlaceMemory::Gpu(memory) => memory.address(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            PlaceMemory::Emulator(memory) => memory.bytes(),
            PlaceMemory::Gpu(memory) => memory.bytes(),
        }
    }
}

impl Place {
    /// Memory that nobody wrote: NaN, and the checker objects to reading it.
    fn allocate(&self, bytes: usize) -> PlaceMemory {
        match self {
            Place::Emulator(device) => PlaceMemory::Emulator(device.allocate(bytes).unwrap()),
            Place::Gpu(device) => {
                let memory = device.allocate(bytes).unwrap();
                device.fill(&memory, 0..bytes, 0xFF).unwrap();
                PlaceMemory::Gpu(memory)
            }
        }
    }

    fn upload(&self, bytes: &[u8], memory: &PlaceMemory) -> Result<()> {
        match (self, memory) {
            (Place::Emulator(device), PlaceMemory::Emulator(memory)) => device.upload(bytes, memory, 0),
            (Place::Gpu(device), PlaceMemory::Gpu(memory)) => device.upload(bytes, memory, 0),
            _ => unreachable!("memory of another place"),
        }
    }

    fn download(&self, memory: &PlaceMemory, into: &mut [u8]) -> Result<()> {
        match (self, memory) {
            (Place::Emulator(device), PlaceMemory::Emulator(memory)) => device.download(memory, 0, into),
            (Place::Gpu(device), PlaceMemory::Gpu(memory)) => device.download(memory, 0, into),
            _ => unreachable!("memory of another place"),
        }
    }
}

pub fn upload<T: Pod>(place: &Place, values: &[T]) -> PlaceMemory {
    let bytes = bytemuck::cast_slice(values);
    let memory = place.allocate(bytes.len());
    place.upload(bytes, &memory).unwrap();
    memory
}

/// Memory for `count` elements that nobody wrote.
pub fn poisoned<T: Pod>(place: &Place, count: usize) -> PlaceMemory {
    place.allocate(count * size_of::<T>())
}

pub fn download<T: Pod>(place: &Place, memory: &PlaceMemory) -> Vec<T> {
    let mut values = vec![T::zeroed(); memory.bytes() / size_of::<T>()];
    place.download(memory, bytemuck::cast_slice_mut(&mut values)).unwrap();
    values
}

/// Runs a kernel; a finding of the emulator is a panic with its message.
pub fn launch(place: &Place, kernel: &str, blocks: usize, threads: u32, arguments: &[Argument]) {
    launch_grid(place, kernel, [blocks as u32, 1, 1], threads, 0, arguments);
}

pub fn launch_grid(
    place: &Place,
    kernel: &str,
    grid: [u32; 3],
    threads: u32,
    dynamic_shared_bytes: u32,
    arguments: &[Argument],
) {
    launch_clusters(place, kernel, grid, 1, threads, dynamic_shared_bytes, arguments);
}

/// The same in clusters of blocks.
pub fn launch_clusters(
    place: &Place,
    kernel: &str,
    grid: [u32; 3],
    cluster_blocks: u32,
    threads: u32,
    dynamic_shared_bytes: u32,
    arguments: &[Argument],
) {
    let launch = Launch { kernel, grid, cluster_blocks, threads, dynamic_shared_bytes, arguments };
    // SAFETY: the callers hold the arguments' memory; the emulator guards what lies around it.
    let launched = unsafe {
        match place {
            Place::Emulator(device) => device.launch(&launch),
            Place::Gpu(device) => device.launch(&launch).and_then(|()| device.synchronize()),
        }
    };
    if let Err(error) = launched {
        panic!("{error}");
    }
}

/// Where every test runs: on GPU N if FASTLORA_TEST_DEVICE is `cuda:N`, twice; else on the emulator, in order, under three
/// random schedules and in the checker.
fn places() -> &'static [Place] {
    static PLACES: OnceLock<Vec<Place>> = OnceLock::new();
    PLACES.get_or_init(|| match std::env::var("FASTLORA_TEST_DEVICE") {
        Ok(name) => {
            let index = name.strip_prefix("cuda:").and_then(|index| index.parse().ok()).expect("cuda:N");
            let gpu = Driver::new(index).unwrap_or_else(|error| panic!("{error}"));
            println!("on {}", gpu.description());
            vec![Place::Gpu(gpu.clone()), Place::Gpu(gpu)]
        }
        Err(_) => {
            let fast = Emulator::new(Flavour::Fast, 0).unwrap();
            let checked = Emulator::new(Flavour::Checked, 4).unwrap();
            let mut emulators: Vec<_> = (0..4).map(|seed| fast.with_seed(seed)).collect();
            emulators.push(checked);
            emulators.into_iter().map(Place::Emulator).collect()
        }
    })
}

/// A matrix [rows][columns] for the TMA.
pub fn boxes(memory: &PlaceMemory, extents: [usize; 2], row_stride: usize, box_rows: usize) -> Argument {
    boxes_from(memory, 0, extents, row_stride, box_rows)
}

/// The same from an element of the memory on.
pub fn boxes_from(
    memory: &PlaceMemory,
    first: usize,
    [rows, columns]: [usize; 2],
    row_stride: usize,
    box_rows: usize,
) -> Argument {
    let address = memory.address() + first as u64 * 2;
    Argument::Boxes(Boxes { address, rows, columns, row_stride, box_rows: box_rows as u32 })
}

/// Whether the kernels of sm_90a run in the places: on the emulator always.
pub fn has_hopper_kernels() -> bool {
    places().iter().all(|place| match place {
        Place::Emulator(_) => true,
        Place::Gpu(device) => device.limits().is_hopper(),
    })
}

/// Runs `work` in every place; the bits must not differ.
pub fn run_everywhere<T: Pod + PartialEq>(name: &str, work: impl Fn(&Place) -> Vec<T>) -> Vec<T> {
    let mut results = places().iter().map(|place| (place, work(place)));
    let (_, reference) = results.next().expect("a place");
    for (place, values) in results {
        let same = bytemuck::cast_slice::<T, u8>(&values) == bytemuck::cast_slice::<T, u8>(&reference);
        let place = match place {
            Place::Emulator(device) => device.description(),
            Place::Gpu(device) => device.description(),
        };
        assert!(same, "{name}: bits differ between the first run and {place}");
    }
    reference
}

/// An exact value and how far from it a right kernel may be.
#[derive(Clone, Copy, Debug)]
pub struct Expected {
    pub value: f64,
    pub tolerance: f64,
}

impl Expected {
    /// A sum in f32 of `terms` terms with total magnitude `magnitude`, rounded once to the half type.
    pub fn rounded_sum(half: Half, value: f64, magnitude: f64, terms: usize) -> Self {
        let sum_error = F32_ROUNDOFF * (terms as f64 + 2.0) * magnitude;
        let rounding = half.unit_roundoff() * (value.abs() + sum_error) + half.underflow();
        Self { value, tolerance: sum_error + rounding }
    }

    /// The same kept in f32.
    pub fn float_sum(value: f64, magnitude: f64, terms: usize) -> Self {
        Self { value, tolerance: F32_ROUNDOFF * (terms as f64 + 4.0) * magnitude + 1e-37 }
    }
}

/// Compares element by element and reports the largest error relative to its tolerance, with its place in a matrix of
/// `columns`.
pub fn assert_close(name: &str, columns: usize, actual: &[f64], expected: &[Expected]) {
    assert_eq!(actual.len(), expected.len(), "{name}: lengths");
    let ratio = |(actual, expected): (&f64, &Expected)| {
        let error = (actual - expected.value).abs();
        if error.is_nan() { f64::INFINITY } else { error / expected.tolerance }
    };
    let worst = actual.iter().zip(expected).map(ratio).enumerate().max_by(|a, b| a.1.total_cmp(&b.1));
    let Some((index, ratio)) = worst else { return };
    let (row, column) = (index / columns, index % columns);
    println!("{name}: largest error {ratio:.3} × its tolerance, at row {row}, column {column}");
    assert!(
        ratio <= 1.0,
        "{name}: at row {row}, column {column}: {} where {} was expected, {ratio:.3} × the tolerance {:e}",
        actual[index],
        expected[index].value,
        expected[index].tolerance,
    );
}

/// Bytes as values, whatever their alignment.
pub fn values_of<T: Pod>(bytes: &[u8]) -> Vec<T> {
    bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
}
