//! Where time goes: the ranges of a stretch of work with the marks between which each ran.
//!
//! [`TimingLayer`] hands the spans to whoever [`listen`]s; what a mark is, an event on a device or a clock's reading, is the
//! listener's. A range may tell what it takes at least, in its fields `flops` and `bytes`.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tracing::Subscriber;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

/// A range that has ended.
#[derive(Clone, Debug, PartialEq)]
pub struct TimedRange {
    /// "linear backward".
    pub name: &'static str,
    /// Multiplications and additions; 0 where it did not tell.
    pub flops: f64,
    /// Bytes read and written at least; 0 where it did not tell.
    pub bytes: f64,
    /// Its marks, as the listener counts them.
    pub marks: Range<usize>,
    /// Whether no other range lies in it.
    pub is_leaf: bool,
}

struct Listener {
    mark: Box<dyn FnMut() -> usize + Send>,
    /// Entered, outermost first; their end is not known yet.
    open: Vec<TimedRange>,
    ended: Vec<TimedRange>,
}

/// Ranges are entered on one thread at a time: the one that runs the training loop.
static LISTENER: Mutex<Option<Listener>> = Mutex::new(None);

fn listener() -> MutexGuard<'static, Option<Listener>> {
    LISTENER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Collects the ranges that begin from now on; `mark` sets a mark and returns its number. One listener at a time: a new one
/// takes the place of the old.
pub fn listen(mark: impl FnMut() -> usize + Send + 'static) {
    *listener() = Some(Listener { mark: Box::new(mark), open: Vec::new(), ended: Vec::new() });
}

/// Ends the collection: the ranges that began and ended in it.
pub fn stop_listening() -> Vec<TimedRange> {
    listener().take().map_or_else(Vec::new, |listener| listener.ended)
}

/// Spans as timed ranges, while somebody listens.
pub struct TimingLayer;

/// A span's own words on its work.
#[derive(Default)]
struct ToldWork {
    flops: f64,
    bytes: f64,
}

impl Visit for ToldWork {
    fn record_f64(&mut self, field: &Field, value: f64) {
        match field.name() {
            "flops" => self.flops = value,
            "bytes" => self.bytes = value,
            _ => {}
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for TimingLayer {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut told = ToldWork::default();
        attributes.record(&mut told);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(told);
        }
    }

    fn on_enter(&self, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut listener = listener();
        let Some(Listener { mark, open, .. }) = &mut *listener else { return };
        if let Some(outer) = open.last_mut() {
            outer.is_leaf = false;
        }
        let (flops, bytes) =
            span.extensions().get::<ToldWork>().map_or((0.0, 0.0), |told| (told.flops, told.bytes));
        let start = mark();
        open.push(TimedRange { name: span.name(), flops, bytes, marks: start..start, is_leaf: true });
    }

    fn on_exit(&self, _: &Id, _: Context<'_, S>) {
        let mut listener = listener();
        let Some(Listener { mark, open, ended }) = &mut *listener else { return };
        // Without one it began before anybody listened.
        let Some(mut range) = open.pop() else { return };
        range.marks.end = mark();
        ended.push(range);
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;
    use crate::range;
    use crate::ranges::OnlyRanges;

    #[test]
    fn ranges_are_collected_with_their_marks_and_work() {
        let subscriber = tracing_subscriber::registry().with(TimingLayer.with_filter(OnlyRanges));
        let ranges = tracing::subscriber::with_default(subscriber, || {
            let before = range!("before");
            let mut marks = 0;
            listen(move || {
                marks += 1;
                marks - 1
            });
            drop(before);
            {
                let _layer = range!("layer", number = 3);
                drop(range!("linear", flops = 6.0, bytes = 2.0));
                drop(range!("norm"));
            }
            let _open = range!("open");
            stop_listening()
        });
        let range = |name, (flops, bytes), marks, is_leaf| TimedRange { name, flops, bytes, marks, is_leaf };
        assert_eq!(
            ranges,
            [
                range("linear", (6.0, 2.0), 1..2, true),
                range("norm", (0.0, 0.0), 3..4, true),
                range("layer", (0.0, 0.0), 0..5, false),
            ]
        );
        assert_eq!(stop_listening(), []);
    }
}
