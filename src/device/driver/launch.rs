//! Starting a kernel, with its clusters, and remembering which was the latest.

use std::ffi::c_void;

use cudarc::driver::result::DriverError;
use cudarc::driver::sys;

use crate::device::{Argument, Launch};

/// What is needed to name a launch; written at every one, so it is not formatted until somebody asks.
#[derive(Default)]
pub(super) struct LastLaunch {
    kernel: String,
    arguments: Vec<Argument>,
    grid: [u32; 3],
    cluster_blocks: u32,
    threads: u32,
    dynamic_shared_bytes: u32,
}

impl LastLaunch {
    pub fn set(&mut self, launch: &Launch<'_>) {
        self.kernel.clear();
        self.kernel.push_str(launch.kernel);
        self.arguments.clear();
        self.arguments.extend_from_slice(launch.arguments);
        (self.grid, self.cluster_blocks) = (launch.grid, launch.cluster_blocks);
        (self.threads, self.dynamic_shared_bytes) = (launch.threads, launch.dynamic_shared_bytes);
    }

    /// None before the first.
    pub fn get(&self) -> Option<Launch<'_>> {
        let Self { kernel, arguments, grid, cluster_blocks, threads, dynamic_shared_bytes } = self;
        (!kernel.is_empty()).then_some(Launch {
            kernel,
            grid: *grid,
            cluster_blocks: *cluster_blocks,
            threads: *threads,
            dynamic_shared_bytes: *dynamic_shared_bytes,
            arguments,
        })
    }
}

/// Starts `function` with the shape of `launch`. The size of its clusters is an attribute of the launch, which a graph keeps.
///
/// # Safety
/// The function and the stream are alive, and the values match the function's parameters; they are copied before the call
/// returns.
pub(super) unsafe fn start(
    function: sys::CUfunction,
    launch: &Launch<'_>,
    values: &mut [*mut c_void],
    stream: sys::CUstream,
) -> Result<(), DriverError> {
    let [x, y, z] = launch.grid;
    let mut cluster = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue {
            clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 {
                x: launch.cluster_blocks,
                y: 1,
                z: 1,
            },
        },
    };
    let config = sys::CUlaunchConfig {
        gridDimX: x,
        gridDimY: y,
        gridDimZ: z,
        blockDimX: launch.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: launch.dynamic_shared_bytes,
        hStream: stream,
        attrs: &mut cluster,
        // Chips before Hopper know no clusters.
        numAttrs: u32::from(launch.cluster_blocks > 1),
    };
    // SAFETY: the caller's; the configuration and its attribute live until the call returns.
    unsafe { sys::cuLaunchKernelEx(&config, function, values.as_mut_ptr(), std::ptr::null_mut()) }.result()
}
