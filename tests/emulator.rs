//! The emulator's own tests: kernels with one planted mistake each (`kernels/emulator/planted_faults.cu`), every one of
//! which must be found, and the same kernels without mistakes, which must not be accused.
#![cfg(feature = "emulator")]

use fastlora::device::emulator::{Emulator, EmulatorMemory, Flavour};
use fastlora::device::{Argument, Boxes, Device, Launch, Memory};
use fastlora::error::Result;

const THREADS: u32 = 128;
const OUT_ELEMENTS: usize = 512;
/// Schedules tried for each fault. A race that no schedule of the fast build shows is the checker's to find, and the
/// checker needs few.
const SEEDS: u64 = 12;

fn memory_of<T: bytemuck::NoUninit>(device: &Emulator, values: &[T]) -> EmulatorMemory {
    let bytes = bytemuck::cast_slice(values);
    let memory = device.allocate(bytes.len()).unwrap();
    device.upload(bytes, &memory, 0).unwrap();
    memory
}

fn floats_of(device: &Emulator, memory: &EmulatorMemory) -> Vec<f32> {
    let mut values = vec![0f32; memory.bytes() / 4];
    device.download(memory, 0, bytemuck::cast_slice_mut(&mut values)).unwrap();
    values
}

fn launch(device: &Emulator, kernel: &str, blocks: u32, shared: u32, arguments: &[Argument]) -> Result<()> {
    launch_threads(device, kernel, blocks, THREADS, shared, arguments)
}

fn launch_threads(
    device: &Emulator,
    kernel: &str,
    blocks: u32,
    threads: u32,
    shared: u32,
    arguments: &[Argument],
) -> Result<()> {
    launch_clusters(device, kernel, [blocks, 1], threads, shared, arguments)
}

fn launch_clusters(
    device: &Emulator,
    kernel: &str,
    [blocks, cluster_blocks]: [u32; 2],
    threads: u32,
    dynamic_shared_bytes: u32,
    arguments: &[Argument],
) -> Result<()> {
    let grid = [blocks, 1, 1];
    let launch = Launch { kernel, grid, cluster_blocks, threads, dynamic_shared_bytes, arguments };
    // SAFETY: the emulator's memory is guarded; these kernels are meant to go wrong.
    unsafe { device.launch(&launch) }
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum FoundBy {
    /// Already the fast build shows it, in at least one schedule.
    Fast,
    /// Only the checker sees it.
    Checker,
}

struct Fault {
    kernel: &'static str,
    blocks: u32,
    dynamic_shared_bytes: u32,
    takes_input: bool,
    out_is_initialised: bool,
    /// What the checker's message must say.
    message: &'static str,
    found_by: FoundBy,
}

fn fault(kernel: &'static str, message: &'static str, found_by: FoundBy) -> Fault {
    Fault {
        kernel,
        blocks: 1,
        dynamic_shared_bytes: 0,
        takes_input: false,
        out_is_initialised: true,
        message,
        found_by,
    }
}

fn small_faults() -> Vec<Fault> {
    use FoundBy::{Checker, Fast};
    let input = |fault: Fault| Fault { takes_input: true, ..fault };
    vec![
        fault("missing_syncwarp", "shared", Fast),
        fault("exit_before_barrier", "at barrier 0 (127 of 128 arrived)", Fast),
        fault("barrier_in_branch", "at barrier 0 (64 of 128 arrived)", Fast),
        fault("shuffle_in_branch", "exited", Fast),
        fault("mma_in_branch", "exited", Fast),
        input(fault("lockstep_reduction", "shared race", Fast)),
        input(fault("buffer_reused_too_early", "may still be reading", Fast)),
        input(fault("uninitialised_partial", "uninitialised shared memory", Fast)),
        Fault { blocks: 3, ..fault("unsynchronised_sum", "global race", Checker) },
        Fault { blocks: 3, ..fault("overlapping_blocks", "global race", Checker) },
        fault("spin", "watchdog", Fast),
        fault("shared_out_of_bounds", "out of bounds", Checker),
        Fault { dynamic_shared_bytes: 256, ..fault("dynamic_shared_too_small", "out of bounds", Fast) },
        fault("global_write_past_end", "out of bounds", Fast),
        fault("global_read_past_end", "out of bounds", Fast),
        fault("misaligned_vector", "misaligned", Checker),
        Fault {
            out_is_initialised: false,
            ..fault("uninitialised_global", "uninitialised global memory", Checker)
        },
        fault("stack_overflow", "stack overflowed", Fast),
        input(fault("copy_without_commit", "in flight", Fast)),
        input(fault("copy_without_barrier", "shared", Fast)),
        input(fault("copy_misaligned", "not 16-byte aligned", Fast)),
    ]
}

impl Fault {
    /// The message of a failed launch; else whether what it wrote shows the mistake.
    fn run(&self, device: &Emulator) -> (Option<String>, bool) {
        let input = memory_of(device, &[1f32; OUT_ELEMENTS]);
        let out = if self.out_is_initialised {
            memory_of(device, &[0f32; OUT_ELEMENTS])
        } else {
            device.allocate(OUT_ELEMENTS * 4).unwrap()
        };
        let mut arguments = vec![Argument::of(&out)];
        if self.takes_input {
            arguments.insert(0, Argument::of(&input));
        }
        let kernel = format!("planted_{}", self.kernel);
        let message = launch(device, &kernel, self.blocks, self.dynamic_shared_bytes, &arguments)
            .err()
            .map(|e| e.to_string());
        let values = floats_of(device, &out);
        let first = values[0];
        let wrong = values[..THREADS as usize].iter().any(|value| value.is_nan() || *value != first)
            || matches!(self.kernel, "lockstep_reduction" if first != THREADS as f32)
            || matches!(self.kernel, "buffer_reused_too_early" if first != 128.0 * 32.0);
        // This kernel's warps write four different values by design.
        let wrong = if self.kernel == "missing_syncwarp" { values.iter().any(|v| v.is_nan()) } else { wrong };
        (message, wrong)
    }
}

#[test]
fn every_small_fault_is_found() {
    let fast = Emulator::new(Flavour::Fast, 0).unwrap();
    let checked = Emulator::new(Flavour::Checked, 0).unwrap();
    let mut missed = Vec::new();
    for fault in small_faults() {
        let (message, _) = fault.run(&checked.with_seed(1));
        let message = message.unwrap_or_default();
        if !message.contains(fault.message) {
            missed.push(format!("{}: the checker said `{message}`", fault.kernel));
        }
        // A spinning kernel costs seconds of processor time each run.
        let seeds = if fault.kernel == "spin" { 1 } else { SEEDS };
        let noticed = (1..=seeds).any(|seed| {
            let (message, wrong) = fault.run(&fast.with_seed(seed));
            message.is_some() || wrong
        });
        if fault.found_by == FoundBy::Fast && !noticed {
            missed.push(format!("{}: no schedule of the fast build shows it", fault.kernel));
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

/// The pipelined matmuls of the planted faults: C[rows][columns] = A · Bᵀ over small integers, so that sums are exact.
struct Pipeline {
    rows: usize,
    depth: usize,
    version: Version,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Version {
    /// The one of planted_faults.cu.
    Portable,
    /// The one of planted_hopper_faults.cu, in f16.
    Hopper,
    /// The same in clusters of two blocks.
    HopperPairs,
}
use Version::{Hopper, HopperPairs, Portable};

impl Pipeline {
    fn columns(&self) -> usize {
        if self.version == Portable { 64 } else { 128 }
    }

    fn a(&self, row: usize, k: usize) -> f32 {
        ((row * 7 + k * 3) % 5) as f32 - 2.0
    }

    fn b(&self, column: usize, k: usize) -> f32 {
        ((column * 5 + k * 11) % 7) as f32 - 3.0
    }

    fn expected(&self) -> Vec<f32> {
        let columns = self.columns();
        let element = |index: usize| {
            (0..self.depth).map(|k| self.a(index / columns, k) * self.b(index % columns, k)).sum()
        };
        (0..self.rows * columns).map(element).collect()
    }

    fn run(&self, device: &Emulator, fault: &str) -> (Option<String>, Vec<f32>) {
        let half = half::f16::from_f32;
        let a: Vec<_> =
            (0..self.rows * self.depth).map(|i| half(self.a(i / self.depth, i % self.depth))).collect();
        let b: Vec<_> =
            (0..self.columns() * self.depth).map(|i| half(self.b(i / self.depth, i % self.depth))).collect();
        let (a, b) = (memory_of(device, &a), memory_of(device, &b));
        let blocks = self.rows.div_ceil(64) as u32;
        if self.version != Portable {
            return self.run_on_hopper(device, fault, &a, &b, blocks);
        }
        let c = device.allocate(self.rows * 64 * 4).unwrap();
        let arguments = [
            Argument::of(&a),
            Argument::of(&b),
            Argument::of(&c),
            Argument::I32(self.rows as i32),
            Argument::I32(self.depth as i32),
        ];
        let result = launch(device, &format!("planted_pipeline_{fault}"), blocks, 0, &arguments);
        (result.err().map(|error| error.to_string()), floats_of(device, &c))
    }

    fn run_on_hopper(
        &self,
        device: &Emulator,
        fault: &str,
        a: &EmulatorMemory,
        b: &EmulatorMemory,
        blocks: u32,
    ) -> (Option<String>, Vec<f32>) {
        let columns = self.columns();
        let c = device.allocate(self.rows * columns * 2).unwrap();
        let boxes = |memory: &EmulatorMemory, [rows, columns]: [usize; 2], box_rows| {
            let address = memory.address();
            Argument::Boxes(Boxes { address, rows, columns, row_stride: columns, box_rows })
        };
        let cluster_blocks = if self.version == HopperPairs { 2 } else { 1 };
        let arguments = [
            boxes(a, [self.rows, self.depth], 64),
            boxes(b, [columns, self.depth], 128 / cluster_blocks),
            boxes(&c, [self.rows, columns], 64),
            Argument::I32(self.depth as i32),
        ];
        let kernel = format!("planted_hopper_{fault}");
        let grid = [blocks.next_multiple_of(cluster_blocks), cluster_blocks];
        let result = launch_clusters(device, &kernel, grid, 256, 96 << 10, &arguments);
        let mut halves = vec![half::f16::ZERO; self.rows * columns];
        device.download(&c, 0, bytemuck::cast_slice_mut(&mut halves)).unwrap();
        (result.err().map(|error| error.to_string()), halves.into_iter().map(half::f16::to_f32).collect())
    }

    /// The faults that go unnoticed.
    fn missed(&self, faults: &[(&str, FoundBy)]) -> Vec<String> {
        let expected = self.expected();
        let fast = Emulator::new(Flavour::Fast, 0).unwrap();
        let checked = Emulator::new(Flavour::Checked, 0).unwrap();
        let mut missed = Vec::new();
        for &(name, found_by) in faults {
            let (message, values) = self.run(&checked.with_seed(1), name);
            if message.is_none() && values == expected {
                missed.push(format!("{name}: not found by the checker"));
            }
            let noticed = (0..=SEEDS).any(|seed| {
                let (message, values) = self.run(&fast.with_seed(seed), name);
                message.is_some() || values != expected
            });
            if found_by == FoundBy::Fast && !noticed {
                missed.push(format!("{name}: no schedule of the fast build shows it"));
            }
        }
        missed
    }
}

#[test]
fn every_fault_of_a_pipelined_matmul_is_found() {
    let faults = [
        ("no_barrier", FoundBy::Fast),
        ("waits_for_too_few", FoundBy::Fast),
        ("no_wait", FoundBy::Fast),
        ("overwrites_read_stage", FoundBy::Fast),
        ("swapped_fragment", FoundBy::Fast),
        ("reads_row_too_many", FoundBy::Fast),
        ("writes_row_too_many", FoundBy::Fast),
        ("copies_left_at_exit", FoundBy::Fast),
    ];
    // Seven steps: more than twice the three stages, so that every stage is reused. 70 rows: a ragged second block.
    let missed = Pipeline { rows: 70, depth: 112, version: Portable }.missed(&faults);
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

#[test]
fn every_fault_of_a_warp_specialised_matmul_is_found() {
    let faults = [
        ("producer_does_not_wait", FoundBy::Fast),
        ("waits_for_wrong_parity", FoundBy::Fast),
        ("expects_too_few_bytes", FoundBy::Fast),
        ("consumer_does_not_wait", FoundBy::Fast),
        ("releases_before_wait", FoundBy::Fast),
        ("keeps_group_in_flight", FoundBy::Fast),
        ("no_barrier_after_init", FoundBy::Fast),
        ("no_init_fence", FoundBy::Fast),
        ("no_wgmma_fence", FoundBy::Fast),
        ("advances_by_elements", FoundBy::Fast),
        ("reads_before_last_wait", FoundBy::Fast),
        ("no_proxy_fence", FoundBy::Checker),
        ("no_barrier_before_store", FoundBy::Fast),
        ("leaves_before_store", FoundBy::Fast),
    ];
    let missed = Pipeline { rows: 70, depth: 448, version: Hopper }.missed(&faults);
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

#[test]
fn every_fault_of_a_cluster_is_found() {
    let faults = [
        ("no_cluster_barrier", FoundBy::Fast),
        ("multicasts_to_itself", FoundBy::Fast),
        ("expects_half_of_b", FoundBy::Fast),
        ("releases_own_block_alone", FoundBy::Fast),
        ("leaves_before_cluster", FoundBy::Fast),
        // Those of a block alone show in clusters as well.
        ("producer_does_not_wait", FoundBy::Fast),
        ("releases_before_wait", FoundBy::Fast),
        ("no_init_fence", FoundBy::Fast),
    ];
    let missed = Pipeline { rows: 70, depth: 448, version: HopperPairs }.missed(&faults);
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

#[test]
fn a_correct_pipeline_is_not_accused_and_does_not_depend_on_the_schedule() {
    for (flavour, seeds) in [(Flavour::Fast, 40), (Flavour::Checked, 6)] {
        let device = Emulator::new(flavour, 0).unwrap();
        let portable = [(70, 112, Portable), (64, 16, Portable), (1, 32, Portable), (129, 48, Portable)];
        // Of some the second block of a cluster has no rows.
        let hopper = [(70, 448, Hopper), (1, 64, Hopper)];
        let pairs = [(70, 448, HopperPairs), (140, 448, HopperPairs), (1, 64, HopperPairs)];
        for (rows, depth, version) in portable.into_iter().chain(hopper).chain(pairs) {
            let pipeline = Pipeline { rows, depth, version };
            let expected = pipeline.expected();
            for seed in 0..seeds {
                let (message, values) = pipeline.run(&device.with_seed(seed), "none");
                assert_eq!(
                    message, None,
                    "{flavour:?}, {version:?}, {rows} rows, depth {depth}, seed {seed}"
                );
                assert!(
                    values == expected,
                    "{flavour:?}, {version:?}, {rows} rows, depth {depth}, seed {seed}"
                );
            }
        }
    }
}

#[test]
fn arguments_are_compared_with_the_kernels_parameters() {
    let device = Emulator::new(Flavour::Fast, 0).unwrap();
    let out = memory_of(&device, &[0f32; OUT_ELEMENTS]);
    let error = launch(&device, "planted_spin", 1, 0, &[Argument::of(&out), Argument::I32(1)]).unwrap_err();
    assert!(error.to_string().contains("arguments of kinds `pi`, the kernel has `p`"), "{error}");
    let error = launch(&device, "no_such_kernel", 1, 0, &[]).unwrap_err();
    assert!(error.to_string().contains("no kernel `no_such_kernel`"), "{error}");
}

#[test]
fn clusters_that_cuda_refuses_are_refused() {
    let device = Emulator::new(Flavour::Fast, 0).unwrap();
    let out = memory_of(&device, &[0f32; OUT_ELEMENTS]);
    for (blocks, cluster_blocks) in [(3, 2), (16, 16), (2, 0)] {
        let shape = [blocks, cluster_blocks];
        let error =
            launch_clusters(&device, "planted_missing_syncwarp", shape, THREADS, 0, &[Argument::of(&out)]);
        let text = error.unwrap_err().to_string();
        assert!(text.contains("invalid launch: the grid in x is no multiple of a cluster"), "{text}");
    }
}

#[test]
fn copies_outside_memory_are_refused() {
    let device = Emulator::new(Flavour::Fast, 0).unwrap();
    let memory = device.allocate(10).unwrap();
    assert!(device.upload(&[0; 4], &memory, 7).is_err());
    assert!(device.download(&memory, usize::MAX, &mut [0; 2]).is_err());
    assert!(device.upload(&[1, 2, 3], &memory, 7).is_ok());
}

/// A step that does not wait for its batch reads the one before.
#[test]
fn an_upload_beside_the_work_arrives_when_the_work_waits_for_it() {
    for flavour in [Flavour::Fast, Flavour::Checked] {
        let device = Emulator::new(flavour, 0).unwrap();
        let memory = memory_of(&device, &[1f32; 4]);
        let mut buffer = device.allocate_upload_buffer(16).unwrap();
        let mut bytes = bytemuck::bytes_of(&[2f32; 3]).to_vec();
        device.start_upload(&bytes, &mut buffer).unwrap();
        bytes.fill(0);
        assert_eq!(floats_of(&device, &memory), [1.0; 4]);
        device.finish_upload(&mut buffer, &memory, 4).unwrap();
        assert_eq!(floats_of(&device, &memory), [1.0, 2.0, 2.0, 2.0]);
        let error = device.finish_upload(&mut buffer, &memory, 0).unwrap_err();
        assert!(error.message().contains("not started"), "{error}");
        assert!(device.start_upload(&[0; 17], &mut buffer).is_err());
    }
}
