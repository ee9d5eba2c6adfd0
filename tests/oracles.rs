//! Logits of every supported architecture against transformers in float64 (`tests/fixtures/oracles/README.md`), by both
//! paths: losses of whole samples as in training, and decoding over the cache.

mod support;

use std::ops::ControlFlow;
use std::sync::Arc;

use fastlora::backend::cpu::CpuBackend;
use fastlora::batch::Batch;
use fastlora::checkpoint::base::BaseModel;
use fastlora::inference::{Sampler, SamplingParameters, Session, StopConditions, generate};
use fastlora::model::Transformer;
use support::{Tensors, fixture};

/// Four times the float32 drift of transformers itself on these models, 2e-5: another order of sums, not another model.
const LOGIT_TOLERANCE: f64 = 8e-5;

const FAMILIES: [&str; 5] = ["tiny_gemma", "tiny_gemma2", "tiny_gemma3", "tiny_phi3", "tiny_phi3_longrope"];

fn check(folder: &str, expected: &str, ids: &str, logits: &str, lengths: Option<&str>) {
    let folder = fixture(folder);
    let base = BaseModel::open(&folder).unwrap();
    let mut model = Transformer::load(Arc::new(CpuBackend::new(None).unwrap()), &base, None).unwrap();
    let file = Tensors::open(folder.join(expected));
    let (shape, ids) = file.get(ids);
    let (_, logits) = file.get(logits);
    let (rows, columns, vocabulary) = (shape[0], shape[1], logits.len() / ids.len());
    let mask = lengths.map(|name| file.get(name).1);
    for row in 0..rows {
        let length = mask.as_ref().map_or(columns, |mask| {
            mask[row * columns..(row + 1) * columns].iter().filter(|&&kept| kept == 1.0).count()
        });
        let tokens: Vec<u32> = ids[row * columns..][..length].iter().map(|&id| id as u32).collect();
        let expected = |position: usize| &logits[(row * columns + position) * vocabulary..][..vocabulary];
        check_losses(&mut model, &tokens, expected);
        check_decoding(&mut model, &tokens, expected);
    }
}

fn check_losses<'a>(
    model: &mut Transformer<CpuBackend>,
    tokens: &[u32],
    expected: impl Fn(usize) -> &'a [f64],
) {
    let mut batch = Batch::default();
    let labels: Vec<i32> = tokens.iter().map(|&id| id as i32).collect();
    batch.push(0, tokens, &labels);
    let scores = model.evaluate(&batch).unwrap();
    assert_eq!(scores.losses.len(), tokens.len() - 1);
    for (position, (&loss, &correct)) in scores.losses.iter().zip(&scores.correct).enumerate() {
        let logits = expected(position);
        let target = tokens[position + 1] as usize;
        let largest = logits.iter().copied().fold(f64::MIN, f64::max);
        let sum: f64 = logits.iter().map(|logit| (logit - largest).exp()).sum();
        let expected = largest + sum.ln() - logits[target];
        let difference = (f64::from(loss) - expected).abs();
        assert!(difference <= 2.0 * LOGIT_TOLERANCE, "loss at {position}: {loss} against {expected}");
        assert_eq!(correct, logits[target] == largest, "position {position}");
    }
}

fn check_decoding<'a>(
    model: &mut Transformer<CpuBackend>,
    tokens: &[u32],
    expected: impl Fn(usize) -> &'a [f64],
) {
    // Part of the prompt at once, then one token at a time. The start of a long text that is no long one has other logits.
    let most = model.config().rope.original_max_positions().filter(|most| tokens.len() > *most);
    let prompt = most.map_or(tokens.len() / 2, |most| most + 1);
    let mut cache = model.new_cache(tokens.len()).unwrap();
    let mut logits = Vec::new();
    let mut position = prompt;
    model.forward_cached(&tokens[..prompt], &mut cache, &mut logits).unwrap();
    loop {
        for (index, (&found, &expected)) in logits.iter().zip(expected(position - 1)).enumerate() {
            let difference = (f64::from(found) - expected).abs();
            assert!(
                difference <= LOGIT_TOLERANCE,
                "position {position}, logit {index}: {found} against {expected}"
            );
        }
        if position == tokens.len() {
            break;
        }
        model.forward_cached(&tokens[position..=position], &mut cache, &mut logits).unwrap();
        position += 1;
    }
}

macro_rules! oracle {
    ($($name:ident),*) => {
        $(#[test]
        fn $name() {
            let folder = concat!("oracles/", stringify!($name));
            check(folder, "expected.safetensors", "input_ids", "logits_f64", None);
        })*
    };
}

oracle!(mistral_window, qwen2_window, qwen3_layer_types, llama_biases, llama_yarn, llama_linear);

#[test]
fn tiny_golden_models() {
    for name in ["tiny_qwen2", "tiny_qwen3", "tiny_llama3rope"].iter().chain(&FAMILIES) {
        check(name, "forward.safetensors", "input_ids", "logits_f64", Some("attention_mask"));
    }
}

/// The cache of `tiny_phi3_longrope` must be filled anew where the text becomes a long one: at its 13th token.
#[test]
fn greedy_answers_are_those_of_transformers() {
    for name in FAMILIES {
        let folder = fixture(name);
        let text = std::fs::read_to_string(folder.join("golden.json")).unwrap();
        let golden: serde_json::Value = serde_json::from_str(&text).unwrap();
        let ids = |key: &str| -> Vec<u32> {
            let list = golden["generation"][key].as_array().unwrap();
            list.iter().map(|id| id.as_u64().unwrap() as u32).collect()
        };
        let (prompt, expected) = (ids("prompt"), ids("token_ids"));
        let base = BaseModel::open(&folder).unwrap();
        let mut model = Transformer::load(Arc::new(CpuBackend::new(None).unwrap()), &base, None).unwrap();
        let mut session = Session::new(&mut model, 64).unwrap();
        // Twice: the second text is read where the first one was.
        for _ in 0..2 {
            session.clear();
            let mut sampler = Sampler::new(SamplingParameters::default()).unwrap();
            let stop = StopConditions { max_new_tokens: expected.len(), eos_token_ids: vec![] };
            let go_on = |_| ControlFlow::Continue(());
            let found = generate(&mut session, &prompt, &mut sampler, &stop, go_on).unwrap().token_ids;
            assert_eq!(found, expected, "{name}");
        }
    }
}
