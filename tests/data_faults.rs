//! Faults of data files: each is refused with its place, or taken for what it is.

use std::io::Write;
use std::path::Path;

use fastlora::config::{DataSource, HashTemplate, LossOn, OnBadRecord, Overlong};
use fastlora::data::{Dataset, LoadOptions, Outcome, RecordContent, load};
use fastlora::error::{Error, ErrorKind, Result};
use fastlora::tokens::{SampleOptions, SampleSet, Tokenizer, tokenise, warn_about_overlap};

/// Loads one file of that name and content.
fn load_bytes(name: &str, content: &[u8], options: &LoadOptions) -> Result<Dataset> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, content).unwrap();
    load(&[DataSource::new(path)], options)
}

fn load_text(name: &str, content: &str) -> Result<Dataset> {
    load_bytes(name, content.as_bytes(), &LoadOptions::default())
}

fn skipping() -> LoadOptions {
    LoadOptions { on_bad_record: OnBadRecord::Skip, ..LoadOptions::default() }
}

/// The error's place without its folder; every data error says what to do.
fn place(error: &Error) -> String {
    assert_eq!(error.kind(), ErrorKind::Data, "{error}");
    let location = error.location().unwrap_or_default();
    location.rsplit('/').next().unwrap_or_default().to_string()
}

/// (instruction, output, hash, line) of each record.
fn rows(dataset: &Dataset) -> Vec<(&str, &str, &str, usize)> {
    let row = |record: &'_ fastlora::data::Record| match &record.content {
        RecordContent::Instruction { .. } => record.origin.line,
        other => panic!("{other:?}"),
    };
    dataset
        .records
        .iter()
        .map(|record| match &record.content {
            RecordContent::Instruction { instruction, output } => {
                (instruction.as_str(), output.as_str(), record.hash.as_str(), row(record))
            }
            other => panic!("{other:?}"),
        })
        .collect()
}

fn tiny_tokenizer() -> Tokenizer {
    Tokenizer::from_folder(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny_tokenizer"))
        .unwrap()
}

fn sample_options() -> SampleOptions {
    SampleOptions {
        max_length: 64,
        overlong: Overlong::Error,
        loss_on: LossOn::Completion,
        on_bad_record: OnBadRecord::Error,
        embedding_rows: 512,
        hash_template: HashTemplate::default(),
        also_without_hash: false,
    }
}

fn tokenise_text(content: &str, options: &SampleOptions) -> Result<SampleSet> {
    tokenise(&load_text("train.jsonl", content).unwrap(), Some(&tiny_tokenizer()), options)
}

#[test]
fn fields_are_found_in_the_documented_order() {
    let dataset = load_text(
        "a.json",
        r#"[{"text": "t", "input": "i", "prompt": "p", "question": "q", "completion": "c", "label": "l",
  "response": "r", "answer": "a", "type": "ty", "category": "ca", "domain": "do"},
 {"text": "t", "input": "i", "completion": "c", "label": "l", "response": null, "type": "ty", "category": "ca"},
 {"instruction": "x", "input": "y", "output": 12.50, "hash": true},
 {"instruction": "x", "input": "", "output": false, "hash": 123456789012345678901234567890},
 {"text": "t", "completion": "c", "hash": null, "extra": {"deep": [1, 2]}},

 {"instruction": "late", "output": "1e5", "output": "last"}]"#,
    )
    .unwrap();
    assert_eq!(
        rows(&dataset),
        [
            ("q", "a", "do", 1),
            ("i", "l", "ca", 3),
            ("x\ny", "12.50", "true", 4),
            ("x", "false", "123456789012345678901234567890", 5),
            ("t", "c", "unknown", 6),
            ("late", "last", "unknown", 8),
        ]
    );
}

#[test]
fn keys_of_the_configuration_and_of_the_file_replace_the_search() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, content: &str| {
        std::fs::write(folder.path().join(name), content).unwrap();
        DataSource::new(folder.path().join(name))
    };
    let general =
        write("a.jsonl", r#"{"q": "1", "a": "2", "h": "3", "question": "x", "answer": "y", "hash": "z"}"#);
    let own = DataSource {
        instruction_key: Some("ask".into()),
        hash: Some("fixed".into()),
        weight: Some(1.0),
        ..write("b.json", r#"{"ask": "1", "a": "2", "h": "3"}"#)
    };
    let options = LoadOptions {
        instruction_key: Some("q".into()),
        output_key: Some("a".into()),
        hash_key: Some("h".into()),
        ..LoadOptions::default()
    };
    let dataset = load(&[general.clone(), own, general], &options).unwrap();
    assert_eq!(rows(&dataset), [("1", "2", "3", 1), ("1", "2", "fixed", 1), ("1", "2", "3", 1)]);
    assert_eq!(dataset.files.iter().map(|file| file.used).collect::<Vec<_>>(), [1, 1, 1]);

    let weightless = DataSource { weight: Some(0.0), ..write("c.json", "[]") };
    assert_eq!(load(&[weightless], &options).unwrap_err().kind(), ErrorKind::Config);
}

#[test]
fn missing_files_and_unknown_names_are_data_errors() {
    for name in ["missing.json", "missing.txt"] {
        let error = load(&[DataSource::new(name)], &LoadOptions::default()).unwrap_err();
        assert_eq!((error.kind(), error.location()), (ErrorKind::Data, Some(name)));
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("folder.json");
    std::fs::create_dir(&path).unwrap();
    assert_eq!(place(&load(&[DataSource::new(path)], &LoadOptions::default()).unwrap_err()), "folder.json");
}

#[test]
fn compressed_files_are_read() {
    let content = br#"{"instruction": "1", "output": "2"}"#;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(content).unwrap();
    let gzip = encoder.finish().unwrap();
    let zstandard =
        ruzstd::encoding::compress_to_vec(&content[..], ruzstd::encoding::CompressionLevel::Fastest);
    for (name, bytes) in [
        ("a.json.gz", &gzip),
        ("a.jsonl.gz", &gzip),
        ("a.json.zst", &zstandard),
        ("a.ndjson.zst", &zstandard),
    ] {
        assert_eq!(load_bytes(name, bytes, &skipping()).unwrap().records.len(), 1, "{name}");
        for broken in [&bytes[..bytes.len() - 5], &bytes[..3], &content[..]] {
            let error = load_bytes(name, broken, &skipping()).unwrap_err();
            assert_eq!(place(&error), name, "{error}");
        }
    }
}

#[test]
fn fault_29_broken_json_is_placed_by_line_and_column() {
    for (name, content, expected) in [
        ("a.json", "[{\"instruction\": \"1\", \"output\": \"2\"},\n {\"instruction\" \"1\"}]", "a.json:2:17"),
        ("a.json", "[{\"instruction\": \"1\", \"output\": \"2\"},\n]", "a.json:2:1"),
        ("a.json", "[{\"instruction\": \"1\", \"output\": \"2\"}", "a.json:1:37"),
        ("a.json", "{\"instruction\": \"1\", \"output\": \"2\"}\n{\"instruction\": \"1\"}", "a.json:2:1"),
        ("a.json", "[] x", "a.json:1:4"),
        ("a.json", "[\n{\"é\": \"日本\", x}]", "a.json:2:13"),
        ("a.json", "\u{feff}[}", "a.json:1:2"),
        ("a.jsonl", "{\"instruction\": \"1\", \"output\": \"2\"}\n\n{\"a\": tru}", "a.jsonl:3:10"),
        ("a.jsonl", "{\"instruction\": \"1\", \"output\": \"2\"} {}", "a.jsonl:1:37"),
        ("a.jsonl", "{\n\"instruction\": \"1\", \"output\": \"2\"}", "a.jsonl:1:2"),
        ("a.jsonl", "{\"instruction\": \"\\ud800\", \"output\": \"2\"}", "a.jsonl:1:24"),
    ] {
        // A file that is not JSON is broken, no record of it is merely bad.
        let error = load_bytes(name, content.as_bytes(), &skipping()).unwrap_err();
        assert_eq!(place(&error), expected, "{content:?}: {error}");
        assert!(error.message().starts_with("broken JSON"), "{error}");
    }
}

#[test]
fn fault_29_deep_nesting_is_no_stack_overflow() {
    let deep = "[".repeat(2_000_000);
    assert!(load_text("a.json", &deep).unwrap_err().message().starts_with("broken JSON"));
    let nested = format!("{deep}{}", "]".repeat(deep.len()));
    let unread = format!("{{\"instruction\": \"1\", \"output\": \"2\", \"extra\": {nested}}}");
    assert_eq!(load_text("a.json", &unread).unwrap().records.len(), 1);
    let read = format!("{{\"instruction\": \"1\", \"output\": {nested}}}");
    assert!(load_text("a.jsonl", &read).unwrap_err().message().contains("`output` is a list"));
    let ids = format!("{{\"input_ids\": {nested}}}");
    assert!(load_text("a.jsonl", &ids).unwrap_err().message().contains("not a list of integers"));
}

#[test]
fn fault_30_mixed_kinds_of_record_are_refused() {
    let text = r#"{"instruction": "1", "output": "2"}"#;
    let tokens = r#"{"input_ids": [1, 2]}"#;
    for (first, second) in [(text, tokens), (tokens, text)] {
        let error =
            load_bytes("a.jsonl", format!("{first}\n{first}\n{second}").as_bytes(), &skipping()).unwrap_err();
        assert_eq!(place(&error), "a.jsonl:3");
        assert!(error.message().contains("mixed kinds") && error.message().contains("a.jsonl:1"), "{error}");
    }
    for chat in [
        r#"{"messages": [{"role": "assistant", "content": "1"}]}"#,
        r#"{"conversations": [{"from": "gpt", "value": "1"}], "instruction": "1", "output": "2"}"#,
    ] {
        let error = load_bytes("a.jsonl", format!("{text}\n{chat}").as_bytes(), &skipping()).unwrap_err();
        assert_eq!(place(&error), "a.jsonl:2");
        assert!(error.message().contains("this one is chat, the first"), "{error}");
    }
}

#[test]
fn fault_31_byte_order_mark_and_carriage_returns_are_taken() {
    let lines = "\u{feff}{\"instruction\": \"1\", \"output\": \"2\"}\r\n\r\n{\"instruction\": \"3\", \"output\": \"4\"}\r\n";
    assert_eq!(
        rows(&load_text("a.jsonl", lines).unwrap()),
        [("1", "2", "unknown", 1), ("3", "4", "unknown", 3)]
    );
    let list = "\u{feff}[\r\n{\"instruction\": \"1\",\r\n\"output\": \"2\"},\r\n{\"instruction\": \"3\", \"output\": \"4\"}]\r\n";
    assert_eq!(
        rows(&load_text("a.json", list).unwrap()),
        [("1", "2", "unknown", 2), ("3", "4", "unknown", 4)]
    );
}

#[test]
fn fault_32_bytes_that_are_not_utf8_are_placed() {
    for (content, offset) in [
        (&b"[{\"a\": \"caf\xe9\"}]"[..], "offset 11"),
        (b"\xff\xfe[\0", "offset 0"),
        (b"\xef\xbb\xbf\xc3", "offset 3"),
    ] {
        let error = load_bytes("a.json", content, &skipping()).unwrap_err();
        assert_eq!(place(&error), "a.json");
        assert!(error.message().contains(offset), "{error}");
    }
}

#[test]
fn fault_33_a_line_of_100_megabytes_is_one_record() {
    let long = "x".repeat(100 << 20);
    let content = format!(
        "{{\"instruction\": \"{long}\", \"output\": \"2\"}}\n{{\"instruction\": \"1\", \"output\": \"2\"}}"
    );
    let dataset = load_text("a.jsonl", &content).unwrap();
    assert_eq!((dataset.records.len(), dataset.records[1].origin.line), (2, 2));
    let error = load_text("a.jsonl", &content[..content.len() - 1]).unwrap_err();
    assert_eq!(place(&error), "a.jsonl:2:35");
}

#[test]
fn fault_34_empty_files_and_lists_are_refused() {
    for (name, content) in [
        ("a.json", ""),
        ("a.json", " \n"),
        ("a.json", "[]"),
        ("a.jsonl", ""),
        ("a.jsonl", "\n\n"),
        ("a.json", "\u{feff}"),
    ] {
        let error = load_bytes(name, content.as_bytes(), &skipping()).unwrap_err();
        assert_eq!(place(&error), name, "{content:?}");
        assert!(error.message().contains("no record"), "{error}");
    }
    assert_eq!(load(&[], &LoadOptions::default()).unwrap_err().kind(), ErrorKind::Data);
}

#[test]
fn fault_35_bad_records_are_refused_or_skipped_and_counted() {
    let good = r#"{"instruction": "1", "output": "2"}"#;
    for (bad, reason) in [
        (
            r#"{"output": "2"}"#,
            "no instruction: tried `instruction`, `question`, `prompt`, `input`, `text`; the record has `output`",
        ),
        (r#"{"instruction": "1", "other": 3}"#, "no output: tried `output`"),
        (r#"{"instruction": null, "output": "2"}"#, "`instruction` is null"),
        (r#"{"instruction": "1", "output": null}"#, "`output` is null"),
        (r#"{"instruction": "", "output": "2"}"#, "`instruction` is empty"),
        (r#"{"instruction": "1", "output": " \n"}"#, "`output` is empty"),
        (r#"{"instruction": ["1"], "output": "2"}"#, "`instruction` is a list"),
        (r#"{"instruction": "1", "output": {"a": 1}}"#, "`output` is an object"),
        (r#"{"instruction": "1", "input": [2], "output": "2"}"#, "`input` is a list"),
        (r#"{"instruction": "1", "output": "2", "hash": {}}"#, "`hash` is an object"),
        (r#"{}"#, "the record has no fields"),
        (r#""1""#, "a record is an object, found a string"),
        (r#"[]"#, "a record is an object, found a list"),
        (r#"null"#, "a record is an object, found null"),
        (r#"{"input_ids": []}"#, "`input_ids` is empty"),
        (r#"{"input_ids": "1 2"}"#, "`input_ids` is not a list of integers"),
        (r#"{"input_ids": [1, 2.5]}"#, "`input_ids` is not a list of integers"),
        (r#"{"input_ids": [1, -2]}"#, "`input_ids`[1] is -2"),
        (r#"{"input_ids": [1, 2147483648]}"#, "`input_ids`[1] is 2147483648"),
        (r#"{"input_ids": [1, 2], "labels": [1]}"#, "`labels` has 1 entries, `input_ids` has 2"),
        (r#"{"input_ids": [1, 2], "labels": [-100, -1]}"#, "`labels`[1] is -1"),
    ] {
        let lines = format!("{good}\n{bad}\n{good}\n");
        let list = format!("[{good},\n{bad},\n{good}]");
        for (name, content) in [("a.jsonl", lines), ("a.json", list)] {
            let error = load_text(name, &content).unwrap_err();
            assert_eq!(place(&error), format!("{name}:2"), "{bad}");
            assert!(
                error.message().starts_with(reason) || error.message().contains(reason),
                "{bad}: {error}"
            );
            assert!(error.hint_text().unwrap().contains("on_bad_record"));

            let dataset = load_bytes(name, content.as_bytes(), &skipping()).unwrap();
            assert_eq!((dataset.records.len(), dataset.files[0].used, dataset.files[0].skipped), (2, 2, 1));
            let [exception] = &dataset.accounting.exceptions[..] else { panic!("one exception") };
            assert_eq!((exception.outcome, exception.origin.line), (Outcome::Skipped, 2));
            assert!(exception.reason.contains(reason), "{}", exception.reason);
            assert_eq!(dataset.accounting.total(), 3);
        }
    }
    let error = load_bytes("a.jsonl", b"{}\n{}", &skipping()).unwrap_err();
    assert!(error.message().contains("no usable record: 0 of 2 records used, 2 skipped"), "{error}");
}

#[test]
fn fault_37_records_with_every_label_masked_are_bad() {
    let content =
        "{\"input_ids\": [5, 6], \"labels\": [5, -100]}\n{\"input_ids\": [5]}\n{\"input_ids\": [5, 6]}";
    let error = tokenise_text(content, &sample_options()).unwrap_err();
    assert_eq!(place(&error), "train.jsonl:1");
    assert!(error.message().contains("every label is masked"), "{error}");
    let skip = SampleOptions { on_bad_record: OnBadRecord::Skip, ..sample_options() };
    let set = tokenise_text(content, &skip).unwrap();
    assert_eq!((set.len(), set.accounting.count(Outcome::Skipped), set.accounting.total()), (1, 2, 3));
}

/// `count` records whose instruction has about `words` tokens.
fn long_records(count: usize, words: usize) -> String {
    let instruction = "weather ".repeat(words);
    (0..count)
        .map(|number| format!("{{\"instruction\": \"{number} {instruction}\", \"output\": \"warm\", \"hash\": \"general\"}}\n"))
        .collect()
}

#[test]
fn fault_38_overlong_samples_are_refused_with_the_histogram_or_dropped() {
    let mixed = long_records(2, 200) + &long_records(3, 2);
    let error = tokenise_text(&mixed, &sample_options()).unwrap_err();
    assert_eq!(place(&error), "train.jsonl:1");
    for part in ["2 of 5 samples are longer than max_length = 64", "≤32: 3", "≤256: 2", "longest 2"] {
        assert!(error.message().contains(part), "{error}");
    }

    let dropping = SampleOptions { overlong: Overlong::Drop, ..sample_options() };
    let set = tokenise_text(&mixed, &dropping).unwrap();
    assert_eq!((set.len(), set.accounting.count(Outcome::Dropped), set.accounting.total()), (3, 2, 5));
    let error = tokenise_text(&long_records(3, 200), &dropping).unwrap_err();
    assert!(error.message().contains("no sample is left") && error.message().contains("≤256: 3"), "{error}");
}

#[test]
fn fault_38_truncation_keeps_the_hash_prefix_and_a_target() {
    let tokenizer = tiny_tokenizer();
    let cutting = |max_length| SampleOptions { overlong: Overlong::Truncate, max_length, ..sample_options() };
    // A long instruction: the completion stays whole.
    let set = tokenise_text(&long_records(2, 500), &cutting(64)).unwrap();
    assert_eq!((set.len(), set.accounting.count(Outcome::Truncated)), (2, 2));
    for sample in set.iter() {
        assert!((60..=64).contains(&sample.token_ids.len()), "{}", sample.token_ids.len());
        let text = tokenizer.decode(sample.token_ids).unwrap();
        assert!(text.starts_with("[hash: general] User: "), "{text}");
        assert!(text.ends_with("\nAssistant: warm"), "{text}");
        assert_eq!(sample.token_ids.last(), Some(&2), "EOS");
        assert_eq!(
            sample.labels.iter().position(|&label| label >= 0),
            Some(sample.token_ids.len() - sample.labelled_count())
        );
    }
    // A long answer: it loses its end and EOS, the prompt stays whole.
    let answer = format!("{{\"instruction\": \"Name a dish\", \"output\": \"{}\"}}", "sauce ".repeat(300));
    let set = tokenise_text(&answer, &cutting(64)).unwrap();
    let sample = set.get(0);
    assert_eq!(sample.token_ids.len(), 64);
    assert!(
        tokenizer
            .decode(sample.token_ids)
            .unwrap()
            .starts_with("[hash: unknown] User: Name a dish\nAssistant: sauce")
    );
    assert!(!sample.token_ids.contains(&2));
    // Whatever the text and the limit: a target or a clear refusal.
    for instruction in ["weather ", "日本語 ", "🦀", "naïve e\u{301} ", "1234", "x\\n \\n", "<|im_end|>"]
    {
        let record = format!("{{\"instruction\": \"{0}\", \"output\": \"{0}\"}}", instruction.repeat(60));
        for max_length in 1..120 {
            match tokenise_text(&record, &cutting(max_length)) {
                Ok(set) => {
                    let sample = set.get(0);
                    assert!(sample.token_ids.len() <= max_length && sample.labelled_count() > 0);
                    let text = tokenizer.decode(sample.token_ids).unwrap();
                    assert!(text.starts_with("[hash: unknown] User: "), "{max_length} {text}");
                    assert!(text.contains("\nAssistant:"), "{max_length} {text}");
                }
                Err(error) => {
                    assert!(max_length < 24, "{max_length}: {error}");
                    assert_eq!(place(&error), "train.jsonl:1");
                    assert!(error.message().contains("leaves no target"), "{error}");
                }
            }
        }
    }
    // Tokens: the end goes, and where no label stays the record is bad.
    let ids = "5, ".repeat(99) + "6";
    let masked = "-100, ".repeat(99) + "6";
    let set = tokenise_text(&format!("{{\"input_ids\": [{ids}]}}"), &cutting(64)).unwrap();
    assert_eq!((set.get(0).token_ids.len(), set.get(0).labelled_count()), (64, 63));
    let error = tokenise_text(&format!("{{\"input_ids\": [{ids}], \"labels\": [{masked}]}}"), &cutting(64))
        .unwrap_err();
    assert!(error.message().contains("no label is left within max_length = 64"), "{error}");
}

#[test]
fn fault_41_overlap_of_training_and_validation_is_counted() {
    let training = tokenise_text(&long_records(5, 2), &sample_options()).unwrap();
    let validation = tokenise_text(&(long_records(2, 2) + &long_records(3, 3)), &sample_options()).unwrap();
    assert_eq!(warn_about_overlap(&training, &validation), 2);
    assert_eq!(warn_about_overlap(&training, &training), 5);
    let other = tokenise_text(&long_records(3, 4), &sample_options()).unwrap();
    assert_eq!(warn_about_overlap(&training, &other), 0);
}

#[test]
fn fault_42_control_characters_are_escaped_when_printed() {
    let error =
        load_text("a.jsonl", "{\"instruction\": \"1\", \"\\u001b[31mred\\u0007\": \"2\"}").unwrap_err();
    let shown = error.to_string();
    assert!(shown.contains("\\u{1b}[31mred\\u{7}") && !shown.contains('\u{1b}'), "{shown}");
    let error = load_text("\u{1b}[2Ja.json", "[]").unwrap_err();
    assert!(!error.to_string().contains('\u{1b}'));
    let error = load_text("a.json", "[\u{1b}").unwrap_err();
    assert!(!error.to_string().contains('\u{1b}'));
}

#[test]
fn the_fingerprint_follows_tokens_labels_and_order() {
    let records: Vec<String> = long_records(3, 2).lines().map(|line| line.to_string() + "\n").collect();
    let fingerprint =
        |text: &str, options: &SampleOptions| tokenise_text(text, options).unwrap().fingerprint();
    let base = fingerprint(&records.concat(), &sample_options());
    assert_eq!(base.len(), 64);
    assert_eq!(base, fingerprint(&records.concat().replace('\n', "\r\n\n"), &sample_options()));
    let reversed: String = records.iter().rev().cloned().collect();
    assert_ne!(base, fingerprint(&reversed, &sample_options()));
    let all = SampleOptions { loss_on: LossOn::All, ..sample_options() };
    assert_ne!(base, fingerprint(&records.concat(), &all));
    // SHA-256 of one sample written by hand: 2 tokens (u64), ids 5 and 6 (u32), labels 5 and 6 (i32).
    assert_eq!(
        fingerprint("{\"input_ids\": [5, 6]}", &sample_options()),
        "4a8437e69fc5cfa289f08d4db703a41c8d68ccfe02f5502e0927e38432830fc9"
    );
}
