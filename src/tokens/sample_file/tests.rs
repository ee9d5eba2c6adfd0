//! The samples that memory gives; damaged and foreign files; the fingerprint that pins what tokenisation makes.

use super::*;
use crate::config::{HashTemplate, LossOn, OnBadRecord, Overlong};
use crate::data::{LoadOptions, load, read};
use crate::tokens::{SampleBuilder, SampleOptions, tokenise};

fn options(also_without_hash: bool) -> SampleOptions {
    SampleOptions {
        max_length: 40,
        overlong: Overlong::Truncate,
        loss_on: LossOn::Completion,
        on_bad_record: OnBadRecord::Skip,
        embedding_rows: 512,
        hash_template: HashTemplate::default(),
        also_without_hash,
    }
}

/// The tiny tokenizer, and two files of text and one of tokens, with bad records and records that are cut.
fn data(folder: &std::path::Path) -> (crate::tokens::Tokenizer, Vec<DataSource>) {
    let fixture = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny_tokenizer");
    let tokenizer = crate::tokens::Tokenizer::from_folder(fixture).unwrap();
    let text = |count: usize, hash: &str| {
        let record = |number: usize| {
            let instruction = "what is it ".repeat(1 + number % 9);
            format!(
                "{{\"instruction\": \"{instruction}{number}\", \"output\": \"{number}\", \"hash\": \"{hash}\"}}\n"
            )
        };
        (0..count).map(record).collect::<String>()
    };
    let write = |name: &str, text: String, weight| {
        std::fs::write(folder.join(name), text).unwrap();
        DataSource { weight, ..DataSource::new(folder.join(name)) }
    };
    let tokens = "{\"input_ids\": [5, 6, 7], \"labels\": [-100, -100, 7]}\n{\"input_ids\": [5, 6], \"labels\": [-100, -100]}\n";
    let sources = vec![
        write("a.jsonl", text(30, "faq") + "{\"instruction\": \"\"}\n" + &text(3, "math"), None),
        write("b.jsonl", text(5, "faq"), Some(2.5)),
        write("c.jsonl", tokens.into(), None),
    ];
    (tokenizer, sources)
}

fn loading() -> LoadOptions {
    LoadOptions { on_bad_record: OnBadRecord::Skip, ..LoadOptions::default() }
}

/// The bytes of the file of these samples.
fn file_of(
    sources: &[DataSource],
    tokenizer: &crate::tokens::Tokenizer,
    options: &SampleOptions,
    key: &SampleKey,
) -> (Vec<u8>, Accounting) {
    let survey = read(sources, &loading(), |_, _| Ok(())).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    let words = SampleFile::new(file.as_file().try_clone().unwrap()).unwrap();
    let mut builder = SampleBuilder::new(&survey.kinds, Some(tokenizer), options)
        .unwrap()
        .of_sources(sources)
        .into_file(words);
    read(sources, &loading(), |source, records| builder.add(source, &records)).unwrap();
    builder.finish(&survey.accounting).unwrap().write(key).unwrap();
    (std::fs::read(file.path()).unwrap(), survey.accounting)
}

/// The bytes at an address that words and entries can be at, as a map has it.
struct Aligned(Vec<u64>, usize);

impl AsRef<[u8]> for Aligned {
    fn as_ref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.0)[..self.1]
    }
}

impl Pages for Aligned {}

fn open(
    bytes: &[u8],
    key: &SampleKey,
    sources: &[DataSource],
    read: &Accounting,
) -> Result<SampleSet, String> {
    let mut words = vec![0_u64; bytes.len().div_ceil(8)];
    bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
    SampleSet::from_file(Arc::new(Aligned(words, bytes.len())), key, sources, read)
}

#[test]
fn a_file_gives_the_samples_that_memory_gives() {
    let folder = tempfile::tempdir().unwrap();
    let (tokenizer, sources) = data(folder.path());
    for also_without_hash in [false, true] {
        let options = options(also_without_hash);
        let key = SampleKey::new(&serde_json::json!("a"));
        let dataset = load(&sources, &loading()).unwrap();
        let in_memory = tokenise(&dataset, Some(&tokenizer), &options).unwrap();
        let (bytes, read) = file_of(&sources, &tokenizer, &options, &key);
        let mapped = open(&bytes, &key, &sources, &read).unwrap();
        assert_eq!(mapped, in_memory);
        assert_eq!(mapped.fingerprint(), in_memory.fingerprint());
        assert_eq!(mapped.can_lose_hash(), also_without_hash);
        assert_eq!((mapped.len(), mapped.accounting.exceptions.len() > 2), (39, true));
        let [kept, held_out] = [&mapped, &in_memory].map(|set| set.clone().hold_out(0.2, 7).unwrap());
        assert_eq!(kept, held_out);
        // Weights are the configuration's, not the file's.
        let heavier: Vec<DataSource> =
            sources.iter().map(|source| DataSource { weight: Some(3.0), ..source.clone() }).collect();
        let weights = open(&bytes, &key, &heavier, &read).unwrap();
        assert!(weights.iter().all(|sample| sample.weight() == 3.0));
    }
}

#[test]
fn damaged_and_foreign_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (tokenizer, sources) = data(folder.path());
    let key = SampleKey::new(&serde_json::json!("a"));
    let (bytes, read) = file_of(&sources, &tokenizer, &options(true), &key);
    let refused = |bytes: &[u8], key: &SampleKey, part: &str| {
        let reason = open(bytes, key, &sources, &read).unwrap_err();
        assert!(reason.contains(part), "{reason}");
    };
    refused(&bytes, &SampleKey::new(&serde_json::json!("b")), "other data");
    refused(b"fastlora", &key, "cut short");
    refused(&[&b"safetens"[..], &bytes[8..]].concat(), &key, "no file of samples");
    refused(&[&bytes[..8], &[9, 0, 0, 0], &bytes[12..]].concat(), &key, "format 9");
    refused(&bytes[..bytes.len() - 1], &key, "its size");
    refused(&[&bytes[..], &[0]].concat(), &key, "its size");
    // Any byte that counts.
    for place in (0..12).chain(16..104).chain((HEADER_BYTES..bytes.len()).step_by(13)) {
        let mut damaged = bytes.clone();
        damaged[place] ^= 0x10;
        assert!(open(&damaged, &key, &sources, &read).is_err(), "byte {place}");
    }
    // Sizes near the end of what a number holds.
    for size in [u64::MAX, u64::MAX / 4, 1 << 62] {
        for place in 0..3 {
            let mut damaged = bytes.clone();
            let start = SIZES.start + 8 * place;
            damaged[start..start + 8].copy_from_slice(&size.to_ne_bytes());
            refused(&damaged, &key, "its size");
        }
    }
    // Sealed again after a change that leads out of the file: an entry's place, its source, its hash.
    let words = u64::from_ne_bytes(bytes[SIZES.start..SIZES.start + 8].try_into().unwrap());
    let entries = (HEADER_BYTES + 4 * words as usize).next_multiple_of(8);
    for (place, value) in
        [(0, u64::MAX), (0, words), (24, u64::from(u32::MAX)), (24, 9 << 32), (32, u64::MAX)]
    {
        let mut damaged = bytes.clone();
        damaged[entries + place..entries + place + 8].copy_from_slice(&value.to_ne_bytes());
        let mut hasher = Sha256::new();
        hasher.update(&damaged[HEADER_BYTES..]);
        hasher.update(&damaged[SIZES]);
        damaged[CHECKSUM].copy_from_slice(&hasher.finalize());
        refused(&damaged, &key, "outside of it");
    }
}

/// When this fails, samples of the same data have changed: raise [`SAMPLES`] and take the new fingerprint.
#[test]
fn the_same_data_make_the_same_samples_unless_the_version_is_raised() {
    let folder = tempfile::tempdir().unwrap();
    let (tokenizer, sources) = data(folder.path());
    let set = tokenise(&load(&sources, &loading()).unwrap(), Some(&tokenizer), &options(false)).unwrap();
    assert_eq!((SAMPLES, &set.fingerprint()[..16]), (1, "995e44a13fa8e24d"));
}
