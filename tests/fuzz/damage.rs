//! Random damage to files, the same for the same seed.

/// SplitMix64.
pub struct Random(u64);

impl Random {
    /// One stream for each case of each seed.
    pub fn new(seed: u64, case: u64) -> Self {
        Self(seed.wrapping_mul(0xD6E8_FEB8_6659_FD93) ^ case.wrapping_mul(0xA076_1D64_78BD_642F))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}

/// Numbers at which programs stumble.
const NUMBERS: [&str; 14] = [
    "0",
    "-1",
    "1",
    "-0.0",
    "1e999",
    "-1e-400",
    "255",
    "65536",
    "2147483648",
    "-2147483649",
    "4294967295",
    "9223372036854775807",
    "18446744073709551615",
    "99999999999999999999999",
];

/// How a kind of file is damaged.
pub struct Damage {
    /// What may turn up in it, beside numbers.
    pub words: &'static [&'static str],
    /// Bytes from the beginning in which the damage is done: a header, say.
    pub within: usize,
}

impl Damage {
    /// A copy of `source` with one to four wounds.
    pub fn of(&self, source: &[u8], random: &mut Random) -> Vec<u8> {
        let mut bytes = source.to_vec();
        for _ in 0..1 + random.below(4) {
            self.wound(&mut bytes, random);
        }
        bytes
    }

    fn wound(&self, bytes: &mut Vec<u8>, random: &mut Random) {
        let end = bytes.len().min(self.within);
        if end == 0 {
            return bytes.extend_from_slice(b"{");
        }
        let at = random.below(end);
        let length = (1 + random.below(24)).min(bytes.len() - at);
        match random.below(9) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = [0, 0xFF, 0x7F, 0x80, b'"', b'{', b'\n', 0xC3][random.below(8)],
            2 => drop(bytes.drain(at..at + length)),
            3 => {
                let part = bytes[at..at + length].to_vec();
                let to = random.below(end);
                bytes.splice(to..to, part.repeat(1 + random.below(3)));
            }
            4 => bytes.truncate(at),
            5 => {
                let value: u64 =
                    [0, 1, u64::MAX, 1 << 31, 1 << 32, 1 << 62, i64::MAX as u64][random.below(7)];
                let width = [1, 4, 8][random.below(3)].min(bytes.len() - at);
                bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
            }
            6 => self.replace_number(bytes, at, random),
            _ if self.words.is_empty() => bytes[at] = random.next() as u8,
            _ => {
                let word = self.words[random.below(self.words.len())];
                let replaced = if random.below(2) == 0 { 0 } else { length };
                bytes.splice(at..at + replaced, word.bytes());
            }
        }
    }

    /// The first run of digits from `at` on.
    fn replace_number(&self, bytes: &mut Vec<u8>, at: usize, random: &mut Random) {
        let Some(start) = bytes[at..].iter().position(u8::is_ascii_digit).map(|place| at + place) else {
            return;
        };
        let digits = bytes[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        bytes.splice(start..start + digits, NUMBERS[random.below(NUMBERS.len())].bytes());
    }
}
