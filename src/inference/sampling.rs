//! Choosing the next token from logits `[V]`: greedy, or drawn from a distribution that is reshaped in the order of
//! transformers: repetition penalty → temperature → top-k → top-p → min-p.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::error::{Error, Result};

/// How the next token is chosen. The default is greedy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingParameters {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Only this many of the most likely tokens, and those tied with the last of them; none: all.
    pub top_k: Option<usize>,
    /// The fewest most likely tokens whose probabilities sum to at least this (Holtzman et al. 2020).
    pub top_p: f32,
    /// Tokens at least this fraction as likely as the most likely one (Nguyen et al. 2024).
    pub min_p: f32,
    /// Logits of tokens in the prompt or the text so far: divided by it where positive, else multiplied
    /// (Keskar et al. 2019).
    pub repetition_penalty: f32,
    /// Same seed, same text.
    pub seed: u64,
}

impl Default for SamplingParameters {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: None, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 42 }
    }
}

impl SamplingParameters {
    /// Refuses what is out of range, and names the range.
    pub fn validate(&self) -> Result<()> {
        let in_range = |name: &str, value: f32, is_inside: bool, range: &str| match is_inside {
            true => Ok(()),
            false => {
                Err(Error::config(format!("{name} is {value}, expected {range}")).at(format!("--{name}")))
            }
        };
        let Self { temperature, top_p, min_p, repetition_penalty, .. } = *self;
        let finite = |value: f32| value.is_finite();
        in_range("temperature", temperature, finite(temperature) && temperature >= 0.0, "a number ≥ 0")?;
        in_range("top-p", top_p, top_p > 0.0 && top_p <= 1.0, "a number above 0, at most 1")?;
        in_range("min-p", min_p, (0.0..=1.0).contains(&min_p), "a number from 0 to 1")?;
        let is_penalty = finite(repetition_penalty) && repetition_penalty > 0.0;
        in_range("repetition-penalty", repetition_penalty, is_penalty, "a number above 0")?;
        if self.top_k == Some(0) {
            return Err(Error::config("top-k is 0, expected at least 1")
                .at("--top-k")
                .hint("leave it out for all"));
        }
        Ok(())
    }
}

/// A token that may be drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    token_id: u32,
    /// Logit, later its weight: `exp(logit - highest)`.
    value: f32,
}

/// Draws tokens; keeps what it needs from one to the next, so that nothing is allocated after the first.
#[derive(Debug)]
pub struct Sampler {
    parameters: SamplingParameters,
    /// ChaCha8, whose stream stays the same from one version of its crate to the next.
    generator: ChaCha8Rng,
    /// Distinct tokens of the prompt and the text so far, and whether a token is one of them.
    seen: Vec<u32>,
    is_seen: Vec<bool>,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// A sampler in the state that its seed gives.
    ///
    /// # Errors
    /// Parameters out of range.
    pub fn new(parameters: SamplingParameters) -> Result<Self> {
        parameters.validate()?;
        let generator = ChaCha8Rng::seed_from_u64(parameters.seed);
        Ok(Self { parameters, generator, seen: Vec::new(), is_seen: Vec::new(), candidates: Vec::new() })
    }

    /// Tokens of the prompt, which the repetition penalty covers; drawn ones are added by [`Sampler::next_token`].
    pub fn observe(&mut self, token_ids: &[u32]) {
        if self.parameters.repetition_penalty == 1.0 {
            return;
        }
        for &token_id in token_ids {
            let place = token_id as usize;
            if place >= self.is_seen.len() {
                self.is_seen.resize(place + 1, false);
            }
            if !self.is_seen[place] {
                self.is_seen[place] = true;
                self.seen.push(token_id);
            }
        }
    }

    /// The next token's id. Changes `logits [V]`.
    ///
    /// # Errors
    /// A logit that is not finite.
    pub fn next_token(&mut self, logits: &mut [f32]) -> Result<u32> {
        if logits.is_empty() {
            return Err(Error::internal("no logits to choose from"));
        }
        check_finite(logits)?;
        let penalty = self.parameters.repetition_penalty;
        for &token_id in &self.seen {
            if let Some(logit) = logits.get_mut(token_id as usize) {
                *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
            }
        }
        let token_id = if self.parameters.temperature == 0.0 { argmax(logits) } else { self.draw(logits) };
        self.observe(&[token_id]);
        Ok(token_id)
    }

    fn draw(&mut self, logits: &[f32]) -> u32 {
        self.weigh_candidates(logits);
        let total: f64 = self.candidates.iter().map(|candidate| f64::from(candidate.value)).sum();
        let mut remaining = self.generator.random::<f64>() * total;
        for candidate in &self.candidates {
            remaining -= f64::from(candidate.value);
            if remaining < 0.0 {
                return candidate.token_id;
            }
        }
        // Rounding may leave a crumb of the total.
        self.candidates.last().map_or(0, |candidate| candidate.token_id)
    }

    /// Fills `candidates` with the tokens that may be drawn and their weights (probabilities up to one factor).
    fn weigh_candidates(&mut self, logits: &[f32]) {
        let SamplingParameters { temperature, top_k, top_p, min_p, .. } = self.parameters;
        let highest = logits[argmax(logits) as usize];
        let candidates = &mut self.candidates;
        candidates.clear();
        let scaled = |(token_id, &logit): (usize, &f32)| Candidate {
            token_id: token_id as u32,
            value: (logit - highest) / temperature,
        };
        candidates.extend(logits.iter().enumerate().map(scaled));
        if let Some(count) = top_k.filter(|&count| count < candidates.len()) {
            let (_, last, _) = candidates.select_nth_unstable_by(count - 1, descending);
            let threshold = last.value;
            candidates.retain(|candidate| candidate.value >= threshold);
        }
        for candidate in candidates.iter_mut() {
            candidate.value = candidate.value.exp();
        }
        if top_p < 1.0 {
            keep_nucleus(candidates, top_p);
        }
        // The most likely token's weight is 1.
        if min_p > 0.0 {
            candidates.retain(|candidate| candidate.value >= min_p);
        }
    }
}

/// Highest value first; of equal ones the lower id, so that no draw depends on a sort's inner ways.
fn descending(left: &Candidate, right: &Candidate) -> std::cmp::Ordering {
    right.value.total_cmp(&left.value).then(left.token_id.cmp(&right.token_id))
}

/// Keeps the fewest highest weights whose share of the total reaches `top_p`.
fn keep_nucleus(candidates: &mut Vec<Candidate>, top_p: f32) {
    let total: f64 = candidates.iter().map(|candidate| f64::from(candidate.value)).sum();
    let target = f64::from(top_p) * total;
    // A nucleus is small as a rule: sorting all of a large vocabulary costs ten times more than the first few.
    let mut sorted = 0;
    let mut sum = 0.0;
    while sorted < candidates.len() {
        let end = (sorted * 8).max(64).min(candidates.len());
        if end < candidates.len() {
            candidates[sorted..].select_nth_unstable_by(end - 1 - sorted, descending);
        }
        candidates[sorted..end].sort_unstable_by(descending);
        for place in sorted..end {
            sum += f64::from(candidates[place].value);
            if sum >= target {
                candidates.truncate(place + 1);
                return;
            }
        }
        sorted = end;
    }
}

const LANES: usize = 16;

/// The first of the highest logits. Written in lanes so that the compiler vectorises it.
fn argmax(logits: &[f32]) -> u32 {
    let (chunks, rest) = logits.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (lane, &logit) in lanes.iter_mut().zip(chunk) {
            *lane = if logit > *lane { logit } else { *lane };
        }
    }
    let highest = lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|&logit| logit == highest).unwrap_or(0) as u32
}

fn check_finite(logits: &[f32]) -> Result<()> {
    let (chunks, rest) = logits.as_chunks::<LANES>();
    // A finite number times zero is zero; anything else is NaN, and stays it.
    let mut lanes = [0.0f32; LANES];
    for chunk in chunks {
        for (lane, &logit) in lanes.iter_mut().zip(chunk) {
            *lane += logit * 0.0;
        }
    }
    if lanes.iter().sum::<f32>() == 0.0 && rest.iter().all(|logit| logit.is_finite()) {
        return Ok(());
    }
    let token_id = logits.iter().position(|logit| !logit.is_finite()).unwrap_or(0);
    Err(Error::numerical(format!("the logit of token {token_id} is {}", logits[token_id]))
        .hint("the weights or the adapter overflow; try another adapter"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Probabilities by token id that a sampler draws from.
    fn distribution(parameters: SamplingParameters, logits: &[f32]) -> Vec<f64> {
        let mut sampler = Sampler::new(parameters).unwrap();
        sampler.weigh_candidates(logits);
        let total: f64 = sampler.candidates.iter().map(|candidate| f64::from(candidate.value)).sum();
        let mut probabilities = vec![0.0; logits.len()];
        for candidate in &sampler.candidates {
            probabilities[candidate.token_id as usize] = f64::from(candidate.value) / total;
        }
        probabilities
    }

    /// Logits whose softmax at temperature 1 is `probabilities`.
    fn logits_of(probabilities: &[f64]) -> Vec<f32> {
        probabilities.iter().map(|probability| (probability.ln() + 3.0) as f32).collect()
    }

    fn assert_close(found: &[f64], expected: &[f64]) {
        for (token_id, (found, expected)) in found.iter().zip(expected).enumerate() {
            // Logits and exponentials in f32: a few units in the last place of numbers near 3.
            assert!((found - expected).abs() < 2e-6, "token {token_id}: {found} for {expected}");
        }
    }

    const SAMPLED: SamplingParameters = SamplingParameters {
        temperature: 1.0,
        top_k: None,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        seed: 7,
    };

    #[test]
    fn distributions_are_those_computed_by_hand() {
        let logits = logits_of(&[0.1, 0.4, 0.05, 0.3, 0.15]);
        assert_close(&distribution(SAMPLED, &logits), &[0.1, 0.4, 0.05, 0.3, 0.15]);
        // Temperature ½ squares the probabilities: 0.01 0.16 0.0025 0.09 0.0225, sum 0.285.
        let cold = SamplingParameters { temperature: 0.5, ..SAMPLED };
        assert_close(
            &distribution(cold, &logits),
            &[0.01 / 0.285, 0.16 / 0.285, 0.0025 / 0.285, 0.09 / 0.285, 0.0225 / 0.285],
        );
        let top_k = SamplingParameters { top_k: Some(2), ..SAMPLED };
        assert_close(&distribution(top_k, &logits), &[0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0, 0.0]);
        // 0.4 + 0.3 reach 0.65; for 0.75 the 0.15 is needed too.
        let nucleus = SamplingParameters { top_p: 0.65, ..SAMPLED };
        assert_close(&distribution(nucleus, &logits), &[0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0, 0.0]);
        let nucleus = SamplingParameters { top_p: 0.75, ..SAMPLED };
        assert_close(&distribution(nucleus, &logits), &[0.0, 0.4 / 0.85, 0.0, 0.3 / 0.85, 0.15 / 0.85]);
        let nucleus = SamplingParameters { top_p: 1e-9, ..SAMPLED };
        assert_close(&distribution(nucleus, &logits), &[0.0, 1.0, 0.0, 0.0, 0.0]);
        // 0.3 of the highest 0.4 is 0.12.
        let min_p = SamplingParameters { min_p: 0.3, ..SAMPLED };
        assert_close(&distribution(min_p, &logits), &[0.0, 0.4 / 0.85, 0.0, 0.3 / 0.85, 0.15 / 0.85]);
    }

    #[test]
    fn the_order_is_temperature_then_top_k_then_top_p_then_min_p() {
        let logits = logits_of(&[0.1, 0.4, 0.05, 0.3, 0.15]);
        // After temperature ½ and top-k 3: 0.16 0.09 0.0225 of 0.2725; 0.587 does not reach 0.6, 0.917 does.
        let all = SamplingParameters { temperature: 0.5, top_k: Some(3), top_p: 0.6, ..SAMPLED };
        assert_close(&distribution(all, &logits), &[0.0, 0.64, 0.0, 0.36, 0.0]);
        // Without the top-k the total is 0.285 and 0.16 is a smaller share of it; same nucleus for 0.87, not for 0.9.
        let nucleus = SamplingParameters { temperature: 0.5, top_p: 0.9, ..SAMPLED };
        assert_close(
            &distribution(nucleus, &logits),
            &[0.0, 0.16 / 0.2725, 0.0, 0.09 / 0.2725, 0.0225 / 0.2725],
        );
        let nucleus = SamplingParameters { top_k: Some(3), ..nucleus };
        assert_close(&distribution(nucleus, &logits), &[0.0, 0.64, 0.0, 0.36, 0.0]);
        let min_p = SamplingParameters { min_p: 0.6, ..nucleus };
        assert_close(&distribution(min_p, &logits), &[0.0, 1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn ties_at_the_kth_place_all_stay() {
        let logits = logits_of(&[0.2, 0.4, 0.2, 0.2]);
        let top_k = SamplingParameters { top_k: Some(2), ..SAMPLED };
        assert_close(&distribution(top_k, &logits), &[0.2, 0.4, 0.2, 0.2]);
    }

    #[test]
    fn a_wide_nucleus_is_that_of_a_full_sort() {
        let logits: Vec<f32> =
            (0..5000u32).map(|place| (place.wrapping_mul(2_654_435_761) >> 16) as f32 / 2e4).collect();
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&left, &right| logits[right].total_cmp(&logits[left]).then(left.cmp(&right)));
        let weight = |place: &usize| f64::from(logits[*place] - logits[order[0]]).exp();
        let total: f64 = order.iter().map(weight).sum();
        for top_p in [0.01, 0.3, 0.9, 0.999] {
            let mut sum = 0.0;
            let kept = order.iter().take_while(|&place| {
                let is_open = sum < f64::from(top_p) * total;
                sum += weight(place);
                is_open
            });
            let mut expected = vec![false; logits.len()];
            kept.for_each(|&place| expected[place] = true);
            let found = distribution(SamplingParameters { top_p, ..SAMPLED }, &logits);
            let differing =
                found.iter().zip(&expected).filter(|(found, expected)| (**found > 0.0) != **expected);
            // Sums of f32 and of f64 weights may part at the edge by one token.
            assert!(differing.count() <= 1, "top_p {top_p}");
        }
    }

    #[test]
    fn draws_follow_the_distribution_and_the_seed() {
        let expected = [0.1, 0.4, 0.05, 0.3, 0.15];
        let logits = logits_of(&expected);
        let draws = |seed| {
            let mut sampler = Sampler::new(SamplingParameters { seed, ..SAMPLED }).unwrap();
            let draw = |_| sampler.next_token(&mut logits.clone()).unwrap();
            (0..20_000).map(draw).collect::<Vec<u32>>()
        };
        let first = draws(1);
        assert_eq!(first, draws(1));
        assert_ne!(first, draws(2));
        for (token_id, probability) in expected.iter().enumerate() {
            let count = first.iter().filter(|&&drawn| drawn as usize == token_id).count() as f64;
            let deviation = (20_000.0 * probability * (1.0 - probability)).sqrt();
            // Five deviations of a binomial; the seed is fixed, so this either holds or never does.
            assert!((count - 20_000.0 * probability).abs() < 5.0 * deviation, "token {token_id}: {count}");
        }
    }

    #[test]
    fn the_repetition_penalty_covers_prompt_and_text_once_each() {
        let parameters = SamplingParameters { repetition_penalty: 2.0, ..SamplingParameters::default() };
        let mut sampler = Sampler::new(parameters).unwrap();
        sampler.observe(&[1, 1, 3]);
        let mut logits = [0.5, 1.2, 0.9, -1.0];
        // Token 1: 1.2 → 0.6 (once); token 3: -1 → -2; so token 2 wins, and is penalised next time.
        assert_eq!(sampler.next_token(&mut logits).unwrap(), 2);
        assert_eq!(logits, [0.5, 0.6, 0.9, -2.0]);
        let mut logits = [0.5, 1.2, 0.9, -1.0];
        assert_eq!(sampler.next_token(&mut logits).unwrap(), 1);
        assert_eq!(logits, [0.5, 0.6, 0.45, -2.0]);
    }

    #[test]
    fn greedy_takes_the_first_of_the_highest() {
        let mut sampler = Sampler::new(SamplingParameters::default()).unwrap();
        for length in [1, 5, 16, 17, 100] {
            for place in 0..length {
                let mut logits = vec![-2.0f32; length];
                logits[place] = -1.0;
                logits[length - 1] = -1.0;
                assert_eq!(sampler.next_token(&mut logits).unwrap(), place as u32, "of {length}");
            }
        }
    }

    #[test]
    fn logits_that_are_not_finite_are_an_error() {
        let mut sampler = Sampler::new(SAMPLED).unwrap();
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for place in [0, 20, 33] {
                let mut logits = vec![1.0f32; 34];
                logits[place] = value;
                let error = sampler.next_token(&mut logits).unwrap_err();
                assert_eq!(error.kind().exit_code(), 7);
                assert!(error.message().contains(&format!("token {place} ")), "{error}");
            }
        }
    }

    #[test]
    fn parameters_out_of_range_name_the_range() {
        let ranged = [
            (SamplingParameters { temperature: -0.1, ..SAMPLED }, "≥ 0"),
            (SamplingParameters { temperature: f32::NAN, ..SAMPLED }, "≥ 0"),
            (SamplingParameters { top_p: 0.0, ..SAMPLED }, "above 0, at most 1"),
            (SamplingParameters { top_p: 1.1, ..SAMPLED }, "above 0, at most 1"),
            (SamplingParameters { min_p: -0.1, ..SAMPLED }, "from 0 to 1"),
            (SamplingParameters { min_p: 1.5, ..SAMPLED }, "from 0 to 1"),
            (SamplingParameters { repetition_penalty: 0.0, ..SAMPLED }, "above 0"),
            (SamplingParameters { top_k: Some(0), ..SAMPLED }, "at least 1"),
        ];
        for (parameters, range) in ranged {
            let error = Sampler::new(parameters).unwrap_err();
            assert_eq!(error.kind().exit_code(), 2);
            assert!(error.message().contains(range), "{error}");
        }
    }
}
