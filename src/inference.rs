//! Generation: prompt in, tokens out as they come.

mod sampling;
mod session;
mod text_stream;

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

pub use self::sampling::{Sampler, SamplingParameters};
pub use self::session::Session;
pub use self::text_stream::TextStream;
use crate::error::{Error, Result};

/// What generation needs of a model: logits `[V]` after tokens.
pub trait NextTokenLogits {
    /// How many more tokens the text may have.
    fn room(&self) -> usize;
    /// Appends `token_ids` to the text so far and writes the logits of what follows it.
    fn next_token_logits(&mut self, token_ids: &[u32], logits: &mut Vec<f32>) -> Result<()>;
}

/// When generation ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopConditions {
    /// At most this many new tokens.
    pub max_new_tokens: usize,
    /// Any of these ends the text and is no part of it.
    pub eos_token_ids: Vec<u32>,
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// An end-of-sequence token.
    Eos,
    /// `max_new_tokens`, or the model's longest text.
    Length,
    /// The receiver of the tokens asked for it.
    Cancelled,
}

impl StopReason {
    /// The reason's name in `--json` output.
    pub const fn name(self) -> &'static str {
        match self {
            StopReason::Eos => "eos",
            StopReason::Length => "length",
            StopReason::Cancelled => "cancelled",
        }
    }
}

/// What was generated, and how long it took.
#[derive(Clone, Debug)]
pub struct Generation {
    /// New tokens, without the EOS.
    pub token_ids: Vec<u32>,
    /// Why it ended.
    pub stop_reason: StopReason,
    /// Until the logits after the prompt were there.
    pub prompt_time: Duration,
    /// From then to the end.
    pub decoding_time: Duration,
}

/// Continues `prompt`: hands each new token to `on_token` as it comes.
///
/// ```
/// use std::ops::ControlFlow;
/// use fastlora::inference::{generate, NextTokenLogits, Sampler, SamplingParameters, StopConditions, StopReason};
///
/// /// After token t comes t + 1.
/// struct Counting;
/// impl NextTokenLogits for Counting {
///     fn room(&self) -> usize {
///         usize::MAX
///     }
///
///     fn next_token_logits(&mut self, ids: &[u32], logits: &mut Vec<f32>) -> fastlora::error::Result<()> {
///         logits.clear();
///         logits.resize(10, 0.0);
///         logits[ids[ids.len() - 1] as usize + 1] = 1.0;
///         Ok(())
///     }
/// }
/// let mut sampler = Sampler::new(SamplingParameters::default())?;
/// let stop = StopConditions { max_new_tokens: 100, eos_token_ids: vec![7] };
/// let generation = generate(&mut Counting, &[1, 3], &mut sampler, &stop, |_| ControlFlow::Continue(()))?;
/// assert_eq!(generation.token_ids, [4, 5, 6]);
/// assert_eq!(generation.stop_reason, StopReason::Eos);
/// # Ok::<(), fastlora::error::Error>(())
/// ```
///
/// # Errors
/// An empty prompt, or one for which there is no room; what the model and the sampler refuse.
pub fn generate(
    model: &mut impl NextTokenLogits,
    prompt: &[u32],
    sampler: &mut Sampler,
    stop: &StopConditions,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Generation> {
    if prompt.is_empty() {
        return Err(Error::data("the prompt has no tokens").hint("give it some text"));
    }
    let room = model.room();
    if prompt.len() > room {
        return Err(Error::data(format!(
            "the prompt has {} tokens, the model has room for {room}",
            prompt.len()
        ))
        .hint("shorten it"));
    }
    let start = Instant::now();
    sampler.observe(prompt);
    let mut logits = Vec::new();
    let mut token_ids = Vec::with_capacity(stop.max_new_tokens.min(1 << 16));
    let mut stop_reason = StopReason::Length;
    let mut prompt_time = Duration::ZERO;
    // The last new token needs no room: nothing is asked after it.
    for position in 0..stop.max_new_tokens.min(room - prompt.len() + 1) {
        let news = token_ids.last().map_or(prompt, std::slice::from_ref);
        model.next_token_logits(news, &mut logits)?;
        if position == 0 {
            prompt_time = start.elapsed();
        }
        let token_id = sampler.next_token(&mut logits)?;
        if stop.eos_token_ids.contains(&token_id) {
            stop_reason = StopReason::Eos;
            break;
        }
        token_ids.push(token_id);
        if on_token(token_id).is_break() {
            stop_reason = StopReason::Cancelled;
            break;
        }
    }
    Ok(Generation { token_ids, stop_reason, prompt_time, decoding_time: start.elapsed() - prompt_time })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers what it was fed; after token t comes t + 1 of `vocabulary`.
    struct Counting {
        vocabulary: usize,
        room: usize,
        fed: Vec<Vec<u32>>,
    }

    impl NextTokenLogits for Counting {
        fn room(&self) -> usize {
            self.room - self.fed.iter().map(Vec::len).sum::<usize>()
        }

        fn next_token_logits(&mut self, token_ids: &[u32], logits: &mut Vec<f32>) -> Result<()> {
            self.fed.push(token_ids.to_vec());
            logits.clear();
            logits.resize(self.vocabulary, 0.0);
            logits[(token_ids[token_ids.len() - 1] as usize + 1) % self.vocabulary] = 4.0;
            Ok(())
        }
    }

    fn run(
        prompt: &[u32],
        stop: &StopConditions,
        parameters: SamplingParameters,
        on_token: impl FnMut(u32) -> ControlFlow<()>,
    ) -> (Result<Generation>, Vec<Vec<u32>>) {
        let mut model = Counting { vocabulary: 50, room: 60, fed: Vec::new() };
        let mut sampler = Sampler::new(parameters).unwrap();
        let generation = generate(&mut model, prompt, &mut sampler, stop, on_token);
        (generation, model.fed)
    }

    #[test]
    fn the_prompt_is_fed_once_and_then_one_token_at_a_time() {
        let stop = StopConditions { max_new_tokens: 3, eos_token_ids: vec![] };
        let mut streamed = Vec::new();
        let (generation, fed) = run(&[9, 5], &stop, SamplingParameters::default(), |token_id| {
            streamed.push(token_id);
            ControlFlow::Continue(())
        });
        let generation = generation.unwrap();
        assert_eq!(generation.token_ids, [6, 7, 8]);
        assert_eq!(generation.stop_reason, StopReason::Length);
        assert_eq!(streamed, generation.token_ids);
        assert_eq!(fed, [vec![9, 5], vec![6], vec![7]]);
    }

    #[test]
    fn every_eos_of_the_model_stops() {
        for (eos_token_ids, expected) in
            [(vec![7, 30], vec![6]), (vec![30, 8], vec![6, 7]), (vec![6], vec![])]
        {
            let stop = StopConditions { max_new_tokens: 40, eos_token_ids };
            let (generation, _) =
                run(&[5], &stop, SamplingParameters::default(), |_| ControlFlow::Continue(()));
            let generation = generation.unwrap();
            assert_eq!(generation.token_ids, expected);
            assert_eq!(generation.stop_reason, StopReason::Eos);
        }
    }

    #[test]
    fn the_receiver_may_stop() {
        let stop = StopConditions { max_new_tokens: 40, eos_token_ids: vec![] };
        let (generation, fed) = run(&[5], &stop, SamplingParameters::default(), |token_id| match token_id {
            7 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        });
        assert_eq!(generation.unwrap().stop_reason, StopReason::Cancelled);
        assert_eq!(fed.len(), 2);
    }

    #[test]
    fn the_text_ends_where_the_model_has_no_more_room() {
        let stop = StopConditions { max_new_tokens: 100, eos_token_ids: vec![] };
        let prompt = vec![5; 58];
        let (generation, fed) =
            run(&prompt, &stop, SamplingParameters::default(), |_| ControlFlow::Continue(()));
        let generation = generation.unwrap();
        assert_eq!((generation.token_ids.len(), generation.stop_reason), (3, StopReason::Length));
        assert_eq!(fed.iter().map(Vec::len).sum::<usize>(), 60);
        let (refused, _) = run(&[5; 61], &stop, SamplingParameters::default(), |_| ControlFlow::Continue(()));
        assert!(refused.unwrap_err().message().contains("61 tokens, the model has room for 60"));
    }

    #[test]
    fn no_tokens_are_asked_for_or_given() {
        let stop = StopConditions { max_new_tokens: 0, eos_token_ids: vec![] };
        let (generation, fed) =
            run(&[5], &stop, SamplingParameters::default(), |_| ControlFlow::Continue(()));
        assert!(generation.unwrap().token_ids.is_empty());
        assert!(fed.is_empty());
        let (generation, _) = run(&[], &stop, SamplingParameters::default(), |_| ControlFlow::Continue(()));
        assert_eq!(generation.unwrap_err().kind().exit_code(), 3);
    }

    #[test]
    fn same_seed_same_text() {
        let stop = StopConditions { max_new_tokens: 30, eos_token_ids: vec![] };
        let text = |seed| {
            let parameters =
                SamplingParameters { temperature: 1.3, top_p: 0.95, seed, ..SamplingParameters::default() };
            run(&[5], &stop, parameters, |_| ControlFlow::Continue(())).0.unwrap().token_ids
        };
        assert_eq!(text(1), text(1));
        assert_ne!(text(1), text(2));
    }
}
