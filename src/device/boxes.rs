//! Matrices that a kernel moves in boxes, through Hopper's tensor memory accelerator.

use std::ffi::c_void;
use std::fmt;

use super::Argument;
use crate::error::Result;

/// Columns of every box: 128 bytes of halves.
pub const BOX_COLUMNS: usize = 64;

/// A row-major matrix of f16 or bf16 as a kernel's `TensorMap` (kernels/ptx/tma.h). Boxes may reach over its edges: the
/// kernel reads zeros there and writes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boxes {
    /// Of the first element; a multiple of 16.
    pub address: u64,
    /// Rows.
    pub rows: usize,
    /// Elements of a row that belong to the matrix.
    pub columns: usize,
    /// Elements from one row to the next; a multiple of 8.
    pub row_stride: usize,
    /// Rows of a box, at most 256.
    pub box_rows: u32,
}

impl Boxes {
    /// Bytes from one row to the next.
    pub(super) fn row_bytes(&self) -> u64 {
        self.row_stride as u64 * 2
    }
}

impl fmt::Display for Boxes {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "memory[{}][{}]", self.rows, self.columns)
    }
}

/// The values of a launch's arguments where the driver's launch call reads them.
pub(super) struct Values<'a, M> {
    arguments: &'a [Argument],
    /// The encoded boxes, in the order of the arguments.
    maps: Vec<M>,
}

impl<'a, M> Values<'a, M> {
    /// `encode` makes the device's tensor map.
    pub fn new(arguments: &'a [Argument], mut encode: impl FnMut(&Boxes) -> Result<M>) -> Result<Self> {
        let boxes = arguments.iter().filter_map(|argument| match argument {
            Argument::Boxes(boxes) => Some(encode(boxes)),
            _ => None,
        });
        Ok(Self { arguments, maps: boxes.collect::<Result<_>>()? })
    }

    /// One pointer an argument, valid as long as the values.
    pub fn pointers(&self) -> Vec<*mut c_void> {
        let mut maps = self.maps.iter();
        let pointer = |argument: &'a Argument| -> *const c_void {
            match argument {
                Argument::Address(value) => std::ptr::from_ref(value).cast(),
                Argument::F32(value) => std::ptr::from_ref(value).cast(),
                Argument::I32(value) => std::ptr::from_ref(value).cast(),
                Argument::U32(value) => std::ptr::from_ref(value).cast(),
                Argument::I64(value) => std::ptr::from_ref(value).cast(),
                Argument::Boxes(_) => {
                    maps.next().map_or(std::ptr::null(), |map| std::ptr::from_ref(map).cast())
                }
            }
        };
        self.arguments.iter().map(pointer).map(<*const c_void>::cast_mut).collect()
    }
}
