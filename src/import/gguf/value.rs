//! Metadata values.

/// Scalar types of metadata, numbered as in the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ScalarType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    U64,
    I64,
    F64,
}

impl ScalarType {
    /// The type with this number in the file.
    pub fn from_code(code: u32) -> Option<Self> {
        Some(match code {
            0 => Self::U8,
            1 => Self::I8,
            2 => Self::U16,
            3 => Self::I16,
            4 => Self::U32,
            5 => Self::I32,
            6 => Self::F32,
            7 => Self::Bool,
            10 => Self::U64,
            11 => Self::I64,
            12 => Self::F64,
            _ => return None,
        })
    }

    /// Bytes of one value.
    pub const fn bytes(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }

    /// The value in `bytes`, which holds exactly [`Self::bytes`] bytes.
    pub fn decode(self, bytes: &[u8]) -> Value {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        let unsigned = u64::from_le_bytes(word);
        match self {
            Self::U8 | Self::U16 | Self::U32 | Self::U64 => Value::Integer(unsigned.into()),
            Self::I8 => Value::Integer((unsigned as i8).into()),
            Self::I16 => Value::Integer((unsigned as i16).into()),
            Self::I32 => Value::Integer((unsigned as i32).into()),
            Self::I64 => Value::Integer((unsigned as i64).into()),
            Self::F32 => Value::Float(f32::from_bits(unsigned as u32).into()),
            Self::F64 => Value::Float(f64::from_bits(unsigned)),
            Self::Bool => Value::Bool(unsigned != 0),
        }
    }
}

/// Format code of a string.
pub(super) const STRING: u32 = 8;
/// Format code of an array.
pub(super) const ARRAY: u32 = 9;

/// One metadata value.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Integer(i128),
    Float(f64),
    Bool(bool),
    String(String),
    Strings(Vec<String>),
    /// Kept as stored, so that an array costs the memory it takes in the file.
    Scalars(Scalars),
}

/// An array of numbers or truth values, as stored.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Scalars {
    pub scalar: ScalarType,
    pub bytes: Vec<u8>,
}

impl Scalars {
    pub fn iter(&self) -> impl Iterator<Item = Value> + '_ {
        self.bytes.chunks_exact(self.scalar.bytes()).map(|bytes| self.scalar.decode(bytes))
    }
}

impl Value {
    /// For error messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::Integer(_) => "an integer",
            Value::Float(_) => "a number",
            Value::Bool(_) => "true or false",
            Value::String(_) => "a string",
            Value::Strings(_) => "an array of strings",
            Value::Scalars(_) => "an array of numbers",
        }
    }
}
